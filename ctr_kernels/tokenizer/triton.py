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
from ..triton_launch import (
    Key,
    architecture,
    capability,
    is_measured,
    launch_choice,
    multiprocessors,
    table_choice,
    width_of,
)
from ..triton_support import CAPABILITIES, Spec
from .operator import TRITON_MAX_TILE, Sizes, backward_sizes, sizes_of, split_sums
from .reference import History
from .triton_kernels import backward_kernel, forward_kernel

PROGRAMS = 4  # of the backward a multiprocessor
Tensor = torch.Tensor


class Launch(NamedTuple):
    """A launch configuration: tokens of a slice, samples that a program works on at once, and warps."""

    tokens: int
    samples: int
    warps: int


def launch_key(kernel: str, sizes: Sizes, dtype: torch.dtype, cc: int) -> Key:
    """shape: fields or features and elements of a token, both rounded up to powers of 2, and statistics."""
    tokens = triton.next_power_of_2(max(sizes.K, sizes.CLS + sizes.N))
    shape = (tokens, max(16, triton.next_power_of_2(sizes.D)), sizes.S)
    return Key("tokenizer", kernel, shape, width_of(dtype), architecture(cc))


def default(key: Key) -> Launch:
    """4 warps that load 16 bytes a thread, as often as it takes for 4096 elements, or 2048 beside sums."""
    tokens, block_d, _ = key.shape
    slice_tokens = min(tokens, max(1, 4 * 32 * (4 if key.arithmetic == "fp32" else 8) // block_d))
    elements = 4096 if key.kernel == "forward" else 2048
    return Launch(slice_tokens, max(1, elements // (slice_tokens * block_d)), 4 if block_d < 4096 else 8)


def candidates(key: Key) -> Iterator[Launch]:
    """What a search tries: not more than TRITON_MAX_TILE elements at once."""
    tokens, block_d, statistics = key.shape
    sums = 1 + statistics if key.kernel == "backward" else 0
    slices = sorted({min(tokens, slice_tokens) for slice_tokens in (4, 8, 16, 32)})
    for launch in itertools.starmap(Launch, itertools.product(slices, (1, 2, 4, 8, 16), (2, 4, 8))):
        if launch.tokens * (launch.samples + sums) * block_d <= TRITON_MAX_TILE:
            yield launch


def forward(weight: Tensor, ids: Tensor, dense: Tensor, dense_weight: Tensor, dense_bias: Tensor | None,
            cls: Tensor | None, field_bias: Tensor | None, history_weight: Tensor | None, history_bias: Tensor | None,
            mean: Tensor | None, scale: Tensor | None, one: bool, dropout_p: float, seed: Tensor | None) -> Tensor:
    """[B, T, D]; all tensors contiguous."""
    sizes, batch = sizes_of(ids, dense, weight, history_weight, one, cls), len(ids)
    out = torch.empty(batch, sizes.head + sizes.K, sizes.D, dtype=dense_weight.dtype, device=weight.device)
    key = launch_key("forward", sizes, out.dtype, capability(weight.device))

    def run(launch: Launch) -> None:
        slices = triton.cdiv(sizes.K, launch.tokens) + triton.cdiv(sizes.head, launch.tokens)
        with torch.cuda.device_of(weight):
            forward_kernel[(triton.cdiv(batch, launch.samples) * slices,)](
                weight, ids, dense, dense_weight, dense_bias, cls, field_bias, history_weight, history_bias, mean,
                scale, seed, out, batch, len(weight), threshold(dropout_p), 1.0 / (1.0 - dropout_p),
                **sizes._asdict(), BLOCK_D=key.shape[1], TOKENS=launch.tokens, ROWS=launch.samples,
                num_warps=launch.warps)

    if batch:
        run(launch_choice(key, default, candidates, run))
    return out


def backward(grad_out: Tensor, dense: Tensor, mean: Tensor | None, scale: Tensor | None, fields: int, one: bool,
             cls: bool, biased: bool, dropout_p: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """Row gradients [B K, D], and the sums of `split_sums` in fp32; all tensors contiguous."""
    sizes, batch, device = backward_sizes(grad_out, dense, mean, fields, one, cls), len(grad_out), grad_out.device
    rows = torch.empty(batch * sizes.K, sizes.D, dtype=grad_out.dtype, device=device)
    key, total = launch_key("backward", sizes, grad_out.dtype, capability(device)), sizes.sums(biased)

    def run(launch: Launch) -> Tensor:
        slices = triton.cdiv(sizes.K, launch.tokens) + triton.cdiv(sizes.CLS + sizes.N, launch.tokens)
        most = PROGRAMS * multiprocessors(device, interpreted=4) // slices
        groups = max(1, min(most, triton.cdiv(batch, launch.samples)))
        partial = torch.empty(groups, total, dtype=torch.float32, device=device)
        with torch.cuda.device_of(grad_out):
            backward_kernel[(groups * slices,)](
                grad_out, dense, mean, scale, seed, rows, partial, batch, threshold(dropout_p),
                1.0 / (1.0 - dropout_p), **sizes._asdict(), BIASED=biased, SUMS=total, BLOCK_D=key.shape[1],
                TOKENS=launch.tokens, ROWS=launch.samples, num_warps=launch.warps)
        return partial.sum(0)

    if not batch:
        return rows, torch.zeros(total, dtype=torch.float32, device=device)
    return rows, run(launch_choice(key, default, candidates, run))


class _Tokens(torch.autograd.Function):
    """Keeps ids, numbers and the seed; the table's gradient is a sparse COO tensor of (ids, rows)."""

    @staticmethod
    def forward(ctx: Any, indices: Tensor, plan: Plan | None, dropout_p: float, seed: Tensor | None, sizes: Sizes,
                weight: Tensor, ids: Tensor, dense: Tensor, dense_weight: Tensor, dense_bias: Tensor | None,
                cls: Tensor | None, field_bias: Tensor | None, *history: Tensor | None) -> Tensor:
        ctx.save_for_backward(indices, dense, dense_weight, *history, seed)
        ctx.table, ctx.plan, ctx.settings = weight.shape, plan, (dropout_p, sizes)
        out: Tensor = torch.ops.ctr.field_tokens(weight, ids, dense, dense_weight, dense_bias, cls, field_bias,
                                                 *history, sizes.ONE, dropout_p, seed)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        indices, dense, dense_weight, history_weight, _, mean, scale, seed = ctx.saved_tensors
        dropout_p, sizes = ctx.settings
        needed = ctx.needs_input_grad[5:]  # weight, ids, dense, dense_weight, dense_bias, cls, field_bias, history
        biased = any(needed[6:])
        rows, sums = torch.ops.ctr.field_tokens_backward(grad.contiguous(), dense, mean, scale, sizes.K, sizes.ONE,
                                                         bool(sizes.CLS), biased, dropout_p, seed)
        head, fields, to_dense, to_history = split_sums(sums.to(grad.dtype), sizes, biased)
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
    sizes = sizes_of(ids, dense, weight, None if history is None else history.weight, numeric == "token", cls)
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
        biased = field_bias or sizes.S > 0
        for name, kernel, own in (("forward", forward_kernel, {}),
                                  ("backward", backward_kernel, {"BIASED": biased, "SUMS": sizes.sums(biased)})):
            key = launch_key(name, sizes, torch.float32 if dtype == "fp32" else torch.bfloat16, cc)
            launch = table_choice(key, default)
            constexprs = absent | own | sizes._asdict() | {"BLOCK_D": key.shape[1], "TOKENS": launch.tokens,
                                                           "ROWS": launch.samples}
            constexprs = {name: value for name, value in constexprs.items() if name in kernel.arg_names}
            signature = {argument: kinds.get(argument, f"*{dtype}") for argument in kernel.arg_names
                         if argument not in constexprs}
            specs.append(Spec(kernel, signature, constexprs, launch.warps, f"{kernel.__name__} {dtype}{label}", (cc,),
                              resident_warps=16, measured=is_measured(key)))
    return specs
