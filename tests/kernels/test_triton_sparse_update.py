"""The Triton row updates: runs across chunks, types, memory traffic and memory safety in Triton's interpreter.

The interpreter is chosen before Triton is imported, so the first test runs this file in a process of its own.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parity import assert_parity
from row_formulas import ExactTable
from triton_interpreter import interpreted, outside, run_in_the_interpreter
from triton_traffic import counting

from ctr_kernels import EmbeddingTable, SparseAdagrad, SparseLazyAdam, SparseRowwiseAdagrad, SparseSGD
from ctr_kernels.sparse_update import plan
from ctr_kernels.sparse_update.operator import update as update_rows
from ctr_kernels.sparse_update.reference import update_reference
from ctr_kernels.sparse_update.rule import RowState, Rule

pytest.importorskip("triton")
from ctr_kernels.sparse_update import triton as kernels  # noqa: E402

OPTIMIZERS = {"sgd": SparseSGD, "rowwise-adagrad": SparseRowwiseAdagrad, "adagrad": SparseAdagrad,
              "lazy-adam": SparseLazyAdam}


@outside
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__, at_least=29)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chunks of 8 positions in tiles of 4, closed 2 chunks at a time, so that few ids make every kind of run."""
    monkeypatch.setattr(kernels, "TABLE", {16: (8, 4, 1), 32: (8, 2, 1)})
    monkeypatch.setattr(kernels, "CLOSE_ELEMENTS", 32)
    yield


def new_state(name: str, weight: torch.Tensor, fill: float = 0.0) -> RowState:
    """A rule's state at its first step, in fp32 or wider."""
    shape = weight.shape[:1] if name == "rowwise-adagrad" else weight.shape
    first, second = (torch.full(shape, fill, dtype=torch.promote_types(weight.dtype, torch.float32)) for _ in range(2))
    return RowState(None if name == "sgd" else first, second if name == "lazy-adam" else None, step=torch.tensor(1))


def tensors_of(state: RowState) -> list[torch.Tensor]:
    return [tensor for tensor in (state.first, state.second) if tensor is not None]


def update(name: str, weight: torch.Tensor, state: RowState, ids: torch.Tensor, rows: torch.Tensor,
           lr: float | torch.Tensor = 0.5, triton: bool = False) -> None:
    """A step of a rule, in place."""
    (update_rows if triton else update_reference)(weight, ids, rows, Rule(name, lr), state)


@interpreted
@pytest.mark.parametrize(("name", "dim"), [("sgd", 13), ("rowwise-adagrad", 13), ("lazy-adam", 24)])
def test_a_table_of_fp16(name: str, dim: int) -> None:
    torch.manual_seed(0)
    ids, results = torch.randint(300, (3, 26)), []
    table = EmbeddingTable(300, dim, std=1.0, kernels="triton").half()
    optimizer = OPTIMIZERS[name](table.parameters(), lr=0.1, kernels="triton")
    before, rows = table.weight.detach().clone(), torch.randn(*ids.shape, dim).half()
    for _ in range(2):  # the second step meets a state
        found = table(ids)
        found.backward(rows)
        optimizer.step()
        optimizer.zero_grad()
    for kind in (torch.float16, torch.float64):
        weight = before.to(kind, copy=True)
        state = new_state(name, weight)
        for number in (1, 2):
            lookup = weight[ids]
            update(name, weight, state._replace(step=torch.tensor(number)), ids.flatten(), rows.view(-1, dim).to(kind),
                   0.1)
        results.append([lookup, weight, *tensors_of(state)])
    kept = [optimizer.state[table.weight][key] for key in ("sum", "exp_avg", "exp_avg_sq")
            if key in optimizer.state[table.weight]]
    assert_parity([found.detach(), table.weight.detach(), *kept], *results)


