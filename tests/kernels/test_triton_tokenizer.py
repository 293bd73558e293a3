"""Lookup and tokens in Triton: parity, row gradients, dropout masks and memory traffic in Triton's interpreter."""

from functools import partial
from typing import NamedTuple

import pytest
import torch
from parity import assert_parity, nan_memory
from torch.library import opcheck
from triton_interpreter import interpreted, outside, run_in_the_interpreter
from triton_traffic import counting, times

from ctr_kernels import SparseSGD, field_tokens
from ctr_kernels.philox import dropout_mask
from ctr_kernels.sparse_update.plan import sort_ids
from ctr_kernels.tokenizer import History
from ctr_models import FTTransformer

pytest.importorskip("triton")
from ctr_kernels.sparse_update import triton as row_updates  # noqa: E402
from ctr_kernels.tokenizer import triton as kernels  # noqa: E402

TENSORS = ("weight", "dense", "dense_weight", "dense_bias", "cls", "field_bias")
SEED = 0x1234_5678_9ABC_DEF0


class Shape(NamedTuple):
    """A batch, and which parts its tokens have."""

    batch: int
    fields: int
    features: int
    dim: int
    statistics: int = 0
    with_cls: bool = False
    biased: bool = False
    dropout_p: float = 0.0
    rows: int = 50

    def tokens(self, numeric: str) -> int:
        return self.with_cls + (1 if numeric == "token" else self.features) + self.fields


STUDY, RECIPE = Shape(3, 26, 13, 64, with_cls=True), Shape(3, 26, 13, 64, statistics=2, dropout_p=0.2)
SHAPES = (RECIPE, STUDY, Shape(0, 26, 13, 64, 2, dropout_p=0.2), Shape(1, 1, 1, 8, 1),
          Shape(9, 3, 26, 20, 3, True, True, 0.5, rows=1), Shape(2, 40, 5, 16, biased=True, dropout_p=0.3))


@outside
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__, 22)


def draw(shape: Shape, numeric: str = "token",
         dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, list[torch.Tensor | None], History | None]:
    """Ids; the tensors of TENSORS; history."""
    batch, fields, features, dim, statistics, *_ = shape
    vectors = (features, dim)
    bias = None if numeric == "scaled" else (dim,) if numeric == "token" else vectors
    sizes = [(shape.rows, dim), (batch, features + statistics * fields),
             (dim, features) if numeric == "token" else vectors, bias, (dim,) if shape.with_cls else None,
             (fields, dim) if shape.biased else None]
    past = [(statistics, fields, dim), (fields, dim), (statistics * fields,), (statistics * fields,)]
    tensors, history = ([None if s is None else torch.randn(s).to(dtype) for s in group] for group in (sizes, past))
    history[3][::5] = 0.0  # a column that never varied
    return torch.randint(shape.rows, (batch, fields)), tensors, History(*history) if statistics else None


