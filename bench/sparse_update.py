"""Embedding lookup, its backward and the update of the rows: ours against nn.Embedding, sparse and dense."""

import itertools
from collections.abc import Callable

import click
import torch
from harness import Settings, bench_options, measure_floors, measure_pairs, time_row

from ctr_kernels import EmbeddingTable, SparseRowwiseAdagrad, SparseSGD

FIELDS = 26
BATCHES = 8  # taken in turn, so that no provider finds its rows in the cache


def ids_of(kind: str, num_rows: int, batch: int, device: torch.device) -> list[torch.Tensor]:
    """Ids int64 [batch, 26]: uniform over the table, or as skewed as Criteo's.

    In Criteo's fields a few values make most of the rows: field j here draws from a vocabulary of 10^(1 + j / 5)
    values with frequencies 1 / rank, spread over the table by a multiplicative hash.
    """
    draw = torch.Generator().manual_seed(0)
    if kind == "uniform":
        return [torch.randint(num_rows, (batch, FIELDS), generator=draw).to(device) for _ in range(BATCHES)]
    vocabulary = 10.0 ** (1 + torch.arange(FIELDS) / 5)
    ranks = [(vocabulary ** torch.rand(batch, FIELDS, generator=draw)).long() for _ in range(BATCHES)]
    return [((rank * FIELDS + torch.arange(FIELDS)) * 2654435761 % num_rows).to(device) for rank in ranks]


def providers(num_rows: int, dim: int,
              device: torch.device) -> dict[str, tuple[torch.nn.Module, torch.optim.Optimizer]]:
    """Table and optimizer of everyone who does this job; ours first. Ours share one memory, the others another."""
    ours = EmbeddingTable(num_rows, dim).to(device)
    weight = ours.weight.detach().clone()

    def theirs(sparse: bool) -> torch.nn.Embedding:
        return torch.nn.Embedding(num_rows, dim, sparse=sparse, _weight=weight)

    tables = {"ours SGD": ours, "ours rowwise Adagrad": ours, "sparse + SGD": theirs(True),
              "sparse + Adagrad": theirs(True), "dense + SGD": theirs(False)}
    optimizers = {"ours SGD": SparseSGD, "ours rowwise Adagrad": SparseRowwiseAdagrad,
                  "sparse + Adagrad": torch.optim.Adagrad}
    return {name: (table, optimizers.get(name, torch.optim.SGD)(table.parameters(), lr=0.01))
            for name, table in tables.items()}


def step(table: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: list[torch.Tensor],
         grad: torch.Tensor) -> Callable[[], object]:
    turn = itertools.cycle(batches)

    def run() -> object:
        optimizer.zero_grad()
        table(next(turn)).backward(grad)
        return optimizer.step()

    return run


@click.command()
@click.option("--num-rows", type=click.IntRange(min=1), default=2_000_000, show_default=True, help="Rows of the table.")
@bench_options
def main(settings: Settings, num_rows: int) -> None:
    """Time lookup + backward + update of 26 ids a row, in fp32. The floor: each gathered row read and written, its
    gradient read, and each distinct row of the table read and written."""
    s = settings
    grad = torch.randn(s.batch, FIELDS, s.dim, device=s.device)
    floors = measure_floors(s.device)
    chosen = s.choose(providers(num_rows, s.dim, s.device))
    rows = []
    for kind in ("uniform", "skewed"):
        batches = ids_of(kind, num_rows, s.batch, s.device)
        distinct = sum(len(ids.unique()) for ids in batches) / BATCHES
        traffic = 4.0 * s.dim * (3 * s.batch * FIELDS + 2 * distinct)
        functions = {name: step(*pair, batches, grad) for name, pair in chosen.items()}
        for name, timing in measure_pairs(functions, device=s.device).items():
            rows.append(time_row(name, timing, kernel="sparse_update", mode="lookup+backward+step", num_bytes=traffic,
                                 x=f"B={s.batch} K={FIELDS} D={s.dim} rows={num_rows:,} {kind}", floors=floors))
    s.finish(rows)


if __name__ == "__main__":
    main()
