"""`ctr-report`: runs side by side, as a table, learning curves and a reliability diagram."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from .command import PATH, run_command
from .errors import UserError
from .files import atomic_path, check_directory
from .plots import RunCurves, draw_curves, draw_reliability
from .records import CONFIG, RESULT, read_config, read_result
from .runlog import read_log, rows_per_second

NAME, TABLE = "ctr-report", "| run "  # and how a report begins
METRICS = {"gold logloss": "logloss", "AUC": "auc", "NE": "normalised_entropy", "calibration": "calibration"}
UNKNOWN = "-"


@dataclass
class RunResult:
    """A run directory as the report sees it.

    Attributes:
        name: the directory's name, or its path where two runs share that name.
        config: settings of the run.
        gold: content of gold.json; None of an unfinished run.
        log: entries of metrics.jsonl.
    """

    name: str
    config: dict[str, Any]
    gold: dict[str, Any] | None
    log: list[dict[str, Any]]

    @classmethod
    def load(cls, directory: Path) -> "RunResult":
        """UserError where the directory is no run, or a file in it is damaged."""
        if not (directory / CONFIG).is_file():
            raise UserError(f"{directory} is no run: " + ("it has no config.json" if directory.is_dir()
                                                          else "there is no such directory"))
        gold = read_result(directory) if (directory / RESULT).exists() else None
        log = read_log(directory, None if gold is None else gold["log"])
        return cls(directory.resolve().name, read_config(directory), gold, log)

    @property
    def rows_trained(self) -> int:
        """Rows trained on, as far as the log goes for an unfinished run."""
        if self.gold is not None:
            return self.gold["rows_trained"]
        return self.config["batch_size"] * max((entry["step"] for entry in self.log), default=0)

    @property
    def best_possible(self) -> float | None:
        """Logloss of the true probabilities on the gold rows; None where they are unknown."""
        known = self.gold and self.gold["best_possible"]
        return known["logloss"] if known else None


@click.command(NAME, context_settings={"max_content_width": 120, "show_default": True})
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=PATH)
@click.option("--out", type=PATH, default=Path("report"),
              help="Directory for report.md, curves.png and reliability.png.")
def command(runs: tuple[Path, ...], out: Path) -> None:
    """Compare runs of ctr-train: a markdown table sorted by gold logloss, and two pictures."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: it is a file; the report needs a directory")
    check_directory(out)
    if (out / "report.md").is_file() and not (out / "report.md").read_text(errors="replace").startswith(TABLE):
        raise UserError(f"{out / 'report.md'} exists and is no report of ctr-report: choose another --out")
    results, groups = ranked(load_runs(runs))
    table = markdown(results, groups)
    curves = [_curves(result, groups) for result in results]
    draw_curves(curves, out / "curves.png")
    draw_reliability(curves, out / "reliability.png")
    with atomic_path(out / "report.md") as temporary:
        temporary.write_text(f"{table}\n\n![learning curves](curves.png)\n\n![reliability diagram](reliability.png)\n")
    click.echo(table)
    click.echo(f"written: {out / 'report.md'}, {out / 'curves.png'}, {out / 'reliability.png'}", err=True)


def load_runs(directories: Sequence[Path]) -> list[RunResult]:
    """The runs, each once, with names that tell them apart."""
    first: dict[Path, Path] = {}
    for directory in directories:
        first.setdefault(directory.resolve(), directory)
    unique = list(first.values())
    results = [RunResult.load(directory) for directory in unique]
    names = Counter(result.name for result in results)
    for directory, result in zip(unique, results, strict=True):
        if names[result.name] > 1:
            result.name = str(directory)
    return results


