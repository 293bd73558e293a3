"""How fast are raw rows prepared, how much memory does that take, and how fast are prepared rows loaded?"""

import math
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import click
import pyarrow.csv
from harness import Row, Settings, Timing, bench_options, measure_pairs

from ctr_train.data.artifacts import Artifacts
from ctr_train.data.dataset import open_split
from ctr_train.data.loader import Loader
from ctr_train.data.prepare import prepare
from ctr_train.data.protocol import HASH_BINS, NUM_DENSE
from ctr_train.data.synth import write_synthetic

TARGETS = "wanted: prepare in at most 3 x the time of read_csv and below 1,500 MB; the loader at 1,000,000 rows/s"
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
        settings.finish([*prepare_time(raw, out, settings), *prepare_memory(raw, out), *loader_rate(out, settings)])
    click.echo(TARGETS)


def prepare_time(raw: Path, out: Path, settings: Settings) -> list[Row]:
    """Rows/s of preparing a file, of reading it into Arrow columns, and of parsing it line by line."""
    chosen = settings.choose({
        "ours": lambda: prepare([raw], out),
        "pyarrow.csv.read_csv": lambda: read_csv(raw),
        "line by line": lambda: line_by_line(raw),
    })
    slow = chosen.pop("line by line", None)
    timings = measure_pairs(chosen, rounds=7, warmup=1)
    if slow is not None:  # one round is enough: it takes a hundred times as long
        timing = measure_pairs({"line by line": slow}, rounds=1)["line by line"]
        ours = timings.get("ours")
        timings["line by line"] = replace(timing, ratio=timing.p50 / ours.p50 if ours else None)
    rows = sum(source["rows"] for source in Artifacts.load(out).sources)
    return [_rate(name, timing, rows, kernel="prepare", x=f"rows={rows}") for name, timing in timings.items()]


def prepare_memory(raw: Path, out: Path) -> list[Row]:
    """Peak resident memory of a process that prepares the file; it should not depend on the file's size."""
    try:
        done = subprocess.run([sys.executable, "-c", PEAK, raw, out], capture_output=True, text=True, check=True)
        peak, error = int(done.stdout) / 1024, ""
    except (subprocess.CalledProcessError, FileNotFoundError) as failure:  # no /proc outside Linux
        peak, error = None, str(failure)
    return [Row(kernel="prepare", provider="ours", mode="process", metric="peak memory", unit="MB",
                x=f"bytes={raw.stat().st_size}", p50=peak, error=error)]


def loader_rate(data: Path, settings: Settings) -> list[Row]:
    """Rows/s of whole epochs over the training rows, shuffled and in the order of the file; ratios to shuffled."""
    split = open_split(data, "train")
    loaders = {name: Loader(split, batch_size=settings.batch, shuffle=name == "shuffled", seed=1, drop_last=False,
                            device=settings.device) for name in ("shuffled", "in order")}

    def epoch(loader: Loader) -> int:
        return sum(len(batch.label) for batch in loader)

    timings = measure_pairs({name: lambda loader=loader: epoch(loader) for name, loader in loaders.items()}, rounds=20)
    for loader in loaders.values():
        loader.close()
    return [_rate("ours", timing, split.rows, kernel="loader", mode=name, x=f"B={settings.batch} rows={split.rows}")
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


def _rate(provider: str, timing: Timing, rows: int, *, kernel: str, x: str, mode: str = "file") -> Row:
    """A timing as rows/s; p20 is still the slower end."""
    p20, p50, p80 = (rows / ms * 1e3 if ms else None for ms in (timing.p80, timing.p50, timing.p20))
    return Row(kernel=kernel, provider=provider, mode=mode, metric="rate", unit="rows/s", x=x, p20=p20, p50=p50,
               p80=p80, ratio=timing.ratio, error=timing.error)


if __name__ == "__main__":
    main()
