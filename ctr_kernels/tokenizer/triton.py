"""Tokens in Triton: rows are gathered straight into [B, T, D], and leave it as (ids, rows) in one pass.

With M the dropout multipliers of rows (0 or 1 / (1 - p)), z = (h - mean) scale the S statistics of a field, and g the
gradient of a token:
    forward    numeric token j = x_j w_j + b_j, or one for all, x W^T + b;  field k = M_k row_k + sum_s z_sk v_sk + c_k
    backward   row_k = M_k g_k;  over samples  b = sum g,  w_j = sum x_j g_j,  v_sk = sum z_sk g_k,  c_k = sum g_k

Tokens come in slices (triton_kernels.py); a program has one slice of some samples. With n = B T D elements of e bytes
of tokens, r = B K D e bytes of rows and d = B (N + S K) e bytes of numbers; B=4096, K=26, N=13, D=64, fp32: r = 27.3
MB, with one numeric token and CLS n e = 29.4 MB (T = 28); with a token each and two statistics n e = 40.9 MB (T = 39):
    forward    r + n e + d = 57 or 69 MB, the floor (rows, numbers read, tokens written); dropout reads (1 - p) r.
               The vectors of the tokens, 27 KB at T = 39, come from L2, once for every 8 samples
    backward   n e + r + d = 57 or 69 MB, the floor (gradient, numbers read, row gradients written); the gradient of one
               numeric token again from the cache, for each feature; 4 P (HEAD + N + K + S K) D bytes of fp32 partial
               sums (without K where fields have neither biases nor history), written and read once: 27 KB P at T = 39
P groups of programs share the samples, as many as make 4 programs a multiprocessor: 88 for 6 slices on 132 of them, 2.3
MB of partial sums, where programs for all tokens would have six times as many. Each sums its samples in registers, and
torch.sum adds the P sums in a fixed order: no atomics, the same bits at every run. The work, 2 (1 + S) FLOP for each
element of a token, is nothing beside the traffic.

A slice is as wide as the program's threads load at once, 16 bytes each, so that sums over samples stay within a thread:
8 tokens of 64 in fp32, 16 in half precision. Occupancy: 16 warps a multiprocessor at least, 8 KB in flight a program.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch.autograd.function import once_differentiable

from ..philox import threshold
from ..sparse_update.plan import Plan, row_gradient, start_plan
from ..sparse_update.table import wants_rows
from ..triton_autotune import launch_choice, table_choice
from ..triton_support import CAPABILITIES, Spec, architecture, capability
from .operator import TRITON_MAX_TILE
from .reference import History
from .triton_kernels import backward_kernel, forward_kernel

PROGRAMS = 4  # of the backward a multiprocessor
Tensor = torch.Tensor


class Launch(NamedTuple):
    """A launch configuration: tokens of a slice, samples that a program works on at once, and warps."""

    tokens: int
    samples: int
    warps: int


class Sizes(NamedTuple):
    """What both kernels have compiled in: fields, features, statistics, width, one numeric token or one each, CLS."""

    K: int
    N: int
    S: int
    D: int
    ONE: bool
    CLS: int

    @property
    def head(self) -> int:
        """Tokens in front of those of the fields."""
        return self.CLS + (1 if self.ONE else self.N)


Key = tuple[str, str, int, int, int, str, int]


def _key(kernel: str, sizes: Sizes, dtype: torch.dtype, cc: int) -> Key:
    """(operation, kernel, fields or features and elements of a token, both rounded up to powers of 2, statistics,
    arithmetic, architecture)."""
    block_d = max(16, triton.next_power_of_2(sizes.D))
    tokens = triton.next_power_of_2(max(sizes.K, sizes.CLS + sizes.N))
    return "tokenizer", kernel, tokens, block_d, sizes.S, "fp32" if dtype == torch.float32 else "half", architecture(cc)


def _default(key: Key) -> Launch:
    """4 warps that load 16 bytes a thread, as often as it takes for 4096 elements, or 2048 beside sums."""
    _, kernel, tokens, block_d, _, arithmetic, _ = key
    slice_tokens = min(tokens, max(1, 4 * 32 * (4 if arithmetic == "fp32" else 8) // block_d))
    elements = 4096 if kernel == "forward" else 2048
    return Launch(slice_tokens, max(1, elements // (slice_tokens * block_d)), 4 if block_d < 4096 else 8)


def _candidates(key: Key) -> Iterator[Launch]:
    """What a search tries: not more than TRITON_MAX_TILE elements at once."""
    _, kernel, tokens, block_d, statistics, *_ = key
    sums = 1 + statistics if kernel == "backward" else 0
    slices = sorted({min(tokens, slice_tokens) for slice_tokens in (4, 8, 16, 32)})
    for launch in itertools.starmap(Launch, itertools.product(slices, (1, 2, 4, 8, 16), (2, 4, 8))):
        if launch.tokens * (launch.samples + sums) * block_d <= TRITON_MAX_TILE:
            yield launch


def _forward(weight: Tensor, ids: Tensor, dense: Tensor, dense_weight: Tensor, dense_bias: Tensor | None,
             cls: Tensor | None, field_bias: Tensor | None, history: tuple[Tensor | None, ...], dropout_p: float,
             seed: Tensor | None, sizes: Sizes) -> Tensor:
    """[B, T, D]; all tensors contiguous."""
    batch, device = len(ids), weight.device
    out = torch.empty(batch, sizes.head + sizes.K, sizes.D, dtype=dense_weight.dtype, device=device)
    key = _key("forward", sizes, out.dtype, capability(device))

    def run(launch: Launch) -> None:
        slices = triton.cdiv(sizes.K, launch.tokens) + triton.cdiv(sizes.head, launch.tokens)
        with torch.cuda.device_of(weight):
            forward_kernel[(triton.cdiv(batch, launch.samples) * slices,)](
                weight, ids, dense, dense_weight, dense_bias, cls, field_bias, *history, seed, out, batch, len(weight),
                threshold(dropout_p), 1.0 / (1.0 - dropout_p), **sizes._asdict(), BLOCK_D=key[3],
                TOKENS=launch.tokens, ROWS=launch.samples, num_warps=launch.warps)

    if batch:
        run(launch_choice(key, _default(key), _candidates(key), run))
    return out


def _backward(grad: Tensor, dense: Tensor, mean: Tensor | None, scale: Tensor | None, dropout_p: float,
              seed: Tensor | None, sizes: Sizes, biased: bool) -> tuple[Tensor, Tensor]:
    """Row gradients [B K, D], and the sums of `_split` in fp32; all tensors contiguous."""
    batch, device = len(grad), grad.device
    rows = torch.empty(batch * sizes.K, sizes.D, dtype=grad.dtype, device=device)
    key = _key("backward", sizes, grad.dtype, capability(device))
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    own = _sums(sizes, biased)

    def run(launch: Launch) -> Tensor:
        slices = triton.cdiv(sizes.K, launch.tokens) + triton.cdiv(sizes.CLS + sizes.N, launch.tokens)
        groups = max(1, min(PROGRAMS * processors // slices, triton.cdiv(batch, launch.samples)))
        partial = torch.empty(groups, own["SUMS"], dtype=torch.float32, device=device)
        with torch.cuda.device_of(grad):
            backward_kernel[(groups * slices,)](
                grad, dense, mean, scale, seed, rows, partial, batch, threshold(dropout_p), 1.0 / (1.0 - dropout_p),
                **sizes._asdict(), **own, BLOCK_D=key[3], TOKENS=launch.tokens, ROWS=launch.samples,
                num_warps=launch.warps)
        return partial.sum(0)

    if not batch:
        return rows, torch.zeros(own["SUMS"], dtype=torch.float32, device=device)
    return rows, run(launch_choice(key, _default(key), _candidates(key), run))


def _sums(sizes: Sizes, biased: bool) -> dict[str, Any]:
    """What the backward has compiled in besides: whether it sums the fields' gradients, and elements of all sums."""
    vectors = sizes.head + sizes.N + sizes.S * sizes.K + sizes.K * biased
    return {"BIASED": biased, "SUMS": vectors * sizes.D}


