"""The two optimizers of a model, sparse row updates for the tables and AdamW for all else; and a step of training."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from ctr_kernels import SparseAdagrad, SparseLazyAdam, SparseRowwiseAdagrad, SparseSGD
from ctr_models import CTRModel

if TYPE_CHECKING:
    from .average import WeightAverage
    from .data.loader import Batch

EMBEDDING_OPTIMIZERS = {"sgd": SparseSGD, "rowwise-adagrad": SparseRowwiseAdagrad, "adagrad": SparseAdagrad,
                        "lazy-adam": SparseLazyAdam}
MACHINE_FLAGS = ("foreach", "fused", "capturable")  # of a param group: how the device computes, not what


def make_optimizers(
    model: CTRModel,
    *,
    embedding_optimizer: str,
    embedding_lr: float,
    lr: float,
    weight_decay: float,
    kernels: str,
    embedding_weight_decay: float = 0.0,
) -> list[torch.optim.Optimizer]:
    """[optimizer of the tables, AdamW of the rest]; norms, biases and the CLS token do not decay.

    Args:
        embedding_optimizer: a key of EMBEDDING_OPTIMIZERS; only rows of the step are read or written.
        kernels: backend of the row updates.
        embedding_weight_decay: of table rows, scaled by the steps since they were touched last.
    """
    if embedding_optimizer not in EMBEDDING_OPTIMIZERS:
        raise ValueError(f"embedding_optimizer={embedding_optimizer!r}: choose one of "
                         f"{', '.join(EMBEDDING_OPTIMIZERS)}")
    decay = {"weight_decay": embedding_weight_decay, "decay_untouched": True} if embedding_weight_decay else {}
    rows = EMBEDDING_OPTIMIZERS[embedding_optimizer](model.embedding_parameters(), lr=embedding_lr, kernels=kernels,
                                                     **decay)
    groups = model.dense_parameter_groups(weight_decay)
    on_cuda = any(parameter.device.type == "cuda" for group in groups for parameter in group["params"])
    return [rows, torch.optim.AdamW(groups, lr=lr, fused=True, capturable=on_cuda)]


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`optimizer.load_state_dict(state)`, whatever device the state was saved on."""
    groups = [{**saved, **{flag: group[flag] for flag in MACHINE_FLAGS if flag in group}}
              for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True)]
    optimizer.load_state_dict({**state, "param_groups": groups})


def update(model: CTRModel, optimizers: Sequence[torch.optim.Optimizer], batch: "Batch", *,
           precision: str, average: "WeightAverage | None" = None) -> torch.Tensor:
    """Train on a batch, forward to both optimizers; the loss [] of the weights before, on the device.

    precision: "bf16" for autocast. average: takes in the new weights. Nothing here waits for a GPU.
    """
    with torch.autocast(batch.dense.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        logits = model(batch.dense, batch.sparse)
    loss = F.binary_cross_entropy_with_logits(logits.float(), batch.label)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # now, so that the next forward pass has that memory
    if average is not None:
        average.update()
    return loss.detach()
