"""Every Triton kernel launched once or tuned, with the batches and optimizers that gpu_checks.py trains with."""

import itertools
import os
import re
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from gpu_parity import DENSE, FIELDS, Scale, arithmetic
from parity import ffn_inputs
from torch import nn

from ctr_kernels import EmbeddingTable, TransformerLayer, ffn, field_attention
from ctr_kernels.triton_launch import _search as SEARCH
from ctr_kernels.triton_launch import time_of
from ctr_models import MODELS
from ctr_models.tokenizer import FeatureTokenizer
from ctr_train.optim import EMBEDDING_OPTIMIZERS, make_optimizers, update

STATISTICS = 2  # of a field's history
LAYERS: dict[str, dict[str, Any]] = {"ft": {"ffn_dim": 256, "norm": "pre", "activation": "gelu"},
                                     "autoint": {"ffn_dim": 128, "norm": "post", "activation": "relu"}}


class Batch(NamedTuple):
    """dense float32 [B, 13], sparse int32 [B, 26], label float32 [B]."""

    dense: torch.Tensor
    sparse: torch.Tensor
    label: torch.Tensor


class HostBatch(Batch):
    """A batch in host memory."""

    def to_device(self, device: torch.device) -> Batch:
        return Batch(*(x.to(device, non_blocking=True) for x in self))


def random_batch(rows: int, table_rows: int, seed: int) -> HostBatch:
    """Rows whose label depends on both kinds of feature, so that there is something to learn."""
    draw = torch.Generator().manual_seed(seed)
    dense = torch.rand(rows, DENSE, generator=draw)
    sparse = (torch.rand(rows, FIELDS, generator=draw) ** 6 * table_rows).int()
    logits = 3 * dense[:, :4].sum(1) - 7 + (sparse[:, :8] % 2).sum(1) * 0.5
    label = (torch.rand(rows, generator=draw) < logits.sigmoid()).float()
    return HostBatch(dense, sparse, label)


def optimizers_of(model: nn.Module, kernels: str) -> list[torch.optim.Optimizer]:
    return make_optimizers(model, embedding_optimizer="rowwise-adagrad", embedding_lr=0.02, lr=1e-3,
                           weight_decay=0.01, kernels=kernels)


def tuning(scale: Scale) -> None:
    """Every kernel at the shapes of training, those of the recipe `small` too: with CTR_KERNELS_AUTOTUNE=1 this prints
    lines for the launch tables, what counts most first. A rehearsal times one call of each candidate, for what that is
    worth.

    $CTR_TUNING_PART, "2/12", with $CTR_TUNING_BAD: of all candidates only compile every twelfth, from the second. So
    many processes side by side fill the cache of compiled kernels before one process times them all.
    """
    part = os.environ.get("CTR_TUNING_PART")
    if part is not None:
        first, parts = map(int, part.split("/"))
        with patch("ctr_kernels.triton_launch._search", partial(compile_some, first, parts)):
            tuned_work(scale)
        return
    with nullcontext() if scale.is_gpu else patch("ctr_kernels.triton_launch._milliseconds", one_call), \
            patch("ctr_kernels.triton_launch._search", without_bad):
        tuned_work(scale)


def tuned_work(scale: Scale) -> None:
    """The launches whose configurations are searched."""
    tokens = {"numeric": "affine", "history": STATISTICS, "embedding_dropout": 0.2}
    variants = {"dcnv2": tokens, **dict.fromkeys(("autoint", "ft"), {**tokens, "shortcut": "cross"})}
    update_rows(scale, scale.batch)  # before the models, whose tables are tiny: their launches are chosen here
    for fields in (28, 27):
        for precision in ("bf16", "fp32", "tf32") if scale.is_gpu else ("fp32", "fp16"):
            run_kernels(scale, precision, [(scale.batch, fields)], dropout=0.0)
            run_ffn(scale, precision, scale.batch * fields)
    for precision in ("bf16", "fp32") if scale.is_gpu else ("fp32", "fp16"):
        run_tokens(scale, precision, scale.batch)
    run_models(scale, scale.batch, variants if scale.is_gpu else {})


def compile_some(first: int, parts: int, key: Any, default: Any, candidates: Iterable[Any],
                 run: Callable[[Any], object], timer: Any) -> Any:
    """In place of the search: launches every `parts`-th candidate once, and chooses the default.

    An illegal access ends all use of the device by a process: $CTR_TUNING_BAD is a folder in which each candidate has a
    file while it runs, so that the next process, and the search, leave out what is left there.
    """
    for choice in list(dict.fromkeys((default, *candidates)))[first % parts::parts]:
        running = file_of(key, choice)
        if running.exists():
            continue
        running.touch()
        time_of(choice, run, one_call)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        running.unlink()
    return default


def file_of(key: Any, choice: Any) -> Path:
    """The file in $CTR_TUNING_BAD that a candidate has while it runs."""
    return Path(os.environ["CTR_TUNING_BAD"], re.sub(r"\W+", "-", f"{tuple(key)}-{tuple(choice)}"))


