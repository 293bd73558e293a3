"""`ctr::field_tokens`, which Triton alone implements: what its kernels take, its sizes and its fakes.

It has no autograd formula of its own: the table's gradient is a sparse tensor of (ids, rows), which an operator cannot
return. The one formula is the autograd function in triton.py.
"""

from typing import Any, NamedTuple

import torch

from ..library import LIBRARY, implement_in_triton

Tensor = torch.Tensor
TRITON_MAX_TILE = 16384  # elements that a program of Triton's holds at once, those of its sums included


def supports(backend: str, dim: int, statistics: int) -> str | None:
    """Why the kernels of `backend` do not take tokens of width `dim` with that many statistics of a field, or None."""
    if max(16, 1 << (dim - 1).bit_length()) * (2 + statistics) > TRITON_MAX_TILE:
        return (f"D={dim} with {statistics} statistics of a field: kernels={backend!r} takes up to {TRITON_MAX_TILE} "
                "elements of a token, its gradient and those of its statistics' vectors, D rounded up to a power of 2")
    return None


class Sizes(NamedTuple):
    """Fields, features, statistics, width, one numeric token or one each, CLS."""

    K: int
    N: int
    S: int
    D: int
    ONE: bool
    CLS: int

    @property
    def head(self) -> int:
        """Tokens in front of those of the fields."""
        return self.CLS + (1 if self.ONE else self.N)

    def sums(self, biased: bool) -> int:
        """Elements of the sums over samples that backward gives: see `split_sums`."""
        return (self.head + self.N + self.S * self.K + self.K * biased) * self.D


def sizes_of(ids: Tensor, dense: Tensor, weight: Tensor, history_weight: Tensor | None, one: bool,
             cls: Tensor | None) -> Sizes:
    """Sizes of the operator's arguments."""
    fields, statistics = ids.shape[1], 0 if history_weight is None else history_weight.shape[0]
    return Sizes(fields, dense.shape[1] - statistics * fields, statistics, weight.shape[1], one, int(cls is not None))


def backward_sizes(grad_out: Tensor, dense: Tensor, mean: Tensor | None, fields: int, one: bool, cls: bool) -> Sizes:
    """Sizes of the arguments of the operator's backward."""
    statistics = 0 if mean is None else mean.shape[0] // fields
    return Sizes(fields, dense.shape[1] - statistics * fields, statistics, grad_out.shape[2], one, int(cls))


def split_sums(sums: Tensor, sizes: Sizes, biased: bool) -> list[Tensor]:
    """Sums over samples: gradient of the tokens of the head [HEAD, D] and, if biased, of the fields [K, D]; dense
    weight; history weight."""
    fields, features, statistics, dim, one, _ = sizes
    shapes = [(sizes.head, dim), (fields * biased, dim), (dim, features) if one else (features, dim),
              (statistics, fields, dim)]
    return [part.view(shape) for part, shape in
            zip(sums.split([torch.Size(shape).numel() for shape in shapes]), shapes, strict=True)]


def _fake(weight: Tensor, ids: Tensor, dense: Tensor, dense_weight: Tensor, dense_bias: Tensor | None,
          cls: Tensor | None, field_bias: Tensor | None, history_weight: Tensor | None, history_bias: Tensor | None,
          mean: Tensor | None, scale: Tensor | None, one: bool, *_: Any) -> Tensor:
    sizes = sizes_of(ids, dense, weight, history_weight, one, cls)
    return dense_weight.new_empty(ids.shape[0], sizes.head + sizes.K, sizes.D)


def _fake_backward(grad_out: Tensor, dense: Tensor, mean: Tensor | None, scale: Tensor | None, fields: int, one: bool,
                   cls: bool, biased: bool, *_: Any) -> tuple[Tensor, Tensor]:
    sizes = backward_sizes(grad_out, dense, mean, fields, one, cls)
    return (grad_out.new_empty(grad_out.shape[0] * sizes.K, sizes.D),
            grad_out.new_empty(sizes.sums(biased), dtype=torch.float32))


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("ctr::field_tokens has no derivative of its own: call ctr_kernels.field_tokens")


for name, function, fake in (("field_tokens", "forward", _fake),
                             ("field_tokens_backward", "backward", _fake_backward)):
    implement_in_triton(name, ".tokenizer.triton", function)
    torch.library.register_fake(f"ctr::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd(f"ctr::{name}", _refuse, lib=LIBRARY)
