"""torch.compile's Inductor and gradients that are sparse tensors."""

import sys

import torch


def let_inductor_hold_sparse_tensors() -> None:
    """Inductor compares the storages of the fake tensors that it renews, and fails at a sparse one, which has none.

    As of torch 2.13 (`torch._inductor.fx_utils.get_storage`). Where that function is loaded, a sparse tensor is from
    now on a storage of its own; a version without it needs nothing.
    """
    module = sys.modules.get("torch._inductor.fx_utils")
    of_dense = getattr(module, "get_storage", None)
    if module is None or of_dense is None or hasattr(of_dense, "of_dense"):
        return

    def get_storage(t: torch.Tensor) -> int:
        return int(of_dense(t)) if t.layout == torch.strided else id(t)

    get_storage.of_dense = of_dense  # type: ignore[attr-defined]
    module.get_storage = get_storage  # type: ignore[attr-defined]
