"""Memory that the native kernels keep between calls."""

from typing import NamedTuple

import torch

from .library import NATIVE_ABSENT


class OutputCacheStats(NamedTuple):
    """Bytes of the native kernels' large outputs; `kept` and `in_use` together are never more than `most_in_use`."""

    kept: int
    in_use: int
    most_in_use: int


def set_output_cache(num_bytes: int) -> int:
    """Bound the memory of freed outputs that the native kernels keep for their next outputs, on CPUs.

    Outputs of 1 MB and more come from this cache, as those on a GPU come from PyTorch's: memory that the system hands
    out anew is zeroed page by page at its first use, which takes longer than the attention that fills it. What is kept
    and what is in use together are never more than was in use at once before, in pages of 2 MB, and what is kept is at
    most 1 GB, or what the environment variable CTR_KERNELS_CACHE_MB says, in MB; what was kept longest goes first.
    Where the system has huge pages it may take kept memory for other processes when it runs short, and need not ask;
    `empty_output_cache` gives it back at once. PyTorch's profiler does not see what is taken from the cache, and
    `resize_` cannot make such an output larger than it was; with a bound of 0 every output comes from PyTorch's own
    allocator.

    Args:
        num_bytes: the new bound; what is kept beyond it is given back to the system at once.

    Returns the bound before. ValueError for a negative one.
    """
    if num_bytes < 0:
        raise ValueError(f"num_bytes={num_bytes}: the cache cannot hold less than nothing; 0 switches it off")
    return 0 if NATIVE_ABSENT is not None else torch.ops.ctr.keep_outputs(num_bytes)


def empty_output_cache() -> None:
    """Give the memory of freed outputs back to the system; `most_in_use` counts anew from what is in use now.

    The next outputs take fresh memory, and the cache fills again: `set_output_cache(0)` switches it off.
    """
    if NATIVE_ABSENT is None:
        torch.ops.ctr.empty_output_cache()


def output_cache_stats() -> OutputCacheStats:
    """What the cache holds now, in bytes."""
    return OutputCacheStats(0, 0, 0) if NATIVE_ABSENT is not None else OutputCacheStats(
        *torch.ops.ctr.output_cache_stats())
