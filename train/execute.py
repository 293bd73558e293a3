"""A training run with all of its settings known: model and data are opened, trained, finished."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from .checkpoint import build_model, newest_checkpoint
from .continued import Continued
from .data.artifacts import Artifacts
from .data.dataset import Part, Split, open_split, open_verified
from .data.loader import Loader
from .data.values import FILE as VALUES_FILE
from .data.values import check_file
from .errors import UserError
from .files import copy_file
from .finish import finish, result_table
from .graph import CudaRecorder, choose_cuda_graph
from .interrupt import Interrupt, Killed, exit_code
from .loop import Trainer
from .machine import choose_device, resolve_kernels, set_up_torch, versions
from .recipes import HYPERPARAMETERS
from .records import write_config

MAX_VALIDATION_ROWS = 200_000  # more would tell little more, and take long


def execute(directory: Path, settings: dict[str, Any], data: Path, *, resumed: bool = False,
            continued: Continued | None = None, note: str | None = None,
            still_here: Callable[[], None] = lambda: None) -> int:
    """Train in `directory` on the prepared rows in `data`; prints the result.

    Args:
        settings: every hyperparameter, "model", "recipe", "seed", "deterministic", "from", and the machine's.
        resumed: go on from the newest checkpoint in `directory`.
        continued: the run whose model a new one begins with.
        note: a line to say before training begins.
        still_here: raises UserError where `directory` was moved or removed meanwhile.

    Returns: the exit code, 0; where a signal stopped the run, 130 or 143.
    """
    name, checkpoint = "", None
    if resumed and (newest := newest_checkpoint(directory, settings["model"])) is not None:
        name, checkpoint = newest
    elif resumed:
        click.echo(f"{directory} holds no checkpoint yet: beginning again", err=True)
    if resumed and settings["versions"] != versions():
        _tell_versions(settings["versions"])
    device = choose_device(settings["device"])
    set_up_torch(threads=settings["threads"], precision=settings["precision"],
                 deterministic=settings["deterministic"])
    kernels = settings["kernels"] or "auto"
    resolved = resolve_kernels(kernels, device, settings["model"])
    graphed = choose_cuda_graph(settings["cuda_graph"], device, resolved)
    artifacts, train, gold = _open_data(data)
    if checkpoint is not None:
        _check_run(directory, settings, checkpoint["config"])
        check_data(data, artifacts, Artifacts.from_dict(checkpoint["artifacts"]))
    rows, valid = divide(train, settings["validation_share"])
    loader = Loader(rows, batch_size=settings["batch_size"], shuffle=True, seed=settings["seed"], drop_last=True,
                    device=device)
    steps_in_epoch = min(settings["steps_per_epoch"] or len(loader), len(loader))
    config = {
        **settings, "data": str(data.resolve()), "device": str(device), "threads": torch.get_num_threads(),
        "kernels": kernels, "kernels_resolved": resolved, "cuda_graph_resolved": graphed,
        "hash_bins": artifacts.hash_bins, "table_rows": artifacts.table_rows, "num_dense": artifacts.num_dense,
        "history": artifacts.history, "train_rows": train.rows, "steps_in_epoch": steps_in_epoch,
        "total_steps": settings["epochs"] * steps_in_epoch, "versions": versions(),
    }
    torch.manual_seed(settings["seed"])
    model = build_model(config, artifacts, kernels)
    first = None
    if checkpoint is None and config["from"] is not None:
        first = (continued or Continued.load(Path(config["from"]))).state(model, artifacts)
    model.to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config["precision"] == "bf16"):
        config["kernels_resolved"] = model.operations()
    directory.mkdir(parents=True, exist_ok=True)
    write_config(directory, config)
    artifacts.save(directory)
    if artifacts.counts_values:
        copy_file(data / VALUES_FILE, directory / VALUES_FILE)  # raw rows get the same features from the run alone
    trainer = Trainer(directory, config=config, artifacts=artifacts, model=model, loader=loader, valid=valid,
                      recorder=CudaRecorder(device) if graphed else None, still_here=still_here)
    if first is not None:
        trainer.begin_with(*first)
    if checkpoint is not None:
        trainer.restore(checkpoint, name)
        click.echo(f"going on after step {trainer.step:,} of {trainer.total_steps:,}", err=True)
    checkpoint = first = None
    if note is not None:
        click.echo(note, err=True)
    try:
        with Interrupt() as interrupt:
            outcome = trainer.train(interrupt)
    except torch.OutOfMemoryError as error:
        raise UserError(f"{device} ran out of memory at step {trainer.step + 1:,}; "
                        f"choose a --batch-size below {config['batch_size']:,}") from error
    finally:
        loader.close()
    if outcome == "interrupted":
        click.echo(f"interrupted after step {trainer.step:,} of {trainer.total_steps:,}, which is saved; go on with: "
                   f"ctr-train --resume --out {directory}", err=True)
        return exit_code(interrupt.requested)
    if outcome == "patience":
        click.echo(f"stopped after step {trainer.step:,}: no better validation logloss for {config['patience']} "
                   "evaluations", err=True)
    still_here()
    try:
        finish(directory, trainer, train, data, gold)
    except (KeyboardInterrupt, Killed):
        click.echo("all steps are done and saved; calibration and result come with: ctr-train --resume --out "
                   f"{directory}", err=True)
        raise
    click.echo(result_table(directory))
    return 0


def divide(train: Split, share: float) -> tuple[Split | Part, Split | Part | None]:
    """(rows to train on, rows that watch): the last `share` of all rows watch, at most MAX_VALIDATION_ROWS; or none."""
    watching = min(round(share * train.rows), MAX_VALIDATION_ROWS)
    if not watching:
        if share:
            click.echo(f"note: --validation-share {share:g} of {train.rows:,} rows is none: nothing watches the run",
                       err=True)
        return train, None
    if watching >= train.rows:
        raise UserError(f"--validation-share {share:g} of {train.rows:,} rows leaves none to train on")
    return train.part(0, train.rows - watching), train.part(train.rows - watching, train.rows)


def _open_data(data: Path) -> tuple[Artifacts, Split, Split]:
    """Artifacts, training and gold rows; UserError where a split is not what the artifacts say."""
    artifacts = Artifacts.load(data)
    open_split(data, "valid")  # not read by a training run
    if artifacts.counts_values:
        check_file(data / VALUES_FILE, artifacts.values)
    gold = open_verified(data, "gold", artifacts)  # and held: a preparation meanwhile does not change it
    return artifacts, open_verified(data, "train", artifacts), gold


def _tell_versions(then: dict[str, Any]) -> None:
    """A line for software that is not that of the run's beginning: from here on the last bits may differ."""
    now = versions()
    changed = [f"{name} {then.get(name)}, now {now[name]}" for name in now if then.get(name) != now[name]]
    click.echo(f"the run began with {'; '.join(changed)}: it goes on, but not bit for bit as it would have", err=True)


def _check_run(directory: Path, settings: dict[str, Any], saved: dict[str, Any]) -> None:
    """UserError unless the checkpoint is of the run that config.json describes."""
    for name in (*HYPERPARAMETERS, "model", "recipe", "seed", "deterministic", "from"):
        if saved.get(name) != settings[name]:
            raise UserError(f"the checkpoint in {directory} is of a run with {name} {saved.get(name)}, its config.json "
                            f"says {settings[name]}: one of them belongs elsewhere")


def check_data(data: Path, now: Artifacts, then: Artifacts) -> None:
    """UserError unless the data are those that the run began with."""
    differences = then.differences(now)
    for name in ("train", "gold"):
        if not differences and now.outputs[name]["sha256"] != then.outputs[name]["sha256"]:
            differences = [f"the {name} rows are others"]
    if differences:
        raise UserError(f"{data} is not what the run was trained on: {'; '.join(differences)}")
