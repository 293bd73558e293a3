"""Launch configurations of the Triton kernels: one key and one look-up, for launches and for compilation without a GPU.

An operation has two functions of a key: `default`, what the compiler speaks for, and `candidates`, what a search tries.
TUNED (triton_tuned.py) has what was faster on a GPU. With CTR_KERNELS_AUTOTUNE=1 the first launch of a kind times every
candidate and prints a line to paste into TUNED: shapes that matter, one after the other, are a tuning run. It is meant
for that and not for production: the fastest of two runs may differ, and with it the order of fp32 sums.
"""

import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from triton.runtime.errors import OutOfResources, PTXASError

from .triton_tuned import TUNED

Choice = TypeVar("Choice", bound=tuple)  # a named tuple of numbers
Row = TypeVar("Row")
FLUSH_BYTES = 1 << 28  # beyond the L2 cache of any GPU
ANY = 0  # the architecture of a row that stands for all without one of their own


class Key(NamedTuple):
    """A kind of launch: all that chooses its configuration.

    shape: sizes as the operation rounds them. arithmetic: as `arithmetic_of` has it, or "fp32" and "half" where nothing
    is multiplied by matrices. architecture: 80, 90 or 100.
    """

    operation: str
    kernel: str
    shape: tuple[int, ...]
    arithmetic: str
    architecture: int


_chosen: dict[Key, Any] = {}


def input_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` treats fp32: "fp16x3" (fp32-accurate, three MMAs) at PyTorch's "highest", else "tf32".

    fp16 and bf16 have tensor cores of their own and ignore it.
    """
    exact = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return "fp16x3" if exact else "tf32"


def arithmetic_of(dtype: torch.dtype) -> str:
    """The arithmetic of products: "half" (fp16 and bf16), "tf32" or "fp16x3"."""
    return input_precision(dtype) if dtype == torch.float32 else "half"


def width_of(dtype: torch.dtype) -> str:
    """The arithmetic of kernels without products of matrices: "fp32" or "half"."""
    return "fp32" if dtype == torch.float32 else "half"


def capability(device: torch.device) -> int:
    """Compute capability as in sm_90; 0 in the interpreter, which runs on the CPU."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def architecture(cc: int) -> int:
    """The row of a launch table for sm_<cc>: 90 and 100 have their own, 80 stands for all others."""
    return cc // 10 * 10 if cc // 10 in (9, 10) else 80


def multiprocessors(device: torch.device, interpreted: int = 2) -> int:
    """Of the device; `interpreted` in the interpreter, where each program takes its time."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else interpreted


def row_of(table: Mapping[tuple, Row], *row: Any) -> Row | None:
    """The row of that name, whose last part is an architecture; else the one for ANY; else None."""
    return table.get(row, table.get((*row[:-1], ANY)))


def table_choice(key: Key, default: Callable[[Key], Choice]) -> Choice:
    """The line of TUNED for that key, or what the operation's own table has."""
    own = default(key)
    return type(own)(*TUNED[key]) if key in TUNED else own


def is_measured(key: Key) -> bool:
    """Whether the configuration of that key was the fastest on a GPU."""
    return key in TUNED


def launch_choice(key: Key, default: Callable[[Key], Choice], candidates: Callable[[Key], Iterable[Choice]],
                  run: Callable[[Choice], object],
                  timer: Callable[[Callable[[], object]], float] | None = None) -> Choice:
    """`table_choice`; with CTR_KERNELS_AUTOTUNE=1 the fastest of it and `candidates`, searched once for each key.

    Args:
        key: printed as it is.
        run: launches the kernel with a choice; called many times, so it must leave nothing behind.
        timer: milliseconds of a call; None times CUDA graphs, which needs a GPU.

    A candidate that the GPU has no room for, or that cannot be compiled, is left out. Raises RuntimeError while a
    CUDA graph is captured.
    """
    chosen = table_choice(key, default)
    if os.environ.get("CTR_KERNELS_AUTOTUNE") != "1":
        return chosen
    if key not in _chosen:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"CTR_KERNELS_AUTOTUNE=1 cannot time {tuple(key)} while a CUDA graph is captured: "
                               "run a step first")
        _chosen[key] = _search(key, chosen, candidates(key), run, timer or _milliseconds)
    return _chosen[key]


def _milliseconds(run: Callable[[], object], rounds: int = 15) -> float:
    """The median time of a CUDA graph of `run`: of launches one by one the host's own time would be measured. What is
    in the L2 cache is overwritten before each."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        run()
    flush, times = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda"), []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        graph.replay()
        stop.record()
        times.append((start, stop))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in times)


def time_of(choice: Choice, run: Callable[[Choice], object], timer: Callable[[Callable[[], object]], float]) -> float:
    """What `timer` says of a launch; infinite where the GPU has no room for it, or it cannot be compiled."""
    try:
        return timer(partial(run, choice))
    except (OutOfResources, PTXASError):
        return math.inf
    except RuntimeError as error:
        if "PassManager" not in str(error):  # what MLIR says of code that it cannot lower
            raise
        return math.inf


def _search(key: Key, default: Choice, candidates: Iterable[Choice], run: Callable[[Choice], object],
            timer: Callable[[Callable[[], object]], float]) -> Choice:
    times = {choice: time_of(choice, run, timer) for choice in dict.fromkeys((default, *candidates))}
    best = min(times, key=times.__getitem__)
    if math.isinf(times[best]):
        raise RuntimeError(f"no launch configuration of {tuple(key)} fits this GPU: {', '.join(map(str, times))} "
                           "were tried")
    others = sorted((time, tuple(choice)) for choice, time in times.items()
                    if choice not in (best, default) and math.isfinite(time))
    print(f"    {tuple(key)}: {tuple(best)},  # {best}: {1e3 * times[best]:.1f} us; {default}: "
          f"{1e3 * times[default]:.1f} us", *(f"{choice}: {1e3 * time:.1f}" for time, choice in others[:4]), sep="; ",
          file=sys.stderr, flush=True)
    return best