def without_bad(key: Any, default: Any, candidates: Iterable[Any], *rest: Any) -> Any:
    """The search, without candidates that ended a process, if other processes have compiled them."""
    if "CTR_TUNING_BAD" in os.environ:
        candidates = [choice for choice in candidates if not file_of(key, choice).exists()]
    return SEARCH(key, default, candidates, *rest)


def one_call(run: Callable[[], object]) -> float:
    """Milliseconds by the wall clock."""
    started = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - started)


def update_rows(scale: Scale, batch: int) -> None:
    """Two steps of every rule on tables of both widths, with the ids of a batch: the second meets a state."""
    for kind, dim in itertools.product(EMBEDDING_OPTIMIZERS.values(), (64, 16)):
        table = EmbeddingTable(scale.table_rows, dim, kernels="triton").to(scale.device)
        optimizer = kind(table.parameters(), lr=0.1, kernels="triton")
        for i in range(2):
            ids = random_batch(batch, scale.table_rows, i).sparse.to(scale.device)
            table(ids).backward(torch.randn(*ids.shape, dim, device=scale.device))
            optimizer.step()
            optimizer.zero_grad()
        assert table.weight.isfinite().all()


def run_kernels(scale: Scale, precision: str, shapes: list[tuple[int, int]], dropout: float = 0.1) -> None:
    """Layer, attention and FFN both ways at (batch, fields)."""
    with arithmetic(precision, scale) as dtype:
        for batch, fields in scale.choose(shapes):
            layer = LAYERS["ft" if fields == 28 else "autoint"]  # 28 with FT-Transformer's CLS token
            module = TransformerLayer(64, 4, **layer, dropout=dropout, kernels="triton").to(scale.device, dtype)
            x = torch.randn(batch, fields, 64).to(scale.device, dtype).requires_grad_()
            module(x).backward(torch.randn(batch, fields, 64).to(scale.device, dtype))
            assert x.grad.isfinite().all()
            q, k, v = torch.randn(batch, fields, 192).to(scale.device, dtype).chunk(3, dim=-1)
            assert field_attention(q, k, v, num_heads=8, kernels="triton").isfinite().all()
            y = ffn(*(t.to(scale.device) for t in ffn_inputs(batch * fields, 20, 24, dtype)), kernels="triton")
            assert y.isfinite().all()


def run_ffn(scale: Scale, precision: str, tokens: int) -> None:
    """The FFN of the layer by itself, both ways."""
    with arithmetic(precision, scale) as dtype:
        inputs = [t.to(scale.device).requires_grad_() for t in ffn_inputs(tokens, 64, 256, dtype)]
        ffn(*inputs, kernels="triton").backward(torch.randn(tokens, 64).to(scale.device, dtype))
        assert all(t.grad is not None and t.grad.isfinite().all() for t in inputs)


def run_tokens(scale: Scale, precision: str, batch: int) -> None:
    """The tokens of the recipe `small` both ways, as FT-Transformer and AutoInt have them."""
    with arithmetic(precision, scale) as dtype:
        tokenizer = FeatureTokenizer(num_embeddings=100, dim=64, dense="affine", history=STATISTICS,
                                     embedding_dropout=0.2, kernels="triton").to(scale.device, dtype)
        rows = random_batch(batch, 100, 0).to_device(scale.device)
        tokens = tokenizer(with_history(rows).dense, rows.sparse)
        tokens.backward(torch.randn_like(tokens))
        assert all(parameter.grad.to_dense().isfinite().all() for parameter in tokenizer.parameters())


def with_history(batch: Batch) -> Batch:
    """The batch with statistics of its fields behind the numbers."""
    past = torch.rand(len(batch.dense), STATISTICS * FIELDS, device=batch.dense.device)
    return batch._replace(dense=torch.cat([batch.dense, past], dim=1))


def run_models(scale: Scale, batch: int, variants: dict[str, dict[str, Any]]) -> None:
    """Two steps of the models, and of their variants."""
    forms = [(name, form) for name in (MODELS if scale.is_gpu else ("dcnv2",)) for form in ({}, variants.get(name))]
    for model_name, form in forms:
        if form is None:
            continue
        model = MODELS[model_name](num_embeddings=100, kernels="triton", **form).to(scale.device)
        optimizers = optimizers_of(model, "triton")
        for i in range(2):
            rows = random_batch(batch, 100, i).to_device(scale.device)
            update(model, optimizers, with_history(rows) if form else rows, precision="fp32")
        assert all(parameter.isfinite().all() for parameter in model.parameters())


# Every kernel at small shapes and nothing else: what a memory checker watches, one after the other until time is up.
SMALL = [(1, 64), (2, 28), (3, 27)]
LAUNCHES: dict[str, Callable[[Scale], None]] = {
    "row updates": lambda scale: update_rows(scale, 3),
    "models": lambda scale: run_models(scale, 3, {}),
    **{f"kernels {p}": lambda scale, p=p: run_kernels(scale, p, SMALL) for p in ("fp32", "bf16")},
    **{f"tokens {p}": lambda scale, p=p: run_tokens(scale, p, 3) for p in ("fp32", "bf16")},
}
