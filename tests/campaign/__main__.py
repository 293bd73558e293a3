"""Random damage, kills, surgeries and optimizer lives: `python -m campaign [PART...] [--seed S] [--count N]` here.

Each try is one seed and a process of its own. A failure prints its seed; `--seed S --count 1` repeats it alone.
"""

import argparse
import importlib
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402 - and all else that the tries need, before the first of them is forked

from campaign.commands import fork, wait  # noqa: E402

PARTS = {"rows": 1000, "directories": 500, "kills": 200, "modules": 1000, "optimizers": 1000}  # and their tries
SECONDS = 300.0  # of a try


def main() -> int:
    """Run the parts; 1 if any try failed."""
    parser = argparse.ArgumentParser(prog="campaign", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--seed", type=int, default=None, help="of the first try; default: drawn, and printed")
    parser.add_argument("--count", type=int, default=None, help="tries of each part")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="tries at a time")
    asked = parser.parse_args()
    unknown = [part for part in asked.parts if part not in PARTS]
    if unknown:
        parser.error(f"{unknown[0]!r} is no part: choose of {', '.join(PARTS)}")
    seed = int.from_bytes(os.urandom(4), "little") if asked.seed is None else asked.seed
    print(f"seeds from {seed}, torch {torch.__version__}, {asked.jobs} tries at a time")
    failed = 0
    for part in asked.parts or PARTS:
        failed += run(part, range(seed, seed + (asked.count or PARTS[part])), asked.jobs)
    return int(failed > 0)


def run(part: str, seeds: range, jobs: int) -> int:
    """All tries of a part, and a line of what became of them; the number that failed."""
    module, started = importlib.import_module(f"campaign.{part}"), time.monotonic()
    if hasattr(module, "base"):
        module.base()
    labels: Counter[str] = Counter()
    failures = 0
    with tempfile.TemporaryDirectory() as name:
        waiting, running = list(reversed(seeds)), {}
        while waiting or running:
            while waiting and len(running) < jobs:
                seed = waiting.pop()
                file = Path(name) / str(seed)
                running[fork(lambda: _try(module, seed, file))] = seed, file, time.monotonic()  # noqa: B023 - called now
            time.sleep(0.002)
            for pid, (seed, file, begun) in list(running.items()):
                found, status = os.waitpid(pid, os.WNOHANG)
                if not found and time.monotonic() - begun < SECONDS:
                    continue
                del running[pid]
                code = os.waitstatus_to_exitcode(status) if found else _overdue(pid)
                text = file.read_text() if file.exists() else ""
                if code == 0:
                    labels[text] += 1
                else:
                    failures += 1
                    lines = text.splitlines() or [f"ended with code {code}"]
                    said = [line for line in lines if line.startswith("AssertionError")] or lines[-1:]
                    said = lines if len(seeds) == 1 else said[:1]
                    print(f"{part}: seed {seed} FAILED: " + "\n".join(said), flush=True)
    told = ", ".join(f"{count:,} {label}" for label, count in labels.most_common())
    print(f"{part}: {len(seeds):,} tries in {time.monotonic() - started:.0f} s, {failures} failed; {told}", flush=True)
    return failures


def _overdue(pid: int) -> int:
    os.kill(pid, 9)
    return wait(pid, 10.0)


def _try(module, seed: int, file: Path) -> None:
    torch.set_num_threads(1)
    try:
        file.write_text(module.check(seed))
    except BaseException:
        file.write_text(traceback.format_exc())
        raise SystemExit(1) from None


if __name__ == "__main__":
    sys.exit(main())
