"""Whole runs of `ctr-train` on a GPU: each recipe with the Triton kernels and with PyTorch's own operations.

Both draw the same batches and dropout masks, so that their losses may differ by rounding alone.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

KERNELS = ("triton", "eager")
# The default without an option, and the baseline study's, whose steps are longer than these rows: so many epochs.
RECIPES: dict[str, tuple[str, ...]] = {"default": (), "default bf16": ("--precision", "bf16"),
                                       "baseline-v1": ("--recipe", "baseline-v1", "--epochs", "4")}
LOGLOSS_LIMIT = 0.004  # between the gold rows of both; seeds differ by 0.002


def train(folder: Path, data: Path, recipe: str, kernels: str, more: tuple[str, ...]) -> dict[str, Any]:
    """A run of the command with more options; its result, its losses and its seconds."""
    out = folder / f"{recipe.replace(' ', '-')}-{kernels}"
    command = [sys.executable, "-m", "ctr_train.cli_train", "--model", "ft", "--data", str(data), "--prepared",
               str(folder / f"data-{recipe.split()[0]}"), "--out", str(out), "--kernels", kernels, *RECIPES[recipe],
               *more]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:])} ended with {done.returncode}: {done.stderr[-800:]}")
    gold = json.loads((out / "gold.json").read_text())
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in steps if "loss" in row]
    return {"recipe": recipe, "kernels": kernels, "seconds": round(seconds, 1), "losses": losses,
            "logged": done.stderr.splitlines()[:6], "result": done.stdout.splitlines(),
            **{name: gold[name] for name in ("logloss", "auc", "steps", "rows_trained", "rows_per_s")}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="raw rows; default: synthetic ones")
    parser.add_argument("--rehearse", action="store_true", help="300 rows, on a CPU, with eager operations alone")
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = options.data or folder / "rows.tsv"
        if options.data is None:
            from ctr_train.data.synth import write_synthetic

            write_synthetic(data, rows=300 if options.rehearse else 80_000, seed=1)
        for recipe, kernels in product(RECIPES, ("eager",) if options.rehearse else KERNELS):
            found.append(train(folder, data, recipe, kernels, ("--batch-size", "64") if options.rehearse else ()))
            options.json.write_text(json.dumps(found))
            print(f"{recipe}, {kernels}: logloss {found[-1]['logloss']:.4f}, AUC {found[-1]['auc']:.4f}, "
                  f"{found[-1]['rows_per_s']:,.0f} rows/s, {found[-1]['seconds']} s", flush=True)
    pairs = [] if options.rehearse else zip(found[::2], found[1::2], strict=True)
    far = [f"{a['recipe']}: {a['logloss']:.4f} and {b['logloss']:.4f}" for a, b in pairs
           if not abs(a["logloss"] - b["logloss"]) <= LOGLOSS_LIMIT]
    if far:
        print(f"logloss with Triton's kernels and without differs by more than {LOGLOSS_LIMIT}: {'; '.join(far)}")
    return int(bool(far))


if __name__ == "__main__":
    sys.exit(main())
