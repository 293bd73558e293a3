"""Which backend runs an operation: the `kernels=` argument, resolved without ever switching silently."""

import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch

from .library import INTERPRETED, NATIVE_ABSENT
from .tracing import inside_torch_func

CHOICES = ("auto", "eager", "native", "triton")
Dtypes = tuple[torch.dtype, ...]


class Operation(NamedTuple):
    """What each fused backend takes of an operation; eager PyTorch takes all."""

    native: Dtypes  # of the CPU kernels, whose arithmetic is always fp32; none: they do not have the operation
    triton: Dtypes = (torch.float32, torch.bfloat16, torch.float16)
    products: bool = True  # whether it multiplies matrices


OPERATIONS = {
    "attention_block": Operation((torch.float32,)),
    "ffn": Operation((torch.float32, torch.bfloat16)),
    "field_attention": Operation((torch.float32, torch.bfloat16)),
    "field_tokens": Operation((), products=False),
    "low_rank_cross": Operation((torch.float32, torch.bfloat16)),
    "sparse_update": Operation((torch.float32, torch.bfloat16), products=False),
}

MIN_CAPABILITY = (8, 0)  # of the Triton kernels: their fp32 products need TF32, their bf16 ones bf16 tensor cores


class BackendUnavailable(RuntimeError):
    """An explicitly chosen backend cannot run; the message says what is missing and what to do."""


class Backend(NamedTuple):
    """One row of `backends()`: what is available (None: not), and the reason when it is not."""

    level: str | None
    reason: str | None = None
    operations: tuple[str, ...] = ()


def native_absent(device: torch.device) -> str | None:
    """Why the native kernels do not run on tensors of that device; None if they do."""
    if NATIVE_ABSENT is not None:
        return NATIVE_ABSENT
    if INTERPRETED:
        return "TRITON_INTERPRET=1 makes the operators run in Triton's interpreter"
    return None if device.type == "cpu" else f"it runs on CPU tensors, these are on {device}"


def _native() -> Backend:
    reason = native_absent(torch.device("cpu"))
    if reason is not None:
        return Backend(None, reason)
    return Backend(torch.ops.ctr.select_simd(""), None, _operations("native"))


def _operations(backend: str) -> tuple[str, ...]:
    return tuple(name for name in OPERATIONS if _dtypes(backend, name))


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@torch.compiler.assume_constant_result  # packages and devices stay as they are; torch.compile cannot look at them
def triton_absent(kind: str, index: int | None) -> str | None:
    """Why Triton's kernels do not run on the device of that kind ("cuda", ...) and index; None if they do."""
    if not _triton_installed():
        return "the package triton is not installed; run `pip install triton`"
    if kind == "cuda":
        if torch.version.hip is not None:
            return f"this is ROCm {torch.version.hip}; the kernels are written for NVIDIA GPUs"
        found = _capability(index)
        if found < MIN_CAPABILITY:
            return f"the device is sm_{found[0]}{found[1]}; the kernels need sm_{MIN_CAPABILITY[0]}{MIN_CAPABILITY[1]}"
        return None
    if INTERPRETED:
        return None
    if torch.cuda.is_available():
        return f"it runs on CUDA tensors, these are on {kind}"
    return "no CUDA device is visible; set TRITON_INTERPRET=1 to run on the CPU, slowly, for checking"


def _triton() -> Backend:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    reason = triton_absent(kind, None)
    if reason is not None:
        return Backend(None, reason)
    level = "sm_{}{}".format(*_capability(None)) if kind == "cuda" else "interpreter"
    return Backend(level, None, _operations("triton"))


def backends() -> dict[str, Backend]:
    """What runs here: `{"native": Backend(level, reason, operations), "triton": ..., "eager": ...}`.

    `level` names what is available (instruction set, compute capability) and is None where the backend
    cannot run; `reason` then says why.

    >>> backends()["eager"].level is not None
    True
    """
    eager = Backend(f"torch {torch.__version__}", None, tuple(OPERATIONS))
    return {"native": _native(), "triton": _triton(), "eager": eager}


def _dtypes(backend: str, operation: str) -> Dtypes:
    if backend == "native":
        return OPERATIONS[operation].native
    if OPERATIONS[operation].products and INTERPRETED:  # products of bf16 matrices are wrong there, by far
        return tuple(dtype for dtype in OPERATIONS[operation].triton if dtype != torch.bfloat16)
    return OPERATIONS[operation].triton


Supports = Callable[[str], str | None]


def on_triton(kernels: str, device: torch.device, operation: str, dtype: torch.dtype,
              supports: Supports | None = None) -> bool:
    """Whether Triton runs `operation`, one that only Triton has fused: the other backends compose it."""
    return kernels != "native" and resolve(kernels, device, operation, dtype, supports) == "triton"


def resolve(kernels: str, device: torch.device, operation: str, dtype: torch.dtype = torch.float32,
            supports: Supports | None = None) -> str:
    """The backend that runs `operation` on tensors of `device` and `dtype`: "eager", "native" or "triton".

    `supports(backend)` says why that backend does not take the shapes of the call, None if it does. "auto" is the
    first backend that takes the call, and eager takes all.

    Raises ValueError for an unknown name and for shapes that the chosen backend does not take, BackendUnavailable for
    a choice that cannot run here, and TypeError for a dtype that the chosen backend does not take.
    """
    if kernels not in CHOICES:
        raise ValueError(f"kernels={kernels!r}: choose one of {', '.join(CHOICES)}")
    if kernels == "eager":
        return "eager"
    wanted = ("triton" if device.type == "cuda" else "native") if kernels == "auto" else kernels
    refusal = _refusal(wanted, device, operation, dtype, supports)
    if refusal is None:
        return wanted
    if kernels == "auto":
        return "eager"
    error, message = refusal
    raise error(message)


def _refusal(backend: str, device: torch.device, operation: str, dtype: torch.dtype,
             supports: Supports | None) -> tuple[type[Exception], str] | None:
    """The error of `resolve` where `backend` does not take the call, as its class and message."""
    chosen = f"kernels={backend!r}"
    absent = native_absent(device) if backend == "native" else triton_absent(device.type, device.index)
    if absent is not None:
        return BackendUnavailable, f"{chosen} cannot run: {absent}. kernels='eager' runs anywhere"
    dtypes = _dtypes(backend, operation)
    if not dtypes:
        return BackendUnavailable, f"{chosen} has no {operation}; kernels='eager' runs anywhere"
    if dtype not in dtypes:
        taken = " and ".join(str(d) for d in dtypes)
        return TypeError, f"{operation} with {chosen} takes {taken}, not {dtype}; kernels='eager' takes any"
    reason = None if supports is None else supports(backend)
    if reason is not None:
        return ValueError, f"{operation} with {chosen}: {reason}. kernels='eager' takes any"
    if inside_torch_func():
        return BackendUnavailable, f"{chosen} has no rules for torch.func (grad, vmap, ...); use kernels='eager'"
    return None
