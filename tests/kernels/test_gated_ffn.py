"""The native feed-forward kernels with gates, of any width, alone and as half a layer."""

import math
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parity import SEED, Tensors, check, with_gradients
from triton_interpreter import INTERPRETED

from ctr_kernels import ffn
from ctr_kernels.ffn.operator import feed_forward
from ctr_kernels.ffn.reference import ACTIVATIONS, GATED, ffn_reference
from ctr_kernels.library import NATIVE_ABSENT
from ctr_kernels.philox import dropout_mask_torch

pytestmark = pytest.mark.skipif(NATIVE_ABSENT is not None or INTERPRETED, reason=f"native: {NATIVE_ABSENT}")

DTYPES = (torch.float32, torch.bfloat16)
NORMS = (None, "pre", "normed")
HIDDEN = (1, 7, 8, 64, 72, 170, 256)


def inputs_of(tokens: int, dim: int, hidden: int, activation: str, dtype: torch.dtype = torch.float32,
              norm: str | None = None) -> Tensors:
    """x, w1, b1, w2, b2, and with a norm its weight and bias."""
    rows = 2 * hidden if activation in GATED else hidden
    shapes = [(tokens, dim), (rows, dim), (rows,), (dim, hidden), (dim,), *([(dim,), (dim,)] if norm else [])]
    return [(torch.randn(shape) / (shape[-1] ** 0.5 if i in (1, 3) else 1.0)).to(dtype)
            for i, shape in enumerate(shapes)]


