"""Training steps of whole models, as the scripts time and weigh them."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from ctr_kernels import EmbeddingTable, SparseSGD
from ctr_models import CTRModel

NUM_EMBEDDINGS = 2_000_000
WEIGHT_DECAY = 0.01


def optimizers_of(model: CTRModel, tables: str, kernels: str) -> list[torch.optim.Optimizer]:
    """tables="rows": SparseSGD for the tables, AdamW for the rest; "AdamW": it alone, whose state is twice the model.

    AdamW takes no sparse gradient, so that the lookup is then one whose gradient is dense.
    """
    if tables == "rows":
        return [SparseSGD(model.embedding_parameters(), lr=0.01, kernels=kernels),
                torch.optim.AdamW(model.dense_parameter_groups(WEIGHT_DECAY), lr=1e-3, fused=_on_cuda(model) or None)]
    for module in model.modules():
        if isinstance(module, EmbeddingTable):
            module.forward = functools.partial(F.embedding, weight=module.weight)
    return [torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=WEIGHT_DECAY, fused=_on_cuda(model) or None)]


def _on_cuda(model: CTRModel) -> bool:
    """Where the rivals too get the fused AdamW."""
    return next(model.parameters()).device.type == "cuda"


def training_step(model: CTRModel, optimizers: Sequence[torch.optim.Optimizer], compiled: bool,
                  batch: Sequence[torch.Tensor], precision: torch.dtype) -> Callable[[], list[torch.Tensor]]:
    """A call that takes one step on (dense, sparse, label) and returns the loss; in autocast below fp32."""
    dense, sparse, label = batch
    forward = torch.compile(model, dynamic=False) if compiled else model

    def run() -> list[torch.Tensor]:
        with torch.autocast(dense.device.type, precision, enabled=precision != torch.float32):
            loss = F.binary_cross_entropy_with_logits(forward(dense, sparse).float(), label)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return [loss.detach()]

    return run


def random_batch(rows: int, device: torch.device) -> list[torch.Tensor]:
    """dense [B, 13], ids [B, 26] uniform over the table, labels [B]."""
    dense, sparse = torch.rand(rows, 13), torch.randint(NUM_EMBEDDINGS, (rows, 26))
    return [x.to(device) for x in (dense, sparse, (torch.rand(rows) < 0.25).float())]
