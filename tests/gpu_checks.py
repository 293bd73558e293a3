"""What only a GPU can show, as plain functions: needs torch, triton and numpy alone.

`tests/kernels/test_gpu.py` runs them under pytest; `python tests/gpu_checks.py --json FILE` without it, one after the
other whatever fails, with what each took and found. `--rehearse` runs the same code on a CPU, at tiny sizes in
Triton's interpreter, and calls a step again where a GPU replays a graph.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # parity.py asks for deterministic algorithms

import torch
from parity import FP32_UNIT, SEED, Tensors, assert_parity, ffn_inputs, with_gradients
from torch import nn

from ctr_kernels import (
    EmbeddingTable,
    SparseRowwiseAdagrad,
    SparseSGD,
    TransformerLayer,
    ffn,
    field_attention,
)
from ctr_kernels.attention import field_attention_packed
from ctr_kernels.attention.reference import field_attention_reference
from ctr_kernels.ffn.reference import ffn_reference
from ctr_kernels.philox import dropout_mask, dropout_mask_torch
from ctr_kernels.sparse_update.reference import update_reference
from ctr_kernels.sparse_update.rule import RowState, Rule
from ctr_models import MODELS
from ctr_train.graph import WARM_UPS, CudaRecorder, GraphedStep
from ctr_train.optim import make_optimizers, update
from ctr_train.schedule import make_schedulers

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# A TF32 product has inputs of 11 bits; PyTorch may compute small ones in fp32, which bounds no error of TF32.
UNITS = {"tf32": 2.0**-11}
FIELDS, DENSE = 26, 13


@dataclass(frozen=True)
class Scale:
    """Sizes of the checks: rows of a batch; more rows than a grid's second dimension holds; of the table; steps.

    kernels: of what is trained; a step takes seconds in Triton's interpreter, which has tests of its own.
    """

    device: torch.device
    batch: int
    many: int
    table_rows: int
    steps: int
    kernels: str

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def choose(self, shapes: list[Any]) -> list[Any]:
        """All of them on a GPU; the first and the last in the interpreter, which has tests of its own."""
        return shapes if self.is_gpu else [shapes[0], shapes[-1]]


def full(device: str = "cuda") -> Scale:
    return Scale(torch.device(device), batch=4096, many=70_000, table_rows=2_000_000, steps=300, kernels="triton")


def tiny(device: str) -> Scale:
    return Scale(torch.device(device), batch=2, many=3, table_rows=300, steps=5,
                 kernels="triton" if device == "cuda" else "auto")


class Batch(NamedTuple):
    """dense float32 [B, 13], sparse int32 [B, 26], label float32 [B]."""

    dense: torch.Tensor
    sparse: torch.Tensor
    label: torch.Tensor


class Unavailable(Exception):
    """A check cannot be done here; the message says why."""


@contextmanager
def arithmetic(precision: str, scale: Scale) -> Iterator[torch.dtype]:
    """Within: PyTorch's switch of that precision; yields the dtype of tensors."""
    if precision == "bf16" and not scale.is_gpu:
        raise Unavailable("Triton's interpreter has no bfloat16 dot")
    if precision == "tf32" and not scale.is_gpu:
        raise Unavailable("Triton's interpreter computes TF32 products in fp32")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield DTYPES[precision]
    finally:
        torch.set_float32_matmul_precision(before)


def compare(kernel: Callable, reference: Callable, inputs: Tensors, grad_out: torch.Tensor, precision: str) -> None:
    """The parity rule of parity.py on the inputs' device."""
    found, eager = with_gradients(kernel, inputs, grad_out), with_gradients(reference, inputs, grad_out)
    exact = with_gradients(reference, [x.double() for x in inputs], grad_out.double())
    assert_parity(found, eager, exact, UNITS.get(precision, FP32_UNIT))


