"""Damaged prepared data and runs: what is printed is what the undamaged files give, or one sentence is."""

import functools
import json
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
from raw_lines import raw_lines

from .commands import Done, call
from .rows import cut, flip, insert, remove, swap

TRAIN = ("ctr-train", "--model", "dcnv2", "--recipe", "small", "--epochs", "1", "--batch-size", "64", "--data", "rows")
PREPARE = ("ctr-data", "prepare", "--input", "raw.tsv", "--out", "rows", "--hash-bins", "500", "--valid-ratio", "0.2",
           "--min-count", "2")
COMMANDS = {
    "train": (*TRAIN, "--out", "new"),
    "resume": ("ctr-train", "--resume", "--out", "begun", "--data", "rows"),
    "again": ("ctr-train", "--resume", "--out", "run"),
    "from": ("ctr-data", "prepare", "--from", "run", "--input", "raw.tsv", "--out", "next"),
    "inspect": ("ctr-data", "inspect", "rows"),
    "evaluate": ("ctr-eval", "run", "--data", "rows", "--json"),
    "score": ("ctr-eval", "run", "--input", "raw.tsv", "--predictions", "p.parquet", "--json"),
    "report": ("ctr-report", "run"),
}
READS = {"train": ("rows",), "resume": ("begun", "rows"), "again": ("run",), "from": ("run",), "inspect": ("rows",),
         "evaluate": ("run", "rows"), "score": ("run",), "report": ("run",)}
TIMES = ("rows_per_s", "rows/s")


@functools.cache
def base() -> Path:
    """raw.tsv, rows/ prepared from it, run/ trained on them, and begun/, the same without its result; and the results
    of all commands on them.
    """
    where = Path(tempfile.mkdtemp(prefix="campaign-"))
    (where / "raw.tsv").write_text("".join(line + "\n" for line in raw_lines(500)))
    for arguments in (PREPARE, (*TRAIN, "--out", "run")):
        done = call(where, *arguments)
        assert done.code == 0, done.err
    shutil.copytree(where / "run", where / "begun")
    (where / "begun" / "gold.json").unlink()
    results = {}
    for name in COMMANDS:
        with _copy(where) as there:
            done = call(there, *COMMANDS[name])
            assert done.code == 0, done.err
            results[name] = _result(there, name, done)
    (where / "results.json").write_text(json.dumps(results))
    return where


def check(seed: int) -> str:
    """Damage one file that a command reads, and run it. Returns what became of it."""
    draw = random.Random(seed)
    name = draw.choice(list(COMMANDS))
    with _copy(base()) as there:
        files = sorted(path for place in READS[name] for path in (there / place).iterdir() if path.is_file())
        large = [file for file in files if file.suffix in (".pt", ".arrow")]  # the others are small, and all of text
        path = draw.choice(large if large and draw.random() < 0.5 else files)
        what = draw.choice(DAMAGES)
        what(draw, path, files)
        before = {file.name for file in there.iterdir()}
        done = call(there, *COMMANDS[name])
        told = f"{name} after {what.__name__} of {path.relative_to(there)}: "
        new = {file.name for file in there.iterdir()} - before
        if done.code:
            assert done.failed_well(), f"{told}code {done.code}: {done.err}"
            assert not new or (name, new) == ("train", {"new"}), f"{told}left over: {new}"
            return "refused"
        expected = json.loads((base() / "results.json").read_text())[name]
        assert _result(there, name, done) == expected, f"{told}another result: {done.out}"
        return "the same result"


@contextmanager
def _copy(where: Path) -> Iterator[Path]:
    """Within: a copy of the base, to be damaged."""
    with tempfile.TemporaryDirectory() as name:
        for place in ("rows", "run", "begun"):
            shutil.copytree(where / place, Path(name) / place)
        shutil.copy(where / "raw.tsv", name)
        yield Path(name)


def _result(there: Path, name: str, done: Done) -> list:
    """What a command gave, without its times."""
    found: list = ["\n".join(line for line in done.out.splitlines() if not any(time in line for time in TIMES))]
    if name == "report":
        found = [[cell for cell in line.split("|") if "," not in cell] for line in done.out.splitlines()[2:3]]
    if name == "from":
        found = [json.loads((there / "next" / "artifacts.json").read_text())["checksum"]]
    if (there / "p.parquet").exists():
        found.append(pq.read_table(there / "p.parquet")["logit"].to_pylist())
    return json.loads(json.dumps(found))


def bytes_flipped(draw: random.Random, path: Path, files: list[Path]) -> None:
    path.write_bytes(flip(draw, path.read_bytes()))


def shortened(draw: random.Random, path: Path, files: list[Path]) -> None:
    path.write_bytes(cut(draw, path.read_bytes()))


def inserted(draw: random.Random, path: Path, files: list[Path]) -> None:
    path.write_bytes(insert(draw, path.read_bytes()))


def removed(draw: random.Random, path: Path, files: list[Path]) -> None:
    path.write_bytes(remove(draw, path.read_bytes()))


def lines_swapped(draw: random.Random, path: Path, files: list[Path]) -> None:
    path.write_bytes(swap(draw, path.read_bytes()))


def deleted(draw: random.Random, path: Path, files: list[Path]) -> None:
    if path.name != "gold.json":  # a run without it is an unfinished one
        path.unlink()


def emptied(draw: random.Random, path: Path, files: list[Path]) -> None:
    path.write_bytes(b"")


def replaced(draw: random.Random, path: Path, files: list[Path]) -> None:
    """By another file that the command reads."""
    if path.suffix != ".pt":  # nothing binds a checkpoint to its name
        path.write_bytes(draw.choice(files).read_bytes())


DAMAGES = [bytes_flipped, bytes_flipped, bytes_flipped, shortened, inserted, removed, lines_swapped, deleted, emptied,
           replaced]
