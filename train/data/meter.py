"""How far preparing is: a bar on a terminal, else a line now and then; and what came out, in a line."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from ..errors import UserError
from ..locks import wait_for
from .artifacts import FILE, Artifacts
from .passes import passes
from .prepare import SPLITS, lock_file, prepare

LINE_SECONDS = 10.0  # between progress lines where stderr is no terminal


def prepare_with_meter(inputs: Sequence[Path], out: Path, *, to_stdout: bool = False, **settings: Any) -> Artifacts:
    """`prepare.prepare` with its progress on stderr, and a line of what came out there, or on stdout."""
    told = {name: settings[name] for name in ("split", "min_count", "history", "folds") if name in settings}
    asked = Artifacts(**told)
    if settings.get("base") is not None:
        asked = settings["base"].applied_to(asked)
    for again in [file for i, file in enumerate(inputs) if any(_is_same(file, other) for other in inputs[:i])]:
        click.echo(f"note: {again} is given more than once, and so are its rows", err=True)
    total = sum(os.path.getsize(file) for file in inputs if file.is_file()) * passes(asked)
    started = time.monotonic()
    with meter(total, "B", f"preparing {out}") as advance:
        found = prepare(inputs, out, progress=lambda lines, size: advance(size, lines), **settings)
    lines = sum(source["rows"] for source in found.sources)
    seconds = time.monotonic() - started
    click.echo(f"{out}: " + ", ".join(f"{name} {found.counts[name]:,}" for name in SPLITS) +
               f" rows; {lines:,} lines in {seconds:.1f} s, {lines / seconds:,.0f} rows/s", err=not to_stdout)
    if found.skipped_lines:
        click.echo(f"{found.skipped_lines:,} of {lines:,} lines are bad and skipped, the first: {found.first_skipped}",
                   err=not to_stdout)
    return found


def prepared_before(out: Path, *, needed: bool = False) -> Artifacts | None:
    """What is prepared in `out`, once no other process works on it; None without anything.

    None, too, with a line, where it is damaged or of another version and may be made anew; UserError if it is `needed`.
    """
    wait_for(lock_file(out), str(out))
    if not (out / FILE).exists():
        return None
    try:
        return Artifacts.load(out)
    except UserError as error:
        if needed:
            raise
        click.echo(f"preparing the rows again: {error}", err=True)
        return None


def _is_same(file: Path, other: Path) -> bool:
    return file.exists() and other.exists() and file.samefile(other)


@contextmanager
def meter(total: int, unit: str, what: str) -> Iterator[Callable[..., None]]:
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
