"""One group of timings on a GPU, every provider as a CUDA graph of its own, so that no launch of the host is timed.

Rivals that take long to compile come last, of whole steps all that are compiled; the JSON is written between them.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import attn
import ffn
import layer
import sparse_update
import step
from common.harness import Floors, Row, forward, forward_backward, measure_floors, measure_pairs, time_row
from common.options import DTYPES, Settings
from common.records import Machine, write_json
from common.training import STATISTICS, STUDY, default_recipe, recipe_model, recipe_optimizers

from ctr_models import MODELS, CTRModel
from ctr_train.command import run_command
from ctr_train.data.loader import Batch
from ctr_train.graph import CudaRecorder, GraphedStep
from ctr_train.optim import update

Function = Callable[[], object]
SLOW = ("compile max-autotune", "flex_attention", "compile sdpa")
TIMED = ("ours", "ours, launch by launch", "eager", "compile", "compile with CUDA graphs")  # of every step
LAUNCHED = "not as a CUDA graph: "


class Group:
    """Providers of one kernel and mode, with the work that the floor counts."""

    def __init__(self, kernel: str, mode: str, x: str, functions: dict[str, Function], flops: float,
                 num_bytes: float) -> None:
        self.kernel, self.mode, self.x, self.functions = kernel, mode, x, functions
        self.flops, self.num_bytes = flops, num_bytes


def as_graph(function: Function, device: torch.device) -> tuple[Function, str]:
    """(a replay of `function`, "") or, where it waits for the device or cannot be recorded, (itself, why)."""
    if device.type != "cuda":
        return function, ""
    recorder = CudaRecorder(device)
    for _ in range(3):
        recorder.warm_up(function)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # a recording that fails leaves traces, a look beforehand none
    try:
        recorder.warm_up(function)
    except RuntimeError as error:
        return function, LAUNCHED + str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    try:
        return recorder.record(function), ""
    except RuntimeError as error:
        return function, LAUNCHED + str(error).splitlines()[0]


def measure(group: Group, names: Sequence[str], device: torch.device, floors: Floors) -> list[Row]:
    """Time those providers against each other; the first is ours."""
    functions, notes = {}, {}
    for name in names:
        try:
            functions[name], notes[name] = as_graph(group.functions[name], device)
        except Exception:  # `measure_pairs` calls it again, and says why it cannot run
            functions[name], notes[name] = group.functions[name], ""
    rows = []
    for name, timing in measure_pairs(functions, device=device, rounds=50, seconds=4.0).items():
        row = time_row(name, timing, kernel=group.kernel, mode=group.mode, x=group.x, flops=group.flops,
                       num_bytes=group.num_bytes, floors=floors, device=device)
        rows.append(replace(row, note=row.note or notes[name]))
    return rows


def attention(s: Settings) -> Iterator[Group]:
    qkv = torch.randn(s.batch, s.fields, 3 * s.dim, device=s.device).to(s.dtype)
    grad = torch.randn(s.batch, s.fields, s.dim, device=s.device).to(s.dtype)
    flops, tensor = 4.0 * s.batch * s.fields**2 * s.dim, float(grad.numel() * grad.element_size())
    everyone = attn.providers(s.heads)
    yield Group("field_attention", "forward", s.shape, {name: forward(f, [qkv]) for name, f in everyone.items()},
                flops, 4 * tensor)
    yield Group("field_attention", "forward+backward", s.shape,
                {name: forward_backward(f, [qkv], grad) for name, f in everyone.items()}, 3.5 * flops, 11 * tensor)


def feed_forward(s: Settings) -> Iterator[Group]:
    hidden = 4 * s.dim
    sizes = [(s.batch, s.fields, s.dim), (hidden, s.dim), (hidden,), (s.dim, hidden), (s.dim,)]
    inputs = [(torch.randn(size, device=s.device) / (size[-1] ** 0.5 if len(size) == 2 else 1)).to(s.dtype)
              for size in sizes]
    grad = torch.randn_like(inputs[0])
    flops, tensor = 4.0 * s.batch * s.fields * s.dim * hidden, float(grad.numel() * grad.element_size())
    everyone = ffn.providers("gelu")
    yield Group("ffn", "forward", s.shape, {name: forward(f, inputs) for name, f in everyone.items()}, flops,
                2 * tensor)
    yield Group("ffn", "forward+backward", s.shape,
                {name: forward_backward(f, inputs, grad) for name, f in everyone.items()}, 3 * flops, 5 * tensor)


def whole_layer(s: Settings) -> Iterator[Group]:
    hidden = 4 * s.dim
    x = torch.randn(s.batch, s.fields, s.dim, device=s.device).to(s.dtype)
    grad, tokens = torch.randn_like(x), float(s.batch * s.fields)
    flops = tokens * (8 * s.dim**2 + 4 * s.fields * s.dim + 4 * s.dim * hidden)
    tensor = float(x.numel() * x.element_size())
    layers, _ = layer.providers(s, hidden, "forward")
    yield Group("layer", "forward", s.shape, {name: forward(f, [x]) for name, f in layers.items()}, flops, 2 * tensor)
    layers, modules = layer.providers(s, hidden, "forward+backward")
    yield Group("layer", "forward+backward", s.shape,
                {name: forward_backward(f, [x], grad, modules[name].parameters()) for name, f in layers.items()},
                3 * flops, 5 * tensor)


def row_updates(s: Settings) -> Iterator[Group]:
    num_rows = 2_000_000 if s.device.type == "cuda" else 2000
    weight = torch.randn(num_rows, s.dim, device=s.device) * 0.01
    grad = torch.randn(s.batch, sparse_update.FIELDS, s.dim, device=s.device)
    for kind in sparse_update.IDS:
        batches = sparse_update.ids_of(kind, num_rows, s.batch, s.device)
        traffic = 4.0 * s.dim * (3 * batches[0].numel() + 2 * len(batches[0].unique()))
        for mode in ("SGD", "rowwise Adagrad"):
            providers = sparse_update.PROVIDERS[mode]
            yield Group("sparse_update", mode, f"B={s.batch} {kind}",
                        {name: built(partial(provider, weight, batches[:1], grad))
                         for name, provider in providers.items()}, 0.0, traffic)


def built(make: Callable[[], Function]) -> Function:
    """The function that `make` gives, made at its first call."""
    made: list[Function] = []

    def run() -> object:
        if not made:
            made.append(make())
        return made[0]()

    return run


def training_step(s: Settings) -> Iterator[Group]:
    """FT-Transformer as the baseline study has it, without dropout: see `steps`."""
    def fresh(kernels: str) -> CTRModel:
        return MODELS["ft"](num_embeddings=table_rows(s), dropout=0.0, kernels=kernels)

    yield Group("step ft", "training step", f"B={s.batch} {s.precision}",
                steps(s, fresh, STUDY, step.random_batch(s.batch, s.device), [*TIMED, "compile max-autotune"]),
                70e9 * s.batch / 4096, 0.0)


def default_step(s: Settings) -> Iterator[Group]:
    """FT-Transformer as `ctr-train` trains it by default: its tokens, shortcut, optimizers and batch. Dropout has ours
    alone, beside ours without."""
    without, config = (default_recipe("ft", **drops) for drops in ({"dropout": 0.0, "embedding_dropout": 0.0}, {}))
    rows = config["batch_size"] if s.device.type == "cuda" else s.batch
    batch = step.random_batch(rows, s.device, STATISTICS)

    def of(config: dict[str, Any], providers: Sequence[str]) -> dict[str, Function]:
        return steps(s, lambda kernels: recipe_model(config, kernels, table_rows(s)), config, batch, providers)

    functions = of(without, [*TIMED, "eager bf16"]) | {"ours, with dropout": of(config, ["ours"])["ours"]}
    yield Group("default step ft", "training step", f"B={rows} {s.precision}", functions, 0.0, 0.0)


def table_rows(s: Settings) -> int:
    return step.NUM_EMBEDDINGS if s.device.type == "cuda" else 2000


def steps(s: Settings, fresh: Callable[[str], CTRModel], config: dict[str, Any],
          tensors: list[torch.Tensor], providers: Sequence[str]) -> dict[str, Function]:
    """Whole steps on one batch, without dropout, for which eager PyTorch has a cheaper mask than our reference.

    "ours" is the training loop's step: the graph, the copies into it, rowwise updates. The graphs of `torch.compile`
    are its own: forward and backward, without the optimizers.

    Args:
        fresh: makes the model with given kernels. config: settings of its optimizers, for `recipe_optimizers`.
        tensors: dense, sparse, label. providers: names of those to make.
    """
    gpu, precision = s.device.type == "cuda", s.precision if s.precision == "bf16" else "fp32"
    dense, sparse, label = tensors
    batch = Batch(dense, sparse.remainder(table_rows(s)).int(), label)

    def made(kernels: str) -> tuple[CTRModel, list[torch.optim.Optimizer]]:
        torch.manual_seed(0)
        model = fresh(kernels).to(s.device)
        return model, recipe_optimizers(model, config, kernels)

    def ours(graph: bool) -> Function:
        model, optimizers = made("auto")

        def plain(batch: Batch) -> torch.Tensor:
            return update(model, optimizers, batch, precision=precision)

        run = GraphedStep(plain, optimizers, CudaRecorder(s.device), lambda: None) if graph and gpu else plain
        return lambda: run(batch)

    def rival(mode: str | None, dtype: torch.dtype = s.dtype) -> Function:
        model, optimizers = made("eager")
        forward_of = model if mode is None else torch.compile(model, mode=mode, dynamic=False)
        run = step.training_step(forward_of, optimizers, False, batch, dtype)
        return lambda: run()[0]

    makers = {"ours": lambda: ours(True), "ours, launch by launch": lambda: ours(False), "eager": lambda: rival(None),
              "eager bf16": lambda: rival(None, torch.bfloat16), "compile": lambda: rival("default"),
              "compile with CUDA graphs": lambda: rival("reduce-overhead"),
              "compile max-autotune": lambda: rival("max-autotune")}
    return {name: built(makers[name]) for name in providers}


GROUPS = {"attention": attention, "ffn": feed_forward, "layer": whole_layer, "sparse_update": row_updates,
          "step": training_step, "default step": default_step}


def turn_of(provider: str, group: str) -> int:
    """When a provider is timed: 0 first, 2 last."""
    return 2 if provider in SLOW else int(group.endswith("step") and "compile" in provider)


@click.command()
@click.option("--group", "name", type=click.Choice(list(GROUPS)), required=True)
@click.option("--dtype", "precision", type=click.Choice(list(DTYPES)), default="fp32", show_default=True)
@click.option("--json", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option("--rehearse", is_flag=True, help="On a CPU, two rows, without what must be compiled.")
def main(name: str, precision: str, json: Path, rehearse: bool) -> None:
    """Time one group of providers on a GPU."""
    device = torch.device("cpu" if rehearse else "cuda")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    settings = Settings(device, precision, batch=2 if rehearse else 4096)
    floors = Floors(1.0, 1.0) if rehearse else measure_floors(device, settings.dtype)
    machine = Machine.of(device, floors.gflops, floors.gbps)
    rows: list[Row] = []
    for turn in (0,) if rehearse else (0, 1, 2):
        for group in GROUPS[name](settings):
            wanted = [provider for provider in group.functions if turn_of(provider, name) == turn]
            if rehearse:
                wanted = [provider for provider in wanted if "compile" not in provider and "FBGEMM" not in provider]
            if turn and wanted:
                wanted.insert(0, next(iter(group.functions)))  # ours, to be compared with again
            if not wanted:
                continue
            if name.endswith("step"):
                rows += measure_steps(group, wanted, device, floors)
            else:
                rows += measure(group, wanted, device, floors)
            write_json(json, rows, machine)
            del group
            if not rehearse:
                torch.cuda.empty_cache()
    for row in rows:
        print(row.kernel, row.mode, row.x, row.provider, row.p50, row.note, flush=True)


def measure_steps(group: Group, names: Sequence[str], device: torch.device, floors: Floors) -> list[Row]:
    """As `measure`, with the providers as they are: ours has its graph already, a trained model's step waits."""
    timings = measure_pairs({name: group.functions[name] for name in names}, device=device, rounds=30, warmup=6,
                            seconds=8.0)
    return [time_row(name, timing, kernel=group.kernel, mode=group.mode, x=group.x, flops=group.flops,
                     floors=floors, device=device) for name, timing in timings.items()]


if __name__ == "__main__":
    run_command(main, "bench/on_gpu/speed.py")
