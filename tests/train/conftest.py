"""Small prepared data for the tests of data, training and evaluation."""

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from ctr_train import cli_train
from ctr_train.checkpoint import build_model
from ctr_train.data.artifacts import Artifacts
from ctr_train.data.dataset import open_split
from ctr_train.data.loader import Loader
from ctr_train.data.prepare import prepare
from ctr_train.data.synth import write_synthetic
from ctr_train.graph import Recorder
from ctr_train.interrupt import Interrupt
from ctr_train.loop import Trainer
from ctr_train.recipes import resolve_recipe

ROWS, HASH_BINS, GOLD_ROWS = 6000, 1000, 200


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of 6,000 synthetic rows as `ctr-data` makes it; gold rows are the first 200 validation rows."""
    directory = tmp_path_factory.mktemp("data")
    write_synthetic(directory / "raw.tsv", rows=ROWS, seed=1)
    prepare([directory / "raw.tsv"], directory / "prepared", hash_bins=HASH_BINS, valid_ratio=0.1,
            gold_rows=GOLD_ROWS, missing_indicator=False, on_bad_line="error", progress=None)
    return directory / "prepared"


@pytest.fixture
def write_split() -> Callable[..., dict[str, np.ndarray]]:
    """(path, rows, ...) -> the arrays of an Arrow file of random rows, in the form of a prepared split."""

    def write(path: Path, rows: int, *, num_dense: int = 13, batch_rows: int = 65_536, seed: int = 0,
              compression: str | None = None) -> dict[str, np.ndarray]:
        generator = np.random.default_rng(seed)
        arrays = {
            "label": generator.integers(0, 2, rows).astype(np.uint8),
            "dense": generator.random((rows, num_dense), dtype=np.float32),
            "sparse": generator.integers(0, 2**31 - 1, (rows, 26)).astype(np.int32),
        }
        schema = pa.schema([("label", pa.uint8()), ("dense", pa.list_(pa.float32(), num_dense)),
                            ("sparse", pa.list_(pa.int32(), 26))])
        options = pa.ipc.IpcWriteOptions(compression=compression)
        with pa.ipc.new_file(str(path), schema, options=options) as writer:
            for start in range(0, rows, batch_rows):
                part = slice(start, start + batch_rows)
                columns = [pa.array(arrays["label"][part])]
                columns += [pa.FixedSizeListArray.from_arrays(pa.array(arrays[name][part].ravel()), width)
                            for name, width in (("dense", num_dense), ("sparse", 26))]
                writer.write_batch(pa.record_batch(columns, schema=schema))
        return arrays

    return write


class StopAfter(Interrupt):
    """Ctrl-C pressed during a given step of the trainer."""

    def __init__(self, step: int) -> None:
        self.trainer, self.step = None, step

    @property
    def requested(self) -> bool:
        return self.trainer.step >= self.step


NEVER = 10**9


@pytest.fixture
def one_thread():
    """Batches this small gain nothing from threads, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_trainer(prepared, tmp_path, one_thread):
    """(directory name, recorder, **settings) -> a trainer as `run.py` makes it, and its StopAfter."""
    loaders = []

    def make(name: str, *, stop_after: int = NEVER, model: str = "ft", steps: int = 60,
             recorder: Recorder | None = None, **settings) -> tuple:
        hyperparameters = {"batch_size": 32, "lr": 1e-3, "warmup": 5, "schedule": "cosine", "dropout": 0.2}
        asked = {**hyperparameters, **({} if "eval_every" in settings else {"validation_share": 0.0}), "patience": 0,
                 **settings}
        config = {
            "model": model, **resolve_recipe("small", model, asked), "kernels": "auto",
            "hash_bins": 1000, "total_steps": steps, "steps_in_epoch": steps,
        }
        torch.manual_seed(0)
        artifacts = Artifacts.load(prepared)
        loader = Loader(open_split(prepared, "train"), batch_size=config["batch_size"], shuffle=True, seed=0,
                        drop_last=True)
        loaders.append(loader)
        (tmp_path / name).mkdir(exist_ok=True)
        trainer = Trainer(tmp_path / name, config=config, artifacts=artifacts, loader=loader,
                          model=build_model(config, artifacts, "auto"), valid=open_split(prepared, "gold"),
                          recorder=recorder)
        stop = StopAfter(stop_after)
        stop.trainer = trainer
        return trainer, stop

    yield make
    for loader in loaders:
        loader.close()


@pytest.fixture
def command(tmp_path, monkeypatch, capfd) -> Callable[..., subprocess.CompletedProcess[str]]:
    """(module, *arguments) -> what that command does in `tmp_path`, in this process: importing torch takes seconds."""
    monkeypatch.chdir(tmp_path)

    def run(module, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", [module.NAME, *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            module.main()
        return subprocess.CompletedProcess(arguments, exit_.value.code, *capfd.readouterr())

    return run


@pytest.fixture
def ctr_train(command) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`ctr-train` with arguments in `tmp_path`, in this process."""
    threads = torch.get_num_threads()
    yield functools.partial(command, cli_train)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")
