"""The Triton row updates: parity, runs across chunks, memory traffic and memory safety in Triton's interpreter.

The interpreter is chosen before Triton is imported, so the first test runs this file in a process of its own.
"""

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parity import assert_parity

from ctr_kernels import EmbeddingTable, SparseRowwiseAdagrad, SparseSGD
from ctr_kernels.sparse_update.reference import update_reference
from ctr_kernels.sparse_update.rule import RowState, Rule

pytest.importorskip("triton")
from ctr_kernels.sparse_update import triton as kernels  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs within test_in_the_interpreter")
OPTIMIZERS = {"sgd": SparseSGD, "rowwise-adagrad": SparseRowwiseAdagrad}


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter() -> None:
    done = subprocess.run([sys.executable, "-m", "pytest", "-m", "not gpu", __file__], capture_output=True, text=True,
                          env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    counts = {kind: int(count) for count, kind in re.findall(r"(\d+) (passed|skipped)", done.stdout)}
    assert counts["passed"] >= 15 and counts["skipped"] == 1, done.stdout[-2000:]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chunks of 8 positions in tiles of 4, closed 2 chunks at a time, so that few ids make every kind of run."""
    monkeypatch.setattr(kernels, "CHUNK", 8)
    monkeypatch.setattr(kernels, "TILES", {16: (4, 1), 32: (2, 1)})
    monkeypatch.setattr(kernels, "CLOSE_ELEMENTS", 32)
    yield


def update(name: str, weight: torch.Tensor, state: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor,
           lr: float | torch.Tensor = 0.5, triton: bool = False) -> None:
    """One of the four updates, in place."""
    (kernels.update_triton if triton else update_reference)(weight, ids, rows, Rule(name, lr),
                                                            RowState(None if name == "sgd" else state))


def id_batches(num_rows: int) -> list[torch.Tensor]:
    uniform = torch.randint(num_rows, (5, 26))
    skewed = (torch.rand(6, 26) ** 9 * num_rows).long()
    return [uniform[:0], uniform[:1, :1], uniform, skewed, torch.full((150,), num_rows // 2)]


@interpreted
@pytest.mark.parametrize(("num_rows", "dim", "dtype"), [
    (1, 8, torch.float32), (1000, 13, torch.float32), (1000, 13, torch.float16), (300, 64, torch.float32)], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_lookup_and_update(name: str, num_rows: int, dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for ids in [torch.randint(num_rows, (3, 26))] if dim == 64 else id_batches(num_rows):
        table = EmbeddingTable(num_rows, dim, std=1.0, kernels="triton").to(dtype)
        optimizer = OPTIMIZERS[name](table.parameters(), lr=0.1, kernels="triton")
        before, rows = table.weight.detach().clone(), torch.randn(*ids.shape, dim).to(dtype)
        torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
        for _ in range(2):  # the second step meets a state
            found = table(ids.int())
            found.backward(rows)
            assert table.weight.grad._values().shape[0] == ids.numel()  # no coalesced copy
            optimizer.step()
            optimizer.zero_grad()
        torch.use_deterministic_algorithms(False)
        results = []
        for kind in (dtype, torch.float64):
            weight = before.to(kind, copy=True)
            state = torch.zeros(num_rows, dtype=torch.promote_types(kind, torch.float32))
            for _ in range(2):
                lookup = weight[ids]
                update(name, weight, state, ids.flatten(), rows.view(-1, dim).to(kind), 0.1)
            results.append([lookup, weight, state])
        state = optimizer.state[table.weight].get("sum", torch.zeros(num_rows))
        assert_parity([found.detach(), table.weight.detach(), state], *results)
        untouched = torch.ones(num_rows, dtype=torch.bool)
        untouched[ids.flatten()] = False
        assert torch.equal(table.weight[untouched], before[untouched])


@interpreted
def test_a_row_wider_than_a_warp() -> None:
    torch.manual_seed(1)
    weight, ids, rows = torch.randn(5, 300), torch.randint(5, (20,)), torch.randn(20, 300)
    found, exact = weight.clone(), weight.double()
    update("sgd", found, None, ids, rows, triton=True)
    update("sgd", exact, None, ids, rows.double())
    update("sgd", weight, None, ids, rows)
    assert_parity([found], [weight], [exact])
    with pytest.raises(ValueError, match="rows of 2049 elements: .* at most 2048"):
        update("sgd", torch.zeros(1, 2049), None, ids * 0, torch.zeros(20, 2049), triton=True)


@interpreted
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.integers(1, 9), st.integers(14, 34)), min_size=1, max_size=6), st.sampled_from([1, 3]),
       st.sampled_from(sorted(OPTIMIZERS)), st.booleans(), st.integers(0, 2**32))
def test_runs_of_any_length(small: None, lengths: list[int], dim: int, name: str, wide: bool, seed: int) -> None:
    torch.manual_seed(seed)
    distinct = torch.randperm(50)[:len(lengths)]
    ids = distinct.repeat_interleave(torch.tensor(lengths))
    ids = ids[torch.randperm(len(ids))].to(torch.int64 if wide else torch.int32)
    rows = torch.randint(-8, 9, (len(ids), dim)).float()  # every sum is exact, whatever its order
    weight, state = torch.randint(-8, 9, (50, dim)).float(), torch.rand(50)
    found, found_state = weight.clone(), state.clone()
    update(name, found, found_state, ids, rows, triton=True)
    update(name, weight, state, ids.long(), rows)
    torch.testing.assert_close(found_state, state, rtol=1e-6, atol=0)
    torch.testing.assert_close(found, weight, rtol=0, atol=0 if name == "sgd" else 1e-5)


@interpreted
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_strides_and_a_learning_rate_that_is_a_tensor(small: None, name: str) -> None:
    torch.manual_seed(2)
    ids = torch.randint(20, (40, 2))[:, 1]
    one, turned = torch.randn(1, 1), torch.randn(16, 40).t()
    for rows in (one.expand(40, 16), turned, torch.randn(40, 32)[:, 8:24]):
        around = torch.randn(20, 24)
        results = []
        for kernel in (True, False):
            memory, state = around.clone(), torch.ones(20)
            for lr in (1, torch.tensor(0.25)):
                update(name, memory[:, 3:19], state, ids, rows, lr, triton=kernel)
            results.append((memory, state))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
        assert torch.equal(results[0][0][:, :3], around[:, :3]) and torch.equal(results[0][0][:, 19:], around[:, 19:])


@interpreted
def test_an_infinite_gradient_stays_in_its_row(small: None) -> None:
    ids, rows = torch.tensor([0] * 3 + [1] * 20 + [2] * 20), torch.ones(43, 4)
    rows[[10, 22]] = float("inf")  # within a tile of their own and next to another row
    weight = torch.zeros(3, 4)
    update("sgd", weight, None, ids, rows, 1.0, triton=True)
    assert weight[:, 0].tolist() == [-3.0, float("-inf"), -20.0]


@interpreted
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ids_outside_the_table_touch_no_memory(small: None, name: str) -> None:
    memory, states = torch.zeros(30, 4), torch.zeros(30)
    ids = torch.tensor([-1] * 9 + [-5] * 3 + [0, 9] + [10] * 20 + [12])
    update(name, memory[10:20], states[10:20], ids, torch.ones(len(ids), 4), 1.0, triton=True)
    assert memory.any(dim=1).nonzero().flatten().tolist() == [10, 19]
    assert states.nonzero().flatten().tolist() == ([] if name == "sgd" else [10, 19])


@interpreted
def test_the_version_of_the_table_counts_up() -> None:
    weight, state, ids = torch.zeros(3, 4), torch.zeros(3), torch.tensor([1])
    update("rowwise-adagrad", weight, state, ids, torch.ones(1, 4), triton=True)
    assert weight._version == state._version == 1


@interpreted
def test_every_row_is_read_and_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import interpreter_builder as builder

    torch.manual_seed(3)
    ids = torch.cat([torch.full((150,), 7), torch.randint(40, (60,)), torch.full((3,), 39)])
    weight, state, rows = torch.zeros(40, 16), torch.zeros(40), torch.ones(len(ids), 16)
    accesses = {"load": Counter(), "store": Counter()}

    def counted(kind: str, original):
        def access(pointers, *arguments):
            mask = arguments[0 if kind == "load" else 1].data.astype(bool)
            accesses[kind].update(np.broadcast_to(pointers.data, mask.shape)[mask].ravel().tolist())
            return original(pointers, *arguments)
        return access

    for kind in accesses:
        name = f"create_masked_{kind}"
        monkeypatch.setattr(builder, name, counted(kind, getattr(builder, name)))
    update("rowwise-adagrad", weight, state, ids, rows, triton=True)

    def of(kind: str, tensor: torch.Tensor) -> torch.Tensor:
        addresses = [tensor.data_ptr() + 4 * i for i in range(tensor.numel())]
        return torch.tensor([accesses[kind][address] for address in addresses]).view(tensor.shape)

    touched = torch.zeros(40, dtype=torch.int64)
    touched[ids] = 1
    assert torch.equal(of("load", rows), torch.ones(len(ids), 16, dtype=torch.int64))
    for kind in accesses:
        assert torch.equal(of(kind, weight), touched[:, None].expand(40, 16))
        assert torch.equal(of(kind, state), touched)
    elements = sum(accesses["store"].values()) - touched.sum() * 17  # the partial sums: at most two rows a chunk
    assert 0 < elements <= 2 * -(-len(ids) // kernels.CHUNK) * 16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU is visible to torch")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_cuda_graph_holds_the_update(name: str) -> None:
    torch.manual_seed(4)
    rate, ids = torch.tensor(0.1, device="cuda"), torch.zeros(4096, 26, dtype=torch.int64, device="cuda")
    table = EmbeddingTable(100_000, 64, kernels="triton").cuda()
    optimizer = OPTIMIZERS[name](table.parameters(), lr=rate, kernels="triton")
    rows, exact = torch.randn(4096, 26, 64, device="cuda"), table.weight.detach().double()
    state = torch.zeros(100_000, dtype=torch.float64, device="cuda")

    def step() -> None:
        optimizer.zero_grad()
        table(ids).backward(rows)
        optimizer.step()

    rate.zero_()  # warm-up and capture leave the weights as they are
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    if name == "rowwise-adagrad":
        optimizer.state[table.weight]["sum"].zero_()
    for power in (1, 9):
        ids.copy_((torch.rand(4096, 26, device="cuda") ** power * 100_000).long())
        rate.fill_(0.1 / power)
        graph.replay()
        update(name, exact, state, ids.flatten(), rows.view(-1, 64).double(), 0.1 / power)
    torch.testing.assert_close(table.weight.double(), exact, rtol=1e-5, atol=1e-4)
