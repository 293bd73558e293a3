"""Small tables with sparse gradients, and snapshots of optimizers, for the tests of the row optimizers."""

import copy
from typing import Any

import pytest
import torch
from triton_interpreter import INTERPRETED

from ctr_kernels import SparseAdagrad, SparseLazyAdam, SparseRowwiseAdagrad, SparseSGD
from ctr_kernels.library import NATIVE_ABSENT

OPTIMIZERS = {"sgd": SparseSGD, "rowwise-adagrad": SparseRowwiseAdagrad, "adagrad": SparseAdagrad,
              "lazy-adam": SparseLazyAdam}
needs_native = pytest.mark.skipif(NATIVE_ABSENT is not None, reason=f"native: {NATIVE_ABSENT}")
BACKENDS = ["triton"] if INTERPRETED else ["eager", pytest.param("native", marks=needs_native)]
every_rule = pytest.mark.parametrize("name", OPTIMIZERS)
every_backend = pytest.mark.parametrize("kernels", BACKENDS)


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs as short as the gradients are: the interpreter takes a third of the time. For files that import it."""
    if INTERPRETED:
        from ctr_kernels.sparse_update import triton

        monkeypatch.setattr(triton, "TABLE", {16: (16, 16, 1)})


def new_table(num_rows: int = 12, dim: int = 4, dtype: torch.dtype = torch.float32,
              seed: int = 0) -> torch.nn.Parameter:
    """Random rows [num_rows, dim]."""
    rows = torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(seed))
    return torch.nn.Parameter(rows.to(dtype))


def give_gradient(table: torch.Tensor, seed: int) -> None:
    """A sparse gradient of as many ids as the table has rows, with duplicates."""
    generator = torch.Generator().manual_seed(seed)
    num_rows, dim = table.shape
    ids = torch.randint(num_rows // 2 + 1, (num_rows,), generator=generator)
    give_rows(table, ids, torch.randn(num_rows, dim, generator=generator).to(table.dtype))


def give_rows(table: torch.Tensor, ids: Any, rows: torch.Tensor) -> None:
    """The gradient (ids [n], rows [n, dim]), neither coalesced nor checked."""
    table.grad = torch.sparse_coo_tensor(torch.as_tensor(ids)[None], rows, table.shape, check_invariants=False)


def steps(optimizer: torch.optim.Optimizer, seeds: range | list[int]) -> None:
    """A step with a gradient for every table, for every seed."""
    for seed in seeds:
        for group in optimizer.param_groups:
            for table in group["params"]:
                give_gradient(table, seed)
        optimizer.step()


def make(name: str, kernels: str, **options: Any) -> torch.optim.Optimizer:
    """An optimizer of a bf16 table (fp32 in the interpreter, where bf16 is wrong) and one of fp32, in two groups."""
    dtype = torch.float32 if INTERPRETED else torch.bfloat16
    groups = [{"params": [new_table(12, 4, dtype, seed=1)]}, {"params": [new_table(8, 5, seed=2)], "lr": 0.05}]
    return OPTIMIZERS[name](groups, **{"lr": 0.1, "weight_decay": 0.1, "decay_untouched": True, "seed": 3,
                                       "kernels": kernels, **options})


def tables_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [table for group in optimizer.param_groups for table in group["params"]]


def snapshot(optimizer: torch.optim.Optimizer) -> Any:
    """Copies of all that a step or a load may change."""
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    state = {index: dict(optimizer.state.get(table, {})) for index, table in enumerate(tables_of(optimizer))}
    tables = [table.detach() for table in tables_of(optimizer)]
    return copy.deepcopy({"tables": tables, "state": state, "groups": groups, "random": torch.get_rng_state()})


def assert_same(a: Any, b: Any) -> None:
    """Equal bit for bit: nested lists and dicts of tensors and plain values."""
    assert type(a) is type(b), (a, b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b), (a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert a == b or (a != a and b != b), (a, b)
