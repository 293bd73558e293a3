"""How fast are raw rows prepared, how much memory does that take, and how fast are prepared rows loaded?"""

import functools
import math
import platform
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import click
import pyarrow.csv
import torch
from common.harness import Timing, measure_pairs, time_row
from common.options import Settings, bench_options
from common.peers import installed
from common.records import Row

from ctr_train.command import run_command
from ctr_train.data.artifacts import Artifacts
from ctr_train.data.dataset import open_split
from ctr_train.data.loader import Loader
from ctr_train.data.prepare import prepare
from ctr_train.data.protocol import HASH_BINS, NUM_DENSE
from ctr_train.data.synth import write_synthetic
from ctr_train.recipes import DEFAULT, preparation_of

TARGETS = "wanted: prepare in at most 3 x the time of read_csv and below 1,500 MB; the loader at 1,000,000 rows/s"
VERSIONS = {"pyarrow.csv.read_csv": f"pyarrow {pyarrow.__version__}",
            "line by line": f"Python {platform.python_version()}"}
PEAK = """
import sys
from ctr_train.data.prepare import prepare
prepare([sys.argv[1]], sys.argv[2])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@click.command()
@click.option("--rows", type=click.IntRange(min=1000), default=500_000, show_default=True, help="Synthetic rows.")
@click.option("--input", "raw", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="A raw labelled file, not compressed, in their place.")
@bench_options
def main(rows: int, raw: Path | None, settings: Settings) -> None:
    """Measure `ctr-data prepare` against reading alone and against a plain Python parser, and the loader."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if raw is None:
            raw = directory / "raw.tsv"
            write_synthetic(raw, rows=rows, seed=1)
        out = directory / "data"
        prepare([raw], out)
        prepared = prepare_time(raw, out, settings)
        if prepared[0].provider == "ours":
            prepared[0].memory_mb, prepared[0].note = prepare_memory(raw, out)
        settings.finish([*prepared, *loader_rate(out, settings)])
    click.echo(TARGETS)


def prepare_time(raw: Path, out: Path, settings: Settings) -> list[Row]:
    """Rows/s of preparing a file as the protocol says and for the default recipe, in three passes, of reading it into
    Arrow columns, and of parsing it line by line."""
    default = out.with_name("default")
    chosen = settings.choose({
        "ours": lambda: prepare([raw], out),
        "ours, default recipe": lambda: prepare([raw], default, **preparation_of(DEFAULT).settings({})),
        "pyarrow.csv.read_csv": lambda: read_csv(raw),
        "line by line": lambda: line_by_line(raw),
    })
    slow = chosen.pop("line by line", None)
    timings = measure_pairs(chosen, rounds=7, warmup=1)
    if slow is not None:  # one round is enough: it takes a hundred times as long
        timing = measure_pairs({"line by line": slow}, rounds=1)["line by line"]
        ours = timings.get("ours")
        ratio = timing.p50 / ours.p50 if timing.p50 and ours and ours.p50 else None
        timings["line by line"] = replace(timing, ratio=ratio)
    rows = sum(source["rows"] for source in Artifacts.load(out).sources)
    return [_row(name, timing, rows, kernel="prepare", mode="file", x=f"{rows:,} rows")
            for name, timing in timings.items()]


def prepare_memory(raw: Path, out: Path) -> tuple[float | None, str]:
    """Peak resident MB of a process that prepares the file, or why there is none; not a matter of the file's size."""
    try:
        done = subprocess.run([sys.executable, "-c", PEAK, raw, out], capture_output=True, text=True, check=True)
    except (subprocess.CalledProcessError, FileNotFoundError) as failure:  # no /proc outside Linux
        return None, str(failure)
    return int(done.stdout) * 1024 / 1e6, ""


def loader_rate(data: Path, settings: Settings) -> list[Row]:
    """Rows/s of whole epochs over the training rows, shuffled and in the order of the file; ratios to shuffled."""
    split = open_split(data, "train")
    loaders = {name: Loader(split, batch_size=settings.batch, shuffle=name == "shuffled", seed=1, drop_last=False,
                            device=settings.device) for name in ("shuffled", "in order")}

    def epoch(loader: Loader) -> int:
        return sum(len(batch.label) for batch in loader)

    timings = measure_pairs({name: functools.partial(epoch, loader) for name, loader in loaders.items()}, rounds=20)
    for loader in loaders.values():
        loader.close()
    return [_row("ours", timing, split.rows, kernel="loader", mode=name, x=f"{split.rows:,} rows, B={settings.batch}")
            for name, timing in timings.items()]


def read_csv(raw: Path) -> pyarrow.Table:
    """All 40 columns with the types that pyarrow infers, by all its threads."""
    return pyarrow.csv.read_csv(raw, read_options=pyarrow.csv.ReadOptions(autogenerate_column_names=True),
                                parse_options=pyarrow.csv.ParseOptions(delimiter="\t"))


def line_by_line(raw: Path) -> list[tuple[int, list[float], list[int]]]:
    """The features of every row, a value and a character at a time, as the baseline study's loader had them."""
    rows = []
    with open(raw) as file:
        for line in file:
            label, *values = line.rstrip("\n").split("\t")
            dense = [math.log1p(max(float(value), 0.0)) if value else 0.0 for value in values[:NUM_DENSE]]
            sparse = []
            for field, value in enumerate(values[NUM_DENSE:]):
                state = 2166136261 ^ (42 + field)
                for character in value:
                    state = ((state ^ ord(character)) * 16777619) & 0xFFFFFFFF
                sparse.append(state % HASH_BINS if value else 0)
            rows.append((int(label), dense, sparse))
    return rows


def _row(provider: str, timing: Timing, rows: int, *, kernel: str, mode: str, x: str) -> Row:
    row = time_row(provider, timing, kernel=kernel, mode=mode, x=x, samples=rows, device=torch.device("cpu"))
    row.version = VERSIONS.get(provider, f"ctr-kernels {installed('ctr-kernels')}")
    return row


if __name__ == "__main__":
    run_command(main, "bench/data.py")
