"""The training loop: steps, evaluations and checkpoints of one run."""

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ctr_models import CTRModel

from .average import WeightAverage
from .checkpoint import restore_rng, save_checkpoint
from .data.artifacts import Artifacts
from .data.dataset import Part, Split
from .data.loader import Batch, Loader
from .errors import UserError
from .evaluate import evaluate
from .files import link_file
from .graph import GraphedStep, Recorder, Step
from .interrupt import Interrupt, Interrupted
from .optim import load_optimizer, make_optimizers, update
from .progress import TrainingProgress
from .runlog import RunLog
from .schedule import make_schedulers

LOG_LINES = 200  # training lines of a whole run in metrics.jsonl
CUDA_CHECK_EVERY = 50  # steps; to read a loss the host must wait for the device
SAVE_SECONDS = 600.0  # last.pt is never older than that, evaluations or not
HINT = "try a lower --lr or --embedding-lr, a longer --warmup, or --precision fp32"


class Trainer:
    """A model, its optimizers and the position in the data: what a step changes and a checkpoint holds.

    Args:
        directory: the run's; last.pt, best.pt and metrics.jsonl are written there.
        config: the run's settings, as `run.py` makes them.
        artifacts: those of the data.
        model: on the loader's device.
        loader: training batches.
        valid: rows for the evaluations during training; None without any.
        recorder: records the step, so that it runs as one CUDA graph; None: each kernel is launched by itself.
        still_here: called before each checkpoint; raises UserError where the directory is not the run's any more.

    Attributes:
        step: steps done, by this process or by one before it.
        log_chain: of the last line of metrics.jsonl; see `RunLog`.
        average: of the weights outside the tables, for evaluations; None without `ema`.
        best: {"step", "logloss", "evaluations_since"} of the best evaluation so far, and "latest", the step of the
            latest one; None without one.
    """

    def __init__(self, directory: Path, *, config: dict[str, Any], artifacts: Artifacts, model: CTRModel,
                 loader: Loader, valid: Split | Part | None, recorder: Recorder | None = None,
                 still_here: Callable[[], None] = lambda: None) -> None:
        self.directory, self.config, self.artifacts, self._still_here = directory, config, artifacts, still_here
        self.model, self.loader, self.valid, self.device = model, loader, valid, loader.device
        self.optimizers = make_optimizers(
            model, embedding_optimizer=config["embedding_optimizer"], embedding_lr=config["embedding_lr"],
            lr=config["lr"], weight_decay=config["weight_decay"], kernels=config["kernels"],
            embedding_weight_decay=config["embedding_weight_decay"])
        self.total_steps = config["total_steps"]
        self.schedulers = make_schedulers(self.optimizers, config["schedule"], config["warmup"], self.total_steps)
        self.average = WeightAverage(model, config["ema"]) if config["ema"] else None
        self._update: Step = partial(update, model, self.optimizers, precision=config["precision"],
                                     average=self.average)
        if recorder is not None:
            self._update = GraphedStep(self._update, self.optimizers, recorder, loader.settle)
        self.step = 0
        self.best: dict[str, Any] | None = None
        self.log_chain = 0
        self._interval_losses: list[float] = []  # of the steps since the last line of the log
        self._saved_step: int | None = None  # of the newest checkpoint, and of last.pt
        self._last_step: int | None = None
        self._best_step: int | None = None  # of the best.pt that this process has written
        self._losses: list[torch.Tensor] = []  # of the latest steps, not yet read by the host
        self._check_every = 1 if self.device.type == "cpu" else CUDA_CHECK_EVERY
        self._eval_every = steps_between(config["eval_every"], config["steps_in_epoch"])
        self._log_every = max(1, self.total_steps // LOG_LINES)

    def restore(self, content: dict[str, Any], name: str = "last.pt") -> None:
        """Go on from a loaded checkpoint of that name, random generators included; before the first step."""
        try:
            self.model.load_state_dict(content["model"])
            for optimizer, state in zip(self.optimizers, content["optimizers"], strict=True):
                load_optimizer(optimizer, state)
            for scheduler, state in zip(self.schedulers, content["schedulers"], strict=True):
                scheduler.load_state_dict(state)
            if self.average is not None:
                self.average.load_state_dict(content["average"])
            self.loader.load_state_dict(content["loader"])
            restore_rng(content)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[-1].strip()
            raise UserError(f"the checkpoint in {self.directory} does not fit the run's settings ({reason})") from error
        self.step, self.best, self._saved_step = content["step"], content["best"], content["step"]
        self._last_step = self.step if name == "last.pt" else None
        self.log_chain, self._interval_losses = content["log"]["chain"], list(content["log"]["losses"])

    def begin_with(self, weights: dict[str, torch.Tensor], states: list[dict[str, Any]]) -> None:
        """Begin with weights and optimizer states of another run; learning rates and schedule are this one's."""
        self.model.load_state_dict(weights)
        for optimizer, state in zip(self.optimizers, states, strict=True):
            load_optimizer(optimizer, {**state, "param_groups": optimizer.state_dict()["param_groups"]})
        if self.average is not None:
            self.average.restart()

    def train(self, interrupt: Interrupt) -> str:
        """Train until all steps are done, patience is over or the run is interrupted, and save last.pt.

        Returns: "finished", "patience" or "interrupted".

        Raises UserError for a loss or weights that are NaN or infinite; the checkpoints are then from before.
        """
        progress = TrainingProgress(self.total_steps, self.step)
        batches = self._endless_batches()
        self._saved_at = time.monotonic()
        self._begin_interval()
        try:
            with RunLog(self.directory, self.log_chain) as self._log:
                while True:
                    if self.valid is not None and self._owes_evaluation():
                        self._evaluate(progress, self.valid, interrupt)
                    if (outcome := self._outcome(interrupt)) is not None:
                        break
                    if time.monotonic() - self._saved_at > SAVE_SECONDS:
                        self._save("last.pt")
                    self._train_step(next(batches))
                    self._report(progress)
                if self._last_step != self.step:
                    self._save_last()
        finally:
            batches.close()
            progress.close()
        return outcome

    def _outcome(self, interrupt: Interrupt) -> str | None:
        """Why training ends before the next step; None if it does not."""
        if interrupt.requested and self._owes_evaluation():
            return "interrupted"
        if self.step >= self.total_steps:
            return "finished"
        if self.config["patience"] and self.best and self.best["evaluations_since"] >= self.config["patience"]:
            return "patience"
        return "interrupted" if interrupt.requested else None

    def _owes_evaluation(self) -> bool:
        """Every so many steps and after the last one, but not shortly before that, unless it is done."""
        if self.valid is None or not self._eval_every or self.step in (0, self.best and self.best["latest"]):
            return False
        left = self.total_steps - self.step
        return left == 0 or (self.step % self._eval_every == 0 and 2 * left >= self._eval_every)

    def _endless_batches(self) -> Generator[Batch, None, None]:
        while True:
            yield from self.loader

    def _train_step(self, batch: Batch) -> None:
        self._losses.append(self._update(batch))
        if len(self._losses) >= self._check_every:
            self._read_losses(self.step + 1)
        self._lr = self.optimizers[1].param_groups[0]["lr"]
        for scheduler in self.schedulers:
            scheduler.step()
        self.step += 1

    def _read_losses(self, last_step: int) -> None:
        """Fetch the losses up to that of `last_step`; UserError for the first that is NaN or infinite."""
        if not self._losses:
            return
        first_step = last_step + 1 - len(self._losses)
        losses = torch.stack(self._losses).tolist()
        self._losses.clear()
        for step, loss in enumerate(losses, start=first_step):
            if not math.isfinite(loss):
                raise self._diverged(f"the loss of step {step:,} is {loss}")
        self._interval_losses += losses

    def _report(self, progress: TrainingProgress) -> None:
        """Show the progress and, at every `_log_every`-th step and the last one, add a line to metrics.jsonl."""
        logs = self.step % self._log_every == 0 or self.step == self.total_steps
        if logs:
            self._read_losses(self.step)
        if self._losses:
            return  # on CUDA the latest loss is not known yet
        seconds = time.perf_counter() - self._interval_started
        rows = (self.step - self._interval_step) * self.config["batch_size"]
        loss = sum(self._interval_losses) / len(self._interval_losses)
        progress.update(self.step, loss, rows / seconds, (self.loader.wait_seconds - self._interval_waited) / seconds)
        if logs:
            self._write_log({"step": self.step, "epoch": self.step / self.config["steps_in_epoch"], "loss": loss,
                             "rows_per_s": rows / seconds, "lr": self._lr})
            self._interval_losses = []
            self._begin_interval()

    def _write_log(self, entry: dict[str, Any]) -> None:
        self._log.write(entry)
        self.log_chain = self._log.chain

    def _begin_interval(self) -> None:
        """The means and rates of the next log line count from here."""
        self._interval_started, self._interval_waited = time.perf_counter(), self.loader.wait_seconds
        self._interval_step = self.step

    def averaged(self) -> AbstractContextManager[None]:
        """Within: the model has the weights that it is evaluated with."""
        return nullcontext() if self.average is None else self.average.in_use()

    @contextmanager
    def _not_counted(self) -> Iterator[None]:
        """Leave the time within out of the interval's."""
        started = time.perf_counter()
        yield
        self._interval_started += time.perf_counter() - started

    def _evaluate(self, progress: TrainingProgress, valid: Split | Part, interrupt: Interrupt) -> None:
        """Metrics on the validation rows to metrics.jsonl; best.pt if the logloss is a new best.

        An interrupt ends it at once, without a trace: the run that goes on begins with it.
        """
        self._check_finite()
        try:
            with self._not_counted(), self.averaged():
                metrics = evaluate(self.model, valid, batch_size=self.config["batch_size"], device=self.device,
                                   precision=self.config["precision"], stop=lambda: bool(interrupt.requested))
        except Interrupted:
            return
        self._write_log({"event": "eval", "step": self.step, **metrics})
        better = self.best is None or metrics["logloss"] < self.best["logloss"]
        if better or self.best is None:
            self.best = {"step": self.step, "logloss": metrics["logloss"], "evaluations_since": 0, "latest": self.step}
        else:
            self.best = {**self.best, "evaluations_since": self.best["evaluations_since"] + 1, "latest": self.step}
        auc = "undefined" if metrics["auc"] is None else f"{metrics['auc']:.4f}"
        progress.message(f"step {self.step:,}: validation logloss {metrics['logloss']:.4f}, AUC {auc}"
                         + (" (best so far)" if better else ""))
        if better:
            self._save("best.pt")

    def _save_last(self) -> None:
        """last.pt of this step; best.pt under that name too where this process has just written it."""
        if self._best_step == self.step:
            self._still_here()
            link_file(self.directory / "best.pt", self.directory / "last.pt")
            self._last_step = self.step
        else:
            self._save("last.pt")

    def _save(self, name: str) -> None:
        self._check_finite()
        self._still_here()
        with self._not_counted():
            save_checkpoint(self.directory / name, model=self.model, optimizers=self.optimizers,
                            schedulers=self.schedulers, loader_state=self.loader.state_dict(), step=self.step,
                            config=self.config, artifacts=self.artifacts, best=self.best,
                            log={"chain": self.log_chain, "losses": self._interval_losses},
                            average=self.average.state_dict() if self.average else {})
        self._saved_step, self._saved_at = self.step, time.monotonic()
        if name == "last.pt":
            self._last_step = self.step
        else:
            self._best_step = self.step

    def _check_finite(self) -> None:
        """UserError for a loss not yet read, or a weight, that is NaN or infinite: nothing of that is ever saved."""
        self._read_losses(self.step)
        for name, weight in self.model.named_parameters():
            if weight.numel() and not torch.stack(weight.detach().aminmax()).isfinite().all():
                raise self._diverged(f"after step {self.step:,} the weights {name} are NaN or infinite")

    def _diverged(self, what: str) -> UserError:
        if self._saved_step is None:
            return UserError(f"{what}; there is no earlier checkpoint; {HINT}")
        path = self.directory / ("best.pt" if self.best and self.best["step"] == self._saved_step else "last.pt")
        return UserError(f"{what}; the last good checkpoint is {path} (step {self._saved_step:,}); {HINT}")


def steps_between(eval_every: float, steps_in_epoch: int) -> int:
    """Steps between two evaluations: `eval_every` itself, or that share of an epoch if it is below 1; 0: never.

    >>> steps_between(0.2, 100), steps_between(50, 100), steps_between(0.2, 3), steps_between(0, 100)
    (20, 50, 1, 0)
    """
    if eval_every >= 1:
        return round(eval_every)
    return max(1, round(eval_every * steps_in_epoch)) if eval_every else 0
