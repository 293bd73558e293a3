"""A whole training step of each model, forward to both optimizers: ours against eager and torch.compile."""

import click
import torch
from common.harness import Floors, Row, compare, measure_floors
from common.options import Settings, bench_options
from common.training import NUM_EMBEDDINGS, optimizers_of, random_batch, training_step

from ctr_models import MODELS
from ctr_train.command import run_command

# Provider -> (kernels of the model, its optimizer for the tables, whether torch.compile takes the model).
PROVIDERS = {"ours": ("auto", "rows", False), "eager": ("eager", "rows", False), "compile": ("eager", "rows", True),
             "eager + AdamW on all": ("eager", "AdamW", False)}
FLOPS = {"ft": 70e9, "autoint": 44e9}  # of a step at B=4096, F=27, D=64; DCNv2's is bound by memory


def measure(s: Settings, name: str, floors: Floors) -> list[Row]:
    """The providers' steps of one model, each with a table of its own; AdamW on the table with one model alone, since
    it takes the same seconds with all."""
    batch = random_batch(s.batch, s.device)
    functions = {}
    for provider, (kernels, tables, compiled) in s.choose(PROVIDERS, ("ours", "eager", "compile")).items():
        if tables == "AdamW" and name != "ft" and provider not in s.providers:
            continue
        torch.manual_seed(0)
        model = MODELS[name](num_embeddings=NUM_EMBEDDINGS, kernels=kernels).to(s.device)
        functions[provider] = training_step(model, optimizers_of(model, tables, kernels), compiled, batch, s.dtype)
    return compare(functions, kernel=f"step {name}", mode="training step", x=f"B={s.batch} {s.precision}",
                   device=s.device, flops=FLOPS.get(name, 0.0) * s.batch / 4096, floors=floors, samples=s.batch,
                   rounds=15, **{"seconds": 8.0, "warmup": 1, **s.budget})


@click.command()
@click.option("--models", default="ft,autoint,dcnv2", show_default=True, help="Comma-separated.")
@bench_options
def main(settings: Settings, models: str) -> None:
    """Time whole training steps at random ids in a table of 2 M rows. --fields, --dim and --heads do not apply: the
    models have those of the baseline study. `eager` has everything from PyTorch but the row update, whose eager
    form sums duplicates first; `eager + AdamW on all` is what one writes who does not think of the table."""
    if settings.sweep == "fields":
        raise click.BadParameter("the models have their own fields; only the batch can be swept", param_hint="--sweep")
    names = models.split(",")
    for name in names:
        if name not in MODELS:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(MODELS)}", param_hint="--models")
    floors = measure_floors(settings.device, settings.dtype)
    rows = [row for point in settings.points() for name in names
            for row in measure(point, name, floors)]
    settings.finish(rows, floors)


if __name__ == "__main__":
    run_command(main, "bench/step.py")
