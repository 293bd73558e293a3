"""What only a GPU can show, as plain functions: needs torch, triton and numpy alone.

`tests/kernels/test_gpu.py` runs them under pytest; `python tests/gpu_checks.py --json FILE` without it, one after the
other whatever fails, with what each took and found. `--rehearse` runs the same code on a CPU, at tiny sizes in
Triton's interpreter, and calls a step again where a GPU replays a graph.
"""

import argparse
import gc
import json
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_launches import LAUNCHES, HostBatch, optimizers_of, random_batch, tuning
from gpu_parity import CHECKS, Scale, Unavailable, full, tiny

from ctr_models import MODELS
from ctr_train.graph import WARM_UPS, CudaRecorder, GraphedStep
from ctr_train.optim import update
from ctr_train.schedule import make_schedulers


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
        self.plain = partial(update, self.model, self.optimizers, precision=precision)  # no cycle: `del` frees it all
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
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
            training = Training(scale, "triton", graph=graph, precision=precision)
            training.run(WARM_UPS + 4)
            torch.cuda.synchronize()
            name = f"{precision} {'graph' if graph else 'launches'}"
            found[name] = (torch.cuda.max_memory_allocated() - before) / 1e6
            found[f"{name}, reserved"] = (torch.cuda.memory_reserved() - reserved) / 1e6
            found["table"] = training.model.embedding_parameters()[0].nbytes / 1e6
            del training
    return found


WIDE = ("attention", "ffn")  # half of all that parity compiles
GROUPS: dict[str, dict[str, Callable[[Scale], Any]]] = {
    "parity": {name: check for name, check in CHECKS.items() if name.startswith(WIDE)},
    "parity others": {name: check for name, check in CHECKS.items() if not name.startswith(WIDE)},
    "training": {
        "graph against launches": graph_against_launches,
        "new masks": new_masks,
        "rates under replay": rates_under_replay,
        "no waiting": no_waiting,
        **{f"loss curve {p}": lambda s, p=p: loss_curve(s, p) for p in ("fp32", "bf16")},
        "peak memory": peak_memory,
    },
    "launches": LAUNCHES,
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
