"""Synthetic rows: the raw format byte by byte, Criteo's rates, one seed one file, and the truth beside it."""

import gzip
import json
import re
import resource
from pathlib import Path

import numpy as np
import pytest

from ctr_train.data import synth
from ctr_train.data.protocol import DENSE_NAMES, SPARSE_NAMES
from ctr_train.data.synth import format_lines, value_codes, write_synthetic
from ctr_train.data.synth_features import CATEGORIES, MISSING_TOGETHER, NUMBERS
from ctr_train.errors import UserError
from ctr_train.files import sha256
from ctr_train.metrics import auc, logloss

NAMES = DENSE_NAMES + SPARSE_NAMES
ROWS = 50_000


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("synth") / "raw.tsv"
    write_synthetic(path, rows=ROWS, seed=1)
    return path


@pytest.fixture(scope="module")
def columns(raw: Path) -> list[tuple[str, ...]]:
    """The 40 columns as strings."""
    lines = raw.read_text().split("\n")
    assert lines.pop() == "" and len(lines) == ROWS
    rows = [line.split("\t") for line in lines]
    assert {len(row) for row in rows} == {40}
    return list(zip(*rows, strict=True))


def test_columns_have_the_raw_format(columns: list[tuple[str, ...]]) -> None:
    assert set(columns[0]) == {"0", "1"}
    for name, column in zip(NAMES, columns[1:], strict=True):
        pattern = re.compile("0|-?[1-9][0-9]*|" if name in DENSE_NAMES else "[0-9a-f]{8}|")
        assert all(pattern.fullmatch(text) for text in set(column)), name


def test_missing_rates_are_criteos(columns: list[tuple[str, ...]]) -> None:
    missing = {name: np.array([text == "" for text in column]) for name, column in zip(NAMES, columns[1:], strict=True)}
    for name, (rate, *_) in (NUMBERS | CATEGORIES).items():
        assert missing[name].mean() == pytest.approx(rate, abs=0.01), name
    for first, *others in MISSING_TOGETHER:
        assert all((missing[first] == missing[other]).all() for other in others)
    assert not (missing["I3"] == missing["I4"]).all()  # equal rates, not together
    dense, sparse = (np.mean([missing[name] for name in names]) for names in (DENSE_NAMES, SPARSE_NAMES))
    assert dense == pytest.approx(0.207, abs=0.005) and sparse == pytest.approx(0.11, abs=0.03)


def test_numbers_are_criteos(columns: list[tuple[str, ...]]) -> None:
    numbers = {name: np.array([int(text) for text in column if text])
               for name, column in zip(DENSE_NAMES, columns[1:14], strict=True)}
    assert [name for name in DENSE_NAMES if (numbers[name] < 0).any()] == ["I2"]
    assert numbers["I2"].min() == -2
    for name, median in {"I1": 1, "I2": 3, "I3": 6, "I5": 2_800, "I6": 32, "I9": 38, "I12": 0}.items():
        assert np.median(numbers[name]) == pytest.approx(median, rel=0.15), name
    for name, (_, least, greatest, below) in NUMBERS.items():
        assert numbers[name].min() >= least and numbers[name].max() <= greatest
        assert (numbers[name] < 1).mean() == pytest.approx(below[0], abs=0.01), name


def test_categories_are_criteos(columns: list[tuple[str, ...]]) -> None:
    distinct = {}
    for name, column in zip(SPARSE_NAMES, columns[14:], strict=True):
        values, counts = np.unique([text for text in column if text], return_counts=True)
        shares, (_, cardinality, below) = np.sort(counts)[::-1] / counts.sum(), CATEGORIES[name]
        distinct[name] = len(values)
        assert len(values) <= cardinality
        assert shares[0] == pytest.approx(below[0], abs=0.02), name
        assert shares[:10].sum() == pytest.approx(below[6] if len(below) > 6 else 1.0, abs=0.02), name
    assert distinct["C9"] <= 3 and distinct["C20"] == 3 and distinct["C17"] == 10 and distinct["C14"] >= 25
    assert distinct["C3"] > 20_000 and distinct["C12"] > 15_000  # of 48,000 that are not missing: the tail is long
    strings = [set(column) - {""} for column in columns[14:]]
    assert len(set().union(*strings)) == pytest.approx(sum(map(len, strings)), rel=1e-3)  # fields share no strings


def test_label_rate_and_truth(raw: Path, columns: list[tuple[str, ...]]) -> None:
    labels = np.array(columns[0], dtype=np.uint8)
    assert labels.mean() == pytest.approx(0.256, abs=0.006)
    probability = np.load(f"{raw}.truth.npy")
    assert probability.dtype == np.float32 and probability.shape == (ROWS,)
    assert probability.min() > 0 and probability.max() < 1
    edges = np.quantile(probability, np.linspace(0, 1, 11))
    for low, high in zip(edges[:-1], edges[1:], strict=True):  # a tenth of the rows each
        inside = (probability >= low) & (probability <= high)
        assert labels[inside].mean() == pytest.approx(probability[inside].mean(), abs=0.03)
    truth = json.loads(Path(f"{raw}.truth.json").read_text())
    assert list(truth) == ["rows", "seed", "label_rate", "best_possible", "sha256", "probabilities_sha256"]
    assert truth["sha256"] == sha256(raw)
    assert truth["rows"] == ROWS and truth["seed"] == 1 and truth["label_rate"] == pytest.approx(labels.mean())
    exact = probability.astype(np.float64)
    logits = np.log(exact) - np.log1p(-exact)
    assert truth["best_possible"]["logloss"] == pytest.approx(logloss(logits, labels), abs=1e-5)
    assert truth["best_possible"]["auc"] == pytest.approx(auc(logits, labels), abs=1e-5)
    assert truth["best_possible"]["logloss"] < 0.42 and truth["best_possible"]["auc"] > 0.84


