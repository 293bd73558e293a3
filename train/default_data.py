"""The data that `ctr-train` uses without --data: synthetic rows, made and prepared on first use."""

from pathlib import Path

import click

from .data.artifacts import FILE, Artifacts
from .data.meter import prepare_with_meter
from .data.prepare import lock_file
from .data.synth import write_synthetic
from .errors import UserError
from .locks import wait_for
from .recipes import DEFAULT, preparation_of

ROWS = 200_000
SEED = 1
HASH_BINS = 200_000  # a smaller table than Criteo's: the rows hold fewer distinct values


def default_data(rows: int = ROWS, seed: int = SEED, hash_bins: int = HASH_BINS, recipe: str = DEFAULT) -> Path:
    """`data/synthetic-<rows>-<seed>-<recipe>` under the working directory; made, with a message, if it is not there."""
    raw = Path("data") / f"synthetic-{rows}-{seed}.tsv"
    directory = raw.with_name(f"{raw.stem}-{recipe}")
    wait_for(lock_file(directory), str(directory))
    if (directory / FILE).exists():
        try:
            Artifacts.load(directory)
            return directory
        except UserError as error:
            click.echo(f"preparing the rows again: {error}", err=True)
    if not raw.exists():
        click.echo(f"making {rows:,} synthetic rows in {raw}", err=True)
        write_synthetic(raw, rows=rows, seed=seed)
    prepare_with_meter([raw], directory, hash_bins=hash_bins, recipe=recipe, **preparation_of(recipe).settings({}))
    return directory
