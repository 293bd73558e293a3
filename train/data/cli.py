"""`ctr-data`: make synthetic Criteo rows, prepare raw rows for training, inspect what was prepared."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from tqdm import tqdm

from ..command import run_command
from .artifacts import Artifacts
from .inspect import inspect, report
from .passes import passes
from .prepare import SPLITS, prepare
from .protocol import GOLD_ROWS, HASH_BINS, VALID_RATIO

NAME = "ctr-data"
LINE_SECONDS = 10.0  # between progress lines where stderr is no terminal


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Criteo-like data: make it, prepare it, inspect it."""


@command.command("synth")
@click.option("--rows", type=int, required=True, help="Lines to write, of each day with --days.")
@click.option("--days", type=int, help="As many files, FILE-1.gz and so on, with drift from day to day.")
@click.option("--seed", type=int, default=1, show_default=True, help="The same seed gives the same bytes.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="FILE or FILE.gz.")
def synth_command(rows: int, days: int | None, seed: int, out: Path) -> None:
    """Write synthetic rows in the raw Criteo format; OUT.truth.npy keeps their true probabilities.

    With --days each day has its file, its number before the suffixes of OUT. Day 1 is what there is without --days.
    """
    from .synth import check_days, write_days, write_synthetic  # imports torch: the other commands need not wait

    files = 1 if days is None else days
    check_days(rows, files)  # before a bar is drawn
    with _meter(rows * files, "rows", "writing") as advance:
        if days is None:
            truths = [write_synthetic(out, rows=rows, seed=seed, progress=advance)]
        else:
            truths = write_days(out, rows=rows, days=days, seed=seed, progress=advance)
    for truth in truths:
        click.echo(f"{truth.file}: {rows:,} rows, label rate {truth.label_rate:.4f}; best possible logloss "
                   f"{truth.logloss:.4f}, AUC {truth.auc:.4f}")


@command.command("prepare")
@click.option("--input", "inputs", type=click.Path(path_type=Path), multiple=True, required=True,
              help="Raw file, plain or gzip; more than one are taken in order.")
@click.argument("more", nargs=-1, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory to make.")
@click.option("--hash-bins", type=int, default=HASH_BINS, show_default=True, help="Ids of a field.")
@click.option("--valid-ratio", type=float, default=VALID_RATIO, show_default=True, help="Share of validation lines.")
@click.option("--gold-rows", type=int, default=GOLD_ROWS, show_default=True, help="First validation lines: gold.")
@click.option("--missing-indicator", is_flag=True, help="13 more dense columns: 1 where the number is missing.")
@click.option("--split", type=click.Choice(["hash", "tail"]), default="hash", show_default=True,
              help="Validation lines: drawn from the line's index, or the last ones.")
@click.option("--min-count", type=int, default=1, show_default=True,
              help="Values of fewer training rows share their field's rare id.")
@click.option("--history", is_flag=True, help="52 more dense columns: click rate and frequency of each value so far.")
@click.option("--on-bad-line", type=click.Choice(["error", "skip"]), default="error", show_default=True)
def prepare_command(inputs: tuple[Path, ...], more: tuple[Path, ...], out: Path, hash_bins: int, valid_ratio: float,
                    gold_rows: int, missing_indicator: bool, split: str, min_count: int, history: bool,
                    on_bad_line: str) -> None:
    """Raw labelled rows -> train, valid and gold under OUT; further files may follow the options: --input A B C."""
    files = [*inputs, *more]
    total = sum(os.path.getsize(file) for file in files if file.exists())
    total *= passes(Artifacts(split=split, min_count=min_count, history=history))
    started = time.monotonic()
    with _meter(total, "B", "preparing") as advance:
        found = prepare(files, out, hash_bins=hash_bins, valid_ratio=valid_ratio, gold_rows=gold_rows,
                        missing_indicator=missing_indicator, split=split, min_count=min_count, history=history,
                        on_bad_line=on_bad_line,
                        progress=lambda lines, size: advance(size, lines))
    lines = sum(source["rows"] for source in found.sources)
    seconds = time.monotonic() - started
    click.echo(f"{out}: " + ", ".join(f"{name} {found.counts[name]:,}" for name in SPLITS) +
               f" rows; {lines:,} lines in {seconds:.1f} s, {lines / seconds:,.0f} rows/s")
    if found.skipped_lines:
        click.echo(f"{found.skipped_lines:,} bad lines skipped")


@command.command("inspect")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="The artifacts as JSON instead of tables.")
def inspect_command(directory: Path, as_json: bool) -> None:
    """Rows, label rates, missing rates, ids and collisions of DIRECTORY; verifies its checksums."""
    found = inspect(directory)
    click.echo(json.dumps(found, indent=2) if as_json else report(found))


@contextmanager
def _meter(total: int, unit: str, what: str) -> Iterator[Callable[..., None]]:
    """advance(count of units, lines=count) -> a bar on a terminal, else a line now and then, on stderr."""
    lines_done = done = 0
    started = shown = time.monotonic()
    bar = tqdm(total=total, unit=unit, unit_scale=True, dynamic_ncols=True, desc=what) if sys.stderr.isatty() else None

    def advance(count: int, lines: int | None = None) -> None:
        nonlocal lines_done, done, shown
        done += count
        lines_done += count if lines is None else lines
        now = time.monotonic()
        rate = lines_done / max(now - started, 1e-9)
        if bar is not None:
            bar.set_postfix_str(f"{rate:,.0f} rows/s", refresh=False)
            bar.update(count)
        elif now - shown >= LINE_SECONDS:
            left = (now - started) / max(done, 1) * max(total - done, 0)
            click.echo(f"{what}: {lines_done:,} rows, {rate:,.0f} rows/s, {left:,.0f} s left", err=True)
            shown = now

    try:
        yield advance
    finally:
        if bar is not None:
            bar.close()


def main() -> None:
    """Entry point of the console script."""
    run_command(command, NAME)


if __name__ == "__main__":
    main()
