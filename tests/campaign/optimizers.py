"""Random lives of the row optimizers: `check(seed)` plays one and compares it, event by event, with what it should be.

The subject steps, is copied, pickled, saved and loaded, and asked for what it must refuse. Beside it
- a twin takes the same steps on the same backends and nothing else: tables and states must be equal bit for bit;
- every step is computed once more in fp64 from the formulas of the papers, from the tables and states before it.
"""

import copy
import io
import pickle
import random
import warnings
from collections.abc import Callable
from typing import Any

import torch

from ctr_kernels import SparseAdagrad, SparseLazyAdam, SparseRowwiseAdagrad, SparseSGD
from ctr_kernels.library import NATIVE_ABSENT

OPTIMIZERS = {"sgd": SparseSGD, "rowwise-adagrad": SparseRowwiseAdagrad, "adagrad": SparseAdagrad,
              "lazy-adam": SparseLazyAdam}
BACKENDS = ["eager"] if NATIVE_ABSENT is not None else ["eager", "native"]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2.0**-7}  # of a step, relative: fp32 sums, and a unit of bf16


class Life:
    """An optimizer, its twin, and the generator of what happens to both."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.name = self.random.choice(list(OPTIMIZERS))
        decays = [{}, {"weight_decay": 0.2}, {"weight_decay": 0.2, "decay_untouched": True}]
        self.options: dict[str, Any] = {"lr": 0.1, "seed": self.random.choice([None, seed]),
                                        **self.random.choice(decays)}
        if self.name == "lazy-adam":
            self.options |= {"state_dtype": self.random.choice([torch.float32, torch.bfloat16]),
                             "betas": self.random.choice([(0.9, 0.999), (0.0, 0.5)])}
        groups = [self.group() for _ in range(self.random.randint(1, 3))]
        self.twin = OPTIMIZERS[self.name](copy.deepcopy(groups), **self.options, kernels="eager")
        self.subject = OPTIMIZERS[self.name](groups, **self.options, kernels="eager")

    def table(self) -> torch.nn.Parameter:
        rows, dim = self.random.randint(1, 40), self.random.choice([1, 3, 8, 16, 21])
        dtype = self.random.choice([torch.float32, torch.bfloat16])
        return torch.nn.Parameter(torch.randn(rows, dim, generator=self.generator).to(dtype))

    def group(self) -> dict[str, Any]:
        tables = [self.table() for _ in range(self.random.randint(1, 2))]
        return {"params": tables, "lr": self.random.choice([0.1, 0.03, torch.tensor(0.3)]), "kernels": "eager"}

    def both(self) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        return self.subject, self.twin

    def step(self) -> None:
        gradients = [self.gradient(table) if self.random.random() < 0.8 else None for table in tables_of(self.twin)]
        seed = self.random.getrandbits(60)
        before = [(table.detach().clone(), copy.deepcopy(dict(self.twin.state.get(table, {}))))
                  for table in tables_of(self.twin)]
        for optimizer in self.both():
            versions = [table._version for table in tables_of(optimizer)]
            for table, gradient in zip(tables_of(optimizer), gradients, strict=True):
                give(table, gradient)
            torch.manual_seed(seed)  # from which the first step draws that of the rounding
            assert optimizer.step(lambda: 5) == 5
            for table, version, gradient in zip(tables_of(optimizer), versions, gradients, strict=True):
                assert (table._version > version) == (gradient is not None), "autograd was not told of the step"
        groups = [group for group in self.twin.param_groups for _ in group["params"]]
        for table, group, (weight, state) in zip(tables_of(self.twin), groups, before, strict=True):
            if table.grad is not None:
                compare_step(self.name, group, weight, state, table, self.twin.state[table])

    def gradient(self, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids of which few are frequent, and rows."""
        num_rows, dim = table.shape
        count = self.random.choice([0, 1, 5, 40])
        ids = (torch.rand(count, generator=self.generator) ** 4 * num_rows).long()
        rows = torch.randn(count, dim, generator=self.generator)
        return ids, rows.to(table.dtype)

    def change_rate(self) -> None:
        number, rate = self.random.randrange(len(self.subject.param_groups)), self.random.choice([0.0, 0.01, 0.5])
        for optimizer in self.both():
            optimizer.param_groups[number]["lr"] = rate

    def change_rate_by_schedule(self) -> None:
        factor = self.random.choice([0.5, 1.5])
        for optimizer in self.both():
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, factor)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # no step since the scheduler was made
                scheduler.step()

    def change_decay(self) -> None:
        decay = self.random.choice([{"weight_decay": 0.0, "decay_untouched": False},
                                    {"weight_decay": 0.3, "decay_untouched": True},
                                    {"weight_decay": 0.1, "decay_untouched": False}])
        for optimizer in self.both():
            optimizer.param_groups[0].update(decay)

    def change_backend(self) -> None:
        kernels = self.random.choice([*BACKENDS, "auto"])
        number = self.random.choice([None, *range(len(self.subject.param_groups))])
        for optimizer in self.both():
            if number is None:
                optimizer.kernels = kernels
            else:
                optimizer.param_groups[number]["kernels"] = kernels

    def change_dtype(self) -> None:
        number, dtype = self.random.randrange(len(tables_of(self.twin))), self.random.choice(list(TOLERANCE))
        for optimizer in self.both():
            table = tables_of(optimizer)[number]
            table.grad = None
            table.data = table.data.to(dtype)

    def add_group(self) -> None:
        if len(self.subject.param_groups) < 5:
            group = self.group()
            self.twin.add_param_group(copy.deepcopy(group))
            self.subject.add_param_group(group)

    def zero_grad(self) -> None:
        to_none = self.random.random() < 0.5
        for optimizer in self.both():
            optimizer.zero_grad(set_to_none=to_none)

    # What happens to the subject alone, and must not show.

    def copied(self) -> None:
        how = self.random.choice([copy.deepcopy, lambda subject: pickle.loads(pickle.dumps(subject)), through_file])
        self.subject = how(self.subject)

    def save_and_load(self) -> None:
        """Into an optimizer of the same tables that has stepped already and has another rate."""
        groups = [{"params": [table.detach().clone().requires_grad_() for table in group["params"]]}
                  for group in self.subject.param_groups]
        fresh = OPTIMIZERS[self.name](groups, **{**self.options, "lr": 0.7})
        for table in tables_of(fresh):
            give(table, self.gradient(table))
        fresh.step()
        for table, other in zip(tables_of(fresh), tables_of(self.subject), strict=True):
            table.data.copy_(other.data)
        content = through_file(self.subject.state_dict(), weights_only=True)
        content["param_groups"][0]["kernels"] = "triton"  # of another machine
        if self.random.random() < 0.5:
            hook = fresh.register_load_state_dict_pre_hook(lambda _, __: content)
            fresh.load_state_dict({"state": {}, "param_groups": []})
            hook.remove()
        else:
            fresh.load_state_dict(content)
        assert {group["kernels"] for group in fresh.param_groups} == {"auto"}, "a load has changed the backend"
        for group, own in zip(fresh.param_groups, self.twin.param_groups, strict=True):
            group["kernels"] = own["kernels"]
        self.subject = fresh

    def load_the_twins(self) -> None:
        self.subject.load_state_dict(self.twin.state_dict())  # copied: the next step would show it

    def refuse_step(self) -> None:
        group, table = self.subject.param_groups[-1], self.subject.param_groups[-1]["params"][-1]
        kept = {key: group[key] for key in ("lr", "weight_decay")}
        for other in tables_of(self.subject):
            give(other, self.gradient(other))
        ids = torch.tensor([0, self.random.choice([-1, len(table), 2**40])])
        wrong: list[tuple[Callable[[], Any], type[Exception]]] = [
            (lambda: group.update(lr=self.random.choice([-1.0, float("nan"), float("inf")])), ValueError),
            (lambda: group.update(lr=torch.tensor(-0.1)), ValueError),
            (lambda: group.update(lr=4.0, weight_decay=0.3), ValueError),
            (lambda: give(table, None) or setattr(table, "grad", torch.ones_like(table)), ValueError),
            (lambda: give(table, (ids, torch.ones(2, table.shape[1], dtype=table.dtype))), IndexError)]
        spoil, error = self.random.choice(wrong)
        spoil()
        refused(self.subject.step, error)
        group.update(kept)
        self.subject.zero_grad()
        self.twin.zero_grad()

    def refuse_load(self) -> None:
        content = copy.deepcopy(self.subject.state_dict())
        wrong: list[Callable[[], Any]] = [
            lambda: content["param_groups"].append({"params": []}),
            lambda: content["param_groups"][-1].update(lr=-0.1),
            lambda: content["param_groups"][-1]["params"].append(99),
            lambda: content["state"].update({0: {"momentum_buffer": torch.ones(1)}}),
            lambda: content["state"].update({0: {"last_step": torch.ones(77, dtype=torch.int32)}})]
        if tensors := [(state, key) for state in content["state"].values() for key in state]:
            state, key = self.random.choice(tensors)
            wrong.append(lambda: state.update({key: torch.zeros(3, 3, 3, dtype=state[key].dtype)}))
        self.random.choice(wrong)()
        refused(lambda: self.subject.load_state_dict(content), ValueError)

    def refuse_group(self) -> None:
        table = tables_of(self.subject)[0]
        refused(lambda: self.subject.add_param_group({"params": [table]}), ValueError)
        refused(lambda: self.subject.add_param_group({"params": [self.table()], "lr": -1.0}), ValueError)

    def compare(self) -> None:
        for subject, twin in zip(self.subject.param_groups, self.twin.param_groups, strict=True):
            for key in twin.keys() - {"params"}:
                assert subject[key] == twin[key], f"option {key}: {subject[key]}, not {twin[key]}"
        for number, (subject, twin) in enumerate(zip(tables_of(self.subject), tables_of(self.twin), strict=True)):
            assert_equal(f"table {number}", subject, twin)
            state, expected = self.subject.state.get(subject, {}), self.twin.state.get(twin, {})
            assert state.keys() == expected.keys(), f"state of table {number}: {state.keys()}, not {expected.keys()}"
            for key, value in expected.items():
                assert_equal(f"{key} of table {number}", state[key], value)


