"""Results of the bench scripts: one schema for the table, for JSON and for CSV."""

import csv
import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import click
import torch

from ctr_train import files

from .commit import commit

# Columns in their order; those without a heading stand above the table if they are the same in all rows.
HEADINGS = {"kernel": "", "x": "", "mode": "", "provider": "provider", "p20": "p20 ms", "p50": "p50 ms",
            "p80": "p80 ms", "ratio": "x ours", "rows_per_s": "rows/s", "gbps": "GB/s", "gflops": "GFLOP/s",
            "percent_of_floor": "% of floor", "computed_mb": "computed MB", "memory_mb": "MB", "rows": "rows",
            "fp64_error": "error to fp64", "version": "version", "note": "note"}
DECIMALS = {"ratio": 2, "rows_per_s": 0, "gbps": 1, "gflops": 1, "percent_of_floor": 0, "computed_mb": 1,
            "memory_mb": 1}
LOAD = os.getloadavg()[0]
Device = torch.device  # a field of Machine is called torch


@dataclass
class Row:
    """One measurement.

    Attributes:
        kernel: the operation or program measured; provider: who does it ("ours", "eager", ...); mode: which part.
        x: the shape or size measured at, as "B=4096 F=27 D=64".
        p20, p50, p80: milliseconds, percentiles over the rounds; what is measured once has p50 alone.
        ratio: to the first provider of the same measurement, paired by round; see `harness.Timing`.
        gbps, gflops: achieved GB/s and GFLOP/s at p50, of the work that the floor counts.
        percent_of_floor: 100 x floor time / p50; 100 means that the machine allows no more.
        rows_per_s: samples a second at p50.
        memory_mb: of a timing, peak memory of one call on top of what there was before it; else what it says, in
            10^6 bytes. computed_mb: the same from a formula.
        rows: size of a batch that is itself the result.
        fp64_error: largest error of any output or gradient against fp64, as a share of the largest value there.
        version: what the provider is part of, with its version.
        note: why there is no figure, or what else is to be known; mostly empty.
    """

    kernel: str
    provider: str
    mode: str
    x: str
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    ratio: float | None = None
    gbps: float | None = None
    gflops: float | None = None
    percent_of_floor: float | None = None
    rows_per_s: float | None = None
    computed_mb: float | None = None
    memory_mb: float | None = None
    rows: int | None = None
    fp64_error: float | None = None
    version: str = ""
    note: str = ""


@dataclass(frozen=True)
class Machine:
    """What rows were measured on.

    Attributes:
        device: name of the GPU or processor; threads: CPU threads; commit: of the checkout.
        load: how many programs ran or waited when this one began, a mean of one minute; 0 on a quiet machine.
        mm_gflops, copy_gbps: the floors measured in the same process, in GFLOP/s and GB/s; 0 if they were not.
    """

    device: str
    threads: int
    torch: str
    cuda: str
    python: str
    commit: str
    load: float = 0.0
    mm_gflops: float = 0.0
    copy_gbps: float = 0.0

    @classmethod
    def of(cls, device: Device, mm_gflops: float = 0.0, copy_gbps: float = 0.0) -> "Machine":
        return cls(device_name(device), torch.get_num_threads(), str(torch.__version__), torch.version.cuda or "",
                   platform.python_version(), commit(), LOAD, mm_gflops, copy_gbps)

    def __str__(self) -> str:
        floors = f", mm {self.mm_gflops:,.0f} GFLOP/s, copy {self.copy_gbps:,.1f} GB/s" if self.mm_gflops else ""
        return (f"{self.device}, {self.threads} CPU threads, load {self.load:.1f} before{floors}, torch {self.torch}, "
                f"commit {self.commit}")


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []  # not Linux
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def tabulate(rows: Sequence[Row]) -> tuple[str, list[bool], list[Sequence[str]]]:
    """What is the same in all rows; which columns are numbers; the headings and then a line of cells a row.

    Columns that are empty in all rows are left out.
    """
    given = {name: [_text(name, getattr(row, name)) for row in rows] for name in HEADINGS}
    common = [name for name, cells in given.items() if not HEADINGS[name] and cells and len(set(cells)) == 1]
    columns = [name for name, cells in given.items() if name not in common and any(cells)]
    numeric = [any(isinstance(getattr(row, name), int | float) for row in rows) for name in columns]
    lines = [[HEADINGS[name] or name for name in columns], *zip(*(given[name] for name in columns), strict=True)]
    return ", ".join(given[name][0] for name in common), numeric, lines


def print_table(rows: Sequence[Row]) -> None:
    """The rows as aligned text on stdout, below a line with what is the same in all of them."""
    above, numeric, lines = tabulate(rows)
    if above:
        click.echo(above)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.rjust(width) if right else cell.ljust(width)
                 for right, cell, width in zip(numeric, line, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


def write_json(path: Path | str, rows: Iterable[Row], machine: Machine) -> None:
    """{"machine": {...}, "rows": [{...}, ...]} without the fields that are empty, a row a line, atomically.

    Raises UserError when the file cannot be written, ValueError for a NaN.
    """
    lines = ",\n".join(json.dumps({k: v for k, v in asdict(row).items() if v not in (None, "")}, allow_nan=False)
                       for row in rows)
    text = f'{{"machine": {json.dumps(asdict(machine))},\n"rows": [\n{lines}\n]}}\n'
    with files.atomic_path(path) as temporary:
        temporary.write_text(text)


def read_rows(path: Path | str) -> tuple[Machine, list[Row]]:
    """What `write_json` wrote; UserError where it is missing or not JSON."""
    content = files.read_json(path)
    return Machine(**content["machine"]), [Row(**row) for row in content["rows"]]


def write_csv(path: Path | str, rows: Iterable[Row], machine: Machine) -> None:
    """The rows as CSV with a header, the machine in each, atomically; UserError when the file cannot be written."""
    with files.atomic_path(path) as temporary, open(temporary, "w", newline="") as handle:
        writer = csv.DictWriter(handle, [f.name for kind in (Row, Machine) for f in fields(kind)])
        writer.writeheader()
        writer.writerows({**asdict(row), **asdict(machine)} for row in rows)


def _text(name: str, value: Any) -> str:
    """A cell: the column's decimals, or four significant digits; nothing for None."""
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if name == "fp64_error":
            return f"{value:.1e}"
        return f"{value:,.{DECIMALS[name]}f}" if name in DECIMALS else f"{value:#.4g}".rstrip(".")
    return "" if value is None else str(value)
