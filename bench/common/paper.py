"""The training step of FT-Transformer as its paper has it, ours and that of rtdl_revisiting_models, its authors' own.

39 tokens and CLS, width 192, 8 heads, 3 blocks, ReGLU of 256 units: the default of rtdl_revisiting_models. Tables of
1,000 rows a field: with large ones, a dense gradient of the table would be most of the authors' step.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ctr_models import FTTransformer

from .peers import need
from .training import CLICK_RATE, optimizers_of, training_step

FIELDS, FEATURES, ROWS = 26, 13, 1000
DIM, HEADS, BLOCKS = 192, 8, 3
TOKENS = FIELDS + FEATURES + 1
# Multiplications and additions of a row forward: of the blocks' projections, maps and FFNs, of which the last one has a
# single query and a single token; and twice as many for backward.
FLOPS = 3.0 * 2 * ((BLOCKS - 1) * TOKENS * (4 * DIM * DIM + 2 * TOKENS * DIM + 3 * DIM * 256)
                   + TOKENS * (2 * DIM * DIM + 2 * DIM) + 2 * DIM * DIM + 3 * DIM * 256)


def batch(rows: int, device: torch.device) -> list[torch.Tensor]:
    """dense [B, 13], ids [B, 26] below 1,000, labels [B]."""
    drawn = torch.rand(rows, FEATURES), torch.randint(ROWS, (rows, FIELDS)), (torch.rand(rows) < CLICK_RATE).float()
    return [x.to(device) for x in drawn]


def ours(kernels: str, of: list[torch.Tensor], precision: torch.dtype, compiled: bool) -> Callable[..., Any]:
    """A call that trains our model, the tables by rows."""
    model = FTTransformer(variant="paper", num_embeddings=FIELDS * ROWS, tables="per-field", dim=DIM, num_heads=HEADS,
                          num_layers=BLOCKS, dropout=0.0, kernels=kernels).to(of[0].device)
    return training_step(model, optimizers_of(model, "rows", kernels), compiled, of, precision)


def theirs(of: list[torch.Tensor], precision: torch.dtype, compiled: bool) -> Callable[..., Any]:
    """A call that trains the authors' model, all of it by AdamW as they do."""
    library = need("rtdl_revisiting_models")
    model: nn.Module = library.FTTransformer(
        n_cont_features=FEATURES, cat_cardinalities=[ROWS] * FIELDS, d_out=1, n_blocks=BLOCKS, d_block=DIM,
        attention_n_heads=HEADS, attention_dropout=0.0, ffn_d_hidden=None, ffn_d_hidden_multiplier=4 / 3,
        ffn_dropout=0.0, residual_dropout=0.0).to(of[0].device)
    cuda = of[0].device.type == "cuda"
    optimizer = torch.optim.AdamW(model.make_parameter_groups(), lr=1e-4, weight_decay=1e-5, fused=cuda or None)
    forward, (dense, sparse, label) = (torch.compile(model, dynamic=False) if compiled else model), of

    def run() -> list[torch.Tensor]:
        label.bernoulli_(CLICK_RATE)
        with torch.autocast(dense.device.type, precision, enabled=precision != torch.float32):
            loss = F.binary_cross_entropy_with_logits(forward(dense, sparse).squeeze(-1).float(), label)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return [loss.detach()]

    return run
