"""Training steps of whole models, as the scripts time and weigh them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from ctr_kernels import EmbeddingTable, SparseSGD
from ctr_models import CTRModel
from ctr_train.checkpoint import build_model
from ctr_train.data.artifacts import Artifacts
from ctr_train.optim import make_optimizers
from ctr_train.recipes import DEFAULT, resolve_recipe

NUM_EMBEDDINGS = 2_000_000
STATISTICS = Artifacts(history=True).num_statistics  # of each field, in rows prepared for the default recipe
WEIGHT_DECAY = 0.01
CLICK_RATE = 0.25
# Optimizers of the baseline study, for `recipe_optimizers`.
STUDY = {"embedding_optimizer": "sgd", "embedding_lr": 0.01, "embedding_weight_decay": 0.0, "lr": 1e-3,
         "weight_decay": WEIGHT_DECAY}


def optimizers_of(model: CTRModel, tables: str, kernels: str) -> list[torch.optim.Optimizer]:
    """tables="rows": SparseSGD for the tables, AdamW for the rest; "AdamW": it alone, whose state is twice the model.

    AdamW takes no sparse gradient, so that the lookup is then one whose gradient is dense.
    """
    if tables == "rows":
        return [SparseSGD(model.embedding_parameters(), lr=0.01, kernels=kernels),
                torch.optim.AdamW(model.dense_parameter_groups(WEIGHT_DECAY), lr=1e-3, fused=_on_cuda(model) or None)]
    for module in model.modules():
        if isinstance(module, EmbeddingTable):
            module.forward = functools.partial(F.embedding, weight=module.weight)  # type: ignore[method-assign]
    return [torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=WEIGHT_DECAY, fused=_on_cuda(model) or None)]


def _on_cuda(model: CTRModel) -> bool:
    """Where the rivals too get the fused AdamW."""
    return next(model.parameters()).device.type == "cuda"


def default_recipe(name: str, **overrides: Any) -> dict[str, Any]:
    """What `ctr-train --model NAME` trains with: the name and the hyperparameters of the default recipe."""
    return {"model": name, **resolve_recipe(DEFAULT, name, overrides)}


def recipe_model(config: dict[str, Any], kernels: str, num_embeddings: int) -> CTRModel:
    """The model of such a config for rows with two statistics of each field behind their 13 numbers."""
    return build_model(config, Artifacts(hash_bins=num_embeddings, history=True), kernels)


def recipe_optimizers(model: CTRModel, config: dict[str, Any], kernels: str) -> list[torch.optim.Optimizer]:
    """The optimizers that `ctr-train` makes: of the tables, and AdamW of the rest."""
    names = ("embedding_optimizer", "embedding_lr", "embedding_weight_decay", "lr", "weight_decay")
    return make_optimizers(model, kernels=kernels, **{name: config[name] for name in names})


def training_step(model: CTRModel, optimizers: Sequence[torch.optim.Optimizer], compiled: bool,
                  batch: Sequence[torch.Tensor], precision: torch.dtype) -> Callable[[], list[torch.Tensor]]:
    """A call that takes one step on (dense, sparse, label) and returns the loss; in autocast below fp32.

    Labels are drawn anew each time: a batch learnt by heart has denormal gradients, on which some CPUs are ten times
    as slow.
    """
    dense, sparse, label = batch[0], batch[1], batch[2].clone()
    forward = torch.compile(model, dynamic=False) if compiled else model

    def run() -> list[torch.Tensor]:
        label.bernoulli_(CLICK_RATE)
        with torch.autocast(dense.device.type, precision, enabled=precision != torch.float32):
            loss = F.binary_cross_entropy_with_logits(forward(dense, sparse).float(), label)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return [loss.detach()]

    return run


def random_batch(rows: int, device: torch.device, statistics: int = 0) -> list[torch.Tensor]:
    """dense [B, 13 + 26 statistics], ids [B, 26] uniform over the table, labels [B]."""
    dense, sparse = torch.rand(rows, 13 + 26 * statistics), torch.randint(NUM_EMBEDDINGS, (rows, 26))
    return [x.to(device) for x in (dense, sparse, (torch.rand(rows) < CLICK_RATE).float())]
