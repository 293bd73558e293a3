"""How good are the models? What a newcomer gets first, then every preparation, and two rivals, over several seeds."""

import gzip
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from common.records import Machine
from matplotlib.figure import Figure
from quality_rivals import RIVALS

from ctr_train.command import run_command
from ctr_train.data.artifacts import Artifacts
from ctr_train.data.prepare import prepare
from ctr_train.data.protocol import HASH_BINS
from ctr_train.errors import UserError
from ctr_train.files import atomic_path, read_json, write_json
from ctr_train.plots import COLOURS, save_png
from ctr_train.recipes import DEFAULT, preparation_of

NAMES = {"dcnv2": "DCNv2", "autoint": "AutoInt", "ft": "FT-Transformer"}
METRICS = ("logloss", "auc", "normalised_entropy", "calibration", "rows_per_s", "memory_mb")
HEADINGS = {"logloss": "logloss", "auc": "AUC", "normalised_entropy": "NE", "calibration": "calibration",
            "rows_per_s": "rows/s", "memory_mb": "peak MB"}
DECIMALS = {"logloss": 4, "auc": 4, "normalised_entropy": 4, "calibration": 3, "rows_per_s": 0, "memory_mb": 0}
# How rows are prepared for the default recipe: as it wants it, and as a user may have done otherwise.
PREPARATIONS: dict[str, dict[str, Any]] = {
    "auto": {}, "auto, ordered history": {"folds": 0}, "auto, history of hashed ids": {"min_count": 1},
    "auto, no history": {"history": False}, "auto, protocol's features": {"history": False, "min_count": 1},
}


@dataclass
class Quality:
    """One provider over all seeds: the value of each metric for each seed, in the order of `seeds`."""

    provider: str
    seeds: list[int]
    logloss: list[float]
    auc: list[float]
    normalised_entropy: list[float]
    calibration: list[float]
    rows_per_s: list[float]
    memory_mb: list[float]

    @property
    def mean(self) -> float:
        return statistics.mean(self.logloss)


def measured(command: Sequence[str | Path], result: Path) -> dict[str, Any]:
    """The JSON in `result` with "memory_mb", the peak of `command`'s process; runs it unless a run before has.

    Raises UserError with the last line of its errors where it fails.
    """
    memory = result.with_name(result.name + ".memory")
    if not (result.exists() and memory.exists()):
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            process = subprocess.Popen([sys.executable, *map(str, command)], stdout=output, stderr=errors)
            peak = 0
            while process.poll() is None:
                # Not getrusage: its peak begins with that of the process that forked this one.
                peak = max(peak, peak_bytes(process.pid))
                time.sleep(0.05)
            if process.returncode:
                errors.seek(0)
                lines = errors.read().decode(errors="replace").strip().splitlines() or ["no message"]
                raise UserError(f"{' '.join(map(str, command))} failed: {lines[-1]}")
            if not result.exists():  # the rivals print theirs
                output.seek(0)
                write_json(result, json.loads(output.read()))
        write_json(memory, peak / 1e6)
    return {**read_json(result), "memory_mb": read_json(memory)}


