"""A recorded training step computes what the plain one does, bit for bit; `gpu` tests do so with real CUDA graphs."""

import pytest
import torch
from tape import TapeRecorder
from torch import nn
from torch.nn import functional as F

from ctr_train import optim
from ctr_train.checkpoint import load_checkpoint
from ctr_train.data.loader import Batch
from ctr_train.errors import UserError
from ctr_train.graph import WARM_UPS, DeviceRates, GraphedStep, choose_cuda_graph
from ctr_train.runlog import read_log

STEPS = 20


class IndexAddSGD(torch.optim.Optimizer):
    """SGD of the rows of a table, of operators that a tape can hold; its learning rate may be a tensor."""

    def __init__(self, params, lr, kernels):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for table in group["params"]:
                table.index_add_(0, table.grad._indices()[0], table.grad._values() * -group["lr"])


class Rerun(TapeRecorder):
    """Runs the function again instead of a recording: for optimizers that a tape cannot hold."""

    def record(self, function):
        def replay():
            self.replays += 1
            return function()

        return replay


@pytest.fixture
def recordable(monkeypatch):
    """Training steps on a CPU of nothing but operators that a tape can hold."""
    monkeypatch.setitem(optim.EMBEDDING_OPTIMIZERS, "sgd", IndexAddSGD)
    monkeypatch.setattr("ctr_kernels.sparse_update.table.check_ids", lambda *_: None)


def same_state(a, b):
    a, b = load_checkpoint(a / "last.pt"), load_checkpoint(b / "last.pt")
    for key in ("model", "optimizers", "rng"):
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0)
    assert a["schedulers"] == b["schedulers"] and a["best"] == b["best"] and a["loader"] == b["loader"]


def losses(directory):
    return [entry["loss"] for entry in read_log(directory) if "event" not in entry]


@pytest.mark.parametrize("model", ["ft", "autoint", "dcnv2"])
def test_a_recorded_step_is_the_plain_one(make_trainer, tmp_path, recordable, model):
    """Schedules, dropout, batches and evaluations in between reach the recording: 20 steps, bit for bit."""
    settings = {"model": model, "steps": STEPS, "embedding_optimizer": "sgd", "embedding_lr": 5.0, "eval_every": 7}
    recorder = TapeRecorder()
    for name, used in (("plain", None), ("graph", recorder)):
        trainer, stop = make_trainer(name, recorder=used, **settings)
        assert trainer.train(stop) == "finished"
    assert (recorder.warm_ups, recorder.replays) == (WARM_UPS, STEPS - WARM_UPS)
    assert losses(tmp_path / "plain") == losses(tmp_path / "graph")
    same_state(tmp_path / "plain", tmp_path / "graph")


@pytest.mark.parametrize("optimizer", ["sgd", "rowwise-adagrad"])
def test_a_run_goes_on_with_a_new_recording(make_trainer, tmp_path, optimizer):
    """With the row updates of training; interrupted behind the recording, and begun again with another one."""
    settings = {"model": "dcnv2", "steps": STEPS, "embedding_optimizer": optimizer}
    trainer, stop = make_trainer("plain", **settings)
    trainer.train(stop)
    trainer, stop = make_trainer("graph", stop_after=8, recorder=Rerun(), **settings)
    assert trainer.train(stop) == "interrupted"
    torch.manual_seed(12345)
    recorder = Rerun()
    trainer, stop = make_trainer("graph", recorder=recorder, **settings)
    trainer.restore(load_checkpoint(tmp_path / "graph" / "last.pt"))
    assert trainer.train(stop) == "finished"
    assert recorder.replays == STEPS - 8 - WARM_UPS
    same_state(tmp_path / "plain", tmp_path / "graph")


