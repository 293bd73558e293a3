"""The tokenizer: a row's numeric features and categorical ids become tokens [B, F, dim]."""

from collections.abc import Sequence

import torch
from torch import nn

from ctr_kernels import EmbeddingTable, field_tokens
from ctr_kernels.backend import BackendUnavailable, on_triton
from ctr_kernels.fusion import FORWARDS, plain_linear, plain_module, plain_parameter, replaced_method
from ctr_kernels.philox import as_seed
from ctr_kernels.sparse_update.table import check_ids
from ctr_kernels.tokenizer.operator import supports
from ctr_kernels.tokenizer.reference import NUMERIC, drop_rows

from .checks import check_choice, check_dropout, check_inputs, check_positive
from .numeric import NUMERIC_MODES, FieldHistory, Periodic, PiecewiseLinear, uniform_vectors

TABLES = ("shared", "per-field")


class FieldEmbedding(nn.Module):
    """One embedding row for each categorical field: ids [B, num_fields] -> [B, num_fields, dim].

    Args:
        num_embeddings: rows of memory over all fields; ids are in [0, num_embeddings).
        dim: width of a row.
        num_fields: number of categorical fields.
        tables: "shared": all fields read one table of num_embeddings rows; equal ids share a row across fields
            (so does id 0, the missing value). "per-field": each field has num_embeddings // num_fields rows of
            its own and reads row `id % that`. The memory is the same, but ids of one field that differ by a
            multiple of that number collide, and the remainder of the division (fewer than num_fields rows) is
            not allocated.
        std: standard deviation of the normal initialisation.
        kernels: "auto", "eager", "native" or "triton".

    NOTE the per-field tables lie one after the other in one parameter: a single lookup and a single update
    serve all fields, and no row is shared between two of them.

    >>> FieldEmbedding(num_embeddings=100, dim=8, num_fields=3)(torch.tensor([[5, 99, 0]])).shape
    torch.Size([1, 3, 8])
    """

    def __init__(
        self,
        *,
        num_embeddings: int,
        dim: int,
        num_fields: int,
        tables: str = "shared",
        std: float = 0.01,
        kernels: str = "auto",
    ) -> None:
        super().__init__()
        check_choice("tables", tables, TABLES)
        check_positive(num_fields=num_fields)
        self.num_embeddings, self.num_fields, self.tables = num_embeddings, num_fields, tables
        self.rows_per_field = num_embeddings // num_fields
        if tables == "shared":
            self.table = EmbeddingTable(num_embeddings, dim, std=std, kernels=kernels)
            return
        if self.rows_per_field < 1:
            raise ValueError(f"num_embeddings={num_embeddings} leaves no row for each of {num_fields} fields")
        self.table = EmbeddingTable(self.rows_per_field * num_fields, dim, std=std, kernels=kernels)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int32/int64 [B, num_fields] -> [B, num_fields, dim]."""
        return self.table(self.rows(ids))

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The row of the table that each id reads, [B, num_fields]."""
        check_choice("tables", self.tables, TABLES)  # a program may set it at any time
        if self.tables == "per-field":
            needed, weight = self.rows_per_field * self.num_fields, getattr(self.table, "weight", None)
            if ids.shape[-1] != self.num_fields:
                raise ValueError(f"ids have shape {tuple(ids.shape)}; [B, {self.num_fields}] is needed")
            if isinstance(weight, torch.Tensor) and len(weight) < needed:
                raise ValueError(f"the table has {len(weight)} rows; {self.num_fields} fields of {self.rows_per_field} "
                                 f"rows need {needed}")
            if ids.device.type == "cpu":
                check_ids(ids, self.num_embeddings)  # the modulo would hide an id out of range
            # Not a buffer: what no checkpoint holds would be lost by to_empty() and by a construction on "meta".
            ids = ids.remainder(self.rows_per_field) + torch.arange(0, needed, self.rows_per_field, device=ids.device)
        return ids

    def extra_repr(self) -> str:
        rows = f", {self.rows_per_field} rows a field" if self.tables == "per-field" else ""
        return f"tables={self.tables!r}{rows}"


