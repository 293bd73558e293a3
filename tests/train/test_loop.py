"""The training loop learns, goes on bit for bit after an interruption, and never saves weights that are NaN."""

import errno
import json
from pathlib import Path

import pytest
import torch

from ctr_train import loop
from ctr_train.checkpoint import load_checkpoint, newest_checkpoint, scored_weights
from ctr_train.errors import UserError
from ctr_train.evaluate import evaluate
from ctr_train.interrupt import Interrupt
from ctr_train.loop import Trainer
from ctr_train.runlog import read_log

STEPS = 60


def weights(directory: Path, name: str = "last.pt") -> dict[str, torch.Tensor]:
    return load_checkpoint(directory / name)["model"]


@pytest.mark.parametrize(("model", "optimizer", "more"), [
    ("ft", "rowwise-adagrad", {}), ("autoint", "sgd", {"embedding_dtype": "bf16", "numeric": "piecewise"}),
    ("dcnv2", "adagrad", {"embedding_weight_decay": 0.1, "numeric": "periodic", "calibration_rows": 500, "ema": 0.9}),
    ("dcnv2", "lazy-adam", {"embedding_dtype": "bf16"})])
def test_thirty_steps_and_thirty_more_are_sixty_bit_for_bit(make_trainer, tmp_path, model, optimizer, more):
    settings = {"model": model, "embedding_optimizer": optimizer, "eval_every": 20, "tables": "per-field", **more}
    trainer, stop = make_trainer("whole", **settings)
    assert trainer.train(stop) == "finished"
    trainer, stop = make_trainer("halves", stop_after=30, **settings)
    assert trainer.train(stop) == "interrupted"
    assert trainer.step == load_checkpoint(tmp_path / "halves" / "last.pt")["step"] == 30
    torch.manual_seed(12345)  # what a new process would draw must not matter
    trainer, stop = make_trainer("halves", **settings)
    trainer.restore(load_checkpoint(tmp_path / "halves" / "last.pt"))
    assert trainer.train(stop) == "finished"

    whole, halves = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "halves"))
    assert whole["model"].keys() == halves["model"].keys()
    assert (torch.bfloat16 in {t.dtype for t in whole["model"].values()}) == ("embedding_dtype" in more)
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, halves["model"][name]), name
    assert whole["best"] == halves["best"] and whole["loader"] == halves["loader"]
    for a, b in zip(whole["optimizers"], halves["optimizers"], strict=True):
        torch.testing.assert_close(a["state"], b["state"], rtol=0, atol=0)
        assert a["param_groups"] == b["param_groups"]
    assert whole["schedulers"] == halves["schedulers"]
    assert whole["average"].keys() == halves["average"].keys() and bool(whole["average"]) == ("ema" in more)
    for name, tensor in whole["average"].items():
        assert torch.equal(tensor, halves["average"][name]), name
    by_step = [{(e["step"], "event" in e): e for e in read_log(tmp_path / name)} for name in ("whole", "halves")]
    assert by_step[0].keys() == by_step[1].keys()
    for key, entry in by_step[0].items():
        assert [entry.get(name) == by_step[1][key].get(name) for name in ("loss", "logloss", "lr")] == [True] * 3


def test_dropout_and_seed_reach_the_weights(make_trainer, tmp_path):
    """Guards the test above: without these differences it could not fail."""
    for name, settings in (("a", {}), ("b", {"dropout": 0.0})):
        trainer, stop = make_trainer(name, model="dcnv2", steps=3, **settings)
        trainer.train(stop)
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_the_loss_falls_and_the_log_says_so(make_trainer, tmp_path):
    trainer, stop = make_trainer("run", model="dcnv2", steps=300, eval_every=100, embedding_lr=0.05, batch_size=64)
    trainer.train(stop)
    log = read_log(tmp_path / "run")
    training = [entry for entry in log if "event" not in entry]
    evaluations = [entry for entry in log if entry.get("event") == "eval"]
    assert [entry["step"] for entry in training] == list(range(1, 301))
    assert [entry["step"] for entry in evaluations] == [100, 200, 300]
    losses = [entry["loss"] for entry in training]
    assert sum(losses[-50:]) < 0.95 * sum(losses[:50])
    assert training[-1]["epoch"] == 1.0
    assert all(entry["rows_per_s"] > 0 for entry in training)
    assert training[0]["lr"] == pytest.approx(1e-3 / 5) and training[4]["lr"] == pytest.approx(1e-3)
    assert {"logloss", "auc", "calibration"} <= evaluations[0].keys()


