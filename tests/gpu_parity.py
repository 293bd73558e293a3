"""Parity of every Triton kernel on a GPU at full size, in each arithmetic: plain functions that gpu_checks.py runs."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # parity.py asks for deterministic algorithms

import torch
from parity import FP32_UNIT, SEED, Tensors, assert_parity, cross_inputs, ffn_inputs, with_gradients

from ctr_kernels import (
    EmbeddingTable,
    SparseRowwiseAdagrad,
    SparseSGD,
    TransformerLayer,
    ffn,
    field_attention,
    field_tokens,
    low_rank_cross,
)
from ctr_kernels.attention import field_attention_packed
from ctr_kernels.attention.reference import field_attention_reference
from ctr_kernels.cross.reference import low_rank_cross_reference
from ctr_kernels.ffn.reference import ffn_reference
from ctr_kernels.philox import dropout_mask, dropout_mask_torch
from ctr_kernels.sparse_update.reference import update_reference
from ctr_kernels.sparse_update.rule import RowState, Rule
from ctr_kernels.tokenizer import History

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# A TF32 product has inputs of 11 bits; PyTorch may compute small ones in fp32, which bounds no error of TF32.
UNITS = {"tf32": 2.0**-11}
FIELDS, DENSE = 26, 13


@dataclass(frozen=True)
class Scale:
    """Sizes of the checks: rows of a batch; more rows than a grid's second dimension holds; of the table; steps.

    kernels: of what is trained; a step takes seconds in Triton's interpreter, which has tests of its own.
    """

    device: torch.device
    batch: int
    many: int
    table_rows: int
    steps: int
    kernels: str

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def choose(self, shapes: list[Any]) -> list[Any]:
        """All of them on a GPU; the first and the last in the interpreter, which has tests of its own."""
        return shapes if self.is_gpu else [shapes[0], shapes[-1]]


def full(device: str = "cuda") -> Scale:
    return Scale(torch.device(device), batch=4096, many=70_000, table_rows=2_000_000, steps=300, kernels="triton")


def tiny(device: str) -> Scale:
    return Scale(torch.device(device), batch=2, many=3, table_rows=300, steps=5,
                 kernels="triton" if device == "cuda" else "auto")


class Unavailable(Exception):
    """A check cannot be done here; the message says why."""


@contextmanager
def arithmetic(precision: str, scale: Scale) -> Iterator[torch.dtype]:
    """Within: PyTorch's switch of that precision; yields the dtype of tensors."""
    if precision == "bf16" and not scale.is_gpu:
        raise Unavailable("Triton's interpreter has no bfloat16 dot")
    if precision == "tf32" and not scale.is_gpu:
        raise Unavailable("Triton's interpreter computes TF32 products in fp32")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield DTYPES[precision]
    finally:
        torch.set_float32_matmul_precision(before)


def compare(kernel: Callable, reference: Callable, inputs: Tensors, grad_out: torch.Tensor, precision: str) -> None:
    """The parity rule of parity.py on the inputs' device; and the same bits in a second run.

    PyTorch multiplies many a shape in fp32 where it might in TF32: there eager's error is that of bfloat16, whose
    factors have 8 bits in place of 11, divided by 8, if that is larger.
    """
    found, eager = with_gradients(kernel, inputs, grad_out), with_gradients(reference, inputs, grad_out)
    exact = with_gradients(reference, [x.double() for x in inputs], grad_out.double())
    if precision == "tf32":
        coarse = with_gradients(reference, [x.bfloat16() for x in inputs], grad_out)
        eager = [e if not x.numel() or (e - x).abs().max() > (c - x).abs().max() / 8 else (x + (c - x) / 8).to(e.dtype)
                 for e, c, x in zip(eager, coarse, exact, strict=True)]
    where = f"inputs {', '.join(str(tuple(x.shape)) for x in inputs)}"
    try:
        assert_parity(found, eager, exact, UNITS.get(precision, FP32_UNIT))
    except AssertionError as error:
        raise AssertionError(f"{error}; {where}") from None
    again = with_gradients(kernel, inputs, grad_out)
    different = [i for i, (a, b) in enumerate(zip(found, again, strict=True)) if not torch.equal(a, b)]
    assert not different, f"tensors {different} have other bits in a second run; {where}"


