"""`ctr::ffn`, alone or with the norm and the residual of half a layer: one operator for all backends."""

from typing import Any

import torch

from ..library import LIBRARY, implement_in_triton, no_double_backward
from .reference import ACTIVATIONS

Tensor = torch.Tensor
# What stands around f = ffn: f(x); x + f(LN(x)); LN(x + f(x)); n + f(n) with n = LN(x).
NORMS = {None: 0, "pre": 1, "post": 2, "normed": 3}
TRITON_MAX_DIM = 256
TRITON_MAX_HIDDEN = 2**21  # offsets into weights and partial sums, up to 2^29, are 32 bits wide; into tokens, 64


def supports(backend: str, dim: int, hidden: int, activation: str, norm: str | None = None) -> str | None:
    """Why the kernels of `backend` do not take these widths, that activation and that norm; None if they do."""
    if norm == ("post" if backend == "native" else "normed"):
        return f"norm={norm!r} has no kernels"
    if dim < 1 or hidden < 1:
        return f"D={dim}, hidden={hidden}; at least 1 is needed"
    if backend == "triton" and dim > TRITON_MAX_DIM:
        return f"D={dim}; kernels='triton' takes up to {TRITON_MAX_DIM}"
    if backend == "triton" and hidden > TRITON_MAX_HIDDEN:
        return f"hidden={hidden}; kernels='triton' takes up to {TRITON_MAX_HIDDEN}"
    return None


def feed_forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str, dropout_p: float,
                 seed: Tensor | None, *, norm: str | None = None, norm_weight: Tensor | None = None,
                 norm_bias: Tensor | None = None, eps: float = 0.0) -> Tensor:
    """[..., D] -> [..., D]; the inputs are all that backward keeps, and the sum x + ffn(x) of norm "post"."""
    tokens, *weights = (t.contiguous() for t in (x.reshape(-1, x.shape[-1]), w1, b1, w2, b2))
    out: Tensor = torch.ops.ctr.ffn(tokens, *weights, norm_weight, norm_bias, NORMS[norm], eps,
                                    list(ACTIVATIONS).index(activation), dropout_p, seed)[0]
    return out.view(x.shape)


def _fake(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, norm_weight: Tensor | None,
          norm_bias: Tensor | None, norm: int, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x) if norm == NORMS["post"] else x.new_empty(0)


def _fake_backward(grad_out: Tensor, x: Tensor, z: Tensor | None, w1: Tensor, b1: Tensor, w2: Tensor,
                   norm_weight: Tensor | None, norm_bias: Tensor | None, norm: int, *_: Any) -> tuple[Tensor, ...]:
    norms = x.new_empty((2, x.shape[1]) if norm else (0,), dtype=torch.float32)
    return *(t.new_empty(t.shape) for t in (x, w1, b1, w2)), w2.new_empty(w2.shape[0]), norms


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, w1, b1, w2, _, norm_weight, norm_bias, *ctx.settings, seed = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    z = output[1] if ctx.settings[0] == NORMS["post"] else None
    ctx.save_for_backward(x, z, w1, b1, w2, norm_weight, norm_bias, seed)


def _backward(ctx: Any, grad_out: Tensor, _: None) -> tuple:
    *tensors, seed = ctx.saved_tensors
    norm_weight = tensors[5]
    *grads, norms = torch.ops.ctr.ffn_backward(grad_out.contiguous(), *tensors, *ctx.settings, seed)
    affine = (None, None) if norm_weight is None else norms.to(norm_weight.dtype).unbind()
    return *grads, *affine, None, None, None, None, None


implement_in_triton("ffn", ".ffn.triton", "forward")
implement_in_triton("ffn_backward", ".ffn.triton", "backward")
torch.library.register_fake("ctr::ffn", _fake, lib=LIBRARY)
torch.library.register_fake("ctr::ffn_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autograd("ctr::ffn", _backward, setup_context=_save, lib=LIBRARY)
no_double_backward("ctr::ffn_backward")
