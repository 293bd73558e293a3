"""Which backend runs an operation: the `kernels=` argument, resolved without ever switching silently."""

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from .library import NATIVE_ABSENT

CHOICES = ("auto", "eager", "native", "triton")

# What the native kernels take; their arithmetic is always fp32.
NATIVE_DTYPES = {
    "field_attention": (torch.float32, torch.bfloat16),
    "ffn": (torch.float32, torch.bfloat16),
    "low_rank_cross": (torch.float32, torch.bfloat16),
    "sparse_update": (torch.float32, torch.bfloat16),
}

# What the Triton kernels of every operation take.
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

MATRIX_PRODUCTS = ("field_attention", "ffn", "low_rank_cross")  # operations that multiply matrices

MIN_CAPABILITY = (8, 0)  # of the Triton kernels: their fp32 products need TF32, their bf16 ones bf16 tensor cores

# Operations that each backend implements; `auto` takes the fastest one that has the operation.
IMPLEMENTED: dict[str, frozenset[str]] = {
    "eager": frozenset({"field_attention", "ffn", "field_tokens", "low_rank_cross", "sparse_update"}),
    "native": frozenset({"field_attention", "ffn", "low_rank_cross", "sparse_update"}),
    "triton": frozenset({"field_attention", "ffn", "field_tokens", "low_rank_cross", "sparse_update"}),
}


class BackendUnavailable(RuntimeError):
    """An explicitly chosen backend cannot run; the message says what is missing and what to do."""


class Backend(NamedTuple):
    """One row of `backends()`: what is available (None: not), and the reason when it is not."""

    level: str | None
    reason: str | None = None
    operations: tuple[str, ...] = ()


def _native() -> Backend:
    if NATIVE_ABSENT is not None:
        return Backend(None, NATIVE_ABSENT)
    return Backend(torch.ops.ctr.select_simd(""), None, tuple(sorted(IMPLEMENTED["native"])))


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
    if os.environ.get("TRITON_INTERPRET") == "1":
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
    return Backend(level, None, tuple(sorted(IMPLEMENTED["triton"])))


def backends() -> dict[str, Backend]:
    """What runs here: `{"native": Backend(level, reason, operations), "triton": ..., "eager": ...}`.

    `level` names what is available (instruction set, compute capability) and is None where the backend
    cannot run; `reason` then says why.

    >>> backends()["eager"].level is not None
    True
    """
    eager = Backend(f"torch {torch.__version__}", None, tuple(sorted(IMPLEMENTED["eager"])))
    return {"native": _native(), "triton": _triton(), "eager": eager}


@torch.compiler.assume_constant_result
def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _dtypes(backend: str, operation: str) -> tuple[torch.dtype, ...]:
    if backend != "triton":
        return NATIVE_DTYPES[operation]
    if operation in MATRIX_PRODUCTS and _interpreted():  # products of bf16 matrices are wrong there, by far
        return (torch.float32, torch.float16)
    return TRITON_DTYPES


def inside_torch_func() -> bool:
    """Whether torch.func or forward-mode differentiation is at work: kernels have no rules for them."""
    if torch.compiler.is_compiling():  # a constant of the graph, guarded; the other two functions would be nodes of it
        return torch._C._functorch.get_dynamic_layer_stack_depth() > 0
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def on_triton(kernels: str, device: torch.device, operation: str, dtype: torch.dtype,
              limits: "Limits | None" = None) -> bool:
    """Whether Triton runs `operation`, one that only Triton has fused: the other backends compose it."""
    return kernels != "native" and resolve(kernels, device, operation, dtype, limits) == "triton"


Limits = Callable[[str], str | None]


def resolve(kernels: str, device: torch.device, operation: str, dtype: torch.dtype = torch.float32,
            limits: Limits | None = None) -> str:
    """The backend that runs `operation` on tensors of `device` and `dtype`: "eager", "native" or "triton".

    `limits(backend)` says why that backend does not take the shapes of the call, None if it does. "auto" takes eager
    whatever the reason is.

    Raises ValueError for an unknown name and for shapes that the chosen backend does not take, BackendUnavailable for
    a choice that cannot run here, and TypeError for a dtype that the chosen backend does not take.
    """
    if kernels not in CHOICES:
        raise ValueError(f"kernels={kernels!r}: choose one of {', '.join(CHOICES)}")
    if kernels == "eager":
        return "eager"
    wanted = kernels
    if kernels == "auto":
        wanted = "triton" if device.type == "cuda" else "native"
        if operation not in IMPLEMENTED[wanted]:
            return "eager"
        runs = triton_absent(device.type, device.index) is None if wanted == "triton" else (
            device.type == "cpu" and NATIVE_ABSENT is None)
        takes = runs and dtype in _dtypes(wanted, operation) and (limits is None or limits(wanted) is None)
        return wanted if takes and not inside_torch_func() else "eager"
    reason = NATIVE_ABSENT if wanted == "native" else triton_absent(device.type, device.index)
    if reason is not None:
        raise BackendUnavailable(f"kernels={wanted!r} cannot run: {reason}. kernels='eager' runs anywhere")
    if operation not in IMPLEMENTED[wanted]:
        raise BackendUnavailable(f"kernels={wanted!r} has no {operation} yet; kernels='eager' runs anywhere")
    if wanted == "native" and device.type != "cpu":
        raise BackendUnavailable(f"kernels='native' runs on CPU tensors, these are on {device}; use kernels='triton'")
    if dtype not in _dtypes(wanted, operation):
        taken = " and ".join(str(d) for d in _dtypes(wanted, operation))
        raise TypeError(f"{operation} with kernels={wanted!r} takes {taken}, not {dtype}; kernels='eager' takes any")
    reason = None if limits is None else limits(wanted)
    if reason is not None:
        raise ValueError(f"{operation} with kernels={wanted!r}: {reason}. kernels='eager' takes any")
    if inside_torch_func():
        raise BackendUnavailable(f"kernels={wanted!r} has no rules for torch.func (grad, vmap, ...); "
                                 "use kernels='eager'")
    return wanted