def attention(scale: Scale, precision: str) -> None:
    """Full size with 27 and 28 fields, dropout and without; more than 65,535 rows; the ends of the shapes."""
    shapes = [(scale.batch, 27, 64, 4, 0.1), (scale.batch, 28, 64, 4, 0.0), (scale.many, 27, 64, 4, 0.0),
              (1, 1, 8, 1, 0.0), (3, 33, 64, 2, 0.2), (2, 64, 64, 1, 0.2), (0, 27, 64, 4, 0.1)]
    seed = torch.tensor([SEED], device=scale.device)
    with arithmetic(precision, scale) as dtype:
        for batch, fields, dim, heads, dropout_p in scale.choose(shapes):
            qkv = torch.randn(batch, fields, 3 * dim, device=scale.device).to(dtype)
            factor = (dim // heads) ** -0.5

            def reference(qkv: torch.Tensor, heads: int = heads, factor: float = factor,
                          dropout_p: float = dropout_p) -> torch.Tensor:
                return field_attention_reference(*qkv.chunk(3, dim=-1), heads, factor, dropout_p, seed)

            for run in (lambda qkv, h=heads, p=dropout_p: field_attention_packed(
                            qkv, num_heads=h, dropout_p=p, seed=SEED, kernels="triton"),
                        lambda qkv, h=heads, p=dropout_p: field_attention(
                            *qkv.chunk(3, dim=-1), num_heads=h, dropout_p=p, seed=SEED, kernels="triton")):
                compare(run, reference, [qkv], torch.randn(batch, fields, dim, device=scale.device), precision)


def feed_forward(scale: Scale, precision: str) -> None:
    """Full size, which is 110,592 tokens, with each activation; and the ends of the shapes."""
    tokens = scale.batch * 27
    shapes = [(tokens, 64, 256, "gelu", 0.1), (tokens, 64, 128, "relu", 0.0), (tokens, 64, 256, "gelu_tanh", 0.0),
              (1, 64, 256, "gelu", 0.1), (97, 20, 8, "gelu", 0.1), (0, 64, 256, "gelu", 0.1)]
    seed = torch.tensor([SEED], device=scale.device)
    with arithmetic(precision, scale) as dtype:
        for tokens, dim, hidden, activation, dropout_p in scale.choose(shapes):
            inputs = [x.to(scale.device) for x in ffn_inputs(tokens, dim, hidden, dtype)]
            grad_out = torch.randn(tokens, dim, device=scale.device) / max(1, tokens) ** 0.5
            compare(lambda *t, a=activation, p=dropout_p: ffn(*t, activation=a, dropout_p=p, seed=SEED,
                                                              kernels="triton"),
                    lambda *t, a=activation, p=dropout_p: ffn_reference(*t, a, p, seed), inputs, grad_out, precision)


def layer(scale: Scale, precision: str) -> None:
    """The transformer layer, both norms, with the gradients of all its weights; no dropout, whose seeds are drawn.

    Nor ReLU: an input that rounds to the other side of 0 after five roundings moves a gradient by its whole size.
    """
    with arithmetic(precision, scale) as dtype:
        for norm, hidden, activation in (("pre", 256, "gelu"), ("post", 128, "gelu_tanh")):
            results = []
            x, grad = (torch.randn(scale.batch, 28, 64).to(dtype) for _ in range(2))
            weights = TransformerLayer(64, 4, hidden).state_dict()
            for kernels, kind in (("triton", dtype), ("eager", dtype), ("eager", torch.float64)):
                module = TransformerLayer(64, 4, hidden, norm=norm, activation=activation, kernels=kernels)
                module.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()})
                module.to(scale.device, kind)
                inputs = x.to(scale.device, kind).requires_grad_()
                out = module(inputs)
                scaled = grad.to(scale.device, kind) / (scale.batch * 28) ** 0.5
                results.append([out.detach(), *torch.autograd.grad(out, [inputs, *module.parameters()], scaled)])
            assert_parity(*results, UNITS.get(precision, FP32_UNIT))


def row_updates(scale: Scale) -> None:
    """Both optimizers at uniform, skewed and equal ids, two steps; rows that have no gradient stay as they were."""
    rows, dim = scale.table_rows, 64
    uniform = torch.randint(rows, (scale.batch, FIELDS))
    skewed = (torch.rand(scale.batch, FIELDS) ** 9 * rows).long()
    for ids in scale.choose([uniform, torch.full_like(uniform, rows - 1), uniform[:0], uniform[:1, :1], skewed]):
        ids = ids.to(scale.device)
        for optimizer_of, name in ((SparseSGD, "sgd"), (SparseRowwiseAdagrad, "rowwise-adagrad")):
            table = EmbeddingTable(rows, dim, std=1.0, kernels="triton").to(scale.device)
            before = table.weight.detach().clone()
            optimizer = optimizer_of(table.parameters(), lr=0.1, kernels="triton")
            grads = torch.randn(*ids.shape, dim, device=scale.device)
            for _ in range(2):
                table(ids.int()).backward(grads)
                optimizer.step()
                optimizer.zero_grad()
            touched, results = ids.unique(), []
            for dtype in (torch.float32, torch.float64):
                weight, state = before.to(dtype), RowState(torch.zeros(rows, dtype=dtype, device=scale.device))
                for _ in range(2):
                    update_reference(weight, ids.flatten(), grads.view(-1, dim).to(dtype), Rule(name, 0.1), state)
                results.append([weight[touched]])
            assert_parity([table.weight.detach()[touched]], *results)
            untouched = torch.ones(rows, dtype=torch.bool, device=scale.device)
            untouched[ids.flatten()] = False
            assert torch.equal(table.weight[untouched], before[untouched]), f"{name} wrote to rows without gradient"


