"""The `ctr::` operators: their schemas, the native library that implements them on CPUs, and Triton's place in them."""

import functools
import importlib
import mmap
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
# In Triton's interpreter, where CPU tensors run the Triton kernels.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_REBUILD = "run `pip install --no-build-isolation -e .` with a C++ compiler"


def _schemas() -> str:
    """The text between the parentheses of operators.inc, which is also a C++ literal."""
    text = (HERE / "operators.inc").read_text()
    return text[text.index("(") + 1:text.rindex(")schemas")]


SCHEMAS = _schemas()


def _holds(path: Path, text: bytes) -> bool:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as found:
        return found.find(text) >= 0


def _load_native() -> str | None:
    """Load the native library, which defines the operators; None when it is there, else the reason why it is not."""
    candidates = sorted(HERE.glob("_native*.so"))
    if not candidates:
        note = HERE / "_native_absent.txt"
        if note.exists():
            return note.read_text().strip()
        return f"the extension is not built; {_REBUILD}"
    library = candidates[0]
    try:
        if not _holds(library, SCHEMAS.encode()):
            return (f"{library.name} was built from another version of the sources than these Python files; {_REBUILD} "
                    "again")
        torch.ops.load_library(str(library))
    except (OSError, ValueError) as error:
        return f"{library.name} does not load with torch {torch.__version__}: {error}"
    return None


NATIVE_ABSENT: str | None = _load_native()
LIBRARY = torch.library.Library("ctr", "DEF" if NATIVE_ABSENT else "FRAGMENT")
if NATIVE_ABSENT:
    for line in SCHEMAS.splitlines():
        if line and not line.startswith("#"):
            LIBRARY.define(line)


def implement_in_triton(operator: str, module: str, function: str) -> None:
    """Let `module.function` run ctr::<operator> on CUDA tensors, and in Triton's interpreter on those of the CPU.

    The module, relative to this package, is imported at the first call: Triton may be absent.
    """

    @functools.cache
    def found() -> Callable[..., Any]:
        run: Callable[..., Any] = getattr(importlib.import_module(module, __package__), function)
        return run

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")  # the native one, wanted
        for key in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
            LIBRARY.impl(operator, lambda *arguments: found()(*arguments), key)


def last_dim_contiguous(x: torch.Tensor) -> torch.Tensor:
    """x itself where the last dimension is contiguous, whatever the other strides; else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def no_double_backward(operator: str) -> None:
    """Make a second derivative through `operator` an error; without this it would silently be zero."""

    def refuse(ctx: Any, *grads: torch.Tensor) -> None:
        raise RuntimeError(f"{operator} has no derivative: double backward needs kernels='eager'")

    torch.library.register_autograd(operator, refuse, lib=LIBRARY)
