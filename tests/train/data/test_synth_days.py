"""Days of synthetic rows: one file and one truth each, day 1 the plain file, new values, and what fails on the way."""

import json
import re
import resource
from pathlib import Path

import numpy as np
import pytest

from ctr_train.data import synth
from ctr_train.data.protocol import DENSE_NAMES, SPARSE_NAMES
from ctr_train.data.synth import day_file, value_codes, write_days, write_synthetic
from ctr_train.data.synth_features import (
    CATEGORIES,
    CHANGING,
    FREQUENT,
    LAST_DAY,
    LASTING,
    REPLACED,
    identities,
    rank_distribution,
)
from ctr_train.data.teacher import Teacher
from ctr_train.errors import UserError
from ctr_train.metrics import auc, logloss

DAY_ROWS = 12_000


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Days 1 to 4 of seed 1."""
    out = tmp_path_factory.mktemp("days") / "raw.tsv"
    counted: list[int] = []
    truths = write_days(out, rows=DAY_ROWS, days=4, seed=1, progress=counted.append)
    assert [(truth.day, truth.rows, truth.seed) for truth in truths] == [(day, DAY_ROWS, 1) for day in (1, 2, 3, 4)]
    assert sum(counted) == 4 * DAY_ROWS
    return [truth.file for truth in truths]


def test_days_are_files_each_with_its_truth(days: list[Path]) -> None:
    assert [path.name for path in days] == ["raw-1.tsv", "raw-2.tsv", "raw-3.tsv", "raw-4.tsv"]
    assert len(list(days[0].parent.iterdir())) == 3 * len(days)
    for day, path in enumerate(days, 1):
        labels = np.array([line[0] for line in path.read_text().splitlines()], dtype=np.uint8)
        exact = np.load(f"{path}.truth.npy").astype(np.float64)
        assert len(labels) == len(exact) == DAY_ROWS
        assert labels.mean() == pytest.approx(exact.mean(), abs=0.015)
        truth = json.loads(Path(f"{path}.truth.json").read_text())
        assert list(truth) == ["rows", "seed", "day", "label_rate", "best_possible", "sha256",
                               "probabilities_sha256"]
        assert (truth["rows"], truth["seed"], truth["day"]) == (DAY_ROWS, 1, day)
        assert truth["label_rate"] == pytest.approx(labels.mean())
        logits = np.log(exact) - np.log1p(-exact)
        assert truth["best_possible"]["logloss"] == pytest.approx(logloss(logits, labels), abs=1e-5)
        assert truth["best_possible"]["auc"] == pytest.approx(auc(logits, labels), abs=1e-5)
        assert truth["best_possible"]["logloss"] < 0.42


def test_day_1_is_the_plain_file(days: list[Path], tmp_path: Path) -> None:
    plain = write_synthetic(tmp_path / "plain.tsv", rows=DAY_ROWS, seed=1)
    assert plain.file.read_bytes() == days[0].read_bytes()
    assert (np.load(plain.probabilities) == np.load(f"{days[0]}.truth.npy")).all() and plain.day == 0
    write_synthetic(tmp_path / "plain.tsv.gz", rows=50, seed=3)
    write_days(tmp_path / "days.tsv.gz", rows=50, days=1, seed=3)
    assert (tmp_path / "days-1.tsv.gz").read_bytes() == (tmp_path / "plain.tsv.gz").read_bytes()


def test_a_day_of_a_seed_is_one_file_of_its_own_rows(days: list[Path], tmp_path: Path) -> None:
    texts = [path.read_text() for path in days]
    again = write_synthetic(tmp_path / "again.tsv", rows=DAY_ROWS, seed=1, day=3)  # without the days before
    assert again.file.read_text() == texts[2] and again.day == 3
    assert (np.load(again.probabilities) == np.load(f"{days[2]}.truth.npy")).all()
    write_synthetic(tmp_path / "fewer.tsv", rows=100, seed=1, day=3)
    assert texts[2].startswith((tmp_path / "fewer.tsv").read_text())
    write_synthetic(tmp_path / "other.tsv", rows=100, seed=2, day=3)
    assert not texts[2].startswith((tmp_path / "other.tsv").read_text()[:100])
    numbers = [np.array([line.split("\t")[5] for line in text.splitlines()]) for text in texts]  # I5 does not drift
    for one, other in zip(numbers[:-1], numbers[1:], strict=True):
        assert (one == other).mean() < 0.05


def test_probabilities_are_those_of_the_days_teacher(days: list[Path]) -> None:
    for day in (1, 3):
        columns = list(zip(*(line.split("\t") for line in days[day - 1].read_text().splitlines()), strict=True))
        texts = dict(zip(DENSE_NAMES + SPARSE_NAMES, columns[1:], strict=True))
        missing = {name: np.array([text == "" for text in column]) for name, column in texts.items()}
        values = {name: np.array([int(text or 0) for text in texts[name]]) for name in DENSE_NAMES}
        for field, name in enumerate(SPARSE_NAMES):
            frequent = identities(day).get(name, np.arange(FREQUENT))
            rank_of = {f"{code:08x}": rank for rank, code in enumerate(value_codes(field, frequent))}
            values[name] = np.array([rank_of.get(text, FREQUENT) for text in texts[name]])
        expected = 1 / (1 + np.exp(-Teacher(day).logits(values, missing)))
        np.testing.assert_allclose(np.load(f"{days[day - 1]}.truth.npy"), expected, rtol=1e-5)


def test_values_of_later_days_are_more_often_new(days: list[Path]) -> None:
    columns = [list(zip(*(line.split("\t") for line in path.read_text().splitlines()), strict=True)) for path in days]
    unseen: dict[str, list[float]] = {}
    for name in SPARSE_NAMES:
        place = 14 + SPARSE_NAMES.index(name)
        first = set(columns[0][place])
        unseen[name] = [float(np.mean([text not in first for text in day[place]])) for day in columns]
    for name in CHANGING:  # the world replaces some of their frequent values each day
        assert unseen[name] == sorted(unseen[name]), name
    means = np.mean([unseen[name] for name in CHANGING], axis=0)
    assert (np.diff(means[1:]) > 0.015).all() and (np.diff(means[1:]) < 0.05).all()
    for name in set(SPARSE_NAMES) - set(CHANGING):
        assert unseen[name][3] == pytest.approx(unseen[name][1], abs=0.005), name  # only rare ones
    for day, column in enumerate(columns, 1):  # exactly the values that the world has on that day
        values = np.concatenate([identities(day)["C7"], np.arange(FREQUENT, CATEGORIES["C7"][1])])
        assert set(column[14 + 6]) <= {f"{code:08x}" for code in value_codes(6, values)}


def test_new_values_are_new() -> None:
    assert {"C3", "C12", "C26"} <= {*CHANGING} and not {"C6", "C14", "C17", "C20"} & {*CHANGING}
    ranks = np.arange(FREQUENT)
    ever = {name: set(ranks.tolist()) for name in CHANGING}
    before = identities(0)
    assert all((before[name] == ranks).all() and (identities(1)[name] == ranks).all() for name in CHANGING)
    for day in range(2, 8):
        now = identities(day)
        for name in CHANGING:
            new = now[name] != before[name]
            assert not ever[name] & set(now[name][new].tolist()) and now[name][new].min() >= CATEGORIES[name][1]
            ever[name] |= set(now[name][new].tolist())
            assert len(set(now[name])) == FREQUENT
            assert not new[rank_distribution(name).share(ranks) > LASTING].any()
        assert np.mean([now[name] != before[name] for name in CHANGING]) == pytest.approx(REPLACED, abs=0.01)
        before = now


def test_fields_share_no_values_on_any_day() -> None:
    numbers = max(values.max() for values in identities(2).values()) + LAST_DAY * FREQUENT
    starts = np.sort([(field + 1) * 0x9E3779B9 % 2**32 for field in range(len(SPARSE_NAMES))])
    assert np.diff([*starts, starts[0] + 2**32]).min() > numbers


@pytest.mark.parametrize(("out", "day", "of", "name"), [
    ("a/raw.tsv.gz", 3, 9, "a/raw-3.tsv.gz"), ("raw.tsv", 3, 10, "raw-03.tsv"), ("raw.gz", 12, 100, "raw-012.gz"),
    ("raw", 1, 1, "raw-1"), ("my.raw.tsv.gz", 1, 2, "my.raw-1.tsv.gz"), ("my.raw.tsv", 1, 2, "my.raw-1.tsv"),
])
def test_names_of_days(out: str, day: int, of: int, name: str) -> None:
    assert day_file(out, day, of) == Path(name)


@pytest.mark.parametrize(("rows", "count", "words"), [
    (0, 2, "cannot make 0 synthetic rows"), (5, 0, "cannot make 0 days"), (5, -2, "cannot make -2 days"),
    (5, LAST_DAY + 1, "cannot make 10,001 days"),
])
def test_days_that_cannot_be(tmp_path: Path, rows: int, count: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        write_days(tmp_path / "raw.tsv", rows=rows, days=count, seed=1)
    for day in (-1, LAST_DAY + 1):
        with pytest.raises(UserError, match=f"day {day:,}"):
            write_synthetic(tmp_path / "raw.tsv", rows=5, seed=1, day=day)
        with pytest.raises(ValueError, match=f"day {day:,}"):
            identities(day)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_on_day_3_leaves_the_days_before(tmp_path: Path) -> None:
    rows, done = synth.CHUNK_ROWS + 10, 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if done > 2 * rows:  # the first chunk of day 3
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))

    try:
        with pytest.raises(UserError, match=r"cannot write .*raw-3\.tsv: File too large"):
            write_days(tmp_path / "raw.tsv", rows=rows, days=4, seed=1, progress=advance)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    whole = [f"raw-{day}.tsv{ending}" for day in (1, 2) for ending in ("", ".truth.json", ".truth.npy")]
    assert sorted(path.name for path in tmp_path.iterdir()) == whole
    for day in (1, 2):
        assert (tmp_path / f"raw-{day}.tsv").read_text().count("\n") == rows
        assert len(np.load(tmp_path / f"raw-{day}.tsv.truth.npy")) == rows


@pytest.mark.parametrize("taken", ["raw-3.tsv", "raw-3.tsv.truth.json", "raw-3.tsv.truth.npy"])
def test_where_a_file_of_day_3_cannot_be_put_nothing_of_it_is_left(tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).mkdir()
    with pytest.raises(UserError, match=f"cannot write .*{re.escape(taken)}: Is a directory"):
        write_days(tmp_path / "raw.tsv", rows=10, days=3, seed=1)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(("raw-3", "."))] == [taken]
    assert len(list(tmp_path.iterdir())) == 7
