"""What may be done to a child of a model: replacements, hooks and parametrizations, by the kind of the child.

Everything is at the top of the module, so that pickle takes models that were operated on.
"""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from plain_layer import Doubled
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

# What replaces a child.

class LoRA(nn.Module):
    """A frozen module and an update of rank 2; its weight and bias are there to be read by mistake."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.weight, self.bias = base.weight, base.bias
        self.a = nn.Parameter(torch.randn(2, base.in_features) * 0.2)
        self.b = nn.Parameter(torch.randn(base.out_features, 2) * 0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.a.t() @ self.b.t()


class Halved(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * super().forward(x)


class Shifted(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + 0.05


# Hooks and forwards.

def scale_output(_: nn.Module, __: Any, out: torch.Tensor) -> torch.Tensor:
    return out * 1.5


def scale_linear(module: nn.Module, _: Any, out: torch.Tensor) -> torch.Tensor | None:
    return out * 1.25 if type(module) is nn.Linear else None


def shift_input(_: nn.Module, inputs: tuple) -> tuple:
    return (inputs[0] + 0.1,)


def scale_gradients(_: nn.Module, grads: tuple, __: tuple) -> tuple:
    return tuple(None if g is None else 2.0 * g for g in grads)


def scale_outer_gradients(_: nn.Module, grads: tuple) -> tuple:
    return tuple(None if g is None else 2.0 * g for g in grads)


def negated(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return -type(module).forward(module, x)


# Surgeries: (parent, name of the child in it, generator).

def swap(make: Callable[[Any, random.Random], nn.Module]) -> Callable:
    return lambda parent, name, draw: setattr(parent, name, make(getattr(parent, name), draw))


def change(act: Callable[[Any, random.Random], Any]) -> Callable:
    return lambda parent, name, draw: act(getattr(parent, name), draw)


def mlp(old: nn.Linear, _: random.Random) -> nn.Module:
    return nn.Sequential(nn.Linear(old.in_features, 8), nn.Tanh(), nn.Linear(8, old.out_features))


def hook(module: nn.Module, draw: random.Random) -> None:
    draw.choice([lambda: module.register_forward_hook(scale_output),
                 lambda: module.register_forward_pre_hook(shift_input),
                 lambda: module.register_full_backward_hook(scale_gradients),
                 lambda: module.register_full_backward_pre_hook(scale_outer_gradients)])()


def transpose(module: nn.Module, _: random.Random) -> None:
    module.weight = nn.Parameter(module.weight.detach().t().contiguous().t())


def of_norm(**options: Any) -> Callable:
    return swap(lambda old, _: nn.LayerNorm(old.normalized_shape, **options))


ANY = {"hook": change(hook), "frozen": change(lambda m, _: m.requires_grad_(False)),
       "own forward": change(lambda m, _: setattr(m, "forward", partial(negated, m))),
       "pruned": change(lambda m, _: prune.l1_unstructured(m, "weight", 0.4)),
       "parametrised": change(lambda m, _: parametrize.register_parametrization(m, "weight", Shifted()))}
LINEAR = ANY | {
    "LoRA": swap(lambda old, _: LoRA(old)), "MLP": swap(mlp), "transposed": change(transpose),
    "subclass": swap(lambda old, _: Doubled(old.in_features, old.out_features)),
    "no bias": swap(lambda old, _: nn.Linear(old.in_features, old.out_features, bias=False)),
    "weight norm": change(lambda m, _: parametrizations.weight_norm(m)),
    "old weight norm": change(lambda m, _: nn.utils.weight_norm(m)),
    "spectral norm": change(lambda m, _: parametrizations.spectral_norm(m)),
    "old spectral norm": change(lambda m, _: nn.utils.spectral_norm(m))}
NORM = ANY | {
    "subclass": swap(lambda old, _: Halved(old.normalized_shape)), "Identity": swap(lambda *_: nn.Identity()),
    "RMSNorm": swap(lambda old, _: nn.RMSNorm(old.normalized_shape)), "no affine": of_norm(elementwise_affine=False),
    "no bias": of_norm(bias=False), "another eps": of_norm(eps=0.3)}
