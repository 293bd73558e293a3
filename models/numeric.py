"""Numeric features as tokens: one for all of them, or one each by an affine, periodic or piecewise-linear map."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ctr_kernels.tokenizer import History

NUMERIC_MODES = ("token", "affine", "scaled", "periodic", "piecewise")
FREQUENCIES, SIGMA = 16, 0.1  # of the periodic map


def uniform_vectors(*shape: int) -> nn.Parameter:
    """A parameter [..., dim] drawn from U(-1/sqrt(dim), 1/sqrt(dim)), as rtdl_revisiting_models draws its vectors."""
    bound = shape[-1] ** -0.5
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))


class Constants(nn.Module):
    """A module whose buffers stay fp32, or wider, when its parameters are converted to a narrower dtype.

    Edges and moments are numbers of the data. In half precision large ones would overflow and near ones coincide;
    `model.half()` then trained on other features.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "Constants":
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and torch.promote_types(new.dtype, torch.float32) != new.dtype:
                self._buffers[name] = old.to(new.device, torch.float32)
        return self


def constants_dtype() -> torch.dtype:
    """fp32, or a wider default dtype."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def check_moments(moments: Sequence[Sequence[float]], columns: int) -> None:
    """ValueError unless these are means and standard deviations of that many columns, finite in fp32."""
    if [len(of) for of in moments] != [columns, columns]:
        raise ValueError(f"history_moments has lists of {[len(of) for of in moments]} numbers; 2 lists of "
                         f"{columns} are needed")
    mean, deviation = (torch.as_tensor(of, dtype=torch.float64, device="cpu").to(constants_dtype()) for of in moments)
    for name, numbers, wrong in (
            ("mean", mean, ~mean.isfinite()),
            ("deviation", deviation, ~((deviation == 0.0) | ((deviation > 0.0) & (1.0 / deviation).isfinite()
                                                             & deviation.isfinite())))):
        if wrong.any():
            column = int(wrong.int().argmax())
            raise ValueError(f"history_moments has the {name} {numbers[column].item()} of column {column}; a finite "
                             f"number{'' if name == 'mean' else ', 0 or above,'} is needed")


class PiecewiseLinear(Constants):
    """Token j = sum_t p_jt W_jt + b_j, with p_jt the share of bin t that lies below x_j (Gorishniy et al. 2022, eq. 1).

    Args:
        edges: increasing edges of the bins of each feature; a list of fewer than two is a feature that never varied,
            and its token is b_j whatever its value. Features may have different numbers of bins.
        dim: width of a token.

    forward: [B, features] -> [B, features, dim].

    The edges are buffers, so that a checkpoint holds them.

    NOTE the paper lets the first and the last bin go on beyond the edges; here a value beyond counts as the edge. A
    number far outside what training saw, as heavy tails have them, cannot throw its token away.

    >>> PiecewiseLinear([[0.0, 1.0, 2.0], [0.0, 5.0]], 8)(torch.rand(3, 2)).shape
    torch.Size([3, 2, 8])
    """

    low: torch.Tensor
    scale: torch.Tensor

    def __init__(self, edges: Sequence[Sequence[float]], dim: int) -> None:
        super().__init__()
        bins = max(1, *(len(of) - 1 for of in edges))
        low, scale = (torch.zeros(len(edges), bins, dtype=constants_dtype()) for _ in range(2))
        for j, of in enumerate(edges):
            exact = torch.as_tensor(of, dtype=torch.float64, device="cpu")  # also where the rest is "meta"
            kept, inverse = exact.to(low.dtype), 1.0 / exact.diff()
            if not (kept.isfinite().all() and (kept.diff() > 0).all() and inverse.to(low.dtype).isfinite().all()):
                raise ValueError(f"numeric_edges[{j}]={exact.tolist()} do not increase, or are not finite, in "
                                 f"{low.dtype}")
            if len(exact) > 1:
                low[j, :len(exact) - 1] = kept[:-1]
                scale[j, :len(exact) - 1] = inverse
        self.register_buffer("low", low)
        self.register_buffer("scale", scale)  # 0 for bins that a feature does not have
        self.weight = nn.Parameter(torch.randn(len(edges), bins, dim) * (0.3 * bins**-0.5))
        self.bias = uniform_vectors(len(edges), dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, features] -> [B, features, dim]."""
        shares = ((x.unsqueeze(-1) - self.low) * self.scale).clamp(0.0, 1.0)
        return torch.einsum("bjt,jtd->bjd", shares.to(self.weight.dtype), self.weight) + self.bias


class Periodic(nn.Module):
    """Token j = W_j [sin(2 pi c_j x_j), cos(2 pi c_j x_j)] + b_j, c_j learned (Gorishniy et al. 2022, eq. 2).

    Args:
        num_features, dim: number of features and width of a token.
        frequencies: length of c_j.
        sigma: standard deviation of the initial frequencies; the paper calls it the hyperparameter to tune.

    forward: [B, num_features] -> [B, num_features, dim].

    >>> Periodic(13, 8)(torch.rand(2, 13)).shape
    torch.Size([2, 13, 8])
    """

    def __init__(self, num_features: int, dim: int, *, frequencies: int = FREQUENCIES, sigma: float = SIGMA) -> None:
        super().__init__()
        self.frequency = nn.Parameter(torch.randn(num_features, frequencies) * sigma)
        self.weight = nn.Parameter(torch.randn(num_features, 2 * frequencies, dim) * (0.3 * frequencies**-0.5))
        self.bias = uniform_vectors(num_features, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, num_features] -> [B, num_features, dim]."""
        angle = (2.0 * torch.pi) * x.unsqueeze(-1) * self.frequency
        waves = torch.cat([angle.sin(), angle.cos()], dim=-1)
        return torch.einsum("bjt,jtd->bjd", waves, self.weight) + self.bias


class FieldHistory(Constants):
    """What a field's token is told of its value's past: sum_s w_js (h_js - m_js) / d_js + b_j.

    Args:
        num_statistics, num_fields, dim: numbers for each field, fields, width of a token.
        moments: means m and standard deviations d, two lists of num_statistics * num_fields; None means 0 and 1. A
            column that never varied (d = 0) is left out.

    forward: [B, num_statistics * num_fields], statistic by statistic -> [B, num_fields, dim].

    The moments are buffers, so that a checkpoint holds them.

    >>> FieldHistory(2, 26, 8)(torch.rand(3, 52)).shape
    torch.Size([3, 26, 8])
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, num_statistics: int, num_fields: int, dim: int,
                 moments: Sequence[Sequence[float]] | None = None) -> None:
        super().__init__()
        columns = num_statistics * num_fields
        if moments is None:
            moments = [0.0] * columns, [1.0] * columns
        check_moments(moments, columns)
        mean, deviation = (torch.as_tensor(of, dtype=constants_dtype()) for of in moments)
        self.register_buffer("mean", mean.clone())  # an array may be the caller's own memory
        self.register_buffer("scale", torch.where(deviation > 0.0, 1.0 / deviation, 0.0))
        self.weight = nn.Parameter(torch.randn(num_statistics, num_fields, dim) * 0.1)
        self.bias = uniform_vectors(num_fields, dim)

    @property
    def parts(self) -> History:
        """What `field_tokens` takes in place of this module."""
        return History(self.weight, self.bias, self.mean, self.scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, num_statistics * num_fields] -> [B, num_fields, dim]."""
        statistics, fields, _ = self.weight.shape
        x = ((x - self.mean) * self.scale).to(self.weight.dtype).unflatten(1, (statistics, fields))
        return torch.einsum("bsj,sjd->bjd", x, self.weight) + self.bias
