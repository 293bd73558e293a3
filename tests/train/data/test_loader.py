"""The loader yields every row once an epoch, in an order that its seed alone decides, from any saved position."""

import time

import numpy as np
import pytest
import torch

from ctr_train.data.dataset import open_split
from ctr_train.data.loader import Loader
from ctr_train.errors import UserError

ROWS, BATCH = 1000, 64


@pytest.fixture
def split(tmp_path, write_split):
    write_split(tmp_path / "train.arrow", ROWS, batch_rows=300)
    return open_split(tmp_path, "train")


@pytest.fixture
def make_loader(split):
    loaders = []

    def make(**options):
        defaults = {"batch_size": BATCH, "shuffle": True, "seed": 7, "drop_last": False}
        loaders.append(Loader(split, **{**defaults, **options}))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


def keys(batches) -> np.ndarray:
    """The first id of every row: distinct, so that it tells which rows came in which order."""
    return torch.cat([batch.sparse[:, 0] for batch in batches]).numpy()


def test_batches_are_tensors_of_whole_rows(make_loader, split):
    loader = make_loader()
    batches = list(loader)
    assert len(loader) == len(batches) == 16
    assert [len(batch.label) for batch in batches] == [64] * 15 + [40]
    first = batches[0]
    assert (first.dense.dtype, first.sparse.dtype, first.label.dtype) == (torch.float32, torch.int32, torch.float32)
    assert (first.dense.shape, first.sparse.shape, first.label.shape) == ((64, 13), (64, 26), (64,))
    rows = split.slice(0, ROWS)
    where = {key: row for row, key in enumerate(rows.sparse[:, 0])}
    assert len(where) == ROWS
    order = [where[key] for key in keys(batches)]
    np.testing.assert_array_equal(torch.cat([b.dense for b in batches]), rows.dense[order])
    np.testing.assert_array_equal(torch.cat([b.sparse for b in batches]), rows.sparse[order])
    np.testing.assert_array_equal(torch.cat([b.label for b in batches]), rows.label[order])


def test_every_epoch_has_every_row_once_in_another_order(make_loader, split):
    loader = make_loader()
    first, second = keys(loader), keys(loader)
    assert loader.epoch == 2
    everything = np.sort(split.slice(0, ROWS).sparse[:, 0])
    np.testing.assert_array_equal(np.sort(first), everything)
    np.testing.assert_array_equal(np.sort(second), everything)
    assert (first != second).mean() > 0.9
    assert (first != split.slice(0, ROWS).sparse[:, 0]).mean() > 0.9


def test_the_seed_decides_the_order(make_loader):
    first = keys(make_loader())
    np.testing.assert_array_equal(keys(make_loader()), first)
    assert (keys(make_loader(seed=8)) != first).mean() > 0.9
    np.testing.assert_array_equal(keys(make_loader(prefetch=1)), first)


def test_without_shuffling_rows_come_as_they_lie(make_loader, split):
    loader = make_loader(shuffle=False)
    for _ in range(2):
        np.testing.assert_array_equal(keys(loader), split.slice(0, ROWS).sparse[:, 0])


def test_drop_last_leaves_out_the_short_batch_only(make_loader):
    loader = make_loader(drop_last=True)
    batches = list(loader)
    assert len(loader) == len(batches) == 15
    np.testing.assert_array_equal(keys(batches), keys(make_loader())[: 15 * BATCH])


@pytest.mark.parametrize("stop_after", [1, 5, 15, 16])
def test_goes_on_from_a_saved_position(make_loader, stop_after):
    whole = make_loader()
    expected = np.concatenate([keys(whole), keys(whole)])
    first = make_loader()
    batches = iter(first)
    seen = [next(batches) for _ in range(stop_after)]
    state = first.state_dict()
    second = make_loader()
    second.load_state_dict(state)
    assert second.state_dict() == state
    while second.epoch < 2:
        seen += list(second)
    np.testing.assert_array_equal(keys(seen), expected)


def test_a_loop_that_leaves_early_goes_on_where_it_was(make_loader):
    loader = make_loader()
    seen = []
    while loader.epoch < 1:
        for batch in loader:
            seen.append(batch)
            if len(seen) % 3 == 0:
                break
    np.testing.assert_array_equal(keys(seen), keys(make_loader()))


@pytest.mark.parametrize(("other", "name"), [({"seed": 8}, "seed"), ({"batch_size": 32}, "batch_size")])
def test_a_position_of_another_order_is_refused(make_loader, other, name):
    with pytest.raises(UserError, match=f"the saved position has {name} "):
        make_loader(**other).load_state_dict(make_loader().state_dict())


def test_batches_own_their_memory(make_loader):
    batches = list(make_loader())
    before = keys(batches)
    for batch in batches:
        batch.sparse.add_(1)
    np.testing.assert_array_equal(keys(make_loader()), before)


def test_waiting_is_measured_and_errors_reach_the_consumer(make_loader, monkeypatch):
    loader = make_loader(prefetch=1)
    gather = loader.split.gather

    def slow(indices):
        time.sleep(0.3)
        return gather(indices)

    monkeypatch.setattr(loader.split, "gather", slow)
    next(iter(loader))
    assert loader.wait_seconds >= 0.1  # the thread may be asleep already when the wait begins

    def broken(indices):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(loader.split, "gather", broken)
    with pytest.raises(OSError, match="Input/output error"):
        list(loader)
    assert loader.batch == 1  # the failed batch does not count as seen


def test_arguments_out_of_range_are_refused(make_loader):
    with pytest.raises(UserError, match="holds 1,000 rows, fewer than one batch of 2,000"):
        make_loader(batch_size=2000, drop_last=True)
    assert len(list(make_loader(batch_size=2000))) == 1
    for options in ({"batch_size": 0}, {"prefetch": 0}):
        with pytest.raises(ValueError, match="both must be at least 1"):
            make_loader(**options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_batches_are_the_same(make_loader):
    batches = list(make_loader(device="cuda"))
    assert all(x.is_cuda for batch in batches for x in batch)
    np.testing.assert_array_equal(keys([type(b)(*(x.cpu() for x in b)) for b in batches]), keys(make_loader()))
