"""The command-line options that all bench scripts share, and what becomes of their rows."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import click
import torch

from .harness import Floors
from .records import Machine, Row, print_table, write_csv, write_json

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SWEEPS = {"batch": (256, 1024, 4096, 16384, 65536), "fields": (8, 16, 27, 32, 48, 64)}
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """The options that all bench scripts share; see `bench_options`.

    Attributes:
        precision: "fp32", "tf32", "bf16" or "fp16"; `dtype` is the dtype of tensors that goes with it.
        backward: also measure forward + backward.
        providers: names chosen; empty means all.
        sweep: "batch" or "fields", what is varied; "" for one size.
        plot: PNG of the swept sizes.
        seconds: time for the rounds of a measurement; None: the script's own.
    """

    device: torch.device
    precision: str = "fp32"
    batch: int = 4096
    fields: int = 27
    dim: int = 64
    heads: int = 4
    backward: bool = True
    providers: tuple[str, ...] = ()
    sweep: str = ""
    json: Path | None = None
    csv: Path | None = None
    plot: Path | None = None
    seconds: float | None = None

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def shape(self) -> str:
        """As the column `x` has it: "B=4096 F=27 D=64 H=4 fp32"."""
        return f"B={self.batch} F={self.fields} D={self.dim} H={self.heads} {self.precision}"

    def choose(self, providers: dict[str, T], swept: Sequence[str] = ()) -> dict[str, T]:
        """Those of `providers` that were chosen, in their own order; by default all, or `swept` of them in a sweep.

        Raises click.BadParameter for an unknown name.
        """
        for name in self.providers:
            if name not in providers:
                raise click.BadParameter(f"{name!r} is not one of {', '.join(providers)}", param_hint="--providers")
        wanted = self.providers or (swept if self.sweep else ())
        return {name: value for name, value in providers.items() if not wanted or name in wanted}

    def points(self) -> Iterator["Settings"]:
        """The settings of each size to measure: one, or all of the sweep, each compiled from scratch."""
        if not self.sweep:
            yield self
            return
        for value in SWEEPS[self.sweep]:
            torch.compiler.reset()  # else the ninth shape of a function is no longer compiled
            yield replace(self, batch=value) if self.sweep == "batch" else replace(self, fields=value)

    def of_modes(self, modes: dict[str, T]) -> dict[str, T]:
        """Those of "forward" and "forward+backward" to time; a sweep times the training direction alone."""
        wanted = (self.backward, not (self.backward and self.sweep))
        return {mode: value for mode, value in modes.items() if wanted[mode == "forward"]}

    @property
    def budget(self) -> dict[str, Any]:
        """Of `compare`: a point of a sweep takes a few seconds, else a measurement takes twenty."""
        budget: dict[str, Any] = {"seconds": 5.0, "warmup": 1} if self.sweep else {}
        return budget if self.seconds is None else {**budget, "seconds": self.seconds}

    def finish(self, rows: Sequence[Row], floors: Floors | None = None) -> None:
        """Print the table, and write --json, --csv and --plot where they were asked for."""
        machine = Machine.of(self.device, *((floors.gflops, floors.gbps) if floors else ()))
        click.echo(machine)
        print_table(rows)
        if self.json:
            write_json(self.json, rows, machine)
        if self.csv:
            write_csv(self.csv, rows, machine)
        if self.plot:
            from .plots import draw_sweep

            draw_sweep(rows, machine, self.plot)


def bench_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a click command the shared options; it receives them as one argument `settings`.

    Sets the number of threads and the float32 matmul precision of the process: full fp32 unless --dtype tf32.
    """
    file = click.Path(dir_okay=False, path_type=Path)

    @click.option("--device", default=None, help="cpu or cuda; default: cuda if there is one.")
    @click.option("--dtype", "precision", type=click.Choice(list(DTYPES)), default="fp32", show_default=True)
    @click.option("--batch", type=click.IntRange(min=1), default=4096, show_default=True, help="Rows of a batch.")
    @click.option("--fields", type=click.IntRange(min=1), default=27, show_default=True, help="Tokens of a row.")
    @click.option("--dim", type=click.IntRange(min=1), default=64, show_default=True, help="Width of a token.")
    @click.option("--heads", type=click.IntRange(min=1), default=4, show_default=True)
    @click.option("--backward/--no-backward", default=True, help="Also time forward + backward (the default).")
    @click.option("--providers", default="", help="Comma-separated names; default: all, in a sweep the best of each.")
    @click.option("--sweep", type=click.Choice(list(SWEEPS)),
                  help="Vary the batch, 256 to 65,536, or the fields, 8 to 64.")
    @click.option("--json", type=file, help="Write the rows there as well.")
    @click.option("--csv", type=file, help="Write the rows there as well.")
    @click.option("--plot", type=file, help="Draw time against size there, as PNG; implies --sweep batch.")
    @click.option("--seconds", type=click.FloatRange(min=0), help="Time for the rounds of a measurement.")
    @click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: PyTorch's own choice.")
    @functools.wraps(command)
    def with_settings(*, device: str | None, providers: str, threads: int | None, precision: str, batch: int,
                      fields: int, dim: int, heads: int, backward: bool, sweep: str | None, json: Path | None,
                      csv: Path | None, plot: Path | None, seconds: float | None, **others: Any) -> None:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise click.BadParameter("PyTorch finds no GPU here", param_hint="--device")
        if dim % heads:
            raise click.BadParameter(f"--dim {dim} is not divisible into {heads} heads", param_hint="--heads")
        if threads:
            torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        names = tuple(name.strip() for name in providers.split(",") if name.strip())
        command(settings=Settings(torch.device(device), precision, batch, fields, dim, heads, backward, names,
                                  sweep or ("batch" if plot else ""), json, csv, plot, seconds), **others)

    return with_settings
