"""The real `ctr-data` on every bad input: one sentence with the place, exit code 1, and nothing half-written."""

import gzip
import json
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from raw_lines import features

from ctr_train.data.artifacts import Artifacts
from ctr_train.data.dataset import open_split
from ctr_train.data.protocol import HASH_BINS, is_validation
from ctr_train.recipes import DEFAULT, preparation_of

BAD = 700  # index of the bad line, from 0: enough good lines before it
MANY = 60  # copies of the 1,000 lines where a run must take a while


def one_sentence(done: subprocess.CompletedProcess[str]) -> str:
    """The message, after checking that it is all there is."""
    assert done.returncode == 1, (done.returncode, done.stdout, done.stderr)
    assert done.stdout == ""
    assert done.stderr.startswith("ctr-data: ")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def names(directory: Path) -> list[str]:
    """What lies in a directory, hidden entries included."""
    return sorted(path.name for path in directory.iterdir())


def replaced(line: str, column: int, value: str) -> str:
    columns = line.split("\t")
    columns[column] = value
    return "\t".join(columns)


BAD_LINES: dict[str, tuple[Callable[[str], str], str]] = {
    "one column too few": (lambda line: line.rsplit("\t", 1)[0], "39 columns instead of 40"),
    "one column too many": (lambda line: line + "\tdeadbeef", "41 columns instead of 40"),
    "empty line": (lambda line: "", "1 columns instead of 40"),
    "two lines in one": (lambda line: line + "\t" + line, "80 columns instead of 40"),
    "label 2": (lambda line: replaced(line, 0, "2"), "the label is '2'"),
    "label missing": (lambda line: replaced(line, 0, ""), "the label is ''"),
    "label 01": (lambda line: replaced(line, 0, "01"), "the label is '01'"),
    "non-integer dense": (lambda line: replaced(line, 3, "1.5"), "I3 is '1.5'"),
    "dense with an exponent": (lambda line: replaced(line, 13, "1e5"), "I13 is '1e5'"),
    "dense beyond 18 digits": (lambda line: replaced(line, 1, "1" * 19), "I1 is '1111111111111111111'"),
    "non-hex categorical": (lambda line: replaced(line, 14, "0123xyz8"), "C1 is '0123xyz8'"),
    "upper case categorical": (lambda line: replaced(line, 20, "DEADBEEF"), "C7 is 'DEADBEEF'"),
    "over-long categorical": (lambda line: replaced(line, 39, "0123456789"), "C26 is '0123456789'"),
    "quoted categorical": (lambda line: replaced(line, 16, '"0a1b2c"'), "C3 is '\"0a1b2c\"'"),
    "carriage return inside": (lambda line: replaced(line, 16, "0a\r"), r"C3 is '0a\r'"),
    "no UTF-8": (lambda line: replaced(line, 16, "0a\xff"), "C3 is '0a"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named_with_file_line_and_text(ctr_data, tmp_path, lines, case):
    spoil, text = BAD_LINES[case]
    lines[BAD] = spoil(lines[BAD])
    (tmp_path / "bad.tsv").write_bytes("".join(line + "\n" for line in lines).encode("latin-1"))
    message = one_sentence(ctr_data("prepare", "--input", "bad.tsv", "--out", "out"))
    assert f"bad.tsv, line {BAD + 1}: " in message
    assert text in message
    assert names(tmp_path) == ["bad.tsv"]


def test_the_line_is_counted_within_its_own_file(ctr_data, tmp_path, raw, lines):
    lines[3] = "nonsense"
    with gzip.open(tmp_path / "second.gz", "wt") as file:
        file.write("".join(line + "\n" for line in lines))
    message = one_sentence(ctr_data("prepare", "--input", raw, "--input", "second.gz", "--out", "out"))
    assert "second.gz, line 4: 1 columns instead of 40: 'nonsense'" in message


def test_skipping_counts_and_reports_bad_lines(ctr_data, tmp_path, lines):
    lines[0] = "header"
    lines[BAD] = replaced(lines[BAD], 0, "2")
    (tmp_path / "bad.tsv").write_text("".join(line + "\n" for line in lines))
    done = ctr_data("prepare", "--input", "bad.tsv", "--out", "out", "--on-bad-line", "skip")
    assert done.returncode == 0, done.stderr
    first = "the first: bad.tsv, line 1: 1 columns instead of 40"
    assert f"2 of 1,000 lines are bad and skipped, {first}" in done.stdout
    found = Artifacts.load(tmp_path / "out")
    assert found.skipped_lines == 2
    assert found.counts["train"] + found.counts["valid"] == len(lines) - 2
    assert f"2 bad lines skipped, {first}" in ctr_data("inspect", "out").stdout


def test_nothing_but_bad_lines_is_an_error_even_when_they_are_skipped(ctr_data, tmp_path):
    (tmp_path / "bad.tsv").write_text("no\nrows\nat all\n")
    message = one_sentence(ctr_data("prepare", "--input", "bad.tsv", "--out", "out", "--on-bad-line", "skip"))
    assert "bad.tsv" in message
    assert names(tmp_path) == ["bad.tsv"]


@pytest.mark.parametrize(("name", "words"), [
    ("missing.tsv", "missing.tsv does not exist"),
    ("empty.tsv", "empty.tsv is empty"),
    ("empty.gz", "empty.gz is empty"),
    ("truncated.gz", "truncated.gz is a truncated or damaged gzip file"),
    ("damaged.gz", "damaged.gz is a truncated or damaged gzip file"),
    ("directory", "directory is a directory; raw files are needed"),
    ("random.bin", "random.bin, line 1"),
    ("one_line.bin", "one_line.bin, line 1 is longer than"),
])
def test_files_that_are_none(ctr_data, tmp_path, raw, name, words):
    packed = gzip.compress(raw.read_bytes())
    damaged = bytearray(packed)
    damaged[len(packed) // 2] ^= 0xFF
    (tmp_path / "empty.tsv").write_bytes(b"")
    (tmp_path / "empty.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "truncated.gz").write_bytes(packed[:len(packed) // 2])
    (tmp_path / "damaged.gz").write_bytes(damaged)
    (tmp_path / "random.bin").write_bytes(bytes(range(256)) * 50)
    (tmp_path / "one_line.bin").write_bytes(b"0\t" * 2_000_000)
    (tmp_path / "directory").mkdir()
    before = names(tmp_path)
    assert words in one_sentence(ctr_data("prepare", "--input", raw, "--input", name, "--out", "out"))
    assert names(tmp_path) == before


@pytest.mark.parametrize("out", ["raw.tsv", "raw.tsv/out", "/proc/nowhere/out"])
def test_directories_that_cannot_be_written(ctr_data, tmp_path, raw, out):
    before = raw.read_bytes()
    assert out in one_sentence(ctr_data("prepare", "--input", raw, "--out", out))
    assert names(tmp_path) == ["raw.tsv"]
    assert raw.read_bytes() == before


def test_directories_of_something_else_are_refused(ctr_data, tmp_path, raw):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years")
    (tmp_path / "run").mkdir()  # a run directory holds a copy of its data's artifacts.json, too
    Artifacts().save(tmp_path / "run")
    (tmp_path / "run" / "best.pt").write_text("days")
    for directory, content in (("home", ["thesis.txt"]), ("run", ["artifacts.json", "best.pt"]), (".", None)):
        content = content or names(tmp_path)
        assert "something else" in one_sentence(ctr_data("prepare", "--input", raw, "--out", directory))
        assert names(tmp_path / directory) == content
    assert names(tmp_path) == ["home", "raw.tsv", "run"]


def test_an_empty_directory_and_an_older_one_are_filled(ctr_data, tmp_path, raw):
    (tmp_path / "out").mkdir()
    for bins in (100, 200):
        assert ctr_data("prepare", "--input", raw, "--out", "out", "--hash-bins", bins).returncode == 0
        assert Artifacts.load(tmp_path / "out").hash_bins == bins
        assert names(tmp_path) == ["out", "raw.tsv"]
        assert names(tmp_path / "out") == ["artifacts.json", "gold.arrow", "train.arrow", "valid.arrow", "values.arrow"]


def test_a_recipe_owns_the_preparation_and_options_override_it(ctr_data, tmp_path, raw, lines):
    """Without --recipe the default recipe's; the study's is the protocol, bit for bit."""
    assert ctr_data("prepare", "--input", raw, "--out", "default").returncode == 0
    assert ctr_data("prepare", "--input", raw, "--out", "study", "--recipe", "baseline-v1").returncode == 0
    assert ctr_data("prepare", "--input", raw, "--out", "own", "--no-history", "--min-count", 3).returncode == 0
    default, study, own = (Artifacts.load(tmp_path / name) for name in ("default", "study", "own"))
    assert preparation_of(DEFAULT).is_that_of(default) and default.recipe == DEFAULT
    assert (study.recipe, study.history, study.min_count, study.num_dense) == ("baseline-v1", False, 1, 13)
    assert study.values == {}
    assert (own.recipe, own.history, own.min_count) == (DEFAULT, False, 3)
    train = np.flatnonzero(~is_validation(np.arange(len(lines))))
    label, dense, sparse = zip(*(features(lines[i], HASH_BINS) for i in train), strict=True)
    rows = open_split(tmp_path / "study", "train").slice(0, len(lines))
    assert rows.label.tolist() == list(label) and rows.sparse.tolist() == list(sparse)
    np.testing.assert_array_equal(rows.dense, np.array(dense, dtype=np.float32))
    shown = [ctr_data("inspect", name).stdout.splitlines()[0] for name in ("default", "study")]
    assert shown[0].startswith("prepared for recipe auto: ") and "history of 10 folds; a table of " in shown[0]
    assert shown[1].endswith("no history; a table of 2,000,000 rows")


def test_a_full_disk_leaves_the_older_data(ctr_data, tmp_path, raw):
    assert ctr_data("prepare", "--input", raw, "--out", "out").returncode == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def bytes_of_a_file(limit: int) -> Callable[[], None]:  # the kernel then refuses to write more, as on a full disk
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    for limit in (0, 1000, 100_000):  # 100,000: Arrow writes the larger train.arrow in vain
        done = ctr_data("prepare", "--input", raw, "--out", "out", preexec_fn=bytes_of_a_file(limit))
        assert "cannot write out: File too large" in one_sentence(done)
        assert names(tmp_path) == ["out", "raw.tsv"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(("moment", "number", "code", "said"), [
    ("reading", signal.SIGINT, 130, "interrupted"),
    ("writing", signal.SIGINT, 130, "interrupted"),
    ("writing", signal.SIGTERM, 143, "killed"),
])
def test_ctrl_c_and_kill_leave_nothing(start_ctr_data, tmp_path, raw, moment, number, code, said):
    big = tmp_path / "big.tsv"
    big.write_bytes(raw.read_bytes() * MANY)
    process = start_ctr_data("prepare", "--input", big, "--out", "new/out")
    deadline = time.monotonic() + 60

    def reached() -> bool:
        files = list(tmp_path.glob("new/.out.*.tmp/train.arrow"))
        return bool(files) and (moment == "reading" or files[0].stat().st_size > 1_000_000)

    while not reached() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code, (stdout, stderr)
    assert stderr.split() == ["ctr-data:", said]
    assert names(tmp_path) == ["big.tsv", "raw.tsv"]


@pytest.mark.parametrize(("arguments", "words"), [
    (["--hash-bins", "0"], "0"),
    (["--hash-bins", "3000000000"], "3000000000"),
    (["--valid-ratio", "1.0"], "1.0"),
    (["--valid-ratio", "-0.1"], "-0.1"),
    (["--valid-ratio", "nan"], "nan"),
    (["--gold-rows", "0"], "0"),
])
def test_settings_out_of_range(ctr_data, tmp_path, raw, arguments, words):
    assert words in one_sentence(ctr_data("prepare", "--input", raw, "--out", "out", *arguments))
    assert names(tmp_path) == ["raw.tsv"]


def test_too_few_lines_for_a_validation_split(ctr_data, tmp_path, lines):
    few = lines[:20]  # the first validation line is number 32
    (tmp_path / "few.tsv").write_text("".join(line + "\n" for line in few))
    message = one_sentence(ctr_data("prepare", "--input", "few.tsv", "--out", "out"))
    assert "valid" in message and "few.tsv" in message
    assert names(tmp_path) == ["few.tsv"]


@pytest.mark.parametrize(("content", "words"), [
    (b"", "cannot be read as JSON"),
    (b"{}", "it does not name the format 'ctr-kernels artifacts 1'; prepare the rows again"),
    (b"\xff\xfe", "cannot be read as JSON"),
])
def test_inspect_of_damaged_artifacts(ctr_data, tmp_path, content, words):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "artifacts.json").write_bytes(content)
    message = one_sentence(ctr_data("inspect", "data"))
    assert "artifacts.json" in message and words in message


def test_inspect_shows_what_is_there_and_finds_what_was_changed(ctr_data, tmp_path, raw):
    assert "nowhere" in one_sentence(ctr_data("inspect", "nowhere"))
    assert ctr_data("prepare", "--input", raw, "--out", "out", "--hash-bins", "500").returncode == 0
    table = ctr_data("inspect", "out").stdout
    found = Artifacts.load(tmp_path / "out")
    i5, c9 = found.fields["I5"], found.fields["C9"]
    for word in ("baseline-v1", "500 hash bins", "raw.tsv", "train", "valid", "gold", "I13", "C26",
                 f"{found.counts['train']:,}", f"{found.label_rate['gold']:.4f}", f"{i5['missing']:.1%}",
                 f"{c9['distinct_ids']:,}", f"{c9['collisions']:,}"):
        assert word in table, word
    assert json.loads(ctr_data("inspect", "out", "--json").stdout) == found.to_dict()
    for name in ("train", "valid", "gold"):
        shutil.copytree(tmp_path / "out", tmp_path / "copy")
        content = bytearray((tmp_path / "copy" / f"{name}.arrow").read_bytes())
        content[len(content) // 2] ^= 1
        (tmp_path / "copy" / f"{name}.arrow").write_bytes(content)
        assert f"{name}.arrow has the SHA-256" in one_sentence(ctr_data("inspect", "copy"))
        shutil.rmtree(tmp_path / "copy")


def test_synthetic_days_are_files_with_a_line_each(ctr_data, tmp_path):
    done = ctr_data("synth", "--rows", 30, "--days", 2, "--seed", 4, "--out", "raw.tsv.gz")
    assert done.returncode == 0 and done.stderr == ""
    assert names(tmp_path) == sorted(f"raw-{day}.tsv.gz{end}" for day in (1, 2) for end in
                                     ("", ".truth.json", ".truth.npy"))
    for day, line in enumerate(done.stdout.splitlines(), 1):
        truth = json.loads((tmp_path / f"raw-{day}.tsv.gz.truth.json").read_text())
        assert line == (f"raw-{day}.tsv.gz: 30 rows, label rate {truth['label_rate']:.4f}; best possible logloss "
                        f"{truth['best_possible']['logloss']:.4f}, AUC {truth['best_possible']['auc']:.4f}")
    assert len(done.stdout.splitlines()) == 2
    done = ctr_data("synth", "--rows", 30, "--seed", 4, "--out", "plain.tsv.gz")
    assert done.stdout.startswith("plain.tsv.gz: 30 rows, ") and len(done.stdout.splitlines()) == 1
    assert (tmp_path / "plain.tsv.gz").read_bytes() == (tmp_path / "raw-1.tsv.gz").read_bytes()


@pytest.mark.parametrize(("arguments", "words"), [
    (["--rows", 5, "--days", 0], "cannot make 0 days of synthetic rows"),
    (["--rows", 5, "--days", -3], "cannot make -3 days of synthetic rows"),
    (["--rows", 0, "--days", 3], "cannot make 0 synthetic rows: at least 1 is needed"),
    (["--rows", -1], "cannot make -1 synthetic rows: at least 1 is needed"),
])
def test_synthetic_rows_and_days_below_1_are_refused(ctr_data, tmp_path, arguments, words):
    assert words in one_sentence(ctr_data("synth", *arguments, "--out", "raw.tsv"))
    assert names(tmp_path) == []
