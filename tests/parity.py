"""The rule by which fused kernels pass: at most twice the error of PyTorch in the same dtype, measured in fp64.

A kernel passes if its error is at most twice that of the eager reference in the same dtype, plus four units in the
last place of the largest element, or of 1. Memory that kernels allocate is filled with NaN first, so that an element
that is not written is seen.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ctr_kernels.ffn.reference import GATED

FP32_UNIT = torch.finfo(torch.float32).eps
SEED = 0x1234_5678_9ABC_DEF0
Tensors = list[torch.Tensor]


def assert_parity(found: Tensors, eager: Tensors, exact: Tensors, unit: float = FP32_UNIT) -> None:
    """The parity rule, for every output and gradient; unit: of the arithmetic's last place, relative."""
    for i, (f, e, x) in enumerate(zip(found, eager, exact, strict=True)):
        assert f.shape == x.shape and f.dtype == e.dtype, f"tensor {i}: {f.dtype} {tuple(f.shape)}"
        if not x.numel():
            continue
        assert torch.isfinite(f).all(), f"tensor {i}: not finite, or not written"
        error, eager_error = ((t.double() - x).abs().max().item() for t in (f, e))
        floor = 4 * unit * max(1.0, x.abs().max().item())
        assert error <= 2 * eager_error + floor, f"tensor {i}: error {error:.3g}, eager {eager_error:.3g}"


def with_gradients(function: Callable[..., torch.Tensor], inputs: Tensors, grad_out: torch.Tensor) -> Tensors:
    """Output and gradients of all inputs, the memory of kernels filled with NaN."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    with nan_memory():
        out = function(*inputs)
        grads = torch.autograd.grad(out, inputs, grad_out.to(out.dtype))
        return [out.detach(), *(grad.to_dense() if grad.is_sparse else grad for grad in grads)]


@contextmanager
def nan_memory() -> Iterator[None]:
    """Within: what torch.empty returns is filled with NaN, and so is every output of the native kernels.

    Else memory would come with what was in it before: mostly the right answer to the same question.
    """
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check(kernel: Callable, reference: Callable, inputs: Tensors, grad_out: torch.Tensor) -> None:
    """Kernel, eager reference and fp64 reference on the same inputs."""
    assert_parity(
        with_gradients(kernel, inputs, grad_out),
        with_gradients(reference, inputs, grad_out),
        with_gradients(reference, [x.double() for x in inputs], grad_out.double()),
    )


def cross_inputs(batch: int, width: int, rank: int, dtype: torch.dtype = torch.float32) -> Tensors:
    shapes = [(batch, width), (batch, width), (rank, width), (width, rank), (width,)]
    return [(torch.randn(shape) / (shape[-1] ** 0.5 if i in (2, 3) else 1.0)).to(dtype)
            for i, shape in enumerate(shapes)]


def ffn_inputs(tokens: int, dim: int, hidden: int, dtype: torch.dtype, activation: str = "gelu") -> Tensors:
    rows = 2 * hidden if activation in GATED else hidden
    shapes = [(tokens, dim), (rows, dim), (rows,), (dim, hidden), (dim,)]
    return [(torch.randn(shape) / (shape[-1] ** 0.5 if i in (1, 3) else 1.0)).to(dtype)
            for i, shape in enumerate(shapes)]
