"""One training run from its settings to its result: a directory with config, metrics, checkpoints and gold.json."""

import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch

from .checkpoint import build_model, load_checkpoint, scored_weights
from .data.artifacts import Artifacts
from .data.dataset import Part, Split, open_split
from .data.loader import Loader
from .data.values import FILE as VALUES_FILE
from .default_data import default_data
from .errors import UserError
from .evaluate import gold_report
from .files import copy_file, read_json, write_json
from .graph import CudaRecorder, choose_cuda_graph
from .interrupt import Interrupt, exit_code
from .loop import Trainer
from .machine import choose_device, resolve_kernels, set_up_torch, versions
from .recipes import DEFAULT, resolve_recipe
from .runlog import read_log, rows_per_second

# Settings that an interrupted run takes anew when it goes on; all others must stay as they were.
MACHINE = ("data", "device", "threads", "kernels", "cuda_graph")


@dataclass
class Request:
    """What the command line asks for; None: not said.

    Attributes:
        hyperparameters: names as in `recipes.Recipe`.
        machine: "data", "device", "threads", "kernels", "cuda_graph".
    """

    model: str | None = None
    recipe: str | None = None
    seed: int | None = None
    deterministic: bool | None = None
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    out: Path | None = None
    resume: bool = False
    skip_if_done: bool = False


def run(request: Request) -> int:
    """Train, or go on training, evaluate on the gold rows and print the result.

    Returns: the exit code, 0; where a signal stopped the run, 130 (Ctrl-C) or 143 (`kill`).
    """
    directory = _directory(request)
    exists = (directory / "config.json").exists()
    if request.resume and not exists:
        raise UserError(f"{directory} holds no run to resume (no config.json)")
    if exists and not (request.resume or request.skip_if_done):
        raise UserError(f"{directory} already holds a run; go on with it (--resume) or choose another --out")
    if exists:
        settings = read_json(directory / "config.json")
        _check_same(directory, settings, request if request.resume else _complete(request))
        if (directory / "gold.json").exists():
            click.echo(result_table(directory))
            return 0
        if request.resume and not (directory / "last.pt").exists():
            raise UserError(f"{directory} holds a run without a checkpoint (no last.pt); remove it and start again")
        settings |= {key: value for key, value in request.machine.items() if value is not None}
    else:
        complete = _complete(request)
        settings = {"model": complete.model, "recipe": complete.recipe, **complete.hyperparameters,
                    "seed": complete.seed, "deterministic": complete.deterministic,
                    **{key: request.machine.get(key) for key in MACHINE}}
    checkpoint = None
    if exists and (directory / "last.pt").exists():
        checkpoint = load_checkpoint(directory / "last.pt", settings["model"])
    return _train(directory, settings, checkpoint)


def _directory(request: Request) -> Path:
    if request.out is not None:
        return request.out
    if request.resume or request.skip_if_done:
        raise UserError(f"--{'resume' if request.resume else 'skip-if-done'} needs --out: which run?")
    return Path("runs") / f"{_model(request)}-{time.strftime('%Y%m%d-%H%M%S')}"


def _model(request: Request) -> str:
    if request.model is None:
        raise UserError("--model is needed: dcnv2, autoint or ft")
    return request.model


def _complete(request: Request) -> Request:
    """The request with every setting but the machine's filled in."""
    recipe = request.recipe or DEFAULT
    model = _model(request)
    return Request(model, recipe, request.seed or 0, bool(request.deterministic),
                   resolve_recipe(recipe, model, request.hyperparameters))


def _check_same(directory: Path, stored: dict[str, Any], request: Request) -> None:
    """UserError where the request says something else than the run that is there."""
    asked = {"model": request.model, "recipe": request.recipe, "seed": request.seed,
             "deterministic": request.deterministic, **request.hyperparameters}
    for name, value in asked.items():
        if value is not None and value != stored[name]:
            raise UserError(f"the run in {directory} has {name} {stored[name]}, not {value}; "
                            "choose another --out for a new run")


