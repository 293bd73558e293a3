"""`auto` computes whatever eager does; a backend that was chosen says why it does not take a call."""

import importlib.util
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from parity import cross_inputs

from ctr_kernels import BackendUnavailable, TransformerLayer, backend, backends, ffn, field_attention, low_rank_cross
from ctr_kernels.attention import field_attention_packed
from ctr_kernels.backend import resolve
from ctr_kernels.cross.operator import supports as cross_supports
from ctr_kernels.ffn.operator import supports as ffn_supports
from ctr_kernels.library import NATIVE_ABSENT
from ctr_kernels.tokenizer.operator import supports as token_supports

CUDA = torch.device("cuda", 0)
needs_native = pytest.mark.skipif(NATIVE_ABSENT is not None, reason=f"native: {NATIVE_ABSENT}")


def attention(fields: int, dim: int, heads: int) -> Callable[[str], torch.Tensor]:
    torch.manual_seed(0)
    qkv = torch.randn(2, fields, 3 * dim)
    return lambda kernels: field_attention(*qkv.chunk(3, dim=-1), num_heads=heads, kernels=kernels)


def packed(fields: int, dim: int, heads: int) -> Callable[[str], torch.Tensor]:
    torch.manual_seed(0)
    qkv = torch.randn(2, fields, 3 * dim)
    return lambda kernels: field_attention_packed(qkv, num_heads=heads, kernels=kernels)


def feed_forward(dim: int, hidden: int) -> Callable[[str], torch.Tensor]:
    torch.manual_seed(0)
    inputs = [torch.randn(shape) for shape in [(3, dim), (hidden, dim), (hidden,), (dim, hidden), (dim,)]]
    return lambda kernels: ffn(*inputs, dropout_p=0.2, seed=3, kernels=kernels)


def layer(fields: int, dim: int, heads: int, hidden: int) -> Callable[[str], torch.Tensor]:
    torch.manual_seed(0)
    x, whole = torch.randn(2, fields, dim), TransformerLayer(dim, heads, hidden)

    def run(kernels: str) -> torch.Tensor:
        whole.kernels = kernels
        return whole(x)

    return run


FIELDS = "129 queries of F=129 fields; F from 1 to 128 is supported"
CALLS = {
    "129 fields": (attention(129, 64, 4), FIELDS),
    "129 fields, packed": (packed(129, 64, 4), FIELDS),
    "heads of 129": (packed(5, 258, 2), "D / num_heads = 129; 1 to 128 are supported"),
    "a layer of 129 fields": (layer(129, 64, 4, 128), FIELDS),
    "a layer with heads of 130": (layer(5, 260, 2, 96), "D / num_heads = 130; 1 to 128 are supported"),
}


@pytest.mark.parametrize("call", CALLS)
def test_auto_computes_what_eager_does(call: str) -> None:
    run, _ = CALLS[call]
    torch.testing.assert_close(run("auto"), run("eager"), rtol=1e-4, atol=1e-4)


@needs_native
@pytest.mark.parametrize("call", CALLS)
def test_a_chosen_backend_says_why_not(call: str) -> None:
    run, reason = CALLS[call]
    with pytest.raises(ValueError, match=f"kernels='native': {re.escape(reason)}.*kernels='eager' takes any"):
        run("native")


def test_what_nothing_computes_is_refused() -> None:
    for kernels in ("auto", "eager"):
        with pytest.raises(ValueError, match="F=0 fields; at least 1 is needed"):
            attention(0, 64, 4)(kernels)
        with pytest.raises(ValueError, match="D=48 is not divisible into num_heads=5"):
            attention(3, 48, 5)(kernels)


@needs_native
def test_the_half_that_fits_stays_fused() -> None:
    heads = TransformerLayer(260, 2, 64)
    assert "attention: children are called: D / num_heads = 130" in repr(heads) and "FFN: fused (native)" in repr(heads)
    assert heads.operations(5) == {"attention_block": "eager", "field_attention": "eager", "ffn": "native"}


def test_limits_of_triton() -> None:
    assert cross_supports("triton", 429, 64) is None and cross_supports("native", 429, 65) is None
    assert cross_supports("triton", 429, 65) == "R=65; kernels='triton' takes up to 64"
    assert cross_supports("triton", 2**24, 64) == f"R W = {2**30}; kernels='triton' takes up to {2**29}"
    assert token_supports("triton", 64, 2) is None
    assert "D=9000 with 0 statistics" in (token_supports("triton", 9000, 0) or "")
    assert ffn_supports("triton", 64, 2**21, "gelu") is None
    assert ffn_supports("triton", 64, 2**21 + 8, "gelu") == "hidden=2097160; kernels='triton' takes up to 2097152"
    assert ffn_supports("triton", 64, 256, "relu", "normed") == "norm='normed' has no kernels"
    assert ffn_supports("native", 64, 256, "relu", "post") == "norm='post' has no kernels"


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Make torch say that it sees a GPU of that capability, with or without the package triton, of NVIDIA or AMD."""

    def set_up(capability: tuple[int, int], *, triton: bool = True, hip: str | None = None) -> None:
        found = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec",
                            lambda name, *of: (SimpleNamespace() if triton else None) if name == "triton"
                            else found(name, *of))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        forget()

    def forget() -> None:
        for name in ("_triton_installed", "_capability"):
            getattr(backend, name).cache_clear()

    yield set_up
    monkeypatch.undo()
    forget()


@pytest.mark.parametrize(("options", "reason"), [
    ({"capability": (7, 5)}, "the device is sm_75; the kernels need sm_80"),
    ({"capability": (7, 0)}, "the device is sm_70; the kernels need sm_80"),
    ({"capability": (9, 0), "triton": False}, "the package triton is not installed; run `pip install triton`"),
    ({"capability": (9, 4), "hip": "6.2.1"}, "this is ROCm 6.2.1; the kernels are written for NVIDIA GPUs"),
])
def test_a_gpu_that_triton_does_not_serve_is_eager(device: Callable[..., None], options: dict, reason: str) -> None:
    device(**options)
    assert backends()["triton"] == (None, reason, ())
    for operation in backend.OPERATIONS:
        assert resolve("auto", CUDA, operation) == "eager"
        with pytest.raises(BackendUnavailable, match=re.escape(f"kernels='triton' cannot run: {reason}")):
            resolve("triton", CUDA, operation)


def test_a_gpu_that_triton_serves(device: Callable[..., None]) -> None:
    device((8, 0))
    assert backends()["triton"].level == "sm_80"
    for operation in backend.OPERATIONS:
        assert resolve("auto", CUDA, operation) == "triton"
    assert resolve("auto", CUDA, "ffn", torch.float32, lambda of: "too wide") == "eager"
    assert resolve("auto", CUDA, "ffn", torch.float64) == "eager"
    with pytest.raises(ValueError, match="ffn with kernels='triton': too wide. kernels='eager' takes any"):
        resolve("triton", CUDA, "ffn", torch.float32, lambda of: "too wide")
    with pytest.raises(BackendUnavailable, match="cannot run: it runs on CUDA tensors, these are on cpu"):
        resolve("triton", torch.device("cpu"), "ffn")


@needs_native
def test_forward_mode_differentiation_is_eager() -> None:
    x, tangent = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    results = []
    for kernels in ("auto", "eager"):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, tangent)
            out = field_attention(dual, dual, dual, num_heads=2, kernels=kernels)
            results.append(torch.autograd.forward_ad.unpack_dual(out).tangent)
    torch.testing.assert_close(*results)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(BackendUnavailable, match="use kernels='eager'"):
        low_rank_cross(*cross_inputs(2, 8, 4), kernels="native")
