"""Embedding lookup, its backward and the update of the rows: ours against nn.Embedding's optimizers and FBGEMM."""

import itertools
from collections.abc import Callable, Sequence

import click
import torch
from common.harness import Floors, Row, compare, measure_floors, relative_error
from common.options import Settings, bench_options
from common.peers import Unavailable, installed, need

from ctr_kernels import EmbeddingTable, SparseAdagrad, SparseLazyAdam, SparseRowwiseAdagrad, SparseSGD
from ctr_train.command import run_command

FIELDS = 26
BATCHES = 8  # taken in turn, so that no provider finds its rows in the cache
LR, EPS = 0.01, 1e-8
IDS = ("uniform", "skewed")
Step = Callable[[], Sequence[torch.Tensor]]
# A provider: (table weights, batches of ids, gradient [B, 26, D]) -> a call that looks up, goes back and updates.
Provider = Callable[[torch.Tensor, Sequence[torch.Tensor], torch.Tensor], Step]


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


def of_module(make: Callable[[torch.Tensor], EmbeddingTable | torch.nn.Embedding],
              optimizer: Callable[..., torch.optim.Optimizer], **options: float) -> Provider:
    """A table module and a torch optimizer."""

    def build(weight: torch.Tensor, batches: Sequence[torch.Tensor], grad: torch.Tensor) -> Step:
        table = make(weight)
        update = optimizer(table.parameters(), lr=LR, **options)
        turn = itertools.cycle(batches)

        def run() -> Sequence[torch.Tensor]:
            table(next(turn)).backward(grad)
            update.step()
            update.zero_grad()
            return [table.weight.detach()]

        return run

    return build


def ours(weight: torch.Tensor) -> EmbeddingTable:
    table = EmbeddingTable(weight.shape[0], weight.shape[1]).to(weight.device)
    with torch.no_grad():
        table.weight.copy_(weight)
    return table


def embedding(sparse: bool) -> Callable[[torch.Tensor], torch.nn.Embedding]:
    return lambda weight: torch.nn.Embedding.from_pretrained(weight.clone(), freeze=False, sparse=sparse)


def fbgemm(optimizer: str) -> Provider:
    """FBGEMM's TBE: 26 features of one id each on one table, the update fused into its backward."""

    def build(weight: torch.Tensor, batches: Sequence[torch.Tensor], grad: torch.Tensor) -> Step:
        tbe = need("fbgemm_gpu.split_table_batched_embeddings_ops_training")
        common = need("fbgemm_gpu.split_table_batched_embeddings_ops_common")
        config = need("fbgemm_gpu.split_embedding_configs")
        gpu = weight.device.type == "cuda"
        if gpu and installed("fbgemm-gpu-cpu"):
            raise Unavailable("the FBGEMM that is installed is for CPUs")
        where = common.EmbeddingLocation.DEVICE if gpu else common.EmbeddingLocation.HOST
        compute = tbe.ComputeDevice.CUDA if gpu else tbe.ComputeDevice.CPU
        table = tbe.SplitTableBatchedEmbeddingBagsCodegen(
            [(*weight.shape, where, compute)], feature_table_map=[0] * FIELDS, learning_rate=LR, eps=EPS,
            optimizer=getattr(config.EmbOptimType, optimizer), bounds_check_mode=common.BoundsCheckMode.NONE,
            stochastic_rounding=False, device=weight.device)
        (rows,) = table.split_embedding_weights()
        rows.copy_(weight)
        flat = grad.flatten(1)  # [B, 26 D], as TBE returns the features side by side
        offsets = torch.arange(batches[0].numel() + 1, device=weight.device)
        turn = itertools.cycle([ids.t().flatten() for ids in batches])  # feature by feature, as TBE wants them

        def run() -> Sequence[torch.Tensor]:
            table(next(turn), offsets).backward(flat)
            return [rows.detach()]

        return run

    return build


