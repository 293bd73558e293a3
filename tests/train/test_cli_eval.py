"""The real `ctr-eval` on a run that the real `ctr-train` made: equal figures, and one sentence for each mistake."""

import gzip
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from ctr_train import cli_eval, cli_train
from ctr_train.checkpoint import load_checkpoint
from ctr_train.data.artifacts import Artifacts
from ctr_train.data.dataset import open_split
from ctr_train.data.prepare import prepare
from ctr_train.data.protocol import is_validation
from ctr_train.evaluate import predict
from ctr_train.files import read_json

BATCH = 64  # does not divide the gold rows: the last batch is shorter
METRICS = ("logloss", "auc", "normalised_entropy", "calibration", "rows", "label_rate")


def call(monkeypatch, capsys, module, *arguments):
    """The console script's entry point in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", [module.NAME, *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    captured = capsys.readouterr()
    return stopped.value.code, captured.out, captured.err


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory):
    """A finished run with best.pt, last.pt and gold.json."""
    directory = tmp_path_factory.mktemp("runs") / "dcnv2"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [
            "ctr-train", "--model", "dcnv2", "--data", str(prepared), "--out", str(directory),
            "--batch-size", str(BATCH), "--steps-per-epoch", "25", "--eval-every", "10", "--lr", "0.05",
            "--kernels", "eager", "--device", "cpu"])
        with pytest.raises(SystemExit) as stopped:
            cli_train.main()
    assert stopped.value.code == 0
    return directory


@pytest.fixture
def evaluate(monkeypatch, capsys):
    """(*arguments) -> (exit code, stdout, stderr) of ctr-eval on the CPU."""
    return lambda *arguments: call(monkeypatch, capsys, cli_eval, *arguments, "--device", "cpu", "--kernels", "eager")


@pytest.fixture(scope="module")
def gold_lines(prepared):
    """The raw lines behind the gold rows, bytes with their line ends."""
    artifacts = Artifacts.load(prepared)
    lines = (prepared.parent / "raw.tsv").read_bytes().splitlines(keepends=True)
    chosen = np.flatnonzero(is_validation(np.arange(len(lines)), artifacts.valid_ratio))[:artifacts.gold_rows]
    return [lines[i] for i in chosen]


def unlabelled(lines):
    return [line.split(b"\t", 1)[1] for line in lines]


def one_sentence(code, out, err):
    """The message, after checking that it is all there is."""
    assert code == 1, (code, out, err)
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith("scored ")]
    assert len(lines) == 1, err
    assert lines[0].startswith("ctr-eval: ")
    return lines[0]


def test_gold_metrics_equal_those_that_training_reported(evaluate, trained, prepared):
    code, out, err = evaluate(trained, "--data", prepared, "--json")
    assert code == 0, err
    result, gold = json.loads(out), read_json(trained / "gold.json")
    for key in (*METRICS, "sha256", "file", "best_possible", "reliability", "checkpoint"):
        assert result[key] == gold[key], key


def test_raw_rows_score_exactly_as_the_prepared_ones(evaluate, trained, prepared, gold_lines, tmp_path):
    raw, out_file = tmp_path / "gold.tsv.gz", tmp_path / "p.parquet"
    raw.write_bytes(gzip.compress(b"".join(gold_lines)))
    code, out, err = evaluate(trained, "--input", raw, "--predictions", out_file, "--json")
    assert code == 0, err
    loaded = cli_eval.Trained.load(trained, checkpoint=None, kernels="eager", device="cpu", threads=None)
    gold = open_split(prepared, "gold")
    expected = predict(loaded.model, gold, batch_size=BATCH, device="cpu", precision="fp32")
    table = pq.read_table(out_file)
    np.testing.assert_array_equal(table["logit"], expected)
    np.testing.assert_array_equal(table["label"], gold.slice(0, gold.rows).label)
    np.testing.assert_array_equal(table["line"], np.arange(gold.rows))
    result, reported = json.loads(out), read_json(trained / "gold.json")
    assert {key: result[key] for key in METRICS} == {key: reported[key] for key in METRICS}
    assert result["predictions"] == str(out_file)


def test_rows_without_label_give_the_same_predictions(evaluate, trained, gold_lines, tmp_path):
    (tmp_path / "labelled.tsv").write_bytes(b"".join(gold_lines))
    (tmp_path / "test.tsv").write_bytes(b"".join(unlabelled(gold_lines)))
    evaluate(trained, "--input", tmp_path / "labelled.tsv", "--predictions", tmp_path / "a.parquet")
    code, out, err = evaluate(trained, "--input", tmp_path / "test.tsv", "--predictions", tmp_path / "b.parquet")
    assert code == 0, err
    assert "logloss" not in out
    assert f"{len(gold_lines):,}" in out
    a, b = pq.read_table(tmp_path / "a.parquet"), pq.read_table(tmp_path / "b.parquet")
    assert b.column_names == ["line", "probability", "logit"]
    assert a.drop_columns("label").equals(b)


def test_checkpoint_chooses_the_weights(evaluate, trained, prepared, tmp_path):
    shutil.copy(trained / "best.pt", tmp_path)
    content = load_checkpoint(trained / "last.pt")
    for weight in content["model"].values():
        weight.zero_()  # every logit is 0 then
    torch.save(content, tmp_path / "last.pt")
    results = {name: json.loads(evaluate(tmp_path, "--data", prepared, "--json", "--checkpoint", name)[1])
               for name in ("best", "last")}
    assert results["best"]["logloss"] == read_json(trained / "gold.json")["logloss"]
    assert results["last"]["logloss"] == pytest.approx(np.log(2))
    assert {name: result["checkpoint"] for name, result in results.items()} == {"best": "best.pt", "last": "last.pt"}


def test_without_best_the_last_weights_are_taken(evaluate, trained, prepared, tmp_path):
    content = torch.load(trained / "last.pt", weights_only=True)
    torch.save({**content, "best": None}, tmp_path / "last.pt")  # as of a run without evaluations
    assert json.loads(evaluate(tmp_path, "--data", prepared, "--json")[1])["checkpoint"] == "last.pt"
    assert "tmp" in (message := one_sentence(*evaluate(tmp_path, "--data", prepared, "--checkpoint", "best")))
    assert "best.pt" in message


def test_kept_weights_that_are_lost_are_not_replaced_by_others(evaluate, trained, prepared, tmp_path):
    shutil.copy(trained / "last.pt", tmp_path)
    message = one_sentence(*evaluate(tmp_path, "--data", prepared))
    assert "best.pt is missing, though the run has evaluated and kept the weights of step " in message
    assert message.rstrip().endswith("ctr-eval --checkpoint last takes those of its last step")
    assert evaluate(tmp_path, "--data", prepared, "--checkpoint", "last")[0] == 0


def test_other_splits_and_the_table(evaluate, trained, prepared):
    code, out, err = evaluate(trained, "--data", prepared, "--split", "valid", "--batch-size", "1000")
    assert code == 0, err
    for name in ("logloss", "AUC", "normalised entropy", "calibration", "best possible", "valid.arrow", "rows/s",
                 f"{open_split(prepared, 'valid').rows:,}"):
        assert name in out


def test_data_prepared_otherwise_are_refused_with_the_difference(evaluate, trained, prepared, tmp_path):
    other = Artifacts.from_dict({**Artifacts.load(prepared).to_dict(), "hash_bins": 777})
    other.save(tmp_path)
    message = one_sentence(*evaluate(trained, "--data", tmp_path))
    assert "777" in message
    assert "1,000" in message or "1000" in message


def test_prepared_file_that_was_changed_is_refused(evaluate, trained, prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "data")
    content = bytearray((tmp_path / "data" / "gold.arrow").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "data" / "gold.arrow").write_bytes(content)
    assert "gold.arrow" in one_sentence(*evaluate(trained, "--data", tmp_path / "data"))


@pytest.mark.parametrize(("arguments", "words"), [
    ([], "--data DIR"),
    (["--data", "x", "--input", "y"], "not both"),
    (["--data", "x", "--predictions", "p"], "--predictions p needs --input"),
    (["--input", "x", "--split", "gold"], "--split gold needs --data"),
    (["--input", "nowhere.tsv"], "nowhere.tsv"),
    (["--data", "nowhere"], "nowhere"),
])
def test_options_that_do_not_go_together(evaluate, trained, arguments, words):
    assert words in one_sentence(*evaluate(trained, *arguments))


def test_a_run_that_is_none(evaluate, prepared, tmp_path):
    assert "no such directory" in one_sentence(*evaluate(tmp_path / "nowhere", "--data", prepared))
    assert "no run of ctr-train" in one_sentence(*evaluate(tmp_path, "--data", prepared))
    (tmp_path / "file").write_text("")
    assert "it is a file" in one_sentence(*evaluate(tmp_path / "file", "--data", prepared))
    (tmp_path / "config.json").write_text("{}")
    assert "not saved that yet" in one_sentence(*evaluate(tmp_path, "--data", prepared))


def test_damaged_checkpoints(evaluate, trained, prepared, tmp_path):
    whole = (trained / "best.pt").read_bytes()
    (tmp_path / "best.pt").write_bytes(whole[:len(whole) // 2])
    assert "best.pt" in one_sentence(*evaluate(tmp_path, "--data", prepared))
    content = load_checkpoint(trained / "best.pt")
    content["model"].popitem()
    torch.save(content, tmp_path / "best.pt")
    assert "do not fit the model 'dcnv2'" in one_sentence(*evaluate(tmp_path, "--data", prepared))
    content["artifacts"] = {"protocol": "another"}
    torch.save(content, tmp_path / "best.pt")
    assert "best.pt: artifacts" in one_sentence(*evaluate(tmp_path, "--data", prepared))


def test_a_bad_line_is_named_and_nothing_is_written(evaluate, trained, gold_lines, tmp_path):
    lines = gold_lines[:]
    lines[120] = b"1\tsome\twords\n"
    (tmp_path / "bad.tsv").write_bytes(b"".join(lines))
    message = one_sentence(*evaluate(trained, "--input", tmp_path / "bad.tsv", "--predictions", tmp_path / "p.parquet"))
    assert "bad.tsv" in message
    assert "121" in message
    assert [path.name for path in tmp_path.iterdir()] == ["bad.tsv"]


def test_rows_without_label_need_a_place_for_predictions(evaluate, trained, gold_lines, tmp_path):
    (tmp_path / "test.tsv").write_bytes(b"".join(unlabelled(gold_lines)))
    message = one_sentence(*evaluate(trained, "--input", tmp_path / "test.tsv"))
    assert "--predictions" in message
    assert "test.tsv" in message


def test_predictions_that_cannot_be_written(evaluate, trained, gold_lines, tmp_path):
    (tmp_path / "raw.tsv").write_bytes(b"".join(gold_lines))
    (tmp_path / "directory.parquet").mkdir()
    for out in (tmp_path / "raw.tsv" / "p.parquet", Path("/proc/p.parquet"), tmp_path / "directory.parquet"):
        assert str(out) in one_sentence(*evaluate(trained, "--input", tmp_path / "raw.tsv", "--predictions", out))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory.parquet", "raw.tsv"]


def test_a_full_disk_leaves_the_earlier_predictions(trained, gold_lines, tmp_path):
    (tmp_path / "raw.tsv").write_bytes(b"".join(gold_lines))
    (tmp_path / "p.parquet").write_text("earlier")
    done = subprocess.run(
        [sys.executable, "-m", "ctr_train.cli_eval", str(trained), "--input", "raw.tsv", "--predictions", "p.parquet",
         "--device", "cpu"],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)))  # bytes of any file it writes
    assert "p.parquet" in one_sentence(done.returncode, done.stdout, done.stderr)
    assert (tmp_path / "p.parquet").read_text() == "earlier"
    assert len(list(tmp_path.iterdir())) == 2


def test_kernels_and_devices_that_are_not_there(monkeypatch, capsys, trained, prepared):
    if not torch.cuda.is_available():
        message = one_sentence(*call(monkeypatch, capsys, cli_eval, trained, "--data", prepared, "--kernels", "triton"))
        assert "triton" in message
    message = one_sentence(*call(monkeypatch, capsys, cli_eval, trained, "--data", prepared, "--device", "cuda:99"))
    assert "cuda:99" in message


def test_ctrl_c_leaves_no_predictions(trained, gold_lines, tmp_path):
    (tmp_path / "raw.tsv").write_bytes(b"".join(gold_lines * 1000))
    process = subprocess.Popen(
        [sys.executable, "-m", "ctr_train.cli_eval", str(trained), "--input", "raw.tsv", "--predictions", "p.parquet",
         "--batch-size", "1", "--threads", "1", "--device", "cpu"],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".p.parquet*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1].splitlines()[-1] == "ctr-eval: interrupted"
    assert process.returncode == 130
    assert [path.name for path in tmp_path.iterdir()] == ["raw.tsv"]


def test_a_run_on_history_scores_raw_rows_from_its_own_directory(tmp_path, monkeypatch, capsys, evaluate, prepared):
    raw = prepared.parent / "raw.tsv"
    data, run = tmp_path / "history", tmp_path / "run"
    prepare([raw], data, hash_bins=1000, split="tail", valid_ratio=0.1, min_count=5, history=True)
    code, _, err = call(monkeypatch, capsys, cli_train, "--model", "dcnv2", "--numeric", "piecewise", "--data", data,
                        "--out", run, "--batch-size", BATCH, "--steps-per-epoch", "5", "--kernels", "eager",
                        "--device", "cpu")
    assert code == 0, err
    (tmp_path / "tail.tsv").write_bytes(b"".join(raw.read_bytes().splitlines(keepends=True)[-600:]))
    shutil.rmtree(data)  # nothing of it is needed
    code, out, err = evaluate(run, "--input", tmp_path / "tail.tsv", "--json")
    assert code == 0, err
    result, gold = json.loads(out), read_json(run / "gold.json")
    assert {key: result[key] for key in METRICS} == {key: gold[key] for key in METRICS}
    (run / "values.arrow").write_bytes(b"other")
    assert "values.arrow has the SHA-256" in one_sentence(*evaluate(run, "--input", tmp_path / "tail.tsv"))
