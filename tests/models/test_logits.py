"""Logits are scaled and shifted as a whole or not at all; parameter groups know what a weight is computed of."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from ctr_models import AutoInt, DCNv2, FTTransformer
from ctr_models.base import LogitLinear

SMALL = {"num_embeddings": 100, "num_sparse": 3, "num_dense": 2}
BUILD = {
    "dcnv2": lambda: DCNv2(**SMALL), "stacked": lambda: DCNv2(**SMALL, structure="stacked"),
    "ft": lambda: FTTransformer(**SMALL), "ft-paper": lambda: FTTransformer(**SMALL, variant="paper"),
    "ft-linear": lambda: FTTransformer(**SMALL, shortcut="linear"), "ft-mlp": lambda: FTTransformer(**SMALL,
                                                                                                    shortcut="mlp"),
    "autoint-cross": lambda: AutoInt(**SMALL, shortcut="cross"),
    "autoint-paper": lambda: AutoInt(**SMALL, variant="paper", shortcut="linear"),
}


def batch():
    return torch.rand(4, 2), torch.randint(100, (4, 3))


def unused(model):
    model.spare = LogitLinear(8)
    nn.init.ones_(model.spare.weight)


@pytest.mark.parametrize("change", [lambda model: None, unused, lambda model: model.requires_grad_(False),
                                    lambda model: model.register_forward_hook(lambda *_: None)])
@pytest.mark.parametrize("name", BUILD)
def test_all_of_a_logit_is_scaled_and_shifted(name, change):
    model, inputs = BUILD[name]().eval(), batch()
    change(model)
    logits = model(*inputs)
    model.scale_logits(2.0)
    torch.testing.assert_close(model(*inputs), 2.0 * logits)
    model.shift_logits(0.5)
    torch.testing.assert_close(model(*inputs), 2.0 * logits + 0.5)
    if change is unused:
        assert torch.equal(model.spare.weight, torch.ones(1, 8))


def tie(model):
    model.head[-1].weight = model.shortcut[-1].weight = nn.Parameter(torch.ones(1, 64))


def tie_biases(model):
    model.head[-1].bias = model.shortcut[-1].bias


def tie_to_a_hidden_layer(model):
    model.register_parameter("again", model.head[-1].weight)


def twice(model):
    model.shortcut = nn.Sequential(nn.Flatten(), nn.Linear(256, 64), model.head[-1])


CHANGES = {
    "tied": (tie, r"head\.4\.weight belongs to another layer, too"),
    "tied biases": (tie_biases, r"head\.4\.bias belongs to another layer, too"),
    "tied to another": (tie_to_a_hidden_layer, r"head\.4\.weight belongs to another layer, too"),
    "of one memory": (lambda m: setattr(m.head[-1].bias, "data", m.shortcut[-1].bias.data),
                      r"head\.4\.bias belongs to another layer, too"),
    "used twice": (twice, "head.4.weight belongs to another layer, too"),
    "head replaced": (lambda m: setattr(m, "head", nn.Sequential(nn.Linear(64, 1), nn.Flatten(0))), r"head\.1 is a Fl"),
    "shortcut replaced": (lambda m: setattr(m, "shortcut", nn.Sequential(nn.Flatten(), nn.Linear(256, 1))),
                          r"shortcut\.1 is a Linear"),
    "no head": (lambda m: setattr(m, "head", None), "head is None"),
    "appended": (lambda m: m.head.append(nn.Tanh()), r"head\.5 is a Tanh"),
    "empty": (lambda m: setattr(m, "head", nn.Sequential()), r"head\. is None"),
    "hook of the head": (lambda m: m.head[-1].register_forward_hook(lambda *_: None), r"head\.4 has a forward hook"),
    "hook of its Sequential": (lambda m: m.head.register_forward_hook(lambda *_: None), "head has a forward hook"),
    "hook of the shortcut": (lambda m: m.shortcut.register_forward_pre_hook(lambda *_: None), "shortcut has a forwa"),
    "forward": (lambda m: setattr(m.head, "forward", lambda x: x), "head has a forward of its own"),
    "pruned": (lambda m: prune.l1_unstructured(m.shortcut[-1], "weight", 0.5), "has a forward hook"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_logit_that_would_be_changed_in_part_is_left_alone(change):
    model = FTTransformer(**SMALL, shortcut="mlp")
    act, message = CHANGES[change]
    act(model)
    before = copy.deepcopy(dict(model.named_parameters()))
    for function in (model.scale_logits, model.shift_logits):
        with pytest.raises(ValueError, match=f"in a layer that was changed: .*{message}"):
            function(2.0)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_changed_cross_shortcut_is_found():
    model = AutoInt(**SMALL, shortcut="cross")
    model.shortcut[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"shortcut\.1 has a forward hook"):
        model.scale_logits(2.0)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, torch.tensor(math.nan)])
def test_factors_and_shifts_that_are_no_numbers_are_named(number):
    model = DCNv2(**SMALL)
    before = copy.deepcopy(model.state_dict())
    for function, name in ((model.scale_logits, "factor"), (model.shift_logits, "shift")):
        with pytest.raises(ValueError, match=f"{name}=.*(nan|inf).* is not finite"):
            function(number)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Shifted(nn.Module):
    def forward(self, weight):
        return weight + 0.1


class Product(nn.Module):
    """A weight of two factors."""

    def forward(self, left, right):
        return left @ right

    def right_inverse(self, weight):
        return torch.eye(len(weight)), weight


SURGERIES = {
    "pruned": (lambda m: prune.l1_unstructured(m, "weight", 0.5), {"weight_orig"}),
    "weight norm of old": (torch.nn.utils.weight_norm, {"weight_v"}),
    "spectral norm of old": (torch.nn.utils.spectral_norm, {"weight_orig"}),
    "weight norm": (parametrizations.weight_norm, {"parametrizations.weight.original1"}),
    "spectral norm": (parametrizations.spectral_norm, {"parametrizations.weight.original"}),
    "parametrized": (lambda m: parametrize.register_parametrization(m, "weight", Shifted()),
                     {"parametrizations.weight.original"}),
    "two factors": (lambda m: parametrize.register_parametrization(m, "weight", Product()),
                    {"parametrizations.weight.original0", "parametrizations.weight.original1"}),
    "pruned bias": (lambda m: prune.l1_unstructured(m, "bias", 0.5), {"weight"}),
    "parametrized bias": (lambda m: parametrize.register_parametrization(m, "bias", Shifted()), {"weight"}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("surgery", SURGERIES)
def test_a_weight_that_is_computed_keeps_its_decay(surgery):
    model = FTTransformer(**SMALL)
    change, names = SURGERIES[surgery]
    count = len(model.dense_parameter_groups(0.1)[0]["params"])
    linear = model.layers[0].qkv
    change(linear)
    decayed, kept = (set(map(id, group["params"])) for group in model.dense_parameter_groups(0.1))
    assert {name for name, p in linear.named_parameters() if id(p) in decayed} == names
    assert len(decayed) == count + len(names) - 1
    everything = [id(p) for p in model.parameters()]
    assert sorted([*decayed, *kept, *map(id, model.embedding_parameters())]) == sorted(everything)


@pytest.mark.parametrize("change", [lambda t: prune.l1_unstructured(t, "weight", 0.5),
                                    lambda t: parametrize.register_parametrization(t, "weight", Shifted()),
                                    parametrizations.weight_norm])
@pytest.mark.parametrize("build", [lambda: DCNv2(**SMALL), lambda: AutoInt(**SMALL, tables="per-field")])
def test_a_table_that_is_computed_is_named(build, change):
    model = build()
    change(next(m for m in model.modules() if hasattr(m, "lookup_dtype")))
    for function in (model.embedding_parameters, lambda: model.dense_parameter_groups(0.1)):
        with pytest.raises(ValueError, match=r"embedding\.table\.weight is no parameter but computed"):
            function()
