"""`make gpu`: everything that needs an NVIDIA GPU, in half an hour at most, network or not.

Correctness first, five processes side by side: the build from a copy of the tree, parity at full size, and the
kernels under compute-sanitizer. Then, one at a time: the training step as a CUDA graph, and the timings. A part that
fails or runs out of time costs the others nothing. After each part gpu.json and gpu.md are written anew under $OUT
(default: out/); gpu.log has what the parts printed. The last thing printed is a table of the bars and what was found.
`--parts checks` and `--parts speed` are the two halves of it, for a GPU that is there for ten minutes at a time.

`--rehearse` does the same on a CPU, tiny, in Triton's interpreter: it shows that everything runs, and no figure.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.commit import commit, first_line
from on_gpu.bars import bars, markdown

ROOT = Path(__file__).resolve().parent.parent
CHECKS = ("tests/gpu_checks.py",)
SPEED = ("bench/on_gpu/speed.py",)
# Part -> (arguments of Python, seconds at most): those that run side by side, and those that need the machine alone.
BESIDE = {
    "build": (("bench/on_gpu/build.py",), 170),
    "parity": ((*CHECKS, "--group", "parity"), 170),
    "parity others": ((*CHECKS, "--group", "parity others"), 170),
    "memcheck": ((*CHECKS, "--group", "launches", "--tiny"), 150),
    "racecheck": ((*CHECKS, "--group", "launches", "--tiny"), 150),
}
ALONE = {
    "tuning": (("bench/on_gpu/tune.py",), 36_000),  # with --autotune alone, which may take --seconds
    "training": ((*CHECKS, "--group", "training"), 120),
    "recipes": (("bench/on_gpu/recipes.py",), 150),
    "speed step bf16": ((*SPEED, "--group", "step", "--dtype", "bf16"), 110),
    "speed step fp32": ((*SPEED, "--group", "step", "--dtype", "fp32"), 110),
    "speed attention bf16": ((*SPEED, "--group", "attention", "--dtype", "bf16"), 75),
    "speed ffn bf16": ((*SPEED, "--group", "ffn", "--dtype", "bf16"), 60),
    "speed attention fp32": ((*SPEED, "--group", "attention", "--dtype", "fp32"), 75),
    "speed ffn fp32": ((*SPEED, "--group", "ffn", "--dtype", "fp32"), 60),
    "speed sparse_update": ((*SPEED, "--group", "sparse_update"), 50),
    "speed step tf32": ((*SPEED, "--group", "step", "--dtype", "tf32"), 75),
    "speed default step": ((*SPEED, "--group", "default step", "--dtype", "fp32"), 60),
    "speed layer bf16": ((*SPEED, "--group", "layer", "--dtype", "bf16"), 60),
    "speed layer fp32": ((*SPEED, "--group", "layer", "--dtype", "fp32"), 60),
    "kernels": (("bench/on_gpu/kernels.py",), 90),
}
SANITIZERS = ("memcheck", "racecheck")
HALVES = {"checks": [*BESIDE, "training", "recipes"],
          "speed": [name for name in ALONE if name.startswith(("speed", "kernels"))]}
GRACE = 15.0  # seconds kept for the end


@dataclass
class Session:
    """One call: where its parts write, what they found so far, and when it has to end."""

    out: Path
    scratch: Path
    rehearse: bool
    ends: float
    data: str | None = None
    report: dict[str, Any] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        """Variables of the parts: the packages straight from the checkout, installed or not."""
        links = self.scratch / "packages"
        if not links.exists():
            links.mkdir()
            for name, folder in (("ctr_kernels", "ctr_kernels"), ("ctr_models", "models"), ("ctr_train", "train")):
                (links / name).symlink_to(ROOT / folder, target_is_directory=True)
        paths = [str(links), str(ROOT / "tests"), str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")]
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
        if self.rehearse:
            variables |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        return variables

    def start(self, name: str, arguments: tuple[str, ...]) -> tuple[subprocess.Popen, Path, Any]:
        """Begin a part; its output goes to a file of its own, its findings to another."""
        found = self.scratch / (name.replace(" ", "-") + ".json")
        command = [sys.executable, *arguments, "--json", str(found)]
        variables = self.environment()
        if self.rehearse:
            command += ["--rehearse"]
            command = [argument for argument in command if argument != "--tiny"]
        elif name in SANITIZERS:
            command = [sanitizer() or "compute-sanitizer", "--tool", name, "--error-exitcode", "9",
                       "--report-api-errors", "no", *command]  # libraries probe, and handle what the driver answers
            variables["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # else a stray access lands in memory that is cached
        if name == "recipes" and self.data:
            command += ["--data", self.data]
        log = open(self.scratch / (name.replace(" ", "-") + ".log"), "w")  # noqa: SIM115 (the process writes to it)
        process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT,
                                   start_new_session=True)
        return process, found, log

    def finish(self, name: str, process: subprocess.Popen, found: Path, log: Any, started: float,
               limit: float) -> None:
        """Wait for a part until its limit or the end of the call, and keep what it found."""
        status = None
        try:
            code = process.wait(max(1.0, min(started + limit, self.ends) - time.monotonic()))
        except subprocess.TimeoutExpired:
            status = f"stopped after {time.monotonic() - started:.0f} s"
            end(process)
        else:
            status = "done" if code == 0 else f"failed with code {code}"
        log.close()
        text = Path(log.name).read_text(errors="replace")
        part = {"status": status, "seconds": round(time.monotonic() - started, 1)}
        if found.exists():
            part["found"] = json.loads(found.read_text())
        if status != "done" or name in (*SANITIZERS, "tuning"):
            part["tail"] = text[-6000:]
        self.add(name, part, text)

    def add(self, name: str, part: dict[str, Any], text: str = "") -> None:
        """Note a part and write everything found so far."""
        self.report["parts"][name] = part
        with open(self.out / "gpu.log", "a") as handle:
            handle.write(f"===== {name}: {part['status']}\n{text}\n")
        self.write()
        print(f"{name}: {part['status']}, {part.get('seconds', 0)} s", flush=True)

    def write(self) -> None:
        """gpu.json and gpu.md, each whole or not at all."""
        self.report["bars"] = bars(self.report)
        contents = {"gpu.json": json.dumps(self.report, indent=1), "gpu.md": markdown(self.report)}
        for name, content in contents.items():
            temporary = self.out / f".{name}"
            temporary.write_text(content)
            temporary.replace(self.out / name)


def end(process: subprocess.Popen) -> None:
    """End a part and the compilers it started; they share a process group of their own."""
    try:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        return
    process.wait()


def sanitizer() -> str | None:
    """The program compute-sanitizer; None where there is none."""
    return shutil.which("compute-sanitizer") or next(
        (str(path) for path in Path("/usr/local").glob("cuda*/bin/compute-sanitizer")), None)


def machine(rehearse: bool) -> dict[str, Any]:
    """What the figures belong to: device, driver, versions, commit."""
    import torch

    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "cuda": torch.version.cuda or ""}
    for name in ("triton", "numpy"):
        try:
            versions[name] = __import__(name).__version__
        except ImportError as error:
            versions[name] = f"absent ({error})"
    facts: dict[str, Any] = {"versions": versions, "commit": commit(), "platform": platform.platform()}
    if not rehearse:
        properties = torch.cuda.get_device_properties(0)
        facts |= {"device": properties.name, "capability": f"sm_{properties.major}{properties.minor}",
                  "multiprocessors": properties.multi_processor_count, "memory_gb": properties.total_memory / 1e9,
                  "driver": first_line(["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit",
                                        "--format=csv,noheader", "--id=0"])}
    return facts


def run(session: Session, wanted: list[str]) -> int:
    """All parts; the number of those that did not end well."""
    beside = {name: part for name, part in BESIDE.items() if name in wanted}
    running = {}
    for name, (arguments, limit) in beside.items():
        if name in SANITIZERS and not session.rehearse and sanitizer() is None:
            session.add(name, {"status": "not done: compute-sanitizer was not found"})
            continue
        running[name] = (*session.start(name, arguments), time.monotonic(), limit)
    for name, state in running.items():
        session.finish(name, *state)
    for name, (arguments, limit) in ALONE.items():
        if name not in wanted:
            continue
        if time.monotonic() > session.ends - GRACE:
            session.add(name, {"status": "not done: the time of the call was used up"})
            continue
        started = time.monotonic()
        session.finish(name, *session.start(name, arguments), started, limit)
    return sum(part["status"] != "done" for part in session.report["parts"].values())


def main() -> int:
    parts = [*BESIDE, *ALONE]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, tiny, in Triton's interpreter; no figures")
    parser.add_argument("--parts", default="",
                        help=f"comma-separated, of: {', '.join([*HALVES, *parts])}; default: all")
    parser.add_argument("--autotune", action="store_true",
                        help="only search launch configurations; gpu.log has the lines for "
                             "ctr_kernels/triton_tuned.py, of as many kernels as --seconds allow")
    parser.add_argument("--data", help="raw rows for the part recipes; default: synthetic ones")
    parser.add_argument("--seconds", type=float, default=1800.0, help="of the whole call")
    options = parser.parse_args()
    default = ["tuning"] if options.autotune else [name for name in parts if name != "tuning"]
    named = [name.strip() for name in options.parts.split(",") if name.strip()]
    wanted = [part for name in named for part in HALVES.get(name, [name])] or default
    unknown = [name for name in wanted if name not in parts]
    if unknown:
        parser.error(f"--parts {unknown[0]}: choose of {', '.join([*HALVES, *parts])}")
    import torch

    if not options.rehearse and not torch.cuda.is_available():
        print(f"No NVIDIA GPU is visible to torch {torch.__version__}: nothing was run. The parity tests of the CPU "
              "kernels are part of `make test`; `python bench/gpu.py --rehearse` shows that this script runs.")
        return 0
    started = time.monotonic()
    out = Path(os.environ.get("OUT") or ROOT / "out")
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.log").write_text("")
    with tempfile.TemporaryDirectory(prefix="ctr-gpu-") as scratch:
        session = Session(out, Path(scratch), options.rehearse, started + options.seconds - GRACE,
                          options.data)
        session.report = {"rehearsal": options.rehearse, "machine": machine(options.rehearse), "parts": {}}
        session.write()
        print(json.dumps(session.report["machine"]), flush=True)
        failed = run(session, wanted)
        session.report["seconds"] = round(time.monotonic() - started, 1)
        session.write()
    print((out / "gpu.md").read_text())
    print(f"{failed} of {len(session.report['parts'])} parts did not end well; " if failed else "", end="")
    print(f"{session.report['seconds']:.0f} s; results are in {out}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
