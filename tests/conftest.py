"""Fixtures of all tests: the fused backends to be held against the reference, each with all it can run here."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from triton_interpreter import INTERPRETED

from ctr_kernels.library import NATIVE_ABSENT

SIMD_LEVELS = ("avx512", "avx2", "baseline")


def simd_levels() -> list[str]:
    """The instruction sets of the native kernels that this machine runs, best first."""
    if NATIVE_ABSENT is not None:
        return []
    active = torch.ops.ctr.select_simd("")
    found = []
    for level in SIMD_LEVELS:
        try:
            found.append(torch.ops.ctr.select_simd(level))
        except RuntimeError:
            continue
    torch.ops.ctr.select_simd(active)
    return found


def fused_backends() -> list[Any]:
    """Parameters of `fused`: each instruction set of the native kernels; in Triton's interpreter, Triton's."""
    if INTERPRETED:
        return ["triton"]
    absent = pytest.param("", marks=pytest.mark.skip(reason=f"native: {NATIVE_ABSENT}"))
    return simd_levels() or [absent]


@pytest.fixture(params=fused_backends())
def fused(request: pytest.FixtureRequest) -> Iterator[str]:
    """The `kernels=` of a fused backend, set to one instruction set after the other."""
    if request.param == "triton":
        yield "triton"
        return
    active = torch.ops.ctr.select_simd("")
    torch.ops.ctr.select_simd(request.param)
    yield "native"
    torch.ops.ctr.select_simd(active)