def masks(scale: Scale) -> None:
    """The mask drawn on the device is the specification's on a CPU."""
    for rows, width in ((2000, 27), (5, 64), (0, 8)):
        drawn = dropout_mask(rows, width, 0.3, torch.tensor([77], device=scale.device))
        assert torch.equal(drawn.cpu(), dropout_mask_torch(rows, width, 0.3, torch.tensor([77]))), (rows, width)


def launches(scale: Scale) -> None:
    """Every kernel at small shapes and nothing else: what a memory checker watches."""
    launch_all(scale, [(1, 64), (2, 28), (3, 27)] if scale.is_gpu else [(1, 27)])


def tuning(scale: Scale) -> None:
    """Every kernel at the shapes of training: with CTR_KERNELS_AUTOTUNE=1 this prints lines for the launch tables."""
    launch_all(scale, [(scale.batch, 27), (scale.batch, 28)])


def launch_all(scale: Scale, shapes: list[tuple[int, int]]) -> None:
    """Forward and backward of every kernel at (batch, fields), in each arithmetic, and steps of the three models."""
    for precision in scale.choose(["fp32", "tf32", "bf16", "fp16"]):
        with arithmetic(precision, scale) as dtype:
            for batch, fields in shapes:
                module = TransformerLayer(64, 4, 128, dropout=0.1, kernels="triton").to(scale.device, dtype)
                x = torch.randn(batch, fields, 64).to(scale.device, dtype).requires_grad_()
                module(x).backward(torch.randn(batch, fields, 64).to(scale.device, dtype))
                assert x.grad.isfinite().all()
                q, k, v = torch.randn(batch, fields, 192).to(scale.device, dtype).chunk(3, dim=-1)
                assert field_attention(q, k, v, num_heads=8, kernels="triton").isfinite().all()
                y = ffn(*(t.to(scale.device) for t in ffn_inputs(batch * fields, 20, 24, dtype)), kernels="triton")
                assert y.isfinite().all()
    for name in MODELS if scale.is_gpu else ("dcnv2",):
        model = MODELS[name](num_embeddings=100, kernels="triton").to(scale.device)
        optimizers = optimizers_of(model, "triton")
        for i in range(2):
            update(model, optimizers, random_batch(shapes[-1][0], 100, i).to_device(scale.device), precision="fp32")
        assert all(parameter.isfinite().all() for parameter in model.parameters())


class HostBatch(Batch):
    """A batch in host memory."""

    def to_device(self, device: torch.device) -> Batch:
        return Batch(*(x.to(device, non_blocking=True) for x in self))


def random_batch(rows: int, table_rows: int, seed: int) -> HostBatch:
    """Rows whose label depends on both kinds of feature, so that there is something to learn."""
    draw = torch.Generator().manual_seed(seed)
    dense = torch.rand(rows, DENSE, generator=draw)
    sparse = (torch.rand(rows, FIELDS, generator=draw) ** 6 * table_rows).int()
    logits = 3 * dense[:, :4].sum(1) - 7 + (sparse[:, :8] % 2).sum(1) * 0.5
    label = (torch.rand(rows, generator=draw) < logits.sigmoid()).float()
    return HostBatch(dense, sparse, label)


def optimizers_of(model: nn.Module, kernels: str) -> list[torch.optim.Optimizer]:
    return make_optimizers(model, embedding_optimizer="rowwise-adagrad", embedding_lr=0.02, lr=1e-3,
                           weight_decay=0.01, kernels=kernels)


