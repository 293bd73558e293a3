"""Recipes: named sets of hyperparameters; any one of them can be overridden on the command line."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from .errors import UserError


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of a run, apart from model, data, seed and machine.

    Attributes:
        epochs, steps_per_epoch: an epoch is that many steps, or one pass over the data if that is shorter or
            steps_per_epoch is None. Epochs shorter than a pass continue it, so that no row comes twice before
            all rows have come once.
        batch_size: rows of a step.
        lr, weight_decay: of AdamW, for everything but the tables.
        embedding_lr, embedding_optimizer: "sgd", "rowwise-adagrad", "adagrad" or "lazy-adam", for the tables.
        embedding_weight_decay: decoupled decay of table rows, for the steps that did not touch them, too; above 0 it
            costs 4 bytes a row.
        embedding_dtype: "fp32" or "bf16", of the tables in memory; updates are fp32, rounded stochastically to bf16.
        schedule, warmup: of both learning rates; warmup in steps, or below 1 as a share of all steps.
        dropout, embedding_dropout, pooling, shortcut, variant, tables, numeric: arguments of the model (pooling:
            FT-Transformer only; shortcut: not DCNv2).
        precision: "fp32", "tf32" or "bf16".
        eval_every: steps between evaluations on validation rows, and one after the last step; 0: none, the last
            weights are the result.
        patience: stop after that many evaluations without a better logloss; 0: never.
        ema: decay of the moving average of the weights outside the tables that the run is evaluated with; 0: none.
        temperature: after the last step the logits are divided by it; 1: as they are.
        calibration_rows: then the logit's bias is moved until the mean prediction on that many training rows, the last
            ones, is their click rate; 0: not at all.
        by_model: values that differ for a model, {"ft": {"lr": ...}}.
    """

    epochs: int = 1
    steps_per_epoch: int | None = None
    batch_size: int = 4096
    lr: float = 1e-3
    weight_decay: float = 0.01
    embedding_lr: float = 0.02
    embedding_optimizer: str = "rowwise-adagrad"
    embedding_weight_decay: float = 0.0
    embedding_dtype: str = "fp32"
    schedule: str = "constant"
    warmup: float = 0.0
    dropout: float = 0.1
    embedding_dropout: float = 0.0
    pooling: str = "cls"
    shortcut: str = "none"
    variant: str = "study"
    tables: str = "shared"
    numeric: str | None = None
    precision: str = "fp32"
    eval_every: int = 0
    patience: int = 0
    ema: float = 0.0
    temperature: float = 1.0
    calibration_rows: int = 0
    by_model: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


_ONE_PASS = Recipe(batch_size=512, lr=2e-3, embedding_lr=0.05, schedule="linear", warmup=0.1,
                   by_model={"ft": {"embedding_lr": 0.02}})
DEFAULT = "small"

# Each is explained, with what it was compared with, in docs/recipes.md.
RECIPES: dict[str, Recipe] = {
    # The baseline study as it reports itself. For a mean loss SGD at 0.01 barely moves a row of the table.
    "baseline-v1": Recipe(epochs=2, steps_per_epoch=2000, embedding_optimizer="sgd", embedding_lr=0.01),
    # Up to a few million rows, prepared with --history --min-count 10. Two passes, in which the history teaches and the
    # rows of the tables can hardly learn single rows by heart: they move slowly, and a fifth of them is left out.
    "small": Recipe(epochs=2, batch_size=512, lr=4e-3, embedding_lr=0.005, schedule="linear", warmup=0.1, dropout=0.3,
                    embedding_dropout=0.2, numeric="affine", temperature=1.06, calibration_rows=1_000_000,
                    by_model={"autoint": {"shortcut": "cross"},
                              "ft": {"lr": 2e-3, "shortcut": "cross", "pooling": "mean"}}),
    # The 45 million rows of Criteo in one pass: reasoned from the others, not measured. Rows come often enough for a
    # table that learns faster, and a larger batch takes less time.
    "full": replace(_ONE_PASS, batch_size=4096, numeric="affine"),
    # What `make train` runs on synthetic rows, within minutes on two cores.
    "demo": replace(_ONE_PASS, eval_every=200),
}

HYPERPARAMETERS = tuple(f.name for f in fields(Recipe) if f.name != "by_model")


def resolve_recipe(name: str, model: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Every hyperparameter of a run: the recipe's, the recipe's for that model, then overrides that are not None.

    Raises UserError for an unknown recipe, for values out of range and for a pooling or shortcut of a model that has
    none.
    """
    if name not in RECIPES:
        raise UserError(f"recipe {name!r}: choose one of {', '.join(RECIPES)}")
    if model != "ft" and overrides.get("pooling") is not None:
        raise UserError(f"--pooling {overrides['pooling']}: the model {model} has no choice of pooling, only ft has")
    if model == "dcnv2" and overrides.get("shortcut") is not None:
        raise UserError(f"--shortcut {overrides['shortcut']}: the model dcnv2 has none, only ft and autoint have")
    recipe = RECIPES[name]
    given = {key: value for key, value in overrides.items() if value is not None}
    if given.get("variant") == "paper":
        given.setdefault("pooling", "cls")  # the recipes' is for the study's form; the paper's reads its CLS token
    resolved = replace(recipe, **{**recipe.by_model.get(model, {}), **given})
    values = {key: getattr(resolved, key) for key in HYPERPARAMETERS}
    _check(values)
    return values


def _check(values: Mapping[str, Any]) -> None:
    """UserError for the first value out of range."""
    ranges = {
        "epochs": (1, None), "batch_size": (1, None), "steps_per_epoch": (1, None), "lr": (0.0, None),
        "embedding_lr": (0.0, None), "weight_decay": (0.0, None), "embedding_weight_decay": (0.0, None),
        "warmup": (0.0, None), "eval_every": (0, None), "patience": (0, None), "calibration_rows": (0, None),
        "temperature": (0.01, None), "ema": (0.0, 1.0), "dropout": (0.0, 1.0), "embedding_dropout": (0.0, 1.0),
    }
    for key, (low, high) in ranges.items():
        value = values[key]
        option = "--" + key.replace("_", "-")
        if value is None:
            continue
        if not low <= value < float("inf"):  # NaN as well
            raise UserError(f"{option} {value}: at least {low} and finite is needed")
        if high is not None and value >= high:
            raise UserError(f"{option} {value}: below {high:g} is needed")
    if values["embedding_lr"] * values["embedding_weight_decay"] >= 1.0:
        raise UserError(f"--embedding-weight-decay {values['embedding_weight_decay']}: times the embeddings' learning "
                        f"rate {values['embedding_lr']} it must be below 1, or a step leaves nothing of a row")
    if values["patience"] and not values["eval_every"]:
        raise UserError(f"--patience {values['patience']} needs --eval-every: there is no evaluation to wait for")
