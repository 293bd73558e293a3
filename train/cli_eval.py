"""`ctr-eval`: metrics of a run on prepared or raw rows, and predictions for raw ones."""

import itertools
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from ctr_models import CTRModel

from .checkpoint import build_model, load_kept, load_scored
from .command import PATH, run_command
from .data.artifacts import Artifacts
from .data.raw import read_features
from .data.values import ValueCounts
from .errors import UserError
from .evaluate import Progress, split_report
from .machine import choose_device, resolve_kernels, set_up_torch
from .score import check_predictions, score

NAME = "ctr-eval"
LINE_SECONDS = 30.0  # between progress lines where stderr is no terminal
FIGURES = {"rows": "rows", "label_rate": "label rate", "logloss": "logloss", "auc": "AUC",
           "normalised_entropy": "normalised entropy", "calibration": "calibration"}


@dataclass
class Trained:
    """A run's model with the weights of a checkpoint, on its device, and what scoring it needs.

    Attributes:
        path: the checkpoint's.
        config: the run's settings.
        artifacts: those of the data that the run was trained on.
    """

    path: Path
    config: dict[str, Any]
    artifacts: Artifacts
    model: CTRModel
    device: torch.device

    @classmethod
    def load(cls, run: Path, *, checkpoint: str | None, kernels: str, device: str | None,
             threads: int | None) -> "Trained":
        """The model of the run directory; without `checkpoint` that of best.pt, or of last.pt if there is no best.pt.

        Raises UserError where `run` holds no such checkpoint, or it does not fit, or kernels or device cannot be used.
        """
        path, content = load_kept(run, checkpoint)
        config = content["config"]
        try:
            artifacts = Artifacts.from_dict(content["artifacts"])
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        place = choose_device(device)
        resolve_kernels(kernels, place, config["model"])
        set_up_torch(threads=threads, precision=config["precision"], deterministic=config["deterministic"])
        model = build_model(config, artifacts, kernels)
        try:
            load_scored(model, content)
        except RuntimeError as error:
            raise UserError(f"the weights in {path} do not fit the model {config['model']!r} of its own settings "
                            f"({str(error).splitlines()[-1].strip()})") from error
        return cls(path, config, artifacts, model.to(place), place)

    def options(self, batch_size: int | None) -> dict[str, Any]:
        """Arguments that `evaluate.predict` and `score.score` share; the run's own batch size by default."""
        return {"batch_size": batch_size or self.config["batch_size"], "device": self.device,
                "precision": self.config["precision"]}


@click.command(NAME, context_settings={"max_content_width": 120, "show_default": True})
@click.argument("run", type=PATH)
@click.option("--data", type=PATH, help="Directory made by `ctr-data prepare`: metrics on one of "
              "its splits.")
@click.option("--split", type=click.Choice(["gold", "valid", "train"]), help="Of --data.  [default: gold]")
@click.option("--input", "raw", type=PATH, help="Raw rows, plain or .gz: 40 TAB-separated "
              "columns (metrics), or 39 without the label (predictions only).")
@click.option("--predictions", type=PATH, help="Parquet file to write for --input: line (from "
              "0), probability, logit, and label if known.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--checkpoint", type=click.Choice(["best", "last"]), help="Which weights.  [default: best where the run "
              "has evaluated, else last]")
@click.option("--batch-size", type=click.IntRange(1), help="Rows scored at once.  [default: the run's]")
@click.option("--kernels", type=click.Choice(["auto", "eager", "native", "triton"]), default="auto",
              help="Backend of the operations.")
