"""The embedding table: a module whose gradient is (ids, rows), never a table-sized tensor."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from ..backend import CHOICES, resolve
from ..library import NATIVE_ABSENT
from ..tracing import inside_export, inside_torch_func
from .operator import first_bad_id_native, lookup_in_graph, lookup_native, use_huge_pages_native
from .plan import Plan, row_gradient, start_plan


class _Lookup(torch.autograd.Function):
    """weight[ids]; the gradient is a sparse COO tensor of (ids, rows), neither coalesced nor checked again.

    Nothing here waits for a device or has shapes that depend on values.
    """

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, ids: torch.Tensor, indices: torch.Tensor, plan: Plan | None,
                backend: str, dtype: torch.dtype) -> torch.Tensor:
        ctx.save_for_backward(indices)
        ctx.table, ctx.plan = weight.shape, plan
        if backend == "native":
            try:
                return lookup_native(weight, ids, dtype)
            except RuntimeError:
                check_ids(ids, len(weight))  # as the lookup did, but this raises IndexError
                raise
        return F.embedding(ids, weight).to(dtype)  # triton, too: little is left to gain (see triton.py)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        function = _RowGradient.apply if torch.is_grad_enabled() else row_gradient  # create_graph=True, or not
        return function(indices, ctx.plan, grad.reshape(-1, ctx.table[1]), ctx.table), *[None] * 5


class _RowGradient(torch.autograd.Function):
    """`row_gradient` in a graph of gradients: without this its derivative would be an error of PyTorch's own words."""

    @staticmethod
    def forward(ctx: Any, indices: torch.Tensor, plan: Plan | None, rows: torch.Tensor,
                table: torch.Size) -> torch.Tensor:
        return row_gradient(indices, plan, rows, table)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        raise RuntimeError("the gradient of a lookup has no derivative: double backward needs kernels='eager', "
                           "and a table whose lookups have its own dtype")


