"""Batches and formulas, written without the package, that the tests of the models share."""

import math
from collections.abc import Callable

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def make_batch() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """rows -> (dense [rows, 13] like log1p of counts, sparse [rows, 26] ids below `high`)."""

    def make(rows: int, *, num_dense: int = 13, high: int = 1000, dtype: torch.dtype = torch.float32,
             ids: torch.dtype = torch.int64) -> tuple[torch.Tensor, torch.Tensor]:
        dense = torch.rand(rows, num_dense, dtype=dtype) * 4.0
        return dense, torch.randint(high, (rows, 26)).to(ids)

    return make


@pytest.fixture
def attend() -> Callable[..., torch.Tensor]:
    """Attention one row, head and query at a time: head h owns the columns [h * width, (h + 1) * width)."""

    def one_query(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
        weights = [math.exp(float(q @ key) * scale) for key in keys]
        return sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_heads: int, scale: float) -> torch.Tensor:
        width = q.shape[-1] // num_heads
        out = torch.empty_like(q)
        for row in range(q.shape[0]):
            for head in range(num_heads):
                columns = slice(head * width, (head + 1) * width)
                for field in range(q.shape[1]):
                    out[row, field, columns] = one_query(q[row, field, columns], k[row, :, columns],
                                                         v[row, :, columns], scale)
        return out

    return attention


@pytest.fixture
def layer_norm() -> Callable[..., torch.Tensor]:
    """LayerNorm of a module's weights by its formula, over the last dimension."""

    def normalise(x: torch.Tensor, norm: torch.nn.LayerNorm) -> torch.Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        variance = centred.square().mean(dim=-1, keepdim=True)
        return centred / torch.sqrt(variance + norm.eps) * norm.weight + norm.bias

    return normalise


@pytest.fixture
def affine() -> Callable[..., torch.Tensor]:
    """W x + b of a linear module by its formula."""

    def apply(x: torch.Tensor, linear: torch.nn.Linear) -> torch.Tensor:
        out = (x.unsqueeze(-2) * linear.weight).sum(dim=-1)
        return out if linear.bias is None else out + linear.bias

    return apply
