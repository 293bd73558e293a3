"""`ctr-data`: make synthetic Criteo rows, prepare raw rows for training, inspect what was prepared."""

import json
import math
from pathlib import Path
from typing import Any

import click

from ..command import PATH, PathType, run_command
from ..errors import UserError
from ..recipes import DEFAULT, NAMES, preparation_of
from .base import Base
from .inspect import inspect, report
from .meter import meter, prepare_with_meter
from .protocol import GOLD_ROWS, HASH_BINS, VALID_RATIO

NAME = "ctr-data"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Criteo-like data: make it, prepare it, inspect it."""


@command.command("synth")
@click.option("--rows", type=int, required=True, help="Lines to write, of each day with --days.")
@click.option("--days", type=int, help="As many files, FILE-1.gz and so on, with drift from day to day.")
@click.option("--seed", type=int, default=1, show_default=True, help="The same seed gives the same bytes.")
@click.option("--out", type=PathType(dir_okay=False), required=True, help="FILE or FILE.gz.")
def synth_command(rows: int, days: int | None, seed: int, out: Path) -> None:
    """Write synthetic rows in the raw Criteo format; OUT.truth.npy keeps their true probabilities.

    With --days each day has its file, its number before the suffixes of OUT. Day 1 is what there is without --days.
    """
    from .synth import check_days, write_days, write_synthetic  # imports torch: the other commands need not wait

    files = 1 if days is None else days
    check_days(rows, files)  # before a bar is drawn
    with meter(rows * files, "rows", "writing") as advance:
        if days is None:
            truths = [write_synthetic(out, rows=rows, seed=seed, progress=advance)]
        else:
            truths = write_days(out, rows=rows, days=days, seed=seed, progress=advance)
    for truth in truths:
        auc = "undefined" if math.isnan(truth.auc) else f"{truth.auc:.4f}"
        click.echo(f"{truth.file}: {rows:,} rows, label rate {truth.label_rate:.4f}; best possible logloss "
                   f"{truth.logloss:.4f}, AUC {auc}")


@command.command("prepare")
@click.option("--input", "inputs", type=PATH, multiple=True, required=True,
              help="Raw file, plain or gzip; more than one are taken in order.")
@click.argument("more", nargs=-1, type=PATH)
@click.option("--out", type=PATH, required=True, help="Directory to make.")
@click.option("--hash-bins", type=int, default=HASH_BINS, show_default=True, help="Ids of a field.")
@click.option("--valid-ratio", type=float, default=VALID_RATIO, show_default=True, help="Share of validation lines.")
@click.option("--gold-rows", type=int, default=GOLD_ROWS, show_default=True, help="First validation lines: gold.")
@click.option("--split", type=click.Choice(["hash", "tail"]), default="hash", show_default=True,
              help="Validation lines: drawn from the line's index, or the last ones, as time does.")
@click.option("--recipe", type=click.Choice(NAMES), help="Prepare what that recipe of ctr-train wants; options below "
              f"override single settings.  [default: {DEFAULT}]")
@click.option("--history/--no-history", default=None, help="52 more dense columns or not: click rate and frequency of "
              "each field's value.")
@click.option("--folds", type=int, help="The history of a training row comes from the rows of the other folds, so many "
              "in all; 0: from the rows before it.")
@click.option("--min-count", type=int, help="Values of fewer training rows share a row of their field in the table; 1: "
              "ids are hashes.")
@click.option("--missing-indicator/--no-missing-indicator", default=None, help="13 more dense columns or not: 1 where "
              "the number is missing.")
@click.option("--from", "run", type=PATH, help="Prepare later rows for going on with that run of "
              "ctr-train: its settings, ids and counts of values.")
@click.option("--on-bad-line", type=click.Choice(["error", "skip"]), default="error", show_default=True)
def prepare_command(inputs: tuple[Path, ...], more: tuple[Path, ...], out: Path, hash_bins: int, valid_ratio: float,
                    gold_rows: int, split: str, recipe: str | None, run: Path | None, on_bad_line: str,
                    **settings: Any) -> None:
    """Raw labelled rows -> train, valid and gold under OUT; further files may follow the options: --input A B C."""
    base = None
    if run is not None:
        for name, value in {"recipe": recipe, **settings}.items():
            if value is not None:
                raise UserError(f"--{name.replace('_', '-')} {value}: --from {run} takes the settings of that run")
        base = Base.load(run)
    prepare_with_meter([*inputs, *more], out, to_stdout=True, hash_bins=hash_bins, valid_ratio=valid_ratio,
                       gold_rows=gold_rows, split=split, recipe=recipe or DEFAULT, base=base, on_bad_line=on_bad_line,
                       **preparation_of(recipe or DEFAULT).settings(settings))


@command.command("inspect")
@click.argument("directory", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="The artifacts as JSON instead of tables.")
def inspect_command(directory: Path, as_json: bool) -> None:
    """Rows, label rates, missing rates, ids and collisions of DIRECTORY; verifies its checksums."""
    found = inspect(directory)
    click.echo(json.dumps(found, indent=2) if as_json else report(found))


def main() -> None:
    """Entry point of the console script."""
    run_command(command, NAME)


if __name__ == "__main__":
    main()
