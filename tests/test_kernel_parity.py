"""The contract of every fused kernel: as exact as PyTorch in the same dtype (the rule: tests/parity.py).

The native kernels run it on every instruction set; the Triton kernels, on smaller shapes, in Triton's interpreter,
which is chosen before Triton is imported: one test runs this file in a process of its own.
"""

import importlib.util
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parity import SEED, Tensors, assert_parity, check, cross_inputs, ffn_inputs, with_gradients
from triton_interpreter import INTERPRETED, run_in_the_interpreter

from ctr_kernels import (
    EmbeddingTable,
    SparseAdagrad,
    SparseLazyAdam,
    SparseRowwiseAdagrad,
    SparseSGD,
    TransformerLayer,
    ffn,
    field_attention,
    field_tokens,
    low_rank_cross,
)
from ctr_kernels.attention.reference import field_attention_reference
from ctr_kernels.cross.reference import low_rank_cross_reference
from ctr_kernels.ffn.reference import ACTIVATIONS as FUNCTIONS
from ctr_kernels.ffn.reference import ffn_reference
from ctr_kernels.philox import dropout_mask_torch
from ctr_kernels.sparse_update.reference import update_reference
from ctr_kernels.sparse_update.rule import RowState, Rule
from ctr_kernels.tokenizer.reference import History, field_tokens_reference

DTYPES = (torch.float32, torch.float16 if INTERPRETED else torch.bfloat16)  # bf16 is wrong in the interpreter
native_only = pytest.mark.skipif(INTERPRETED, reason="for the native kernels")
HEAD_DIMS = (5, 16, 24, 100) if INTERPRETED else (1, 4, 5, 8, 10, 16, 20, 24, 32, 40, 64, 100, 128)
OPTIMIZERS = {"sgd": SparseSGD, "rowwise-adagrad": SparseRowwiseAdagrad, "adagrad": SparseAdagrad,
              "lazy-adam": SparseLazyAdam}

ACTIVATIONS = tuple(FUNCTIONS)

properties = settings(max_examples=4 if INTERPRETED else 40, deadline=None, derandomize=True,
                      suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@native_only
def test_the_triton_kernels_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__, at_least=100, skipped=12)


