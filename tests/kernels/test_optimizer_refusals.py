"""Steps that the row optimizers refuse: for what reasons, and that nothing is written then.

For Triton the file runs once more in a process of its own, in the interpreter.
"""

from typing import Any

import pytest
import torch
from row_tables import (
    assert_same,
    every_backend,
    every_rule,
    give_gradient,
    give_rows,
    make,
    new_table,
    short_chunks,  # noqa: F401
    snapshot,
    steps,
    tables_of,
)
from torch.optim.lr_scheduler import LambdaLR
from triton_interpreter import INTERPRETED, outside, run_in_the_interpreter

from ctr_kernels import BackendUnavailable, SparseSGD
from ctr_kernels.sparse_update.checks import check_options
from ctr_kernels.sparse_update.reference import update_reference
from ctr_kernels.sparse_update.rule import RowState, Rule


@outside
def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_in_the_interpreter(__file__, at_least=60, skipped=2)


def lift(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Raise all rates as a schedule does."""
    LambdaLR(optimizer, lambda t: factor)


LATER = {  # what is wrong only at a later step -> (rule, how it comes, message)
    "negative": ("sgd", lambda o: o.param_groups[1].update(lr=-1.0), r"lr=-1\.0 is negative"),
    "nan": ("adagrad", lambda o: o.param_groups[1].update(lr=float("nan")), "lr=nan is no number"),
    "infinite": ("sgd", lambda o: o.param_groups[0].update(lr=float("inf")), "lr=inf is not finite in float32"),
    "beyond float32": ("sgd", lambda o: o.param_groups[0].update(lr=1e39, weight_decay=1e-60), "lr=1e.39 is not"),
    "none": ("sgd", lambda o: o.param_groups[0].update(lr=None), "lr=None must be a number"),
    "tensor": ("lazy-adam", lambda o: o.param_groups[1].update(lr=torch.tensor(-1.0)), r"lr=-1\.0 is negative"),
    "tensors": ("sgd", lambda o: o.param_groups[1].update(lr=torch.zeros(2)), "lr is a tensor of 2 elements"),
    "schedule": ("sgd", lambda o: lift(o, 100.0), r"lr=10\.0 times weight_decay=0\.1 is 1\.0; below 1"),
    "schedule below 0": ("rowwise-adagrad", lambda o: lift(o, -1.0), r"lr=-0\.1 is negative"),
    "decay": ("adagrad", lambda o: o.param_groups[1].update(weight_decay=-0.1), r"weight_decay=-0\.1 is negative"),
    "decay nan": ("sgd", lambda o: o.param_groups[1].update(weight_decay=float("nan")), "weight_decay=nan is no"),
    "decay tensor": ("sgd", lambda o: o.param_groups[1].update(weight_decay=torch.ones(1)), "weight_decay=tensor"),
    "decay gone": ("sgd", lambda o: o.param_groups[1].update(weight_decay=0.0), "decay_untouched=True needs a"),
    "eps": ("rowwise-adagrad", lambda o: o.param_groups[1].update(eps=0.0), r"eps=0\.0 must be positive"),
    "eps in float32": ("adagrad", lambda o: o.param_groups[1].update(eps=1e-60), "eps=1e-60 must be .*, 1.17.* at"),
    "eps infinite": ("adagrad", lambda o: o.param_groups[1].update(eps=float("inf")), "eps=inf is not finite"),
    "beta": ("lazy-adam", lambda o: o.param_groups[1].update(betas=(0.9, 1.0)), r"betas=\(0\.9, 1\.0\): each"),
    "beta nan": ("lazy-adam", lambda o: o.param_groups[1].update(betas=(float("nan"), 0.9)), r"betas=\(nan, 0"),
    "one beta": ("lazy-adam", lambda o: o.param_groups[1].update(betas=[0.9]), r"betas=\[0\.9\]: two numbers"),
    "state_dtype": ("lazy-adam", lambda o: o.param_groups[1].update(state_dtype=torch.half), "state_dtype=torch.f"),
    "kernels": ("sgd", lambda o: o.param_groups[1].update(kernels="fast"), "kernels='fast': choose one of"),
    "maximize": ("sgd", lambda o: o.param_groups[1].update(maximize=True), "maximize=True: .* no such option"),
}


@pytest.mark.parametrize("case", LATER)
@every_backend
def test_hyperparameters_are_looked_at_by_the_step_that_uses_them(kernels: str, case: str) -> None:
    name, change, message = LATER[case]
    optimizer = make(name, kernels)
    steps(optimizer, [0])
    change(optimizer)
    before = snapshot(optimizer)
    with pytest.raises((ValueError, TypeError), match=message):
        steps(optimizer, [2])
    assert_same(snapshot(optimizer), before)


def dense(table: torch.nn.Parameter) -> None:
    table.grad = torch.ones_like(table)


def elementwise(table: torch.nn.Parameter) -> None:
    table.grad = torch.eye(*table.shape).to_sparse()


def of_another_dtype(table: torch.nn.Parameter) -> None:
    table.grad = None
    table.grad_dtype = torch.float64
    give_rows(table, [1], torch.ones(1, 5).double())


def resized(table: torch.nn.Parameter) -> None:
    table.data = torch.zeros(20, 5)


def resized_with_a_gradient(table: torch.nn.Parameter) -> None:
    resized(table)
    table.grad = None
    give_gradient(table, 0)


def transposed(table: torch.nn.Parameter) -> None:
    table.data = table.data.t().contiguous().t()


REFUSED = {  # the second table's part -> (what is wrong of it, error, message)
    "dense": (dense, ValueError, r"the gradient of a table \(8, 5\) is dense.*tied.*penalty.*sparse=True"),
    "elementwise": (elementwise, ValueError, r"the gradient of a table \(8, 5\) has 2 sparse dimensions and 0 dense"),
    "dtype": (of_another_dtype, TypeError, r"a table of torch\.float32 has dtype torch\.float64"),
    "resized": (resized, ValueError, r"the gradient of a table \(20, 5\) has shape \(8, 5\): the table was changed"),
    "resized, gradient": (resized_with_a_gradient, ValueError, r"of table 1 \(20, 5\) has shape \(8,"),
}
IDS = {"-1": [1, -1], "the last but for -9": [-9], "one too large": [8, 0], "large": [2**40]}


@pytest.mark.parametrize("case", REFUSED)
@every_backend
@every_rule
def test_a_step_is_whole_or_not_at_all(name: str, kernels: str, case: str) -> None:
    damage, error, message = REFUSED[case]
    for first in (True, False):  # before there is a state, and after
        optimizer = make(name, kernels, seed=None)
        if not first:
            steps(optimizer, [0])
        elif case == "resized, gradient":
            continue
        for table in tables_of(optimizer):
            give_gradient(table, 3)
        damage(tables_of(optimizer)[1])
        before = snapshot(optimizer)
        with pytest.raises(error, match=message):
            optimizer.step()
        assert_same(snapshot(optimizer), before)
        assert len(optimizer.state) == (0 if first else 2)


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@every_backend
@every_rule
def test_ids_outside_a_table_are_refused_or_left_out(name: str, kernels: str, ids: list[int]) -> None:
    optimizer = make(name, kernels)
    first, second = tables_of(optimizer)
    give_gradient(first, 0)
    give_rows(second, ids, torch.ones(len(ids), 5))
    before = snapshot(optimizer)
    if kernels == "triton":
        optimizer.step()
        inside = [i for i in ids if 0 <= i < 8]
        assert (second != before["tables"][1]).any(dim=1).nonzero().flatten().tolist() == inside
        return
    bad = next(i for i in ids if not 0 <= i < 8)
    with pytest.raises(IndexError, match=rf"id {bad} at position \[{ids.index(bad)}\] is outside the table of 8 rows"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


def test_the_reference_refuses_ids_outside_the_table_itself() -> None:
    weight = torch.ones(4, 2)
    for ids in ([-1], [0, 4]):
        with pytest.raises(IndexError, match="for a table of 4 rows"):
            update_reference(weight, torch.tensor(ids), torch.ones(len(ids), 2), Rule("sgd", 0.1), RowState())
    assert torch.equal(weight, torch.ones(4, 2))


@every_backend
def test_a_layout_that_a_backend_does_not_take(kernels: str) -> None:
    """Refused before anything is written by a backend that was chosen; "auto" takes eager."""
    optimizer = make("sgd", kernels)
    transposed(tables_of(optimizer)[1])
    before = snapshot(optimizer)
    if kernels == "eager":
        return steps(optimizer, [0])
    with pytest.raises(ValueError, match=r"the table has strides \(1, 8\)"):
        steps(optimizer, [0])
    assert_same(snapshot(optimizer), before)
    optimizer.kernels = "auto"
    steps(optimizer, [0])
    return None


@pytest.mark.skipif(INTERPRETED, reason="Triton runs here")
@every_backend
def test_a_backend_that_cannot_run_is_found_before_the_first_table_is_written(kernels: str) -> None:
    optimizer = make("lazy-adam", kernels)
    optimizer.param_groups[1]["kernels"] = "triton"
    before = snapshot(optimizer)
    with pytest.raises(BackendUnavailable, match="kernels='triton'"):
        steps(optimizer, [0])
    assert_same(snapshot(optimizer), before)
    assert not optimizer.state


@every_backend
def test_a_state_that_was_damaged_between_steps(kernels: str) -> None:
    optimizer = make("lazy-adam", kernels)
    steps(optimizer, range(2))
    state = optimizer.state[tables_of(optimizer)[1]]
    for wrong, message in ((torch.zeros(8, 6), r"'exp_avg' of table 1 \(8, 5\) has shape \(8, 6\)"),
                           (torch.zeros(8, 5, dtype=torch.int32), "'exp_avg' of table 1 .* has dtype torch.int32"),
                           (torch.zeros(5, 8).t(), r"'exp_avg' of table 1 .* has strides \(1, 8\); a contiguous"),
                           (torch.zeros(8, 5, device="meta"), "'exp_avg' of table 1 .* is on meta and the")):
        right, state["exp_avg"] = state["exp_avg"], wrong
        with pytest.raises((ValueError, TypeError), match=message):
            steps(optimizer, [2])
        state["exp_avg"] = right
    assert [optimizer.state[table]["step"].item() for table in tables_of(optimizer)] == [2, 2]
    steps(optimizer, [2])


def test_a_learning_rate_on_another_device_is_not_read() -> None:
    class OnTheGpu(torch.Tensor):
        """A tensor that says it is on a GPU, and fails where the host would wait for it."""

        device = torch.device("cuda", 0)

        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert function.__name__ in ("numel", "__get__"), function
            return super().__torch_function__(function, types, args, kwargs or {})

    check_options({**SparseSGD([new_table()]).param_groups[0], "lr": torch.tensor(-1.0).as_subclass(OnTheGpu)})
