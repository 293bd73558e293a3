"""What the row optimizers share as torch optimizers: param groups, state_dicts, copies, and steps that are whole."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch

from .checks import check_gradient, check_options, choose_backend
from .operator import update as update_rows
from .plan import take_plan
from .reference import update_reference
from .rule import Rule
from .state import check_state, loaded_state, missing_state, row_state

Group = dict[str, Any]


class _Update(NamedTuple):
    """A table and its gradient, both checked."""

    number: int  # of the table among all of the optimizer, from 0 on
    table: torch.Tensor  # [num_rows, dim]
    ids: torch.Tensor  # int64 [n]
    rows: torch.Tensor  # [n, dim]
    group: Group
    backend: str


class SparseRowOptimizer(torch.optim.Optimizer):
    """A torch optimizer of tables whose gradients are (ids, rows); a subclass names its rule.

    Everything it knows is in `defaults`, `param_groups` and `state`, which torch copies and pickles; `kernels` is an
    option of a group as the learning rate is. A state_dict leaves it out: it may be loaded on another machine.
    """

    rule: ClassVar[str]  # one of rule.RULES
    options: ClassVar[dict[str, Any]] = {"weight_decay": 0.0, "decay_untouched": False, "seed": None, "kernels": "auto"}

    def __init__(self, params: Iterable[Any], **defaults: Any) -> None:
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As torch's; options that an older version did not have get their defaults."""
        super().__setstate__(state)
        for name, value in self.options.items():
            self.defaults.setdefault(name, value)
            for group in self.param_groups:
                group.setdefault(name, self.defaults[name])

    @property
    def kernels(self) -> str:
        """The backend of groups that name none; setting it sets that of every group."""
        return self.defaults["kernels"]

    @kernels.setter
    def kernels(self, kernels: str) -> None:
        check_options({**self.param_groups[0], "kernels": kernels})
        for options in (self.defaults, *self.param_groups):
            options["kernels"] = kernels

    def add_param_group(self, param_group: Group) -> None:
        """As torch's; raises ValueError or TypeError for a hyperparameter out of range, and for a table twice."""
        check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        tables = self.param_groups[-1]["params"]
        if len(set(tables)) < len(tables):
            del self.param_groups[-1]
            raise ValueError(f"a param group has {len(tables)} tables, of which {len(set(tables))} differ: a step "
                             "would apply a gradient twice")

    def state_dict(self) -> dict[str, Any]:
        """As torch's, without the backends."""
        handle = self.register_state_dict_post_hook(_leave_out_kernels, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but that every tensor keeps its dtype, where torch casts it to the table's, and every group its
        backend. Options that the state_dict lacks stay as they are.

        Raises ValueError or TypeError, before anything is changed, for another number of groups or tables, for a state
        that does not fit its table or belongs to another rule, and for a hyperparameter out of range.
        """
        states: dict[torch.Tensor, dict[str, torch.Tensor]] = {}

        def check(_: torch.optim.Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            groups = self._loaded_groups(loaded["param_groups"])
            keys = [key for group in groups for key in group["params"]]
            if lost := [key for key in loaded["state"] if key not in keys]:
                raise ValueError(f"the state_dict has a state of table {lost[0]!r}, and its param groups have the "
                                 f"tables {keys}")
            for key, (index, table, _group) in zip(keys, self._tables(), strict=True):
                if key in loaded["state"]:
                    states[table] = loaded_state(loaded["state"][key], self.rule, table, index)
            return {**loaded, "state": {}, "param_groups": groups}

        def fill(_: torch.optim.Optimizer) -> None:
            self.state.update(states)

        # Behind the pre-hooks of others, which may return another state_dict, and before their post-hooks.
        handles = (self.register_load_state_dict_pre_hook(check),
                   self.register_load_state_dict_post_hook(fill, prepend=True))
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _loaded_groups(self, saved: list[Group]) -> list[Group]:
        """The groups of a state_dict with all options, checked; ValueError where they are not those of this optimizer.
        """
        if len(saved) != len(self.param_groups):
            raise ValueError(f"the state_dict has {len(saved)} param groups, the optimizer {len(self.param_groups)}")
        merged = []
        for number, (group, own) in enumerate(zip(saved, self.param_groups, strict=True)):
            if len(group["params"]) != len(own["params"]):
                raise ValueError(f"param group {number} has {len(group['params'])} tables in the state_dict and "
                                 f"{len(own['params'])} in the optimizer")
            _check_decay_kind(group, number)
            merged.append({**own, **group, "kernels": own["kernels"]})
            check_options(merged[-1])
            for name in _DECAY_KINDS:  # of torch's optimizers; the decay of a later state_dict is ours
                merged[-1].pop(name, None)
        return merged

    def _tables(self) -> Iterator[tuple[int, torch.Tensor, Group]]:
        """(index, table, group) of every table."""
        index = 0
        for group in self.param_groups:
            for table in group["params"]:
                yield index, table, group
                index += 1

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Apply the sparse gradients of all tables; returns the closure's loss, if one is given.

        All groups, gradients and states are checked first: a step that raises has written nothing.

        Raises ValueError for a dense gradient, a hyperparameter out of range and a state that does not fit its table,
        TypeError for a dtype that is not taken, and IndexError for an id outside its table (but kernels="triton"
        leaves such ids out, since the host would have to wait for them).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            check_options(group)
        updates = [self._checked(index, table, group) for index, table, group in self._tables()
                   if table.grad is not None]
        missing = [missing_state(self.state.get(update.table, {}), self.rule, update.table, update.number, update.group)
                   for update in updates]  # memory for all of them, before anything is written
        for update, made in zip(updates, missing, strict=True):
            self.state[update.table].update(made)
            self._apply(update)
        return loss

    def _checked(self, index: int, table: torch.Tensor, group: Group) -> _Update:
        """What a step needs to know of `table`; raises as `step`."""
        ids, rows = check_gradient(table)
        state = self.state.get(table, {})
        check_state(state, self.rule, table, index)
        return _Update(index, table, ids, rows, group, choose_backend(group["kernels"], table, ids))

    def _apply(self, update: _Update) -> None:
        """Count the step, and write state and table."""
        table, ids, rows, group = update.table, update.ids, update.rows, update.group
        state = self.state[table]
        if not group["decay_untouched"]:
            state.pop("last_step", None)  # it would be out of date from now on
        if "step" in state:
            state["step"] += 1
        beta1, beta2 = group.get("betas", (0.0, 0.0))
        rule = Rule(self.rule, group["lr"], group["weight_decay"], group.get("eps", 0.0), beta1, beta2)
        if update.backend == "eager":
            update_reference(table, ids, rows, rule, row_state(state))
            return
        plan = take_plan(table, ids) if update.backend == "triton" else None
        update_rows(table, ids, rows, rule, row_state(state), plan)


_DECAY_KINDS = ("decoupled_weight_decay", "lr_decay")  # options of torch's Adam and Adagrad, and of none here


def _check_decay_kind(group: Group, number: int) -> None:
    """ValueError for a group of torch's Adam or Adagrad whose weight decay is added to the gradient (L2)."""
    coupled = group.get("decoupled_weight_decay", True) is False or "lr_decay" in group
    if coupled and group.get("weight_decay"):
        raise ValueError(f"param group {number} of the state_dict adds weight_decay={group['weight_decay']} times the "
                         "weight to the gradient (L2), where the sparse-row optimizers shrink the weight itself; set "
                         "it to 0 before the load, and choose a decoupled one")


def _leave_out_kernels(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    for group in state_dict["param_groups"]:
        group.pop("kernels", None)
