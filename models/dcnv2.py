"""DCN-V2: a cross network makes explicit feature interactions, an MLP the implicit ones."""

from collections.abc import Sequence

import torch
from torch import nn

from .base import MLP_DIMS, CTRModel, LogitLinear, mlp
from .checks import check_choice, check_dropout, check_inputs, check_positive
from .cross import CROSS_LAYERS, CROSS_RANK, FullRankCross, LowRankCross, cross_network
from .numeric import check_moments
from .tokenizer import FeatureTokenizer, FieldEmbedding

STRUCTURES = ("parallel", "stacked")


class DCNv2(CTRModel):
    """DCN-V2 in the form of the baseline study, or of its paper (Wang et al. 2021).

    x0 is the concatenation of the categorical embeddings and the dense features as they come, without projection
    (26 * 16 + 13 = 429 for Criteo).

    variant="study": low-rank cross layers of rank 32, MLP 256-128-64 in parallel, Linear on both outputs.
        num_experts > 1 mixes low-rank experts with a softmax gate.
    variant="paper": full-rank cross layers, or low-rank ones if a rank is given; num_experts > 1 adds the
        paper's tanh and inner matrices to the experts.

    Args:
        num_embeddings, tables: rows of memory for embeddings, and how the fields share them ("shared" or
            "per-field"); see FieldEmbedding.
        dim: width of an embedding.
        num_dense, num_sparse: number of numeric features and of categorical fields.
        num_layers: number of cross layers.
        rank: rank of a cross layer; None means 32 (study), full rank (paper).
        num_experts: low-rank experts of a cross layer.
        mlp_dims: widths of the MLP's layers.
        structure: "parallel": the logit is Linear([cross(x0), MLP(x0)]); "stacked": Linear(MLP(cross(x0))).
        norm: "none", or "batch": BatchNorm between Linear and ReLU in the MLP (then a training batch needs at
            least 2 rows).
        dropout: in the MLP, after ReLU; none in eval().
        numeric, numeric_edges: embed each numeric feature ("affine", "scaled", "periodic", "piecewise"; "token": all
            of them together) before the concatenation (39 * 16 = 624 for Criteo); see FeatureTokenizer. None leaves
            them, and the history, as they come, without edges and moments.
        history, history_moments, embedding_dropout: see FeatureTokenizer.
        embedding_std: standard deviation of the initial embeddings.
        kernels: "auto", "eager", "native" or "triton"; for the lookup and low-rank cross layers without experts.

    forward: dense [B, num_dense + history * num_sparse] float, sparse [B, num_sparse] int32 or int64 -> logits [B].

    Raises ValueError (arguments, shapes), TypeError (dtypes), IndexError (an id outside the table, on CPUs).

    >>> model = DCNv2(num_embeddings=1000)
    >>> model(torch.rand(2, 13), torch.randint(1000, (2, 26))).shape
    torch.Size([2])
    """

    logit_parts = ("head",)

    def __init__(
        self,
        *,
        num_embeddings: int = 2_000_000,
        dim: int = 16,
        num_dense: int = 13,
        num_sparse: int = 26,
        num_layers: int = CROSS_LAYERS,
        rank: int | None = None,
        num_experts: int = 1,
        mlp_dims: Sequence[int] = MLP_DIMS,
        structure: str = "parallel",
        norm: str = "none",
        dropout: float = 0.1,
        variant: str = "study",
        tables: str = "shared",
        numeric: str | None = None,
        numeric_edges: Sequence[Sequence[float]] | None = None,
        history: int = 0,
        history_moments: Sequence[Sequence[float]] | None = None,
        embedding_dropout: float = 0.0,
        embedding_std: float = 0.01,
        kernels: str = "auto",
    ) -> None:
        super().__init__()
        check_choice("variant", variant, ("study", "paper"))
        check_choice("structure", structure, STRUCTURES)
        check_choice("norm", norm, ("none", "batch"))
        check_dropout(dropout)
        check_positive(dim=dim, num_dense=num_dense, num_sparse=num_sparse, num_layers=num_layers,
                       num_experts=num_experts, **{f"mlp_dims[{i}]": width for i, width in enumerate(mlp_dims)})
        if not mlp_dims:
            raise ValueError(f"mlp_dims={mlp_dims!r}: at least one layer is needed")
        if rank is None and variant == "study":
            rank = CROSS_RANK
        if rank is None and num_experts > 1:
            raise ValueError(f"num_experts={num_experts}: experts are low-rank; give a rank as well")
        if rank is not None:
            check_positive(rank=rank)
        self.width, self.num_sparse, self.structure = num_dense + history * num_sparse, num_sparse, structure
        if numeric is not None:
            self.tokenizer: FeatureTokenizer | None = FeatureTokenizer(
                num_embeddings=num_embeddings, dim=dim, num_dense=num_dense, num_sparse=num_sparse, dense=numeric,
                numeric_edges=numeric_edges, history=history, history_moments=history_moments,
                embedding_dropout=embedding_dropout, tables=tables, std=embedding_std, kernels=kernels)
            width = dim * self.tokenizer.num_tokens
        else:
            if embedding_dropout:
                raise ValueError(f"embedding_dropout={embedding_dropout} needs tokens; choose a value of numeric")
            if history < 0:
                raise ValueError(f"history={history} is negative")
            if history_moments is not None and history:  # not used, and checked as tokens would
                check_moments(history_moments, history * num_sparse)
            self.tokenizer = None
            self.embedding = FieldEmbedding(num_embeddings=num_embeddings, dim=dim, num_fields=num_sparse,
                                            tables=tables, std=embedding_std, kernels=kernels)
            width = dim * num_sparse + self.width
        self.cross = nn.ModuleList(
            FullRankCross(width) if rank is None
            else LowRankCross(width, rank, num_experts=num_experts, inner=variant == "paper", kernels=kernels)
            for _ in range(num_layers)
        )
        self.mlp = mlp([width, *mlp_dims], batch_norm=norm == "batch", dropout=dropout)
        self.head = LogitLinear(mlp_dims[-1] + (width if structure == "parallel" else 0))

    def forward(self, dense: torch.Tensor, sparse: torch.Tensor) -> torch.Tensor:
        """dense [B, num_dense + history * num_sparse], sparse [B, num_sparse] -> logits [B]."""
        check_choice("structure", self.structure, STRUCTURES)  # a program may set it at any time
        x0 = self._concatenate(dense, sparse)
        x = cross_network(self.cross, x0)
        if self.structure == "stacked":
            return self.head(self.mlp(x))
        return self.head(torch.cat([x, self.mlp(x0)], dim=1))

    def _concatenate(self, dense: torch.Tensor, sparse: torch.Tensor) -> torch.Tensor:
        """x0 [B, width]: numeric part first, then the fields in order."""
        if self.tokenizer is not None:
            return self.tokenizer(dense, sparse).flatten(1)
        check_inputs(dense, sparse, self.width, self.num_sparse)
        embedded = self.embedding(sparse).flatten(1)
        return torch.cat([dense.to(embedded.dtype), embedded], dim=1)
