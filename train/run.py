"""One training run from its settings to its result: a directory with config, metrics, checkpoints and gold.json."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from .continued import Continued
from .data.artifacts import FILE as ARTIFACTS
from .data.artifacts import Artifacts
from .errors import UserError
from .execute import check_data, execute
from .files import made_directory
from .finish import result_table
from .inputs import Wanted, advice, check_two_classes, obtain, other_sources
from .locks import lock, sweep_all
from .machine import choose_device, resolve_kernels
from .recipes import DEFAULT, Facts, check_hyperparameters, fit_batch, resolve_recipe
from .records import CONFIG, RESULT, read_config

# Settings that an interrupted run takes anew when it goes on; all others must stay as they were.
MACHINE = ("device", "threads", "kernels", "cuda_graph")


@dataclass
class Request:
    """What the command line asks for; None or empty: not said.

    Attributes:
        hyperparameters: names as in `recipes.Recipe`.
        machine: "device", "threads", "kernels", "cuda_graph".
        data: a prepared directory, or raw files.
        prepared, preparation: where and how raw files are prepared; see `inputs.Wanted`.
        run_from: the run to go on with, on later rows.
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
    data: tuple[Path, ...] = ()
    prepared: Path | None = None
    preparation: dict[str, Any] = field(default_factory=dict)
    run_from: Path | None = None


def run(request: Request) -> int:
    """Train, or go on training, evaluate on the gold rows and print the result.

    Returns: the exit code, 0; where a signal stopped the run, 130 (Ctrl-C) or 143 (`kill`).
    """
    if request.run_from is None and request.model is None and not request.resume:
        raise UserError("--model is needed: dcnv2, autoint or ft")
    continued = None
    if request.run_from is not None:
        continued = Continued.load(request.run_from)
        _check_continued(request, continued)
    directory = _directory(request, continued)
    if request.resume and not (directory / CONFIG).exists():
        raise UserError(f"{directory} holds no run to resume (no {CONFIG})")
    if (request.resume or request.skip_if_done) and (directory / RESULT).exists():
        return _go_on(directory, request, continued)  # only shows what is there
    with _occupied(directory) as still_here:
        if (directory / CONFIG).exists():
            if not (request.resume or request.skip_if_done):
                raise UserError(f"{directory} already holds a run; go on with it (--resume) or choose another --out")
            return _go_on(directory, request, continued, still_here)
        return _begin(directory, request, continued, still_here)


