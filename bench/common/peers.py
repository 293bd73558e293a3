"""Rivals: how they are compiled, which version they are, and what is said of one that is not here."""

import importlib
from collections.abc import Callable
from importlib import metadata
from types import ModuleType
from typing import Any

import torch

from ctr_kernels import backends

# How `torch.compile` is asked to compile. CUDA graphs are left to nobody here: they would copy the inputs of a call.
COMPILED = {"compile": "default", "compile max-autotune": "max-autotune-no-cudagraphs"}
PACKAGES = {"FBGEMM": ("fbgemm-gpu", "fbgemm-gpu-cpu")}


class Unavailable(Exception):
    """A rival cannot take part here; its row shows the message."""


def need(module: str) -> ModuleType:
    """The imported module of a rival, or Unavailable."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
            raise Unavailable("not installed: make bench-peers") from None
        raise Unavailable(f"cannot be imported: {error}") from None


def compiled(function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """provider -> `function` compiled in that way; for one shape only, and whole or not at all."""
    from torch._inductor import config  # importing it takes a second, which scripts without a compiler do not need

    config.autotune_num_choices_displayed = 0  # else max-autotune prints all that it tries
    config.max_autotune_report_choices_stats = False
    return {name: torch.compile(function, mode=mode, dynamic=False, fullgraph=True) for name, mode in COMPILED.items()}


def version_of(provider: str, device: torch.device) -> str:
    """Package and version of a provider: ours with the backend that runs on the device; torch if no other is known."""
    if provider.startswith("ours"):
        kind = "triton" if device.type == "cuda" else "native"
        level = backends()[kind].level
        return f"ctr-kernels {installed('ctr-kernels') or 'checkout'}, {f'{kind} {level}' if level else 'eager'}"
    for name, packages in PACKAGES.items():
        if provider.startswith(name):
            return next((f"{p} {installed(p)}" for p in packages if installed(p)), "")
    return f"torch {torch.__version__}"


def installed(package: str) -> str:
    """Version of a distribution; "" where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
