"""The search of launch configurations: many processes compile the candidates, then one times them all.

Compiling takes most of a search. A candidate that ends its process, as an illegal access does, is left out from then
on.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHECKS = Path(__file__).resolve().parents[2] / "tests" / "gpu_checks.py"
RESTARTS = 6


def command(rehearse: bool) -> list[str]:
    return [sys.executable, str(CHECKS), "--group", "tuning", *(["--rehearse"] if rehearse else [])]


def compile_part(part: str, variables: dict[str, str]) -> int:
    """Launch a share of the candidates once, in a new process after each that ended one; how many did."""
    for ended in range(RESTARTS):
        done = subprocess.run(command(False), env={**variables, "CTR_TUNING_PART": part}, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL)
        if done.returncode == 0:
            return ended
    return RESTARTS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="what the search says of itself")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, in Triton's interpreter, a few candidates")
    options = parser.parse_args()
    count = max(1, (os.cpu_count() or 2) - 2)
    with tempfile.TemporaryDirectory() as folder:
        variables = {**os.environ, "CTR_KERNELS_AUTOTUNE": "1", "CTR_TUNING_BAD": folder}
        if options.rehearse:
            return subprocess.run(command(True), env={**variables, "CTR_TUNING_PART": "0/60"}).returncode
        with ThreadPoolExecutor(count) as pool:
            ended = sum(pool.map(lambda i: compile_part(f"{i}/{count}", variables), range(count)))
        print(f"{count} processes have compiled the candidates, and {ended} ended; left out: "
              f"{', '.join(sorted(path.name for path in Path(folder).iterdir())) or 'none'}", flush=True)
        more = ["--json", str(options.json)] if options.json else []
        return subprocess.run([*command(False), *more], env=variables).returncode


if __name__ == "__main__":
    sys.exit(main())
