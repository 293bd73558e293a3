"""A whole training step of each model, forward to both optimizers: ours against eager and torch.compile."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import click
import torch
from click.core import ParameterSource
from common import paper
from common.harness import Floors, Row, compare, measure_floors
from common.options import Settings, bench_options
from common.training import (
    NUM_EMBEDDINGS,
    STATISTICS,
    default_recipe,
    optimizers_of,
    random_batch,
    recipe_model,
    recipe_optimizers,
    training_step,
)

from ctr_models import MODELS
from ctr_train.command import run_command


class Provider(NamedTuple):
    """Who takes the step.

    Attributes:
        kernels: of the model; compiled: whether torch.compile takes it.
        tables: optimizer of the tables, "rows": that of the recipe, SGD in the study's; or "AdamW", as of all else.
        autocast: whether it computes in bf16 autocast where the others compute in fp32.
        recipes: those whose step it takes.
    """

    kernels: str
    tables: str = "rows"
    compiled: bool = False
    autocast: bool = False
    recipes: tuple[str, ...] = ("default", "study")


PROVIDERS = {"ours": Provider("auto"), "eager": Provider("eager"),
             "eager bf16": Provider("eager", autocast=True, recipes=("default",)),
             "compile": Provider("eager", compiled=True),
             "eager + AdamW on all": Provider("eager", "AdamW", recipes=("study",))}
RTDL = "rtdl_revisiting_models"
RECIPES = ("default", "study", "paper")
FLOPS = {"ft": 70e9, "autoint": 44e9}  # of the study's step at B=4096, F=27, D=64; DCNv2's is bound by memory


def measure(s: Settings, recipe: str, name: str, floors: Floors) -> list[Row]:
    """The providers' steps of one model, each with a table of its own; AdamW on the table with one model alone, since
    it takes the same seconds with all."""
    functions = {}
    batch = random_batch(s.batch, s.device, STATISTICS if recipe == "default" else 0)
    for provider, choice in s.choose(PROVIDERS, ("ours", "eager", "eager bf16", "compile")).items():
        unasked = choice.tables == "AdamW" and name != "ft" and provider not in s.providers
        if recipe not in choice.recipes or unasked or (choice.autocast and s.precision == "bf16"):
            continue
        functions[provider] = step_of(s, recipe, name, choice, batch)
    flops = FLOPS.get(name, 0.0) * s.batch / 4096 if recipe == "study" else 0.0
    return compare(functions, kernel=f"step {name}" if recipe == "study" else f"{recipe} step {name}",
                   mode="training step", x=f"B={s.batch} {s.precision}", device=s.device, flops=flops, floors=floors,
                   samples=s.batch, rounds=15, **{"seconds": 8.0, "warmup": 1, **s.budget})


def measure_paper(s: Settings, floors: Floors) -> list[Row]:
    """FT-Transformer of its paper, next to its authors' implementation."""
    drawn = paper.batch(s.batch, s.device)
    providers: dict[str, Callable[[], Callable[..., object]]] = {
        "ours": lambda: paper.ours("auto", drawn, s.dtype, False),
        "eager": lambda: paper.ours("eager", drawn, s.dtype, False),
        "compile": lambda: paper.ours("eager", drawn, s.dtype, True),
        RTDL: lambda: paper.theirs(drawn, s.dtype, False),
        f"{RTDL} compile": lambda: paper.theirs(drawn, s.dtype, True),
    }
    functions = {}
    for name, build in s.choose(providers, ("ours", RTDL, f"{RTDL} compile")).items():
        torch.manual_seed(0)
        functions[name] = build()
    return compare(functions, kernel="paper step ft", mode="training step", x=f"B={s.batch} {s.precision}",
                   device=s.device, flops=paper.FLOPS * s.batch, floors=floors, samples=s.batch, rounds=15,
                   **{"seconds": 20.0, "warmup": 1, **s.budget})


def step_of(s: Settings, recipe: str, name: str, choice: Provider,
            batch: list[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
    """A call that trains a new model on the batch."""
    torch.manual_seed(0)
    if recipe == "default":
        config = default_recipe(name)
        model = recipe_model(config, choice.kernels, NUM_EMBEDDINGS).to(s.device)
        optimizers = recipe_optimizers(model, config, choice.kernels)
    else:
        model = MODELS[name](num_embeddings=NUM_EMBEDDINGS, kernels=choice.kernels).to(s.device)
        optimizers = optimizers_of(model, choice.tables, choice.kernels)
    return training_step(model, optimizers, choice.compiled, batch, torch.bfloat16 if choice.autocast else s.dtype)


def chosen(given: str, among: tuple[str, ...], option: str) -> list[str]:
    """The names in a comma-separated list; click.BadParameter for an unknown one."""
    names = given.split(",")
    for name in names:
        if name not in among:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(among)}", param_hint=option)
    return names


@click.command()
@click.option("--models", default="ft,autoint,dcnv2", show_default=True, help="Comma-separated.")
@click.option("--recipe", "recipes", default="default,study", show_default=True,
              help="Comma-separated: default, the recipe of ctr-train, whose batch is its own unless --batch is given; "
                   "study, the baseline study's; paper, FT-Transformer of its paper, at a batch of 1,024.")
@bench_options
def main(settings: Settings, models: str, recipes: str) -> None:
    """Time whole training steps at random ids in a table of 2 M rows. --fields, --dim and --heads do not apply: the
    models have those of their recipe. `eager` has everything from PyTorch but the row update, whose eager form sums
    duplicates first, and dropout's mask; `eager + AdamW on all` is what one writes who does not think of the table."""
    if settings.sweep == "fields":
        raise click.BadParameter("the models have their own fields; only the batch can be swept", param_hint="--sweep")
    names, wanted = chosen(models, tuple(MODELS), "--models"), chosen(recipes, RECIPES, "--recipe")
    default_batch = click.get_current_context().get_parameter_source("batch") == ParameterSource.DEFAULT
    floors = measure_floors(settings.device, settings.dtype)
    rows = []
    for point in settings.points():
        for recipe in wanted:
            if recipe == "paper":
                rows += measure_paper(replace(point, batch=1024) if default_batch else point, floors)
                continue
            for name in names:
                own = recipe == "default" and default_batch and not settings.sweep
                size = default_recipe(name)["batch_size"] if own else point.batch
                rows += measure(replace(point, batch=size), recipe, name, floors)
    settings.finish(rows, floors)


if __name__ == "__main__":
    run_command(main, "bench/step.py")
