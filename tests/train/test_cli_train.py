"""`ctr-train` as its users run it: a run from start to result, interruptions, and every mistake as one sentence."""

import fcntl
import importlib.util
import json
import os
import pty
import re
import resource
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from cli import assert_fails

from ctr_kernels import backends
from ctr_train import default_data
from ctr_train.checkpoint import build_model, load_checkpoint, load_scored
from ctr_train.data.artifacts import Artifacts
from ctr_train.data.prepare import prepare
from ctr_train.data.synth import write_synthetic
from ctr_train.evaluate import gold_report
from ctr_train.recipes import DEFAULT, HYPERPARAMETERS, Facts, preparation_of, resolve_recipe
from ctr_train.records import read_config, write_config
from ctr_train.runlog import read_log, rows_per_second

QUICK = ("--model", "dcnv2", "--epochs", "1", "--batch-size", "64", "--lr", "0.001", "--device", "cpu",
         "--threads", "1")
COMMAND = [sys.executable, "-m", "ctr_train.cli_train"]


def read(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def finished(prepared, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A finished run with evaluations, and the process that made it."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    arguments = (*QUICK, "--data", prepared, "--out", directory, "--eval-every", "30", "--seed", "3")
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return directory, done


def test_a_run_leaves_its_settings_log_checkpoints_and_result(finished, prepared):
    directory, done = finished
    assert sorted(path.name for path in directory.iterdir()) == [
        "artifacts.json", "best.pt", "config.json", "gold.json", "last.pt", "metrics.jsonl"]
    config, gold, log = read(directory / "config.json"), read(directory / "gold.json"), read_log(directory)
    artifacts = Artifacts.load(prepared)
    expected = resolve_recipe("auto", "dcnv2", {"epochs": 1, "batch_size": 64, "lr": 0.001, "eval_every": 30},
                              Facts.of(artifacts))
    assert {name: config[name] for name in HYPERPARAMETERS} == expected
    assert (config["model"], config["recipe"], config["seed"], config["threads"]) == ("dcnv2", "auto", 3, 1)
    assert config["data"] == str(prepared) and config["device"] == "cpu"
    native = backends()["native"]
    row_backend = "native" if native.level and "sparse_update" in native.operations else "eager"
    assert config["kernels"] == "auto" and config["kernels_resolved"] == {
        "field_tokens": "eager", "low_rank_cross": row_backend, "sparse_update": row_backend}
    assert config["versions"]["torch"] == torch.__version__
    assert Artifacts.load(directory).to_dict() == Artifacts.load(prepared).to_dict()
    watching = round(0.05 * artifacts.counts["train"])
    assert gold["validation"]["rows"] == watching
    steps = (artifacts.counts["train"] - watching) // 64
    assert config["total_steps"] == config["steps_in_epoch"] == steps == gold["steps"]
    assert [entry["step"] for entry in log if "event" in entry] == [30, 60, steps]
    assert gold["rows"] == Artifacts.load(prepared).counts["gold"]
    assert gold["rows_trained"] == steps * 64 and gold["checkpoint"] == "best.pt"
    assert gold["rows_per_s"] == pytest.approx(rows_per_second(log))


def test_the_result_is_that_of_the_best_weights(finished, prepared):
    directory, _ = finished
    content = load_checkpoint(directory / "best.pt", "dcnv2")
    model = build_model(content["config"], Artifacts.load(prepared), "auto")
    load_scored(model, content)
    report = gold_report(model, prepared, Artifacts.load(prepared), batch_size=64, device="cpu", precision="fp32")
    gold = read(directory / "gold.json")
    assert {key: gold[key] for key in report} == json.loads(json.dumps(report))


def test_the_table_ends_the_output(finished):
    directory, done = finished
    gold = read(directory / "gold.json")
    lines = done.stdout.splitlines()
    assert lines[0].split(None, 1) == ["model", "dcnv2 (study), recipe auto"]
    figures = {"logloss": f"{gold['logloss']:.4f}", "AUC": f"{gold['auc']:.4f}"}
    for name, value in figures.items():
        line = next(line for line in lines if line.startswith(name))
        assert value in line
        if gold["best_possible"]:
            assert f"(best possible {gold['best_possible'][name.lower()]:.4f})" in line
    assert lines[-1].split(None, 1) == ["run", str(directory)]
    assert re.search(r"^rows/s +[\d,]+$", done.stdout, re.MULTILINE)


def test_without_a_terminal_progress_is_a_few_plain_lines(finished):
    _, done = finished
    lines = [line for line in done.stderr.splitlines() if line.startswith("step ") and "/" in line.split(":")[0]]
    assert 5 <= len(lines) <= 25
    for line in lines:
        assert re.fullmatch(r"step \d+/\d+: loss \d\.\d{4}, [\d,]+ rows/s, waiting for data \d+%, [\d,]+ s left", line)
    assert "\r" not in done.stderr and "Warning" not in done.stderr
    assert re.search(r"step 30: validation logloss \d\.\d{4}, AUC \d\.\d{4} \(best so far\)", done.stderr)


def test_on_a_terminal_progress_is_a_bar(prepared, tmp_path):
    terminal, stderr = pty.openpty()
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 120, 0, 0))  # rows, columns
    with subprocess.Popen([*COMMAND, *QUICK, "--validation-share", "0", "--data", prepared, "--out",
                           tmp_path / "run"], stdout=subprocess.DEVNULL, stderr=stderr) as process:
        os.close(stderr)
        shown = b""
        while True:
            try:
                block = os.read(terminal, 4096)
            except OSError:  # how Linux says that the other end is closed
                break
            if not block:
                break
            shown += block
        assert process.wait(60) == 0
    os.close(terminal)
    text = shown.decode()
    assert re.search(r"100%.*\d+/\d+.*loss \d\.\d{4}, [\d,]+ rows/s, waiting for data \d+%", text)
    assert not re.search(r"step \d+/\d+", text) and text.count("\n") <= 5


