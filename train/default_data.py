"""The data that `ctr-train` uses without --data: synthetic rows, made and prepared on first use."""

from pathlib import Path

import click

from .data.prepare import prepare
from .data.protocol import GOLD_ROWS, VALID_RATIO
from .data.synth import write_synthetic

ROWS = 500_000
SEED = 1
HASH_BINS = 200_000  # a smaller table than Criteo's: the rows hold fewer distinct values


def default_data(rows: int = ROWS, seed: int = SEED, hash_bins: int = HASH_BINS) -> Path:
    """`data/synthetic-<rows>-<seed>` under the working directory; made first, with a message, if it is not there."""
    directory = Path("data") / f"synthetic-{rows}-{seed}"
    if (directory / "artifacts.json").exists():
        return directory
    raw = directory.with_suffix(".tsv")
    if not raw.exists():
        click.echo(f"making {rows:,} synthetic rows in {raw}", err=True)
        write_synthetic(raw, rows=rows, seed=seed)
    click.echo(f"preparing them in {directory}", err=True)
    prepare([raw], directory, hash_bins=hash_bins, valid_ratio=VALID_RATIO, gold_rows=GOLD_ROWS,
            missing_indicator=False, on_bad_line="error", progress=None)
    return directory
