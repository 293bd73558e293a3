"""The data that `ctr-train` uses without --data: synthetic rows, made and prepared on first use."""

from pathlib import Path

import click

from .data.meter import prepare_with_meter, prepared_before
from .data.synth import write_synthetic
from .recipes import DEFAULT, preparation_of

ROWS = 200_000
SEED = 1
HASH_BINS = 200_000  # a smaller table than Criteo's: the rows hold fewer distinct values


def default_data(rows: int = ROWS, seed: int = SEED, hash_bins: int = HASH_BINS, recipe: str = DEFAULT) -> Path:
    """`data/synthetic-<rows>-<seed>-<recipe>` under the working directory; made, with a message, if it is not there."""
    raw = Path("data") / f"synthetic-{rows}-{seed}.tsv"
    directory = raw.with_name(f"{raw.stem}-{recipe}")
    if prepared_before(directory) is not None:
        return directory
    if not raw.exists():
        click.echo(f"making {rows:,} synthetic rows in {raw}", err=True)
        write_synthetic(raw, rows=rows, seed=seed)
    prepare_with_meter([raw], directory, hash_bins=hash_bins, recipe=recipe, **preparation_of(recipe).settings({}))
    return directory
