"""The forms of a layer: heads of another width, gates, no norm, fewer queries; and what it says of its backends."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from ctr_kernels import TransformerLayer
from ctr_kernels.layer import Half
from ctr_kernels.library import NATIVE_ABSENT

needs_native = pytest.mark.skipif(NATIVE_ABSENT is not None, reason=f"native: {NATIVE_ABSENT}")


def by_hand(layer: TransformerLayer, x: torch.Tensor, heads: int, head_dim: int) -> torch.Tensor:
    """The formula, one head and one query at a time; pre-norm."""
    normed = x if layer.attention_norm is None else layer.attention_norm(x)
    q, k, v = layer.qkv(normed).chunk(3, dim=-1)
    rows = layer.queries or x.shape[1]
    attended = torch.empty(x.shape[0], rows, heads * head_dim)
    for sample, head, query in [(b, h, r) for b in range(x.shape[0]) for h in range(heads) for r in range(rows)]:
        columns = slice(head * head_dim, (head + 1) * head_dim)
        weights = torch.softmax(k[sample, :, columns] @ q[sample, query, columns] / head_dim**0.5, dim=0)
        attended[sample, query, columns] = weights @ v[sample, :, columns]
    x = x[:, :rows] + (attended if layer.out is None else layer.out(attended))
    hidden = layer.ffn_in(layer.ffn_norm(x))
    gates = {"reglu": F.relu, "geglu": F.gelu, "swiglu": F.silu}
    if layer.activation in gates:
        a, b = hidden[..., :layer.ffn_out.in_features], hidden[..., layer.ffn_out.in_features:]
        hidden = a * gates[layer.activation](b)
    else:
        hidden = F.gelu(hidden)
    return x + layer.ffn_out(hidden)


@pytest.mark.parametrize("kernels", ["auto", "eager"])
@pytest.mark.parametrize("form", [
    {}, {"head_dim": 5}, {"activation": "reglu"}, {"activation": "geglu", "attention_norm": False},
    {"activation": "swiglu", "queries": 1}, {"queries": 3, "head_dim": 16, "attention_norm": False},
    {"out_projection": False, "queries": 1}])
def test_forms_are_their_formula(form: dict[str, Any], kernels: str) -> None:
    torch.manual_seed(0)
    layer, x = TransformerLayer(12, 2, 7, kernels=kernels, **form), torch.randn(3, 5, 12)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), by_hand(layer, x, 2, form.get("head_dim", 6)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("arguments", "error"), [
    ({"head_dim": 0}, "num_heads=2 of head_dim=0"), ({"queries": 0}, "queries=0: at least 1"),
    ({"out_projection": False, "head_dim": 5}, "2 heads of 5 have 10 columns, not dim=12"),
    ({"attention_norm": False, "norm": "post"}, "norm='post' has a norm after its attention")])
def test_forms_that_cannot_be_are_refused(arguments: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        TransformerLayer(12, 2, 8, **arguments)


def test_more_queries_than_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="queries=3: x has 2 tokens"):
        TransformerLayer(12, 2, 8, queries=3)(torch.randn(1, 2, 12))


@needs_native
def test_a_layer_says_what_runs_its_halves() -> None:
    layer = TransformerLayer(192, 8, 256, activation="reglu", attention_norm=False, kernels="native")
    assert layer.backends(40) == {"attention": Half("native"), "ffn": Half("native")}
    assert layer.operations(40) == {"attention_block": "native", "ffn": "native"}
    layer.out.register_forward_hook(lambda *_: None)
    assert layer.backends()["attention"] == Half("native", "out has a forward hook")
    assert layer.operations(40) == {"attention_block": "eager", "field_attention": "native", "ffn": "native"}
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.backends()["ffn"].composed == "under autocast linear layers have another dtype than norms"
        assert layer.operations(40)["ffn"] == "native"
    layer.kernels = "auto"
    assert layer.operations(129)["field_attention"] == "eager"
    layer.double()
    assert layer.backends()["ffn"] == Half("eager", "kernels='auto' is eager here")
