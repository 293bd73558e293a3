"""Native attention of any width, tokens and queries, and the half of a layer around it; the rule: tests/parity.py."""

import ctypes
import mmap
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parity import SEED, Tensors, check, nan_memory
from triton_interpreter import INTERPRETED

from ctr_kernels.attention import field_attention, field_attention_packed
from ctr_kernels.attention.reference import field_attention_reference
from ctr_kernels.layer.operator import attention_half
from ctr_kernels.layer.reference import attention_half_reference
from ctr_kernels.philox import dropout_mask_torch

pytestmark = pytest.mark.skipif(INTERPRETED, reason="for the native kernels")

HEAD_DIMS = (1, 4, 5, 8, 10, 16, 20, 24, 32, 40, 64, 128)
FIELDS = (1, 2, 24, 27, 40, 64, 65, 100, 128)
PAGE = mmap.PAGESIZE

properties = settings(max_examples=60, deadline=None, derandomize=True,
                      suppress_health_check=[HealthCheck.function_scoped_fixture])


def attention_inputs(batch: int, queries: int, fields: int, width: int, dtype: torch.dtype = torch.float32) -> Tensors:
    return [torch.randn(batch, queries, width).to(dtype),
            *torch.randn(batch, fields, 2 * width).to(dtype).chunk(2, dim=-1)]


