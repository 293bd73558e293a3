"""The sparse-row optimizers against fp64 loops over rows, and as citizens of torch.optim."""

import copy
from collections.abc import Callable

import pytest
import torch
from row_formulas import ExactTable
from row_tables import BACKENDS, OPTIMIZERS, make, needs_native, new_table, steps

from ctr_kernels import EmbeddingTable, SparseAdagrad, SparseLazyAdam, SparseRowwiseAdagrad, SparseSGD
from ctr_kernels.sparse_update.reference import rounding_bits
from ctr_kernels.sparse_update.rule import RowState

DECAYS = [{}, {"weight_decay": 0.3}, {"weight_decay": 0.3, "decay_untouched": True}]


def batches(num_rows: int, dim: int, steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids with many duplicates and gradients; the rows of a step are a third of the table, so that others wait."""
    return [(torch.randint(num_rows, (num_rows,))[: num_rows // 3].repeat(3), torch.randn(num_rows // 3 * 3, dim))
            for _ in range(steps)]


def step(table: EmbeddingTable, optimizer: torch.optim.Optimizer, ids: torch.Tensor, rows: torch.Tensor) -> None:
    optimizer.zero_grad()
    table(ids).backward(rows)
    optimizer.step()


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("decay", DECAYS, ids=["no decay", "touched", "untouched"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_seven_steps_are_those_of_the_formula(name: str, decay: dict, kernels: str) -> None:
    torch.manual_seed(0)
    table = EmbeddingTable(12, 5, std=1.0, kernels=kernels)
    exact = ExactTable(table.weight.double().tolist(), name, decay)
    optimizer = OPTIMIZERS[name](table.parameters(), lr=0.1, kernels=kernels, **decay)
    for ids, rows in batches(12, 5, 7):
        step(table, optimizer, ids, rows)
        exact.step(ids, rows)
    torch.testing.assert_close(table.weight.double(), torch.tensor(exact.weight).double(), rtol=2e-6, atol=2e-6)
    state = optimizer.state[table.weight]
    expected = {"sum": exact.row_sums if name == "rowwise-adagrad" else exact.sums, "exp_avg": exact.means,
                "exp_avg_sq": exact.squares, "last_step": exact.touched, "step": 7}
    for key, value in state.items():
        torch.testing.assert_close(value.double(), torch.tensor(expected[key]).double(), rtol=2e-6, atol=1e-7)
    assert ("last_step" in state) == ("decay_untouched" in decay)
    if name == "rowwise-adagrad" and not decay:
        assert state.keys() == {"sum"} and state["sum"].shape == (12,)  # one float a row, nothing else


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize(("name", "theirs"), [("sgd", torch.optim.SGD), ("adagrad", torch.optim.Adagrad),
                                              ("lazy-adam", torch.optim.SparseAdam)])
def test_without_decay_they_are_torchs_own(name: str, theirs: type[torch.optim.Optimizer], kernels: str) -> None:
    torch.manual_seed(1)
    ours, other = EmbeddingTable(30, 16, kernels=kernels), torch.nn.Embedding(30, 16, sparse=True)
    other.load_state_dict(ours.state_dict())
    pairs = [(ours, OPTIMIZERS[name](ours.parameters(), lr=0.05, kernels=kernels)),
             (other, theirs(other.parameters(), lr=0.05, **({"eps": 1e-8} if name != "sgd" else {})))]
    for ids, rows in batches(30, 16, 5):
        for table, optimizer in pairs:
            step(table, optimizer, ids, rows)
    torch.testing.assert_close(ours.weight, other.weight, rtol=1e-5, atol=1e-6)


def scheduled_run(name: str, kernels: str, break_at: int | None, **options) -> list[torch.Tensor]:
    """Weights and state after six steps with a schedule on two groups; begun anew from state_dicts at `break_at`."""
    torch.manual_seed(2)
    tables = [EmbeddingTable(20, 8, dtype=torch.bfloat16 if i else torch.float32, kernels=kernels) for i in (0, 1)]
    steps = [batches(20, 8, 6) for _ in tables]

    def make() -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        groups = [{"params": tables[0].parameters()}, {"params": tables[1].parameters(), "lr": 0.5}]
        optimizer = OPTIMIZERS[name](groups, lr=0.1, kernels=kernels, weight_decay=0.1, **options)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / 4))

    optimizer, schedule = make()
    for t in range(6):
        if t == break_at:
            saved = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
            optimizer, schedule = make()
            torch.rand(3)  # what is drawn in between does not matter
            optimizer.load_state_dict(saved[0])
            schedule.load_state_dict(saved[1])
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx(
            [0.1 * min(1, (t + 1) / 4), 0.5 * min(1, (t + 1) / 4)])
        optimizer.zero_grad()
        for table, of_table in zip(tables, steps, strict=True):
            ids, rows = of_table[t]
            table(ids).backward(rows.to(table.weight.dtype))
        optimizer.step()
        schedule.step()
    kept = [optimizer.state[table.weight] for table in tables]
    return [*(table.weight.detach() for table in tables), *(state[key] for state in kept for key in sorted(state))]


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize(("name", "options"), [
    ("sgd", {}), ("rowwise-adagrad", {"decay_untouched": True}), ("adagrad", {}),
    ("lazy-adam", {"state_dtype": torch.bfloat16, "decay_untouched": True}), ("lazy-adam", {"seed": 7})], ids=str)
def test_resuming_from_a_state_dict_is_exact(name: str, options: dict, kernels: str) -> None:
    whole, halves = (scheduled_run(name, kernels, break_at, **options) for break_at in (None, 3))
    for a, b in zip(whole, halves, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_learning_rate_may_be_a_tensor(name: str, kernels: str) -> None:
    results = []
    for rate in (0.25, torch.tensor(0.25)):
        torch.manual_seed(3)
        table = EmbeddingTable(9, 4, kernels=kernels)
        optimizer = OPTIMIZERS[name](table.parameters(), lr=rate, weight_decay=0.5, kernels=kernels)
        for ids, rows in batches(9, 4, 2):
            step(table, optimizer, ids, rows)
        results.append(table.weight.detach())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("kind", "options", "error"), [
    (SparseSGD, {"lr": -1.0}, r"lr=-1\.0 is negative"),
    (SparseSGD, {"lr": float("nan")}, "lr=nan is no number"),
    (SparseSGD, {"lr": torch.ones(2)}, "lr is a tensor of 2 elements"),
    (SparseSGD, {"lr": 0.1, "weight_decay": -0.5}, r"weight_decay=-0\.5 is negative"),
    (SparseSGD, {"lr": 2.0, "weight_decay": 0.5}, r"lr=2\.0 times weight_decay=0\.5 is 1\.0; below 1"),
    (SparseSGD, {"decay_untouched": True}, "decay_untouched=True needs a weight_decay"),
    (SparseRowwiseAdagrad, {"eps": 0.0}, r"eps=0\.0 must be positive"),
    (SparseAdagrad, {"eps": -1e-8}, "eps=-1e-08 must be positive"),
    (SparseLazyAdam, {"betas": (0.9, 1.0)}, r"betas=\(0\.9, 1\.0\): each must be in \[0, 1\)"),
    (SparseLazyAdam, {"state_dtype": torch.float16}, r"state_dtype=torch\.float16: choose torch\.float32 or"),
    (SparseLazyAdam, {"kernels": "fast"}, "kernels='fast'"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_hyperparameters_out_of_range_are_quoted(kind: type, options: dict, error: str) -> None:
    weight = torch.nn.Parameter(torch.zeros(3, 4))
    with pytest.raises((ValueError, TypeError), match=error):
        kind([weight], **options)
    if "kernels" not in options:
        with pytest.raises((ValueError, TypeError), match=error):  # in a param group as well
            kind([{"params": [weight], **options}])


def test_a_gradient_of_a_foreign_dtype_is_refused() -> None:
    weight = torch.nn.Parameter(torch.zeros(3, 4, dtype=torch.bfloat16))
    weight.grad_dtype = torch.float64
    weight.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 4).double(), (3, 4))
    with pytest.raises(TypeError, match=r"a table of torch\.bfloat16 has dtype torch\.float64"):
        SparseSGD([weight]).step()


def make_bf16(name: str, kernels: str, num_rows: int, dim: int, **options) -> tuple:
    table = EmbeddingTable(num_rows, dim, dtype=torch.bfloat16, output_dtype=torch.float32, kernels=kernels)
    if name == "lazy-adam":
        options["state_dtype"] = torch.bfloat16
    return table, OPTIMIZERS[name](table.parameters(), kernels=kernels, seed=5, **options)


@pytest.mark.parametrize("kernels", BACKENDS)
def test_stochastic_rounding_is_unbiased_where_rounding_to_nearest_stands_still(kernels: str) -> None:
    table, optimizer = make_bf16("sgd", kernels, 4000, 8, lr=1.0)
    torch.nn.init.ones_(table.weight)
    ids, rows = torch.arange(4000), torch.full((4000, 8), 2.0**-11)  # an eighth of a unit in the last place below 1
    for _ in range(32):
        step(table, optimizer, ids, rows)
    moved = 1.0 - table.weight.double()
    # a step moves by 2^-8 with probability 1/8; after 32 of them 32,000 elements have moved by 2^-6 on average
    deviation = 2.0**-8 * (32 * 7 / 64 / moved.numel()) ** 0.5
    assert abs(moved.mean().item() - 2.0**-6) < 4 * deviation
    assert (1 - torch.tensor(2.0**-11)).to(torch.bfloat16) == 1  # to nearest: no step at all
    assert moved.std() > 0


@needs_native
@pytest.mark.parametrize("dim", [1, 8, 13, 64, 1100])
@pytest.mark.parametrize("name", ["sgd", "lazy-adam"])
def test_bf16_is_rounded_to_the_same_bits_everywhere(fused: str, name: str, dim: int) -> None:
    """With sums that are exact in any order, every backend rounds the same fp32 values."""
    tables = []
    for kernels in ("eager", fused):
        torch.manual_seed(4)
        table, optimizer = make_bf16(name, kernels, 50, dim, lr=2.0**-6)
        for ids, rows in batches(50, dim, 3):
            found = table(ids)
            assert found.dtype == torch.float32 and torch.equal(found, table.weight[ids].float())
            step(table, optimizer, ids, (rows * 8).round() if name == "sgd" else rows.sign())
            assert table.weight.grad._values().dtype == torch.float32
        tables.append([table.weight.detach(), *optimizer.state[table.weight].values()])
    if name == "sgd":
        assert all(torch.equal(a, b) for a, b in zip(*tables, strict=True))
    else:  # roots and quotients may differ in the last bit of fp32, and a rare element is rounded the other way
        for a, b in zip(*tables, strict=True):
            assert (a != b).float().mean() < 2e-3


def test_the_bits_of_the_rounding_follow_step_row_and_column() -> None:
    tensor, rows = torch.zeros(100, 13, dtype=torch.bfloat16), torch.arange(100)

    def drawn(which: int, step: int, seed: int) -> torch.Tensor:
        return rounding_bits(tensor, rows, which, RowState(step=torch.tensor(step), seed=torch.tensor([seed])))

    first = drawn(0, 1, 5)
    assert first.shape == (100, 13) and first.min() >= 0 and first.max() < 2**16
    assert torch.equal(first, drawn(0, 1, 5))
    assert torch.equal(first[40:60], rounding_bits(tensor, rows[40:60], 0, RowState(
        step=torch.tensor(1), seed=torch.tensor([5]))))
    for other in (drawn(1, 1, 5), drawn(0, 2, 5), drawn(0, 1, 6), first.flip(0), first.flip(1)):
        assert (first == other).float().mean() < 0.1
    assert abs(first.double().mean() - 2**15) < 4 * 2**16 / (12 * first.numel()) ** 0.5


@needs_native
@pytest.mark.parametrize("make", [
    lambda t: SparseAdagrad(t.parameters(), lr=0.1, weight_decay=0.1, decay_untouched=True),
    lambda t: SparseLazyAdam(t.parameters(), lr=0.1, state_dtype=torch.bfloat16, seed=3)], ids=["adagrad", "adam"])
def test_results_do_not_depend_on_the_number_of_threads(make: Callable) -> None:
    torch.manual_seed(5)
    ids, rows = (torch.rand(20000) ** 4 * 999).long(), torch.randn(20000, 64)
    weight, threads, results = torch.randn(1000, 64), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            table = EmbeddingTable(1000, 64, kernels="native")
            table.weight.data.copy_(weight)
            optimizer = make(table)
            for _ in range(2):
                step(table, optimizer, ids, rows)
            results.append([table.weight.detach(), *optimizer.state[table.weight].values()])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_hooks_of_steps_and_the_profiler_see_them(name: str) -> None:
    optimizer, calls = make(name, "eager"), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        steps(optimizer, [0])
    assert calls == ["pre", "post"]
    names = [event.name for event in profile.events() if event.name.startswith("Optimizer.step#")]
    assert names == [f"Optimizer.step#{OPTIMIZERS[name].__name__}.step"]


@pytest.mark.parametrize("kernels", [*BACKENDS, "auto"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_model_may_change_its_dtype_between_steps(name: str, kernels: str) -> None:
    for dtype in (torch.bfloat16, torch.float64):
        if dtype == torch.float64 and kernels == "native":
            continue
        model = torch.nn.ParameterList([new_table()])
        optimizer = OPTIMIZERS[name](model.parameters(), lr=0.1, kernels=kernels, seed=1)
        steps(optimizer, range(2))
        model.to(dtype)
        before, sums = model[0].detach().clone(), {k: v.clone() for k, v in optimizer.state[model[0]].items()}
        steps(optimizer, [2])
        assert model[0].dtype == dtype and not torch.equal(model[0], before)
        for key in sums.keys() - {"step"}:
            assert optimizer.state[model[0]][key].dtype == sums[key].dtype
        model.to(torch.float32)
        steps(optimizer, [3])


@needs_native
def test_the_operator_tells_autograd_what_it_writes_whoever_calls_it() -> None:
    weight, first, second = (torch.zeros(4, 2) for _ in range(3))
    last, ids, rows = torch.zeros(4, dtype=torch.int32), torch.tensor([1]), torch.ones(1, 2)
    torch.ops.ctr.sparse_update(weight, first, second, last, ids, rows, None, None, 3, 0.1, None, 0.1, 1e-8, 0.9, 0.999,
                                torch.tensor(1), None)
    assert [t._version for t in (weight, first, second, last, ids, rows)] == [1, 1, 1, 1, 0, 0]
    plain = (ids, rows, None, None, 0, 0.1, None, 0.0, 1e-8, 0.9, 0.999, None, None)
    torch.ops.ctr.sparse_update(weight, None, None, None, *plain)
    assert weight._version == 2 and first._version == 1
    with torch.inference_mode():
        torch.ops.ctr.sparse_update(weight.clone(), None, None, None, *plain)
