"""Checkpoints hold all of a run, replace each other whole, and any other file is refused in one sentence."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ctr_train.checkpoint import VERSION, build_model, load_checkpoint, restore_rng, save_checkpoint
from ctr_train.data.artifacts import Artifacts
from ctr_train.errors import UserError
from ctr_train.optim import make_optimizers
from ctr_train.schedule import make_schedulers

CONFIG = {"model": "dcnv2", "hash_bins": 100, "variant": "study", "dropout": 0.1, "tables": "shared",
          "numeric": None, "embedding_dropout": 0.0, "pooling": "cls", "shortcut": "none",
          "embedding_dtype": "fp32"}

ARTIFACTS = Artifacts(hash_bins=100, numeric_edges=[[0.0, 1.0, 2.0]] * 13)


@pytest.fixture
def save(prepared):
    """(path, **changes) -> the model, after saving it and all that goes with it."""

    def write(path: Path, **changes):
        torch.manual_seed(0)
        config = {**CONFIG, **changes}
        model = build_model(config, ARTIFACTS, "auto")
        optimizers = make_optimizers(model, embedding_optimizer="rowwise-adagrad", embedding_lr=0.1, lr=0.1,
                                     weight_decay=0.0, kernels="auto")
        model(torch.rand(4, 13), torch.randint(100, (4, 26))).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        save_checkpoint(path, model=model, optimizers=optimizers,
                        schedulers=make_schedulers(optimizers, "cosine", 2, 10),
                        loader_state={"epoch": 1, "batch": 2, "seed": 3, "rows": 4, "batch_size": 5}, step=7,
                        config=config, artifacts=Artifacts.load(prepared), best={"step": 5, "logloss": 0.5}, average={},
                        log={"chain": 1, "losses": []})
        return model, optimizers

    return write


def test_reads_back_what_was_saved(save, tmp_path, prepared):
    model, optimizers = save(tmp_path / "last.pt")
    drawn = torch.rand(3)
    content = load_checkpoint(tmp_path / "last.pt", "dcnv2")
    torch.testing.assert_close(content["model"], dict(model.state_dict()), rtol=0, atol=0)
    for found, optimizer in zip(content["optimizers"], optimizers, strict=True):
        torch.testing.assert_close(found["state"], optimizer.state_dict()["state"], rtol=0, atol=0)
    assert (content["step"], content["best"], content["config"]) == (7, {"step": 5, "logloss": 0.5}, CONFIG)
    assert content["loader"] == {"epoch": 1, "batch": 2, "seed": 3, "rows": 4, "batch_size": 5}
    assert Artifacts.from_dict(content["artifacts"]).to_dict() == Artifacts.load(prepared).to_dict()
    restore_rng(content)
    assert torch.equal(torch.rand(3), drawn)


@pytest.mark.parametrize(("name", "key", "value"), [
    ("ft", "pooling", "mean"), ("ft", "variant", "paper"), ("autoint", "numeric", "affine"),
    ("dcnv2", "numeric", "piecewise"), ("dcnv2", "tables", "per-field"), ("ft", "dropout", 0.3),
    ("dcnv2", "embedding_dtype", "bf16"), ("ft", "shortcut", "mlp"), ("autoint", "shortcut", "linear"),
])
def test_the_config_decides_the_model(name, key, value):
    config = {**CONFIG, "model": name}
    plain, changed = (build_model(c, ARTIFACTS, "eager") for c in (config, {**config, key: value}))
    assert (repr(plain), plain.state_dict().keys()) != (repr(changed), changed.state_dict().keys())
    assert build_model(config, ARTIFACTS, "eager")(torch.rand(2, 13), torch.randint(100, (2, 26))).shape == (2,)


def test_a_model_that_cannot_be_built_is_an_error_of_the_users():
    with pytest.raises(UserError, match="model 'lr': choose one of dcnv2, autoint, ft"):
        build_model({**CONFIG, "model": "lr"}, ARTIFACTS, "auto")
    with pytest.raises(UserError, match="model 'ft' cannot be built: pooling='mean'"):
        build_model({**CONFIG, "model": "ft", "variant": "paper", "pooling": "mean"}, ARTIFACTS, "auto")


def test_another_model_is_refused_by_name(save, tmp_path):
    save(tmp_path / "last.pt")
    with pytest.raises(UserError, match=r"last\.pt is a checkpoint of the model 'dcnv2', not of 'ft'"):
        load_checkpoint(tmp_path / "last.pt", "ft")


@pytest.mark.parametrize("damage", [
    lambda whole: b"", lambda whole: whole[:10], lambda whole: whole[: len(whole) // 2], lambda whole: whole[:-1],
    lambda whole: b"no PyTorch file at all", lambda whole: bytes(len(whole)),
], ids=["empty", "ten bytes", "half", "one byte short", "text", "zeros"])
def test_damaged_files_are_refused(save, tmp_path, damage):
    path = tmp_path / "last.pt"
    save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"last\.pt is no checkpoint or a damaged one \(.+\)"):
        load_checkpoint(path)


def test_foreign_files_are_refused_without_running_their_code(tmp_path):
    path = tmp_path / "last.pt"
    with pytest.raises(UserError, match="does not exist"):
        load_checkpoint(path)
    with pytest.raises(UserError, match="is no checkpoint or a damaged one"):
        load_checkpoint(tmp_path)  # a directory
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="is a PyTorch file, but no checkpoint of ctr-train"):
        load_checkpoint(path)
    torch.save(Trap(tmp_path / "sprung"), path)
    with pytest.raises(UserError, match="it holds more than tensors and plain values"):
        load_checkpoint(path)
    assert not (tmp_path / "sprung").exists()


class Trap:
    """Pickles as a call that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_version_of_the_future_is_refused(save, tmp_path):
    path = tmp_path / "last.pt"
    save(path)
    torch.save({**load_checkpoint(path), "version": VERSION + 1}, path)
    with pytest.raises(UserError, match=f"has checkpoint version {VERSION + 1}; this program reads version {VERSION}"):
        load_checkpoint(path)


FULL_DISK = """
import resource, signal, sys, torch
from ctr_train.checkpoint import VERSION, build_model, save_checkpoint
from ctr_train.data.artifacts import Artifacts
from ctr_train.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing beyond the limit then fails like a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
config, artifacts = {config!r}, Artifacts.load(sys.argv[2])
try:
    save_checkpoint(sys.argv[1], model=build_model(config, artifacts, "eager"), optimizers=[], schedulers=[],
                    loader_state={{}}, step=9, config=config, artifacts=artifacts, best=None, average={{}}, log={{}})
except UserError as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs a limit on the size of files")
def test_a_write_that_fails_leaves_the_earlier_file(save, tmp_path, prepared):
    path = tmp_path / "last.pt"
    save(path)
    before = path.read_bytes()
    script = FULL_DISK.format(config=CONFIG)
    done = subprocess.run([sys.executable, "-c", script, path, prepared], capture_output=True, text=True, timeout=120)
    assert done.stdout == f"cannot write {path}: File too large\n", done.stderr
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pt"]
