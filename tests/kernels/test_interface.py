"""The public functions: which backend runs, and one clear error for every wrong argument."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ctr_kernels
from ctr_kernels import (
    BackendUnavailable,
    EmbeddingTable,
    SparseRowwiseAdagrad,
    SparseSGD,
    TransformerLayer,
    backends,
    ffn,
    field_attention,
)
from ctr_kernels.attention import field_attention_packed
from ctr_kernels.backend import resolve
from ctr_kernels.library import NATIVE_ABSENT

CPU = torch.device("cpu")
needs_native = pytest.mark.skipif(NATIVE_ABSENT is not None, reason=f"native: {NATIVE_ABSENT}")


def x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


@pytest.mark.parametrize("kernels", ["auto", "eager"])
@pytest.mark.parametrize(("q", "k", "v", "heads", "error"), [
    (x(2, 64), x(2, 64), x(2, 64), 4, r"q has shape \(2, 64\)"),
    (x(2, 5, 64), x(2, 6, 64), x(2, 5, 64), 4, r"v has shape \(2, 5, 64\)"),
    (x(2, 5, 64), x(2, 6, 32), x(2, 6, 32), 4, r"k has shape \(2, 6, 32\)"),
    (x(2, 5, 64), x(2, 5, 64), x(1, 5, 64), 4, r"v has shape \(1, 5, 64\)"),
    (x(2, 0, 64), x(2, 0, 64), x(2, 0, 64), 4, "F=0 fields"),
    (x(2, 5, 64), x(2, 5, 64), x(2, 5, 64), 5, "D=64 is not divisible into num_heads=5"),
    (x(2, 5, 64), x(2, 5, 64), x(2, 5, 64), 0, "num_heads=0"),
])
def test_attention_refuses_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, error: str,
                                  kernels: str) -> None:
    with pytest.raises(ValueError, match=error):
        field_attention(q, k, v, num_heads=heads, kernels=kernels)


def test_attention_refuses_dtypes_and_settings() -> None:
    with pytest.raises(TypeError, match=r"k has dtype torch\.float64, q has torch\.float32"):
        field_attention(x(1, 2, 8), x(1, 2, 8, dtype=torch.float64), x(1, 2, 8), num_heads=1)
    with pytest.raises(TypeError, match=r"q has dtype torch\.int64"):
        field_attention(*[torch.ones(1, 2, 8, dtype=torch.int64)] * 3, num_heads=1)
    with pytest.raises(ValueError, match=r"dropout_p=1\.0 is outside"):
        field_attention(*[x(1, 2, 8)] * 3, num_heads=1, dropout_p=1.0)
    with pytest.raises(ValueError, match="seed=18446744073709551616 does not fit"):
        field_attention(*[x(1, 2, 8)] * 3, num_heads=1, dropout_p=0.1, seed=2**64)
    with pytest.raises(ValueError, match="kernels='fast'"):
        field_attention(*[x(1, 2, 8)] * 3, num_heads=1, kernels="fast")
    with pytest.raises(ValueError, match=r"qkv has shape \(1, 2, 8\)"):
        field_attention_packed(x(1, 2, 8), num_heads=1)


@pytest.mark.parametrize("kernels", ["auto", "eager"])
@pytest.mark.parametrize(("changed", "error"), [
    ({0: (3, 7)}, r"x has shape \(3, 7\)"),
    ({2: (9,)}, r"b1 has shape \(9,\)"),
    ({3: (16, 8)}, r"w2 has shape \(16, 8\)"),
    ({4: (1,)}, r"b2 has shape \(1,\)"),
    ({1: (16,)}, r"w1 \(16,\)"),
])
def test_ffn_refuses_shapes(changed: dict[int, tuple[int, ...]], error: str, kernels: str) -> None:
    shapes = [(3, 8), (16, 8), (16,), (8, 16), (8,)]
    with pytest.raises(ValueError, match=error):
        ffn(*(x(*changed.get(i, shape)) for i, shape in enumerate(shapes)), kernels=kernels)


def test_ffn_refuses_dtypes_and_settings() -> None:
    inputs = [x(3, 8), x(12, 8), x(12), x(8, 12), x(8)]
    with pytest.raises(ValueError, match="activation='swish'"):
        ffn(*inputs, activation="swish")
    with pytest.raises(TypeError, match="w1 has dtype"):
        ffn(x(3, 8), *(x(*shape, dtype=torch.float64) for shape in [(16, 8), (16,), (8, 16), (8,)]))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_native_names_the_dtypes_it_takes_and_auto_goes_eager(dtype: torch.dtype) -> None:
    q = x(2, 5, 32, dtype=dtype)
    with pytest.raises(TypeError, match=rf"kernels='native' takes .*, not {dtype}"):
        field_attention(q, q, q, num_heads=2, kernels="native")
    assert field_attention(q, q, q, num_heads=2).dtype == dtype
    assert resolve("auto", CPU, "ffn", dtype) == "eager"


def test_backends_say_what_runs() -> None:
    found = backends()
    assert set(found) == {"native", "triton", "eager"}
    for name, backend in found.items():
        assert (backend.level is None) == (backend.reason is not None), name
    assert resolve("eager", CPU, "ffn") == "eager"
    assert resolve("auto", CPU, "ffn") == ("native" if NATIVE_ABSENT is None else "eager")


def test_triton_on_a_cpu_is_a_clear_error() -> None:
    with pytest.raises(BackendUnavailable, match="kernels='triton' cannot run: .* kernels='eager' runs anywhere"):
        resolve("triton", CPU, "ffn")
    with pytest.raises(BackendUnavailable, match="triton"):
        field_attention(*[x(1, 2, 8)] * 3, num_heads=1, kernels="triton")


def python(code: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd,
                          env={**os.environ, **environment}, timeout=60)


@needs_native
def test_the_instruction_set_can_be_forced() -> None:
    code = "import ctr_kernels; print(ctr_kernels.backends()['native'].level)"
    for level in ("baseline", backends()["native"].level):
        assert python(code, CTR_KERNELS_SIMD=level).stdout.strip() == level
    refused = python(code, CTR_KERNELS_SIMD="sse9")
    assert refused.returncode and "CTR_KERNELS_SIMD=sse9: choose avx512, avx2 or baseline" in refused.stderr


def test_everything_runs_without_the_native_library() -> None:
    """As where no compiler was found: the library is not there."""
    code = """
