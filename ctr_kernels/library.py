"""Schemas of the `ctr::` operators, and the loading of the native library that implements them on CPUs."""

from pathlib import Path
from typing import Any

import torch

LIBRARY = torch.library.Library("ctr", "DEF")
LIBRARY.define("select_simd(str name) -> str")
LIBRARY.define("keep_outputs(int bytes) -> int")
LIBRARY.define("dropout_mask(int rows, int width, int threshold, Tensor seed) -> Tensor")
LIBRARY.define("field_attention(Tensor q, Tensor k, Tensor v, int num_heads, float scale, float dropout_p, "
               "Tensor? seed) -> Tensor")
LIBRARY.define("field_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, int num_heads, float scale, "
               "float dropout_p, Tensor? seed) -> Tensor")
LIBRARY.define("field_attention_packed(Tensor qkv, int num_heads, float scale, float dropout_p, Tensor? seed) "
               "-> Tensor")
LIBRARY.define("field_attention_packed_backward(Tensor grad_out, Tensor qkv, int num_heads, float scale, "
               "float dropout_p, Tensor? seed) -> Tensor")
LIBRARY.define("ffn(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, int activation, float dropout_p, "
               "Tensor? seed) -> Tensor")
LIBRARY.define("ffn_backward(Tensor grad_out, Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, int activation, "
               "float dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
LIBRARY.define("attention_block(Tensor x, Tensor? gamma, Tensor? beta, float eps, Tensor w_qkv, Tensor b_qkv, "
               "Tensor w_out, Tensor b_out, int num_heads, float scale, float dropout_p, Tensor? seed) "
               "-> (Tensor, Tensor, Tensor)")
LIBRARY.define("attention_block_backward(Tensor grad_out, Tensor x, Tensor qkv, Tensor attended, Tensor? gamma, "
               "Tensor? beta, float eps, Tensor w_qkv, Tensor w_out, int num_heads, float scale, float dropout_p, "
               "Tensor? seed) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
LIBRARY.define("ffn_block(Tensor x, Tensor gamma, Tensor beta, float eps, bool normed_residual, Tensor w1, "
               "Tensor b1, Tensor w2, Tensor b2, int activation, float dropout_p, Tensor? seed) -> Tensor")
LIBRARY.define("ffn_block_backward(Tensor grad_out, Tensor x, Tensor gamma, Tensor beta, float eps, "
               "bool normed_residual, Tensor w1, Tensor b1, Tensor w2, Tensor b2, int activation, float dropout_p, "
               "Tensor? seed) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
LIBRARY.define("low_rank_cross(Tensor x0, Tensor x, Tensor u, Tensor v, Tensor bias) -> Tensor")
LIBRARY.define("low_rank_cross_backward(Tensor grad_out, Tensor x0, Tensor x, Tensor u, Tensor v, Tensor bias) "
               "-> (Tensor, Tensor, Tensor, Tensor, Tensor)")
LIBRARY.define("use_huge_pages(Tensor(a!) table) -> ()")
LIBRARY.define("first_bad_id(Tensor ids, int num_rows) -> int")
LIBRARY.define("embedding_lookup(Tensor weight, Tensor ids, bool widen) -> Tensor")
LIBRARY.define("sparse_update(Tensor(a!) weight, Tensor(b!)? first, Tensor(c!)? second, Tensor(d!)? last, Tensor ids, "
               "Tensor rows, int rule, float lr, float weight_decay, float eps, float beta1, float beta2, int step, "
               "int seed) -> ()")
LIBRARY.define("parse_criteo(Tensor text, bool labelled, int hash_bins, Tensor log1p, Tensor(a!) label, "
               "Tensor(b!) dense, Tensor(c!) dense_missing, Tensor(d!) sparse, Tensor(e!) values, "
               "Tensor(f!) sparse_missing) -> bool")


def _load_native() -> str | None:
    """Load the native library; None when it is there, else the reason why it is not."""
    here = Path(__file__).parent
    candidates = sorted(here.glob("_native*.so"))
    if not candidates:
        note = here / "_native_absent.txt"
        if note.exists():
            return note.read_text().strip()
        return "the extension is not built; run `pip install --no-build-isolation -e .` with a C++ compiler"
    try:
        torch.ops.load_library(str(candidates[0]))
    except OSError as error:
        return f"{candidates[0].name} does not load with torch {torch.__version__}: {error}"
    return None


NATIVE_ABSENT: str | None = _load_native()


def last_dim_contiguous(x: torch.Tensor) -> torch.Tensor:
    """x itself where the last dimension is contiguous, whatever the other strides; else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def no_double_backward(operator: str) -> None:
    """Make a second derivative through `operator` an error; without this it would silently be zero."""

    def refuse(ctx: Any, *grads: torch.Tensor) -> None:
        raise RuntimeError(f"{operator} has no derivative: double backward needs kernels='eager'")

    torch.library.register_autograd(operator, refuse, lib=LIBRARY)