class EmbeddingTable(nn.Module):
    """`weight[ids]` over a [num_rows, dim] table, with a sparse gradient for SparseSGD and its like.

    Args:
        num_rows, dim: size of the table.
        std: standard deviation of the normal initialisation of `weight`.
        device, dtype: of the table, as in `nn.Embedding`. bf16 halves its memory; the sparse optimizers then round
            stochastically.
        output_dtype: of what a lookup gives, and of the gradient's rows; None: `dtype`.
        kernels: "auto", "eager", "native" or "triton".

    forward: ids int32 or int64, any shape [...] -> [..., dim]. On CPUs an id outside [0, num_rows) raises
    IndexError with the id, its position and the table's size.

    >>> table = EmbeddingTable(100, 8)
    >>> table(torch.tensor([[1, 99]])).shape
    torch.Size([1, 2, 8])
    >>> EmbeddingTable(100, 8, dtype=torch.bfloat16, output_dtype=torch.float32)(torch.tensor([5])).dtype
    torch.float32
    """

    def __init__(self, num_rows: int, dim: int, *, std: float = 0.01, dtype: torch.dtype | None = None,
                 output_dtype: torch.dtype | None = None, kernels: str = "auto",
                 device: torch.device | str | None = None) -> None:
        super().__init__()
        if num_rows < 1 or dim < 1:
            raise ValueError(f"num_rows={num_rows}, dim={dim}: both must be at least 1")
        if kernels not in CHOICES:
            raise ValueError(f"kernels={kernels!r}: choose one of {', '.join(CHOICES)}")
        dtype = dtype or torch.get_default_dtype()
        if output_dtype not in (None, dtype, torch.float32):
            raise TypeError(f"output_dtype={output_dtype}: a table of {dtype} gives that or torch.float32")
        self.num_rows, self.dim, self.kernels, self.output_dtype = num_rows, dim, kernels, output_dtype
        self.weight = nn.Parameter(_new_memory(torch.empty(num_rows, dim, dtype=dtype, device=device)))
        nn.init.normal_(self.weight, std=std)

    @property
    def lookup_dtype(self) -> torch.dtype:
        """The dtype of what `forward` gives."""
        return self.output_dtype or self.weight.dtype

    def store_as(self, dtype: torch.dtype) -> None:
        """Keep the table in `dtype` from now on; lookups give the dtype that they gave before."""
        self.output_dtype = self.lookup_dtype
        stored = torch.empty_like(self.weight, dtype=dtype, memory_format=torch.contiguous_format)
        self.weight.data = _new_memory(stored).copy_(self.weight.detach())

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "EmbeddingTable":
        """`.double()`, `.to(dtype)` and the like convert what lookups give as they do the parameters."""
        lookups = fn(torch.empty(0, dtype=self.lookup_dtype, device=self.weight.device)).dtype
        super()._apply(fn, recurse)
        self.output_dtype = None if lookups == self.weight.dtype else lookups
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None:  # not a key: state_dicts without it load as well
            metadata["output_dtype"] = self.output_dtype

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any],
                              *others: Any) -> None:
        lookups, loaded = self.lookup_dtype, state_dict.get(f"{prefix}weight")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)
        if not local_metadata.get("assign_to_params_buffers") or loaded is None or loaded.shape != self.weight.shape:
            return
        # The table has the dtype that it had there. Where nothing says what its lookups gave, a table that is narrower
        # than the lookups of this one is taken for one that was stored so.
        narrower = loaded.dtype != lookups and torch.promote_types(loaded.dtype, lookups) == lookups
        self.output_dtype = local_metadata.get("output_dtype", lookups if narrower else None)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int32/int64 [...] -> [..., dim]."""
        if ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"ids have dtype {ids.dtype}; int32 or int64 is needed")
        if inside_export():  # a graph for inference, which needs no sparse gradient
            return F.embedding(ids, self.weight).to(self.lookup_dtype)
        if torch.compiler.is_compiling() and self.lookup_dtype == self.weight.dtype:
            self.backend()  # raises where the chosen one cannot run
            return lookup_in_graph(self.weight, ids, self.lookup_dtype)
        return self._lookup(ids)

    def backend(self) -> str:
        """What looks up and updates rows; raises as `resolve` where the chosen backend cannot."""
        weight = self.weight
        return resolve(self.kernels, weight.device, "sparse_update", weight.dtype,
                       lambda of: native_refusal(weight) if of == "native" else None)

    def operations(self, _: int) -> dict[str, str]:
        """The backend of lookups and updates."""
        return {"sparse_update": self.backend()}

    @torch.compiler.disable  # a compiled graph cannot hold a gradient of another dtype than the table's
    def _lookup(self, ids: torch.Tensor) -> torch.Tensor:
        weight, backend = self.weight, self.backend()
        if ids.device.type == "cpu" and backend != "native":
            check_ids(ids, len(weight))
        return lookup(weight, ids, self.lookup_dtype, backend)

    def extra_repr(self) -> str:
        return f"{self.num_rows}, {self.dim}, dtype={self.weight.dtype}, kernels={self.kernels!r}"


def native_refusal(weight: torch.Tensor) -> str | None:
    """Why the native kernels do not take the table [num_rows, dim]; None: they do."""
    if weight.dim() != 2:
        return f"the table has shape {tuple(weight.shape)}; [num_rows, dim] is needed"
    if weight.is_contiguous():
        return None
    return f"the table has strides {weight.stride()}; kernels='native' needs a contiguous one"


def lookup(weight: torch.Tensor, ids: torch.Tensor, dtype: torch.dtype, backend: str) -> torch.Tensor:
    """weight[ids] in `dtype`, [..., dim], by a backend that was resolved; the gradient's rows have that dtype, too."""
    if inside_torch_func():
        return F.embedding(ids, weight).to(dtype)  # vmap has no sparse tensors: the gradient is dense
    if backend == "eager" and dtype == weight.dtype:
        wants_rows(weight, dtype)
        return F.embedding(ids, weight, sparse=True)
    indices = ids.reshape(1, -1).long()
    trains = wants_rows(weight, dtype)
    plan = start_plan(weight, indices) if trains and backend == "triton" else None
    return _Lookup.apply(weight, ids, indices, plan, backend, dtype)


def wants_rows(weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a lookup in `weight` will have a gradient; its rows may then be of `dtype`, whatever the table's."""
    trains = weight.requires_grad and torch.is_grad_enabled()
    if trains and weight.is_leaf and weight.grad_dtype != dtype:
        weight.grad_dtype = dtype  # or autograd would round the rows to another dtype
    return trains


def _new_memory(table: torch.Tensor) -> torch.Tensor:
    """`table`, which nothing was written to yet, in huge pages if it is in the memory of a CPU."""
    if NATIVE_ABSENT is None and table.device.type == "cpu" and not isinstance(table, FakeTensor):
        use_huge_pages_native(table.detach())
    return table


def check_ids(ids: torch.Tensor, num_rows: int) -> None:
    """IndexError that names the first id outside [0, num_rows), its position and the size of the table."""
    if inside_export() or inside_torch_func() or isinstance(ids, FakeTensor) or ids.numel() == 0:
        return
    if NATIVE_ABSENT is None and ids.device.type == "cpu":
        first = first_bad_id_native(ids, num_rows)
    else:
        wrong = ((ids < 0) | (ids >= num_rows)).flatten()
        first = int(wrong.int().argmax()) if wrong.any() else -1
    if first >= 0:
        position = [int(i) for i in torch.unravel_index(torch.tensor(first), ids.shape)]
        raise IndexError(f"id {ids.flatten()[first].item()} at position {position} is outside the table of "
                         f"{num_rows} rows")
