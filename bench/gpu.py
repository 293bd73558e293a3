"""`make gpu`: everything that needs an NVIDIA GPU, in one call; says so and stops where there is none.

Runs the tests marked `gpu`, then the benchmarks, and leaves their rows as JSON under $OUT (default: out/).
"""

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
SCRIPTS = ("attn", "ffn", "sparse_update", "step")


def main() -> int:
    """Exit status: 0 without a GPU or if all went well, else 1."""
    if not torch.cuda.is_available():
        print(f"No NVIDIA GPU is visible to torch {torch.__version__}: nothing was run. The parity tests of the CPU "
              "kernels are part of `make test`.")
        return 0
    out = Path(os.environ.get("OUT", ROOT / "out"))
    out.mkdir(parents=True, exist_ok=True)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    commands = {"tests": ["-m", "pytest", "-m", "gpu", "tests"]}
    commands |= {name: [f"bench/{name}.py", "--device", "cuda", "--json", str(out / f"{name}.json")]
                 for name in SCRIPTS}
    failed = [name for name, arguments in commands.items()
              if subprocess.run([sys.executable, *arguments], cwd=ROOT, check=False).returncode]
    print(f"failed: {', '.join(failed)}" if failed else f"all done; results are in {out}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
