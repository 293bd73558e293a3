"""Raw rows where prepared ones are needed, and the other way round: one sentence, nothing written."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_lines import raw_lines

from ctr_train import cli_eval, cli_report, cli_train
from ctr_train.data import cli as cli_data
from ctr_train.data import synth
from ctr_train.data.artifacts import KIND, Artifacts
from ctr_train.data.prepare import prepare
from ctr_train.files import write_record


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    """rows.tsv, prepared as `rows` and by another protocol as `foreign`, and a model trained on them, `run`."""
    directory = tmp_path_factory.mktemp("places")
    (directory / "rows.tsv").write_text("".join(line + "\n" for line in raw_lines(400)))
    pq.write_table(pa.table({"mine": [1]}), directory / "mine.parquet")
    (directory / "doc").mkdir()
    (directory / "doc" / "report.md").write_text("# My report\n")
    (directory / "unlabelled.tsv").write_text("".join(line + "\n" for line in raw_lines(50, labelled=False)))
    for name in ("rows", "foreign"):
        prepare([directory / "rows.tsv"], directory / name, hash_bins=100)
    content = {**Artifacts.load(directory / "foreign").to_dict(), "protocol": "their own", "version": 7}
    write_record(directory / "foreign" / "artifacts.json", KIND, content)
    arguments = ("--model", "dcnv2", "--recipe", "small", "--data", directory / "rows", "--out", directory / "run")
    done = subprocess.run([sys.executable, "-m", "ctr_train.cli_train", *arguments], capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    return directory


RAW_NEEDED, PREPARED_NEEDED = "raw rows are needed here", "a directory made by `ctr-data prepare` is needed here"
FOREIGN = "was prepared by protocol their own version 7; this program knows baseline-v1 version 1: prepare the rows"


@pytest.mark.parametrize(("module", "arguments", "sentence"), [
    (cli_data, ("prepare", "--input", "rows", "--out", "new"), "rows is a directory of prepared data; raw files are"),
    (cli_data, ("prepare", "--input", "run", "--out", "new"), "run is a directory of prepared data; raw files are"),
    (cli_data, ("prepare", "--from", "rows.tsv", "--input", "rows.tsv", "--out", "new"), PREPARED_NEEDED),
    (cli_data, ("prepare", "--from", "run", "--min-count", "3", "--input", "rows.tsv", "--out", "new"),
     "--min-count 3: --from run takes the settings of that run"),
    (cli_data, ("inspect", "rows.tsv"), PREPARED_NEEDED),
    (cli_data, ("inspect", "foreign"), FOREIGN),
    (cli_eval, ("run", "--data", "rows.tsv"), PREPARED_NEEDED),
    (cli_eval, ("run", "--data", "foreign"), FOREIGN),
    (cli_eval, ("run", "--input", "rows"), RAW_NEEDED),
    (cli_eval, ("rows.tsv", "--data", "rows"), "rows.tsv is no run: it is a file"),
    (cli_train, ("--model", "dcnv2", "--data", "foreign", "--out", "new"), FOREIGN),
    (cli_train, ("--model", "dcnv2", "--data", "rows", "--data", "foreign", "--out", "new"), "one prepared directory"),
    (cli_train, ("--model", "dcnv2", "--data", "rows.tsv", "--prepared", "rows.tsv", "--out", "new"),
     "rows.tsv is a file, not a directory"),
    (cli_train, ("--model", "dcnv2", "--data", "rows", "--out", "rows.tsv"), "rows.tsv is a file; a run needs"),
    (cli_train, ("--model", "dcnv2", "--data", "rows", "--out", "rows"), "rows holds prepared data; a run needs a"),
    (cli_train, ("--model", "dcnv2", "--data", "rows.tsv", "--out", "rows.tsv/run"), "cannot write rows.tsv/run: Not"),
    (cli_train, ("--model", "dcnv2", "--data", "rows.tsv", "--out", "new", "--prepared", "new"),
     "--prepared new is the directory of the run; rows need one of their own"),
    (cli_train, ("--model", "dcnv2", "--data", "rows", "--out", "new", "--threads", "100000"),
     "--threads 100000: this machine has"),
    (cli_eval, ("run", "--data", "rows", "--threads", "20000"), "--threads 20000: this machine has"),
    (cli_eval, ("run", "--input", "rows.tsv", "--predictions", "rows.tsv"), "rows.tsv is rows.tsv, which is read"),
    (cli_eval, ("run", "--input", "rows.tsv", "--predictions", "./run/../rows.tsv"), "rows.tsv, which is read"),
    (cli_eval, ("run", "--input", "rows.tsv", "--predictions", "linked.tsv"), "linked.tsv is rows.tsv,"),
    (cli_eval, ("run", "--input", "rows.tsv", "--predictions", "run/best.pt"), "best.pt exists and holds something"),
    (cli_eval, ("run", "--input", "rows.tsv", "--predictions", "linked.tsv"), "linked.tsv is rows.tsv"),
    (cli_eval, ("run", "--input", "rows.tsv", "--predictions", "rows/train.arrow"), "rows holds prepared data, "),
    (cli_eval, ("run", "--input", "rows.tsv", "--predictions", "mine.parquet"), "mine.parquet exists and holds someth"),
    (cli_eval, ("run", "--input", "rows.tsv", "--predictions", "rows/new.parquet"), "rows holds prepared data, which"),
    (cli_eval, ("run", "--input", "rows.tsv", "--predictions", "/"), "cannot write /: Is a directory"),
    (cli_report, ("run", "--out", "rows"), "rows holds prepared data, which are replaced whole"),
    (cli_report, ("run", "--out", "doc"), "doc/report.md exists and is no report of ctr-report"),
    (cli_data, ("synth", "--rows", "5", "--out", "rows/train.arrow"), "train.arrow exists and was not made here"),
    (cli_data, ("synth", "--rows", str(10**21), "--out", "huge.tsv"), "at most 1,099,511,627,776 are possible"),
    (cli_data, ("prepare", "--input", "rows.tsv", "nope", "--out", "new"), "nope does not exist"),
    (cli_train, ("--model", "dcnv2", "--data", "rows.tsv", "--out", "new", "--valid-ratio", "0"), "--valid-ratio 0"),
    (cli_train, ("--model", "dcnv2", "--data", "rows", "--out", "new", "--validation-share", "0.9999"), "leaves none"),
    (cli_train, ("--model", "dcnv2", "--data", "rows", "--out", "new", "--embedding-lr", "1e39"), "largest float32"),
    (cli_eval, ("run", "--input", "rows.tsv", "--predictions", "run"), "cannot write run: Is a directory"),
    (cli_eval, ("run", "--input", "rows.tsv", "--predictions", "/dev/null"), "write /dev/null: it is no regular"),
    (cli_report, ("run", "--out", "rows.tsv"), "--out rows.tsv: it is a file; the report needs a directory"),
    (cli_data, ("synth", "--rows", "5", "--out", "/dev/null"), "cannot write /dev/null: it is no regular file"),
    (cli_data, ("prepare", "--input", "unlabelled.tsv", "--out", "new/deep/p"), "rows without labels cannot be"),
    (cli_data, ("prepare", "--input", "unlabelled.tsv", "--out", "new"), "rows without labels cannot be trained on"),
], ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_a_wrong_place_is_one_sentence_and_leaves_nothing(command, places, tmp_path, module, arguments, sentence):
    for path in places.iterdir():
        (tmp_path / path.name).symlink_to(path)
    os.link(places / "rows.tsv", tmp_path / "linked.tsv")
    before, content = sorted(path.name for path in tmp_path.iterdir()), bytes_below(places)
    done = command(module, *arguments)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"{module.NAME}: ") and done.stderr.count("\n") == 1, done.stderr
    assert sentence in done.stderr, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before and bytes_below(places) == content


def bytes_below(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(("module", "arguments"), [
    (cli_train, ("--model", "dcnv2", "--data", "rows", "--out", "")), (cli_train, ("--model", "dcnv2", "--data", "")),
    (cli_train, ("--model", "dcnv2", "--data", "rows.tsv", "--prepared", "")), (cli_train, ("--from", "")),
    (cli_eval, ("run", "--input", "rows.tsv", "--predictions", "")), (cli_eval, ("", "--data", "rows")),
    (cli_report, ("run", "--out", "")), (cli_data, ("prepare", "--input", "", "--out", "new")),
    (cli_data, ("prepare", "--input", "rows.tsv", "--out", "")), (cli_data, ("synth", "--rows", "5", "--out", "")),
])
def test_an_empty_name_is_no_path(command, tmp_path, module, arguments):
    done = command(module, *arguments)
    assert done.returncode == 2 and "'' is no path" in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


def test_predictions_replace_earlier_ones(command, places, tmp_path):
    for _ in range(2):
        done = command(cli_eval, places / "run", "--input", places / "rows.tsv", "--predictions", "p.parquet")
        assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["p.parquet"]


def test_rows_that_are_given_twice_are_told(command, places, tmp_path):
    done = command(cli_data, "prepare", "--input", places / "rows.tsv", "--input", places / "run/../rows.tsv",
                   "--out", "x")
    assert done.returncode == 0 and "rows.tsv is given more than once, and so are its rows" in done.stderr
    assert "800 lines" in done.stdout


def test_few_synthetic_rows_have_no_auc(command):
    done = command(cli_data, "synth", "--rows", "1", "--out", "s.tsv")
    assert done.returncode == 0 and "AUC undefined" in done.stdout, done.stdout


def test_a_lack_of_memory_is_one_sentence(command, monkeypatch):
    monkeypatch.setattr(synth, "_chunks", lambda *_: (_ for _ in ()).throw(MemoryError("Unable to allocate 3 EiB")))
    done = command(cli_data, "synth", "--rows", "5", "--out", "s.tsv")
    assert (done.returncode, done.stderr) == (1, "ctr-data: there is not enough memory: Unable to allocate 3 EiB\n")


def test_a_table_that_does_not_fit_into_memory_is_one_sentence(command, places):
    assert command(cli_data, "prepare", "--input", places / "rows.tsv", "--out", "wide", "--recipe", "baseline-v1",
                   "--hash-bins", 2**31 - 1).returncode == 0
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 37, before[1]))  # a machine may have as much, or promise it
    try:
        done = command(cli_train, "--model", "ft", "--data", "wide", "--out", "new", "--recipe", "baseline-v1",
                       "--batch-size", "64", "--steps-per-epoch", "1")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "ctr-train: there is not enough memory: you tried to allocate 549755813632 bytes" in done.stderr
