"""Argument checks that the models share; every message quotes the offending value and the limit."""

import torch

from ctr_kernels.attention.operator import MAX_FIELDS, supports


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """ValueError unless value is one of choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(choices)}")


def check_positive(**named: int) -> None:
    """ValueError unless every keyword's value is at least 1."""
    for name, value in named.items():
        if value < 1:
            raise ValueError(f"{name}={value}: at least 1 is needed")


def check_dropout(dropout: float, name: str = "dropout") -> None:
    """ValueError unless 0 <= dropout < 1."""
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"{name}={dropout} is outside [0, 1)")


def check_attention(dim: int, num_heads: int, num_tokens: int, kernels: str, *, spare_cls: bool = False) -> None:
    """ValueError where `ctr_kernels.field_attention` could not run; said when the model is built, not at a step.

    "auto" and "eager" run wherever num_heads divides dim. spare_cls: one token is a CLS that pooling="mean" has not.
    """
    check_positive(num_heads=num_heads)
    if dim % num_heads:
        raise ValueError(f"width {dim} with num_heads={num_heads} gives heads of width {dim / num_heads:g}; "
                         "num_heads must divide the width")
    reason = supports(kernels, num_tokens, num_tokens, dim, num_heads) if kernels in ("native", "triton") else None
    if reason is not None:
        advice = "kernels='auto' and kernels='eager' take any"
        if spare_cls and num_tokens == MAX_FIELDS + 1:
            advice += ", and pooling='mean' has a token less"
        raise ValueError(f"{num_tokens} tokens of width {dim} with kernels={kernels!r}: {reason}; {advice}")


def check_inputs(dense: torch.Tensor, sparse: torch.Tensor, num_dense: int, num_sparse: int) -> None:
    """ValueError unless dense is [B, num_dense] and sparse [B, num_sparse]; TypeError unless float and int32/int64."""
    if dense.dim() != 2 or dense.shape[1] != num_dense:
        raise ValueError(f"dense has shape {tuple(dense.shape)}; [B, {num_dense}] is needed")
    if sparse.dim() != 2 or sparse.shape[1] != num_sparse:
        raise ValueError(f"sparse has shape {tuple(sparse.shape)}; [B, {num_sparse}] is needed")
    if dense.shape[0] != sparse.shape[0]:
        raise ValueError(f"dense has {dense.shape[0]} rows, sparse has {sparse.shape[0]}; they must agree")
    if not dense.is_floating_point():
        raise TypeError(f"dense has dtype {dense.dtype}; floating point is needed")
    if sparse.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"sparse has dtype {sparse.dtype}; ids are int32 or int64")
