"""Recipes: named sets of hyperparameters, and the preparation of the data that they want.

Any value can be overridden on the command line. What a recipe does also depends on what the data hold: see `Facts`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from .data.artifacts import Artifacts
from .data.folds import FOLDS
from .data.preparation import Preparation
from .errors import UserError


@dataclass(frozen=True)
class Facts:
    """What the hyperparameters of a run depend on in its data.

    Attributes:
        rows: training rows.
        history: whether each field's value comes with its history.
    """

    rows: int = 100_000
    history: bool = True

    @classmethod
    def of(cls, artifacts: Artifacts) -> "Facts":
        return cls(artifacts.counts["train"], artifacts.history)


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of a run, apart from model, data, seed and machine.

    Attributes:
        epochs, steps_per_epoch: an epoch is that many steps, or one pass over the data if that is shorter or
            steps_per_epoch is None. Epochs shorter than a pass continue it, so that no row comes twice before
            all rows have come once.
        batch_size: rows of a step.
        min_steps: while an epoch has fewer steps the batch is halved, down to 32 rows, and the learning rate with it by
            its square root.
        lr, weight_decay: of AdamW, for everything but the tables.
        embedding_lr, embedding_optimizer: "sgd", "rowwise-adagrad", "adagrad" or "lazy-adam", for the tables.
        embedding_weight_decay: decoupled decay of table rows, for the steps that did not touch them, too; above 0 it
            costs 4 bytes a row.
        embedding_dtype: "fp32" or "bf16", of the tables in memory; updates are fp32, rounded stochastically to bf16.
        schedule, warmup: of both learning rates; warmup in steps, or below 1 as a share of all steps.
        dropout, embedding_dropout, pooling, shortcut, variant, tables, numeric: arguments of the model (pooling:
            FT-Transformer only; shortcut: not DCNv2).
        precision: "fp32", "tf32" or "bf16".
        validation_share: share of the training rows, the last ones, that watch the run and are not trained on.
        eval_every: steps between evaluations on these rows, below 1 as a share of an epoch, and one after the last
            step; 0: none. The weights of the best evaluation are the result, without any the last ones.
        patience: stop after that many evaluations without a better logloss; 0: never.
        ema: decay of the moving average of the weights outside the tables that the run is evaluated with; 0: none.
        temperature: the logits of the weights that are kept are divided by it; 1: as they are.
        calibration_rows: then the logit's bias is moved until the mean prediction on that many training rows, the last
            ones, is their click rate; 0: not at all.
        preparation: how the data are prepared for the recipe.
        by_model: values that differ for a model, {"ft": {"lr": ...}}.
        without_history: values that differ on data without history.
    """

    epochs: int = 1
    steps_per_epoch: int | None = None
    batch_size: int = 4096
    min_steps: int = 0
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
    validation_share: float = 0.0
    eval_every: float = 0.0
    patience: int = 0
    ema: float = 0.0
    temperature: float = 1.0
    calibration_rows: int = 0
    preparation: Preparation = Preparation()
    by_model: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    without_history: Mapping[str, Any] = field(default_factory=dict)


_WATCHED: dict[str, Any] = {"validation_share": 0.05, "eval_every": 0.5, "patience": 4}
DEFAULT = "auto"
SMALL_ROWS = 5_000_000  # up to so many training rows `auto` is `small`, beyond it is `full`

# Each is explained, with what it was compared with, in docs/recipes.md.
RECIPES: dict[str, Recipe] = {
    # Up to a few million rows. Two or three passes, in which the history teaches and the rows of the tables can hardly
    # learn single rows by heart: they move slowly, and a fifth of them is left out. Without history the tables have to
    # teach, in one pass.
    "small": Recipe(epochs=2, batch_size=512, min_steps=100, lr=4e-3, embedding_lr=0.005, schedule="linear", warmup=0.1,
                    dropout=0.3, embedding_dropout=0.2, numeric="affine", calibration_rows=1_000_000,
                    preparation=Preparation(min_count=10, history=True, folds=FOLDS),
                    by_model={"dcnv2": {"epochs": 3}, "autoint": {"shortcut": "cross"},
                              "ft": {"lr": 2e-3, "shortcut": "cross", "pooling": "mean"}},
                    without_history={"epochs": 1, "embedding_lr": 0.05, "embedding_dropout": 0.0}, **_WATCHED),
    # The 45 million rows of Criteo in one pass: reasoned from the others, not measured. Rows come often enough for a
    # table that learns faster, and a larger batch takes less time.
    "full": Recipe(batch_size=4096, lr=2e-3, embedding_lr=0.05, schedule="linear", warmup=0.1, numeric="affine",
                   preparation=Preparation(min_count=10, history=True), by_model={"ft": {"embedding_lr": 0.02}},
                   **_WATCHED),
    # The baseline study as it reports itself. For a mean loss SGD at 0.01 barely moves a row of the table.
    "baseline-v1": Recipe(epochs=2, steps_per_epoch=2000, embedding_optimizer="sgd", embedding_lr=0.01),
}
NAMES = (DEFAULT, *RECIPES)