import pathlib
found = pathlib.Path.glob
pathlib.Path.glob = lambda self, pattern: [] if "_native" in pattern else found(self, pattern)
import torch, ctr_kernels
print(ctr_kernels.backends()["native"])
layer, table = ctr_kernels.TransformerLayer(32, 2, 64, dropout=0.1), ctr_kernels.EmbeddingTable(10, 32)
layer(table(torch.tensor([[1, 2, 3]]))).sum().backward()
ctr_kernels.SparseSGD(table.parameters(), lr=0.1).step()
try:
    table(torch.tensor([[1, 10]]))
except IndexError as error:
    print(error)
ctr_kernels.TransformerLayer(32, 2, 64, kernels="native")(torch.randn(1, 2, 32))
"""
    done = python(code)
    assert "the extension is not built" in done.stdout
    assert "id 10 at position [0, 1] is outside the table of 10 rows" in done.stdout
    assert "BackendUnavailable: kernels='native' cannot run: the extension is not built" in done.stderr


@needs_native
def test_a_library_of_other_sources_is_not_loaded(tmp_path: Path) -> None:
    """Schemas and their version are compared before anything of the library runs."""
    package = Path(ctr_kernels.__file__).parent
    shutil.copytree(package, tmp_path / "ctr_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    operators = tmp_path / "ctr_kernels" / "operators.inc"
    code = """
import ctr_kernels, torch
print(ctr_kernels.backends()["native"])
q = torch.randn(2, 5, 16)
print(ctr_kernels.field_attention(q, q, q, num_heads=2).shape)
ctr_kernels.field_attention(q, q, q, num_heads=2, kernels="native")
"""
    operators.write_text(operators.read_text().replace("int num_heads", "int heads"))
    done = python(code, tmp_path)  # the folder it runs in is where packages are found first
    reason = "was built from another version of the sources than these Python files; run `pip install"
    assert reason in done.stdout and "torch.Size([2, 5, 16])" in done.stdout
    assert "BackendUnavailable: kernels='native' cannot run: _native" in done.stderr and reason in done.stderr


def test_tables_and_optimizers_refuse() -> None:
    with pytest.raises(ValueError, match="num_rows=0"):
        EmbeddingTable(0, 8)
    with pytest.raises(TypeError, match=r"ids have dtype torch\.float32"):
        EmbeddingTable(5, 8)(torch.ones(3))
    with pytest.raises(ValueError, match=r"lr=-1\.0 is negative"):
        SparseSGD(EmbeddingTable(5, 8).parameters(), lr=-1.0)
    with pytest.raises(ValueError, match=r"eps=0\.0 must be positive"):
        SparseRowwiseAdagrad(EmbeddingTable(5, 8).parameters(), lr=1.0, eps=0.0)
    dense = torch.nn.Embedding(5, 8)
    dense(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"the gradient of a table \(5, 8\) is dense"):
        SparseSGD(dense.parameters(), lr=0.1).step()
    for arguments, error in [({"norm": "rms"}, "norm='rms'"), ({"activation": "x"}, "activation='x'"),
                             ({"kernels": "x"}, "kernels='x'")]:
        with pytest.raises(ValueError, match=error):
            TransformerLayer(32, 2, 64, **arguments)


def test_optimizers_work_like_those_of_torch() -> None:
    table = torch.nn.Embedding(10, 4, sparse=True)
    optimizer = SparseRowwiseAdagrad([{"params": [table.weight], "lr": 0.5}], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    before = table.weight.detach().clone()
    table(torch.tensor([3, 3])).sum().backward()
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.25
    # the summed gradient is 2 everywhere: s = 4, the step lr * 2 / (2 + eps) = lr
    torch.testing.assert_close(table.weight[3], before[3] - 0.5)
    other = SparseRowwiseAdagrad(table.parameters(), lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(other.state[table.weight]["sum"], optimizer.state[table.weight]["sum"])
    assert other.param_groups[0]["lr"] == 0.25


def test_the_public_names() -> None:
    for name in ctr_kernels.__all__:
        assert getattr(ctr_kernels, name).__doc__, name