def run(function, ids: torch.Tensor, tensors: list[torch.Tensor | None], history: History | None,
        grad_out: torch.Tensor, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """Tokens and all gradients, the table's as (rows) after its ids were compared; everything in dtype, if any."""
    tensors = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    given = [t for t in tensors if t is not None]
    if history is not None:
        history = History(*(t.detach().to(dtype or t.dtype) for t in history))
        given += [t.requires_grad_() for t in history[:2]]
    with nan_memory():
        out = function(tensors[0], ids, *tensors[1:], history=history)
        table, *grads = torch.autograd.grad(out, given, grad_out.to(out.dtype))
    assert table.is_sparse and torch.equal(table._indices()[0], ids.flatten().long())
    return [out.detach(), table._values(), *grads]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("numeric", ["token", "affine", "scaled"])
def test_parity(numeric: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    for shape in SHAPES:
        monkeypatch.setattr(kernels, "PROGRAMS", 1 if shape.batch > 4 else 4)  # one program sums many samples
        ids, tensors, history = draw(shape, numeric, dtype)
        grad_out = torch.randn(shape.batch, shape.tokens(numeric), shape.dim).to(dtype)
        tokens = partial(field_tokens, numeric=numeric, dropout_p=shape.dropout_p, seed=SEED)
        triton = run(partial(tokens, kernels="triton"), ids.int(), tensors, history, grad_out)
        eager = partial(tokens, kernels="eager")
        assert_parity(triton, run(eager, ids, tensors, history, grad_out),
                      run(eager, ids, tensors, history, grad_out, torch.float64))


@interpreted
@pytest.mark.parametrize("fields", [26, 40])
def test_the_mask_is_that_of_the_specification(fields: int) -> None:
    """Rows of ones, whose gradients are ones, and no other part."""
    ids, (_, dense, *others), _ = draw(Shape(4, fields, 2, 16, rows=9))
    weight = torch.ones(9, 16, requires_grad=True)
    seed = torch.tensor([-3])
    out = field_tokens(weight, ids, dense, *others, dropout_p=0.5, seed=seed, kernels="triton")
    out.backward(torch.ones_like(out))
    expected = dropout_mask(4, fields, 0.5, seed).unsqueeze(-1).expand(4, fields, 16) * 2.0
    assert 0 < expected.sum() < 2 * expected.numel()
    assert torch.equal(out[:, 1:], expected) and torch.equal(weight.grad._values(), expected.reshape(-1, 16))


@interpreted
@pytest.mark.parametrize("numeric", ["token", "affine"])
@pytest.mark.parametrize("tables", ["shared", "per-field"])
def test_a_model_has_the_tokens_of_its_composition(tables: str, numeric: str) -> None:
    models = []
    for backend in ("triton", "eager"):
        torch.manual_seed(1)
        models.append(FTTransformer(num_embeddings=260, dim=16, num_heads=2, tables=tables, numeric=numeric, history=2,
                                    embedding_dropout=0.2, kernels=backend).tokenizer)
    assert models[0].state_dict().keys() == models[1].state_dict().keys()
    dense, sparse = torch.rand(3, 13 + 52, dtype=torch.float64), torch.randint(260, (3, 26))
    grads = []
    for model in models:
        torch.manual_seed(2)  # both draw the seed of their mask from torch's generator
        out = model(dense, sparse)
        out.square().sum().backward()
        grads.append([out, *(p.grad.to_dense() for p in model.parameters())])
    assert not torch.equal(models[0](dense, sparse), grads[0][0])  # another mask
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@interpreted
def test_a_half_precision_table_gives_fp32_tokens_and_row_gradients() -> None:
    """fp16 in place of bf16, which the interpreter computes wrongly."""
    torch.manual_seed(4)
    model = FTTransformer(num_embeddings=50, dim=16, num_heads=2, numeric="affine", kernels="triton")
    model.store_embeddings_as(torch.float16)
    ids, results = torch.randint(50, (2, 26)), []
    for backend in ("triton", "eager"):
        tokenizer = model.tokenizer
        tokenizer.embedding.table.kernels = backend
        tokenizer.zero_grad()
        out = tokenizer(torch.rand(2, 13, generator=torch.Generator().manual_seed(1)), ids)
        out.cos().sum().backward()
        results.append([out, *(p.grad for p in tokenizer.parameters())])
    weight = model.tokenizer.embedding.table.weight
    assert weight.dtype == torch.float16 and weight.grad.is_sparse
    for found, expected in zip(*results, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.to_dense(), expected.to_dense(), rtol=1e-5, atol=1e-6)


@interpreted
def test_an_id_outside_the_table_is_named_or_becomes_nan() -> None:
    ids, tensors, _ = draw(Shape(2, 3, 2, 16, with_cls=True))
    ids[1, 2] = 50
    with pytest.raises(IndexError, match=r"id 50 at position \[1, 2\] is outside the table of 50 rows"):
        field_tokens(tensors[0], ids, *tensors[1:], kernels="triton")
    for seed in (None, torch.tensor([5])):  # as on a GPU, where nothing waits for a check; kept or dropped
        out = kernels.forward(tensors[0], ids, *tensors[1:], *[None] * 4, True, 0.9 if seed else 0.0, seed)
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
@pytest.mark.parametrize("shape", [STUDY, RECIPE._replace(biased=True)], ids=["study", "recipe"])
def test_the_operators(shape: Shape) -> None:
    """Schemas and fakes; alone they refuse a derivative, which would lack the table's."""
    torch.manual_seed(8)
    numeric = "affine" if shape.statistics else "token"
    ids, (weight, dense, *rest), history = draw(shape._replace(batch=2), numeric)
    parts, one, seed = history or (None,) * 4, numeric == "token", torch.tensor([7])
    arguments = (weight, ids, dense, *rest, *parts, one, shape.dropout_p, seed)
    opcheck(torch.ops.ctr.field_tokens, arguments)
    out = torch.ops.ctr.field_tokens(*arguments)
    opcheck(torch.ops.ctr.field_tokens_backward,
            (out, dense, *parts[2:], 26, one, shape.with_cls, history is not None, shape.dropout_p, seed))
    tracked = torch.ops.ctr.field_tokens(weight.requires_grad_(), *arguments[1:])
    with pytest.raises(RuntimeError, match=r"call ctr_kernels\.field_tokens"):
        tracked.sum().backward()


@interpreted
def test_strided_inputs() -> None:
    torch.manual_seed(2)
    ids, (weight, dense, *rest), history = draw(Shape(4, 6, 5, 16, 2, True, True), "affine")
    strided = [weight.t().contiguous().t(), dense[:1].expand(4, 17), *(t.t().contiguous().t() for t in rest)]
    history = History(*(torch.stack([t, t], dim=-1)[..., 0] for t in history))
    found, expected = (field_tokens(strided[0], ids.t().contiguous().t(), *strided[1:], numeric="affine",
                                    history=history, kernels=k) for k in ("triton", "eager"))
    torch.testing.assert_close(found, expected)


@interpreted
def test_two_gradients_do_not_share_their_memory() -> None:
    """Both are sums of the fields' gradients; clipping writes to each."""
    ids, tensors, history = draw(Shape(2, 3, 2, 16, 1, biased=True))
    leaves = [tensors[5].requires_grad_(), history.bias.requires_grad_()]
    out = field_tokens(tensors[0], ids, *tensors[1:], history=history, kernels="triton")
    grads = torch.autograd.grad(out.sum(), leaves)
    assert torch.equal(*grads) and grads[0].data_ptr() != grads[1].data_ptr()


@interpreted
def test_the_traffic_is_that_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    ids = torch.randperm(6 * 26).view(6, 26)  # each row once
    for shape, sizes in ((STUDY, kernels.STUDY), (RECIPE, kernels.RECIPE)):
        shape = shape._replace(batch=6, rows=6 * 26)
        _, (weight, dense, *rest), history = draw(shape, "token" if sizes.ONE else "affine")
        parts = history or (None,) * 4
        seed = torch.tensor([7]) if shape.dropout_p else None
        accesses = counting(monkeypatch)
        out = kernels.forward(weight, ids, dense, *rest, *parts, sizes.ONE, shape.dropout_p, seed)
        assert times(accesses["load"], ids) == times(accesses["load"], dense) == {1}
        assert times(accesses["store"], out) == {1} and accesses["store"].total() == out.numel()
        keep = dropout_mask(6, 26, shape.dropout_p, torch.tensor([7]))
        assert {i for i, row in enumerate(weight) if times(accesses["load"], row) == {1}} == set(ids[keep].tolist())

        accesses, biased = counting(monkeypatch), history is not None
        rows, sums = kernels.backward(out, dense, *parts[2:], sizes.K, sizes.ONE, bool(sizes.CLS), biased,
                                      shape.dropout_p, seed)
        launch = kernels.default(kernels.launch_key("backward", sizes, torch.float32, 0))
        assert times(accesses["load"], out[:, 2:]) == times(accesses["load"], out[:, 0]) == {1}
        assert times(accesses["load"], out[:, 1]) == {13 if sizes.ONE else 1}  # from the cache but for the first
        assert times(accesses["load"], dense) == times(accesses["store"], rows) == {1}
        slices = -(-26 // launch.tokens) - (-(sizes.CLS + 13) // launch.tokens)
        groups = min(4 * kernels.PROGRAMS // slices, -(-6 // launch.samples))
        assert groups == 2 and accesses["store"].total() == rows.numel() + groups * sums.numel()


@interpreted
def test_refusals() -> None:
    ids, tensors, history = draw(Shape(2, 3, 2, 16, 2, True, True))
    refused = partial(field_tokens, kernels="triton")
    for position, name in enumerate(TENSORS[1:], 1):
        wrong = [t[:-1] if i == position else t for i, t in enumerate(tensors)]
        with pytest.raises(ValueError, match=rf"{name} has shape .* it must be"):
            refused(wrong[0], ids, *wrong[1:], history=history)
    for name in History._fields[1:]:
        wrong = history._replace(**{name: getattr(history, name)[:-1]})
        with pytest.raises(ValueError, match=rf"history.{name} has shape .* it must be"):
            refused(tensors[0], ids, *tensors[1:], history=wrong)
    with pytest.raises(ValueError, match=r"history.weight has shape \(3, 16\); \[S, K, D\]"):
        refused(tensors[0], ids, *tensors[1:], history=history._replace(weight=history.weight[0]))
    with pytest.raises(ValueError, match=r"dense has shape \(2, 6\); with 2 statistics of 3 fields"):
        refused(tensors[0], ids, tensors[1][:, :6], *tensors[2:], history=history)
    with pytest.raises(ValueError, match=r"dense_bias is a tensor \(16,\); numeric='scaled' has none"):
        refused(tensors[0], ids, *tensors[1:], numeric="scaled")
    with pytest.raises(ValueError, match="dense_bias is None"):
        refused(tensors[0], ids, *tensors[1:3], None)
    with pytest.raises(ValueError, match="numeric='periodic': choose one of token, affine, scaled"):
        refused(tensors[0], ids, *tensors[1:], numeric="periodic")
    with pytest.raises(ValueError, match="dropout_p=1.0 is outside"):
        refused(tensors[0], ids, *tensors[1:], history=history, dropout_p=1.0)
    with pytest.raises(TypeError, match="history.mean has dtype torch.float64, dense_weight has torch.float32"):
        refused(tensors[0], ids, *tensors[1:], history=history._replace(mean=history.mean.double()))
    with pytest.raises(ValueError, match="D=9000 with 0 statistics of a field: kernels='triton' takes up to 16384"):
        refused(torch.zeros(5, 9000), torch.zeros(1, 26).long(), torch.zeros(1, 2), torch.zeros(9000, 2),
                torch.zeros(9000))
    with pytest.raises(TypeError, match="ids have dtype torch.float32"):
        refused(tensors[0], ids.float(), *tensors[1:], history=history)
