"""Shuffled batches of a split as torch tensors, gathered ahead of the training loop by a background thread."""

import time
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import UserError
from .dataset import Part, Split

SAME = ("seed", "rows", "batch_size")  # of a position that a loader goes on from


class Batch(NamedTuple):
    """dense float32 [B, num_dense], sparse int32 [B, 26], label float32 [B], on the loader's device."""

    dense: torch.Tensor
    sparse: torch.Tensor
    label: torch.Tensor


class Loader:
    """Endless epochs over a split: every row once an epoch, in an order drawn from (seed, epoch).

    `iter()` yields what is left of the current epoch; after its last batch the next `iter()` begins the next
    epoch. A loop that leaves early, or a loader with `load_state_dict`, goes on with the batch after the last one
    yielded, so that the rows come out the same whether a run was interrupted or not.

    Args:
        split: the rows.
        batch_size: rows of a batch, B; the last batch of an epoch is shorter unless `drop_last`.
        shuffle: draw a new order of all rows each epoch (8 bytes a row of memory); else the order of the file.
        seed: of the order.
        drop_last: leave out a last batch shorter than `batch_size`.
        device: where batches go; for CUDA they are pinned by the thread and copied asynchronously.
        prefetch: batches gathered ahead.

    Attributes:
        epoch, batch: epochs completed, and batches yielded in the current one.
        wait_seconds: time the consumer has waited for batches, in all.

    Raises ValueError (batch_size, prefetch below 1), UserError (drop_last with fewer rows than one batch).
    """

    def __init__(
        self,
        split: Split | Part,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int,
        drop_last: bool,
        device: torch.device | str = "cpu",
        prefetch: int = 4,
    ) -> None:
        if batch_size < 1 or prefetch < 1:
            raise ValueError(f"batch_size={batch_size}, prefetch={prefetch}: both must be at least 1")
        if drop_last and split.rows < batch_size:
            raise UserError(f"{split.path} holds {split.rows:,} rows, fewer than one batch of {batch_size:,}; "
                            "choose a smaller batch size")
        self.split, self.batch_size, self.shuffle, self.seed = split, batch_size, shuffle, seed
        self.drop_last, self.device, self.prefetch = drop_last, torch.device(device), prefetch
        self.epoch = self.batch = 0
        self.wait_seconds = 0.0
        self._order: tuple[int, np.ndarray] | None = None  # (epoch, rows in that epoch's order)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self.split.rows // self.batch_size if self.drop_last else -(-self.split.rows // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        epoch, pending = self.epoch, deque[Future[Batch]]()
        ahead = iter(range(self.batch, len(self)))
        try:
            for index in range(self.batch, len(self)):
                while len(pending) < self.prefetch and (following := next(ahead, None)) is not None:
                    pending.append(self._thread.submit(self._gather, epoch, following))
                started = time.perf_counter()
                batch = pending.popleft().result()
                self.wait_seconds += time.perf_counter() - started
                self.epoch, self.batch = (epoch, index + 1) if index + 1 < len(self) else (epoch + 1, 0)
                yield batch if self.device.type == "cpu" else Batch(*(x.to(self.device, non_blocking=True)
                                                                     for x in batch))
        finally:  # also when the consumer leaves the loop early
            for future in pending:
                future.cancel()

    def _gather(self, epoch: int, index: int) -> Batch:
        """Batch `index` of `epoch` in host memory of its own; runs in the thread, without torch's own threads."""
        start, stop = index * self.batch_size, min((index + 1) * self.batch_size, self.split.rows)
        rows = self.split.gather(self._epoch_order(epoch)[start:stop] if self.shuffle else np.arange(start, stop))
        batch = Batch(torch.from_numpy(rows.dense), torch.from_numpy(rows.sparse),
                      torch.from_numpy(rows.label.astype(np.float32)))
        return Batch(*(x.pin_memory() for x in batch)) if self.device.type == "cuda" else batch

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            self._order = None  # frees the old order before the new one is drawn
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.split.rows)
        return self._order[1]

    def state_dict(self) -> dict[str, int]:
        """The position: the batch that comes next, what the order of rows depends on, and numpy's word for it."""
        return {"epoch": self.epoch, "batch": self.batch, "seed": self.seed, "rows": self.split.rows,
                "batch_size": self.batch_size, "shuffling": shuffling(self.seed)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position; UserError where this loader's seed, rows or batch size differ from its."""
        mine = self.state_dict()
        for name in SAME:
            if state[name] != mine[name]:
                raise UserError(f"the saved position has {name} {state[name]:,}, this loader has {mine[name]:,}: "
                                "the order of the rows would differ")
        if self.shuffle and state["shuffling"] != mine["shuffling"]:
            raise UserError(f"numpy {np.__version__} shuffles in another order than the numpy that the run began with: "
                            "rows would come twice or never; go on with that version (config.json names it)")
        self.epoch, self.batch = state["epoch"], state["batch"]

    def settle(self) -> None:
        """Wait until the thread has gathered all that it was asked for; until the next batch it then rests."""
        self._thread.submit(lambda: None).result()

    def close(self) -> None:
        """End the background thread; the loader cannot be iterated afterwards."""
        self._thread.shutdown(wait=True, cancel_futures=True)


def shuffling(seed: int) -> int:
    """A checksum of numpy's permutations, which numpy does not promise to keep from version to version."""
    return zlib.crc32(np.random.default_rng([seed, 0]).permutation(1000).astype("<i8").tobytes())
