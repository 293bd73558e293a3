"""Results of the bench scripts: one schema, one table, and the command-line options that they share."""

import csv
import functools
import platform
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import click
import torch

from ctr_train import files

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TABLE_COLUMNS = ("kernel", "provider", "mode", "metric", "unit", "x", "p50", "p20", "p80", "ratio", "gbps", "gflops",
                 "percent_of_floor", "error")
T = TypeVar("T")


@dataclass
class Row:
    """One measurement.

    Attributes:
        kernel: the operation or program measured; provider: who does it ("ours", "eager", ...), mode: which part.
        metric, unit: what is measured, as "time" in "ms", "memory" in "MB", "rate" in "rows/s".
        x: the shape or size measured at, as "B=4096 F=27 D=64".
        p20, p50, p80: percentiles over the rounds; a metric measured once has p50 alone.
        ratio: to the first provider of the same measurement, paired by round; see `harness.Timing`.
        gbps, gflops: rates in GB/s and GFLOP/s at p50.
        percent_of_floor: 100 x floor time / p50; 100 means that the machine allows no more.
        error: why there is no figure; empty if there is one.
        device, threads, torch, commit: filled in by `with_machine`.
    """

    kernel: str
    provider: str
    mode: str
    metric: str
    unit: str
    x: str
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    ratio: float | None = None
    gbps: float | None = None
    gflops: float | None = None
    percent_of_floor: float | None = None
    error: str = ""
    device: str = ""
    threads: int = 0
    torch: str = ""
    commit: str = ""


@dataclass(frozen=True)
class Settings:
    """The options that all bench scripts share; see `bench_options`.

    Attributes:
        precision: "fp32", "tf32", "bf16" or "fp16"; `dtype` is the dtype of tensors that goes with it.
        providers: names chosen; empty means all.
    """

    device: torch.device
    precision: str
    batch: int
    fields: int
    dim: int
    heads: int
    providers: tuple[str, ...]
    json: Path | None
    csv: Path | None

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    def choose(self, providers: dict[str, T]) -> dict[str, T]:
        """Those of `providers` that were chosen, in their own order; click.BadParameter for an unknown name."""
        for name in self.providers:
            if name not in providers:
                raise click.BadParameter(f"{name!r} is not one of {', '.join(providers)}", param_hint="--providers")
        return {name: value for name, value in providers.items() if not self.providers or name in self.providers}

    def finish(self, rows: Sequence[Row]) -> None:
        """Print the table, and write --json and --csv where they were asked for."""
        rows = with_machine(rows, self.device)
        print_table(rows)
        if self.json:
            write_json(self.json, rows)
        if self.csv:
            write_csv(self.csv, rows)


def bench_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a click command the shared options; it receives them as one argument `settings`.

    Sets the number of threads and the float32 matmul precision of the process: full fp32 unless --dtype tf32.
    """

    @click.option("--device", default=None, help="cpu or cuda; default: cuda if there is one.")
    @click.option("--dtype", "precision", type=click.Choice(list(DTYPES)), default="fp32", show_default=True)
    @click.option("--batch", type=click.IntRange(min=1), default=4096, show_default=True, help="Rows of a batch.")
    @click.option("--fields", type=click.IntRange(min=1), default=27, show_default=True, help="Tokens of a row.")
    @click.option("--dim", type=click.IntRange(min=1), default=64, show_default=True, help="Width of a token.")
    @click.option("--heads", type=click.IntRange(min=1), default=4, show_default=True)
    @click.option("--providers", default="", help="Comma-separated names; default: all.")
    @click.option("--json", type=click.Path(dir_okay=False, path_type=Path), help="Write the rows there as well.")
    @click.option("--csv", type=click.Path(dir_okay=False, path_type=Path), help="Write the rows there as well.")
    @click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: PyTorch's own choice.")
    @functools.wraps(command)
    def with_settings(*, device: str | None, providers: str, threads: int | None, precision: str, batch: int,
                      fields: int, dim: int, heads: int, json: Path | None, csv: Path | None, **others: Any) -> None:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise click.BadParameter("PyTorch finds no GPU here", param_hint="--device")
        if threads:
            torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        names = tuple(name.strip() for name in providers.split(",") if name.strip())
        command(settings=Settings(torch.device(device), precision, batch, fields, dim, heads, names, json, csv),
                **others)

    return with_settings


def with_machine(rows: Iterable[Row], device: torch.device | str) -> list[Row]:
    """The same rows, with what they were measured on filled in."""
    rows = list(rows)
    name, commit = device_name(torch.device(device)), _commit()
    for row in rows:
        row.device, row.threads, row.torch, row.commit = name, torch.get_num_threads(), torch.__version__, commit
    return rows


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


def print_table(rows: Sequence[Row]) -> None:
    """The rows as plain aligned text on stdout, without the columns that are empty in all of them."""
    columns = [name for name in TABLE_COLUMNS if any(getattr(row, name) not in (None, "") for row in rows)]
    table = [columns, *([_text(getattr(row, name)) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    numeric = {name for name in columns if any(isinstance(getattr(row, name), float) for row in rows)}
    for line in table:
        cells = (cell.rjust(width) if name in numeric else cell.ljust(width)
                 for name, cell, width in zip(columns, line, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


def write_json(path: Path | str, rows: Iterable[Row]) -> None:
    """The rows as a JSON list of objects, atomically; UserError when the file cannot be written."""
    files.write_json(path, [asdict(row) for row in rows])


def write_csv(path: Path | str, rows: Iterable[Row]) -> None:
    """The rows as CSV with a header, atomically; UserError when the file cannot be written."""
    with files.atomic_path(path) as temporary, open(temporary, "w", newline="") as handle:
        writer = csv.DictWriter(handle, [f.name for f in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def _text(value: Any) -> str:
    """Four significant digits, no exponent for large numbers; nothing for None."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "" if value is None else str(value)


def _commit() -> str:
    """Short hash of the checkout, with "-dirty" if it has changes; "unknown" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
