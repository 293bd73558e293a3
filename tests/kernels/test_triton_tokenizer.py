"""Lookup and tokens in Triton: parity, row gradients and memory traffic in Triton's interpreter."""

import pytest
import torch
from parity import assert_parity
from triton_interpreter import interpreted, outside, run_in_the_interpreter
from triton_traffic import counting, times

from ctr_kernels import SparseSGD, field_tokens
from ctr_kernels.sparse_update.plan import sort_ids
from ctr_kernels.tokenizer.reference import field_tokens_reference
from ctr_models import FTTransformer

pytest.importorskip("triton")
from ctr_kernels.sparse_update import triton as row_updates  # noqa: E402
from ctr_kernels.tokenizer import triton as kernels  # noqa: E402


@outside
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__, 16)


def draw(batch: int, fields: int, features: int, dim: int, with_cls: bool, biased: bool,
         dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Ids, and weight, dense, dense_weight, dense_bias, cls, field_bias."""
    shapes = [(50, dim), (batch, features), (dim, features), (dim,), (dim,) if with_cls else None,
              (fields, dim) if biased else None]
    return torch.randint(50, (batch, fields)), [None if s is None else torch.randn(s).to(dtype) for s in shapes]


def run(function, ids: torch.Tensor, tensors: list[torch.Tensor | None], grad_out: torch.Tensor) -> list[torch.Tensor]:
    """Tokens and all gradients, the table's as (rows) after its ids were compared."""
    tensors = [None if t is None else t.detach().requires_grad_() for t in tensors]
    given = [t for t in tensors if t is not None]
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        out = function(tensors[0], ids, *tensors[1:])
        table, *grads = torch.autograd.grad(out, given, grad_out.to(out.dtype))
    finally:
        torch.use_deterministic_algorithms(False)
    assert table.is_sparse and torch.equal(table._indices()[0], ids.flatten().long())
    return [out.detach(), table._values(), *grads]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("with_cls", [False, True])
def test_parity(with_cls: bool, biased: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shapes = [(0, 26, 13, 64), (1, 1, 1, 8), (5, 26, 13, 64), (9, 3, 26, 20), (3, 40, 5, 16)]
    for batch, fields, features, dim in shapes:
        ids, tensors = draw(batch, fields, features, dim, with_cls, biased, dtype)
        grad_out = torch.randn(batch, fields + 1 + with_cls, dim).to(dtype)
        triton = run(lambda *t: field_tokens(*t, kernels="triton"), ids.int(), tensors, grad_out)
        eager = run(field_tokens_reference, ids, tensors, grad_out)
        exact = run(field_tokens_reference, ids, [None if t is None else t.double() for t in tensors],
                    grad_out.double())
        assert_parity(triton, eager, exact)


@interpreted
@pytest.mark.parametrize("tables", ["shared", "per-field"])
def test_a_model_has_the_tokens_of_its_composition(tables: str) -> None:
    models = []
    for backend in ("triton", "eager"):
        torch.manual_seed(1)
        models.append(FTTransformer(num_embeddings=260, dim=16, num_heads=2, tables=tables, kernels=backend).tokenizer)
    assert models[0].state_dict().keys() == models[1].state_dict().keys()
    dense, sparse = torch.rand(3, 13, dtype=torch.float64), torch.randint(260, (3, 26))
    grads = []
    for model in models:
        out = model(dense, sparse)
        out.square().sum().backward()
        grads.append([out, *(p.grad.to_dense() for p in model.parameters())])
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@interpreted
def test_an_id_outside_the_table_is_named_or_becomes_nan() -> None:
    ids, tensors = draw(2, 3, 2, 16, True, False)
    ids[1, 2] = 50
    with pytest.raises(IndexError, match=r"id 50 at position \[1, 2\] is outside the table of 50 rows"):
        field_tokens(tensors[0], ids, *tensors[1:], kernels="triton")
    out = kernels._forward(tensors[0], ids, *tensors[1:])  # as on a GPU, where nothing waits for a check
    assert out[1, 4].isnan().all() and out.isnan().sum() == 16


@interpreted
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_ids_are_sorted_at_the_lookup_for_the_update(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    weight, ids = torch.nn.Parameter(torch.randn(9, 16)), torch.randint(9, (3, 4), dtype=dtype)
    before, grad = weight.detach().clone(), torch.randn(3, 5, 16)
    sorts = []
    monkeypatch.setattr(row_updates, "sort_ids", lambda *of: sorts.append(of) or sort_ids(*of))  # the update's own
    tokens = field_tokens(weight, ids, torch.randn(3, 2), torch.randn(16, 2), torch.randn(16), None, kernels="triton")
    tokens.backward(grad)
    SparseSGD([weight], lr=0.5, kernels="triton").step()
    before.index_add_(0, ids.flatten(), grad[:, 1:].reshape(-1, 16), alpha=-0.5)
    torch.testing.assert_close(weight.detach(), before)
    assert sorts == []


@interpreted
def test_strided_inputs() -> None:
    torch.manual_seed(2)
    ids, (weight, dense, *rest) = draw(4, 6, 5, 16, True, True)
    strided = [weight.t().contiguous().t(), dense[:1].expand(4, 5), *rest]
    found, expected = (field_tokens(strided[0], ids.t().contiguous().t(), *strided[1:], kernels=k)
                       for k in ("triton", "eager"))
    torch.testing.assert_close(found, expected)


@interpreted
def test_the_traffic_is_that_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    ids, (weight, dense, matrix, bias, cls, _) = draw(6, 26, 13, 64, True, False)
    weight, ids = torch.randn(6 * 26, 64), torch.randperm(6 * 26).view(6, 26)  # each row once
    accesses = counting(monkeypatch)
    out = kernels._forward(weight, ids, dense, matrix, bias, cls, None)
    assert [times(accesses["load"], t) for t in (weight, ids, dense)] == [{1}] * 3
    assert times(accesses["store"], out) == {1} and accesses["store"].total() == out.numel()

    accesses = counting(monkeypatch)
    rows, sums, grad_weight = kernels._backward(out, dense, 26, 2)
    assert times(accesses["load"], out[:, 2:]) == times(accesses["load"], out[:, 0]) == {1}
    assert times(accesses["load"], out[:, 1]) == {2} and times(accesses["load"], dense) == {1}
    assert times(accesses["store"], rows) == {1}
    programs = min(kernels.PROGRAMS, 3)
    assert accesses["store"].total() == rows.numel() + programs * (sums.numel() + grad_weight.numel())


@interpreted
def test_refusals() -> None:
    ids, tensors = draw(2, 3, 2, 16, True, True)
    for position, name in enumerate(("dense", "dense_weight", "dense_bias", "cls", "field_bias"), 1):
        wrong = [t[:-1] if i == position else t for i, t in enumerate(tensors)]
        with pytest.raises(ValueError, match=rf"{name} has shape .* it must be"):
            field_tokens(wrong[0], ids, *wrong[1:], kernels="triton")
    with pytest.raises(ValueError, match="26 tokens of D=1000: kernels='triton' takes up to 16384 elements"):
        field_tokens(torch.zeros(5, 1000), torch.zeros(1, 26).long(), torch.zeros(1, 2), torch.zeros(1000, 2),
                     torch.zeros(1000), kernels="triton")
    with pytest.raises(TypeError, match="ids have dtype torch.float32"):
        field_tokens(tensors[0], ids.float(), *tensors[1:], kernels="triton")
