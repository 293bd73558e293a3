"""Whether the package installs without a network from a copy of the checkout, and what its backends then say."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "ctr_kernels", "models", "train")
BUILT = shutil.ignore_patterns("*.so", "__pycache__", "_native_absent.txt")
QUESTION = """
import json, sys
import ctr_kernels, ctr_models, ctr_train
print(json.dumps({"from": ctr_kernels.__file__, "backends": ctr_kernels.backends()}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true", help="without compiling the native kernels")
    options = parser.parse_args()
    variables = {**os.environ, **({"CTR_KERNELS_NO_NATIVE": "1"} if options.rehearse else {})}
    with tempfile.TemporaryDirectory() as folder:
        source, site = Path(folder, "source"), Path(folder, "site")
        source.mkdir()
        for name in SOURCES:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, source / name, ignore=BUILT)
            else:
                shutil.copy(ROOT / name, source)
        subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-build-isolation",
                        "--no-deps", "--no-index", "--target", str(site), str(source)], check=True, env=variables)
        asked = subprocess.run([sys.executable, "-c", QUESTION], check=True, capture_output=True, text=True, cwd=folder,
                               env={**variables, "PYTHONPATH": str(site)})
    print(asked.stdout)
    answer = json.loads(asked.stdout)
    if not answer["from"].startswith(folder):
        raise SystemExit(f"another installation was imported: {answer['from']}")
    options.json.write_text(json.dumps(answer["backends"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
