"""The embedding table: a module whose gradient is (ids, rows), never a table-sized tensor."""

import torch
from torch import nn
from torch.nn import functional as F

from ..backend import CHOICES, resolve
from ..library import NATIVE_ABSENT
from .native import embedding_lookup_native, first_bad_id_native, use_huge_pages_native


class EmbeddingTable(nn.Module):
    """`weight[ids]` over a [num_rows, dim] table, with a sparse gradient for SparseSGD and its like.

    Args:
        num_rows, dim: size of the table.
        std: standard deviation of the normal initialisation of `weight`.
        kernels: "auto", "eager", "native" or "triton".

    forward: ids int32 or int64, any shape [...] -> [..., dim]. On CPUs an id outside [0, num_rows) raises
    IndexError with the id, its position and the table's size.

    >>> table = EmbeddingTable(100, 8)
    >>> table(torch.tensor([[1, 99]])).shape
    torch.Size([1, 2, 8])
    """

    def __init__(self, num_rows: int, dim: int, *, std: float = 0.01, kernels: str = "auto") -> None:
        super().__init__()
        if num_rows < 1 or dim < 1:
            raise ValueError(f"num_rows={num_rows}, dim={dim}: both must be at least 1")
        if kernels not in CHOICES:
            raise ValueError(f"kernels={kernels!r}: choose one of {', '.join(CHOICES)}")
        self.num_rows, self.dim, self.kernels = num_rows, dim, kernels
        self.weight = nn.Parameter(torch.empty(num_rows, dim))
        if NATIVE_ABSENT is None and self.weight.device.type == "cpu":
            use_huge_pages_native(self.weight.detach())
        nn.init.normal_(self.weight, std=std)

    @torch.compiler.disable  # a compiled graph cannot hold the sparse gradient: torch.compile leaves the table out
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int32/int64 [...] -> [..., dim]."""
        if ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"ids have dtype {ids.dtype}; int32 or int64 is needed")
        backend = resolve(self.kernels, self.weight.device, "sparse_update", self.weight.dtype)
        if ids.device.type == "cpu":
            check_ids(ids, self.num_rows)
        if backend == "native":
            return embedding_lookup_native(self.weight, ids)
        return F.embedding(ids, self.weight, sparse=True)  # triton, too: nothing is left to gain (see triton.py)

    def extra_repr(self) -> str:
        return f"{self.num_rows}, {self.dim}, kernels={self.kernels!r}"


def check_ids(ids: torch.Tensor, num_rows: int) -> None:
    """IndexError that names the first id outside [0, num_rows), its position and the size of the table."""
    if ids.numel() == 0:
        return
    if NATIVE_ABSENT is None:
        first = first_bad_id_native(ids, num_rows)
    else:
        wrong = ((ids < 0) | (ids >= num_rows)).flatten()
        first = int(wrong.int().argmax()) if wrong.any() else -1
    if first >= 0:
        position = [int(i) for i in torch.unravel_index(torch.tensor(first), ids.shape)]
        raise IndexError(f"id {ids.flatten()[first].item()} at position {position} is outside the table of "
                         f"{num_rows} rows")
