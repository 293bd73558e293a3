"""A whole training step of each model, forward to both optimizers: ours against eager and torch.compile."""

import functools
from collections.abc import Callable, Sequence

import click
import torch
from common.harness import Floors, Row, compare, measure_floors
from common.options import Settings, bench_options
from torch.nn import functional as F

from ctr_kernels import EmbeddingTable, SparseSGD
from ctr_models import MODELS, CTRModel
from ctr_train.command import run_command

NUM_EMBEDDINGS = 2_000_000
DECAY = 0.01
# Provider -> (kernels of the model, its optimizer for the tables, whether torch.compile takes the model).
PROVIDERS = {"ours": ("auto", "rows", False), "eager": ("eager", "rows", False), "compile": ("eager", "rows", True),
             "eager, AdamW on all": ("eager", "AdamW", False)}
FLOPS = {"ft": 70e9, "autoint": 44e9}  # of a step at B=4096, F=27, D=64; DCNv2's is bound by memory


def optimizers_of(model: CTRModel, tables: str, kernels: str) -> list[torch.optim.Optimizer]:
    """tables="rows": SparseSGD for the tables, AdamW for the rest; "AdamW": it alone, whose state is twice the model.

    AdamW takes no sparse gradient, so that the lookup is then one whose gradient is dense.
    """
    if tables == "rows":
        return [SparseSGD(model.embedding_parameters(), lr=0.01, kernels=kernels),
                torch.optim.AdamW(model.dense_parameter_groups(DECAY), lr=1e-3)]
    for module in model.modules():
        if isinstance(module, EmbeddingTable):
            module.forward = functools.partial(F.embedding, weight=module.weight)
    return [torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=DECAY)]


def training_step(model: CTRModel, optimizers: Sequence[torch.optim.Optimizer], compiled: bool,
                  batch: Sequence[torch.Tensor], precision: torch.dtype) -> Callable[[], list[torch.Tensor]]:
    """A call that takes one step on (dense, sparse, label) and returns the loss; in autocast below fp32."""
    dense, sparse, label = batch
    forward = torch.compile(model, dynamic=False) if compiled else model

    def run() -> list[torch.Tensor]:
        with torch.autocast(dense.device.type, precision, enabled=precision != torch.float32):
            loss = F.binary_cross_entropy_with_logits(forward(dense, sparse).float(), label)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return [loss.detach()]

    return run


def random_batch(rows: int, device: torch.device) -> list[torch.Tensor]:
    """dense [B, 13], ids [B, 26] uniform over the table, labels [B]."""
    dense, sparse = torch.rand(rows, 13), torch.randint(NUM_EMBEDDINGS, (rows, 26))
    return [x.to(device) for x in (dense, sparse, (torch.rand(rows) < 0.25).float())]


def measure(s: Settings, name: str, floors: Floors, seconds: float) -> list[Row]:
    """The providers' steps of one model, each with a table of its own."""
    batch = random_batch(s.batch, s.device)
    functions = {}
    for provider, (kernels, tables, compiled) in s.choose(PROVIDERS, ("ours", "eager", "compile")).items():
        torch.manual_seed(0)
        model = MODELS[name](num_embeddings=NUM_EMBEDDINGS, kernels=kernels).to(s.device)
        functions[provider] = training_step(model, optimizers_of(model, tables, kernels), compiled, batch, s.dtype)
    return compare(functions, kernel=f"step {name}", mode="training step", x=f"B={s.batch} {s.precision}",
                   device=s.device, flops=FLOPS.get(name, 0.0) * s.batch / 4096, floors=floors, samples=s.batch,
                   rounds=15, seconds=seconds)


@click.command()
@click.option("--models", default="ft,autoint,dcnv2", show_default=True, help="Comma-separated.")
@bench_options
def main(settings: Settings, models: str) -> None:
    """Time whole training steps at random ids in a table of 2 M rows. --fields, --dim and --heads do not apply: the
    models have those of the baseline study. `eager` has everything from PyTorch but the row update, whose eager
    form sums duplicates first; `AdamW on all` is what one writes who does not think of the table."""
    if settings.sweep == "fields":
        raise click.BadParameter("the models have their own fields; only the batch can be swept", param_hint="--sweep")
    names = models.split(",")
    for name in names:
        if name not in MODELS:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(MODELS)}", param_hint="--models")
    floors = measure_floors(settings.device, settings.dtype)
    rows = [row for point in settings.points() for name in names
            for row in measure(point, name, floors, 10.0 if point.sweep else 25.0)]
    settings.finish(rows, floors)


if __name__ == "__main__":
    run_command(main, "bench/step.py")
