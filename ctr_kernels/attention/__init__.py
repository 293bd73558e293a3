"""Attention over the fields of a row: checks, then the chosen backend."""

import torch

from ..backend import resolve
from ..checks import autocast, same_float
from ..philox import as_seed, check_dropout
from .operator import attention, attention_packed, supports
from .reference import field_attention_reference


def field_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    num_heads: int,
    scale: float | torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    kernels: str = "auto",
) -> torch.Tensor:
    """softmax(q k^T * scale) v over each row's fields, for each head (Vaswani et al. 2017, eq. 1).

    Args:
        q: [B, Q, D], heads interleaved in D as `nn.Linear` leaves them; any strides.
        k, v: [B, F, D], as q; q, k and v may be views of one [B, F, 3D] projection. 0 <= B, 1 <= Q, F. Q is F, or
            the number of the queries that are needed: 1 for a CLS token alone.
        num_heads: H, a divisor of D.
        scale: factor on the logits; None means 1 / sqrt(D / H). A tensor of one element may have a gradient.
        dropout_p: probability of dropping an attention weight, in [0, 1); the mask is `philox.py`'s.
        seed: 64-bit seed of the mask (int, or int64 tensor [1]); None draws one from torch's generator.
        kernels: "auto", "eager", "native" or "triton".

    Returns: [B, Q, D], dtype of q.

    The fused kernels take F and D / H up to 128; "auto" is eager beyond.

    Raises ValueError (shapes, limits), TypeError (dtypes), BackendUnavailable (a backend that cannot run).

    >>> x = torch.randn(2, 27, 64)
    >>> field_attention(x, x, x, num_heads=4).shape
    torch.Size([2, 27, 64])
    """
    q, k, v = autocast(q, k, v)
    _check(q, k, v, num_heads)
    check_dropout(dropout_p)
    q, factor = _scaled(q, scale, num_heads)
    mask_seed = as_seed(seed, q.device) if dropout_p > 0.0 else None
    backend = resolve(kernels, q.device, "field_attention", q.dtype,
                      lambda of: supports(of, q.shape[1], k.shape[1], q.shape[2], num_heads))
    run = field_attention_reference if backend == "eager" else attention
    return run(q, k, v, num_heads, factor, dropout_p, mask_seed)


def field_attention_packed(
    qkv: torch.Tensor,
    *,
    num_heads: int,
    scale: float | torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    kernels: str = "auto",
) -> torch.Tensor:
    """`field_attention` of the three thirds of one projection: [B, F, 3 D], q | k | v, -> [B, F, D].

    The result is the same; the gradient of the projection then needs no concatenation.
    """
    if qkv.dim() != 3 or qkv.shape[-1] % 3:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}; [B, F, 3 D] is needed")
    (qkv,) = autocast(qkv)
    q, k, v = qkv.chunk(3, dim=-1)
    _check(q, k, v, num_heads)
    backend = resolve(kernels, qkv.device, "field_attention", qkv.dtype,
                      lambda of: supports(of, q.shape[1], k.shape[1], q.shape[2], num_heads))
    if backend == "eager" or isinstance(scale, torch.Tensor):  # which scales q alone
        return field_attention(q, k, v, num_heads=num_heads, scale=scale, dropout_p=dropout_p, seed=seed,
                               kernels=backend)
    check_dropout(dropout_p)
    mask_seed = as_seed(seed, qkv.device) if dropout_p > 0.0 else None
    return attention_packed(qkv, num_heads, _scaled(q, scale, num_heads)[1], dropout_p, mask_seed)


def _scaled(q: torch.Tensor, scale: float | torch.Tensor | None, num_heads: int) -> tuple[torch.Tensor, float]:
    """q and the factor on the logits; a tensor is multiplied into q, which gives it a gradient in every backend."""
    if not isinstance(scale, torch.Tensor):
        return q, (q.shape[-1] // num_heads) ** -0.5 if scale is None else scale
    if scale.numel() != 1:
        raise ValueError(f"scale has shape {tuple(scale.shape)}; one element is needed")
    if not scale.is_floating_point():
        raise TypeError(f"scale has dtype {scale.dtype}; floating point is needed")
    return q * scale.reshape(()).to(q.dtype), 1.0


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_heads: int) -> None:
    if q.dim() != 3:
        raise ValueError(f"q has shape {tuple(q.shape)}; [B, Q, D] is needed")
    (batch, queries, dim), fields = q.shape, k.shape[1] if k.dim() == 3 else q.shape[1]
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != (batch, fields, dim):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, q has {tuple(q.shape)}, k {tuple(k.shape)}; "
                             "[B, Q, D] and twice [B, F, D] are needed")
    same_float({"q": q, "k": k, "v": v})
    if queries < 1 or fields < 1:
        raise ValueError(f"Q={queries} queries of F={fields} fields; at least 1 is needed")
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"D={dim} is not divisible into num_heads={num_heads}")
