"""The two optimizers of a model: sparse row updates for the embedding tables, AdamW for all else."""

import torch

from ctr_kernels import SparseRowwiseAdagrad, SparseSGD
from ctr_models import CTRModel

EMBEDDING_OPTIMIZERS = {"sgd": SparseSGD, "rowwise-adagrad": SparseRowwiseAdagrad}


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
        embedding_optimizer: "sgd" or "rowwise-adagrad"; only rows of the step are read or written.
        kernels: backend of the row updates.
    """
    if embedding_optimizer not in EMBEDDING_OPTIMIZERS:
        raise ValueError(f"embedding_optimizer={embedding_optimizer!r}: choose one of "
                         f"{', '.join(EMBEDDING_OPTIMIZERS)}")
    rows = EMBEDDING_OPTIMIZERS[embedding_optimizer](model.embedding_parameters(), lr=embedding_lr, kernels=kernels)
    return [rows, torch.optim.AdamW(model.dense_parameter_groups(weight_decay), lr=lr)]
