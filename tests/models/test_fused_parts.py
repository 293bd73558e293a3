"""Cross layers and tokens are fused only from parts that are what the kernels compute; other parts are called."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from ctr_kernels import BackendUnavailable, EmbeddingTable, backends, field_tokens
from ctr_kernels.library import NATIVE_ABSENT
from ctr_models import AutoInt, DCNv2, FTTransformer
from ctr_models import tokenizer as tokenizer_module
from ctr_models.cross import FullRankCross, LowRankCross
from ctr_models.numeric import FieldHistory
from ctr_models.tokenizer import FeatureTokenizer, FieldEmbedding

needs_native = pytest.mark.skipif(NATIVE_ABSENT is not None, reason=f"native: {NATIVE_ABSENT}")


class LoRA(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2.0 * super().forward(x)


def hook(module):
    module.register_forward_hook(lambda _, __, out: 3.0 * out)


CROSS = {
    "LoRA of u": lambda layer: setattr(layer, "u", LoRA(layer.u)),
    "LoRA of v": lambda layer: setattr(layer, "v", LoRA(layer.v)),
    "subclass": lambda layer: setattr(layer, "v", Doubled(8, 40)),
    "v without bias": lambda layer: setattr(layer, "v", nn.Linear(8, 40, bias=False)),
    "u with bias": lambda layer: setattr(layer, "u", nn.Linear(40, 8)),
    "hook": lambda layer: hook(layer.u),
    "backward hook": lambda layer: layer.v.register_full_backward_hook(lambda _, grads, __: (grads[0] * 3.0,)),
    "pruned": lambda layer: prune.l1_unstructured(layer.v, "weight", 0.5),
    "weight norm": lambda layer: parametrizations.weight_norm(layer.u),
    "weight norm of old": lambda layer: torch.nn.utils.weight_norm(layer.u),
    "another rank": lambda layer: (setattr(layer, "u", nn.Linear(40, 5, bias=False)),
                                   setattr(layer, "v", nn.Linear(5, 40))),
    "MLP": lambda layer: setattr(layer, "v", nn.Sequential(nn.ReLU(), nn.Linear(8, 40))),
    "frozen": lambda layer: layer.u.requires_grad_(False),
}


@pytest.mark.parametrize("kernels", ["auto", "eager"])
@pytest.mark.parametrize("surgery", CROSS)
def test_a_cross_layer_calls_what_was_changed(surgery, kernels):
    torch.manual_seed(0)
    layer = LowRankCross(40, 8, kernels=kernels)
    CROSS[surgery](layer)
    for step in range(2):  # what computes its weight keeps a graph over the first step if it is not called
        torch.manual_seed(step)
        x0, x = torch.randn(3, 40, requires_grad=True), torch.randn(3, 40, requires_grad=True)
        leaves = [x0, x, *(p for p in layer.parameters() if p.requires_grad)]
        results = []
        for out in (layer(x0, x), x0 * layer.v(layer.u(x)) + x):
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)])
        for found, expected in zip(*results, strict=True):
            assert (found is None) == (expected is None)
            if found is not None:
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@needs_native
def test_a_printed_cross_layer_says_whether_it_is_fused():
    layer = LowRankCross(40, 8)
    assert "kernels='auto', fused" in repr(layer)
    layer.u = nn.Linear(40, 5, bias=False)
    assert "children are called: v.weight has shape (40, 8), not (40, 5)" in repr(layer)
    hook(layer.u)
    assert "children are called: u has a forward hook" in repr(layer)
    assert "experts have no fused operation" in repr(LowRankCross(40, 8, num_experts=2))
    assert "kernels='eager'" in repr(LowRankCross(40, 8, kernels="eager"))
    assert "cannot run" in repr(LowRankCross(40, 8, kernels="triton"))


def test_a_part_of_a_wrong_width_is_named():
    x = torch.randn(3, 40)
    layers = [LowRankCross(40, 8), FullRankCross(40)]
    layers[0].v, layers[1].linear = nn.Linear(8, 1), nn.Linear(40, 1)
    for layer, name in zip(layers, ("v", "linear"), strict=True):
        with pytest.raises(ValueError, match=rf"{name} gave \(3, 1\) where \(3, 40\) is needed"):
            layer(x, x)
    paper = FTTransformer(num_embeddings=100, variant="paper", dim=16, num_heads=2)
    paper.layers[0].ffn_out = nn.Linear(21, 1)
    with pytest.raises(ValueError, match=r"ffn_out gave \(2, 40, 1\)"):
        paper(torch.rand(2, 13), torch.randint(100, (2, 26)))


class WithoutRows(FieldEmbedding):
    def forward(self, ids):
        return torch.zeros_like(super().forward(ids))


class Twice(FieldHistory):
    def forward(self, x):
        return 2.0 * super().forward(x)


TOKENS = {
    "LoRA": lambda t: setattr(t, "dense_token", LoRA(t.dense_token)),
    "subclass": lambda t: setattr(t, "dense_token", Doubled(13, 8)),
    "no bias": lambda t: setattr(t, "dense_token", nn.Linear(13, 8, bias=False)),
    "hook": lambda t: hook(t.dense_token),
    "hook of the embedding": lambda t: hook(t.embedding),
    "hook of the table": lambda t: hook(t.embedding.table),
    "hook of the history": lambda t: hook(t.history),
    "subclass of the embedding": lambda t: setattr(t, "embedding", WithoutRows(num_embeddings=1000, dim=8,
                                                                               num_fields=26)),
    "subclass of the history": lambda t: setattr(t, "history", Twice(1, 26, 8)),
    "plain embedding": lambda t: setattr(t, "embedding", nn.Embedding(1000, 8)),
    "pruned": lambda t: prune.l1_unstructured(t.dense_token, "weight", 0.5),
    "pruned history": lambda t: prune.l1_unstructured(t.history, "weight", 0.5),
    "weight norm": lambda t: parametrizations.weight_norm(t.dense_token),
}


@pytest.mark.parametrize("surgery", TOKENS)
def test_fused_tokens_are_made_of_unchanged_parts(make_batch, monkeypatch, surgery):
    """As where Triton serves; the operation must not be called for parts that it does not know."""
    tokenizer = FeatureTokenizer(num_embeddings=1000, dim=8, history=1)
    TOKENS[surgery](tokenizer)
    batch = make_batch(4, num_dense=39)
    expected = tokenizer(*batch)
    monkeypatch.setattr(tokenizer_module, "on_triton", lambda *of: True)
    monkeypatch.setattr(tokenizer_module, "field_tokens", None)
    torch.testing.assert_close(tokenizer(*batch), expected)


def test_unchanged_parts_are_fused_and_a_printed_tokenizer_says_so(make_batch, monkeypatch):
    calls = []
    tokenizer = FeatureTokenizer(num_embeddings=1000, dim=8, history=1)
    batch = make_batch(4, num_dense=39)
    expected = tokenizer(*batch)
    assert "parts are called: kernels='auto' has no fused operation here" in repr(tokenizer)
    monkeypatch.setattr(tokenizer_module, "on_triton", lambda *of: True)
    monkeypatch.setattr(tokenizer_module, "field_tokens", lambda *tensors, kernels, **options: (
        calls.append(kernels), field_tokens(*tensors, **options, kernels="eager"))[1])
    assert "dense='token', fused" in repr(tokenizer)
    torch.testing.assert_close(tokenizer(*batch), expected)
    assert calls == ["triton"]
    hook(tokenizer.embedding.table)
    assert "parts are called: embedding.table has a forward hook" in repr(tokenizer)
    periodic = FeatureTokenizer(num_embeddings=1000, dim=8, dense="periodic")
    assert "parts are called: dense='periodic' has no fused operation" in repr(periodic)
    half = FeatureTokenizer(num_embeddings=1000, dim=8, history=1).half()
    assert "parts are called: history.mean has torch.float32, lookups torch.float16" in repr(half)


@pytest.mark.parametrize(("model_class", "settings"), [
    (FTTransformer, {"num_dense": 39, "numeric": "affine"}), (AutoInt, {"num_dense": 102, "numeric": "affine"}),
    (FTTransformer, {"dim": 48, "num_heads": 2}), (AutoInt, {"dim": 10, "num_heads": 5}),
    (FTTransformer, {"variant": "paper", "num_dense": 50}), (AutoInt, {"variant": "paper", "attention_dim": 24})])
def test_models_of_any_size_compute_what_eager_does(make_batch, model_class, settings):
    batch = make_batch(2, num_dense=settings.get("num_dense", 13))
    outs = []
    for kernels in ("auto", "native", "eager") if backends()["native"].level else ("auto", "eager"):
        torch.manual_seed(0)
        outs.append(model_class(num_embeddings=1000, kernels=kernels, **settings).eval()(*batch))
    for out in outs[:-1]:
        torch.testing.assert_close(out, outs[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("model_class", "settings", "reason"), [
    (FTTransformer, {"num_dense": 103, "numeric": "affine"}, "F=130 fields; F from 1 to 128"),
    (AutoInt, {"dim": 260, "num_heads": 2}, "D / num_heads = 130; 1 to 128")])
def test_models_of_any_size_run_and_a_chosen_backend_says_why_not(make_batch, model_class, settings, reason):
    batch = make_batch(2, num_dense=settings.get("num_dense", 13))
    outs = []
    for kernels in ("auto", "eager"):
        torch.manual_seed(0)
        outs.append(model_class(num_embeddings=1000, kernels=kernels, **settings).eval()(*batch))
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)
    for kernels in ("native", "triton"):
        with pytest.raises(ValueError, match=rf"with kernels='{kernels}': .*{reason}.*'eager' take any"):
            model_class(num_embeddings=1000, kernels=kernels, **settings)


def test_129_tokens_are_told_of_the_mean():
    settings = {"num_embeddings": 1000, "num_dense": 102, "numeric": "affine", "kernels": "native"}
    with pytest.raises(ValueError, match="F=129 fields; .* and pooling='mean' has a token less"):
        FTTransformer(**settings)
    FTTransformer(**settings, pooling="mean")
    with pytest.raises(ValueError, match="take any$"):  # CLS is what the paper's variant reads
        FTTransformer(**settings, variant="paper")
    with pytest.raises(ValueError, match="F=130 fields; .* take any$"):  # 129 would not fit either
        FTTransformer(**{**settings, "num_dense": 103})


def test_logits_are_not_scaled_in_a_layer_that_would_lose_it():
    for change in (parametrizations.weight_norm, hook, lambda head: prune.l1_unstructured(head, "weight", 0.5)):
        model = DCNv2(num_embeddings=100)
        change(model.head)
        for act in (model.scale_logits, model.shift_logits):
            with pytest.raises(ValueError, match="in a layer that was changed: head "):
                act(0.5)
    model = DCNv2(num_embeddings=100)
    model.head = LoRA(nn.Linear(493, 1))
    with pytest.raises(ValueError, match="in a layer that was changed: head is a LoRA"):
        model.scale_logits(0.5)


def test_parameters_that_modules_share_lie_in_one_group_once():
    model = DCNv2(num_embeddings=1000, num_experts=2)
    model.cross[1].u.weight = model.cross[0].u.weight
    groups = model.dense_parameter_groups(0.1)
    found = [id(p) for p in [*model.embedding_parameters(), *groups[0]["params"], *groups[1]["params"]]]
    assert sorted(found) == sorted({id(p) for p in model.parameters()})
    torch.optim.AdamW(groups)


METHODS = {
    "FieldEmbedding.forward": (FieldEmbedding, "forward"), "FieldHistory.forward": (FieldHistory, "forward"),
    "EmbeddingTable.forward": (EmbeddingTable, "forward"), "EmbeddingTable._lookup": (EmbeddingTable, "_lookup"),
    "FeatureTokenizer._numeric": (FeatureTokenizer, "_numeric"),
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_that_were_replaced_for_a_class_are_called(make_batch, monkeypatch, method):
    owner, name = METHODS[method]
    tokenizer, batch, before = FeatureTokenizer(num_embeddings=1000, dim=8, history=1), make_batch(4, num_dense=39), \
        getattr(owner, name)
    plain = tokenizer(*batch)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: 2.0 * before(*args, **kwargs))
    expected = tokenizer(*batch)
    assert not torch.allclose(expected, plain)
    monkeypatch.setattr(tokenizer_module, "on_triton", lambda *of: True)
    monkeypatch.setattr(tokenizer_module, "field_tokens", None)
    torch.testing.assert_close(tokenizer(*batch), expected)


class OwnNumbers(FeatureTokenizer):
    def _numeric(self, dense, dtype):
        return 2.0 * super()._numeric(dense, dtype)


def test_a_tokenizer_with_numbers_of_its_own_calls_them(make_batch, monkeypatch):
    batch = make_batch(4, num_dense=39)
    tokenizers = [OwnNumbers(num_embeddings=1000, dim=8, history=1), FeatureTokenizer(num_embeddings=1000, dim=8,
                                                                                     history=1)]
    numeric = tokenizers[1]._numeric
    tokenizers[1]._numeric = lambda *of: 2.0 * numeric(*of)
    for tokenizer in tokenizers:
        expected = tokenizer(*batch)
        with monkeypatch.context() as patch:
            patch.setattr(tokenizer_module, "on_triton", lambda *of: True)
            patch.setattr(tokenizer_module, "field_tokens", None)
            torch.testing.assert_close(tokenizer(*batch), expected)
        assert "has a _numeric of its own" in (tokenizer._why_not_fused() or "") or "here" in repr(tokenizer)


CROSS_INPUTS = {
    "three dimensions": lambda x: (x.expand(2, 3, 40), x.expand(2, 3, 40)), "a row": lambda x: (x[0], x[0]),
    "x0 of one row": lambda x: (x[:1], x), "x0 of fp64": lambda x: (x.double(), x),
    "x0 of bf16": lambda x: (x.bfloat16(), x), "x0 of three dimensions": lambda x: (x.expand(2, 3, 40), x),
    "x0 of no dimension": lambda x: (torch.tensor(2.0), x), "x0 that is a column": lambda x: (x[:, :1], x),
}


@pytest.mark.parametrize("case", CROSS_INPUTS)
def test_a_cross_layer_computes_what_eager_does(case):
    layer = LowRankCross(40, 8)
    x0, x = CROSS_INPUTS[case](torch.randn(3, 40))
    found, expected = layer(x0, x), x0 * layer.v(layer.u(x)) + x
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cross_layer_under_autocast_keeps_large_numbers(dtype):
    outs = []
    for kernels in ("auto", "eager"):
        torch.manual_seed(0)
        layer = LowRankCross(40, 8, kernels=kernels)
        x = torch.randn(3, 40)
        with torch.autocast("cpu", dtype):
            outs.append(layer(x * 1e5, x))
    assert outs[0].dtype == torch.float32 and outs[0].isfinite().all()
    torch.testing.assert_close(*outs, rtol=0.02, atol=500.0)  # of 1e5: eager rounds its products to `dtype`


def test_a_cross_layer_under_autocast_is_fused_in_the_dtype_of_its_input():
    torch.manual_seed(0)
    layer, x = LowRankCross(40, 8), torch.randn(3, 40)
    expected = layer(x, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x, x), expected)
        narrow = layer(x, x.bfloat16())  # called, as eager does
    torch.testing.assert_close(narrow, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("experts", [1, 2])
def test_a_cross_layer_has_the_backend_that_was_chosen(experts):
    with pytest.raises(ValueError, match="kernels='fast': choose one of auto, eager, native, triton"):
        LowRankCross(40, 8, num_experts=experts, kernels="fast")
    layer, x = LowRankCross(40, 8, num_experts=experts, kernels="triton"), torch.randn(3, 40)
    with pytest.raises(BackendUnavailable, match="kernels='triton' cannot run"):
        layer(x, x)
    with pytest.raises(BackendUnavailable, match="kernels='triton' cannot run"), torch.autocast("cpu"):
        layer(x, x)
    assert "cannot run" in repr(layer)
    layer.kernels = "auto"
    assert layer(x, x).shape == (3, 40)
