"""The low-rank cross layer in Triton: parity and memory traffic in Triton's interpreter."""

import pytest
import torch
from parity import check, cross_inputs, with_gradients
from torch.library import opcheck
from triton_interpreter import interpreted, outside, run_in_the_interpreter
from triton_traffic import counting, times

from ctr_kernels import low_rank_cross
from ctr_kernels.cross.reference import low_rank_cross_reference
from ctr_models import DCNv2

pytest.importorskip("triton")
from ctr_kernels.cross import triton as kernels  # noqa: E402


@outside
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__, 6)


def run(*tensors: torch.Tensor) -> torch.Tensor:
    return low_rank_cross(*tensors, kernels="triton")


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_parity(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for batch, width, rank in [(0, 429, 32), (1, 5, 1), (40, 429, 32), (33, 128, 20), (7, 70, 60)]:
        inputs = cross_inputs(batch, width, rank, dtype)
        check(run, low_rank_cross_reference, inputs, torch.randn(batch, width).to(dtype))
    strided = [inputs[0][:1].expand(7, 70), inputs[1].t().contiguous().t(), *inputs[2:]]
    check(run, low_rank_cross_reference, strided, torch.randn(70, 7).t().to(dtype))


@interpreted
def test_the_operator_and_the_same_bits_at_every_run() -> None:
    torch.manual_seed(1)
    inputs = cross_inputs(9, 24, 8)
    opcheck(torch.ops.ctr.low_rank_cross, [t.clone().requires_grad_() for t in inputs])
    opcheck(torch.ops.ctr.low_rank_cross_backward, (inputs[0].cos(), *inputs))
    first, second = (with_gradients(run, inputs, inputs[0].cos()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@interpreted
def test_a_model_trains_as_eager_does() -> None:
    results = []
    for backend in ("triton", "eager"):
        torch.manual_seed(2)
        model = DCNv2(num_embeddings=50, dim=4, num_sparse=3, mlp_dims=(8,), rank=5, dropout=0.0, kernels=backend)
        out = model(torch.rand(6, 13), torch.randint(50, (6, 3)))
        out.square().sum().backward()
        results.append([out, *(p.grad.to_dense() for p in model.parameters())])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@interpreted
def test_the_traffic_is_that_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    x0, x, u, v, bias = cross_inputs(70, 100, 16)
    accesses = counting(monkeypatch)
    y = kernels.forward(x0, x, u, v, bias)
    assert times(accesses["load"], x0) == {1} and times(accesses["load"], x) == {2}  # the second from the cache
    assert times(accesses["store"], y) == {1} and accesses["store"].total() == y.numel()
    accesses = counting(monkeypatch)
    kernels.backward(y, x0, x, u, v, bias)
    # Row kernel: grad twice, x0 and x once; weight kernel: each once.
    assert [times(accesses["load"], t) for t in (y, x0, x)] == [{3}, {2}, {2}]
    tile = kernels.default(kernels.launch_key("weight", 100, 16, torch.float32, 0))
    parts = min(16 * (8 // tile.warps) // -(-100 // tile.columns), -(-70 // tile.rows))
    assert accesses["store"].total() == 2 * 7000 + 2 * 70 * 16 + (parts + 1) * (2 * 100 * 16 + 100)


@interpreted
def test_refusals() -> None:
    with pytest.raises(ValueError, match="R=65; kernels='triton' takes up to 64"):
        run(*cross_inputs(2, 8, 65))
    x0, x, u, v, bias = cross_inputs(2, 8, 4)
    with pytest.raises(ValueError, match=r"v has shape \(4, 8\); .* it must be \(8, 4\)"):
        run(x0, x, u, v.t(), bias)
    with pytest.raises(TypeError, match="v has dtype torch.float16, x0 has torch.float32"):
        run(x0, x, u, v.half(), bias)