def test_the_average_is_that_of_the_formula_and_what_is_evaluated(make_trainer, tmp_path):
    trainer, stop = make_trainer("run", model="dcnv2", steps=4, ema=0.75, eval_every=4)
    expected = {name: p.detach().double() for name, p in trainer.model.named_parameters() if "embedding" not in name}
    take = trainer._update

    def take_and_note(batch):
        loss = take(batch)
        for name, p in trainer.model.named_parameters():
            if name in expected:
                expected[name] = 0.75 * expected[name] + 0.25 * p.detach().double()
        return loss

    trainer._update = take_and_note
    assert trainer.train(stop) == "finished"
    content = load_checkpoint(tmp_path / "run" / "last.pt")
    assert content["average"].keys() == expected.keys()
    for name, mean in content["average"].items():
        torch.testing.assert_close(mean.double(), expected[name], rtol=1e-6, atol=1e-7)
        assert not torch.equal(mean, content["model"][name])
    trainer.model.load_state_dict(scored_weights(content))
    (evaluation,) = [entry for entry in read_log(tmp_path / "run") if entry.get("event") == "eval"]
    again = evaluate(trainer.model, trainer.valid, batch_size=64, device="cpu", precision="fp32")
    assert evaluation["logloss"] == pytest.approx(again["logloss"], abs=1e-7)


def test_the_best_checkpoint_is_that_of_the_lowest_logloss(make_trainer, tmp_path, monkeypatch):
    logloss = iter([0.5, 0.4, 0.6, 0.45])
    monkeypatch.setattr(loop, "evaluate", lambda *args, **options: {"logloss": next(logloss), "auc": None})
    trainer, stop = make_trainer("run", model="dcnv2", steps=40, eval_every=10)
    assert trainer.train(stop) == "finished"
    best = load_checkpoint(tmp_path / "run" / "best.pt")
    assert best["step"] == 20 and best["best"] == {"step": 20, "logloss": 0.4, "evaluations_since": 0, "latest": 20}
    last = load_checkpoint(tmp_path / "run" / "last.pt")
    assert last["step"] == 40 and last["best"] == {"step": 20, "logloss": 0.4, "evaluations_since": 2, "latest": 40}


def test_the_best_checkpoint_is_a_state_to_go_on_from(make_trainer, tmp_path):
    """Killed after an evaluation, a run has best.pt alone: what follows is as if nothing had happened."""
    for name in ("whole", "killed"):
        trainer, stop = make_trainer(name, model="dcnv2", steps=40, eval_every=10)
        trainer.train(stop)
    found, best = newest_checkpoint(tmp_path / "killed", "dcnv2")
    assert (found, best["step"]) == ("last.pt", 40)  # it has more steps, or as many
    (tmp_path / "killed" / "last.pt").unlink()
    found, best = newest_checkpoint(tmp_path / "killed", "dcnv2")
    trainer, stop = make_trainer("killed", model="dcnv2", steps=40, eval_every=10)
    trainer.restore(best, found)
    assert trainer.train(stop) == "finished"
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "killed")[name]), name
    assert newest_checkpoint(tmp_path, "dcnv2") is None


def test_patience_ends_training(make_trainer, tmp_path, monkeypatch):
    logloss = iter([0.5, 0.4, 0.6, 0.4, 0.1])
    monkeypatch.setattr(loop, "evaluate", lambda *args, **options: {"logloss": next(logloss), "auc": None})
    trainer, stop = make_trainer("run", model="dcnv2", eval_every=5, patience=2)
    assert trainer.train(stop) == "patience"
    assert trainer.step == 20
    trainer, stop = make_trainer("run", model="dcnv2", eval_every=5, patience=2)
    trainer.restore(load_checkpoint(tmp_path / "run" / "last.pt"))
    assert trainer.train(stop) == "patience"  # its end is remembered
    assert trainer.step == 20


def test_the_last_step_is_evaluated(make_trainer, tmp_path):
    for name, steps, every, expected in (("a", 8, 5, [5, 8]), ("b", 7, 5, [7]), ("c", 6, 0.5, [3, 6]),
                                         ("d", 6, 0.01, [1, 2, 3, 4, 5, 6])):  # none shortly before the last one
        trainer, stop = make_trainer(name, model="dcnv2", steps=steps, eval_every=every)
        trainer.train(stop)
        assert [entry["step"] for entry in read_log(tmp_path / name) if "event" in entry] == expected


def poison(trainer: Trainer, step: int, value: float) -> None:
    """Put `value` into the head's bias when `step` begins."""
    take = trainer._train_step

    def train_step(batch):
        if trainer.step + 1 == step:
            with torch.no_grad():
                trainer.model.head.bias.fill_(value)
        take(batch)

    trainer._train_step = train_step


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_at_its_step_and_keeps_the_checkpoint(make_trainer, tmp_path, value):
    trainer, stop = make_trainer("run", model="dcnv2", eval_every=10)
    poison(trainer, 17, value)
    with pytest.raises(UserError, match=r"the loss of step 17 is (nan|inf); the last good checkpoint is "
                                        r".*best\.pt \(step 10\); try a lower --lr"):
        trainer.train(stop)
    content = load_checkpoint(tmp_path / "run" / "best.pt")
    assert content["step"] == 10
    assert all(tensor.isfinite().all() for tensor in content["model"].values())


