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
    run_in_the_interpreter(__file__, 26)


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


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [8, 16, 32, 64])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_parity(head_dim: int, dropout_p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for batch, fields, heads in [(0, 27, 4), (1, 1, 1), (3, 27, 2), (1, 28, 2), (2, 16, 1), (1, 33, 1), (1, 64, 1)]:
        check_attention(*torch.randn(batch, fields, 3 * heads * head_dim).to(dtype).chunk(3, dim=-1), heads, dropout_p)


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
    grads = kernels._backward(grad, *qkv.chunk(3, dim=-1), 1, 0.25, 0.0, None)
    assert times(accesses["load"], qkv[..., :128]) == {2}  # once from the cache
    assert times(accesses["load"], qkv[..., 128:]) == times(accesses["load"], grad) == {1}
    assert times(accesses["store"], grads) == {1} and accesses["store"].total() == grads.numel()


@interpreted
@pytest.mark.parametrize("fields", [27, 40])
def test_the_traffic_is_that_of_the_model(fields: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    qkv, grad = torch.randn(3, fields, 192), torch.randn(3, fields, 64)
    q, k, v = qkv.chunk(3, dim=-1)
    accesses = counting(monkeypatch)
    out = kernels._forward(q, k, v, 4, 0.25, 0.0, None)
    assert times(accesses["load"], qkv) == {1} and accesses["load"].total() == qkv.numel()
    assert times(accesses["store"], out) == {1} and accesses["store"].total() == out.numel()
    accesses = counting(monkeypatch)
    grads = kernels._backward(grad, q, k, v, 4, 0.25, 0.0, None)
    assert times(accesses["load"], qkv) == times(accesses["load"], grad) == {1}
    assert accesses["load"].total() == qkv.numel() + grad.numel()
    assert times(accesses["store"], grads) == {1} and accesses["store"].total() == grads.numel()
