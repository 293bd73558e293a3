"""AutoInt: multi-head self-attention over feature tokens learns the interactions between features."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from ctr_kernels import TransformerLayer, field_attention
from ctr_kernels.attention.operator import supports
from ctr_kernels.backend import resolve
from ctr_kernels.checks import product_dtype

from .base import CTRModel, LogitLinear, logit_shortcut, study_head
from .checks import check_attention, check_choice, check_dropout, check_positive
from .tokenizer import FeatureTokenizer


class AutoInt(CTRModel):
    """AutoInt in the form of the baseline study, or of its paper (Song et al. 2019).

    variant="study": 26 categorical tokens and one dense token; post-norm transformer layers with FFN 2 dim and ReLU;
        mean over the tokens, LayerNorm, Linear(dim, dim), ReLU, Linear(dim, 1).
    variant="paper": 39 tokens, those of numeric features scaled by the value; interacting layers; all tokens
        concatenated, Linear(num_tokens * attention_dim, 1). The authors' own setting for Criteo: dim=16,
        attention_dim=64, num_heads=2, num_layers=3.

    Args:
        num_embeddings, tables: rows of memory for embeddings, and how the fields share them ("shared" or
            "per-field"); see FieldEmbedding.
        dim: width of a token.
        attention_dim: width of the interacting layers, heads together; None means dim. Paper variant only.
        num_dense, num_sparse: number of numeric features and of categorical fields.
        num_layers, num_heads: None means 2 and 4 (study), 3 and 2 (paper); num_heads divides the width.
        dropout: on attention weights, and in the study on hidden units of the FFN and head; none in eval().
        numeric, numeric_edges: how numeric features become tokens, "token" (one for all, 27 in all for Criteo),
            "affine", "scaled", "periodic" or "piecewise" (one each, 39); see FeatureTokenizer. None means "token"
            (study), "scaled" (paper).
        history, history_moments, embedding_dropout: see FeatureTokenizer.
        embedding_std: standard deviation of the initial embeddings.
        shortcut: a second way from the tokens to the logit, past the layers, "none", "linear", "mlp" or "cross"; see
            logit_shortcut.
        kernels: "auto", "eager", "native" or "triton"; passed on to every operation.

    forward: dense [B, num_dense + history * num_sparse] float, sparse [B, num_sparse] int32 or int64 -> logits [B].

    Raises ValueError (arguments, shapes), TypeError (dtypes), IndexError (an id outside the table, on CPUs).

    >>> model = AutoInt(num_embeddings=1000)
    >>> model(torch.rand(2, 13), torch.randint(1000, (2, 26))).shape
    torch.Size([2])
    """

    def __init__(
        self,
        *,
        num_embeddings: int = 2_000_000,
        dim: int = 64,
        attention_dim: int | None = None,
        num_dense: int = 13,
        num_sparse: int = 26,
        num_layers: int | None = None,
        num_heads: int | None = None,
        dropout: float = 0.1,
        variant: str = "study",
        tables: str = "shared",
        numeric: str | None = None,
        numeric_edges: Sequence[Sequence[float]] | None = None,
        history: int = 0,
        history_moments: Sequence[Sequence[float]] | None = None,
        embedding_dropout: float = 0.0,
        embedding_std: float = 0.01,
        shortcut: str = "none",
        kernels: str = "auto",
    ) -> None:
        super().__init__()
        check_choice("variant", variant, ("study", "paper"))
        check_dropout(dropout)
        paper = variant == "paper"
        if attention_dim is None:
            attention_dim = dim
        elif not paper:
            raise ValueError(f"attention_dim={attention_dim}: variant='study' keeps the width dim={dim} throughout")
        if num_layers is None:
            num_layers = 3 if paper else 2
        if num_heads is None:
            num_heads = 2 if paper else 4
        if numeric is None:
            numeric = "scaled" if paper else "token"
        check_positive(num_layers=num_layers, attention_dim=attention_dim)
        self.tokenizer = FeatureTokenizer(
            num_embeddings=num_embeddings, dim=dim, num_dense=num_dense, num_sparse=num_sparse,
            dense=numeric, numeric_edges=numeric_edges, history=history, history_moments=history_moments,
            embedding_dropout=embedding_dropout,
            tables=tables, std=embedding_std, kernels=kernels,
        )
        num_tokens = self.tokenizer.num_tokens
        check_attention(attention_dim, num_heads, num_tokens, kernels)
        self.flatten = paper
        if paper:
            self.layers = nn.ModuleList(
                InteractingLayer(attention_dim if i else dim, attention_dim, num_heads, dropout=dropout,
                                 kernels=kernels)
                for i in range(num_layers)
            )
            self.head: nn.Module = LogitLinear(num_tokens * attention_dim)
        else:
            self.layers = nn.ModuleList(
                TransformerLayer(dim, num_heads, 2 * dim, norm="post", activation="relu", dropout=dropout,
                                 kernels=kernels)
                for _ in range(num_layers)
            )
            self.head = study_head(dim, dropout)
        self.shortcut = logit_shortcut(shortcut, dim * num_tokens, dropout, kernels)

    def forward(self, dense: torch.Tensor, sparse: torch.Tensor) -> torch.Tensor:
        """dense [B, num_dense + history * num_sparse], sparse [B, num_sparse] -> logits [B]."""
        tokens = x = self.tokenizer(dense, sparse)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x.flatten(1) if self.flatten else x.mean(dim=1))
        return logits if self.shortcut is None else logits + self.shortcut(tokens)


class InteractingLayer(nn.Module):
    """LayerNorm(relu(heads + R)), heads = softmax(Q K^T) V for each head (Song et al. 2019, eqs. 5 to 8).

    Q, K, V and the residual R are relu(Linear(x)); the heads are concatenated and not projected.

    Args:
        in_dim, dim: width of a token before and after.
        num_heads: number of heads, a divisor of dim.
        dropout: on the attention weights.
        kernels: "auto", "eager", "native" or "triton".

    NOTE eq. 5 takes the plain inner product of query and key, and so does this layer (scale 1); the authors' code
    divides it by sqrt(d_head).
    NOTE the ReLU on Q, K, V and R and the LayerNorm are not in the equations; both come from the authors' code.

    >>> InteractingLayer(16, 64, 2)(torch.randn(2, 39, 16)).shape
    torch.Size([2, 39, 64])
    """

    def __init__(
        self, in_dim: int, dim: int, num_heads: int, *, dropout: float = 0.0, kernels: str = "auto"
    ) -> None:
        super().__init__()
        check_attention(dim, num_heads, 1, "auto")
        check_dropout(dropout)
        self.num_heads, self.dropout, self.kernels = num_heads, dropout, kernels
        self.qkvr = nn.Linear(in_dim, 4 * dim)  # Q, K, V and R in one product
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, F, in_dim] -> [B, F, dim]."""
        q, k, v, residual = F.relu(self.qkvr(x)).chunk(4, dim=-1)  # strided views, never copied
        heads = field_attention(q, k, v, num_heads=self.num_heads, scale=1.0,
                                dropout_p=self.dropout if self.training else 0.0, kernels=self.kernels)
        return self.norm(F.relu(heads + residual))

    def operations(self, num_tokens: int) -> dict[str, str]:
        """The backend of the attention on rows of that many tokens, in the dtype of the parameters or of autocast."""
        weight = self.qkvr.weight
        width = len(weight) // 4
        return {"field_attention": resolve(self.kernels, weight.device, "field_attention", product_dtype(weight),
                                           lambda of: supports(of, num_tokens, num_tokens, width, self.num_heads))}
