"""Memory that the native kernels keep between calls."""

import torch

from .library import NATIVE_ABSENT


def set_output_cache(num_bytes: int) -> int:
    """Bound the memory of freed outputs that the native kernels keep for their next outputs, on CPUs.

    Outputs of 1 MB and more come from this cache, as those on a GPU come from PyTorch's: memory that the system hands
    out anew is zeroed page by page at its first use, which takes longer than the attention that fills it. The cache
    holds no more than was in use at once before, and at most 1 GB, or what the environment variable
    CTR_KERNELS_CACHE_MB says, in MB. PyTorch's profiler does not see what is taken from the cache; with a bound of 0
    every output comes from PyTorch's own allocator.

    Args:
        num_bytes: the new bound; what is kept beyond it is given back to the system at once.

    Returns the bound before. ValueError for a negative one.
    """
    if num_bytes < 0:
        raise ValueError(f"num_bytes={num_bytes}: the cache cannot hold less than nothing; 0 switches it off")
    return 0 if NATIVE_ABSENT is not None else torch.ops.ctr.keep_outputs(num_bytes)
