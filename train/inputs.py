"""The data of a run: prepared directories as they are, raw files prepared first, with what the recipe wants."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from .data.artifacts import MODEL_FIELDS, Artifacts
from .data.base import Base
from .data.meter import prepare_with_meter, prepared_before
from .data.prepare import check_out
from .default_data import default_data
from .errors import UserError
from .files import sha256
from .recipes import DEFAULT, preparation_of

SETTINGS = ("valid_ratio", "gold_rows", "split", "folds", "continued", *MODEL_FIELDS)


@dataclass(frozen=True)
class Wanted:
    """What a run wants of its data.

    Attributes:
        paths: one prepared directory, or raw files in order; none: synthetic rows.
        prepared: where raw files are prepared; None: `data` under the run's directory.
        recipe: as asked for; None: the default one, or the one that the data were prepared for.
        options: of the preparation ("split", "valid_ratio"), in place of the protocol's where they are not None.
        base: the data of the run that is continued; None for a new model.
    """

    paths: Sequence[Path]
    prepared: Path | None
    recipe: str | None
    options: dict[str, Any]
    base: Base | None = None

    @property
    def raw(self) -> bool:
        """Whether there are raw files to prepare."""
        return bool(self.paths) and not any(path.is_dir() for path in self.paths)


def obtain(wanted: Wanted, directory: Path, *, begun: bool = False) -> Path:
    """The prepared directory that a run in `directory` trains on; raw files are prepared, once.

    begun: the run is there already, and goes on with the rows that it has.

    Raises UserError for a path that is neither, or both kinds together, and for options that do not go with them.
    """
    given = [f"--{name.replace('_', '-')} {value}" for name, value in
             {"prepared": wanted.prepared, **wanted.options}.items() if value is not None]
    if wanted.prepared is not None and wanted.prepared.resolve() == directory.resolve():
        raise UserError(f"--prepared {wanted.prepared} is the directory of the run; rows need one of their own")
    if wanted.raw:
        return _prepared(wanted, wanted.prepared or directory / "data", begun)
    if given:
        raise UserError(f"{given[0]} is for raw files: " + (f"{wanted.paths[0]} is prepared already" if wanted.paths
                                                            else "give some with --data"))
    if not wanted.paths:
        if wanted.base is not None:
            raise UserError("--from needs --data: which rows does the run go on with?")
        return default_data(recipe=wanted.recipe or DEFAULT)
    if len(wanted.paths) > 1:
        raise UserError(f"--data {' '.join(map(str, wanted.paths))}: one prepared directory, or raw files")
    Artifacts.load(wanted.paths[0])  # says what is wrong with it
    return wanted.paths[0]


def _prepared(wanted: Wanted, out: Path, begun: bool) -> Path:
    """The raw files prepared under `out`; what is there from the same bytes with the same settings is used again."""
    for path in wanted.paths:
        if not path.exists():
            raise UserError(f"{path} does not exist: --data takes raw files, or a directory made by `ctr-data prepare`")
    if wanted.options.get("valid_ratio") == 0.0:
        raise UserError("--valid-ratio 0: without validation lines there is nothing to evaluate the model on")
    recipe = wanted.recipe or DEFAULT
    arguments = preparation_of(recipe).settings({}) | {k: v for k, v in wanted.options.items() if v is not None}
    if (found := prepared_before(out, needed=begun)) is not None:
        expected = Artifacts(**arguments)
        if wanted.base is not None:
            expected = wanted.base.applied_to(expected)
        differences = [f"{name} is {getattr(found, name)!r}, not {getattr(expected, name)!r}" for name in SETTINGS
                       if getattr(found, name) != getattr(expected, name)] or other_sources(found, wanted.paths)
        if not differences:
            click.echo(f"using the rows prepared in {out}", err=True)
            return out
        if begun:
            raise UserError(f"{out} holds the rows that the run was begun with, prepared otherwise ({differences[0]}); "
                            "leave --data out, or choose another --out")
        if wanted.prepared is not None:
            raise UserError(f"{out} holds data prepared otherwise ({differences[0]}); choose another --prepared")
    check_out(out)
    found = prepare_with_meter(wanted.paths, out, recipe=recipe, base=wanted.base, **arguments)
    if found.label_rate["train"] in (0.0, 1.0):
        shutil.rmtree(out.resolve())
    check_two_classes(found, wanted.paths[0])
    return out


def other_sources(found: Artifacts, paths: Sequence[Path]) -> list[str]:
    """A phrase where data were not prepared from the bytes of these files, in this order."""
    if len(found.sources) != len(paths):
        return [f"from {len(found.sources)} files, not {len(paths)}"]
    for source, path in zip(found.sources, paths, strict=True):
        if path.stat().st_size != source["bytes"] or sha256(path) != source["sha256"]:
            return [f"from {source['file']} as it was then, not from {path} as it is"]
    return []


def check_two_classes(artifacts: Artifacts, data: Path) -> None:
    """UserError where the training rows have labels of one class only: there is nothing to learn."""
    rate = artifacts.label_rate["train"]
    if rate in (0.0, 1.0):
        raise UserError(f"{data}: all {artifacts.counts['train']:,} training labels are {rate:.0f}; rows with both "
                        "labels are needed")


def advice(recipe: str, artifacts: Artifacts, data: Path) -> str | None:
    """A line where another preparation of the same rows would serve the recipe better, with the command; else None."""
    preparation = preparation_of(recipe)
    if artifacts.continued or preparation.is_that_of(artifacts):
        return None
    files = " ".join(source["file"] for source in artifacts.sources)
    split = f" --split {artifacts.split} --valid-ratio {artifacts.valid_ratio:g}" if artifacts.split != "hash" else ""
    return (f"recipe {recipe} does better on rows prepared for it ({preparation.options()}): "
            f"ctr-data prepare --recipe {recipe}{split} --input {files} --out {data}-{recipe}")