class FeatureTokenizer(nn.Module):
    """Tokens in the order CLS, numeric, categorical (Gorishniy et al. 2021, section 3.3 and figure 2a).

    Args:
        num_embeddings, dim, tables, std, kernels: see FieldEmbedding.
        num_dense, num_sparse: number of numeric features and of categorical fields.
        history, history_moments: statistics of each field's value (see FieldHistory), in the history * num_sparse
            columns of `dense` behind the numeric features; they are added to the field's token.
        embedding_dropout: probability of leaving a field's row out of its token in training, the others scaled up;
            the model then cannot lean on rows it has seen a few times only. The mask is that of `field_tokens`.
        numeric_edges: bins of each numeric feature, for dense="piecewise".
        dense: "token": ONE token for all numeric features, Linear(num_dense, dim) (the baseline study).
            "affine": a token for each feature, x_j w_j + b_j (FT-Transformer).
            "scaled": a token for each feature, x_j w_j (AutoInt: Song et al. 2019, eq. 4).
            "periodic", "piecewise": a token for each feature by Periodic or PiecewiseLinear.
        field_bias: add a bias vector for each categorical field (FT-Transformer).
        cls: put a learned CLS token, without bias, in front.

    forward: dense [B, num_dense + history * num_sparse] float, converted to the dtype of the table; sparse
    [B, num_sparse] int32 or int64 -> [B, num_tokens, dim].

    Raises ValueError (shapes), TypeError (dtypes), IndexError (an id outside the table, on CPUs).

    >>> tokenizer = FeatureTokenizer(num_embeddings=1000, dim=64, cls=True)
    >>> tokenizer(torch.rand(2, 13), torch.randint(1000, (2, 26))).shape
    torch.Size([2, 28, 64])
    >>> tokenizer = FeatureTokenizer(num_embeddings=1000, dim=64, dense="affine")
    >>> tokenizer(torch.rand(2, 13), torch.randint(1000, (2, 26))).shape
    torch.Size([2, 39, 64])
    """

    def __init__(
        self,
        *,
        num_embeddings: int,
        dim: int,
        num_dense: int = 13,
        num_sparse: int = 26,
        dense: str = "token",
        numeric_edges: Sequence[Sequence[float]] | None = None,
        history: int = 0,
        history_moments: Sequence[Sequence[float]] | None = None,
        embedding_dropout: float = 0.0,
        field_bias: bool = False,
        cls: bool = False,
        tables: str = "shared",
        std: float = 0.01,
        kernels: str = "auto",
    ) -> None:
        super().__init__()
        check_choice("dense", dense, NUMERIC_MODES)
        check_dropout(embedding_dropout, "embedding_dropout")
        check_positive(dim=dim, num_dense=num_dense, num_sparse=num_sparse)
        if history < 0:
            raise ValueError(f"history={history} is negative")
        edges = () if numeric_edges is None else numeric_edges
        if dense == "piecewise" and len(edges) != num_dense:
            raise ValueError(f"numeric_edges has {len(edges)} lists; dense='piecewise' needs one for "
                             f"each of {num_dense} numeric features")
        self.num_dense, self.num_sparse, self.dense = num_dense, num_sparse, dense
        self.embedding_dropout = embedding_dropout
        self.num_tokens = num_sparse + (1 if dense == "token" else num_dense) + int(cls)
        self.embedding = FieldEmbedding(num_embeddings=num_embeddings, dim=dim, num_fields=num_sparse,
                                        tables=tables, std=std, kernels=kernels)
        if dense == "token":
            self.dense_token = nn.Linear(num_dense, dim)
        elif dense == "periodic":
            self.numeric: nn.Module = Periodic(num_dense, dim)
        elif dense == "piecewise":
            self.numeric = PiecewiseLinear(edges, dim)
        else:
            self.dense_weight = uniform_vectors(num_dense, dim)
            self.dense_bias = uniform_vectors(num_dense, dim) if dense == "affine" else None
        self.field_bias = uniform_vectors(num_sparse, dim) if field_bias else None
        self.cls = uniform_vectors(dim) if cls else None
        self.history = FieldHistory(history, num_sparse, dim, history_moments) if history else None
        self.width = num_dense + history * num_sparse  # of `dense`

    def forward(self, dense: torch.Tensor, sparse: torch.Tensor) -> torch.Tensor:
        """dense [B, width], sparse [B, num_sparse] -> [B, num_tokens, dim]."""
        check_inputs(dense, sparse, self.width, self.num_sparse)
        dropout_p = self.embedding_dropout if self.training else 0.0
        check_dropout(dropout_p, "embedding_dropout")  # a program may set it, and the choice, at any time
        check_choice("dense", self.dense, NUMERIC_MODES)
        if self._why_not_fused() is None:
            table = self.embedding.table
            dense = dense.to(table.lookup_dtype)
            weight, bias = self._numeric_vectors()
            history = None if self.history is None else self.history.parts
            return field_tokens(table.weight, self.embedding.rows(sparse), dense, weight, bias, self.cls,
                                self.field_bias, numeric=self.dense, history=history, dropout_p=dropout_p,
                                kernels="triton")
        categorical = self.embedding(sparse)
        # fp32 at least until edges and moments were subtracted: large numbers do not fit in half precision.
        dense = dense.to(torch.promote_types(categorical.dtype, torch.float32))
        if dropout_p > 0.0:
            categorical = drop_rows(categorical, dropout_p, as_seed(None, categorical.device))
        if self.history is not None:
            categorical = categorical + self.history(dense[:, self.num_dense:])
        if self.field_bias is not None:
            categorical = categorical + self.field_bias
        tokens = [self._numeric(dense[:, :self.num_dense], categorical.dtype), categorical]
        if self.cls is not None:
            tokens.insert(0, self.cls.expand(dense.shape[0], 1, -1))
        return torch.cat(tokens, dim=1)

    def _why_not_fused(self) -> str | None:
        """Why the parts are called, as phrase; None: one operation of Triton's makes the tokens of their parameters."""
        embedding, history = self.embedding, self.history
        if self.dense not in NUMERIC:
            return f"dense={self.dense!r} has no fused operation"
        reason = plain_module(embedding, "embedding", FieldEmbedding) or plain_module(
            embedding.table, "embedding.table", EmbeddingTable)
        if reason is None and not on_triton(embedding.table.kernels, embedding.table.weight.device, "field_tokens",
                                            embedding.table.lookup_dtype):
            reason = f"kernels={embedding.table.kernels!r} has no fused operation here"
        if reason is None and self.dense == "token":
            reason = plain_linear(self.dense_token, "dense_token", self.num_dense, embedding.table.dim)
        if reason is None and history is not None:
            reason = plain_module(history, "history", FieldHistory)
        reason = (reason or replaced_method(embedding.table, "_lookup", _LOOKUP)
                  or replaced_method(self, "_numeric", _NUMERIC))
        if reason is not None:
            return reason
        table = embedding.table
        reason = plain_parameter(table, "embedding.table", "weight", (table.num_rows, table.dim))
        if reason is not None:
            return reason
        dtype, statistics = table.lookup_dtype, 0
        constants = {"numeric": self._numeric_vectors()[0]}
        if history is not None:
            statistics = len(history.weight)
            constants |= {"history.weight": history.weight, "history.mean": history.mean}
        for name, tensor in constants.items():
            if tensor.dtype != dtype:
                return f"{name} has {tensor.dtype}, lookups {dtype}"
        if not on_triton(table.kernels, table.weight.device, "field_tokens", dtype,
                         lambda of: supports(of, table.dim, statistics)):
            return supports("triton", table.dim, statistics)
        return None

    def operations(self, _: int) -> dict[str, str]:
        """What makes the tokens: "triton" in one operation, or "eager" of the results of their parts."""
        return {"field_tokens": "triton" if self._why_not_fused() is None else "eager"}

    def extra_repr(self) -> str:
        try:
            reason = self._why_not_fused()
        except (BackendUnavailable, TypeError, ValueError) as error:
            reason = str(error)
        return f"dense={self.dense!r}, " + ("fused" if reason is None else f"parts are called: {reason}")

    def _numeric_vectors(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias of "token", "affine" or "scaled"."""
        if self.dense == "token":
            return self.dense_token.weight, self.dense_token.bias
        return self.dense_weight, self.dense_bias

    def _numeric(self, dense: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self.dense == "piecewise":
            return self.numeric(dense)
        dense = dense.to(dtype)
        if self.dense == "token":
            return self.dense_token(dense).unsqueeze(1)
        if self.dense == "periodic":
            return self.numeric(dense)
        tokens = dense.unsqueeze(-1) * self.dense_weight  # [B, num_dense, dim]
        return tokens if self.dense_bias is None else tokens + self.dense_bias


# What the fused tokens stand in for.
FORWARDS.update({kind: kind.forward for kind in (FieldEmbedding, FieldHistory, EmbeddingTable)})
_LOOKUP, _NUMERIC = EmbeddingTable._lookup, FeatureTokenizer._numeric