def a_step(module, optimizer):
    def step(batch):
        loss = F.binary_cross_entropy_with_logits(module(batch.dense).squeeze(-1), batch.label)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def a_batch(rows=16, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return Batch(torch.rand(rows, 5, generator=draw), torch.zeros(rows, 26, dtype=torch.int32),
                 torch.randint(2, (rows,), generator=draw).float())


def graphed(module=None, lr=0.1, recorder=None, settle=lambda: None):
    module = nn.Linear(5, 1) if module is None else module
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, fused=True)
    return module, optimizer, GraphedStep(a_step(module, optimizer), [optimizer], recorder or TapeRecorder(), settle)


def test_each_launch_draws_a_new_mask():
    torch.manual_seed(0)
    _, _, step = graphed(nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 1)), lr=0.0)
    found = [step(a_batch()).item() for _ in range(12)]
    assert len(set(found)) == 12


def test_a_changed_rate_reaches_the_recording_and_stays_out_of_the_optimizer():
    module, optimizer, step = graphed(lr=0.0)
    start = module.weight.detach().clone()
    for _ in range(WARM_UPS + 2):
        step(a_batch())
    assert torch.equal(module.weight, start)
    optimizer.param_groups[0]["lr"] = 0.5
    step(a_batch())
    assert not torch.equal(module.weight, start)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_losses_are_not_overwritten():
    _, _, step = graphed()
    found = [step(a_batch(seed=i)) for i in range(8)]
    assert len({loss.item() for loss in found}) == 8


def test_the_loader_rests_while_the_step_is_recorded():
    rests = []
    _, _, step = graphed(settle=lambda: rests.append(len(rests)))
    for _ in range(WARM_UPS):
        step(a_batch())
    assert rests == []
    for _ in range(3):
        step(a_batch())
    assert rests == [0]


def test_a_batch_of_another_shape_is_refused():
    _, _, step = graphed()
    step(a_batch())
    with pytest.raises(ValueError, match=r"torch.float32 \(7, 5\) after one of torch.float32 \(16, 5\)"):
        step(a_batch(rows=7))


def test_a_step_that_reads_a_value_cannot_be_recorded(make_trainer):
    trainer, stop = make_trainer("run", model="dcnv2", recorder=TapeRecorder(), steps=STEPS)
    with pytest.raises(UserError, match="cannot be recorded as a CUDA graph .*; use --no-cuda-graph"):
        trainer.train(stop)  # the row updates of a CPU read the learning rate


def test_rates_are_written_only_where_they_changed():
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 0.2)]
    optimizer = torch.optim.SGD(groups)
    rates = DeviceRates([optimizer], torch.device("cpu"))
    rates.update()
    optimizer.param_groups[1]["lr"] = 0.3
    with torch.autograd.profiler.profile() as profile:
        rates.update()
    assert sum(event.count for event in profile.key_averages() if event.key == "aten::fill_") == 1
    with rates.in_use():
        assert [float(group["lr"]) for group in optimizer.param_groups] == [0.1, 0.3]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.3]


ALL = dict.fromkeys(("field_attention", "ffn", "sparse_update"), "triton")


@pytest.mark.parametrize(("asked", "device", "backends", "used"), [
    (None, "cuda", ALL, True), (True, "cuda", ALL, True), (False, "cuda", ALL, False),
    (None, "cuda", {**ALL, "ffn": "eager"}, False), (None, "cpu", ALL, False), (False, "cpu", ALL, False),
])
def test_where_steps_are_graphs(asked, device, backends, used):
    assert choose_cuda_graph(asked, torch.device(device), backends) is used


@pytest.mark.parametrize(("device", "backends", "message"), [
    ("cpu", ALL, "--cuda-graph: the device is cpu, and CUDA graphs need an NVIDIA GPU"),
    ("cuda", {**ALL, "sparse_update": "eager"}, "--cuda-graph: --kernels eager waits for the device"),
])
def test_a_graph_that_cannot_be_had_is_an_error(device, backends, message):
    with pytest.raises(UserError, match=message):
        choose_cuda_graph(True, torch.device(device), backends)
