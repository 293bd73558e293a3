"""Which kernels a training step runs and what each takes, and what the hardware counters say of them.

`python bench/on_gpu/kernels.py --json FILE` times the kernels of FT-Transformer's step, and of attention and the FFN
alone, with PyTorch's profiler; then, where Nsight Compute (ncu) is there, it runs itself under it, once for each
precision, and keeps what bounds each kernel: bytes, units in use, stalls.
"""

import argparse
import csv
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from common.training import STUDY, random_batch, recipe_optimizers

from ctr_kernels import ffn
from ctr_kernels.attention import field_attention_packed
from ctr_models import MODELS
from ctr_train.data.loader import Batch
from ctr_train.optim import update

PRECISIONS = ("fp32", "tf32", "bf16")
BATCH, FIELDS, DIM, HEADS, HIDDEN = 4096, 27, 64, 4, 256
OURS = "^_?(forward|backward|token|weight|row|chunk|close|sum|fold|(query|sliced|blocked)_(forward|backward))_kernel$"
STALL = "smsp__average_warps_issue_stalled_"
# Column of ncu -> ours: microseconds, shares of the peak, instructions a cycle, of 64 warps.
COUNTERS = {
    "gpu__time_duration.sum": "time",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "dram %",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "tensor cores %",
    "sm__inst_executed.avg.per_cycle_active": "IPC",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps %",
    "launch__registers_per_thread": "registers",
}


def work(precision: str, batch: int) -> dict[str, Callable[[], Any]]:
    """The step of the baseline study's FT-Transformer, and our attention and FFN with their backward."""
    device = torch.device("cuda")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    torch.manual_seed(0)
    model = MODELS["ft"](num_embeddings=2_000_000, dropout=0.0, kernels="triton").to(device)
    optimizers = recipe_optimizers(model, STUDY, "triton")
    dense, sparse, label = random_batch(batch, device)
    rows = Batch(dense, sparse.int(), label)
    qkv = torch.randn(batch, FIELDS, 3 * DIM, device=device).to(dtype).requires_grad_()
    x = torch.randn(batch, FIELDS, DIM, device=device).to(dtype).requires_grad_()
    sizes = [(HIDDEN, DIM), (HIDDEN,), (DIM, HIDDEN), (DIM,)]
    weights = [(torch.randn(size, device=device) / 8).to(dtype).requires_grad_() for size in sizes]
    grad = torch.randn(batch, FIELDS, DIM, device=device).to(dtype)
    return {"step": lambda: update(model, optimizers, rows, precision="bf16" if precision == "bf16" else "fp32"),
            "attention": lambda: field_attention_packed(qkv, num_heads=HEADS, kernels="triton").backward(grad),
            "ffn": lambda: ffn(x, *weights, kernels="triton").backward(grad)}


def profiled(precision: str, rounds: int = 5) -> list[dict[str, Any]]:
    """Microseconds of every kernel in a call of each piece of work, in order."""
    found = []
    for name, call in work(precision, BATCH).items():
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(rounds):
                call()
            torch.cuda.synchronize()
        events = sorted((event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA),
                        key=lambda event: event.time_range.start)
        each = len(events) // rounds  # a call launches the same kernels every time
        for i, event in enumerate(events[:each]):
            same = [event.device_time for event in events[i::each]]
            found.append({"precision": precision, "work": name, "kernel": event.name, "us": statistics.median(same)})
    return found


def launched(precision: str) -> None:
    """A call of each piece of work between the profiler's marks: what ncu sees."""
    for call in work(precision, BATCH).values():
        for _ in range(2):
            call()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def counted(precision: str, raw: Path) -> list[dict[str, Any]]:
    """What ncu's counters say of every kernel of `launched`; its table as it is goes to `raw`."""
    sections = ("SpeedOfLight", "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis", "WarpStateStats", "Occupancy",
                "LaunchStats")
    command = [shutil.which("ncu") or "ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv",
               "--page", "raw", "--print-units", "base", "--kernel-name", f"regex:{OURS}",
               *(part for section in sections for part in ("--section", section)),
               sys.executable, __file__, "--launch", precision]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, env=os.environ)
    raw.write_text(done.stdout + done.stderr)
    lines = done.stdout.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise RuntimeError(f"ncu ended with {done.returncode}: {(done.stdout + done.stderr)[-400:]}")
    table = list(csv.DictReader(io.StringIO("\n".join(lines[start:]))))[1:]  # the first row has units
    found = [{"precision": precision, "kernel": row["Kernel Name"], "grid": row["Grid Size"],
              "block": row["Block Size"], **{ours: _number(row.get(theirs)) for theirs, ours in COUNTERS.items()},
              "stalls": _largest(row, STALL, "_per_issue_active.ratio")} for row in table]
    return [{**row, "time": (row["time"] or 0.0) / 1e3} for row in found]


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def _largest(row: dict[str, str], start: str, end: str) -> dict[str, float]:
    """The three largest of the columns of that name."""
    values = {name[len(start):-len(end)]: _number(value) or 0.0 for name, value in row.items()
              if name.startswith(start) and name.endswith(end) and "not_issued" not in name}
    return dict(sorted(values.items(), key=lambda item: -item[1])[:3])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--launch", choices=PRECISIONS, help="only launch the kernels: what ncu is asked to look at")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU there are no kernels: nothing is run")
    options = parser.parse_args()
    if options.launch:
        launched(options.launch)
        return 0
    found: dict[str, list[dict[str, Any]]] = {"profile": [], "counters": []}
    for precision in () if options.rehearse else PRECISIONS:
        found["profile"] += profiled(precision)
        options.json.write_text(json.dumps(found))
    for row in found["profile"]:
        if row["us"] >= 1:
            print(f"{row['precision']} {row['work']:10} {row['us']:8.1f} us {row['kernel'][:90]}")
    for precision in PRECISIONS if shutil.which("ncu") and not options.rehearse else ():
        found["counters"] += counted(precision, options.json.with_name(f"ncu-{precision}.csv"))
        options.json.write_text(json.dumps(found))
    for row in found["counters"]:
        print(json.dumps(row))
    options.json.write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
