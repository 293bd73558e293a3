"""The two optimizers of a model: sparse row updates for the embedding tables, AdamW for all else."""

from typing import Any

import torch

from ctr_kernels import SparseAdagrad, SparseLazyAdam, SparseRowwiseAdagrad, SparseSGD
from ctr_models import CTRModel

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
) -> list[torch.optim.Optimizer]:
    """[optimizer of the tables, AdamW of the rest]; norms, biases and the CLS token do not decay.

    Args:
        embedding_optimizer: a key of EMBEDDING_OPTIMIZERS; only rows of the step are read or written.
        kernels: backend of the row updates.
    """
    if embedding_optimizer not in EMBEDDING_OPTIMIZERS:
        raise ValueError(f"embedding_optimizer={embedding_optimizer!r}: choose one of "
                         f"{', '.join(EMBEDDING_OPTIMIZERS)}")
    rows = EMBEDDING_OPTIMIZERS[embedding_optimizer](model.embedding_parameters(), lr=embedding_lr, kernels=kernels)
    groups = model.dense_parameter_groups(weight_decay)
    on_cuda = any(parameter.device.type == "cuda" for group in groups for parameter in group["params"])
    return [rows, torch.optim.AdamW(groups, lr=lr, fused=True, capturable=on_cuda)]


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`optimizer.load_state_dict(state)`, whatever device the state was saved on."""
    groups = [{**saved, **{flag: group[flag] for flag in MACHINE_FLAGS if flag in group}}
              for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True)]
    optimizer.load_state_dict({**state, "param_groups": groups})