# Rivals by what they compute; each group is measured among itself.
PROVIDERS: dict[str, dict[str, Provider]] = {
    "SGD": {
        "ours SGD": of_module(ours, SparseSGD),
        "Embedding sparse + SGD": of_module(embedding(True), torch.optim.SGD),
        "Embedding dense + SGD": of_module(embedding(False), torch.optim.SGD),
        "FBGEMM TBE SGD": fbgemm("EXACT_SGD"),
    },
    "rowwise Adagrad": {
        "ours rowwise Adagrad": of_module(ours, SparseRowwiseAdagrad, eps=EPS),
        "FBGEMM TBE rowwise Adagrad": fbgemm("EXACT_ROWWISE_ADAGRAD"),
    },
    "Adagrad": {
        "ours Adagrad": of_module(ours, SparseAdagrad, eps=EPS),
        "Embedding sparse + Adagrad": of_module(embedding(True), torch.optim.Adagrad, eps=EPS),
        "Embedding dense + Adagrad": of_module(embedding(False), torch.optim.Adagrad, eps=EPS),
        "FBGEMM TBE Adagrad": fbgemm("EXACT_ADAGRAD"),
    },
    "Adam on touched rows": {
        "ours lazy Adam": of_module(ours, SparseLazyAdam, eps=EPS),
        "Embedding sparse + SparseAdam": of_module(embedding(True), torch.optim.SparseAdam, eps=EPS),
    },
}
SWEPT = ("ours SGD", "Embedding sparse + SGD", "FBGEMM TBE SGD", "ours Adagrad", "Embedding sparse + Adagrad")


def expected(mode: str, weight: torch.Tensor, ids: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The rows `ids.unique()` after the first step of a group's optimizer, in fp64 [U, D].

    Adagrad begins with g / (|g| + eps), and so does Adam, but its eps stands beside sqrt(1 - beta2) |g|.
    """
    distinct, inverse = ids.unique(return_inverse=True)
    g = torch.zeros(len(distinct), grad.shape[-1], dtype=torch.float64, device=grad.device)
    g.index_add_(0, inverse.flatten(), grad.double().flatten(0, 1))
    size = {"SGD": torch.ones_like(g), "rowwise Adagrad": g.square().mean(1, keepdim=True).sqrt() + EPS,
            "Adagrad": g.abs() + EPS, "Adam on touched rows": g.abs() + EPS / (1 - 0.999) ** 0.5}[mode]
    return weight[distinct].double() - LR * g / size


def measure(s: Settings, num_rows: int, kind: str, floors: Floors) -> list[Row]:
    """One distribution of ids. The floor: each gathered row read and written, its gradient read, and each distinct
    row of the table read and written."""
    weight = torch.randn(num_rows, s.dim, device=s.device) * 0.01
    grad = torch.randn(s.batch, FIELDS, s.dim, device=s.device)
    batches = ids_of(kind, num_rows, s.batch, s.device)
    touched = batches[0].unique()
    distinct = sum(len(ids.unique()) for ids in batches) / BATCHES
    traffic = 4.0 * s.dim * (3 * s.batch * FIELDS + 2 * distinct)
    chosen = s.choose({name: provider for group in PROVIDERS.values() for name, provider in group.items()}, SWEPT)
    rows = []
    for mode, group in PROVIDERS.items():
        errors: dict[str, float] = {}

        def built(name: str, mode: str = mode, errors: dict[str, float] = errors) -> Step:
            """Built by its first call, whose rows are held against fp64."""
            step: list[Step] = []

            def run() -> Sequence[torch.Tensor]:
                if step:
                    return step[0]()
                step.append(chosen[name](weight, batches, grad))
                (after,) = step[0]()
                errors[name] = relative_error([after[touched]], [expected(mode, weight, batches[0], grad)])
                return [after]

            return run

        timed = compare({name: built(name) for name in group if name in chosen}, kernel="sparse_update", mode=mode,
                        x=f"B={s.batch} K={FIELDS} D={s.dim} rows={num_rows:,} {kind}", device=s.device,
                        num_bytes=traffic, floors=floors, **{"seconds": 8.0, **s.budget})
        for row in timed:
            row.fp64_error = errors.get(row.provider)
        rows += timed
    return rows


@click.command()
@click.option("--num-rows", type=click.IntRange(min=1), default=2_000_000, show_default=True, help="Rows of the table.")
@bench_options
def main(settings: Settings, num_rows: int) -> None:
    """Time lookup + backward + update of 26 ids a row, in fp32; each optimizer against those of its formula."""
    if settings.sweep == "fields":
        raise click.BadParameter("a row has 26 ids here; only the batch can be swept", param_hint="--sweep")
    floors = measure_floors(settings.device)
    rows = [row for point in settings.points() for kind in IDS
            for row in measure(point, num_rows, kind, floors)]
    settings.finish(rows, floors)


if __name__ == "__main__":
    run_command(main, "bench/sparse_update.py")