def check_attention(kernels: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int,
                    dropout_p: float = 0.0, scale: float | None = None) -> None:
    factor = scale if scale is not None else (q.shape[-1] // heads) ** -0.5
    check(
        lambda q, k, v: field_attention(q, k, v, num_heads=heads, scale=scale, dropout_p=dropout_p, seed=SEED,
                                        kernels=kernels),
        lambda q, k, v: field_attention_reference(q, k, v, heads, factor, dropout_p, torch.tensor([SEED])),
        [q, k, v],
        torch.randn(q.shape, dtype=q.dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_attention(fused: str, head_dim: int, dropout_p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    cases = [(0, 27, 4), (20, 1, 1), (3, 27, 4), (2, 33, 1)]
    cases += [] if INTERPRETED else [(1, 28, 2), (2, 16, 1), (1, 64, 2), (2, 65, 3), (1, 100, 2), (1, 128, 1)]
    for batch, fields, heads in cases:
        q, k, v = torch.randn(batch, fields, 3 * heads * head_dim).to(dtype).chunk(3, dim=-1)
        check_attention(fused, q, k, v, heads, dropout_p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_attention_with_fewer_or_more_queries_than_fields(fused: str, dropout_p: float, dtype: torch.dtype) -> None:
    """One query above all: a CLS token that reads all fields."""
    torch.manual_seed(13)
    cases = [(3, 1, 40, 2, 24), (2, 3, 27, 4, 16), (4, 40, 3, 2, 8), (0, 1, 5, 1, 5)]
    cases += [] if INTERPRETED else [(5, 1, 100, 4, 16), (70, 1, 1, 2, 10), (2, 1, 128, 1, 128), (2, 128, 1, 3, 20)]
    for batch, queries, fields, heads, head_dim in cases:
        q, (k, v) = torch.randn(batch, fields + queries, heads * head_dim).to(dtype)[:, -queries:], torch.randn(
            batch, fields, 2 * heads * head_dim).to(dtype).chunk(2, dim=-1)
        check_attention(fused, q, k, v, heads, dropout_p)


@native_only
def test_attention_at_full_size(fused: str) -> None:
    torch.manual_seed(1)
    check_attention(fused, *torch.randn(4096, 27, 192).chunk(3, dim=-1), 4, 0.1)


@pytest.mark.parametrize("scale", [None, 1.0, -0.5])
def test_attention_of_large_logits(fused: str, scale: float | None) -> None:
    torch.manual_seed(2)
    q, k, v = (torch.randn(3, 27, 64) for _ in range(3))
    check_attention(fused, q * 50, k * 50, v, 4, scale=scale)  # logits up to 1e4 and beyond, both signs
    same = torch.full((1, 27, 64), 25.0)
    check_attention(fused, same, same, v[:1], 4, scale=1.0)  # 10,000 everywhere
    check_attention(fused, same, -same, v[:1], 4, scale=1.0)


def test_attention_of_any_strides(fused: str) -> None:
    torch.manual_seed(3)
    x = torch.randn(5, 27, 64)
    column = x[:, :1].expand(5, 27, 64)  # all keys equal
    turned = torch.randn(5, 64, 27).transpose(1, 2)  # the last dimension is not contiguous
    batch_of_one = x[:1].expand(5, 27, 64)
    for q, k, v in [(x, column, x), (turned, x, turned), (batch_of_one, x, column), (x[::2], x[:3], x[-3:])]:
        check_attention(fused, q, k, v, 4)
    torch.testing.assert_close(
        *(torch.autograd.grad(field_attention(q, q, q, num_heads=4, kernels=kernels).sum(), q)[0]  # expanded gradient
          for q in [x.clone().requires_grad_()] for kernels in (fused, "eager")), rtol=1e-4, atol=1e-5)


@properties
@given(st.integers(0, 3), st.integers(1, 40 if INTERPRETED else 128), st.integers(1, 3), st.integers(1, 128),
       st.sampled_from([0, 1, 2, 70]), st.sampled_from([0.0, 0.5]), st.sampled_from(DTYPES), st.integers(0, 2**32))
def test_attention_of_any_shape(fused: str, batch: int, fields: int, heads: int, head_dim: int, queries: int,
                                dropout_p: float, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    q, k, v = torch.randn(batch, fields, 3 * heads * head_dim).to(dtype).chunk(3, dim=-1)
    if queries:  # else of all fields
        q = torch.randn(batch, queries, heads * head_dim).to(dtype)
    check_attention(fused, q, k, v, heads, dropout_p)


@pytest.mark.parametrize("fields", [1, 27, 40, 64])
def test_attention_drops_the_elements_of_the_specification(fused: str, fields: int) -> None:
    rows = 3 * 2 * fields
    v = torch.eye(fields, 64).expand(3, fields, 64).repeat(1, 1, 2)  # each head then returns its probabilities
    out = field_attention(torch.zeros_like(v), torch.zeros_like(v), v, num_heads=2, dropout_p=0.3, seed=SEED,
                          kernels=fused)
    kept = out.view(3, fields, 2, 64)[..., :fields].transpose(1, 2).reshape(rows, fields) != 0
    assert torch.equal(kept, dropout_mask_torch(rows, fields, 0.3, torch.tensor([SEED])))


def check_ffn(kernels: str, inputs: Tensors, activation: str, dropout_p: float = 0.0) -> None:
    x = inputs[0]
    grad_out = torch.randn(x.shape) / max(1, x.numel() // x.shape[-1]) ** 0.5  # sums over the tokens are then about 1
    check(
        lambda *t: ffn(*t, activation=activation, dropout_p=dropout_p, seed=SEED, kernels=kernels),
        lambda *t: ffn_reference(*t, activation, dropout_p, torch.tensor([SEED])),
        inputs,
        grad_out.to(x.dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_ffn(fused: str, activation: str, dropout_p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    small = [(0, 64, 256), (1, 64, 128), (81, 8, 72), (40, 8, 1)]
    large = [] if INTERPRETED else [(200, 20, 8), (50, 1, 33), (96, 64, 256), (300, 64, 256), (500, 192, 256),
                                    (33, 200, 170), (97, 768, 100)]
    for tokens, dim, hidden in [*small, *large]:
        check_ffn(fused, ffn_inputs(tokens, dim, hidden, dtype, activation), activation, dropout_p)


@native_only
def test_ffn_at_full_size(fused: str) -> None:
    torch.manual_seed(5)
    x, *weights = ffn_inputs(4096 * 27, 64, 256, torch.float32)
    check_ffn(fused, [x.view(4096, 27, 64), *weights], "gelu", 0.1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_ffn_of_large_and_strided_inputs(fused: str, activation: str) -> None:
    torch.manual_seed(6)
    x, *weights = ffn_inputs(48, 64, 128, torch.float32, activation)
    check_ffn(fused, [x * 1e4, *weights], activation)
    check_ffn(fused, [x.view(2, 24, 64)[:, :1].expand(2, 5, 64), *weights], activation)
    turned = [weights[0].t().contiguous().t(), weights[1], weights[2].t().contiguous().t(), weights[3]]
    check_ffn(fused, [x.t().contiguous().t(), *turned], activation)


@properties
@given(st.integers(0, 200), st.integers(1, 70), st.integers(8, 160), st.sampled_from(ACTIVATIONS),
       st.sampled_from([0.0, 0.5]), st.sampled_from(DTYPES), st.integers(0, 2**32))
def test_ffn_of_any_shape(fused: str, tokens: int, dim: int, hidden: int, activation: str, dropout_p: float,
                          dtype: torch.dtype, seed: int) -> None:
    """Eight hidden units at least: of one, the rule would compare one number's errors, of which eager's may be none."""
    torch.manual_seed(seed)
    check_ffn(fused, ffn_inputs(tokens, dim, hidden, dtype, activation), activation, dropout_p)


@pytest.mark.parametrize("activation", ["relu", "reglu"])
@pytest.mark.parametrize("hidden", [7, 64, 72, pytest.param(256, marks=native_only)])
def test_ffn_drops_the_elements_of_the_specification(fused: str, hidden: int, activation: str) -> None:
    rows = hidden * (2 if activation == "reglu" else 1)
    out = ffn(torch.zeros(100, hidden), torch.zeros(rows, hidden), torch.ones(rows), torch.eye(hidden),
              torch.zeros(hidden), activation=activation, dropout_p=0.3, seed=SEED, kernels=fused)  # the hidden: ones
    assert torch.equal(out != 0, dropout_mask_torch(100, hidden, 0.3, torch.tensor([SEED])))


# Tokens, width, heads, their width, hidden units: of the tuned shapes, of odd ones, and of FT-Transformer's paper.
LAYERS = [(0, 27, 64, 4, 16, 256), (1, 1, 16, 2, 8, 8), (3, 40, 48, 3, 16, 72), (2, 5, 30, 2, 10, 33)]
if not INTERPRETED:
    LAYERS += [(5, 27, 64, 4, 16, 256), (11, 28, 64, 1, 64, 128), (30, 40, 192, 8, 24, 256), (2, 100, 20, 2, 64, 40)]
FORMS = [{"norm": "pre"}, {"norm": "post"}, {"attention_norm": False, "activation": "reglu"},
         {"queries": 1, "activation": "geglu"}, {"queries": 1, "attention_norm": False, "activation": "swiglu"}]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_layer(fused: str, form: dict[str, Any], dropout_p: float) -> None:
    """The halves of a layer, norms and residuals included, each one operator."""
    torch.manual_seed(9)
    for batch, fields, dim, heads, head_dim, hidden in LAYERS:
        layer = TransformerLayer(dim, heads, hidden, head_dim=head_dim, dropout=dropout_p, kernels=fused, **form)
        assert all(half.composed is None for half in layer.backends(fields).values()), layer.backends(fields)
        for module in (layer.attention_norm, layer.ffn_norm):
            if module is not None:
                torch.nn.init.normal_(module.weight)
                torch.nn.init.normal_(module.bias)
        names, weights = zip(*layer.named_parameters(), strict=True)

        def run(kernels: str, x: torch.Tensor, *weights: torch.Tensor, layer: TransformerLayer = layer,
                names: tuple[str, ...] = names) -> torch.Tensor:
            torch.manual_seed(10)  # of the masks
            layer.kernels = kernels
            return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), x)

        x = torch.randn(batch, fields, dim) * 3 + 1
        grad_out = torch.randn(batch, layer.queries or fields, dim)
        check(partial(run, fused), partial(run, "eager"), [x, *weights], grad_out / max(1, batch * fields) ** 0.5)


def check_cross(kernels: str, batch: int, width: int, rank: int, dtype: torch.dtype = torch.float32) -> None:
    inputs = cross_inputs(batch, width, rank, dtype)
    grad_out = torch.randn(batch, width) / max(1, batch) ** 0.5  # sums over the rows are then about 1
    check(partial(low_rank_cross, kernels=kernels), low_rank_cross_reference, inputs, grad_out.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross(fused: str, dtype: torch.dtype) -> None:
    torch.manual_seed(11)
    large = [] if INTERPRETED else [(100, 2496, 32), (4096, 429, 32)]
    narrow = [(1, 1, 1), (3, 5, 1), (100, 40, 1), (64, 100, 3)]
    for batch, width, rank in [(0, 429, 32), *narrow, (40, 429, 32), (33, 128, 20), (7, 70, 60), *large]:
        check_cross(fused, batch, width, rank, dtype)


@native_only
@properties
@given(st.integers(0, 100), st.integers(1, 100), st.integers(1, 70), st.sampled_from(DTYPES), st.integers(0, 2**32))
def test_cross_of_any_shape(fused: str, batch: int, width: int, rank: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    check_cross(fused, batch, width, rank, dtype)


def test_cross_of_any_strides(fused: str) -> None:
    torch.manual_seed(12)
    x0, x = torch.randn(1, 20).expand(6, 20), torch.randn(20, 6).t()
    weights = [torch.randn(20, 4).t(), torch.randn(4, 20).t(), torch.randn(1).expand(20)]
    check(partial(low_rank_cross, kernels=fused), low_rank_cross_reference, [x0, x, *weights], torch.randn(20, 6).t())


@pytest.mark.skipif(not INTERPRETED, reason="field_tokens has Triton kernels only; the native tokens are composed")
@pytest.mark.parametrize("numeric", ["token", "affine", "scaled"])
def test_tokens(fused: str, numeric: str) -> None:
    """CLS, numbers, rows with dropout, history and field biases; the gradients of all, the table's made dense."""
    torch.manual_seed(14)
    (fields, features, dim), ids = (5, 4, 24), torch.randint(30, (6, 5))
    vectors = (dim, features) if numeric == "token" else (features, dim)
    bias = (dim,) if numeric == "token" else (features, dim)
    shapes = [(30, dim), (6, features + 2 * fields), vectors, (dim,), (fields, dim), (2, fields, dim), (fields, dim)]
    shapes += [] if numeric == "scaled" else [bias]
    mean, scale = torch.randn(2, 2 * fields)

    def run(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        table, dense, weight, cls, field_bias, *past = tensors
        history = History(past[0], past[1], mean.to(table.dtype), scale.to(table.dtype))
        return function(table, ids, dense, weight, past[2] if numeric != "scaled" else None, cls, field_bias, history)

    def triton(*t: Any) -> torch.Tensor:
        return field_tokens(*t[:-1], numeric=numeric, history=t[-1], dropout_p=0.3, seed=SEED, kernels=fused)

    def reference(*t: Any) -> torch.Tensor:
        return field_tokens_reference(*t[:-1], numeric, t[-1], 0.3, torch.tensor([SEED]))

    tokens = fields + 1 + (1 if numeric == "token" else features)
    check(partial(run, triton), partial(run, reference), [torch.randn(shape) for shape in shapes],
          torch.randn(6, tokens, dim))


def id_batches(num_rows: int) -> list[torch.Tensor]:
    """Ids [B, 26] of every kind: none, one, uniform, skewed, a column of equal ids, all ids equal."""
    uniform = torch.randint(num_rows, (300, 26))
    skewed = (torch.rand(2000, 26) ** 9 * num_rows).long()
    column = uniform.clone()
    column[:, 3] = num_rows - 1
    return [uniform[:0], uniform[:1, :1], uniform, skewed, column, torch.full((4096, 26), num_rows // 2)]


@pytest.mark.parametrize(("num_rows", "dim"), [(1, 8), (1000, 64), (3000, 13), (40000, 5),
                                               pytest.param(70, 1100, marks=native_only)])  # minutes in the interpreter
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_lookup_and_update(fused: str, name: str, num_rows: int, dim: int) -> None:
    torch.manual_seed(7)
    for ids in id_batches(num_rows):
        most = 7e6 if name == "sgd" and dim == 64 else 1.5e6  # elements: the references take nearly all of the time
        ids = ids[:3 if INTERPRETED else int(most / 26 / dim)]  # 78 ids are two programs of the Triton kernels
        table = EmbeddingTable(num_rows, dim, std=1.0, kernels=fused)
        optimizer = OPTIMIZERS[name](table.parameters(), lr=0.1, kernels=fused)
        before, rows = table.weight.detach().clone(), torch.randn(*ids.shape, dim)
        for id_dtype in (torch.int32, torch.int64):  # the second step meets a state
            found = table(ids.to(id_dtype))
            found.backward(rows)
            assert table.weight.grad._values().shape[0] == ids.numel()  # no coalesced copy
            optimizer.step()
            optimizer.zero_grad()
        results = []
        for dtype in (torch.float32, torch.float64):
            weight = before.to(dtype, copy=True)
            shape = (num_rows,) if name == "rowwise-adagrad" else (num_rows, dim)
            first, second = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
            for step in (1, 2):
                lookup = weight[ids]
                update_reference(weight, ids.flatten(), rows.view(-1, dim).to(dtype), Rule(name, 0.1),
                                 RowState(first, second, step=torch.tensor(step)))
            results.append([lookup, weight, first, second])
        eager, exact = results
        state = optimizer.state[table.weight]
        kept = [state.get("sum", state.get("exp_avg", exact[2])), state.get("exp_avg_sq", exact[3])]
        assert_parity([found.detach(), table.weight.detach(), *(k.float() for k in kept)], eager, exact)
        untouched = torch.ones(num_rows, dtype=torch.bool)
        untouched[ids.flatten()] = False
        assert torch.equal(table.weight[untouched], before[untouched])


@pytest.mark.parametrize("bad", [-1, 50, 2**31 - 1, -(2**31)])
def test_an_id_outside_the_table_is_named(fused: str, bad: int) -> None:
    table = EmbeddingTable(50, 8, kernels=fused)
    for dtype, shape in itertools.product((torch.int32, torch.int64), [(4, 26), (104,)]):
        ids = torch.zeros(104, dtype=dtype)
        ids[57] = bad
        position = r"\[2, 5\]" if len(shape) == 2 else r"\[57\]"
        with pytest.raises(IndexError, match=rf"id {bad} at position {position} is outside the table of 50 rows"):
            table(ids.view(shape))


@native_only
def test_an_update_outside_the_table_is_refused(fused: str) -> None:
    table = EmbeddingTable(50, 8, kernels=fused)
    table.weight.grad = torch.sparse_coo_tensor([[3, 50]], torch.ones(2, 8), (50, 8), check_invariants=False)
    before = table.weight.detach().clone()
    with pytest.raises(IndexError, match=r"id 50 at position \[1\] is outside the table of 50 rows"):
        SparseSGD(table.parameters(), lr=1.0, kernels=fused).step()
    assert torch.equal(table.weight, before)


@native_only
def test_results_do_not_depend_on_the_number_of_threads(fused: str) -> None:
    torch.manual_seed(8)
    q, grad = torch.randn(64, 27, 64), torch.randn(64, 27, 64)
    weights = ffn_inputs(1, 64, 256, torch.float32)[1:]
    cross = [torch.randn(shape) for shape in [(300, 100), (300, 100), (8, 100), (100, 8), (100,)]]
    ids, rows = (torch.rand(20000) ** 4 * 999).long(), torch.randn(20000, 64)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            table = EmbeddingTable(1000, 64, kernels=fused)
            table.weight.data.fill_(1.0)
            table.weight.grad = torch.sparse_coo_tensor(ids[None], rows, (1000, 64))
            SparseRowwiseAdagrad(table.parameters(), lr=0.1, kernels=fused).step()
            results.append([
                *with_gradients(lambda q: field_attention(q, q, q, num_heads=4, kernels=fused), [q], grad),
                *with_gradients(lambda *t: ffn(*t, dropout_p=0.1, seed=1, kernels=fused), [q, *weights], grad),
                *with_gradients(partial(low_rank_cross, kernels=fused), cross, cross[0].cos()),
                table.weight.detach(),
            ])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
