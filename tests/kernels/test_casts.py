"""Weights in the dtype of autocast, cast together: as `Tensor.to` does it, and so are their gradients."""

import pytest
import torch

from ctr_kernels.checks import cast_together


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_and_gradients_are_those_of_single_casts(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(4, 3, requires_grad=True), torch.randn(3, requires_grad=True), torch.randn(2, 4)]
    found = []
    for cast in (lambda *tensors: cast_together(dtype, *tensors), lambda *tensors: [t.to(dtype) for t in tensors]):
        a, b, c = cast(*weights)
        assert (a.requires_grad, b.requires_grad, c.requires_grad) == (True, True, False)
        found.append([a, b, c, *torch.autograd.grad((c @ (a * b)).float().square().sum(), weights[:2])])
    for together, single in zip(*found, strict=True):
        assert together.dtype == single.dtype and torch.equal(together, single)


def test_a_weight_without_a_gradient_gets_none() -> None:
    a, b = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    first, _ = cast_together(torch.bfloat16, a, b)
    first.sum().backward()
    assert torch.equal(a.grad, torch.ones(3)) and b.grad is None


def test_second_derivatives_pass() -> None:
    a = torch.randn(3, requires_grad=True)
    (low,) = cast_together(torch.bfloat16, a)
    (grad,) = torch.autograd.grad(low.pow(3).sum(), a, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), a)
    assert torch.allclose(second, 6 * a, rtol=2e-2)
