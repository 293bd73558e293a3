"""Which backend runs an operation: the `kernels=` argument, resolved without ever switching silently."""

import importlib.util
import os
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


def _triton() -> Backend:
    if not IMPLEMENTED["triton"]:
        return Backend(None, "no Triton kernel is part of this version yet")
    if importlib.util.find_spec("triton") is None:
        return Backend(None, "the package triton is not installed; run `pip install triton`")
    operations = tuple(sorted(IMPLEMENTED["triton"]))
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return Backend(f"sm_{major}{minor}", None, operations)
    if os.environ.get("TRITON_INTERPRET") == "1":
        return Backend("interpreter", None, operations)
    return Backend(None, "no CUDA device is visible; set TRITON_INTERPRET=1 to run on the CPU, slowly, for checking")


def backends() -> dict[str, Backend]:
    """What runs here: `{"native": Backend(level, reason, operations), "triton": ..., "eager": ...}`.

    `level` names what is available (instruction set, compute capability) and is None where the backend
    cannot run; `reason` then says why.

    >>> backends()["eager"].level is not None
    True
    """
    eager = Backend(f"torch {torch.__version__}", None, tuple(sorted(IMPLEMENTED["eager"])))
    return {"native": _native(), "triton": _triton(), "eager": eager}


def _dtypes(backend: str, operation: str) -> tuple[torch.dtype, ...]:
    return TRITON_DTYPES if backend == "triton" else NATIVE_DTYPES[operation]


def _inside_torch_func() -> bool:
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def on_triton(kernels: str, device: torch.device, operation: str, dtype: torch.dtype) -> bool:
    """Whether Triton runs `operation`, one that only Triton has fused: the other backends compose it."""
    return kernels != "native" and resolve(kernels, device, operation, dtype) == "triton"


def resolve(kernels: str, device: torch.device, operation: str, dtype: torch.dtype = torch.float32) -> str:
    """The backend that runs `operation` on tensors of `device` and `dtype`: "eager", "native" or "triton".

    Raises ValueError for an unknown name, BackendUnavailable for a choice that cannot run here, and TypeError for
    a dtype that the chosen backend does not take.
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
        runs = wanted == "triton" or (device.type == "cpu" and NATIVE_ABSENT is None)
        return wanted if runs and dtype in _dtypes(wanted, operation) and not _inside_torch_func() else "eager"
    reason = NATIVE_ABSENT if wanted == "native" else _triton().reason  # backends() cannot be traced by torch.compile
    if reason is not None:
        raise BackendUnavailable(f"kernels={wanted!r} cannot run: {reason}. kernels='eager' runs anywhere")
    if operation not in IMPLEMENTED[wanted]:
        raise BackendUnavailable(f"kernels={wanted!r} has no {operation} yet; kernels='eager' runs anywhere")
    if wanted == "native" and device.type != "cpu":
        raise BackendUnavailable(f"kernels='native' runs on CPU tensors, these are on {device}; use kernels='triton'")
    if dtype not in _dtypes(wanted, operation):
        taken = " and ".join(str(d) for d in _dtypes(wanted, operation))
        raise TypeError(f"{operation} with kernels={wanted!r} takes {taken}, not {dtype}; kernels='eager' takes any")
    if _inside_torch_func():
        raise BackendUnavailable(f"kernels={wanted!r} has no rules for torch.func (grad, vmap, ...); "
                                 "use kernels='eager'")
    if wanted == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise BackendUnavailable(f"kernels='triton' runs on CUDA tensors, these are on {device}")
    return wanted