def tables_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [table for group in optimizer.param_groups for table in group["params"]]


def give(table: torch.Tensor, gradient: tuple[torch.Tensor, torch.Tensor] | None) -> None:
    """The gradient (ids, rows), in two parts as of two backward passes; None: none."""
    table.grad = None
    if gradient is not None:
        ids, rows = gradient
        middle = len(ids) // 2
        for part in (slice(0, middle), slice(middle, None)):
            grad = torch.sparse_coo_tensor(ids[None, part], rows[part], table.shape, check_invariants=False)
            table.grad = grad if table.grad is None else table.grad + grad


def through_file(value: Any, weights_only: bool = False) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def refused(function: Callable[[], Any], error: type[Exception]) -> None:
    try:
        function()
    except error:
        return
    raise AssertionError(f"no {error.__name__} was raised")


def assert_equal(what: str, a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.dtype == b.dtype and torch.equal(a, b), f"{what}: {a.dtype} {a}, not {b.dtype} {b}"


def compare_step(name: str, group: dict[str, Any], weight: torch.Tensor, state: dict[str, torch.Tensor],
                 table: torch.Tensor, kept: dict[str, torch.Tensor]) -> None:
    """Hold a step against the formulas in fp64: weight and state are from before it, table and kept from after it."""
    assert table.grad is not None
    ids, rows, found = table.grad._indices()[0], table.grad._values(), table.detach()
    row, nothing = weight.double(), torch.zeros(weight.shape, dtype=torch.float64)
    grad, size = (nothing.index_add(0, ids, part) for part in (rows.double(), rows.double().abs()))
    touched, step = torch.bincount(ids, minlength=len(weight)) > 0, int(state.get("step", 0)) + 1
    rate, expected = float(group["lr"]), {}
    if name == "sgd":
        move = grad
    elif name == "lazy-adam":
        beta1, beta2 = group["betas"]
        mean, square = (state.get(key, nothing).double() for key in ("exp_avg", "exp_avg_sq"))
        mean, square = beta1 * mean + (1 - beta1) * grad, beta2 * square + (1 - beta2) * grad**2
        move = mean * (1 - beta2**step) ** 0.5 / (1 - beta1**step) / (square.sqrt() + group["eps"])
        expected = {"exp_avg": mean, "exp_avg_sq": square}
    else:
        squares = grad**2 if name == "adagrad" else (grad**2).mean(1)
        total = state.get("sum", torch.zeros_like(squares)).double() + squares
        move = grad / (total.view(len(weight), -1).sqrt() + group["eps"])
        expected = {"sum": total}
    times = torch.ones(len(weight), dtype=torch.float64)
    if group["decay_untouched"]:
        times = step - state.get("last_step", torch.full((len(weight),), step - 1)).double()
        assert_equal("last_step", kept["last_step"], torch.where(touched, step, (step - times).int()).int())
    assert "step" not in kept or kept["step"] == step
    expected["weight"] = row * ((1 - rate * group["weight_decay"]) ** times)[:, None] - rate * move
    for key, exact in expected.items():
        now, then = (found, weight) if key == "weight" else (kept[key], state.get(key, torch.zeros_like(kept[key])))
        assert_equal(f"{key} of rows that were not touched", now[~touched], then[~touched])
        of_sum = rate * (1 + size) if key == "weight" else size if key == "exp_avg" else size**2
        scale = exact.abs() + then.double().abs() + (of_sum.mean(1) if exact.dim() == 1 else of_sum)  # for cancellation
        error = (now.double() - exact).abs()[touched]
        limit = (TOLERANCE[now.dtype] * scale + 1e-9)[touched]
        assert (error <= limit).all(), f"{key}: off by {error.max().item():.3g} from the formula of {name}"


EVENTS = {Life.step: 12, Life.change_rate: 2, Life.change_rate_by_schedule: 1, Life.change_decay: 1,
          Life.change_backend: 2, Life.change_dtype: 1, Life.add_group: 1, Life.zero_grad: 1, Life.copied: 3,
          Life.save_and_load: 2, Life.load_the_twins: 1, Life.refuse_step: 2, Life.refuse_load: 2,
          Life.refuse_group: 1}


def check(seed: int) -> str:
    """Play the life of that seed and say which rule it was of; AssertionError, with what had happened, else."""
    life, past = Life(seed), []
    with torch.random.fork_rng(devices=[]):
        for event in life.random.choices(list(EVENTS), EVENTS.values(), k=life.random.randint(10, 40)):
            past.append(event.__name__)
            try:
                event(life)
                life.compare()
            except Exception as error:
                raise AssertionError(f"seed {seed}, {life.name}, after {', '.join(past)}: {error!r}") from error
    return life.name