def stop_on_the_way(tmp_path: Path, arguments: tuple[str | Path, ...], number: int) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a run in `tmp_path`/run that gets a signal once it has logged 20 steps."""
    with subprocess.Popen([*COMMAND, *map(str, arguments), "--out", "run"], cwd=tmp_path, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        log = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while not (log.exists() and log.read_text().count("\n") > 20) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_ctrl_c_saves_and_resuming_ends_where_an_uninterrupted_run_does(prepared, tmp_path, ctr_train):
    arguments = (*QUICK, "--data", prepared, "--epochs", "4", "--eval-every", "100", "--dropout", "0.3")
    code, out, err = stop_on_the_way(tmp_path, arguments, signal.SIGINT)
    assert code == 130, err
    said = re.search(r"interrupted after step (\d+) of (\d+), which is saved; go on with: (ctr-train .*)\n", err)
    assert said and said[3] == "ctr-train --resume --out run"
    assert "Traceback" not in err and out == ""
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == int(said[1]) < int(said[2])
    resumed = ctr_train(*said[3].split()[1:])
    assert resumed.returncode == 0, resumed.stderr
    assert f"going on after step {said[1]} of" in resumed.stderr
    assert ctr_train(*arguments, "--out", "whole").returncode == 0
    interrupted, whole = (load_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("run", "whole"))
    assert all(torch.equal(interrupted[name], whole[name]) for name in whole)
    assert [read(tmp_path / name / "gold.json")["logloss"] for name in ("run", "whole")] == [
        read(tmp_path / "whole" / "gold.json")["logloss"]] * 2


def test_kill_saves_too_and_a_full_disk_leaves_that_checkpoint(prepared, tmp_path, ctr_train):
    arguments = (*QUICK, "--data", prepared, "--epochs", "4", "--validation-share", "0")
    code, out, err = stop_on_the_way(tmp_path, arguments, signal.SIGTERM)
    assert (code, out) == (143, "") and "Traceback" not in err, err
    assert err.endswith("which is saved; go on with: ctr-train --resume --out run\n")
    run = tmp_path / "run"
    checkpoint = (run / "last.pt").read_bytes()
    left = sorted(path.name for path in run.iterdir())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    small = max(path.stat().st_size for path in run.iterdir() if path.name != "last.pt")  # the log outgrows them all
    for name, limit in (("metrics.jsonl", small + 50), ("last.pt", len(checkpoint) - 1)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))  # longer files then fail as on a full disk
        try:
            done = ctr_train("--resume", "--out", "run")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1] == f"ctr-train: cannot write run/{name}: File too large"
        assert (run / "last.pt").read_bytes() == checkpoint
        assert sorted(path.name for path in run.iterdir()) == left


def test_a_finished_run_is_shown_again_and_not_trained_again(finished, prepared, ctr_train):
    directory, done = finished
    before = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    same = (*QUICK, "--data", prepared, "--eval-every", "30", "--seed", "3", "--out", directory)
    for arguments in ((*same, "--skip-if-done"), ("--resume", "--out", directory)):
        again = ctr_train(*arguments)
        assert (again.returncode, again.stdout) == (0, done.stdout), again.stderr
    assert {path.name: path.stat().st_mtime_ns for path in directory.iterdir()} == before


def test_a_run_that_is_there_is_never_overwritten(finished, prepared, ctr_train):
    directory, _ = finished
    same = (*QUICK, "--data", prepared, "--eval-every", "30", "--out", directory)
    for arguments, sentence in (
        ((*same, "--seed", "3"), "already holds a run; go on with it (--resume) or choose another --out"),
        ((*same, "--seed", "3", "--lr", "0.5", "--skip-if-done"), "has lr 0.001, not 0.5; choose another --out"),
        ((*same, "--skip-if-done"), "has seed 3, not 0; choose another --out"),
        (("--resume", "--out", directory, "--model", "ft"), "has model dcnv2, not ft; choose another --out"),
        (("--resume", "--out", directory, "--epochs", "9"), "has epochs 1, not 9; choose another --out"),
    ):
        assert_fails(ctr_train(*arguments), sentence)


def test_a_mistake_leaves_a_process_with_one_line_and_code_1():
    done = subprocess.run([*COMMAND, "--model", "dcnv2", "--data", "nowhere"], capture_output=True, text=True)
    assert_fails(done, "nowhere does not exist: --data takes raw files, or a directory made by")


@pytest.mark.parametrize(("arguments", "sentence"), [
    ((), "--model is needed: dcnv2, autoint or ft"),
    (("--resume",), "--resume needs --out"),
    (("--resume", "--out", "nothing"), "nothing holds no run to resume"),
    (("--model", "dcnv2", "--data", "nowhere"), "nowhere"),
    (("--model", "dcnv2", "--batch-size", "1000000"), "rows, fewer than one batch of 1,000,000"),
    (("--model", "dcnv2", "--lr", "nan"), "--lr nan: at least 0.0 and finite is needed"),
    (("--model", "ft", "--variant", "paper", "--pooling", "mean"), "model 'ft' cannot be built: pooling='mean'"),
    (("--model", "dcnv2", "--device", "cuda:99"), "--device cuda:99: this machine has"),
    (("--model", "dcnv2", "--device", "abacus"), "--device abacus: choose cpu, cuda or cuda:N"),
    (("--model", "dcnv2", "--kernels", "triton", "--device", "cpu"), "--kernels triton: kernels='triton' "),
    (("--model", "ft", "--kernels", "triton", "--device", "cpu"), "--kernels triton: kernels='triton' cannot run: "),
    (("--model", "ft", "--cuda-graph", "--device", "cpu"), "--cuda-graph: the device is cpu, and CUDA graphs need"),
    (("--model", "dcnv2", "--out", "/proc/none/run"), "/proc/none"),
    (("--model", "dcnv2", "--lr", "1e30", "--batch-size", "64"), "there is no earlier checkpoint; try a lower --lr"),
], ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_mistakes_are_one_sentence(prepared, ctr_train, arguments, sentence):
    data = () if "--data" in arguments or "--resume" in arguments else ("--data", prepared)
    done = ctr_train(*arguments, *data)
    if "1e30" in arguments:  # the run had begun: its progress comes before the sentence
        done.stderr = done.stderr.splitlines(keepends=True)[-1]
    assert_fails(done, sentence)


def test_switches_of_torch_follow_the_options(prepared, ctr_train):
    switches = ("--deterministic", "--precision", "tf32", "--threads", "2")
    done = ctr_train(*QUICK, "--data", prepared, "--out", "run", *switches)
    assert done.returncode == 0, done.stderr
    assert torch.are_deterministic_algorithms_enabled() and os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    assert torch.get_float32_matmul_precision() == "high" and torch.get_num_threads() == 2


def test_unknown_options_are_clicks_own_error(ctr_train):
    done = ctr_train("--model", "lr")
    assert done.returncode == 2 and "'lr' is not one of 'dcnv2', 'autoint', 'ft'" in done.stderr


def test_resuming_refuses_other_data_and_other_checkpoints(prepared, tmp_path, ctr_train):
    """A run whose last.pt is there but not its end; data and checkpoint are then exchanged."""
    assert ctr_train(*QUICK, "--data", prepared, "--out", "run").returncode == 0
    (tmp_path / "run" / "gold.json").unlink()
    other = tmp_path / "other"
    other.mkdir()
    for path in prepared.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    artifacts = Artifacts.load(other)
    artifacts.hash_bins += 1
    artifacts.save(other)
    assert_fails(ctr_train("--resume", "--out", "run", "--data", other), "is not what the run was trained on: hash_")
    artifacts.hash_bins -= 1
    artifacts.outputs["train"]["sha256"] = "0" * 64
    artifacts.save(other)
    assert_fails(ctr_train("--resume", "--out", "run", "--data", other), "train.arrow has the SHA-256")
    artifacts.counts["gold"] += 1
    artifacts.save(other)
    assert_fails(ctr_train("--resume", "--out", "run", "--data", other), "its artifacts.json says")

    config = read_config(tmp_path / "run")
    write_config(tmp_path / "run", {**config, "model": "ft"})
    assert_fails(ctr_train("--resume", "--out", "run"), "is a checkpoint of the model 'dcnv2', not of 'ft'")
    write_config(tmp_path / "run", config)
    whole = (tmp_path / "run" / "last.pt").read_bytes()
    (tmp_path / "run" / "last.pt").write_bytes(whole[:1000])
    assert_fails(ctr_train("--resume", "--out", "run"), "last.pt is no checkpoint or a damaged one")
    (tmp_path / "run" / "last.pt").write_bytes(whole)
    assert ctr_train("--resume", "--out", "run").returncode == 0  # all that was missing was the evaluation
    (tmp_path / "run" / "gold.json").unlink()
    for name in ("last.pt", "best.pt"):
        (tmp_path / "run" / name).unlink()
    again = ctr_train("--resume", "--out", "run")  # killed before it saved anything
    assert again.returncode == 0 and "run holds no checkpoint yet: beginning again" in again.stderr


def test_without_data_synthetic_rows_are_made_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    directory = default_data.default_data(rows=2000, seed=4, hash_bins=500)
    assert directory == Path("data") / "synthetic-2000-4-auto"
    found = Artifacts.load(directory)
    assert (found.hash_bins, found.recipe, found.history) == (500, "auto", True)
    assert "making 2,000 synthetic rows" in capsys.readouterr().err
    made = (directory / "train.arrow").stat().st_mtime_ns
    assert default_data.default_data(rows=2000, seed=4, hash_bins=500) == directory
    assert (directory / "train.arrow").stat().st_mtime_ns == made
    assert capsys.readouterr().err == ""


@pytest.fixture(scope="module")
def few_rows(tmp_path_factory) -> Path:
    """400 rows as the default recipe prepares them, 2 of them gold: Triton's interpreter is slow."""
    directory = tmp_path_factory.mktemp("few")
    write_synthetic(directory / "raw.tsv", rows=400, seed=2)
    prepare([directory / "raw.tsv"], directory / "prepared", hash_bins=200, valid_ratio=0.1, gold_rows=2,
            **preparation_of(DEFAULT).settings({}))
    return directory / "prepared"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("model", ["ft", "autoint", "dcnv2"])
def test_triton_kernels_train_as_eager_ones_do(ctr_train, few_rows, tmp_path, model):
    """In Triton's interpreter: three steps with dropout, whose masks are the same, then the gold rows."""
    arguments = ["--model", model, "--data", str(few_rows), "--batch-size", "2", "--steps-per-epoch", "3",
                 "--epochs", "1", "--dropout", "0.1", "--warmup", "0", "--calibration-rows", "0", "--device", "cpu",
                 "--threads", "1", "--validation-share", "0"]
    done = subprocess.run([*COMMAND, *arguments, "--kernels", "triton", "--out", str(tmp_path / "triton")],
                          capture_output=True, text=True, timeout=300, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr
    assert ctr_train(*arguments, "--kernels", "eager", "--out", "eager").returncode == 0
    results = []
    for run in ("triton", "eager"):
        assert set(read(tmp_path / run / "config.json")["kernels_resolved"].values()) == {run}
        gold = read(tmp_path / run / "gold.json")
        results.append([*(entry["loss"] for entry in read_log(tmp_path / run)), gold["logloss"]])
    assert len(results[0]) == 4
    assert results[0] == pytest.approx(results[1], abs=1e-5)
