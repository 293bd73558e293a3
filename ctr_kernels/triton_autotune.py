"""Launch configurations of the Triton kernels: those of the tables, or with CTR_KERNELS_AUTOTUNE=1 the fastest here.

The search times every candidate at the first launch of a kind and prints a line to paste into TUNED (triton_tuned.py):
shapes that matter, one after the other, are a tuning run. It is meant for that and not for production: the fastest of
two runs may differ, and with it the order of fp32 sums.
"""

import math
import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import torch
from triton.runtime.errors import OutOfResources, PTXASError
from triton.testing import do_bench

from .triton_tuned import TUNED

Choice = TypeVar("Choice", bound=tuple)  # a named tuple of numbers
Key = tuple[str | int | bool, ...]  # operation, kernel, shape, arithmetic and architecture
_chosen: dict[Key, Any] = {}


def table_choice(key: Key, default: Choice) -> Choice:
    """The line of TUNED for that key, or `default`, what the operation's own table has."""
    return type(default)(*TUNED[key]) if key in TUNED else default


def launch_choice(key: Key, default: Choice, candidates: Iterable[Choice], run: Callable[[Choice], object],
                  timer: Callable[[Callable[[], object]], float] | None = None) -> Choice:
    """`table_choice`; with CTR_KERNELS_AUTOTUNE=1 the fastest of it and `candidates`, searched once for each key.

    Args:
        key: printed as it is.
        run: launches the kernel with a choice; called many times, so it must leave nothing behind.
        timer: milliseconds of a call; None is `triton.testing.do_bench`, which needs a GPU.

    A candidate that the GPU has no room for, or that cannot be compiled, is left out. Raises RuntimeError while a
    CUDA graph is captured.
    """
    default = table_choice(key, default)
    if os.environ.get("CTR_KERNELS_AUTOTUNE") != "1":
        return default
    if key not in _chosen:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"CTR_KERNELS_AUTOTUNE=1 cannot time {key} while a CUDA graph is captured: "
                               "run a step first")
        _chosen[key] = _search(key, default, candidates, run, timer or _milliseconds)
    return _chosen[key]


def _milliseconds(run: Callable[[], object]) -> float:
    return do_bench(run, return_mode="median")


def _search(key: Key, default: Choice, candidates: Iterable[Choice], run: Callable[[Choice], object],
            timer: Callable[[Callable[[], object]], float]) -> Choice:
    times = {}
    for choice in dict.fromkeys((default, *candidates)):
        try:
            times[choice] = timer(partial(run, choice))
        except (OutOfResources, PTXASError):
            times[choice] = math.inf
        except RuntimeError as error:
            if "PassManager" not in str(error):  # what MLIR says of code that it cannot lower
                raise
            times[choice] = math.inf
    best = min(times, key=times.__getitem__)
    if math.isinf(times[best]):
        raise RuntimeError(f"no launch configuration of {key} fits this GPU: {', '.join(map(str, times))} were tried")
    print(f"    {key}: {tuple(best)},  # {best}: {1e3 * times[best]:.1f} us; {default}: {1e3 * times[default]:.1f} us",
          file=sys.stderr)
    return best
