"""Measure rivals against each other and against the machine's floors: the timing that all bench scripts share."""

import gc
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ctr_kernels import set_output_cache

from .peers import Unavailable, version_of
from .records import Row

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts allocations, else logs its every start

MIN_ROUNDS = 5  # fewer give no percentiles worth the name, whatever the time budget
MM_SIZE = 2048
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}  # far beyond any cache
FLUSH_BYTES = 1 << 28  # written before each call on a GPU, beyond its L2 (50 MB on Hopper)


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one provider: percentiles over the rounds.

    Attributes:
        ratio: median over the rounds of (this provider's time / the first provider's time in the same round), so that
            drift of the machine cancels; above 1 means that the first one is faster. None if either did not run.
        rounds: rounds measured; 0 with an error.
        note: why it could not run; empty if it did.
    """

    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    ratio: float | None = None
    rounds: int = 0
    note: str = ""


@dataclass(frozen=True)
class Floors:
    """What the machine can do, measured in the same process: gflops (GFLOP/s of a matmul), gbps (GB/s of a copy)."""

    gflops: float
    gbps: float

    def milliseconds(self, flops: float, num_bytes: float) -> float:
        """The time below which work of that many FLOP and bytes cannot come: the slower of the two."""
        return max(flops / self.gflops, num_bytes / self.gbps) / 1e6


def measure_pairs(
    functions: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 50,
    warmup: int = 3,
    device: torch.device | str = "cpu",
    seconds: float = 20.0,
) -> dict[str, Timing]:
    """Time each function once a round, the first provider being "ours".

    Rounds alternate between the order given and its reverse, so that no provider always follows the same rival.
    On CUDA each call begins with a cold L2 cache and is timed by events; on a CPU by the wall clock.

    Args:
        functions: provider -> a call without arguments.
        rounds: at most so many; after `seconds` no round begins, but MIN_ROUNDS (or `rounds`) are always done.
        warmup: untimed calls of each provider first. One that raises here is left out, its Timing says why.
    """
    device = torch.device(device)
    timings = {name: Timing() for name in functions}
    running = {}
    for name, function in functions.items():
        try:
            for _ in range(max(warmup, 1)):
                function()
            _synchronise(device)
        except Exception as error:  # a rival may fail in any way; that is a result to show
            timings[name] = Timing(note=_reason(error, device))
        else:
            running[name] = function
    times: dict[str, list[float]] = {name: [] for name in running}
    clock = _cuda_round if device.type == "cuda" else _cpu_round
    collecting, started = gc.isenabled(), time.monotonic()
    gc.disable()  # a collection in the middle would be charged to whoever runs then
    try:
        for done in range(rounds if running else 0):
            if done >= MIN_ROUNDS and time.monotonic() - started > seconds:
                break
            order = list(running) if done % 2 == 0 else list(reversed(running))
            for name, milliseconds in clock({name: running[name] for name in order}, device).items():
                times[name].append(milliseconds)
    finally:
        if collecting:
            gc.enable()
    first = times.get(next(iter(functions), ""))
    for name, values in times.items():
        p20, p50, p80 = (float(x) for x in np.percentile(values, (20, 50, 80)))
        ratio = float(np.median(np.divide(values, first))) if first else None
        timings[name] = Timing(p20, p50, p80, ratio, len(values))
    return timings


def mm_rate(device: torch.device | str, dtype: torch.dtype = torch.float32) -> float:
    """GFLOP/s of a 2048^3 `torch.mm` at the current float32 matmul precision; median of 10."""
    a, b = (torch.randn(MM_SIZE, MM_SIZE, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    timing = measure_pairs({"mm": lambda: torch.mm(a, b, out=out)}, rounds=10, warmup=2, device=device)["mm"]
    return 2 * MM_SIZE**3 / _measured(timing) / 1e6


def copy_bandwidth(device: torch.device | str) -> float:
    """GB/s, bytes read plus bytes written, of a large `copy_`; median of 10."""
    source = torch.ones(COPY_BYTES[torch.device(device).type], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    timing = measure_pairs({"copy": lambda: target.copy_(source)}, rounds=10, warmup=2, device=device)["copy"]
    return 2 * source.numel() / _measured(timing) / 1e6


def measure_floors(device: torch.device | str, dtype: torch.dtype = torch.float32) -> Floors:
    """Both rates of the machine; takes a second or two."""
    return Floors(mm_rate(device, dtype), copy_bandwidth(device))


def compare(
    functions: Mapping[str, Callable[[], Sequence[torch.Tensor]]],
    *,
    kernel: str,
    mode: str,
    x: str,
    device: torch.device,
    flops: float = 0.0,
    num_bytes: float = 0.0,
    floors: Floors | None = None,
    samples: int = 0,
    exact: Sequence[torch.Tensor] = (),
    rounds: int = 50,
    seconds: float = 20.0,
    warmup: int = 3,
) -> list[Row]:
    """Time each provider against the first, then take the peak memory and the error of one more call of each.

    Args:
        functions: provider -> a call that returns its outputs and gradients.
        mode: "forward", "forward+backward", "training step", ...; x: the shape, as "B=4096 F=27 D=64".
        flops, num_bytes: work of a call as the floor counts it, the same for every provider; 0 if not known.
        samples: rows of the batch, for rows/s.
        exact: what the functions return, computed in fp64; () for no comparison.
        rounds, seconds, warmup: see `measure_pairs`.
    """
    rows = []
    timings = measure_pairs(functions, device=device, rounds=rounds, seconds=seconds, warmup=warmup)
    for name, timing in timings.items():
        row = time_row(name, timing, kernel=kernel, mode=mode, x=x, flops=flops, num_bytes=num_bytes, floors=floors,
                       samples=samples, device=device)
        if not timing.note:
            row.memory_mb = peak_memory(functions[name], device=device) / 1e6
            row.fp64_error = relative_error(functions[name](), exact) if exact else None
        rows.append(row)
    return rows


def compare_modes(
    providers: Mapping[str, Callable[..., torch.Tensor]],
    reference: Callable[..., torch.Tensor],
    inputs: Sequence[torch.Tensor],
    grad: torch.Tensor,
    work: Mapping[str, tuple[float, float]],
    *,
    parameters: Mapping[str, Iterable[torch.Tensor]] | None = None,
    exact: bool = True,
    **options: Any,
) -> list[Row]:
    """`compare` the providers of one function in each mode: "forward", or "forward+backward" with all gradients.

    Args:
        reference: the same function, to be run in fp64; grad: the gradient of its output.
        work: mode -> (FLOP, bytes) as the floor counts them.
        parameters: provider -> leaves beside the inputs whose gradients it makes as well.
        exact: whether the error against fp64 is taken. options: those of `compare`.
    """
    rows, wide = [], [x.double() for x in inputs] if exact else []
    leaves = parameters or {}
    for mode, (flops, num_bytes) in work.items():
        if mode == "forward":
            functions = {name: forward(function, inputs) for name, function in providers.items()}
            truth = forward(reference, wide)
        else:
            functions = {name: forward_backward(function, inputs, grad, leaves.get(name, ()))
                         for name, function in providers.items()}
            truth = forward_backward(reference, wide, grad.double())
        rows += compare(functions, mode=mode, flops=flops, num_bytes=num_bytes, exact=truth() if exact else (),
                        **options)
    return rows


def time_row(
    provider: str, timing: Timing, *, kernel: str, mode: str, x: str, flops: float = 0.0, num_bytes: float = 0.0,
    floors: Floors | None = None, samples: int = 0, device: torch.device,
) -> Row:
    """The record of a timing, with rates and the share of the floor; arguments as those of `compare`."""
    row = Row(kernel=kernel, provider=provider, mode=mode, x=x, p20=timing.p20, p50=timing.p50, p80=timing.p80,
              ratio=timing.ratio, note=timing.note, version=version_of(provider, device))
    if timing.p50:
        row.gflops = flops / timing.p50 / 1e6 if flops else None
        row.gbps = num_bytes / timing.p50 / 1e6 if num_bytes else None
        row.rows_per_s = 1e3 * samples / timing.p50 if samples else None
        if floors and (flops or num_bytes):
            row.percent_of_floor = 100 * floors.milliseconds(flops, num_bytes) / timing.p50
    return row


def relative_error(results: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """The largest error of any tensor, as a share of the largest absolute value of its exact one.

    Of more results than exact ones the first are compared.
    """
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(results, exact, strict=False))


def saved_bytes(function: Callable[[], Any], exclude: Iterable[torch.Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward pass of what `function` computes; see `saved_tensors`."""
    return sum(tensor.untyped_storage().nbytes() for tensor in saved_tensors(function, exclude))


