"""Values whose squares leave fp32: a layer's outputs become NaN, never numbers that look right."""

import pytest
import torch
from triton_interpreter import interpreted, outside, run_in_the_interpreter

from ctr_kernels import TransformerLayer
from ctr_kernels.library import NATIVE_ABSENT
from ctr_models import AutoInt, FTTransformer

needs_native = pytest.mark.skipif(NATIVE_ABSENT is not None, reason=f"native: {NATIVE_ABSENT}")
HUGE = [3e19, 1e25, 3e38, float("inf"), float("nan")]


def check_layer(kernels: str, norm: str, value: float) -> None:
    """One token of one of three samples is `value` times noise: all of that sample is NaN, nothing of the others."""
    torch.manual_seed(0)
    layer = TransformerLayer(64, 4, 64, norm=norm, kernels=kernels)
    x = torch.randn(3, 5, 64)
    x[1, 2] *= value
    x.requires_grad_()
    out = layer(x)
    assert out[1].isnan().all() if norm == "pre" else out[1, 2].isnan().all()
    assert out[[0, 2]].isfinite().all()
    (grad,) = torch.autograd.grad(out[1].sum(), x)
    assert grad[1, 2].isnan().any() and (grad[[0, 2]] == 0).all()


@needs_native
@outside
@pytest.mark.parametrize("value", HUGE)
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_native(norm: str, value: float) -> None:
    check_layer("native", norm, value)


@outside
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__, 4, skipped=21)


@interpreted
@pytest.mark.parametrize("value", [1e25, float("nan")])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_triton(norm: str, value: float) -> None:
    check_layer("triton", norm, value)


@needs_native
@outside
@pytest.mark.parametrize("model", [FTTransformer, AutoInt])
@pytest.mark.parametrize("value", [1e21, 1e25, 3e38, float("inf"), float("nan")])
def test_a_row_with_such_a_number_has_no_logit(model: type, value: float) -> None:
    torch.manual_seed(0)
    scored = model(num_embeddings=100, kernels="native").eval()
    dense, sparse = torch.rand(4, 13), torch.randint(100, (4, 26))
    dense[1, 3] = value
    logits = scored(dense, sparse)
    assert logits[1].isnan() and logits[[0, 2, 3]].isfinite().all()
