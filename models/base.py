"""What the three models share: which optimizer takes which parameter, and the last layer."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from ctr_kernels import EmbeddingTable
from ctr_kernels.checks import without_autocast
from ctr_kernels.fusion import FORWARDS, plain_module, plain_parameter

from .checks import check_choice
from .cross import CROSS_LAYERS, CROSS_RANK, LowRankCross, cross_network

SHORTCUTS = ("none", "linear", "mlp", "cross")
MLP_DIMS = (256, 128, 64)  # of the baseline study's DCNv2


class CTRModel(nn.Module):
    """forward(dense [B, num_dense] float, sparse [B, num_sparse] int32/int64) -> logits [B].

    `embedding_parameters()` and `dense_parameter_groups()` together hold every parameter exactly once.
    """

    logit_parts: ClassVar[tuple[str, ...]] = ("head", "shortcut")  # modules whose sum the logit is

    def embedding_parameters(self) -> list[nn.Parameter]:
        """The embedding tables [num_rows, dim]; their gradients are sparse: for SparseSGD and its like.

        Raises ValueError for a table whose weight is computed of other parameters: it has no rows to update.
        """
        tables = {name: module for name, module in self.named_modules() if isinstance(module, EmbeddingTable)}
        for name, table in tables.items():
            if table._parameters.get("weight") is None:
                raise ValueError(f"{name}.weight is no parameter but computed, as by pruning or a parametrization; the "
                                 "sparse-row optimizers cannot update it")
        return list(dict.fromkeys(table.weight for table in tables.values()))

    def operations(self) -> dict[str, str]:
        """Operation -> the backend that runs it, or those of several modules ("eager, native").

        As the model is now: its device, dtype, autocast and children. "eager": also what is composed of PyTorch's own.
        """
        tokens = next((module.num_tokens for module in self.modules() if hasattr(module, "num_tokens")), 1)
        found: dict[str, set[str]] = {}
        for module in self.modules():
            if module is not self and hasattr(module, "operations"):
                for operation, backend in module.operations(tokens).items():
                    found.setdefault(operation, set()).add(backend)
        return {operation: ", ".join(sorted(found[operation])) for operation in sorted(found)}

    def store_embeddings_as(self, dtype: torch.dtype) -> None:
        """Keep the tables in `dtype`, bf16 for half the memory; the tokens they give stay in the dtype they had."""
        for module in self.modules():
            if isinstance(module, EmbeddingTable):
                module.store_as(dtype)

    def scale_logits(self, factor: float) -> None:
        """Multiply every logit by a number from now on, in the last layers, whose sum the logit is.

        Raises ValueError for a factor that is not finite, and where a last layer is no longer what the model made, is
        hooked, or shares its parameters: the factor would be lost, or would change something else as well.
        """
        _check_finite("factor", factor)
        with torch.no_grad():
            for head in self._last_layers():
                head.weight.mul_(factor)
                head.bias.mul_(factor)

    def shift_logits(self, shift: float) -> None:
        """Add a number to every logit from now on, in the bias of a last layer; ValueError as in scale_logits."""
        _check_finite("shift", shift)
        with torch.no_grad():
            self._last_layers()[0].bias.add_(shift)

    def _last_layers(self) -> list["LogitLinear"]:
        """The layers whose sum the logit is, as they were made; ValueError where one is not."""
        heads: list[LogitLinear] = []
        uses = Counter(_memory(parameter) for _, parameter in self.named_parameters(remove_duplicate=False))
        for part in self.logit_parts:
            module = getattr(self, part, None)
            if module is None and part == "shortcut":
                continue
            name, head = _last_layer(module, part)
            reason = plain_module(head, name, LogitLinear)
            if reason is not None or not isinstance(head, LogitLinear):
                raise ValueError(f"logits cannot be changed in a layer that was changed: {reason}")
            for parameter, shape in (("weight", (1, head.in_features)), ("bias", (1,))):
                reason = plain_parameter(head, name, parameter, shape)
                if reason is None and uses[_memory(getattr(head, parameter))] > 1:
                    reason = f"{name}.{parameter} belongs to another layer, too"
                if reason is not None:
                    raise ValueError(f"logits cannot be changed in a layer that was changed: {reason}")
            heads.append(head)
        return heads

    def dense_parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """All other parameters as two groups for AdamW; only the matrices of linear layers decay, pruned or
        parametrized ones by what their weight is computed of.

        Biases, norms, the CLS token and the tokenizer's own vectors (w and b of numeric tokens, bias of the
        fields) do not.

        NOTE rtdl_revisiting_models also decays the scale of the last LayerNorm; here no norm decays.

        Returns: [{"params", "weight_decay": weight_decay}, {"params", "weight_decay": 0.0}].
        """
        decayed: list[nn.Parameter] = []
        kept: list[nn.Parameter] = []
        placed = set(self.embedding_parameters())
        matrices = {parameter for module in self.modules() for parameter in _matrices(module)}
        for parameter in self.parameters():
            if parameter not in placed:
                (decayed if parameter in matrices else kept).append(parameter)
        return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def _matrices(module: nn.Module) -> Iterator[nn.Parameter]:
    """The matrices that the weight of a linear layer is, or is computed of; magnitudes of weight_norm are none."""
    if not isinstance(module, nn.Linear):
        return
    parametrizations = module._modules.get("parametrizations")
    originals = getattr(parametrizations, "weight", nn.Module())._parameters if parametrizations is not None else {}
    for name, parameter in {**module._parameters, **originals}.items():
        whole = name in ("weight", "weight_orig", "weight_v", "original", "original1")
        factor = name == "original0" and parameter is not None and 1 not in parameter.shape
        if parameter is not None and parameter.dim() > 1 and (whole or factor):
            yield parameter


def _last_layer(module: nn.Module | None, name: str) -> tuple[str, nn.Module | None]:
    """The name of, and the layer at the end of a head or shortcut; ValueError where one that holds it is changed."""
    while module is not None and type(module) in (nn.Sequential, CrossShortcut):
        reason = plain_module(module, name, type(module))
        if reason is not None:
            raise ValueError(f"logits cannot be changed in a layer that was changed: {reason}")
        last = "head" if type(module) is CrossShortcut else next(reversed(module._modules), "")
        name, module = f"{name}.{last}", module._modules.get(last)
    return name, module


def _memory(parameter: torch.Tensor) -> int:
    """The same for parameters that share memory; those on "meta" have none."""
    return parameter.data_ptr() or id(parameter)


def _check_finite(name: str, number: float) -> None:
    if not math.isfinite(number):
        raise ValueError(f"{name}={number} is not finite")


class LogitLinear(nn.Linear):
    """Linear(in_features, 1) outside autocast: logits rounded to bf16 collide, and ties shift the AUC.

    >>> LogitLinear(64)(torch.randn(2, 64)).shape
    torch.Size([2])
    """

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, in_features] -> [B], in the dtype of the weight."""
        with without_autocast(x.device.type):
            return F.linear(x.to(self.weight.dtype), self.weight, self.bias).squeeze(-1)