def attention(scale: Scale, precision: str) -> None:
    """Full size with 27 and 28 fields, dropout and without; more than 65,535 rows; the ends of the shapes."""
    shapes = [(scale.batch, 27, 64, 4, 0.1), (scale.batch, 28, 64, 4, 0.0), (scale.many, 27, 64, 4, 0.0),
              (1, 1, 8, 1, 0.0), (3, 33, 64, 2, 0.2), (2, 64, 64, 1, 0.2), (0, 27, 64, 4, 0.1)]
    seed = torch.tensor([SEED], device=scale.device)
    with arithmetic(precision, scale) as dtype:
        for batch, fields, dim, heads, dropout_p in scale.choose(shapes):
            qkv = torch.randn(batch, fields, 3 * dim, device=scale.device).to(dtype)
            factor = (dim // heads) ** -0.5

            def reference(qkv: torch.Tensor, heads: int = heads, factor: float = factor,
                          dropout_p: float = dropout_p) -> torch.Tensor:
                return field_attention_reference(*qkv.chunk(3, dim=-1), heads, factor, dropout_p, seed)

            for run in (lambda qkv, h=heads, p=dropout_p: field_attention_packed(
                            qkv, num_heads=h, dropout_p=p, seed=SEED, kernels="triton"),
                        lambda qkv, h=heads, p=dropout_p: field_attention(
                            *qkv.chunk(3, dim=-1), num_heads=h, dropout_p=p, seed=SEED, kernels="triton")):
                compare(run, reference, [qkv], torch.randn(batch, fields, dim, device=scale.device), precision)


def feed_forward(scale: Scale, precision: str) -> None:
    """Full size, which is 110,592 tokens, with each smooth activation, and the ends of the shapes.

    ReLU at few tokens: of 14 million inputs some round to the other side of 0, and move a gradient by its whole size.
    """
    tokens = scale.batch * 27
    shapes = [(tokens, 64, 256, "gelu", 0.1), (tokens, 64, 256, "gelu_tanh", 0.0), (tokens, 64, 128, "gelu_tanh", 0.0),
              (1, 64, 256, "gelu", 0.1), (97, 64, 128, "relu", 0.0), (97, 20, 8, "gelu", 0.1),
              (0, 64, 256, "gelu", 0.1)]
    seed = torch.tensor([SEED], device=scale.device)
    with arithmetic(precision, scale) as dtype:
        for tokens, dim, hidden, activation, dropout_p in scale.choose(shapes):
            inputs = [x.to(scale.device) for x in ffn_inputs(tokens, dim, hidden, dtype)]
            grad_out = torch.randn(tokens, dim, device=scale.device) / max(1, tokens) ** 0.5
            compare(lambda *t, a=activation, p=dropout_p: ffn(*t, activation=a, dropout_p=p, seed=SEED,
                                                              kernels="triton"),
                    lambda *t, a=activation, p=dropout_p: ffn_reference(*t, a, p, seed), inputs, grad_out, precision)


def layer(scale: Scale, precision: str) -> None:
    """The transformer layer, both norms, with the gradients of all its weights; no dropout, whose seeds are drawn.

    Nor ReLU: an input that rounds to the other side of 0 after five roundings moves a gradient by its whole size.
    """
    with arithmetic(precision, scale) as dtype:
        for norm, hidden, activation in (("pre", 256, "gelu"), ("post", 128, "gelu_tanh")):
            results = []
            x, grad = (torch.randn(scale.batch, 28, 64).to(dtype) for _ in range(2))
            weights = TransformerLayer(64, 4, hidden).state_dict()
            for kernels, kind in (("triton", dtype), ("eager", dtype), ("eager", torch.float64)):
                module = TransformerLayer(64, 4, hidden, norm=norm, activation=activation, kernels=kernels)
                module.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()})
                module.to(scale.device, kind)
                inputs = x.to(scale.device, kind).requires_grad_()
                out = module(inputs)
                scaled = grad.to(scale.device, kind) / (scale.batch * 28) ** 0.5
                results.append([out.detach(), *torch.autograd.grad(out, [inputs, *module.parameters()], scaled)])
            assert_parity(*results, UNITS.get(precision, FP32_UNIT))


def cross(scale: Scale, precision: str) -> None:
    """The cross layer at the widths of the models: DCNv2's, a shortcut's from tokens; and the ends of the shapes."""
    shapes = [(scale.batch, 429, 32), (scale.batch, 2496, 32), (33, 624, 64), (1, 5, 1), (0, 429, 32)]
    with arithmetic(precision, scale) as dtype:
        for batch, width, rank in scale.choose(shapes):
            inputs = [t.to(scale.device) for t in cross_inputs(batch, width, rank, dtype)]
            grad_out = torch.randn(batch, width, device=scale.device) / max(1, batch) ** 0.5
            compare(lambda *t: low_rank_cross(*t, kernels="triton"), low_rank_cross_reference, inputs, grad_out,
                    precision)


