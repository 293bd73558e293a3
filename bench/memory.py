"""Where the memory of a training step goes, computed and measured, and the largest batch that fits in a GPU."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import click
import torch
from common.harness import peak_memory, saved_tensors
from common.options import Settings, bench_options
from common.peers import version_of
from common.records import Row
from common.training import NUM_EMBEDDINGS, optimizers_of, random_batch, training_step
from torch.nn import functional as F

from ctr_kernels import TransformerLayer
from ctr_models import MODELS, CTRModel
from ctr_train.command import run_command

FIELDS, IDS, DIM, HEADS, DROPOUT = 27, 26, 64, 4, 0.1  # the baseline study's; the FT-Transformer pools by the mean
LAYERS = {"ft": (4 * DIM, "pre", "gelu"), "autoint": (2 * DIM, "post", "relu")}  # hidden width, norm, activation
# Provider -> (kernels of the model, optimizer of the tables); see common/training.py.
REGIMES = {"eager + AdamW on all": ("eager", "AdamW"), "eager + SGD on rows": ("eager", "rows"),
           "ours": ("auto", "rows")}
CAPACITIES = (8, 16, 24, 80)  # GB of 10^9 bytes


def layer_rows(name: str, s: Settings) -> Iterator[Row]:
    """What autograd keeps of one layer, by kind; computed: one fp32 copy of each, none of what ours recomputes."""
    batch, (hidden, norm, activation) = s.batch, LAYERS[name]
    token = batch * FIELDS * DIM  # elements of a tensor [B, F, D]
    one_copy = {"attention map": batch * HEADS * FIELDS**2, "Q, K, V": 3 * token, "FFN hidden": batch * FIELDS * hidden}

    def kind(tensor: torch.Tensor) -> str:
        """By size; copies of Q, K and V for each head have tokens' size, but the head's width as a dimension."""
        if tensor.numel() == 3 * token or DIM // HEADS in tensor.shape[-2:]:
            return "Q, K, V"
        return {one_copy["attention map"]: "attention map", one_copy["FFN hidden"]: "FFN hidden",
                token: "tokens"}.get(tensor.numel(), "rest")

    x = torch.randn(batch, FIELDS, DIM, device=s.device, requires_grad=True)
    for provider, kernels in s.choose({"eager": "eager", "ours": "auto"}).items():
        layer = TransformerLayer(DIM, HEADS, hidden, norm=norm, activation=activation, dropout=DROPOUT,
                                 kernels=kernels).to(s.device)
        kept = dict.fromkeys([*one_copy, "tokens", "rest"], 0)
        for tensor in saved_tensors(functools.partial(layer, x), exclude=layer.parameters()):
            kept[kind(tensor)] += tensor.untyped_storage().nbytes()
        for mode, measured in {**kept, "layer, in all": sum(kept.values())}.items():
            recomputed = provider == "ours" and mode in ("attention map", "FFN hidden")
            computed = 0.0 if recomputed else 4 * one_copy[mode] / 1e6 if mode in one_copy else None
            yield Row(f"memory {name} layer", provider, mode, f"B={batch}", computed_mb=computed,
                      memory_mb=measured / 1e6, version=version_of(provider, s.device))


@dataclass
class Need:
    """Bytes of a training step of B rows: fixed + max(of_batch + B * of_row, optimizer).

    Attributes:
        fixed: parameters and optimizer state.
        of_batch, of_row: peak of forward and backward, gradients included.
        optimizer: gradients and the optimizers' own temporaries, where they do not depend on the batch.
    """

    fixed: float
    of_batch: float
    of_row: float
    optimizer: float

    def bytes(self, batch: int) -> float:
        return self.fixed + max(self.of_batch + self.of_row * batch, self.optimizer)

    def largest_batch(self, capacity: float) -> int:
        """0 where not even one row fits."""
        if self.fixed + self.optimizer > capacity:
            return 0
        return max(0, int((capacity - self.fixed - self.of_batch) / self.of_row))


def model_rows(name: str, s: Settings) -> Iterator[Row]:
    """The whole model in each regime: table, its gradient, optimizer state, a whole step, and the batches that fit."""
    for provider, (kernels, tables) in s.choose(REGIMES).items():
        model = MODELS[name](num_embeddings=NUM_EMBEDDINGS, kernels=kernels, dropout=DROPOUT,
                             **({"pooling": "mean"} if name == "ft" else {})).to(s.device)
        half, whole = (peak_memory(functools.partial(gradients, model, rows, s.device), device=s.device)
                       for rows in (s.batch // 2, s.batch))
        of_row = (whole - half) / (s.batch - s.batch // 2)
        optimizers = optimizers_of(model, tables, kernels)
        step = training_step(model, optimizers, False, random_batch(s.batch, s.device), torch.float32)
        step()  # makes the state
        peak = peak_memory(step, device=s.device)
        parameters = sum(4 * p.numel() for p in model.parameters())
        (weight,) = model.embedding_parameters()
        table, table_gradient = 4 * weight.numel(), gradients(model, s.batch, s.device)[weight]
        state = sum(value.untyped_storage().nbytes() for optimizer in optimizers
                    for values in optimizer.state.values() for value in values.values() if torch.is_tensor(value))
        need = Need(parameters + state, whole - of_row * s.batch, of_row,
                    _update_peak(optimizers[-1], s.device))
        row = functools.partial(Row, f"memory {name}", provider, x=f"B={s.batch}",
                                version=version_of(provider, s.device))
        for mode, computed, measured in (
            ("embedding table", 4 * NUM_EMBEDDINGS * weight.shape[1], table),
            ("gradient of the table", table if tables == "AdamW" else s.batch * IDS * (4 * weight.shape[1] + 8),
             table_gradient),
            ("optimizer state", 2 * (parameters if tables == "AdamW" else parameters - table), state),
            ("step, in all", need.bytes(s.batch), parameters + state + peak),
        ):
            yield row(mode=mode, computed_mb=computed / 1e6, memory_mb=measured / 1e6)
        for capacity in CAPACITIES:
            yield row(mode=f"largest batch in {capacity} GB", rows=need.largest_batch(capacity * 1e9))


def gradients(model: CTRModel, rows: int, device: torch.device) -> dict[torch.nn.Parameter, int]:
    """Bytes of every parameter's gradient after one forward and backward; they are released."""
    dense, sparse, label = random_batch(rows, device)
    F.binary_cross_entropy_with_logits(model(dense, sparse), label).backward()
    sizes = {}
    for parameter in model.parameters():
        grad = parameter.grad
        assert grad is not None
        parts = [grad._indices(), grad._values()] if grad.is_sparse else [grad]
        sizes[parameter] = sum(part.nbytes for part in parts)
    model.zero_grad()
    return sizes


def _update_peak(optimizer: torch.optim.Optimizer, device: torch.device) -> float:
    """Bytes of dense gradients of all that the optimizer updates, and of what its step allocates on top of them."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    extra = peak_memory(optimizer.step, device=device)
    optimizer.zero_grad()
    return sum(4 * parameter.numel() for parameter in parameters) + extra


@click.command()
@click.option("--models", default="ft,autoint,dcnv2", show_default=True, help="Comma-separated.")
@bench_options
def main(settings: Settings, models: str) -> None:
    """Take stock of what autograd keeps of a layer, and of a whole training step; in fp32, with dropout 0.1.

    `computed` has the formulas: one copy of each tensor of a layer; and for a whole step a straight line through the
    peaks of forward and backward at half the batch and the whole one. The largest batches follow from that line, and
    leave nothing for a CUDA context or for fragmentation. --fields, --dim, --heads and --dtype do not apply.
    """
    names = models.split(",")
    for name in names:
        if name not in MODELS:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(MODELS)}", param_hint="--models")
    rows = [row for name in names if name in LAYERS for row in layer_rows(name, settings)]
    settings.finish([*rows, *(row for name in names for row in model_rows(name, settings))])


if __name__ == "__main__":
    run_command(main, "bench/memory.py")
