"""Settings and parts that are wrong, or are changed after the construction, are named and never used silently."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from ctr_models import MODELS, AutoInt, DCNv2, FTTransformer
from ctr_models.base import Dropout
from ctr_models.numeric import FieldHistory, PiecewiseLinear
from ctr_models.tokenizer import FeatureTokenizer, FieldEmbedding

SMALL = {"num_embeddings": 100, "num_sparse": 3, "num_dense": 2}


def batch(rows=4, columns=2):
    return torch.rand(rows, columns), torch.randint(100, (rows, 3))


@pytest.mark.parametrize("table", [lambda: nn.Embedding(99, 8, sparse=True), lambda: nn.Embedding(120, 8)])
def test_per_field_tables_may_be_replaced(table):
    embedding = FieldEmbedding(num_embeddings=100, dim=8, num_fields=3, tables="per-field")
    embedding.table = table()
    ids = batch()[1]
    expected = embedding.table.weight[ids % 33 + torch.tensor([0, 33, 66])]
    assert torch.equal(embedding(ids), expected)


@pytest.mark.parametrize("rows", [33, 66, 98])
def test_a_table_too_small_for_its_fields_is_named(rows):
    embedding = FieldEmbedding(num_embeddings=100, dim=8, num_fields=3, tables="per-field")
    for kind in (nn.Embedding(rows, 8), type(embedding.table)(rows, 8)):
        embedding.table = kind
        with pytest.raises(ValueError, match=f"the table has {rows} rows; 3 fields of 33 rows need 99"):
            embedding(batch()[1])
    with pytest.raises(ValueError, match=r"ids have shape \(4, 1\); \[B, 3\] is needed"):
        embedding(torch.zeros(4, 1, dtype=torch.int64))


def test_dropout_draws_in_fp32_on_the_device_of_its_input():
    torch.set_default_dtype(torch.bfloat16)
    try:
        share = (Dropout(0.001)(torch.ones(1_000_000, dtype=torch.float32)) == 0.0).double().mean().item()
    finally:
        torch.set_default_dtype(torch.float32)
    assert abs(share - 0.001) < 1.6e-4  # 5 standard deviations
    with torch.device("meta"):
        assert Dropout(0.5)(torch.ones(8, device="cpu")).device.type == "cpu"
    models = [DCNv2(**SMALL).train() for _ in range(1)]
    inputs = batch()
    with torch.device("meta"):
        assert models[0](*inputs).device.type == "cpu"


def test_dropout_is_that_of_torch_at_the_ends_and_in_place():
    x = torch.ones(1000)
    assert torch.equal(Dropout(1.0)(x), torch.zeros(1000)) and torch.equal(Dropout(0.0)(x), x)
    out = Dropout(0.5, inplace=True)(x)
    assert out is x and (x == 0.0).any()
    for p in (1.5, -0.1, math.nan):
        module = Dropout(0.5)
        module.p = p
        with pytest.raises((ValueError, RuntimeError), match="probability has to be between 0 and 1"):
            module(x)


@pytest.mark.parametrize("value", [1.5, math.nan, -0.1, 1.0])
def test_an_embedding_dropout_of_later_is_looked_at(value):
    model = FTTransformer(**SMALL)
    model.tokenizer.embedding_dropout = value
    with pytest.raises(ValueError, match=f"embedding_dropout={value} is outside"):
        model(*batch())
    model.eval()(*batch())


@pytest.mark.parametrize(("build", "change", "error"), [
    (FTTransformer, lambda m: setattr(m, "pooling", "max"), "pooling='max': choose one of cls, mean"),
    (DCNv2, lambda m: setattr(m, "structure", "deep"), "structure='deep': choose one of parallel, stacked"),
    (AutoInt, lambda m: setattr(m.tokenizer.embedding, "tables", "own"), "tables='own': choose one of"),
    (AutoInt, lambda m: setattr(m.tokenizer, "dense", "words"), "dense='words': choose one of token, affine"),
    (AutoInt, lambda m: setattr(m.layers[0], "norm", "none"), "norm='none': choose pre or post"),
    (FTTransformer, lambda m: setattr(m.layers[0], "activation", "silu"), "activation='silu': choose one of gelu"),
    (FTTransformer, lambda m: setattr(m.layers[0], "num_heads", 5), "D=64 is not divisible into num_heads=5"),
    (AutoInt, lambda m: setattr(m.layers[0], "num_heads", 0), "num_heads=0"),
    (AutoInt, lambda m: setattr(m.layers[0], "kernels", "fast"), "kernels='fast'")])
def test_choices_of_later_are_looked_at(build, change, error):
    for kernels in ("auto", "eager"):
        model = build(**SMALL, kernels=kernels)
        change(model)
        with pytest.raises(ValueError, match=error):
            model(*batch())


EDGES = [[0.0, 1.0, 3.0], [0.5, 0.75, 2.0]]


@pytest.mark.parametrize("of", [np.array, torch.tensor, lambda e: [np.array(x) for x in e],
                                lambda e: [torch.tensor(x) for x in e]])
def test_edges_and_moments_may_be_arrays(of):
    x = torch.rand(5, 2)
    made = [FeatureTokenizer(**SMALL, dim=8, dense="piecewise", numeric_edges=edges) for edges in (EDGES, of(EDGES))]
    made[1].load_state_dict({**made[0].state_dict(), **{f"numeric.{name}": getattr(made[1].numeric, name)
                                                        for name in ("low", "scale")}})
    assert torch.equal(made[0].numeric(x), made[1].numeric(x))
    moments = [[0.5] * 6, [2.0] * 6]
    assert torch.equal(FieldHistory(2, 3, 8, of(moments)).scale, torch.full((6,), 0.5))


@pytest.mark.parametrize("edges", [[0.0, math.nan], [0.0, math.inf], [-math.inf, 0.0], [math.nan], [1.0, 1.0 + 1e-12],
                                   [1e9, 1e9 + 1], [0.0, 1e-42], [0.0, 1e39], [2.0, 1.0]])
def test_edges_that_fp32_cannot_hold_are_named(edges):
    with pytest.raises(ValueError, match=r"numeric_edges\[1\]=\[.*\] do not increase, or are not finite, in torch.f"):
        PiecewiseLinear([[0.0, 1.0], edges], 4)


@pytest.mark.parametrize(("mean", "deviation", "error"), [
    (math.nan, 1.0, "the mean nan of column 2"), (1e39, 1.0, "the mean inf of column 2"),
    (0.0, math.nan, "the deviation nan of column 2"), (0.0, math.inf, "the deviation inf of column 2"),
    (0.0, -1.0, "the deviation -1.0 of column 2"), (0.0, 1e-42, "the deviation 1.*e-42 of column 2")])
@pytest.mark.parametrize("build", [lambda **kw: DCNv2(**SMALL, **kw), lambda **kw: AutoInt(**SMALL, **kw),
                                   lambda **kw: DCNv2(**SMALL, numeric="token", **kw)])
def test_moments_that_are_no_numbers_are_named(build, mean, deviation, error):
    moments = [[0.0, 0.0, mean], [1.0, 0.0, deviation]]
    with pytest.raises(ValueError, match=error):
        build(history=1, history_moments=moments)
    build(history=1, history_moments=[[0.0] * 3, [1.0, 0.0, 2.0]])


@pytest.mark.parametrize("name", MODELS)
def test_history_is_checked_in_every_model(name):
    with pytest.raises(ValueError, match="history=-1 is negative"):
        MODELS[name](**SMALL, history=-1)
    with pytest.raises(ValueError, match=r"history_moments has lists of \[2, 3\] numbers; 2 lists of 3"):
        MODELS[name](**SMALL, history=1, history_moments=[[0.0] * 2, [1.0] * 3])