def peak_bytes(pid: int) -> int:
    """Peak resident memory of a running process; 0 where it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def without_options(model: str, train: Path, test: Path, seed: int, work: Path) -> dict[str, Any]:
    """What a newcomer gets: `ctr-train --model MODEL --data TRAIN`, then `ctr-eval` on the rows of `test`."""
    directory = work / f"{model}-no-options-{seed}"
    run = measured(["-m", "ctr_train.cli_train", "--model", model, "--data", train, "--seed", str(seed), "--out",
                    directory, "--skip-if-done"], directory / "gold.json")
    found = measured(["-m", "ctr_train.cli_eval", directory, "--input", test, "--json"],
                     work / f"{directory.name}-test.json")
    return {**found, **{name: run[name] for name in ("rows_per_s", "memory_mb")}}


def trained(model: str, recipe: str, data: Path, seed: int, work: Path) -> dict[str, Any]:
    """gold.json of a run of `ctr-train --deterministic`."""
    directory = work / f"{model}-{recipe}-{data.name}-{seed}"
    return measured(["-m", "ctr_train.cli_train", "--model", model, "--recipe", recipe, "--data", data, "--seed",
                     str(seed), "--out", directory, "--deterministic", "--skip-if-done"], directory / "gold.json")


def rival(name: str, data: Path, seed: int, work: Path) -> dict[str, Any]:
    """Metrics of a rival on the gold rows."""
    return measured([Path(__file__).with_name("quality_rivals.py"), name, data, str(seed)],
                    work / f"{name.replace(' ', '-')}-{seed}.json")


def prepared(source: Path, out: Path, **options: Any) -> Path:
    """`source` prepared under `out`, once; the last lines are the test rows."""
    if not out.exists():
        prepare([source], out, split="tail", **options)
    return out


def divided(source: Path, test_ratio: float, work: Path) -> tuple[Path, Path]:
    """The lines of `source` but the last share, and that share, as files."""
    train, test = work / "train.tsv", work / "test.tsv"
    if not test.exists():
        content = source.read_bytes()
        lines = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).splitlines(keepends=True)
        first = len(lines) - int(test_ratio * len(lines))
        for path, part in ((train, lines[:first]), (test, lines[first:])):
            with atomic_path(path) as temporary:
                temporary.write_bytes(b"".join(part))
    return train, test


def table(found: Sequence[Quality], best: float | None) -> str:
    """Markdown: mean and standard deviation over the seeds, best logloss first."""
    headings = list(HEADINGS.values()) + ([] if best is None else ["gap closed"])
    lines = ["| | " + " | ".join(headings) + " |", "|---|" + "--:|" * len(headings)]
    baseline = next((row.mean for row in found if row.provider == "logistic regression"), None)
    for row in sorted(found, key=lambda row: row.mean):
        cells = [_cell(name, getattr(row, name)) for name in METRICS]
        if best is not None:
            cells.append("" if baseline is None else f"{(baseline - row.mean) / (baseline - best):.0%}")
        lines.append(f"| {row.provider} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(name: str, values: list[float]) -> str:
    text = f"{statistics.mean(values):,.{DECIMALS[name]}f}"
    spread = name in ("logloss", "auc", "normalised_entropy") and len(values) > 1
    return f"{text} ± {statistics.stdev(values):.4f}" if spread else text


def draw(found: Sequence[Quality], best: float | None, title: str, path: Path) -> None:
    """PNG: logloss of each provider, a dot a seed and a line at the mean."""
    rows = sorted(found, key=lambda row: row.mean, reverse=True)
    figure = Figure(figsize=(8.4, 0.42 * len(rows) + 1.5), layout="constrained")
    ax = figure.subplots()
    for at, row in enumerate(rows):
        colour = "0.45" if row.provider in RIVALS else COLOURS[0] if "baseline" not in row.provider else COLOURS[1]
        ax.plot(row.logloss, [at] * len(row.logloss), "o", color=colour, alpha=0.6)
        ax.plot([row.mean] * 2, [at - 0.3, at + 0.3], color=colour, linewidth=2)
        ax.annotate(f"{row.mean:.4f}", (max(row.logloss), at), xytext=(8, 0), textcoords="offset points", va="center",
                    fontsize=8)
    ax.set_yticks(range(len(rows)), [row.provider for row in rows])
    if best is not None:
        ax.axvline(best, color="0.3", linestyle="--", label=f"best possible {best:.4f}")
        ax.legend(fontsize=8)
    ax.margins(x=0.12)
    ax.set_xlabel("logloss on the test rows, a dot a seed")
    ax.set_title(title, fontsize=9, loc="left")
    ax.grid(axis="x", alpha=0.3)
    save_png(figure, path)


@click.command()
@click.option("--data", "source", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True,
              help="Raw labelled rows; the last share of them is the test part.")
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="0 to that, less one.")
@click.option("--other-seeds", type=click.IntRange(min=1), default=1, show_default=True, help="The same for "
              "preparations that the default recipe does not want, and for baseline-v1.")
@click.option("--test-ratio", type=click.FloatRange(0.0, 1.0, min_open=True, max_open=True), default=0.2,
              show_default=True, help="Share of the lines, at the end, that nothing is trained on.")
@click.option("--hash-bins", type=click.IntRange(min=1), default=HASH_BINS, show_default=True, help="Of prepared rows; "
              "those without options have the default.")
@click.option("--providers", default=None, help="Separated by semicolons; all by default.")
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), default=Path("out/quality"),
              show_default=True, help="Keeps what is done: the same command goes on where it stopped.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="PNG.")
def main(source: Path, seeds: int, other_seeds: int, test_ratio: float, hash_bins: int, providers: str | None,
         work: Path, json_path: Path | None, plot: Path | None) -> None:
    """Train every model without any option, by the default recipe on every preparation, and by baseline-v1; LightGBM
    and logistic regression beside them, all on the same rows.

    Train: all lines but the last share; test: that share, seen by nothing. Without options a twentieth of the training
    lines becomes the run's own gold rows; the other runs train on all of them. baseline-v1 and logistic regression have
    the protocol's features, LightGBM its own ordered encodings of them.
    """
    work.mkdir(parents=True, exist_ok=True)
    train, test = divided(source, test_ratio, work)
    options = {"valid_ratio": test_ratio, "hash_bins": hash_bins, "gold_rows": 2**31}
    data = {name: prepared(source, work / f"data-{i}", **options, recipe=DEFAULT,
                           **preparation_of(DEFAULT).settings(overrides))
            for i, (name, overrides) in enumerate(PREPARATIONS.items())}
    plain = data["auto, protocol's features"]
    indicated = prepared(source, work / "indicated", missing_indicator=True, **options)
    jobs: dict[str, Any] = {}
    for model, name in NAMES.items():
        jobs[f"{name}, no options"] = lambda seed, m=model: without_options(m, train, test, seed, work)
    jobs |= {name: lambda seed, name=name: rival(name, indicated, seed, work) for name in RIVALS}
    for model, name in NAMES.items():
        for of, directory in data.items():
            jobs[f"{name}, {of}"] = lambda seed, m=model, d=directory: trained(m, DEFAULT, d, seed, work)
        jobs[f"{name}, baseline-v1"] = lambda seed, m=model: trained(m, "baseline-v1", plain, seed, work)
    chosen = list(jobs) if providers is None else [name.strip() for name in providers.split(";")]
    if unknown := [name for name in chosen if name not in jobs]:
        raise UserError(f"--providers: {unknown[0]!r} is not one of {'; '.join(jobs)}")
    found = []
    for name in chosen:
        count = seeds if name in RIVALS or name.endswith(("no options", "auto")) else other_seeds
        used = list(range(1 if name == "logistic regression" else count))  # it has no randomness
        runs = [jobs[name](seed) for seed in used]
        found.append(Quality(name, used, *([run[metric] for run in runs] for metric in METRICS)))
        click.echo(f"{name}: logloss {_cell('logloss', found[-1].logloss)}", err=True)
    artifacts = Artifacts.load(plain)
    best = (artifacts.best_possible or {}).get("gold", {}).get("logloss")
    title = (f"{artifacts.counts['train']:,} training rows, the {artifacts.counts['gold']:,} after them for the test, "
             f"up to {seeds} seeds" + ("" if best is None else f", best possible logloss {best:.4f}"))
    click.echo(f"{title}\n\n{table(found, best)}")
    if json_path is not None:
        machine = Machine.of(torch.device("cpu"))
        rows = ",\n".join(json.dumps(asdict(row), allow_nan=False) for row in found)
        with atomic_path(json_path) as temporary:
            temporary.write_text(f'{{"machine": {json.dumps(asdict(machine))},\n"title": {json.dumps(title)},\n'
                                 f'"best_possible": {json.dumps(best)},\n"rows": [\n{rows}\n]}}\n')
    if plot is not None:
        draw(found, best, title, plot)


if __name__ == "__main__":
    run_command(main, "bench/quality.py")
