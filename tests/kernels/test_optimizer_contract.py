"""The row optimizers as torch optimizers: copies, state_dicts through files, and param groups, on every backend.

For Triton the file runs once more in a process of its own, in the interpreter.
"""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from row_tables import (
    OPTIMIZERS,
    assert_same,
    every_backend,
    every_rule,
    make,
    new_table,
    short_chunks,  # noqa: F401
    snapshot,
    steps,
    tables_of,
)
from triton_interpreter import INTERPRETED, outside, run_in_the_interpreter

from ctr_kernels import EmbeddingTable, SparseAdagrad, SparseLazyAdam


@outside
def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_in_the_interpreter(__file__, at_least=14)


def through(load: Callable[[Any], Any], value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return load(file)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
          "torch.save": lambda optimizer: through(lambda file: torch.load(file, weights_only=False), optimizer)}


def saved(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return through(lambda file: torch.load(file, weights_only=True), optimizer.state_dict())


@pytest.mark.parametrize("how", [*COPIES][:1] if INTERPRETED else COPIES)
@every_backend
@every_rule
def test_a_copy_goes_on_as_the_original_would(name: str, kernels: str, how: str) -> None:
    optimizer = make(name, kernels)
    steps(optimizer, range(2))
    before = snapshot(optimizer)
    other = COPIES[how](optimizer)
    assert other.kernels == other.param_groups[1]["kernels"] == kernels and repr(other) == repr(optimizer)
    steps(other, range(2, 4))
    assert_same(snapshot(optimizer), before)
    steps(optimizer, range(2, 4))
    assert_same(snapshot(optimizer), snapshot(other))


@every_backend
def test_a_model_and_its_optimizer_are_copied_together(kernels: str) -> None:
    model = EmbeddingTable(9, 4, kernels=kernels)
    optimizer = SparseLazyAdam(model.parameters(), lr=0.1, kernels=kernels)
    twins = copy.deepcopy((model, optimizer))
    for table, of_table in ((model, optimizer), twins):
        for _ in range(2):
            of_table.zero_grad()
            table(torch.tensor([1, 8, 1])).square().sum().backward()
            of_table.step()
    assert torch.equal(model.weight, twins[0].weight) and tables_of(twins[1])[0] is twins[0].weight


@every_backend
@every_rule
def test_a_state_dict_goes_through_a_file(name: str, kernels: str) -> None:
    optimizer, other = make(name, kernels), make(name, kernels)
    steps(optimizer, range(3))
    for ours, theirs in zip(tables_of(other), tables_of(optimizer), strict=True):
        ours.data.copy_(theirs)
    content = saved(optimizer)
    other.load_state_dict(content)
    assert_same(snapshot(other), snapshot(optimizer))
    for tensors in content["state"].values():
        for tensor in tensors.values():
            tensor.fill_(77)  # copied, not aliased
    for of_optimizer in (optimizer, other):
        steps(of_optimizer, range(3, 5))
    assert_same(snapshot(other), snapshot(optimizer))


@every_backend
def test_states_of_torchs_own_optimizers_are_taken(kernels: str) -> None:
    for theirs, ours, kind in ((torch.optim.Adagrad, SparseAdagrad, torch.as_tensor),
                               (torch.optim.SparseAdam, SparseLazyAdam, float)):
        tables = [new_table(), new_table()]
        whole, first = (theirs([table], lr=0.1, eps=1e-8) for table in tables)
        second = ours([tables[1]], lr=0.2, kernels=kernels)
        steps(whole, range(4))
        steps(first, range(2))
        content = saved(first)
        content["state"][0]["step"] = kind(content["state"][0]["step"])
        second.load_state_dict(content)
        steps(second, range(2, 4))
        torch.testing.assert_close(*tables, rtol=1e-5, atol=1e-6)


@every_backend
@every_rule
def test_a_group_added_later_has_a_state_of_its_own(name: str, kernels: str) -> None:
    optimizer = make(name, kernels)
    steps(optimizer, [0])
    late, twin = new_table(6, 3), new_table(6, 3)
    optimizer.add_param_group({"params": late, "lr": 0.3})
    assert optimizer.param_groups[2]["kernels"] == kernels
    steps(optimizer, range(1, 3))
    alone = OPTIMIZERS[name]([twin], lr=0.3, weight_decay=0.1, decay_untouched=True, kernels=kernels)
    steps(alone, range(1, 3))
    assert torch.equal(late, twin)
    assert_same({**optimizer.state[late]}, {**alone.state[twin]})
    other = make(name, kernels)
    other.add_param_group({"params": [new_table(6, 3)], "lr": 0.3})
    other.load_state_dict(saved(optimizer))
    assert_same(snapshot(other)["state"], snapshot(optimizer)["state"])