class Rerun:
    """Stands for `CudaRecorder` where there is no GPU: calls the function again."""

    def warm_up(self, function: Callable[[], torch.Tensor]) -> torch.Tensor:
        return function()

    def record(self, function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        return function


class Training:
    """A model, its optimizers and schedules, as the training loop sets them up."""

    def __init__(self, scale: Scale, kernels: str, *, graph: bool, dropout: float = 0.1, precision: str = "fp32",
                 schedule: str = "cosine") -> None:
        torch.manual_seed(0)
        self.scale, self.seed = scale, 0
        self.model = MODELS["ft"](num_embeddings=scale.table_rows, dropout=dropout, kernels=kernels)
        self.model.to(scale.device)
        self.optimizers = optimizers_of(self.model, kernels)
        self.schedulers = make_schedulers(self.optimizers, schedule, 0.1 if schedule == "cosine" else 0, scale.steps)
        self.plain = lambda batch: update(self.model, self.optimizers, batch, precision=precision)
        self.step = self.plain
        if graph:
            recorder = CudaRecorder(scale.device) if scale.is_gpu else Rerun()
            self.step = GraphedStep(self.plain, self.optimizers, recorder, lambda: None)

    def next_batch(self) -> HostBatch:
        """The next batch, in pinned memory where there is a GPU."""
        self.seed += 1
        batch = random_batch(self.scale.batch, self.scale.table_rows, self.seed)
        return HostBatch(*(x.pin_memory() for x in batch)) if self.scale.is_gpu else batch

    def run(self, steps: int) -> list[torch.Tensor]:
        """Train; the losses, on the device."""
        losses = []
        for _ in range(steps):
            losses.append(self.step(self.next_batch().to_device(self.scale.device)))
            for scheduler in self.schedulers:
                scheduler.step()
        return losses


def graph_against_launches(scale: Scale) -> dict[str, float]:
    """The graph trains as single launches do, dropout and schedule included: the same seeds, masks and rates."""
    curves, weights = [], []
    for graph in (False, True):
        training = Training(scale, scale.kernels, graph=graph)
        curves.append(torch.stack(training.run(min(scale.steps, 60))).tolist())
        weights.append(list(training.model.parameters())[-2].detach())
    return {"loss difference": largest(curves), "weight difference": (weights[0] - weights[1]).abs().max().item(),
            **within(largest(curves), 1e-3, "losses of graph and launches differ by")}


def largest(curves: list[list[float]]) -> float:
    return max(abs(a - b) for a, b in zip(*curves, strict=True))


def within(found: float, limit: float, what: str) -> dict[str, float]:
    assert math.isfinite(found) and found <= limit, f"{what} {found:.3g}, more than {limit:g}"
    return {"limit": limit}


def loss_curve(scale: Scale, precision: str) -> dict[str, Any]:
    """Hundreds of steps of the graph with our kernels against PyTorch's own operators, dropout included.

    Both draw the same masks; their roundings differ and grow as training goes on.
    """
    if precision == "bf16" and not scale.is_gpu:
        raise Unavailable("the loss of two rows does not average bf16's rounding")
    curves = [torch.stack(Training(scale, kernels, graph=kernels != "eager", precision=precision)
                          .run(scale.steps)).tolist() for kernels in (scale.kernels, "eager")]
    tenth = max(1, scale.steps // 10)
    ends = [statistics.fmean(curve[-tenth:]) for curve in curves]
    first = statistics.fmean(curves[0][:tenth])
    assert scale.steps < 100 or ends[0] < first - 0.02, f"the loss did not fall: {first:.4f} to {ends[0]:.4f}"
    limit = 0.02 if precision == "bf16" else 0.01
    within(abs(ends[0] - ends[1]), limit / 4, "the last losses differ by")
    return {"steps": scale.steps, "first loss": first, "last loss": ends[0], "last loss of eager": ends[1],
            "largest difference": largest(curves), **within(largest(curves), limit, "the loss curves differ by"),
            "curves": [[round(loss, 6) for loss in curve] for curve in curves]}


def new_masks(scale: Scale) -> None:
    """Each replay draws other masks: with no learning, one batch has another loss each time."""
    training = Training(scale, scale.kernels, graph=True, dropout=0.5, schedule="constant")
    for optimizer in training.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
    batch = training.next_batch().to_device(scale.device)
    losses = torch.stack([training.step(batch) for _ in range(WARM_UPS + 8)]).tolist()
    assert len(set(losses)) == len(losses), losses


def rates_under_replay(scale: Scale) -> None:
    """A learning rate of 0 stops the recorded optimizers, another value starts them again."""
    training = Training(scale, scale.kernels, graph=True, dropout=0.0, schedule="constant")
    training.run(WARM_UPS + 2)
    groups = [group for optimizer in training.optimizers for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]

    def moved(to: list[float]) -> list[bool]:
        before = [parameter.detach().clone() for parameter in training.model.parameters()]
        for group, rate in zip(groups, to, strict=True):
            group["lr"] = rate
        training.run(1)
        return [not torch.equal(a, b) for a, b in zip(before, training.model.parameters(), strict=True)]

    for scheduler in training.schedulers:  # `run` steps them: they must not set the rates again
        scheduler.step = lambda: None
    assert not any(moved([0.0] * len(rates))), "weights moved at a learning rate of 0"
    assert all(moved(rates)), "weights stood still at a positive learning rate"


def no_waiting(scale: Scale) -> None:
    """Replays, copies from pinned memory and rates: no call makes the host wait for the device."""
    if not scale.is_gpu:
        raise Unavailable("no GPU to wait for")
    training = Training(scale, "triton", graph=True)
    training.run(WARM_UPS + 2)
    batches = [training.next_batch() for _ in range(10)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            training.step(batch.to_device(scale.device))
            for scheduler in training.schedulers:
                scheduler.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def peak_memory(scale: Scale) -> dict[str, float]:
    """Of training, the graph's pool included, in MB (10^6 bytes); the table is part of it."""
    if not scale.is_gpu:
        raise Unavailable("no GPU whose memory could be measured")
    found = {}
    for precision in ("fp32", "bf16"):
        for graph in (False, True):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            training = Training(scale, "triton", graph=graph, precision=precision)
            training.run(WARM_UPS + 4)
            torch.cuda.synchronize()
            name = f"{precision} {'graph' if graph else 'launches'}"
            found[name] = (torch.cuda.max_memory_allocated() - before) / 1e6
            found[f"{name}, reserved"] = torch.cuda.memory_reserved() / 1e6
            found["table"] = training.model.embedding_parameters()[0].nbytes / 1e6
            del training
    return found


GROUPS: dict[str, dict[str, Callable[[Scale], Any]]] = {
    "parity": {
        "masks": masks,
        **{f"attention {p}": lambda s, p=p: attention(s, p) for p in DTYPES},
        **{f"ffn {p}": lambda s, p=p: feed_forward(s, p) for p in DTYPES},
        **{f"layer {p}": lambda s, p=p: layer(s, p) for p in DTYPES},
        "row updates": row_updates,
    },
    "training": {
        "graph against launches": graph_against_launches,
        "new masks": new_masks,
        "rates under replay": rates_under_replay,
        "no waiting": no_waiting,
        **{f"loss curve {p}": lambda s, p=p: loss_curve(s, p) for p in ("fp32", "bf16")},
        "peak memory": peak_memory,
    },
    "launches": {"launches": launches},
    "tuning": {"tuning": tuning},
}


def run_check(check: Callable[[Scale], Any], scale: Scale) -> dict[str, Any]:
    """{"status": "passed", "failed" or "not done", "seconds", "figures" or "reason"} of one check."""
    torch.manual_seed(0)
    started = time.perf_counter()
    try:
        found = {"status": "passed", "figures": check(scale) or {}}
    except Unavailable as error:
        found = {"status": "not done", "reason": str(error)}
    except Exception as error:  # the next check goes on
        traceback.print_exc()
        found = {"status": "failed", "reason": f"{type(error).__name__}: {str(error)[:500]}"}
    return {**found, "seconds": round(time.perf_counter() - started, 2)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--group", choices=list(GROUPS), default="parity")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on a CPU")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on the GPU")
    parser.add_argument("--json", type=Path, help="JSON, written again after each check")
    options = parser.parse_args()
    scale = tiny("cpu") if options.rehearse else tiny("cuda") if options.tiny else full()
    results = {}
    for name, check in GROUPS[options.group].items():
        results[name] = run_check(check, scale)
        print(f"{name}: {results[name]['status']} in {results[name]['seconds']} s "
              f"{results[name].get('reason', '')}", flush=True)
        if options.json:
            temporary = options.json.with_suffix(".part")
            temporary.write_text(json.dumps(results))
            temporary.replace(options.json)
    return int(any(result["status"] == "failed" for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
