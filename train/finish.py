"""The end of a run: its kept weights are calibrated and evaluated on the gold rows; gold.json and the final table."""

from pathlib import Path
from typing import Any

import click

from .calibrate import calibrating_shift
from .checkpoint import UNCALIBRATED, load_checkpoint, load_scored, scored_weights, write_checkpoint
from .data.dataset import Split
from .evaluate import gold_report
from .loop import Trainer
from .records import read_config, read_result, write_result
from .runlog import read_log, rows_per_second, training_loss


def finish(directory: Path, trainer: Trainer, train: Split, data: Path, gold: Split | None = None) -> None:
    """Calibrate the weights that the run keeps, in their checkpoint, and write gold.json.

    Kept are the weights of the best evaluation, or the last ones where nothing was evaluated; the checkpoint of the
    last step, from which a run goes on, keeps its weights as they are.

    Args:
        trainer: has trained; its model gets the kept weights.
        train: all training rows, those that watched the run among them.
        gold: as they were opened when the run began; None: opened now, from `data`.
    """
    name = "last.pt" if trainer.best is None else "best.pt"
    content, config = load_checkpoint(directory / name), trainer.config
    options = {"batch_size": config["batch_size"], "device": trainer.device, "precision": config["precision"]}
    calibration = dict(UNCALIBRATED)
    if config["temperature"] != 1.0 or config["calibration_rows"]:
        trainer.model.load_state_dict(scored_weights(content))
        calibration["scale"] = 1.0 / config["temperature"]
        trainer.model.scale_logits(calibration["scale"])
        if config["calibration_rows"]:
            rows = train.part(max(0, train.rows - config["calibration_rows"]), train.rows)
            click.echo(f"calibrating on {rows.rows:,} training rows", err=True)
            calibration["shift"] = calibrating_shift(trainer.model, rows, **options)
        content["calibration"] = calibration
        write_checkpoint(directory / name, content)
    load_scored(trainer.model, content)
    click.echo(f"evaluating on {trainer.artifacts.counts['gold']:,} gold rows", err=True)
    report = gold_report(trainer.model, data, trainer.artifacts, rows=gold, **options)
    log = read_log(directory, trainer.log_chain)
    write_result(directory, {
        **report, "checkpoint": name, "steps": trainer.step, "rows_trained": trainer.step * config["batch_size"],
        "rows_per_s": rows_per_second(log), "logit_calibration": calibration, "log": trainer.log_chain,
        "training_loss": training_loss(log, content["step"]), "validation": _validation(trainer, log),
    })


def _validation(trainer: Trainer, log: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What the rows that watched the run say; None without any."""
    if trainer.best is None or trainer.valid is None:
        return None
    last = max(entry["step"] for entry in log if entry.get("event") == "eval")
    return {"rows": trainer.valid.rows, "logloss": trainer.best["logloss"], "step": trainer.best["step"],
            "improving": trainer.best["step"] == last}


def result_table(directory: Path) -> str:
    """The result of a finished run, a line a figure."""
    config, gold = read_config(directory), read_result(directory)
    best, validation = gold.get("best_possible"), gold["validation"]

    def against(metric: str) -> str:
        value = "undefined" if gold[metric] is None else f"{gold[metric]:.4f}"
        return value if best is None else f"{value}   (best possible {best[metric]:.4f})"

    lines = {"model": f"{config['model']} ({config['variant']}), recipe {config['recipe']}"}
    if gold["training_loss"] is not None:
        lines["training loss"] = f"{gold['training_loss']:.4f}   (with dropout, the steps before the kept weights)"
    if validation is not None:
        lines["validation"] = (f"{validation['logloss']:.4f}   (the last {validation['rows']:,} training rows, not "
                               "trained on)")
        lines["best step"] = f"{validation['step']:,} of {gold['steps']:,}, " + (
            "the last: still improving" if validation["improving"] else "kept: worse afterwards")
    lines |= {
        "gold rows": f"{gold['rows']:,}",
        "logloss": against("logloss"),
        "AUC": against("auc"),
        "rows trained": f"{gold['rows_trained']:,} in {gold['steps']:,} steps",
        "rows/s": "unknown" if gold["rows_per_s"] is None else f"{gold['rows_per_s']:,.0f}",
        "run": str(directory),
    }
    return "\n".join(f"{name:<15}{value}" for name, value in lines.items())
