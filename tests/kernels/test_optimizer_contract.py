"""The row optimizers as torch optimizers: copies, state_dicts and param groups.

For Triton the file runs once more in a process of its own, in the interpreter.
"""

import copy
import io
import pickle
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tables import (
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

from ctr_kernels import EmbeddingTable, SparseAdagrad, SparseLazyAdam, SparseSGD


@outside
def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_in_the_interpreter(__file__, at_least=14, skipped=35)


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


@outside
def test_a_load_keeps_the_backends_that_this_optimizer_has() -> None:
    optimizer, other = make("adagrad", "eager"), make("adagrad", "auto")
    other.param_groups[1]["kernels"] = "native"
    content = optimizer.state_dict()
    assert all("kernels" not in group for group in content["param_groups"])
    content["param_groups"][0]["kernels"] = "eager"
    other.load_state_dict(content)
    assert [group["kernels"] for group in other.param_groups] == ["auto", "native"]
    other.kernels = "eager"
    assert {group["kernels"] for group in other.param_groups} == {other.kernels} == {"eager"}
    with pytest.raises(ValueError, match="kernels='fast': choose one of"):
        other.kernels = "fast"
    assert other.kernels == "eager"


@outside
@every_rule
def test_options_that_older_versions_lack_are_filled_in(name: str) -> None:
    optimizer = make(name, "eager")
    steps(optimizer, range(2))
    content, expected = optimizer.state_dict(), snapshot(optimizer)
    for group in content["param_groups"]:
        for option in ("weight_decay", "decay_untouched", "seed", "state_dtype"):
            group.pop(option, None)
    optimizer.load_state_dict(content)
    assert_same(snapshot(optimizer), expected)

    table, old = new_table(), OPTIMIZERS[name].__new__(OPTIMIZERS[name])
    old.__setstate__({"defaults": {"lr": 0.1}, "state": defaultdict(dict),
                      "param_groups": [{"params": [table], "lr": 0.1}]})
    new = OPTIMIZERS[name]([new_table()], lr=0.1)
    assert old.kernels == new.kernels == "auto"
    for optimizer in (old, new):
        optimizer.kernels = "eager"
        optimizer.add_param_group({"params": [new_table(seed=4)]})
        steps(optimizer, range(2))
    assert_same(tables_of(old), tables_of(new))


@outside
@every_rule
def test_hooks_of_state_dicts_are_those_of_torch(name: str) -> None:
    optimizer, other, third = (make(name, "eager") for _ in range(3))
    steps(optimizer, range(2))
    steps(third, range(5))
    calls = []

    def swap(of: torch.optim.Optimizer, content: dict[str, Any]) -> dict[str, Any]:
        calls.append("swap")
        assert content is not given
        return third.state_dict()

    def change(of: torch.optim.Optimizer, content: dict[str, Any]) -> None:
        calls.append("change")
        content["param_groups"][0]["lr"] = 0.03

    def look(of: torch.optim.Optimizer) -> None:
        calls.append("look")
        assert of.param_groups[0]["lr"] == 0.03 and of.param_groups[0]["kernels"] == "eager"
        for index, table in enumerate(tables_of(of)):
            assert_same(of.state[table], third.state[tables_of(third)[index]])

    other.register_load_state_dict_pre_hook(swap)
    other.register_load_state_dict_pre_hook(change)
    other.register_load_state_dict_post_hook(look)
    given = optimizer.state_dict()
    other.load_state_dict(given)
    assert calls == ["swap", "change", "look"]

    optimizer.register_state_dict_post_hook(lambda of, content: {**content, "mine": 1})
    assert optimizer.state_dict()["mine"] == 1
    assert len(other._optimizer_load_state_dict_pre_hooks) == 2
    assert len(other._optimizer_load_state_dict_post_hooks) == 1


def change_state(index: int, **entries: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["state"][index].update(entries)


def change_group(index: int, **options: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["param_groups"][index].update(options)


REFUSED_LOADS = {
    "another size": ("adagrad", change_state(1, sum=torch.ones(4, 5)),
                     r"state 'sum' of table 1 \(8, 5\) has shape \(4, 5\); \(8, 5\) is needed"),
    "another width": ("rowwise-adagrad", change_state(1, sum=torch.ones(8, 5)), r"shape \(8, 5\); \(8,\) is needed"),
    "last_step": ("sgd", change_state(0, last_step=torch.ones(13, dtype=torch.int32)),
                  r"state 'last_step' of table 0 \(12, 4\) has shape \(13,\); \(12,\) is needed"),
    "one moment": ("lazy-adam", change_state(1, exp_avg_sq=torch.ones(8, 4)), r"'exp_avg_sq' of table 1 .*\(8, 5\)"),
    "two dtypes": ("lazy-adam", change_state(1, exp_avg_sq=torch.ones(8, 5).bfloat16()), "the moments of table 1"),
    "another rule": ("sgd", change_state(0, exp_avg=torch.ones(12, 4)), "the entry 'exp_avg', which sgd does not keep"),
    "lacking": ("lazy-adam", lambda content: content["state"][1].pop("exp_avg"), r"lacks 'exp_avg'"),
    "no step": ("sgd", lambda content: content["state"][0].pop("step"), r"lacks 'step'"),
    "no tensor": ("adagrad", change_state(0, sum=[1.0]), r"'sum' of table 0 \(12, 4\) is \[1\.0\]; a dense tensor"),
    "integers": ("adagrad", change_state(0, sum=torch.ones(12, 4, dtype=torch.int64)), "has dtype torch.int64"),
    "half a step": ("lazy-adam", change_state(0, step=torch.tensor(1.5)), "state 'step' of table 0 .* is 1.5; a whole"),
    "no dict": ("sgd", lambda content: content["state"].update({0: 5}), r"the state of table 0 \(12, 4\) is 5; a dict"),
    "a name": ("adagrad", lambda content: content["state"].update({"0": content["state"].pop(0)}),
               r"a state of table '0', and its param groups have the tables \[0, 1\]"),
    "a group too few": ("sgd", lambda content: content["param_groups"].pop(), "has 1 param groups, the optimizer 2"),
    "a table too many": ("sgd", change_group(1, params=[1, 2]), "param group 1 has 2 tables in the state_dict and 1"),
    "lr": ("sgd", change_group(1, lr=-0.5), r"lr=-0\.5 is negative"),
    "decay": ("adagrad", change_group(0, weight_decay=20.0), r"lr=0\.1 times weight_decay=20\.0 is 2\.0"),
    "betas": ("lazy-adam", change_group(1, betas=(0.9, 1.5)), r"betas=\(0\.9, 1\.5\)"),
    "eps": ("rowwise-adagrad", change_group(1, eps=float("nan")), "eps=nan must be positive"),
}


@outside
@pytest.mark.parametrize("case", REFUSED_LOADS)
def test_a_refused_load_changes_nothing(case: str) -> None:
    name, damage, message = REFUSED_LOADS[case]
    optimizer, other = make(name, "eager"), make(name, "eager", seed=9)
    steps(optimizer, range(3))
    steps(other, range(1))
    content = copy.deepcopy(optimizer.state_dict())
    damage(content)
    before, state = snapshot(other), other.state
    with pytest.raises((ValueError, TypeError), match=message):
        other.load_state_dict(content)
    assert_same(snapshot(other), before)
    assert other.state is state and not other._optimizer_load_state_dict_pre_hooks
    other.load_state_dict(optimizer.state_dict())
    assert_same(snapshot(other)["state"], snapshot(optimizer)["state"])


@every_backend
def test_states_of_torchs_own_optimizers_are_taken(kernels: str) -> None:
    for theirs, ours in ((torch.optim.Adagrad, SparseAdagrad), (torch.optim.SparseAdam, SparseLazyAdam)):
        tables = [new_table(), new_table()]
        whole, first = (theirs([table], lr=0.1, eps=1e-8) for table in tables)
        second = ours([tables[1]], lr=0.2, kernels=kernels)
        steps(whole, range(4))
        steps(first, range(2))
        second.load_state_dict(saved(first))
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


@outside
@pytest.mark.parametrize(("group", "message"), [
    (lambda table: {"params": [table]}, "appear in more than one parameter group"),
    (lambda table: {"params": [new_table()], "lr": -2.0}, r"lr=-2\.0 is negative"),
    (lambda table: {"params": [new_table()], "maximize": True}, "maximize=True: .* no such option"),
    (lambda table: {"params": [new_table()], "momentum": 0.9}, r"momentum=0\.9: .* no such option"),
    (lambda table: {"params": [new_table()], "kernels": "fast"}, "kernels='fast'"),
    (lambda table: {"params": [new_table()], "seed": "a"}, "seed='a' must be a whole number or None"),
], ids=["twice", "lr", "maximize", "momentum", "kernels", "seed"])
def test_a_group_that_is_refused_is_not_there(group: Callable, message: str) -> None:
    optimizer = make("sgd", "eager")
    with pytest.raises((ValueError, TypeError), match=message):
        optimizer.add_param_group(group(tables_of(optimizer)[0]))
    assert len(optimizer.param_groups) == 2


@outside
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_table_stands_once_in_a_group() -> None:
    table = new_table()
    with pytest.raises(ValueError, match="a param group has 3 tables, of which 2 differ"):
        SparseSGD([table, new_table(), table])
    with pytest.raises(TypeError, match="maximize"):
        SparseSGD([table], maximize=True)