def saved_tensors(function: Callable[[], Any], exclude: Iterable[torch.Tensor] = ()) -> list[torch.Tensor]:
    """A tensor of each storage that autograd keeps for the backward pass of what `function` computes.

    Each storage counts once and whole, however many views of it are kept. `exclude`: inputs and parameters, which
    exist anyway.
    """
    excluded = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    kept: dict[int, torch.Tensor] = {}  # holding them keeps addresses from being used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in excluded:
            kept.setdefault(address, tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return list(kept.values())


def peak_memory(function: Callable[[], Any], *, device: torch.device | str = "cpu") -> int:
    """Bytes that a call needs on top of what is allocated before it, by the allocator's own count.

    CUDA: the peak that its statistics show. CPU: the highest sum of the allocations and releases that the profiler
    sees, the cache of our outputs switched off; scratch memory that a library takes by itself is in neither.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    cached = set_output_cache(0)  # what is taken from a cache is no allocation
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            function()
    finally:
        set_output_cache(cached)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum([0, *changes]).max())


def forward(function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
    """A call of function(*inputs) without autograd; it returns [output]."""

    def run() -> list[torch.Tensor]:
        with torch.no_grad():
            return [function(*inputs)]

    return run


def forward_backward(function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], grad: torch.Tensor,
                     parameters: Iterable[torch.Tensor] = ()) -> Callable[[], list[torch.Tensor]]:
    """A call of function(*inputs) and of its backward; it returns [output, *gradients of inputs and parameters]."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    leaves = [*inputs, *parameters]

    def run() -> list[torch.Tensor]:
        out = function(*inputs)
        out.backward(grad)
        results = [out.detach()]
        for leaf in leaves:
            if leaf.grad is None:
                raise RuntimeError(f"no gradient of an input {tuple(leaf.shape)}")
            results.append(leaf.grad)
            leaf.grad = None  # the next call starts without, in time and memory
        return results

    return run


def _measured(timing: Timing) -> float:
    """Its median in ms; RuntimeError if it did not run."""
    if timing.p50 is None:
        raise RuntimeError(f"the machine's rate could not be measured: {timing.note}")
    return timing.p50


def _reason(error: Exception, device: torch.device) -> str:
    """Why a provider has no figure: its own words if it is `Unavailable`, else what stopped it."""
    cause: BaseException = error
    while cause.__cause__ is not None:  # compilers wrap what went wrong
        cause = cause.__cause__
    lines = str(cause).strip().splitlines() or [""]
    if isinstance(error, Unavailable):
        return lines[0]
    return f"does not run on {device.type}: {type(cause).__name__}: {lines[0].partition('. ')[0]}".rstrip(": ")


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpu_round(functions: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """Milliseconds of one call of each, in that order."""
    times = {}
    for name, function in functions.items():
        started = time.perf_counter()
        function()
        times[name] = (time.perf_counter() - started) * 1e3
    return times


def _cuda_round(functions: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """As `_cpu_round`; the flush before each call also gives the host time to launch it ahead."""
    flush, clean = (torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device=device) for _ in range(2))
    events = {}
    for name, function in functions.items():
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        clean.sum()  # what is read last must not be written back while the function runs
        start.record()
        function()
        stop.record()
        events[name] = start, stop
    torch.cuda.synchronize(device)
    return {name: start.elapsed_time(stop) for name, (start, stop) in events.items()}