def _split(sums: Tensor, sizes: Sizes, biased: bool) -> list[Tensor]:
    """Sums over samples: gradient of the tokens of the head [HEAD, D] and, if biased, of the fields [K, D]; dense
    weight; history weight."""
    fields, features, statistics, dim, one, _ = sizes
    shapes = [(sizes.head, dim), (fields * biased, dim), (dim, features) if one else (features, dim),
              (statistics, fields, dim)]
    return [part.view(shape) for part, shape in
            zip(sums.split([torch.Size(shape).numel() for shape in shapes]), shapes, strict=True)]


class _Tokens(torch.autograd.Function):
    """Keeps ids, numbers and the seed; the table's gradient is a sparse COO tensor of (ids, rows)."""

    @staticmethod
    def forward(ctx: Any, indices: Tensor, plan: Plan | None, dropout_p: float, seed: Tensor | None, sizes: Sizes,
                weight: Tensor, ids: Tensor, dense: Tensor, dense_weight: Tensor, dense_bias: Tensor | None,
                cls: Tensor | None, field_bias: Tensor | None, *history: Tensor | None) -> Tensor:
        ctx.save_for_backward(indices, dense, dense_weight, *history, seed)
        ctx.table, ctx.plan, ctx.settings = weight.shape, plan, (dropout_p, sizes)
        return _forward(weight, ids, dense, dense_weight, dense_bias, cls, field_bias, history, dropout_p, seed, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        indices, dense, dense_weight, history_weight, _, mean, scale, seed = ctx.saved_tensors
        dropout_p, sizes = ctx.settings
        needed = ctx.needs_input_grad[5:]  # weight, ids, dense, dense_weight, dense_bias, cls, field_bias, history
        biased = any(needed[6:])
        rows, sums = _backward(grad.contiguous(), dense, mean, scale, dropout_p, seed, sizes, biased)
        head, fields, to_dense, to_history = _split(sums.to(grad.dtype), sizes, biased)
        numeric = head[sizes.CLS:]
        grads = {"weight": row_gradient(indices, ctx.plan, rows, ctx.table), "ids": None,
                 "dense": _grad_dense(grad, dense_weight, history_weight, scale, sizes) if needed[2] else None,
                 "dense_weight": to_dense, "dense_bias": numeric[0] if sizes.ONE else numeric,
                 "cls": head[0], "field_bias": fields, "history_weight": to_history,
                 "history_bias": fields.clone() if needed[6] and needed[8] else fields}  # gradients share no memory
        return (*[None] * 5, *(grad if wanted else None for grad, wanted in zip(grads.values(), needed, strict=False)),
                None, None)


def _grad_dense(grad: Tensor, dense_weight: Tensor, history_weight: Tensor | None, scale: Tensor | None,
                sizes: Sizes) -> Tensor:
    """[B, N + S K], which no model of this package asks for: in plain PyTorch."""
    numeric, fields = grad[:, sizes.CLS:sizes.head], grad[:, sizes.head:]
    parts = [numeric[:, 0] @ dense_weight if sizes.ONE else torch.einsum("bjd,jd->bj", numeric, dense_weight)]
    if history_weight is not None:
        assert scale is not None
        parts.append(torch.einsum("bkd,skd->bsk", fields, history_weight).flatten(1) * scale)
    return torch.cat(parts, dim=1)


@torch.compiler.disable  # a compiled graph cannot hold the sparse gradient
def field_tokens_triton(weight: Tensor, ids: Tensor, dense: Tensor, dense_weight: Tensor, dense_bias: Tensor | None,
                        cls: Tensor | None, field_bias: Tensor | None, numeric: str, history: History | None,
                        dropout_p: float, seed: Tensor | None) -> Tensor:
    """[B, T, D], fp32, bf16 or fp16; the ids, the numbers and the seed are all that backward keeps.

    The sort of the ids, for the row update, begins here: see sparse_update/plan.py.
    """
    indices = ids.reshape(1, -1).long()
    plan = start_plan(weight, indices) if wants_rows(weight, dense_weight.dtype) else None
    statistics = 0 if history is None else len(history.weight)
    sizes = Sizes(ids.shape[1], dense.shape[1] - statistics * ids.shape[1], statistics, weight.shape[1],
                  numeric == "token", int(cls is not None))
    tensors = (None if t is None else t.contiguous() for t in (weight, ids, dense, dense_weight, dense_bias, cls,
                                                               field_bias, *(history or (None,) * 4)))
    return _Tokens.apply(indices, plan, dropout_p, seed, sizes, *tensors)


# The baseline study's tokens, with CLS, and the default recipe's.
STUDY, RECIPE = Sizes(26, 13, 0, 64, True, 1), Sizes(26, 13, 2, 64, False, 0)


def aot_specs() -> list[Spec]:
    """Both kernels at the tuned shapes: one numeric token and CLS, also with a bias for each field; a token for each
    number and two statistics of each field, with and without dropout."""
    shapes = [("fp32", "", STUDY, False, False), ("bf16", "", STUDY, False, False),
              ("fp32", " field bias", STUDY, True, False)]
    shapes += [(dtype, " history" + " dropout" * drops, RECIPE, False, drops)
               for dtype, drops in itertools.product(("fp32", "bf16"), (False, True))]
    kinds = {"ids": "*i32", "partial": "*fp32", "seed": "*i64", "inverse_keep": "fp32",
             **dict.fromkeys(("batch", "num_rows", "limit"), "i32")}
    specs = []
    for (dtype, label, sizes, field_bias, drops), cc in itertools.product(shapes, CAPABILITIES):
        given = {"cls": sizes.CLS, "field_bias": field_bias, "seed": drops,
                 **dict.fromkeys(("history_weight", "history_bias", "mean", "scale"), sizes.S)}
        absent: dict[str, Any] = {name: None for name, present in given.items() if not present}
        for name, kernel, own in (("forward", forward_kernel, {}),
                                  ("backward", backward_kernel, _sums(sizes, field_bias or sizes.S > 0))):
            key = _key(name, sizes, torch.float32 if dtype == "fp32" else torch.bfloat16, cc)
            launch = table_choice(key, _default(key))
            constexprs = absent | own | sizes._asdict() | {"BLOCK_D": key[3], "TOKENS": launch.tokens,
                                                           "ROWS": launch.samples}
            constexprs = {name: value for name, value in constexprs.items() if name in kernel.arg_names}
            signature = {argument: kinds.get(argument, f"*{dtype}") for argument in kernel.arg_names
                         if argument not in constexprs}
            specs.append(Spec(kernel, signature, constexprs, launch.warps, f"{kernel.__name__} {dtype}{label}", (cc,),
                              resident_warps=16))
    return specs
