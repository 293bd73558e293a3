"""FT-Transformer: every feature is a token, a transformer mixes them, one token or their mean gives the logit."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from ctr_kernels import TransformerLayer, field_attention
from ctr_kernels.fusion import like_input

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
                ReGLUBlock(dim, num_heads, attention_norm=i > 0, cls_only=i == num_layers - 1,
                           dropout=dropout, kernels=kernels)
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


class ReGLUBlock(nn.Module):
    """Pre-norm block of the paper: x + attention(LN(x)), then x + W2 (a * relu(b)), (a, b) = W1 LN(x).

    Args:
        dim, num_heads: width of a token and number of heads.
        attention_norm: False leaves out the LayerNorm before the attention (the first block).
        cls_only: only the first token leaves the block (the last block).
        dropout: on attention weights and on the hidden units of the FFN.
        kernels: "auto", "eager", "native" or "triton"; for the attention.

    NOTE the paper's last block computes the query of CLS alone. `field_attention` wants q, k and v of one shape, so
    that all queries are computed and those of the other tokens dropped before the projection: the result is the same.
    NOTE `ctr_kernels.ffn` has no gated activation, so that the ReGLU FFN is plain PyTorch and keeps its hidden units
    [B, F, 2 hidden] for the backward pass.

    >>> ReGLUBlock(64, 8, attention_norm=True, cls_only=True)(torch.randn(2, 40, 64)).shape
    torch.Size([2, 1, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        attention_norm: bool,
        cls_only: bool,
        dropout: float = 0.0,
        kernels: str = "auto",
    ) -> None:
        super().__init__()
        check_attention(dim, num_heads, 1, "auto")
        check_dropout(dropout)
        hidden = int(dim * (4 / 3))
        self.num_heads, self.cls_only, self.dropout, self.kernels = num_heads, cls_only, dropout, kernels
        self.attention_norm = nn.LayerNorm(dim) if attention_norm else None
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim) if num_heads > 1 else None  # one head needs no mixing
        self.ffn_norm = nn.LayerNorm(dim)
        self.ffn_in = nn.Linear(dim, 2 * hidden)
        self.ffn_dropout = nn.Dropout(dropout)
        self.ffn_out = nn.Linear(hidden, dim)
        nn.init.zeros_(self.qkv.bias)
        if self.out is not None:
            nn.init.zeros_(self.out.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, F, dim] -> [B, F, dim], or [B, 1, dim] if cls_only."""
        normed = x if self.attention_norm is None else self.attention_norm(x)
        q, k, v = self.qkv(normed).chunk(3, dim=-1)  # strided views, never copied
        attended = field_attention(q, k, v, num_heads=self.num_heads,
                                   dropout_p=self.dropout if self.training else 0.0, kernels=self.kernels)
        if self.cls_only:
            x, attended = x[:, :1], attended[:, :1]
        x = x + (attended if self.out is None else like_input("out", self.out(attended), x))
        a, b = self.ffn_in(self.ffn_norm(x)).chunk(2, dim=-1)
        return x + like_input("ffn_out", self.ffn_out(self.ffn_dropout(a * F.relu(b))), x)