@contextmanager
def _occupied(directory: Path) -> Iterator[Callable[[], None]]:
    """Within: the directory is there, and this process alone works in it. It goes again if nothing was put there.

    What is yielded raises UserError once the directory is another one.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file; a run needs a directory of its own: choose another --out")
    if (directory / ARTIFACTS).exists() and not (directory / CONFIG).exists():
        raise UserError(f"{directory} holds prepared data; a run needs a directory of its own: choose another --out")
    with made_directory(directory, directory), lock(directory / ".lock", str(directory)) as still_here:
        sweep_all(directory)
        yield still_here


def _begin(directory: Path, request: Request, continued: Continued | None, still_here: Callable[[], None]) -> int:
    """A new run. All that can be wrong with the request is found before its rows are prepared."""
    model = request.model or (continued.config["model"] if continued else "")
    _settings(request, model, request.recipe or DEFAULT, Facts(), continued)
    place = choose_device(request.machine.get("device"))
    resolve_kernels(request.machine.get("kernels") or "auto", place, model)
    data = obtain(_wanted(request, request.recipe, continued), directory)
    still_here()
    artifacts, note = Artifacts.load(data), None
    check_two_classes(artifacts, data)
    if continued is not None:
        continued.check_data(data, artifacts)
        recipe = continued.config["recipe"]
    else:
        recipe = request.recipe or artifacts.recipe or DEFAULT
        note = advice(recipe, artifacts, data)
    settings = _settings(request, model, recipe, Facts.of(artifacts), continued)
    machine = {name: request.machine.get(name) for name in MACHINE}
    return execute(directory, {**settings, **machine}, data, continued=continued, note=note, still_here=still_here)


def _go_on(directory: Path, request: Request, continued: Continued | None,
           still_here: Callable[[], None] = lambda: None) -> int:
    """The run that is there: its result, or on from its newest checkpoint."""
    stored = read_config(directory)
    asked = {"model": request.model, "recipe": request.recipe, "seed": request.seed,
             "deterministic": request.deterministic, **request.hyperparameters}
    if request.skip_if_done:
        asked = _settings(request, stored["model"] if request.model is None else request.model,
                          request.recipe or stored["recipe"], Facts(stored["train_rows"], stored["history"]), continued)
    for name, value in asked.items():
        if value is not None and value != stored[name]:
            raise UserError(f"the run in {directory} has {name} {stored[name]}, not {value}; "
                            "choose another --out for a new run")
    if continued is not None and str(continued.run.resolve()) != stored["from"]:
        before = f"goes on from {stored['from']}" if stored["from"] else "began anew"
        raise UserError(f"the run in {directory} {before}; it does not go on from {continued.run}")
    _check_data_options(request)
    if (directory / RESULT).exists():
        if request.data:
            _check_same_data(directory, request)
        click.echo(result_table(directory))
        return 0
    data = Path(stored["data"])
    if request.data:  # prepared as the run's were, if they are raw
        if continued is None and stored["from"] is not None:
            continued = Continued.load(Path(stored["from"]))
        data = obtain(_wanted(request, stored["recipe"], continued), directory, begun=True)
    elif not data.exists():
        raise UserError(f"{data}, on which the run was trained, is gone; say with --data where its rows are now")
    machine = {name: value for name, value in request.machine.items() if value is not None}
    return execute(directory, {**stored, **machine}, data, resumed=True, continued=continued, still_here=still_here)


def _check_data_options(request: Request) -> None:
    """UserError for an option of raw rows where there are none to prepare."""
    raw = bool(request.data) and not any(path.is_dir() for path in request.data)
    for name, value in {"prepared": request.prepared, **request.preparation}.items():
        if value is not None and not raw:
            raise UserError(f"--{name.replace('_', '-')} {value} is for raw files: give some with --data")


def _check_same_data(directory: Path, request: Request) -> None:
    """UserError unless the finished run in `directory` was trained on these raw files, or this prepared directory."""
    own, paths = Artifacts.load(directory), request.data
    for name, value in request.preparation.items():
        if value not in (None, getattr(own, name)):
            raise UserError(f"the run in {directory} was trained on rows prepared with {name} {getattr(own, name)}, "
                            f"not {value}; choose another --out")
    if any(path.is_dir() for path in paths):
        check_data(paths[0], Artifacts.load(paths[0]), own)
    elif differences := other_sources(own, paths):
        raise UserError(f"the run in {directory} was trained on rows {differences[0]}; choose another --out")


def _wanted(request: Request, recipe: str | None, continued: Continued | None) -> Wanted:
    return Wanted(request.data, request.prepared, recipe, request.preparation,
                  None if continued is None else continued.base)


def _directory(request: Request, continued: Continued | None) -> Path:
    if request.out is not None:
        return request.out
    if request.resume or request.skip_if_done:
        raise UserError(f"--{'resume' if request.resume else 'skip-if-done'} needs --out: which run?")
    model = request.model or (continued.config["model"] if continued else "")
    return Path("runs") / f"{model}-{time.strftime('%Y%m%d-%H%M%S')}"


def _check_continued(request: Request, continued: Continued) -> None:
    """UserError where the request asks for what only a new model could be."""
    for name, value in (("model", request.model), ("recipe", request.recipe)):
        if value not in (None, continued.config[name]):
            raise UserError(f"--{name} {value}: the run in {continued.run} has {name} {continued.config[name]}; leave "
                            "the option out, or train a new model without --from")


def _settings(request: Request, model: str, recipe: str, facts: Facts, continued: Continued | None) -> dict[str, Any]:
    """Every setting but the machine's, for data of which `facts` are known."""
    if continued is None:
        values = resolve_recipe(recipe, model, request.hyperparameters, facts)
    else:
        recipe = continued.config["recipe"]
        values = continued.hyperparameters(request.hyperparameters)
        check_hyperparameters(values)
        if request.hyperparameters.get("batch_size") is None:
            values |= fit_batch(recipe, values["batch_size"], values["lr"], facts)
    return {"model": model, "recipe": recipe, **values, "seed": request.seed or 0,
            "deterministic": bool(request.deterministic),
            "from": None if continued is None else str(continued.run.resolve())}
