"""What Triton kernels load and store, counted address by address in Triton's interpreter."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch


def counting(monkeypatch: pytest.MonkeyPatch) -> dict[str, Counter]:
    """Counters of the addresses that kernels load and store from now on."""
    from triton.runtime.interpreter import interpreter_builder as builder

    accesses = {"load": Counter(), "store": Counter()}

    def counted(kind: str, original: Callable) -> Callable:
        def access(pointers, *arguments):
            mask = arguments[0 if kind == "load" else 1].data.astype(bool)
            accesses[kind].update(np.broadcast_to(pointers.data, mask.shape)[mask].ravel().tolist())
            return original(pointers, *arguments)
        return access

    for kind in accesses:
        name = f"create_masked_{kind}"
        monkeypatch.setattr(builder, name, counted(kind, getattr(builder, name)))
    return accesses


def times(found: Counter, tensor: torch.Tensor) -> set[int]:
    """How often the elements of a tensor, or of a view of one, were touched."""
    offsets = torch.zeros(tensor.shape, dtype=torch.int64)
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        offsets += (torch.arange(size) * stride).view([-1 if i == dim else 1 for i in range(tensor.dim())])
    return {found[tensor.data_ptr() + tensor.element_size() * i] for i in offsets.flatten().tolist()}
