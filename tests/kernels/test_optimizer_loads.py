"""What the row optimizers take of state_dicts, pickles and param groups, and what they refuse."""

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from row_tables import (
    OPTIMIZERS,
    assert_same,
    every_rule,
    make,
    new_table,
    snapshot,
    steps,
    tables_of,
)

from ctr_kernels import SparseSGD


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
    "minus a step": ("lazy-adam", change_state(0, step=-1.0), r"state 'step' of table 0 \(12, 4\) is -1\.0; a whole"),
    "no number": ("lazy-adam", change_state(0, step="3"), r"state 'step' of table 0 \(12, 4\) is '3'; a dense tensor"),
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


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_table_stands_once_in_a_group() -> None:
    table = new_table()
    with pytest.raises(ValueError, match="a param group has 3 tables, of which 2 differ"):
        SparseSGD([table, new_table(), table])
    with pytest.raises(TypeError, match="maximize"):
        SparseSGD([table], maximize=True)