def test_on_devices_whose_losses_are_read_later_the_step_is_the_same(make_trainer, tmp_path):
    trainer, stop = make_trainer("run", model="dcnv2", eval_every=30)
    trainer._check_every = trainer._log_every = 8
    poison(trainer, 35, float("nan"))
    with pytest.raises(UserError, match=r"the loss of step 35 is nan; .* \(step 30\)"):
        trainer.train(stop)
    trainer, stop = make_trainer("early", model="dcnv2")
    trainer._check_every = trainer._log_every = 1000
    poison(trainer, 9, float("nan"))
    stop.trainer, stop.step = trainer, 12  # Ctrl-C before anyone has looked
    with pytest.raises(UserError, match="the loss of step 9 is nan; there is no earlier checkpoint"):
        trainer.train(stop)
    assert not (tmp_path / "early" / "last.pt").exists()


def test_weights_that_are_no_numbers_are_never_saved(make_trainer, tmp_path):
    trainer, stop = make_trainer("run", model="dcnv2", eval_every=10)

    def spoil_at_ten(*hook_arguments) -> None:  # after the loss of the step was finite
        if trainer.step == 9:
            trainer.model.embedding_parameters()[0].data[3, 2] = float("nan")

    trainer.optimizers[0].register_step_post_hook(spoil_at_ten)
    with pytest.raises(UserError, match=r"after step 10 the weights tokenizer\.embedding\.table\.weight are NaN"):
        trainer.train(stop)
    assert not (tmp_path / "run" / "last.pt").exists() and not (tmp_path / "run" / "best.pt").exists()


def test_a_full_disk_leaves_the_earlier_checkpoint(make_trainer, tmp_path, monkeypatch):
    trainer, stop = make_trainer("run", model="dcnv2", eval_every=10)
    save = torch.save

    def full_from_step_20(content, handle):
        if content["step"] >= 20:
            handle.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, handle)

    monkeypatch.setattr(torch, "save", full_from_step_20)
    with pytest.raises(UserError, match=r"cannot write .*\.pt: No space left on device"):
        trainer.train(stop)
    assert load_checkpoint(tmp_path / "run" / "best.pt")["step"] == 10
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["best.pt", "metrics.jsonl"]


class DuringEvaluation(Interrupt):
    """Ctrl-C pressed while the second batch of the rows that watch the run is scored, `at` that step."""

    def __init__(self, trainer, at: int) -> None:
        self.trainer, self.at, self.asked = trainer, at, 0

    @property
    def requested(self) -> bool:
        self.asked += self.trainer.step == self.at
        return self.asked > 2


@pytest.mark.parametrize("at", [20, STEPS])
def test_an_interrupt_is_heard_during_an_evaluation_which_the_run_that_goes_on_makes_up_for(make_trainer, tmp_path, at):
    whole, stop = make_trainer("whole", model="dcnv2", eval_every=20)
    assert whole.train(stop) == "finished"
    trainer, _ = make_trainer("halves", model="dcnv2", eval_every=20)
    assert trainer.train(DuringEvaluation(trainer, at)) == "interrupted"
    assert trainer.step == at
    assert [e["step"] for e in read_log(tmp_path / "halves") if "event" in e] == list(range(20, at, 20))
    trainer, stop = make_trainer("halves", model="dcnv2", eval_every=20)
    trainer.restore(load_checkpoint(tmp_path / "halves" / "last.pt"))
    assert trainer.train(stop) == "finished" and trainer.best == whole.best
    logs = [[(e["step"], e.get("event"), e.get("logloss"), e.get("loss")) for e in read_log(tmp_path / name)]
            for name in ("whole", "halves")]
    assert logs[0] == logs[1]


def test_resuming_cuts_off_what_the_log_has_beyond_the_checkpoint(make_trainer, tmp_path):
    trainer, stop = make_trainer("run", model="dcnv2", stop_after=10)
    trainer.train(stop)
    path = tmp_path / "run" / "metrics.jsonl"
    with open(path, "a") as handle:
        handle.write(json.dumps({"step": 11, "loss": 99.0, "epoch": 0.2, "rows_per_s": 1.0, "lr": 0.1}) + "\n")
        handle.write('{"step": 12, "lo')  # a crash in the middle of a line
    trainer, stop = make_trainer("run", model="dcnv2")
    trainer.restore(load_checkpoint(tmp_path / "run" / "last.pt"))
    trainer.train(stop)
    steps = [entry["step"] for entry in read_log(tmp_path / "run")]
    assert steps == list(range(1, STEPS + 1))
    assert all(entry["loss"] < 5 for entry in read_log(tmp_path / "run"))


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_other_precisions_train(make_trainer, precision):
    trainer, stop = make_trainer("run", steps=5, precision=precision)
    assert trainer.train(stop) == "finished"
    assert all(weight.dtype == torch.float32 for weight in trainer.model.parameters())


