"""Fused kernels for field-token transformers: attention, FFN, embedding lookup with sparse-row updates.

Every operation has one specification in plain PyTorch (its `reference.py`) and takes
`kernels="auto" | "eager" | "native" | "triton"`; `backends()` tells what runs here, and why not.
"""

from .attention import field_attention
from .backend import Backend, BackendUnavailable, backends
from .cross import low_rank_cross
from .ffn import ffn
from .layer import TransformerLayer
from .output_cache import empty_output_cache, output_cache_stats, set_output_cache
from .sparse_update import EmbeddingTable, SparseAdagrad, SparseLazyAdam, SparseRowwiseAdagrad, SparseSGD
from .tokenizer import field_tokens

__all__ = [
    "Backend",
    "BackendUnavailable",
    "EmbeddingTable",
    "SparseAdagrad",
    "SparseLazyAdam",
    "SparseRowwiseAdagrad",
    "SparseSGD",
    "TransformerLayer",
    "backends",
    "empty_output_cache",
    "ffn",
    "field_attention",
    "field_tokens",
    "low_rank_cross",
    "output_cache_stats",
    "set_output_cache",
]