def check_attention(kernels: str, inputs: Tensors, heads: int, dropout_p: float = 0.0,
                    scale: float | None = None) -> None:
    factor = scale if scale is not None else (inputs[0].shape[-1] // heads) ** -0.5
    check(
        lambda q, k, v: field_attention(q, k, v, num_heads=heads, scale=scale, dropout_p=dropout_p, seed=SEED,
                                        kernels=kernels),
        lambda q, k, v: field_attention_reference(q, k, v, heads, factor, dropout_p, torch.tensor([SEED])),
        inputs,
        torch.randn(inputs[0].shape, dtype=inputs[0].dtype),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_width_and_number_of_tokens(fused: str, head_dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(head_dim)
    for fields in FIELDS:
        for queries in {fields, 1, 3}:
            batch = max(2, 512 // (queries * head_dim))  # the largest of few errors says little
            inputs = attention_inputs(batch, queries, fields, 2 * head_dim, dtype)
            check_attention(fused, inputs, 2, 0.3 if fields % 2 else 0.0)


@properties
@given(st.integers(0, 3), st.integers(1, 140), st.integers(1, 128), st.integers(1, 3), st.integers(2, 128),
       st.sampled_from([0.0, 0.5]), st.sampled_from([None, -0.3]), st.sampled_from([torch.float32, torch.bfloat16]),
       st.integers(0, 2**32))
def test_any_shape(fused: str, batch: int, queries: int, fields: int, heads: int, head_dim: int, dropout_p: float,
                   scale: float | None, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    check_attention(fused, attention_inputs(batch, queries, fields, heads * head_dim, dtype), heads, dropout_p, scale)


@pytest.mark.parametrize("queries", [1, 3, 40, 100])
@pytest.mark.parametrize("head_dim", [5, 16, 24])
def test_large_logits_and_negative_scales(fused: str, head_dim: int, queries: int) -> None:
    torch.manual_seed(2)
    q, k, v = attention_inputs(3, queries, 40, 4 * head_dim)
    for scale in (1.0, -0.5):
        check_attention(fused, [q * 50, k * 50, v], 4, scale=scale)


@pytest.mark.parametrize(("batch", "queries", "fields", "heads", "head_dim"), [
    (700, 20, 20, 8, 20), (700, 20, 20, 2, 24), (300, 100, 70, 4, 20), (4000, 20, 5, 4, 12), (11000, 1, 3, 8, 24),
    (900, 27, 27, 5, 20), (900, 39, 39, 6, 10)])  # the last two: samples that begin within a line
def test_large_outputs(fused: str, batch: int, queries: int, fields: int, heads: int, head_dim: int) -> None:
    """Written around the caches, heads that share lines put together before: 8 MB, but for the second shape."""
    torch.manual_seed(7)
    check_attention(fused, attention_inputs(batch, queries, fields, heads * head_dim), heads)
    qkv, grad = torch.randn(min(batch, 700), fields, 3 * heads * head_dim), torch.randn(1)
    packed = field_attention_packed(qkv.requires_grad_(), num_heads=heads, kernels=fused)
    parts = field_attention(*qkv.chunk(3, dim=-1), num_heads=heads, kernels=fused)
    assert torch.equal(packed, parts)
    of_packed, of_parts = (torch.autograd.grad(y, qkv, grad.expand_as(y))[0] for y in (packed, parts))
    assert torch.equal(of_packed, of_parts)


@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("head_dim", [16, 20])
def test_any_strides(fused: str, head_dim: int, queries: int) -> None:
    torch.manual_seed(3)
    x = torch.randn(5, 40, 2 * head_dim)
    column, sample = x[:, :1].expand(x.shape), x[:1].expand(x.shape)
    turned = torch.randn(40, 5, 2 * head_dim).transpose(0, 1)
    for k, v in [(column, x), (turned, sample), (x[:, ::2], turned[:, ::2])]:
        check_attention(fused, [torch.randn(5, 40, 3 * head_dim)[:, :queries, head_dim:], k, v], 2)
        check_attention(fused, [sample[:, :queries], k, v], 2)


@pytest.mark.parametrize("queries", [1, 2, 40, 70, 100])
@pytest.mark.parametrize("fields", [27, 100])
def test_the_mask_is_the_specification(fused: str, fields: int, queries: int) -> None:
    """Queries beyond a block, and one query, draw the rows (b H + h) Q + query of the mask."""
    v = torch.eye(fields, 100).expand(3, fields, 100).repeat(1, 1, 2)  # each head then returns its probabilities
    q = torch.zeros(3, queries, 200)
    out = field_attention(q, torch.zeros_like(v), v, num_heads=2, dropout_p=0.3, seed=SEED, kernels=fused)
    kept = out.view(3, queries, 2, 100)[..., :fields].transpose(1, 2).reshape(-1, fields) != 0
    assert torch.equal(kept, dropout_mask_torch(6 * queries, fields, 0.3, torch.tensor([SEED])))


@pytest.fixture
def guarded() -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Copies tensors to memory behind which a page may neither be read nor written."""
    libc, kept = ctypes.CDLL(None, use_errno=True), []

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        size = tensor.numel() * tensor.element_size()
        pages = -(-size // PAGE)
        memory = mmap.mmap(-1, (pages + 1) * PAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        protect = libc.mprotect
        assert protect(ctypes.c_void_p(address + pages * PAGE), ctypes.c_size_t(PAGE), 0) == 0
        kept.append((protect, address + pages * PAGE))
        found = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=pages * PAGE - size)
        return found.view(tensor.shape).copy_(tensor)

    yield copy
    for protect, address in kept:
        protect(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), mmap.PROT_READ | mmap.PROT_WRITE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [1, 5, 10, 16, 20, 24])
def test_nothing_is_read_behind_a_tensor(fused: str, guarded: Callable, head_dim: int, dtype: torch.dtype) -> None:
    for queries, fields in [(1, 7), (3, 40), (40, 40), (100, 100)]:
        q, k, v, grad = (guarded(torch.randn(2, n, 3 * head_dim).to(dtype)) for n in (queries, fields, fields, queries))
        settings = (3, 1.0, 0.0, None)
        with nan_memory():
            out = torch.ops.ctr.field_attention(q, k, v, *settings)
            grads = torch.ops.ctr.field_attention_backward(grad, q, k, v, *settings)
        assert all(torch.isfinite(t).all() for t in (out, *grads))


def test_the_packed_form_is_the_same(fused: str) -> None:
    torch.manual_seed(5)
    for fields, width in [(27, 60), (100, 64), (5, 14)]:
        qkv = torch.randn(3, fields, 3 * width, requires_grad=True)
        grad = torch.randn(3, fields, width)
        packed, parts = field_attention_packed(qkv, num_heads=2, kernels=fused), field_attention(
            *qkv.chunk(3, dim=-1), num_heads=2, kernels=fused)
        assert torch.equal(packed, parts)
        (of_packed,), (of_parts,) = (torch.autograd.grad(y, qkv, grad) for y in (packed, parts))
        assert torch.equal(of_packed, of_parts)


def half_inputs(batch: int, fields: int, dim: int, width: int, norm: str | None) -> Tensors:
    shapes = [(batch, fields, dim), (3 * width, dim), (3 * width,), (dim, width), (dim,)]
    shapes += [(dim,), (dim,)] if norm else []
    tensors = [torch.randn(shape) / (shape[-1] ** 0.5 if i in (1, 3) else 1.0) for i, shape in enumerate(shapes)]
    return [*tensors[:5], *(t * 0.2 + 1 for t in tensors[5:])]  # trained norms are near 1


def check_half(inputs: Tensors, heads: int, norm: str | None, queries: int, dropout_p: float) -> None:
    x, scale = inputs[0], (inputs[3].shape[1] // heads) ** -0.5

    def run(function: Callable, *tensors: torch.Tensor) -> torch.Tensor:
        weight, bias = tensors[5:] or (None, None)
        out: torch.Tensor = function(*tensors[:5], heads, scale, dropout_p, torch.tensor([SEED]), norm=norm,
                                     norm_weight=weight, norm_bias=bias, eps=1e-5, queries=queries)
        return out

    rows = queries or x.shape[1]
    grad_out = torch.randn(x.shape[0], rows, x.shape[2]) / max(1, x.shape[0] * rows) ** 0.5
    check(lambda *t: run(attention_half, *t), lambda *t: run(attention_half_reference, *t), inputs, grad_out)


@pytest.mark.parametrize("queries", [0, 1, 3])
@pytest.mark.parametrize("norm", ["pre", None])
@pytest.mark.parametrize(("batch", "fields", "dim", "heads", "head_dim"), [
    (0, 27, 64, 4, 16), (3, 27, 64, 4, 16), (2, 40, 192, 8, 24), (19, 33, 20, 3, 7), (17, 5, 7, 2, 64),
    (5, 24, 40, 2, 20), (8, 100, 64, 4, 16), (30, 39, 24, 2, 12), (40, 3, 12, 1, 1)])
def test_half_a_layer(fused: str, batch: int, fields: int, dim: int, heads: int, head_dim: int, norm: str | None,
                      queries: int) -> None:
    torch.manual_seed(dim)
    check_half(half_inputs(batch, fields, dim, heads * head_dim, norm), heads, norm, queries, 0.0)
    check_half(half_inputs(batch, fields, dim, heads * head_dim, norm), heads, norm, queries, 0.3)


@properties
@given(st.sampled_from([0, 8, 16, 17]), st.integers(1, 128), st.integers(16, 100), st.integers(1, 3),
       st.integers(2, 40), st.sampled_from(["pre", None]), st.integers(0, 4), st.integers(0, 2**32))
def test_half_of_any_shape(fused: str, batch: int, fields: int, dim: int, heads: int, head_dim: int, norm: str | None,
                           queries: int, seed: int) -> None:
    torch.manual_seed(seed)
    check_half(half_inputs(batch, fields, dim, heads * head_dim, norm), heads, norm, min(queries, fields), 0.0)


def test_half_results_do_not_depend_on_the_number_of_threads(fused: str) -> None:
    torch.manual_seed(6)
    inputs = [t.requires_grad_() for t in half_inputs(64, 27, 40, 48, "pre")]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out = attention_half(*inputs[:5], 4, 0.3, 0.1, torch.tensor([1]), norm="pre", norm_weight=inputs[5],
                                 norm_bias=inputs[6], eps=1e-5, queries=2)
            results.append([out, *torch.autograd.grad(out.cos().sum(), inputs)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