def _train(directory: Path, settings: dict[str, Any], checkpoint: dict[str, Any] | None) -> int:
    device = choose_device(settings["device"])
    set_up_torch(threads=settings["threads"], precision=settings["precision"],
                 deterministic=settings["deterministic"])
    kernels = settings["kernels"] or "auto"
    resolved = resolve_kernels(kernels, device, settings["model"])
    graphed = choose_cuda_graph(settings["cuda_graph"], device, resolved)
    data = Path(settings["data"]) if settings["data"] else default_data()
    artifacts, train, valid, gold = _open_data(data)
    if checkpoint is not None:
        _check_data(data, artifacts, Artifacts.from_dict(checkpoint["artifacts"]))
    loader = Loader(train, batch_size=settings["batch_size"], shuffle=True, seed=settings["seed"], drop_last=True,
                    device=device)
    steps_in_epoch = min(settings["steps_per_epoch"] or len(loader), len(loader))
    config = {
        **settings, "data": str(data.resolve()), "device": str(device), "threads": torch.get_num_threads(),
        "kernels": kernels, "kernels_resolved": resolved, "cuda_graph_resolved": graphed,
        "hash_bins": artifacts.hash_bins, "num_dense": artifacts.num_dense, "train_rows": train.rows,
        "steps_in_epoch": steps_in_epoch,
        "total_steps": settings["epochs"] * steps_in_epoch, "versions": versions(),
    }
    torch.manual_seed(settings["seed"])
    model = build_model(config, artifacts, kernels).to(device)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", config)
    artifacts.save(directory)
    if artifacts.counts_values:
        copy_file(data / VALUES_FILE, directory / VALUES_FILE)  # raw rows get the same features from the run alone
    trainer = Trainer(directory, config=config, artifacts=artifacts, model=model, loader=loader,
                      valid=_selection_rows(valid, gold), recorder=CudaRecorder(device) if graphed else None)
    if checkpoint is not None:
        trainer.restore(checkpoint)
        click.echo(f"going on after step {trainer.step:,} of {trainer.total_steps:,}", err=True)
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
    click.echo(f"evaluating on {gold.rows:,} gold rows", err=True)
    _evaluate_gold(directory, trainer, data)
    click.echo(result_table(directory))
    return 0


def _open_data(data: Path) -> tuple[Artifacts, Split, Split, Split]:
    artifacts = Artifacts.load(data)
    splits = [open_split(data, name) for name in ("train", "valid", "gold")]
    for name, split in zip(("train", "valid", "gold"), splits, strict=True):
        if (split.rows, split.num_dense) != (artifacts.counts[name], artifacts.num_dense):
            raise UserError(f"{split.path} holds {split.rows:,} rows of {split.num_dense} numeric features, its "
                            f"artifacts.json says {artifacts.counts[name]:,} of {artifacts.num_dense}: prepare again")
    train, valid, gold = splits
    return artifacts, train, valid, gold


def _check_data(data: Path, now: Artifacts, then: Artifacts) -> None:
    """UserError unless the data are those that the run began with."""
    differences = then.differences(now)
    if not differences and now.outputs["train"]["sha256"] != then.outputs["train"]["sha256"]:
        differences = ["the training rows are others"]
    if differences:
        raise UserError(f"{data} is not what the run was trained on: {'; '.join(differences)}")


def _selection_rows(valid: Split, gold: Split) -> Split | Part:
    """Validation rows that choose the best checkpoint: those behind the gold rows, which come first.

    Where there are none (fewer validation rows than gold rows were asked for) it is the gold rows themselves: the
    gold metrics of the best checkpoint are then a little optimistic.
    """
    return valid.part(gold.rows, valid.rows) if valid.rows > gold.rows else valid


def _evaluate_gold(directory: Path, trainer: Trainer, data: Path) -> None:
    """gold.json: metrics of the best weights, or of the last ones if there was no evaluation."""
    name = "last.pt"
    if trainer.best is not None:
        name = "best.pt"
        trainer.model.load_state_dict(scored_weights(load_checkpoint(directory / name)))
    config = trainer.config
    with trainer.averaged() if trainer.best is None else nullcontext():
        report = gold_report(trainer.model, data, trainer.artifacts, batch_size=config["batch_size"],
                             device=trainer.device, precision=config["precision"])
    trained = {"checkpoint": name, "steps": trainer.step, "rows_trained": trainer.step * config["batch_size"],
               "rows_per_s": rows_per_second(read_log(directory))}
    write_json(directory / "gold.json", {**report, **trained})


def result_table(directory: Path) -> str:
    """The result of a finished run, a line a figure."""
    config, gold = read_json(directory / "config.json"), read_json(directory / "gold.json")
    best = gold.get("best_possible")

    def against(metric: str) -> str:
        value = "undefined" if gold[metric] is None else f"{gold[metric]:.4f}"
        return value if best is None else f"{value}   (best possible {best[metric]:.4f})"

    lines = {
        "model": f"{config['model']} ({config['variant']}), recipe {config['recipe']}",
        "gold rows": f"{gold['rows']:,}",
        "logloss": against("logloss"),
        "AUC": against("auc"),
        "rows trained": f"{gold['rows_trained']:,} in {gold['steps']:,} steps",
        "rows/s": f"{gold['rows_per_s']:,.0f}",
        "run": str(directory),
    }
    return "\n".join(f"{name:<14}{value}" for name, value in lines.items())