class Dropout(nn.Dropout):
    """nn.Dropout whose masks cost a third on CPUs: bernoulli_ draws number after number, torch.rand whole vectors.

    Other devices have a fused kernel.

    >>> Dropout(0.5)(torch.ones(2, 8)).shape
    torch.Size([2, 8])
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[...] -> [...]."""
        if not self.training or self.inplace or not 0.0 < self.p < 1.0 or x.device.type != "cpu":
            return super().forward(x)
        kept = torch.rand(x.shape, dtype=torch.float32, device=x.device) >= self.p  # 24 random bits, whatever x is
        return x * kept.to(x.dtype).mul_(1.0 / (1.0 - self.p))


def study_head(dim: int, dropout: float) -> nn.Sequential:
    """LayerNorm, Linear(dim, dim), ReLU, dropout, Linear(dim, 1): pooled token [B, dim] -> logits [B].

    The baseline study gives the widths 64 -> 64 -> 1 only; ReLU and the dropout behind it are our choice. The
    norm comes after the pooling: the same for a CLS token, and one row instead of 27 for the mean.
    """
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.ReLU(), Dropout(dropout), LogitLinear(dim))


def mlp(dims: Sequence[int], *, batch_norm: bool, dropout: float) -> nn.Sequential:
    """[B, dims[0]] -> [B, dims[-1]]: Linear, BatchNorm if wanted, ReLU, dropout for each step."""
    layers: list[nn.Module] = []
    for inputs, outputs in zip(dims, dims[1:], strict=False):
        layers.append(nn.Linear(inputs, outputs))
        if batch_norm:
            layers.append(nn.BatchNorm1d(outputs))
        layers += [nn.ReLU(), Dropout(dropout)]
    return nn.Sequential(*layers)


class CrossShortcut(nn.Module):
    """DCNv2's cross network and MLP 256-128-64, in parallel, on a row of `width` features.

    >>> CrossShortcut(432, 0.1)(torch.randn(2, 432)).shape
    torch.Size([2])
    """

    def __init__(self, width: int, dropout: float, kernels: str = "auto") -> None:
        super().__init__()
        self.cross = nn.ModuleList(LowRankCross(width, CROSS_RANK, kernels=kernels) for _ in range(CROSS_LAYERS))
        self.mlp = mlp([width, *MLP_DIMS], batch_norm=False, dropout=dropout)
        self.head = LogitLinear(width + MLP_DIMS[-1])

    def forward(self, x0: torch.Tensor) -> torch.Tensor:
        """[B, width] -> logits [B]."""
        return self.head(torch.cat([cross_network(self.cross, x0), self.mlp(x0)], dim=1))


def logit_shortcut(shortcut: str, width: int, dropout: float, kernels: str = "auto") -> nn.Sequential | None:
    """A second way from the tokens [B, F, dim], before any layer, to the logit [B]; None for "none".

    "linear": LogitLinear(F dim), as the wide part of Wide & Deep (Cheng et al. 2016). "mlp": DCNv2's MLP 256-128-64,
    then LogitLinear, as AutoInt+ joins a feed-forward network (Song et al. 2019). "cross": CrossShortcut(F dim).
    """
    check_choice("shortcut", shortcut, SHORTCUTS)
    if shortcut == "none":
        return None
    if shortcut == "cross":
        return nn.Sequential(nn.Flatten(), CrossShortcut(width, dropout, kernels))
    widths = [width, *MLP_DIMS] if shortcut == "mlp" else [width]
    return nn.Sequential(nn.Flatten(), *mlp(widths, batch_norm=False, dropout=dropout), LogitLinear(widths[-1]))


FORWARDS.update({kind: kind.forward for kind in (LogitLinear, CrossShortcut, nn.Sequential)})
