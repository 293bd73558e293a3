"""Attention in Triton: parity, dropout mask and memory traffic in Triton's interpreter."""

import pytest
import torch
from parity import SEED, check
from triton_interpreter import interpreted, outside, run_in_the_interpreter
from triton_traffic import counting, times

from ctr_kernels import field_attention
from ctr_kernels.attention import field_attention_packed
from ctr_kernels.attention.reference import field_attention_reference
from ctr_kernels.philox import dropout_mask_torch

pytest.importorskip("triton")
from ctr_kernels.attention import triton as kernels  # noqa: E402


@outside
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__, 40)


def check_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, dropout_p: float = 0.0,
                    scale: float | None = None) -> None:
    factor = scale if scale is not None else (q.shape[-1] // heads) ** -0.5
    check(
        lambda q, k, v: field_attention(q, k, v, num_heads=heads, scale=scale, dropout_p=dropout_p, seed=SEED,
                                        kernels="triton"),
        lambda q, k, v: field_attention_reference(q, k, v, heads, factor, dropout_p, torch.tensor([SEED])),
        [q, k, v],
        torch.randn(q.shape, dtype=q.dtype),
    )


def draw(batch: int, queries: int, fields: int, heads: int, head_dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, and k and v as halves of one tensor."""
    width = heads * head_dim
    return [torch.randn(batch, queries, width).to(dtype), *torch.randn(batch, fields, 2 * width).to(dtype).chunk(2, -1)]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [8, 16, 32, 64])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_parity(head_dim: int, dropout_p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for batch, fields, heads in [(0, 27, 4), (1, 1, 1), (3, 27, 2), (1, 28, 2), (2, 16, 1), (1, 33, 1), (1, 64, 1)]:
        check_attention(*torch.randn(batch, fields, 3 * heads * head_dim).to(dtype).chunk(3, dim=-1), heads, dropout_p)


# (B, Q, F, H, d): heads of the field's other widths, many fields, one query, other numbers of queries than fields.
SHAPES = [(2, 27, 27, 2, 1), (2, 40, 40, 2, 24), (1, 30, 30, 3, 5), (1, 100, 100, 1, 20), (1, 128, 128, 1, 128),
          (3, 1, 40, 2, 16), (1, 1, 128, 2, 100), (2, 1, 1, 2, 4), (0, 1, 40, 2, 16), (2, 5, 40, 2, 10),
          (1, 40, 7, 1, 16), (1, 90, 33, 1, 33)]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity_of_other_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    for dropout_p in (0.0, 0.3):
        check_attention(*draw(*shape, dtype), shape[3], dropout_p)


@interpreted
@pytest.mark.parametrize("launch", [(1, 4, 0), (2, 4, 0), (1, 4, 16), (1, 4, 16, 32), (1, 4, 32, 64)], ids=str)
def test_parity_of_every_kind_of_launch(launch: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """All columns of a head at once and pairs of heads, slices of columns, blocks of queries: whatever the table."""
    torch.manual_seed(7)
    monkeypatch.setattr(kernels, "default", lambda key: kernels.Launch(*launch))
    for shape in [(2, 40, 40, 1, 40), (1, 70, 33, 2, 20)]:
        check_attention(*draw(*shape, torch.float32), shape[3], 0.3)


@interpreted
@pytest.mark.parametrize(("queries", "fields", "launch"), [(1, 40, None), (6, 40, None), (70, 40, (1, 4, 32, 32))])
def test_the_mask_of_other_queries_is_that_of_the_specification(queries: int, fields: int, launch: tuple | None,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    if launch:
        monkeypatch.setattr(kernels, "default", lambda key: kernels.Launch(*launch))
    v = torch.eye(fields, 64).expand(2, fields, 64).repeat(1, 1, 2)  # each head then returns its probabilities
    out = field_attention(torch.zeros(2, queries, 128), torch.zeros_like(v), v, num_heads=2, dropout_p=0.3, seed=SEED,
                          kernels="triton")
    kept = out.view(2, queries, 2, 64)[..., :fields].transpose(1, 2).reshape(-1, fields) != 0
    assert torch.equal(kept, dropout_mask_torch(len(kept), fields, 0.3, torch.tensor([SEED])))


@interpreted
def test_gradients_share_no_memory() -> None:
    q, k, v = draw(2, 3, 5, 1, 8, torch.float32)
    grads = torch.ops.ctr.field_attention_backward(torch.ones_like(q), q, k, v, 1, 0.25, 0.0, None)
    assert len({grad.untyped_storage().data_ptr() for grad in grads}) == 3
    assert all(grad.is_contiguous() for grad in grads)


@interpreted
def test_refusals() -> None:
    with pytest.raises(ValueError, match="129 queries of F=129 fields; F from 1 to 128"):
        field_attention(*torch.zeros(3, 1, 129, 8), num_heads=1, kernels="triton")
    with pytest.raises(ValueError, match="D / num_heads = 129; 1 to 128 are supported"):
        field_attention(*torch.zeros(3, 1, 2, 129), num_heads=1, kernels="triton")


@interpreted
@pytest.mark.parametrize("scale", [None, 1.0, -0.5])
def test_large_logits_and_strides(scale: float | None) -> None:
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 27, 64) for _ in range(3))
    # Whole numbers: logits of thousands are then exact in any order of summation, and the softmax alone is judged.
    check_attention((q * 50).round(), (k * 50).round(), v, 4, scale=scale)
    check_attention(q, k[:, :1].expand(2, 27, 64), torch.randn(2, 64, 27).transpose(1, 2), 4, scale=scale)


@interpreted
def test_the_packed_projection_has_the_same_result() -> None:
    torch.manual_seed(2)
    qkv = torch.randn(2, 27, 192, requires_grad=True)
    results = []
    for out in (field_attention_packed(qkv, num_heads=4, dropout_p=0.3, seed=SEED, kernels="triton"),
                field_attention(*qkv.chunk(3, dim=-1), num_heads=4, dropout_p=0.3, seed=SEED, kernels="triton")):
        results.append([out, *torch.autograd.grad(out.square().sum(), qkv)])
    for packed, separate in zip(*results, strict=True):
        assert torch.equal(packed, separate)


@interpreted
@pytest.mark.parametrize("fields", [1, 27, 40])
def test_the_mask_is_that_of_the_specification(fields: int) -> None:
    v = torch.eye(fields, 64).expand(2, fields, 64).repeat(1, 1, 2)  # each head then returns its probabilities
    out = field_attention(torch.zeros_like(v), torch.zeros_like(v), v, num_heads=2, dropout_p=0.3, seed=SEED,
                          kernels="triton")
    kept = out.view(2, fields, 2, 64)[..., :fields].transpose(1, 2).reshape(-1, fields) != 0
    assert torch.equal(kept, dropout_mask_torch(len(kept), fields, 0.3, torch.tensor([SEED])))


@interpreted
def test_parity_of_a_wide_backward_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's row of the table has it in slices."""
    torch.manual_seed(4)
    monkeypatch.setattr(kernels, "LAUNCH", {})
    check_attention(*torch.randn(2, 64, 192).chunk(3, dim=-1), 1, 0.3)


@interpreted
def test_the_traffic_of_a_backward_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    qkv, grad = torch.randn(2, 40, 192), torch.randn(2, 40, 64)
    accesses = counting(monkeypatch)
    grads = kernels.packed_backward(grad, qkv, 1, 0.25, 0.0, None)
    assert times(accesses["load"], qkv[..., :128]) == {2}  # once from the cache
    assert times(accesses["load"], qkv[..., 128:]) == times(accesses["load"], grad) == {1}
    assert times(accesses["store"], grads) == {1} and accesses["store"].total() == grads.numel()


@interpreted
@pytest.mark.parametrize("fields", [27, 40])
def test_the_traffic_is_that_of_the_model(fields: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    qkv, grad = torch.randn(3, fields, 192), torch.randn(3, fields, 64)
    accesses = counting(monkeypatch)
    out = kernels.packed_forward(qkv, 4, 0.25, 0.0, None)
    assert times(accesses["load"], qkv) == {1} and accesses["load"].total() == qkv.numel()
    assert times(accesses["store"], out) == {1} and accesses["store"].total() == out.numel()
    accesses = counting(monkeypatch)
    grads = kernels.packed_backward(grad, qkv, 4, 0.25, 0.0, None)
    assert times(accesses["load"], qkv) == times(accesses["load"], grad) == {1}
    assert accesses["load"].total() == qkv.numel() + grad.numel()
    assert times(accesses["store"], grads) == {1} and accesses["store"].total() == grads.numel()


@interpreted
def test_the_traffic_of_one_query_is_that_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(8)
    q, k, v = draw(3, 1, 40, 4, 16, torch.float32)
    accesses = counting(monkeypatch)
    out = kernels.forward(q, k, v, 4, 0.25, 0.0, None)
    assert [times(accesses["load"], t) for t in (q, k, v)] == [{1}] * 3 and times(accesses["store"], out) == {1}
    accesses = counting(monkeypatch)
    grads = kernels.backward(q.cos(), q, k, v, 4, 0.25, 0.0, None)
    assert [times(accesses["load"], t) for t in (q, k, v)] == [{1}] * 3
    assert accesses["load"].total() == 2 * q.numel() + k.numel() + v.numel()
    assert [times(accesses["store"], t) for t in grads] == [{1}] * 3
