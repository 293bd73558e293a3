"""`ctr-train`: train a model on prepared rows and evaluate it on the gold rows."""

from pathlib import Path
from typing import Any

import click

from ctr_models import MODELS
from ctr_models.base import SHORTCUTS
from ctr_models.numeric import NUMERIC_MODES

from .command import PATH, run_command
from .machine import EMBEDDING_DTYPES, PRECISIONS
from .optim import EMBEDDING_OPTIMIZERS
from .recipes import HYPERPARAMETERS, NAMES
from .run import MACHINE, Request, run
from .schedule import SCHEDULES

NAME = "ctr-train"


@click.command(NAME, context_settings={"max_content_width": 120, "show_default": True})
@click.option("--model", type=click.Choice(list(MODELS)), help="What to train; needed unless --resume says it.")
@click.option("--data", multiple=True, type=PATH, help="Raw rows, plain or .gz, which are "
              "prepared first (further files may follow the options: --data A B C), or a directory made by `ctr-data "
              "prepare`.  [default: synthetic rows, made on first use]")
@click.argument("more", nargs=-1, type=PATH)
@click.option("--prepared", type=PATH, help="Where raw rows are prepared; used again by later "
              "runs on the same files.  [default: `data` in the run's directory]")
@click.option("--split", type=click.Choice(["hash", "tail"]), help="Of raw rows: validation lines are drawn from the "
              "line's index, or the last ones, as time does.  [default: hash]")
@click.option("--valid-ratio", type=float, help="Of raw rows: share of validation lines.  [default: 0.05]")
@click.option("--from", "run_from", type=PATH, help="Go on training that finished run's model on "
              "the rows of --data, its next day.")
@click.option("--recipe", type=click.Choice(NAMES), help="Hyperparameters by name; options below override single "
              "ones.  [default: the one that the data were prepared for]")
@click.option("--out", type=PATH, help="Directory of the run.  [default: runs/MODEL-TIME]")
@click.option("--resume", is_flag=True, default=None, help="Go on with the interrupted run in --out.")
@click.option("--skip-if-done", is_flag=True, default=None, help="Print the result of the same run in --out if it is "
              "finished, go on with it if it is not.")
@click.option("--epochs", type=int, help="Passes over the data, or parts of --steps-per-epoch.")
@click.option("--steps-per-epoch", type=int, help="Steps of an epoch; at most one pass over the data.")
@click.option("--batch-size", type=int, help="Rows of a step.")
@click.option("--lr", type=float, help="Learning rate of AdamW, for all but the embedding tables.")
@click.option("--weight-decay", type=float, help="Of AdamW; norms, biases and CLS do not decay.")
@click.option("--embedding-lr", type=float, help="Learning rate of the embedding tables.")
@click.option("--embedding-optimizer", type=click.Choice(list(EMBEDDING_OPTIMIZERS)), help="For the embedding tables.")
@click.option("--embedding-weight-decay", type=float, help="Of the rows of the tables, also for the steps that do not "
              "touch them.")
@click.option("--embedding-dtype", type=click.Choice(list(EMBEDDING_DTYPES)), help="Of the tables in memory; bf16 is "
              "rounded stochastically.")
@click.option("--schedule", type=click.Choice(SCHEDULES), help="Of both learning rates.")
@click.option("--warmup", type=float, help="Steps of warm-up; below 1, a share of all steps.")
@click.option("--dropout", type=float, help="Probability of dropping a unit, in [0, 1).")
@click.option("--embedding-dropout", type=float, help="Probability of leaving a field's embedding out, in [0, 1).")
@click.option("--pooling", type=click.Choice(["cls", "mean"]), help="FT-Transformer: what the head reads.")
@click.option("--shortcut", type=click.Choice(SHORTCUTS), help="FT-Transformer, AutoInt: from the tokens to the logit, "
              "past the layers.")
@click.option("--variant", type=click.Choice(["study", "paper"]), help="The baseline study's form of the model, or its "
              "paper's.")
@click.option("--tables", type=click.Choice(["shared", "per-field"]), help="One embedding table, or one a field.")
@click.option("--numeric", type=click.Choice(NUMERIC_MODES), help="Numeric features: one token for all, or one each by "
              "that map.  [default: the variant's own]")
@click.option("--precision", type=click.Choice(PRECISIONS), help="bf16: autocast; tf32: of matrix products on CUDA.")
@click.option("--validation-share", type=float, help="Share of the training rows, the last ones, that watch the "
              "run and are not trained on; 0: none.")
@click.option("--eval-every", type=float, help="Steps between evaluations on these rows, or below 1 a share of an "
              "epoch; the best weights are kept; 0: none.")
@click.option("--patience", type=int, help="Stop after so many evaluations without a better logloss; 0: never.")
@click.option("--ema", type=float, help="Decay of a moving average of the weights outside the tables, with which the "
              "model is evaluated; 0: none.")
@click.option("--temperature", type=float, help="What the logits are divided by at the end; above 1 for a model "
              "that is too sure.")
@click.option("--calibration-rows", type=int, help="Last training rows on which the mean prediction is set to the "
              "click rate at the end; 0: none.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Of weights, dropout and the order of rows.  "
              "[default: 0]")
@click.option("--deterministic", is_flag=True, default=None, help="Only deterministic algorithms; slower on CUDA.")
@click.option("--kernels", type=click.Choice(["auto", "eager", "native", "triton"]), help="Backend of the operations.  "
              "[default: auto]")
@click.option("--cuda-graph/--no-cuda-graph", default=None, help="Run a training step as one CUDA graph.  [default: on "
              "CUDA with triton kernels]")
@click.option("--device", help="cpu, cuda or cuda:N.  [default: cuda where there is one]")
@click.option("--threads", type=click.IntRange(1), help="CPU threads of torch.  [default: torch's]")
def command(model: str | None, data: tuple[Path, ...], more: tuple[Path, ...], prepared: Path | None,
            split: str | None, valid_ratio: float | None, run_from: Path | None, recipe: str | None, out: Path | None,
            resume: bool | None, skip_if_done: bool | None, seed: int | None, deterministic: bool | None,
            **options: Any) -> int:
    """Train DCNv2, AutoInt or FT-Transformer on a click log; ends with logloss and AUC on the gold rows.

    \b
    From a raw file to a model, and on with the rows of the next day:
        ctr-train --model ft --data clicks.tsv.gz --out runs/day1
        ctr-train --from runs/day1 --data next.tsv.gz --out runs/day2

    The run's directory holds config.json, metrics.jsonl, last.pt, best.pt and gold.json. Ctrl-C or kill saves a
    checkpoint; --resume goes on from it as if nothing had happened.
    """
    return run(Request(model, recipe, seed, deterministic, {name: options[name] for name in HYPERPARAMETERS},
                       {name: options[name] for name in MACHINE}, out, bool(resume), bool(skip_if_done),
                       (*data, *more), prepared, {"split": split, "valid_ratio": valid_ratio}, run_from))


def main() -> None:
    """Entry point of the console script."""
    run_command(command, NAME)


if __name__ == "__main__":
    main()