def ranked(results: Sequence[RunResult]) -> tuple[list[RunResult], list[str]]:
    """Runs by gold logloss, unfinished ones last, and the checksums of the gold files that they were evaluated on.

    Runs on different gold files are not comparable and stand in groups: the largest first, then the one whose best
    run is better.
    """
    def gold(result: RunResult) -> dict[str, Any]:
        assert result.gold is not None
        return result.gold

    finished = sorted((result for result in results if result.gold), key=lambda result: gold(result)["logloss"])
    groups = [checksum for checksum, _ in Counter(gold(result)["sha256"] for result in finished).most_common()]
    finished.sort(key=lambda result: groups.index(gold(result)["sha256"]))
    return finished + [result for result in results if not result.gold], groups


def markdown(results: Sequence[RunResult], groups: Sequence[str]) -> str:
    """The table, a row a run; with several gold files a column that tells them apart, and a warning below."""
    with_best = any(result.best_possible is not None for result in results)
    several = len(groups) > 1
    header = ["run", "model", "variant", "recipe", "kernels", "rows trained", "rows/s", *METRICS]
    header += ["best possible"] * with_best + ["gold file"] * several
    rows = []
    for result in results:
        speed = result.gold["rows_per_s"] if result.gold else rows_per_second(result.log)
        row = [result.name, *(result.config[key] for key in ("model", "variant", "recipe")), _kernels(result.config),
               f"{result.rows_trained:,}", UNKNOWN if speed is None else f"{speed:,.0f}"]
        if result.gold:
            row += [UNKNOWN if result.gold[key] is None else f"{result.gold[key]:.4f}" for key in METRICS.values()]
        else:
            row += ["unfinished"] + [UNKNOWN] * (len(METRICS) - 1)
        if with_best:
            row.append(UNKNOWN if result.best_possible is None else f"{result.best_possible:.4f}")
        if several:
            row.append(_letter(groups.index(result.gold["sha256"])) if result.gold else UNKNOWN)
        rows.append([" ".join(cell.replace("|", "\\|").splitlines()) for cell in row])
    first_number = header.index("rows trained")
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    aligned = [" | ".join(cell.ljust(width) if i < first_number else cell.rjust(width)
                          for i, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in [header, *rows]]
    rule = " | ".join("-" * width if i < first_number else "-" * (width - 1) + ":" for i, width in enumerate(widths))
    lines = [f"| {line} |" for line in (aligned[0], rule, *aligned[1:])]
    if several:
        rows_of = {result.gold["sha256"]: result.gold["rows"] for result in results if result.gold}
        files = "; ".join(f"{_letter(i)}: {rows_of[checksum]:,} rows, SHA-256 {checksum[:12]}..."
                          for i, checksum in enumerate(groups))
        lines += ["", f"**Not comparable** across gold files: the runs were evaluated on different rows ({files})."]
    return "\n".join(lines)


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else str(index + 1)


def _kernels(config: dict[str, Any]) -> str:
    """The backend of most of the model's operations, and what other ones ran: "native (field_tokens: eager)"."""
    resolved: dict[str, str] = config["kernels_resolved"]
    (most, _), *others = Counter(resolved.values()).most_common() or [(UNKNOWN, 0)]
    different = [f"{name}: {backend}" for name, backend in resolved.items() if backend != most]
    return f"{most} ({', '.join(different)})" if others else most


def _curves(result: RunResult, groups: Sequence[str]) -> RunCurves:
    """What the pictures show of a run; its name says the gold file where there are several."""
    batch_size, gold = result.config["batch_size"], result.gold
    mark = f" (gold {_letter(groups.index(gold['sha256']))})" if gold and len(groups) > 1 else ""
    training = [(entry["step"] * batch_size, entry["loss"]) for entry in result.log if "event" not in entry]
    validation = [(entry["step"] * batch_size, entry["logloss"]) for entry in result.log if "event" in entry]
    return RunCurves(
        name=result.name + mark, training=training, validation=validation,
        gold=None if gold is None else (gold["rows_trained"], gold["logloss"]),
        best_possible=result.best_possible, reliability=[] if gold is None else gold["reliability"])


def main() -> None:
    """Entry point of the console script."""
    run_command(command, NAME)


if __name__ == "__main__":
    main()
