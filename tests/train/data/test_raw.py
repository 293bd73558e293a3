"""Raw rows as they stream by: their lines, their columns and what is left out."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from raw_lines import features, raw_lines

from ctr_train.data import raw
from ctr_train.data.artifacts import Artifacts
from ctr_train.data.dataset import open_split
from ctr_train.data.prepare import prepare
from ctr_train.data.protocol import is_validation
from ctr_train.data.raw import read_features
from ctr_train.errors import UserError

BINS = 5000


@pytest.fixture
def damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Path], list[str], list[int]]:
    """(files, all their lines, indices of the good ones): two files of several blocks, whole blocks of them bad."""
    monkeypatch.setattr(raw, "BLOCK_BYTES", 4000)
    lines = raw_lines(400)
    for i in (0, 17, *range(100, 160), 250, 399):
        lines[i] = "bad"
    (tmp_path / "a.tsv").write_text("".join(line + "\n" for line in lines[:250]))
    (tmp_path / "b.gz").write_bytes(gzip.compress("\n".join(lines[250:]).encode()))
    return [tmp_path / "a.tsv", tmp_path / "b.gz"], lines, [i for i, line in enumerate(lines) if line != "bad"]


def test_rows_keep_the_number_of_their_line_when_others_are_skipped(damaged):
    files, lines, good = damaged
    pieces = list(read_features(files, settings=Artifacts(hash_bins=BINS), labelled=True, on_bad_line="skip"))
    assert np.concatenate([piece.line_index for piece in pieces]).tolist() == good
    assert np.concatenate([piece.sparse for piece in pieces]).tolist() == [features(lines[i], BINS)[2] for i in good]


def test_the_split_goes_by_the_number_of_the_line(damaged, tmp_path):
    files, lines, good = damaged
    prepare(files, tmp_path / "out", hash_bins=BINS, valid_ratio=0.3, on_bad_line="skip")
    valid = is_validation(np.array(good), 0.3)
    for name, chosen in (("train", ~valid), ("valid", valid)):
        expected = [features(lines[i], BINS)[2] for i in np.array(good)[chosen]]
        assert open_split(tmp_path / "out", name).slice(0, 400).sparse.tolist() == expected


def test_progress_adds_up_to_the_lines_and_bytes_of_the_files(damaged):
    files, lines, _ = damaged
    seen = []
    list(read_features(files, settings=Artifacts(), labelled=True, on_bad_line="skip",
                       progress=lambda *counts: seen.append(counts)))
    assert np.sum(seen, axis=0).tolist() == [len(lines), sum(file.stat().st_size for file in files)]


@pytest.mark.parametrize(("columns", "message"), [(17, "17 columns instead of 40"), (41, "41 columns instead of 40")])
def test_the_first_line_decides_whether_there_are_labels(tmp_path, columns, message):
    path = tmp_path / "raw.tsv"
    path.write_text("\t".join(["1"] * columns) + "\n")
    with pytest.raises(UserError, match=message):
        list(read_features([path], settings=Artifacts()))
    path.write_text("\n".join([*raw_lines(2, labelled=False), *raw_lines(1)]))
    with pytest.raises(UserError, match="line 3: 40 columns instead of 39"):
        list(read_features([path], settings=Artifacts()))
    with pytest.raises(UserError, match="line 1: 39 columns instead of 40"):
        list(read_features([path], settings=Artifacts(), labelled=True))


def test_only_line_ends_lose_their_carriage_return(tmp_path):
    lines = raw_lines(3)
    path = tmp_path / "raw.tsv"
    path.write_bytes("\r\n".join(lines).encode() + b"\r\n")
    assert sum(len(piece.sparse) for piece in read_features([path], settings=Artifacts())) == 3
    path.write_bytes(("\r".join(lines) + "\n").encode())  # a single line, by its newlines
    with pytest.raises(UserError, match="line 1: 118 columns instead of 40"):
        list(read_features([path], settings=Artifacts()))


def test_lines_across_blocks_are_whole(tmp_path, monkeypatch):
    lines = raw_lines(30)
    path = tmp_path / "raw.tsv"
    path.write_text("".join(line + "\n" for line in lines))
    for size in (1, 7, 100, 1000):
        monkeypatch.setattr(raw, "BLOCK_BYTES", size)
        pieces = list(read_features([path], settings=Artifacts(hash_bins=BINS)))
        assert np.concatenate([piece.sparse for piece in pieces]).tolist() == [features(x, BINS)[2] for x in lines]
        assert np.concatenate([piece.line_index for piece in pieces]).tolist() == list(range(30))


@pytest.mark.parametrize("content", [b"", b"no array", np.zeros(3)])
def test_true_probabilities_that_are_none(tmp_path, content):
    (tmp_path / "raw.tsv").write_text("\n".join(raw_lines(100)))
    truth = tmp_path / "raw.tsv.truth.npy"
    if isinstance(content, bytes):
        truth.write_bytes(content)
    else:
        np.save(truth, content)
    with pytest.raises(UserError, match=r"raw\.tsv\.truth\.npy"):
        prepare([tmp_path / "raw.tsv"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
