"""FT-Transformer: every feature is a token, a transformer mixes them, one token or their mean gives the logit."""

from collections.abc import Sequence

import torch
from torch import nn

from ctr_kernels import TransformerLayer

from .base import CTRModel, LogitLinear, logit_shortcut, study_head
from .checks import check_attention, check_choice, check_dropout, check_positive
from .tokenizer import FeatureTokenizer

POOLINGS = ("cls", "mean")


class FTTransformer(CTRModel):
    """FT-Transformer in the form of the baseline study, or of its paper (Gorishniy et al. 2021, section 3.3).

    variant="study": 26 categorical tokens and one dense token, CLS in front if pooling="cls"; pre-norm layers
        with FFN 4 dim and GELU (erf); pooling, LayerNorm, Linear(dim, dim), ReLU, Linear(dim, 1).
    variant="paper": as rtdl_revisiting_models has it. A token for each numeric feature, a bias for each
        categorical field, CLS; pre-norm blocks, the first one without a norm before its attention; ReGLU FFN of
        hidden width int(4 dim / 3); LayerNorm, ReLU, Linear(dim, 1) on CLS.

    Args:
        num_embeddings, tables: rows of memory for embeddings, and how the fields share them ("shared" or
            "per-field"); see FieldEmbedding.
        dim: width of a token.
        num_dense, num_sparse: number of numeric features and of categorical fields.
        num_layers, num_heads: None means 2 and 4 (study), 3 and 8 (paper); num_heads divides dim.
        dropout: on attention weights and hidden units of the FFN, and in the study's head; none in eval().
        pooling: "cls" or "mean" (the latter in the study variant only, without a CLS token).
        numeric, numeric_edges: how numeric features become tokens, "token" (one for all, 27 in all for Criteo),
            "affine", "scaled", "periodic" or "piecewise" (one each, 39); see FeatureTokenizer. None means "token"
            (study), "affine" (paper).
        history, history_moments, embedding_dropout: see FeatureTokenizer.
        embedding_std: standard deviation of the initial embeddings; None means 0.01 (study),
            1 / sqrt(3 dim) (paper: that of its uniform initialisation; drawn from a normal here).
        shortcut: a second way from the tokens to the logit, past the layers, "none", "linear", "mlp" or "cross"; see
            logit_shortcut.
        kernels: "auto", "eager", "native" or "triton"; passed on to every operation.

    forward: dense [B, num_dense + history * num_sparse] float, sparse [B, num_sparse] int32 or int64 -> logits [B].

    Raises ValueError (arguments, shapes), TypeError (dtypes), IndexError (an id outside the table, on CPUs).

    >>> model = FTTransformer(num_embeddings=1000, pooling="mean")
    >>> model(torch.rand(2, 13), torch.randint(1000, (2, 26))).shape
    torch.Size([2])
    """

    def __init__(
        self,
        *,
        num_embeddings: int = 2_000_000,
        dim: int = 64,
        num_dense: int = 13,
        num_sparse: int = 26,
        num_layers: int | None = None,
        num_heads: int | None = None,
        dropout: float = 0.1,
        variant: str = "study",
        pooling: str = "cls",
        tables: str = "shared",
        numeric: str | None = None,
        numeric_edges: Sequence[Sequence[float]] | None = None,
        history: int = 0,
        history_moments: Sequence[Sequence[float]] | None = None,
        embedding_dropout: float = 0.0,
        embedding_std: float | None = None,
        shortcut: str = "none",
        kernels: str = "auto",
    ) -> None:
        super().__init__()
        check_choice("variant", variant, ("study", "paper"))
        check_choice("pooling", pooling, POOLINGS)
        check_dropout(dropout)
        paper = variant == "paper"
        if paper and pooling != "cls":
            raise ValueError(f"pooling={pooling!r}: variant='paper' reads its CLS token; choose pooling='cls'")
        if num_layers is None:
            num_layers = 3 if paper else 2
        if num_heads is None:
            num_heads = 8 if paper else 4
        if numeric is None:
            numeric = "affine" if paper else "token"
        if embedding_std is None:
            embedding_std = (3 * dim) ** -0.5 if paper else 0.01
        check_positive(num_layers=num_layers)
        self.pooling = pooling
        self.tokenizer = FeatureTokenizer(
            num_embeddings=num_embeddings, dim=dim, num_dense=num_dense, num_sparse=num_sparse,
            dense=numeric, numeric_edges=numeric_edges, history=history, history_moments=history_moments,
            embedding_dropout=embedding_dropout,
            field_bias=paper, cls=pooling == "cls", tables=tables, std=embedding_std, kernels=kernels,
        )
        check_attention(dim, num_heads, self.tokenizer.num_tokens, kernels, spare_cls=pooling == "cls" and not paper)
        if paper:
            self.layers = nn.ModuleList(
                paper_block(dim, num_heads, first=i == 0, last=i == num_layers - 1, dropout=dropout,
                            kernels=kernels)
                for i in range(num_layers)
            )
            self.head = nn.Sequential(nn.LayerNorm(dim), nn.ReLU(), LogitLinear(dim))
        else:
            self.layers = nn.ModuleList(
                TransformerLayer(dim, num_heads, 4 * dim, norm="pre", activation="gelu", dropout=dropout,
                                 kernels=kernels)
                for _ in range(num_layers)
            )
            self.head = study_head(dim, dropout)
        self.shortcut = logit_shortcut(shortcut, dim * self.tokenizer.num_tokens, dropout, kernels)

    def forward(self, dense: torch.Tensor, sparse: torch.Tensor) -> torch.Tensor:
        """dense [B, num_dense + history * num_sparse], sparse [B, num_sparse] -> logits [B]."""
        check_choice("pooling", self.pooling, POOLINGS)  # a program may set it at any time
        tokens = x = self.tokenizer(dense, sparse)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x[:, 0] if self.pooling == "cls" else x.mean(dim=1))
        return logits if self.shortcut is None else logits + self.shortcut(tokens)


def paper_block(dim: int, num_heads: int, *, first: bool, last: bool, dropout: float = 0.0,
                kernels: str = "auto") -> TransformerLayer:
    """Pre-norm block of the paper: x + attention(LN(x)), then x + W2 (a * relu(b)), (a, b) = W1 LN(x).

    The first block has no norm before its attention; in the last one only CLS is a query and leaves the block. One head
    needs no mixing: there is no projection of it then.

    >>> paper_block(64, 8, first=False, last=True)(torch.randn(2, 40, 64)).shape
    torch.Size([2, 1, 64])
    """
    block = TransformerLayer(dim, num_heads, int(dim * (4 / 3)), activation="reglu", attention_norm=not first,
                             out_projection=num_heads > 1, queries=1 if last else None, dropout=dropout,
                             kernels=kernels)
    for linear in (block.qkv, block.out):
        if linear is not None:
            nn.init.zeros_(linear.bias)
    return block
