"""SIGKILL at a random moment, then the same command again: it ends as if undisturbed, and nothing is left over."""

import functools
import hashlib
import json
import random
import shutil
import tempfile
import time
from pathlib import Path

import torch
from raw_lines import raw_lines

from ctr_train.files import sha256

from .commands import Command, call

RUN = ("ctr-train", "--model", "dcnv2", "--recipe", "small", "--epochs", "8", "--batch-size", "32", "--eval-every",
       "0.5", "--data", "raw.tsv", "--valid-ratio", "0.2", "--out", "run", "--skip-if-done")
COMMANDS = {
    "prepare": ("ctr-data", "prepare", "--input", "raw.tsv", "--out", "rows"),
    "train": RUN,
    "eval": ("ctr-eval", "trained", "--input", "raw.tsv", "--predictions", "p.parquet"),
    "report": ("ctr-report", "trained", "--out", "report"),
    "synth": ("ctr-data", "synth", "--rows", "20000", "--out", "s.tsv"),
}
TIMES = {"rows_per_s", "checksum"}  # entries of gold.json that are never the same, or change with one that is not


@functools.cache
def base() -> Path:
    """raw.tsv, a run `trained` on it, what the commands give undisturbed, and how long they take."""
    where = Path(tempfile.mkdtemp(prefix="campaign-"))
    (where / "raw.tsv").write_text("".join(line + "\n" for line in raw_lines(900)))
    with_run = Path(tempfile.mkdtemp(dir=where))
    shutil.copy(where / "raw.tsv", with_run)
    done = call(with_run, *RUN)
    assert done.code == 0, done.err
    shutil.copytree(with_run / "run", where / "trained")
    results = {}
    for name, arguments in COMMANDS.items():
        there = Path(tempfile.mkdtemp(dir=where))
        _fill(there, where)
        started = time.monotonic()
        done = call(there, *arguments)
        assert done.code == 0, done.err
        results[name] = [time.monotonic() - started, _result(there)]
    (where / "results.json").write_text(json.dumps(results))
    return where


def check(seed: int) -> str:
    """Kill a command one to three times and let it then end. Returns its name."""
    draw = random.Random(seed)
    name = draw.choice(["prepare", "train", "train", "train", "eval", "report", "synth"])
    seconds, expected = json.loads((base() / "results.json").read_text())[name]
    with tempfile.TemporaryDirectory() as directory:
        there = Path(directory)
        _fill(there, base())
        moments = [draw.uniform(0.0, seconds * 1.1) for _ in range(draw.choice([1, 1, 2, 3]))]
        for moment in moments:
            command = Command(there, *COMMANDS[name])
            time.sleep(moment)
            command.kill()
            done = command.wait()
            assert done.code in (-9, 0), f"{name} killed at {moments}: code {done.code}: {done.err}"
        done = call(there, *COMMANDS[name])
        assert done.code == 0, f"{name} after kills at {moments}: code {done.code}: {done.err}"
        found = json.loads(json.dumps(_result(there)))
        for file in sorted(found.keys() | expected.keys()):
            assert found.get(file) == expected.get(file), f"{name} after kills at {moments}: {file} differs"
    return name


def _fill(there: Path, where: Path) -> None:
    shutil.copy(where / "raw.tsv", there)
    shutil.copytree(where / "trained", there / "trained")


def _result(there: Path) -> dict[str, str]:
    """A checksum of the content of every file below `there`, without its times."""
    return {str(path.relative_to(there)): _content(path) for path in sorted(there.rglob("*"))
            if path.is_file() and not path.name.endswith("-of-the-command")}


def _content(path: Path) -> str:
    if path.suffix == ".pt":
        content = torch.load(path, weights_only=True)
        weights = hashlib.sha256(b"".join(weight.numpy().tobytes() for weight in content["model"].values()))
        return repr({key: content[key] for key in ("step", "best", "calibration", "loader")}) + weights.hexdigest()
    if path.name == "gold.json":
        return json.dumps({key: value for key, value in json.loads(path.read_text()).items()
                           if key not in TIMES and key != "log"})
    if path.name == "metrics.jsonl":
        return json.dumps([{key: value for key, value in json.loads(line).items() if key not in (*TIMES, "chain")}
                           for line in path.read_text().splitlines()])
    if path.name == "config.json":
        return path.name  # it names the directory
    return sha256(path)
