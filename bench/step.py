"""A whole training step of each model, forward to both optimizers: ours against eager and torch.compile."""

from collections.abc import Callable

import click
import torch
from harness import Row, Settings, bench_options, measure_floors, measure_pairs, saved_bytes, time_row
from torch.nn import functional as F

from ctr_kernels import SparseSGD
from ctr_models import MODELS

NUM_EMBEDDINGS = 2_000_000
PROVIDERS = {"ours": ("auto", False), "eager": ("eager", False), "compile(eager)": ("eager", True)}
FLOPS = {"ft": 70e9, "autoint": 44e9}  # of a step at B=4096, F=27, D=64; DCNv2's is bound by memory


def training_step(model: torch.nn.Module, compiled: bool, kernels: str, dense: torch.Tensor, sparse: torch.Tensor,
                  label: torch.Tensor) -> Callable[[], object]:
    optimizers = [SparseSGD(model.embedding_parameters(), lr=0.01, kernels=kernels),
                  torch.optim.AdamW(model.dense_parameter_groups(0.01), lr=1e-3)]
    forward = torch.compile(model, dynamic=False) if compiled else model

    def run() -> object:
        loss = F.binary_cross_entropy_with_logits(forward(dense, sparse), label)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return loss

    return run


@click.command()
@click.option("--models", default="ft,autoint,dcnv2", show_default=True, help="Comma-separated.")
@bench_options
def main(settings: Settings, models: str) -> None:
    """Time whole training steps at random ids in a table of 2 M rows. --fields, --dim and --heads do not apply: the
    models have those of the baseline study. `eager` has everything from PyTorch but the row update, whose eager
    form sums duplicates first."""
    s = settings
    dense, sparse = torch.rand(s.batch, 13, device=s.device), torch.randint(NUM_EMBEDDINGS, (s.batch, 26))
    sparse, label = sparse.to(s.device), (torch.rand(s.batch, device=s.device) < 0.25).float()
    floors = measure_floors(s.device)
    rows = []
    for name in models.split(","):
        built = {}
        for provider, (kernels, compiled) in s.choose(PROVIDERS).items():
            torch.manual_seed(0)
            built[provider] = (MODELS[name](num_embeddings=NUM_EMBEDDINGS, kernels=kernels).to(s.device), compiled,
                               kernels)
        functions = {provider: training_step(*b, dense, sparse, label) for provider, b in built.items()}
        for provider, timing in measure_pairs(functions, device=s.device, rounds=15, seconds=60).items():
            row = time_row(provider, timing, kernel=name, mode="training step", x=f"B={s.batch} {s.precision}",
                           flops=FLOPS.get(name, 0.0) * s.batch / 4096, floors=floors)
            rows.append(row)
            if timing.p50:
                rows.append(Row(kernel=name, provider=provider, mode="training step", metric="rate", unit="rows/s",
                                x=row.x, p50=1e3 * s.batch / timing.p50))
        for provider, (model, compiled, _) in built.items():
            if not compiled:
                kept = saved_bytes(lambda model=model: model(dense, sparse), exclude=[*model.parameters(), dense,
                                                                                      sparse])
                rows.append(Row(kernel=name, provider=provider, mode="saved for backward", metric="memory", unit="MB",
                                x=f"B={s.batch} {s.precision}", p50=kept / 1e6))
    s.finish(rows)


if __name__ == "__main__":
    main()