@click.option("--device", help="cpu, cuda or cuda:N.  [default: cuda where there is one]")
@click.option("--threads", type=click.IntRange(1), help="CPU threads of torch.  [default: torch's]")
def command(run: Path, data: Path | None, split: str | None, raw: Path | None, predictions: Path | None,
            as_json: bool, checkpoint: str | None, batch_size: int | None, kernels: str, device: str | None,
            threads: int | None) -> None:
    """Evaluate the model of the run directory RUN on prepared rows (--data) or score raw rows (--input)."""
    if (data is None) == (raw is None):
        raise UserError("choose one of --data DIR (prepared rows) and --input FILE (raw rows)"
                        + ("" if data is None else ", not both"))
    if data is not None and predictions is not None:
        raise UserError(f"--predictions {predictions} needs --input: prepared rows have lost their line numbers")
    if raw is not None and split is not None:
        raise UserError(f"--split {split} needs --data: raw rows are scored as one")
    if predictions is not None and raw is not None:
        check_predictions(predictions, raw)
    trained = Trained.load(run, checkpoint=checkpoint, kernels=kernels, device=device, threads=threads)
    started = time.perf_counter()
    if data is not None:
        result = evaluate_prepared(trained, data, split or "gold", batch_size)
    else:
        assert raw is not None
        result = score_raw(trained, raw, predictions, batch_size)
    seconds = time.perf_counter() - started
    result = {"run": str(run), "model": trained.config["model"], "checkpoint": trained.path.name, **result,
              "rows_per_s": result["rows"] / seconds}
    click.echo(json.dumps(result, indent=2, allow_nan=False) if as_json else _table(result))


def evaluate_prepared(trained: Trained, data: Path, split: str, batch_size: int | None) -> dict[str, Any]:
    """`evaluate.split_report` of a prepared split; UserError where the data differ from those of the run."""
    artifacts = Artifacts.load(data)
    differences = trained.artifacts.differences(artifacts)
    if differences:
        raise UserError(f"{data} was prepared otherwise than the data of {trained.path}: {'; '.join(differences)}")
    with _progress(artifacts.counts[split]) as progress:
        return split_report(trained.model, data, artifacts, split, progress=progress, **trained.options(batch_size))


def score_raw(trained: Trained, raw: Path, predictions: Path | None, batch_size: int | None) -> dict[str, Any]:
    """`score.score` of a raw file; UserError for rows without label if no predictions are asked for either."""
    artifacts, counts = trained.artifacts, None
    if artifacts.counts_values:
        counts = ValueCounts.load(trained.path.parent, artifacts.values, artifacts.hash_bins)
    pieces = read_features([raw], settings=artifacts, counts=counts)
    first = next(pieces, None)
    if first is None:
        raise UserError(f"{raw} holds no rows")
    labelled = first.label is not None
    if not labelled and predictions is None:
        raise UserError(f"{raw} has no labels (39 columns), so that there are no metrics; "
                        "say where predictions go: --predictions OUT.parquet")
    with _progress(None) as progress:
        metrics = score(trained.model, itertools.chain([first], pieces), labelled=labelled, predictions=predictions,
                        progress=progress, **trained.options(batch_size))
    return {"file": str(raw), **metrics, **({} if predictions is None else {"predictions": str(predictions)})}


@contextmanager
def _progress(total: int | None) -> Iterator[Progress]:
    """Rows done and rows/s on stderr: a bar on a terminal, otherwise a line now and then."""
    if sys.stderr.isatty():
        with tqdm(total=total, unit=" rows", unit_scale=True, dynamic_ncols=True, desc="scoring") as bar:
            yield bar.update
        return
    of = "" if total is None else f"/{total:,}"
    started = line_time = time.monotonic()
    rows = 0

    def line(count: int) -> None:
        nonlocal rows, line_time
        rows += count
        now = time.monotonic()
        if now - line_time >= LINE_SECONDS:
            click.echo(f"scored {rows:,}{of} rows, {rows / (now - started):,.0f} rows/s", err=True)
            line_time = now

    yield line


def _table(result: dict[str, Any]) -> str:
    """The result, a line a figure."""
    best = result.get("best_possible") or {}
    lines = {"run": f"{result['run']} ({result['model']}, {result['checkpoint']})", "file": result["file"]}
    for key, name in FIGURES.items():
        if key in result:
            value = result[key]
            text = "undefined" if value is None else f"{value:,}" if key == "rows" else f"{value:.4f}"
            lines[name] = text + (f"   (best possible {best[key]:.4f})" if key in best else "")
    lines["rows/s"] = f"{result['rows_per_s']:,.0f}"
    if "predictions" in result:
        lines["predictions"] = result["predictions"]
    return "\n".join(f"{name:<20}{value}" for name, value in lines.items())


def main() -> None:
    """Entry point of the console script."""
    run_command(command, NAME)


if __name__ == "__main__":
    main()
