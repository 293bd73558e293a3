"""fp32 products of the Triton kernels, by three of fp16: as exact as fp32 over the range of fp32."""

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton_interpreter import interpreted, outside, run_in_the_interpreter  # noqa: E402

from ctr_kernels.triton_support import dot  # noqa: E402


@triton.jit
def _product_kernel(a, b, c, out, P: tl.constexpr, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    pair, row, inner, column = tl.arange(0, P), tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    left = tl.load(a + pair[:, None, None] * M * K + row[None, :, None] * K + inner[None, None, :])
    right = tl.load(b + pair[:, None, None] * K * N + inner[None, :, None] * N + column[None, None, :])
    place = pair[:, None, None] * M * N + row[None, :, None] * N + column[None, None, :]
    if P == 1:
        flat = tl.load(c + row[:, None] * N + column[None, :])
        found = dot(tl.reshape(left, (M, K)), tl.reshape(right, (K, N)), flat, "fp16x3")
        tl.store(out + row[:, None] * N + column[None, :], found)
    else:
        tl.store(out + place, dot(left, right, tl.load(c + place), "fp16x3"))


def product(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """c + a b of [P, M, K], [P, K, N] and [P, M, N]."""
    out = torch.full_like(c, float("nan"))
    _product_kernel[(1,)](a, b, c, out, P=len(a), M=a.shape[1], K=a.shape[2], N=b.shape[2])
    return out


@outside
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__, at_least=14)


@interpreted
@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (1e-38, 1.0), (1e-30, 1e30), (3e38, 1e-38), (1e-20, 1e-10)])
def test_products_are_as_exact_as_fp32_at_any_scale(pairs: int, scales: tuple[float, float]) -> None:
    torch.manual_seed(0)
    a, b = torch.rand(pairs, 16, 64) * 2 - 1, torch.rand(pairs, 64, 32) * 2 - 1
    a, b = (a.double() * scales[0]).float(), (b.double() * scales[1]).float()
    c = ((torch.rand(pairs, 16, 32) - 0.5).double() * scales[0] * scales[1]).float()
    exact = c.double() + a.double() @ b.double()
    error, plain = ((t.double() - exact).abs().max() for t in (product(a, b, c), c + a @ b))
    assert error <= 2 * plain + 2.0**-24 * exact.abs().max()


@interpreted
def test_small_rows_beside_large_ones_keep_their_digits() -> None:
    """2^-17 times the largest element still has 22 bits: some samples of a tile have gradients far below others."""
    torch.manual_seed(1)
    a, b, c = torch.randn(1, 16, 64), torch.randn(1, 64, 32), torch.zeros(1, 16, 32)
    a[:, 1::2] *= 2.0**-14
    exact = a.double() @ b.double()
    relative = (product(a, b, c).double() - exact).abs().amax(2) / exact.abs().amax(2)
    assert (relative < 4e-7).all(), relative


@interpreted
def test_matrices_of_a_batch_have_scales_of_their_own() -> None:
    torch.manual_seed(2)
    a, b, c = torch.randn(2, 16, 16), torch.randn(2, 16, 32), torch.zeros(2, 16, 32)
    a[1] *= 1e-25
    exact = a.double() @ b.double()
    assert ((product(a, b, c).double() - exact).abs().amax((1, 2)) <= 4e-7 * exact.abs().amax((1, 2))).all()


@interpreted
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    a, b, c = torch.ones(1, 16, 16), torch.ones(1, 16, 32), torch.zeros(1, 16, 32)
    a[0, 3, 5] = bad
    assert product(a, b, c)[0, 3].isnan().all()
    zero = torch.zeros_like(a)
    assert torch.equal(product(zero, b, c), c)
