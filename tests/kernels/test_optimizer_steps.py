"""Steps of the row optimizers: closures, hooks, schedulers, gradients of any form, versions.

For Triton the file runs once more in a process of its own, in the interpreter.
"""

from collections.abc import Callable

import pytest
import torch
from row_tables import (
    OPTIMIZERS,
    assert_same,
    every_backend,
    every_rule,
    give_rows,
    make,
    new_table,
    short_chunks,  # noqa: F401
    snapshot,
    steps,
    tables_of,
)
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR
from triton_interpreter import outside, run_in_the_interpreter

from ctr_kernels import EmbeddingTable, SparseRowwiseAdagrad, SparseSGD


@outside
def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_in_the_interpreter(__file__, at_least=23)


@every_backend
def test_a_closure_runs_with_gradients_and_returns_its_loss(kernels: str) -> None:
    table = EmbeddingTable(5, 4, kernels=kernels)
    optimizer, twin = SparseSGD(table.parameters(), lr=0.1, kernels=kernels), table.weight.detach().clone()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = table(torch.tensor([1, 2, 1])).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    torch.testing.assert_close(loss, twin[[1, 2, 1]].sum())
    twin[1], twin[2] = twin[1] - 0.2, twin[2] - 0.1
    torch.testing.assert_close(table.weight.detach(), twin)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)


@every_backend
@every_rule
def test_a_step_without_gradients_does_nothing_and_one_without_rows_counts(name: str, kernels: str) -> None:
    optimizer = make(name, kernels)
    before = snapshot(optimizer)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert_same(snapshot(optimizer), before)
    assert len(optimizer.state) == 0 and optimizer.state[tables_of(optimizer)[0]] == {}
    steps(optimizer, [0])
    before = snapshot(optimizer)
    optimizer.zero_grad(set_to_none=False)  # a sparse gradient of no rows
    optimizer.step()
    after = snapshot(optimizer)
    assert [state.pop("step").item() for state in after["state"].values()] == [2, 2]
    assert [state.pop("step").item() for state in before["state"].values()] == [1, 1]
    assert_same(after, before)


@every_backend
@pytest.mark.parametrize("kind", [lambda optimizer: LambdaLR(optimizer, lambda t: 0.5**t),
                                  lambda optimizer: CosineAnnealingLR(optimizer, 3)], ids=["lambda", "cosine"])
def test_schedulers_set_numbers_and_tensors_alike(kind: Callable, kernels: str) -> None:
    results = []
    for rate in (0.25, torch.tensor(0.25)):
        optimizer = SparseRowwiseAdagrad([new_table()], lr=rate, weight_decay=0.5, kernels=kernels)
        scheduler = kind(optimizer)
        for seed in range(3):
            steps(optimizer, [seed])
            scheduler.step()
        assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor) == isinstance(rate, torch.Tensor)
        results.append(tables_of(optimizer)[0].detach())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@every_backend
@every_rule
def test_gradients_come_in_any_form(name: str, kernels: str) -> None:
    ids, rows = torch.tensor([3, 1, 3, 7, 1]), torch.randint(-8, 9, (5, 4)).float()
    around = torch.zeros(5, 9)
    around[:, 2:6] = rows
    tables = [new_table() for _ in range(4)]
    give_rows(tables[0], ids, rows)
    give_rows(tables[1], ids.int(), around[:, 2:6])
    give_rows(tables[2], ids, rows)
    tables[2].grad = tables[2].grad.coalesce()
    for part in (slice(0, 2), slice(2, 5)):  # of two backward passes
        torch.nn.functional.embedding(ids[part], tables[3], sparse=True).backward(rows[part])
    for table in tables:
        OPTIMIZERS[name]([table], lr=0.1, kernels=kernels).step()
    for other in tables[1:]:
        torch.testing.assert_close(other, tables[0], rtol=1e-6, atol=1e-6)


@every_backend
@every_rule
def test_decay_of_untouched_rows_begins_and_ends_when_it_is_set(name: str, kernels: str) -> None:
    """Steps before it was switched on, and while it was off, do not decay rows that they did not touch."""
    table = new_table(6, 4)
    optimizer = OPTIMIZERS[name]([table], lr=0.1, weight_decay=0.5, kernels=kernels)
    group = optimizer.param_groups[0]

    def touch(row: int) -> None:
        give_rows(table, [row], torch.zeros(1, 4))
        optimizer.step()

    start = table.detach().clone()
    for _ in range(3):
        touch(0)
    group["decay_untouched"] = True
    touch(0)
    touch(5)  # two steps of counted decay
    torch.testing.assert_close(table[5], start[5] * 0.95**2)
    group["decay_untouched"] = False
    for _ in range(3):
        touch(0)
    touch(4)
    torch.testing.assert_close(table[4], start[4] * 0.95)
    group["decay_untouched"] = True
    touch(3)
    torch.testing.assert_close(table[3], start[3] * 0.95)


@every_backend
@every_rule
def test_a_backward_pass_notices_that_its_table_was_updated(name: str, kernels: str) -> None:
    for ids in ([1, 2, 1], []):
        table = new_table(8, 4)
        optimizer = OPTIMIZERS[name]([table], lr=0.1, weight_decay=0.1, decay_untouched=True, kernels=kernels)
        steps(optimizer, [0])
        versions = {key: value._version for key, value in optimizer.state[table].items()}
        scores = torch.ones(2, 4, requires_grad=True) @ table.t()  # a tied head saves the table
        give_rows(table, ids, torch.ones(len(ids), 4))
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            scores.sum().backward()
        for key, version in versions.items():
            assert optimizer.state[table][key]._version > version, key


@every_backend
@every_rule
def test_every_rule_takes_rows_narrower_than_the_table(name: str, kernels: str) -> None:
    tables = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        weight = torch.nn.Parameter(torch.ones(4, 8))
        weight.grad_dtype = dtype
        give_rows(weight, [1, 3, 1], torch.full((3, 8), 0.5, dtype=dtype))
        OPTIMIZERS[name]([weight], lr=0.1, kernels=kernels).step()
        tables.append(weight.detach())
    assert torch.equal(tables[0], tables[2]) and torch.equal(tables[1], tables[2])
    assert not torch.equal(tables[0], torch.ones(4, 8))
