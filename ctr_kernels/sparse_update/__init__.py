"""Embedding lookup and the optimizers that update only the rows of a step."""

from .optimizers import SparseAdagrad, SparseLazyAdam, SparseRowwiseAdagrad, SparseSGD
from .table import EmbeddingTable

__all__ = ["EmbeddingTable", "SparseAdagrad", "SparseLazyAdam", "SparseRowwiseAdagrad", "SparseSGD"]
