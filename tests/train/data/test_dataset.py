"""A prepared split reads back the rows that were written, whole batches at a time, and refuses damaged files."""

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ctr_train.data.dataset import Split, open_split
from ctr_train.errors import UserError

ROWS = 1000


@pytest.fixture(params=[64, 65_536], ids=["several record batches", "one record batch"])
def split_and_arrays(request, tmp_path, write_split):
    arrays = write_split(tmp_path / "train.arrow", ROWS, batch_rows=request.param)
    return open_split(tmp_path, "train"), arrays


def assert_rows(rows, arrays, where) -> None:
    for name in ("dense", "sparse", "label"):
        found = getattr(rows, name)
        assert found.dtype == arrays[name].dtype
        np.testing.assert_array_equal(found, arrays[name][where])


def test_gather_takes_any_rows_in_the_order_asked_for(split_and_arrays):
    split, arrays = split_and_arrays
    assert (split.rows, len(split), split.num_dense) == (ROWS, ROWS, 13)
    indices = np.random.default_rng(1).integers(0, ROWS, 500)
    indices[:4] = 0, ROWS - 1, 63, 64
    rows = split.gather(indices)
    assert_rows(rows, arrays, indices)
    assert rows.dense.flags.writeable and rows.sparse.flags.writeable  # fresh memory: torch may take it over
    assert_rows(split.gather(np.arange(0)), arrays, slice(0, 0))


@pytest.mark.parametrize("wrong", [-1, ROWS, 10**12])
def test_gather_refuses_rows_that_are_not_there(split_and_arrays, wrong):
    with pytest.raises(IndexError, match=f"row {wrong} is outside"):
        split_and_arrays[0].gather(np.array([0, wrong]))


@pytest.mark.parametrize(
    ("start", "stop"), [(0, ROWS), (0, 1), (60, 70), (64, 128), (10, 300), (990, 2000), (5, 5), (8, 3)]
)
def test_slice_cuts_like_python(split_and_arrays, start, stop):
    split, arrays = split_and_arrays
    assert_rows(split.slice(start, stop), arrays, slice(start, stop))


def test_slice_within_a_record_batch_copies_nothing(split_and_arrays):
    rows = split_and_arrays[0].slice(10, 20)
    assert not (rows.dense.flags.owndata or rows.sparse.flags.owndata or rows.label.flags.owndata)
    assert not rows.dense.flags.writeable


def test_a_part_is_a_split_of_its_own(split_and_arrays):
    split, arrays = split_and_arrays
    part = split.part(100, 300)
    inside = {name: array[100:300] for name, array in arrays.items()}
    assert (part.rows, len(part), part.num_dense) == (200, 200, 13)
    assert_rows(part.slice(150, 500), inside, slice(150, 500))
    assert_rows(part.slice(20, 10), inside, slice(20, 10))
    assert_rows(part.gather(np.array([199, 0])), inside, [199, 0])
    for wrong in (-1, 200):  # rows that the whole split does have
        with pytest.raises(IndexError, match="not within a part of 200 rows"):
            part.gather(np.array([wrong]))
    for bounds in ((-1, 5), (5, 5), (0, ROWS + 1)):
        with pytest.raises(ValueError, match="are no part of"):
            split.part(*bounds)


def test_num_dense_is_read_from_the_file(tmp_path, write_split):
    arrays = write_split(tmp_path / "gold.arrow", 10, num_dense=26)
    split = open_split(tmp_path, "gold")
    assert split.num_dense == 26
    assert_rows(split.slice(0, 10), arrays, slice(0, 10))


def test_pickles_as_its_path(split_and_arrays):
    split, arrays = split_and_arrays
    content = pickle.dumps(split)
    assert len(content) < 1000
    assert_rows(pickle.loads(content).slice(0, 100), arrays, slice(0, 100))


def test_missing_empty_and_damaged_files_are_errors_of_the_users(tmp_path, write_split):
    with pytest.raises(UserError, match=r"train\.arrow does not exist; make it with `ctr-data prepare`"):
        open_split(tmp_path, "train")
    path = tmp_path / "train.arrow"
    write_split(path, 0)
    with pytest.raises(UserError, match="holds no rows"):
        Split(path)
    write_split(path, 200, batch_rows=64)
    whole = path.read_bytes()
    for content in (b"", b"label\tI1", whole[:4], whole[: len(whole) // 2], whole[:-1], bytes(len(whole))):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is damaged or no Arrow IPC file"):
            Split(path)
    with pytest.raises(UserError, match="is damaged or no Arrow IPC file"):
        Split(tmp_path)  # a directory


def test_compressed_files_are_refused(tmp_path, write_split):
    write_split(tmp_path / "train.arrow", 5000, compression="zstd")
    with pytest.raises(UserError, match="is compressed and cannot be mapped"):
        open_split(tmp_path, "train")


def write_columns(path: Path, **columns: pa.Array) -> None:
    batch = pa.record_batch(columns)
    with pa.ipc.new_file(str(path), batch.schema) as writer:
        writer.write_batch(batch)


def lists(kind: pa.DataType, width: int) -> pa.Array:
    return pa.array([[0] * width, [1] * width], pa.list_(kind, width))


LABEL, DENSE, SPARSE = pa.array([0, 1], pa.uint8()), lists(pa.float32(), 13), lists(pa.int32(), 26)


@pytest.mark.parametrize("columns", [
    {"label": LABEL, "dense": DENSE},
    {"dense": DENSE, "label": LABEL, "sparse": SPARSE},
    {"label": LABEL.cast(pa.int64()), "dense": DENSE, "sparse": SPARSE},
    {"label": LABEL, "dense": lists(pa.float64(), 13), "sparse": SPARSE},
    {"label": LABEL, "dense": DENSE, "sparse": lists(pa.int32(), 25)},
    {"label": LABEL, "dense": DENSE, "sparse": lists(pa.float32(), 26)},
    {"label": LABEL, "dense": LABEL, "sparse": SPARSE},
], ids=["no sparse", "order", "label type", "dense type", "25 fields", "float ids", "dense no list"])
def test_other_columns_are_refused_by_name(tmp_path, columns):
    write_columns(tmp_path / "train.arrow", **columns)
    with pytest.raises(UserError, match=r"train\.arrow has the columns \(\w+ \w+"):
        open_split(tmp_path, "train")


def test_nulls_are_refused(tmp_path):
    write_columns(tmp_path / "train.arrow", label=pa.array([None, 1], pa.uint8()), dense=DENSE, sparse=SPARSE)
    with pytest.raises(UserError, match="record batch 0 holds nulls"):
        open_split(tmp_path, "train")