@interpreted
def test_a_row_wider_than_a_warp() -> None:
    torch.manual_seed(1)
    weight, ids, rows = torch.randn(5, 300), torch.randint(5, (20,)), torch.randn(20, 300)
    found, exact = weight.clone(), weight.double()
    update("sgd", found, RowState(), ids, rows, triton=True)
    update("sgd", exact, RowState(), ids, rows.double())
    update("sgd", weight, RowState(), ids, rows)
    assert_parity([found], [weight], [exact])
    with pytest.raises(ValueError, match="rows of 2049 elements: .* at most 2048"):
        update("sgd", torch.zeros(1, 2049), RowState(), ids * 0, torch.zeros(20, 2049), triton=True)


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
    weight = torch.randint(-8, 9, (50, dim)).float()
    found, states = weight.clone(), [new_state(name, weight, fill=0.3) for _ in range(2)]
    update(name, found, states[0], ids, rows, triton=True)
    update(name, weight, states[1], ids.long(), rows)
    for a, b in zip(*map(tensors_of, states), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
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
            memory, state = around.clone(), new_state(name, around[:, 3:19], fill=1.0)
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
    update("sgd", weight, RowState(), ids, rows, 1.0, triton=True)
    assert weight[:, 0].tolist() == [-3.0, float("-inf"), -20.0]


@interpreted
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ids_outside_the_table_touch_no_memory(small: None, name: str) -> None:
    memory, states = torch.zeros(30, 4), new_state(name, torch.zeros(30, 4))
    ids = torch.tensor([-1] * 9 + [-5] * 3 + [0, 9] + [10] * 20 + [12])
    inside = states._replace(**{key: getattr(states, key)[10:20] for key in ("first", "second")
                                if getattr(states, key) is not None})
    update(name, memory[10:20], inside, ids, torch.ones(len(ids), 4), 1.0, triton=True)
    for tensor in (memory, *tensors_of(states)):
        assert tensor.view(30, -1).any(dim=1).nonzero().flatten().tolist() == [10, 19]


@interpreted
def test_the_version_of_the_table_counts_up() -> None:
    weight, ids = torch.zeros(3, 4), torch.tensor([1])
    state = new_state("lazy-adam", weight)
    update("lazy-adam", weight, state, ids, torch.ones(1, 4), triton=True)
    assert weight._version == state.first._version == state.second._version == 1


@interpreted
@pytest.mark.parametrize("name", ["rowwise-adagrad", "lazy-adam"])
def test_every_row_is_read_and_written_once(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    torch.manual_seed(3)
    ids = torch.cat([torch.full((150,), 7), torch.randint(40, (60,)), torch.full((3,), 39)])
    weight, rows = torch.zeros(40, 16), torch.ones(len(ids), 16)
    state = new_state(name, weight)
    accesses = counting(monkeypatch)
    update(name, weight, state, ids, rows, triton=True)

    def of(kind: str, tensor: torch.Tensor) -> torch.Tensor:
        addresses = [tensor.data_ptr() + 4 * i for i in range(tensor.numel())]
        return torch.tensor([accesses[kind][address] for address in addresses]).view(tensor.shape)

    touched = torch.zeros(40, dtype=torch.int64)
    touched[ids] = 1
    assert torch.equal(of("load", rows), torch.ones(len(ids), 16, dtype=torch.int64))
    for kind in accesses:
        for tensor in (weight, *tensors_of(state)):
            assert torch.equal(of(kind, tensor), touched.view(40, *[1] * (tensor.dim() - 1)).expand(tensor.shape))
    in_a_row = weight[0].numel() + sum(tensor[0].numel() for tensor in tensors_of(state))
    elements = sum(accesses["store"].values()) - touched.sum() * in_a_row  # partial sums: at most two rows a chunk
    assert 0 < elements <= 2 * -(-len(ids) // kernels.TABLE[16][0]) * 16


@interpreted
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("options", [{"weight_decay": 0.3}, {"weight_decay": 0.3, "decay_untouched": True}], ids=str)
def test_steps_with_decay_are_those_of_the_formula(small: None, name: str, options: dict) -> None:
    torch.manual_seed(4)
    table = EmbeddingTable(12, 5, std=1.0, kernels="triton")
    exact = ExactTable(table.weight.double().tolist(), name, options)
    optimizer = OPTIMIZERS[name](table.parameters(), lr=torch.tensor(0.1), kernels="triton", **options)
    for _ in range(3):
        ids, rows = torch.randint(12, (4,)).repeat(3), torch.randn(12, 5)
        optimizer.zero_grad()
        table(ids).backward(rows)
        optimizer.step()
        exact.step(ids, rows)
    torch.testing.assert_close(table.weight.double(), torch.tensor(exact.weight).double(), rtol=4e-6, atol=4e-6)
    if "last_step" in (state := optimizer.state[table.weight]):
        assert state["last_step"].tolist() == exact.touched


@interpreted
@pytest.mark.parametrize(("name", "dim"), [("sgd", 13), ("sgd", 32), ("lazy-adam", 16)])
def test_bf16_is_rounded_to_the_bits_of_the_reference(small: None, name: str, dim: int) -> None:
    results = []
    for backend in ("triton", "eager"):
        torch.manual_seed(5)
        table = EmbeddingTable(20, dim, dtype=torch.bfloat16, output_dtype=torch.float32, kernels=backend)
        options = {"state_dtype": torch.bfloat16} if name == "lazy-adam" else {}
        optimizer = OPTIMIZERS[name](table.parameters(), lr=2.0**-6, seed=2**62 + 1, kernels=backend, **options)
        for _ in range(3):
            ids = torch.randint(20, (30,))
            optimizer.zero_grad()
            table(ids).backward(torch.randint(-8, 9, (30, dim)).float())  # every sum is exact, whatever its order
            optimizer.step()
        results.append([table.weight.detach(), *optimizer.state[table.weight].values()])
    for a, b in zip(*results, strict=True):  # roots and quotients may differ in the last bit of fp32
        assert torch.equal(a, b) if name == "sgd" else (a != b).double().mean() < 0.01


@interpreted
def test_the_sort_of_the_lookup_serves_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    sorts = []

    def counted(ids: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        sorts.append(ids.tolist())
        return plan.sort_ids(ids, num_rows)

    monkeypatch.setattr(kernels, "sort_ids", counted)  # those of the update alone
    rows = torch.randint(-8, 9, (6, 4)).float()
    ids = torch.tensor([3, 1, 3, 0, 1, 3])

    def run(between: Callable[[EmbeddingTable, torch.Tensor], object]) -> None:
        """A step whose gradient must be that of a reference, whatever happens between backward and update."""
        sorts.clear()
        table, given = EmbeddingTable(5, 4, kernels="triton"), ids.clone()
        table(given).backward(rows)
        between(table, given)
        grad = table.weight.grad
        expected = table.weight.detach().clone()
        update_reference(expected, grad._indices()[0], grad._values(), Rule("sgd", 0.5), RowState())
        SparseSGD(table.parameters(), lr=0.5, kernels="triton").step()
        assert torch.equal(table.weight, expected)

    run(lambda table, given: None)
    assert sorts == []  # the plan was used
    run(lambda table, given: table(torch.tensor([4, 4, 4, 4, 4, 4])))  # a later lookup, of other ids
    assert sorts == [ids.tolist()]
    run(lambda table, given: given.copy_(torch.tensor([0, 1, 2, 3, 4, 0])))  # the gradient's ids are overwritten
    assert sorts == [[0, 1, 2, 3, 4, 0]]
    run(lambda table, given: table(given + 1).backward(rows))  # two lookups: the gradient has the ids of both
    assert sorts == [ids.tolist() + (ids + 1).tolist()]
    run(lambda table, given: evaluate(table))
    assert sorts == []  # a lookup without a gradient leaves the plan alone


def evaluate(table: EmbeddingTable) -> None:
    with torch.no_grad():
        table(torch.tensor([4]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU is visible to torch")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_cuda_graph_holds_the_update(name: str) -> None:
    torch.manual_seed(4)
    rate, ids = torch.tensor(0.1, device="cuda"), torch.zeros(4096, 26, dtype=torch.int64, device="cuda")
    table = EmbeddingTable(100_000, 64, kernels="triton").cuda()
    optimizer = OPTIMIZERS[name](table.parameters(), lr=rate, kernels="triton")
    rows, exact = torch.randn(4096, 26, 64, device="cuda"), table.weight.detach().double()
    state = RowState(*(None if t is None else t.cuda() for t in new_state(name, exact.cpu())))

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
    for tensor in optimizer.state[table.weight].values():
        tensor.zero_()
    for number, power in enumerate((1, 9), start=1):
        ids.copy_((torch.rand(4096, 26, device="cuda") ** power * 100_000).long())
        rate.fill_(0.1 / power)
        graph.replay()
        update(name, exact, state._replace(step=torch.tensor(number)), ids.flatten(), rows.view(-1, 64).double(),
               0.1 / power)
    torch.testing.assert_close(table.weight.double(), exact, rtol=1e-5, atol=1e-4)