def test_a_seed_is_one_file(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    truth = write_synthetic(tmp_path / "again.tsv.gz", rows=ROWS, seed=1, progress=counted.append)
    content = raw.read_bytes()
    assert gzip.decompress((tmp_path / "again.tsv.gz").read_bytes()) == content
    assert sum(counted) == ROWS and len(counted) == -(-ROWS // synth.CHUNK_ROWS)
    assert (np.load(truth.probabilities) == np.load(f"{raw}.truth.npy")).all()
    assert truth.probabilities == tmp_path / "again.tsv.gz.truth.npy"
    stored = json.loads((tmp_path / "again.tsv.gz.truth.json").read_text())
    assert stored["best_possible"] == {"logloss": truth.logloss, "auc": truth.auc}

    monkeypatch.setattr(synth, "THREADS", 1)
    monkeypatch.setattr(synth, "AHEAD", 1)
    write_synthetic(tmp_path / "start.tsv", rows=synth.CHUNK_ROWS + 5, seed=1)
    assert content.startswith((tmp_path / "start.tsv").read_bytes())  # fewer rows are the beginning of more
    for seed in (2, -1):
        write_synthetic(tmp_path / "other.tsv", rows=100, seed=seed)
        assert not content.startswith((tmp_path / "other.tsv").read_bytes()[:100])


def test_gzip_bytes_do_not_depend_on_name_or_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_synthetic(tmp_path / "a.tsv.gz", rows=10, seed=3)
    monkeypatch.setattr(gzip.time, "time", lambda: 0.0)
    write_synthetic(tmp_path / "b.tsv.gz", rows=10, seed=3)
    assert (tmp_path / "a.tsv.gz").read_bytes() == (tmp_path / "b.tsv.gz").read_bytes()


def test_one_row(tmp_path: Path) -> None:
    truth = write_synthetic(tmp_path / "one.tsv", rows=1, seed=1)
    assert np.isnan(truth.auc) and truth.label_rate in (0.0, 1.0)
    assert json.loads((tmp_path / "one.tsv.truth.json").read_text())["best_possible"]["auc"] is None
    assert (tmp_path / "one.tsv").read_text().count("\n") == 1


def test_lines_equal_those_of_plain_python() -> None:
    rows = 3_000
    generator = np.random.default_rng(0)
    edges = np.array([-999, -10, -2, -1, 0, 1, 9, 10, 99, 100, 999, 1_000, 9_999, 10_000, 10_001, 100_000, 99_999_999])
    values = {name: np.where(generator.random(rows) < 0.5, generator.choice(edges, rows),
                             generator.integers(0, 10**8, rows) // 10 ** generator.integers(0, 8, rows))
              for name in DENSE_NAMES}
    values |= {name: generator.integers(0, 10**7, rows) for name in SPARSE_NAMES}
    missing = {name: generator.random(rows) < 0.3 for name in ("I1", "I13", "C1", "C7", "C26")}
    labels = generator.integers(0, 2, rows).astype(np.uint8)

    def entry(name: str, row: int) -> str:
        if name in missing and missing[name][row]:
            return ""
        if name in DENSE_NAMES:
            return str(values[name][row])
        return f"{value_codes(SPARSE_NAMES.index(name), values[name][row:row + 1])[0]:08x}"

    expected = "".join("\t".join([str(labels[row]), *(entry(name, row) for name in NAMES)]) + "\n"
                       for row in range(rows))
    assert format_lines(labels, values, missing).decode() == expected


def test_codes_are_distinct_within_a_field_and_differ_between_fields() -> None:
    ranks = np.arange(1_000_000)
    codes = [value_codes(field, ranks) for field in (0, 25)]
    assert all(len(np.unique(code)) == len(ranks) for code in codes)
    assert not (codes[0] == codes[1]).any()


def test_no_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot make 0 synthetic rows"):
        write_synthetic(tmp_path / "none.tsv", rows=0, seed=1)
    assert not list(tmp_path.iterdir())


def test_unwritable_output_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/raw\.tsv"):
        write_synthetic(tmp_path / "file" / "raw.tsv", rows=10, seed=1)


@pytest.mark.parametrize("suffix", [".tsv", ".tsv.gz"])
def test_full_disk_leaves_what_was_there(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"raw{suffix}"
    write_synthetic(out, rows=5, seed=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # larger files fail to grow, as on a full disk
    try:
        with pytest.raises(UserError, match=f"cannot write .*raw{suffix}: File too large"):
            write_synthetic(out, rows=30_000, seed=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert before.items() >= {path.name: path.read_bytes() for path in tmp_path.iterdir()}.items()
    assert out.read_bytes() == before[out.name]


def test_interrupt_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_synthetic(tmp_path / "raw.tsv", rows=100_000, seed=1, progress=interrupt)
    assert not list(tmp_path.iterdir())