_NOT_HYPERPARAMETERS = ("min_steps", "preparation", "by_model", "without_history")
HYPERPARAMETERS = tuple(f.name for f in fields(Recipe) if f.name not in _NOT_HYPERPARAMETERS)
MIN_BATCH = 32
MAX_FLOAT32 = 3.4e38


def find_recipe(name: str, facts: Facts) -> Recipe:
    """The recipe of that name; `auto` is one of the others, by the number of rows. UserError for an unknown name."""
    if name == DEFAULT:
        name = "small" if facts.rows <= SMALL_ROWS else "full"
    if name not in RECIPES:
        raise UserError(f"recipe {name!r}: choose one of {', '.join(NAMES)}")
    return RECIPES[name]


def preparation_of(name: str) -> Preparation:
    """How data are prepared for the recipe of that name; UserError for an unknown one."""
    return find_recipe(name, Facts()).preparation


def resolve_recipe(name: str, model: str, overrides: Mapping[str, Any], facts: Facts | None = None) -> dict[str, Any]:
    """Every hyperparameter of a run: the recipe's for that model and those data, then overrides that are not None.

    Raises UserError for an unknown recipe, for values out of range and for a pooling or shortcut of a model that has
    none.
    """
    facts = facts or Facts()
    recipe = find_recipe(name, facts)
    if model != "ft" and overrides.get("pooling") is not None:
        raise UserError(f"--pooling {overrides['pooling']}: the model {model} has no choice of pooling, only ft has")
    if model == "dcnv2" and overrides.get("shortcut") is not None:
        raise UserError(f"--shortcut {overrides['shortcut']}: the model dcnv2 has none, only ft and autoint have")
    given = {key: value for key, value in overrides.items() if value is not None}
    if given.get("variant") == "paper":
        given.setdefault("pooling", "cls")  # the recipes' is for the study's form; the paper's reads its CLS token
    if given.get("eval_every"):
        given.setdefault("validation_share", recipe.validation_share or _WATCHED["validation_share"])
    if given.get("eval_every") == 0:
        given.setdefault("patience", 0)
    if given.get("validation_share") == 0.0:  # nothing watches the run
        given.setdefault("eval_every", 0.0)
        given.setdefault("patience", 0)
    own = {**recipe.by_model.get(model, {}), **({} if facts.history else recipe.without_history)}
    resolved = replace(recipe, **own)
    if "batch_size" not in given:
        resolved = replace(resolved, **fit_batch(name, resolved.batch_size, resolved.lr, facts))
    resolved = replace(resolved, **given)
    values = {key: getattr(resolved, key) for key in HYPERPARAMETERS}
    check_hyperparameters(values)
    return values


def fit_batch(recipe: str, batch_size: int, lr: float, facts: Facts) -> dict[str, Any]:
    """{"batch_size", "lr"} for an epoch of the recipe's `min_steps` steps, if that can be."""
    batch, min_steps = batch_size, find_recipe(recipe, facts).min_steps
    while batch > MIN_BATCH and facts.rows < min_steps * batch:
        batch //= 2
    return {"batch_size": batch, "lr": lr * (batch / batch_size) ** 0.5}


def check_hyperparameters(values: Mapping[str, Any]) -> None:
    """UserError for the first value out of range."""
    ranges = {
        "epochs": (1, None), "batch_size": (1, None), "steps_per_epoch": (1, None), "lr": (0.0, None),
        "embedding_lr": (0.0, None), "weight_decay": (0.0, None), "embedding_weight_decay": (0.0, None),
        "warmup": (0.0, None), "eval_every": (0, None), "patience": (0, None), "calibration_rows": (0, None),
        "temperature": (0.01, None), "validation_share": (0.0, 1.0),
        "ema": (0.0, 1.0), "dropout": (0.0, 1.0), "embedding_dropout": (0.0, 1.0),
    }
    for key, (low, high) in ranges.items():
        value = values[key]
        option = "--" + key.replace("_", "-")
        if value is None:
            continue
        if not low <= value < float("inf"):  # NaN as well
            raise UserError(f"{option} {value}: at least {low} and finite is needed")
        if isinstance(value, float) and value > MAX_FLOAT32:
            raise UserError(f"{option} {value}: at most {MAX_FLOAT32:g} is needed, the largest float32")
        if high is not None and value >= high:
            raise UserError(f"{option} {value}: below {high:g} is needed")
    if values["embedding_lr"] * values["embedding_weight_decay"] >= 1.0:
        raise UserError(f"--embedding-weight-decay {values['embedding_weight_decay']}: times the embeddings' learning "
                        f"rate {values['embedding_lr']} it must be below 1, or a step leaves nothing of a row")
    if values["eval_every"] and not values["validation_share"]:
        raise UserError(f"--eval-every {values['eval_every']:g} needs a --validation-share above 0: there are no rows "
                        "to evaluate on")
    if values["patience"] and not values["eval_every"]:
        raise UserError(f"--patience {values['patience']} needs --eval-every: there is no evaluation to wait for")