def tokens(scale: Scale, precision: str) -> None:
    """The baseline study's tokens, with a bias for each field, and the default recipe's; of the table the gradients of
    its rows."""
    rows, dim = scale.table_rows, 64
    with arithmetic(precision, scale) as dtype:
        for numeric, statistics, dropout_p, biased in (("token", 0, 0.0, False), ("affine", 2, 0.2, False),
                                                       ("affine", 0, 0.0, True)):
            ids = torch.randint(rows, (scale.batch, FIELDS), device=scale.device)
            vectors, past = (DENSE, dim), statistics * FIELDS
            sizes = [(rows, dim), (scale.batch, DENSE + past), (dim, DENSE) if numeric == "token" else vectors,
                     (dim,) if numeric == "token" else vectors, None if statistics else (dim,),
                     (FIELDS, dim) if biased else None,
                     *([(statistics, FIELDS, dim), (FIELDS, dim), (past,), (past,)] if statistics else [])]
            inputs = [None if size is None else torch.randn(size).to(scale.device, dtype) for size in sizes]
            count = FIELDS + (1 if numeric == "token" else DENSE) + (statistics == 0)
            grad = torch.randn(scale.batch, count, dim, device=scale.device) / scale.batch**0.5
            results = []
            for kernels, kind in (("triton", dtype), ("eager", dtype), ("eager", torch.float64)):
                leaves = [None if t is None else t.to(kind).requires_grad_(i < 8) for i, t in enumerate(inputs)]
                out = field_tokens(leaves[0], ids, *leaves[1:6], numeric=numeric, dropout_p=dropout_p, seed=SEED,
                                   history=History(*leaves[6:]) if statistics else None, kernels=kernels)
                table, *grads = torch.autograd.grad(out, [t for t in leaves[:8] if t is not None], grad.to(kind))
                results.append([out.detach(), table._values(), *grads])
            assert_parity(*results, UNITS.get(precision, FP32_UNIT))


def row_updates(scale: Scale) -> None:
    """Both optimizers at uniform, skewed and equal ids, two steps; rows that have no gradient stay as they were."""
    rows, dim = scale.table_rows, 64
    uniform = torch.randint(rows, (scale.batch, FIELDS))
    skewed = (torch.rand(scale.batch, FIELDS) ** 9 * rows).long()
    for ids in scale.choose([uniform, torch.full_like(uniform, rows - 1), uniform[:0], uniform[:1, :1], skewed]):
        ids = ids.to(scale.device)
        for optimizer_of, name in ((SparseSGD, "sgd"), (SparseRowwiseAdagrad, "rowwise-adagrad")):
            table = EmbeddingTable(rows, dim, std=1.0, kernels="triton").to(scale.device)
            before = table.weight.detach().clone()
            optimizer = optimizer_of(table.parameters(), lr=0.1, kernels="triton")
            grads = torch.randn(*ids.shape, dim, device=scale.device)
            for _ in range(2):
                table(ids.int()).backward(grads)
                optimizer.step()
                optimizer.zero_grad()
            touched, results = ids.unique(), []
            for dtype in (torch.float32, torch.float64):
                weight, state = before.to(dtype), RowState(torch.zeros(rows, dtype=dtype, device=scale.device))
                for _ in range(2):
                    update_reference(weight, ids.flatten(), grads.view(-1, dim).to(dtype), Rule(name, 0.1), state)
                results.append([weight[touched]])
            assert_parity([table.weight.detach()[touched]], *results)
            untouched = torch.ones(rows, dtype=torch.bool, device=scale.device)
            untouched[ids.flatten()] = False
            assert torch.equal(table.weight[untouched], before[untouched]), f"{name} wrote to rows without gradient"


def masks(scale: Scale) -> None:
    """The mask drawn on the device is the specification's on a CPU."""
    for rows, width in ((2000, 27), (5, 64), (0, 8)):
        drawn = dropout_mask(rows, width, 0.3, torch.tensor([77], device=scale.device))
        assert torch.equal(drawn.cpu(), dropout_mask_torch(rows, width, 0.3, torch.tensor([77]))), (rows, width)


CHECKS: dict[str, Callable[[Scale], Any]] = {
    "masks": masks,
    **{f"attention {p}": lambda s, p=p: attention(s, p) for p in DTYPES},
    **{f"ffn {p}": lambda s, p=p: feed_forward(s, p) for p in DTYPES},
    **{f"layer {p}": lambda s, p=p: layer(s, p) for p in DTYPES},
    **{f"cross {p}": lambda s, p=p: cross(s, p) for p in DTYPES},
    **{f"tokens {p}": lambda s, p=p: tokens(s, p) for p in DTYPES},
    "row updates": row_updates,
}
