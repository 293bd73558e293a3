"""A stand-in for CUDA graphs on a CPU: it records the operators of a function, and runs them again on the same memory.

As a CUDA graph, a tape knows addresses and constants: a Python number is kept as it was, a tensor is read anew. What
a graph cannot hold, an operator that hands a value to the host, is an error of the recording. Unlike a graph it does
not see kernels that are launched around PyTorch's dispatcher.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST_READS = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::_unique2", "aten::unique_dim")


def storages(values: Any) -> set[int]:
    """Addresses of the memory behind all tensors in a nest of values."""
    found = set()
    for tensor in tree_leaves(values):
        if isinstance(tensor, torch.Tensor):
            parts = (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,)
            found |= {part.untyped_storage().data_ptr() for part in parts}
    return found


class _Recording(TorchDispatchMode):
    """Runs every operator, keeps it, and keeps what memory from before held when it was first written to."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if operator._schema.name in HOST_READS:
            raise RuntimeError(f"{operator._schema.name} is not permitted when stream is capturing")
        for argument, value in zip(operator._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_leaves(value):
                    address = tensor.untyped_storage().data_ptr()
                    if address not in self._made and tensor.data_ptr() not in self.before:
                        self.before[tensor.data_ptr()] = tensor, tensor.clone()
        results = operator(*args, **kwargs)
        self._made |= storages(results) - storages((args, kwargs))
        self.calls.append((operator, args, kwargs, results))
        return results


class TapeRecorder:
    """`ctr_train.graph.Recorder` on a CPU."""

    def __init__(self) -> None:
        self.warm_ups = self.replays = 0

    def warm_up(self, function: Callable[[], torch.Tensor]) -> torch.Tensor:
        self.warm_ups += 1
        return function()

    def record(self, function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        random = torch.get_rng_state()
        with _Recording() as recording:
            result = function()
        torch.set_rng_state(random)
        with torch.no_grad():
            for tensor, content in recording.before.values():
                tensor.copy_(content)

        def replay() -> torch.Tensor:
            self.replays += 1
            with torch.no_grad():
                for operator, args, kwargs, results in recording.calls:
                    inputs = storages((args, kwargs))
                    new = operator(*args, **kwargs)
                    for kept, value in zip(tree_leaves(results), tree_leaves(new), strict=True):
                        if isinstance(kept, torch.Tensor) and not storages(kept) & inputs:
                            kept.copy_(value)
            return result

        return replay