def check_ffn(inputs: Tensors, activation: str, dropout_p: float = 0.0, norm: str | None = None) -> None:
    def run(function: object, x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        affine = dict(zip(("norm_weight", "norm_bias"), weights[4:], strict=bool(norm)))
        out: torch.Tensor = function(x, *weights[:4], activation, dropout_p, torch.tensor([SEED]), norm=norm,  # type: ignore
                                     eps=1e-5, **affine)
        return out

    x = inputs[0]
    grad_out = torch.randn(x.shape) / max(1, x.numel() // x.shape[-1]) ** 0.5  # sums over the tokens are then about 1
    check(partial(run, feed_forward), partial(run, ffn_reference), inputs, grad_out.to(x.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("activation", GATED)
def test_gates(fused: str, activation: str, dropout_p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for tokens, dim, hidden in [(0, 64, 64), (1, 1, 1), (97, 20, 7), (300, 192, 256), (200, 64, 170), (81, 100, 72)]:
        check_ffn(inputs_of(tokens, dim, hidden, activation, dtype), activation, dropout_p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["pre", "normed"])
@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_half_a_layer_of_any_width(fused: str, activation: str, norm: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    for tokens, dim, hidden in [(0, 5, 8), (1, 20, 7), (100, 5, 72), (300, 192, 256), (97, 100, 1), (97, 31, 64)]:
        x, *weights = inputs_of(tokens, dim, hidden, activation, dtype, norm)
        check_ffn([x * 3 + 1, *weights], activation, 0.3, norm)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 200), st.sampled_from([5, 20, 64, 100, 192]), st.sampled_from([h for h in HIDDEN if h >= 8]),
       st.sampled_from(list(ACTIVATIONS)), st.sampled_from([0.0, 0.5]), st.sampled_from(DTYPES),
       st.sampled_from(NORMS), st.integers(0, 2**32))
def test_any_shape(fused: str, tokens: int, dim: int, hidden: int, activation: str, dropout_p: float,
                   dtype: torch.dtype, norm: str | None, seed: int) -> None:
    torch.manual_seed(seed)
    norm = norm if dim > 1 else None  # LN of one column is its bias, whatever the rest
    check_ffn(inputs_of(tokens, dim, hidden, activation, dtype, norm), activation, dropout_p, norm)


def test_a_norm_of_one_column_passes_no_gradient_on(fused: str) -> None:
    torch.manual_seed(2)
    x, *weights = inputs_of(97, 1, 8, "reglu", norm="normed")
    for norm in ("pre", "normed"):
        found = [with_gradients(lambda x, *w, of=of, norm=norm: of(x, *w[:4], "reglu", 0.0, None, norm=norm,
                                                                  norm_weight=w[4], norm_bias=w[5], eps=1e-5),
                                [x, *weights], torch.ones(97, 1)) for of in (feed_forward, ffn_reference)]
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("activation", GATED)
def test_large_and_strided_inputs(fused: str, activation: str) -> None:
    torch.manual_seed(3)
    x, *weights = inputs_of(48, 64, 128, activation)
    # The first layer's sums are exact in any order: a gate between its two ends would multiply their rounding by 1e4.
    whole = [torch.randint(-3, 4, x.shape) * 1e4, torch.randint(-4, 5, weights[0].shape) / 8, 1250 * weights[1].round()]
    check_ffn([*whole, *weights[2:]], activation)
    check_ffn([x.view(2, 24, 64)[:, :1].expand(2, 5, 64), *weights], activation)
    turned = [weights[0].t().contiguous().t(), weights[1], weights[2].t().contiguous().t(), weights[3]]
    check_ffn([x.t().contiguous().t(), *turned], activation)


@pytest.mark.parametrize("activation", GATED)
def test_extreme_values_as_pytorch_has_them(fused: str, activation: str) -> None:
    big = torch.finfo(torch.float32).max
    x = torch.tensor([-math.inf, -big, -1e4, -104.0, -90.0, -1e-30, -0.0, 1e-30, 90.0, 1e10, big, math.inf, math.nan])
    weights = [torch.ones(128, 1), torch.zeros(128), torch.full((1, 64), 1 / 64), torch.zeros(1)]  # x act(x) of D = 1
    found, expected = (with_gradients(partial(ffn, activation=activation, kernels=kernels), [x[:, None], *weights],
                                      torch.ones(len(x), 1))[:2] for kernels in ("native", "eager"))
    finite = x.abs() < math.inf  # of infinite ones the gradients are 0 or NaN, as the order of the factors has it
    for a, b in zip((found[0], found[1][finite]), (expected[0], expected[1][finite]), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-30, equal_nan=True), (a.flatten(), b.flatten())


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("activation", ["relu", "reglu"])
def test_the_elements_of_the_specification_are_dropped(fused: str, activation: str, hidden: int) -> None:
    rows = 2 * hidden if activation in GATED else hidden
    out = ffn(torch.zeros(200, hidden), torch.zeros(rows, hidden), torch.ones(rows), torch.eye(hidden),
              torch.zeros(hidden), activation=activation, dropout_p=0.3, seed=SEED, kernels="native")
    assert torch.equal(out != 0, dropout_mask_torch(200, hidden, 0.3, torch.tensor([SEED])))


def test_gradients_drop_the_same_elements(fused: str) -> None:
    hidden = 170  # of which each column of w2 gets the sum over the tokens that keep it
    w2 = torch.eye(hidden, requires_grad=True)
    out = ffn(torch.zeros(200, hidden), torch.zeros(2 * hidden, hidden), torch.ones(2 * hidden), w2,
              torch.zeros(hidden), activation="reglu", dropout_p=0.5, seed=SEED, kernels="native")
    out.backward(torch.ones_like(out))
    kept = dropout_mask_torch(200, hidden, 0.5, torch.tensor([SEED])).sum(0) * 2.0
    assert torch.equal(w2.grad, kept.expand(hidden, hidden))


def test_results_do_not_depend_on_the_number_of_threads(fused: str) -> None:
    torch.manual_seed(4)
    inputs, grad_out = inputs_of(2000, 20, 170, "geglu"), torch.randn(2000, 20)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(with_gradients(partial(ffn, activation="geglu", dropout_p=0.1, seed=1, kernels="native"),
                                          inputs, grad_out))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
