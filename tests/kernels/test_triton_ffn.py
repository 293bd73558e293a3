"""The feed-forward network in Triton: parity, dropout mask and memory traffic in Triton's interpreter."""

import pytest
import torch
from parity import SEED, Tensors, check, ffn_inputs, with_gradients
from triton_interpreter import interpreted, outside, run_in_the_interpreter
from triton_traffic import counting, times

from ctr_kernels import ffn
from ctr_kernels.ffn.reference import ffn_reference
from ctr_kernels.philox import dropout_mask_torch

pytest.importorskip("triton")
from ctr_kernels.ffn import triton as kernels  # noqa: E402

ACTIVATIONS = ("gelu", "gelu_tanh", "relu")
GATED = ("reglu", "geglu", "swiglu")
SHAPES = [(0, 64, 256), (1, 64, 128), (70, 64, 104), (40, 20, 8), (33, 8, 72), (20, 128, 40), (17, 65, 40)]


@outside
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__, 49)


def check_ffn(inputs: Tensors, activation: str, dropout_p: float = 0.0) -> None:
    check(
        lambda *t: ffn(*t, activation=activation, dropout_p=dropout_p, seed=SEED, kernels="triton"),
        lambda *t: ffn_reference(*t, activation, dropout_p, torch.tensor([SEED])),
        inputs,
        torch.randn(inputs[0].shape, dtype=inputs[0].dtype),
    )


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_parity(activation: str, dropout_p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for tokens, dim, hidden in SHAPES:
        check_ffn(ffn_inputs(tokens, dim, hidden, dtype), activation, dropout_p)


def gated_inputs(tokens: int, dim: int, hidden: int, dtype: torch.dtype) -> Tensors:
    """Of a first layer with two outputs for each hidden unit."""
    x, w1, b1, _, _ = ffn_inputs(tokens, dim, 2 * hidden, dtype)
    return [x, w1, b1, *ffn_inputs(tokens, dim, hidden, dtype)[3:]]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("activation", GATED)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_parity_of_gates(activation: str, dropout_p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    for tokens, dim, hidden in [(0, 64, 85), (41, 64, 85), (20, 20, 3), (17, 100, 33), (5, 192, 40)]:
        check_ffn(gated_inputs(tokens, dim, hidden, dtype), activation, dropout_p)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "dim", "hidden"), [(37, 192, 33), (9, 256, 70), (20, 130, 1), (33, 1, 5)])
def test_parity_of_other_widths(tokens: int, dim: int, hidden: int, dtype: torch.dtype) -> None:
    torch.manual_seed(7)
    check_ffn(ffn_inputs(tokens, dim, hidden, dtype), "gelu", 0.3)


@interpreted
@pytest.mark.parametrize("activation", GATED)
def test_the_mask_of_gates_is_that_of_the_specification(activation: str) -> None:
    """a is 0 and its gate 1 or so: the gradient of a's bias row by row is the mask, summed over one token."""
    hidden = 40
    keep = dropout_mask_torch(1, hidden, 0.3, torch.tensor([SEED]))
    w1, b1 = torch.zeros(2 * hidden, 16), torch.cat([torch.zeros(hidden), torch.ones(hidden)])
    grads = with_gradients(lambda *t: ffn(*t, activation=activation, dropout_p=0.3, seed=SEED, kernels="triton"),
                           [torch.zeros(1, 16), w1, b1, torch.ones(16, hidden), torch.zeros(16)], torch.ones(1, 16))
    assert torch.equal(grads[3][:hidden] != 0, keep[0]) and not grads[3][hidden:].any()


@interpreted
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_and_strided_inputs(activation: str) -> None:
    torch.manual_seed(1)
    x, *weights = ffn_inputs(48, 64, 128, torch.float32)
    check_ffn([x * 1e4, *weights], activation)
    check_ffn([x.view(2, 24, 64)[:, :1].expand(2, 5, 64), *weights], activation)
    turned = [weights[0].t().contiguous().t(), weights[1], weights[2].t().contiguous().t(), weights[3]]
    check_ffn([x.t().contiguous().t(), *turned], activation)


@interpreted
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_precision(precision: str) -> None:
    """The interpreter computes TF32 exactly, so that only the launch differs."""
    torch.manual_seed(2)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        check_ffn(ffn_inputs(50, 64, 72, torch.float32), "gelu", 0.1)
    finally:
        torch.set_float32_matmul_precision(before)


@interpreted
@pytest.mark.parametrize("hidden", [8, 64, 72, 128])
def test_the_mask_is_that_of_the_specification(hidden: int) -> None:
    keep = dropout_mask_torch(100, hidden, 0.3, torch.tensor([SEED]))
    identity, ones = torch.eye(hidden), torch.ones(hidden)

    def run(x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor) -> torch.Tensor:
        return ffn(x, w1, b1, w2, b2, activation="relu", dropout_p=0.3, seed=SEED, kernels="triton")

    # The hidden is all ones before dropout, its gradient too, and both layers are the identity.
    out, dx, *_ = with_gradients(run, [0 * keep.float(), identity, ones, identity, 0 * ones], keep.new_ones(1).expand(
        100, hidden).float())
    assert torch.equal(out != 0, keep)
    assert torch.equal(dx != 0, keep)


@interpreted
def test_only_the_gradients_asked_for() -> None:
    torch.manual_seed(3)
    inputs = ffn_inputs(20, 16, 32, torch.float32)
    for chosen in range(5):
        grads = []
        for backend in ("triton", "eager"):
            tensors = [t.clone().requires_grad_(i == chosen) for i, t in enumerate(inputs)]
            ffn(*tensors, kernels=backend).sum().backward()
            assert [t.grad is not None for t in tensors] == [i == chosen for i in range(5)]
            grads.append(tensors[chosen].grad)
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


@interpreted
def test_the_same_bits_at_every_run() -> None:
    torch.manual_seed(4)
    inputs = ffn_inputs(100, 16, 32, torch.float32)
    first, second = (with_gradients(lambda *t: ffn(*t, dropout_p=0.2, seed=5, kernels="triton"), inputs,
                                    inputs[0].cos()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@interpreted
def test_refusals() -> None:
    with pytest.raises(ValueError, match="D=257; kernels='triton' takes up to 256"):
        ffn(*ffn_inputs(2, 257, 8, torch.float32), kernels="triton")
    inputs = [t.requires_grad_() for t in ffn_inputs(2, 16, 8, torch.float32)]
    (grad,) = torch.autograd.grad(ffn(*inputs, kernels="triton").sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward needs kernels='eager'"):
        grad.sum().backward()


@interpreted
def test_gradients_share_no_memory() -> None:
    x, w1, b1, w2, _ = ffn_inputs(5, 16, 24, torch.float32)
    grads = torch.ops.ctr.ffn_backward(x.cos(), x, None, w1, b1, w2, None, None, 0, 0.0, 0, 0.0, None)[:5]
    assert len({grad.untyped_storage().data_ptr() for grad in grads}) == 5


@interpreted
def test_the_traffic_is_that_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    tokens, dim, hidden = 70, 64, 72
    x, w1, b1, w2, b2 = (t.contiguous() for t in ffn_inputs(tokens, dim, hidden, torch.float32))
    dy, seed = torch.randn(tokens, dim), torch.tensor([SEED])
    weights, settings = (w1, b1, w2, None, None), (0, 0.0, 0, 0.1)
    forward, token, weight = (kernels.default(kernels.launch_key(name, dim, hidden, 0, False, torch.float32, 0))
                              for name in ("forward", "token", "weight"))

    def per_tile(tile: kernels.Tile) -> set[int]:
        return {-(-tokens // tile.tokens)}

    accesses = counting(monkeypatch)
    y, _ = kernels.forward(x, w1, b1, w2, b2, None, None, *settings, seed)
    assert [times(accesses["load"], t) for t in (x, w1, b1, w2, b2)] == [{1}, *[per_tile(forward)] * 4]
    assert times(accesses["store"], y) == {1} and accesses["store"].total() == y.numel()

    accesses = counting(monkeypatch)
    dx, *_ = kernels.grad_tokens(dy, x, None, weights, settings, seed)
    assert [times(accesses["load"], t) for t in (x, dy, w1, b1, w2)] == [{1}, {1}, *[per_tile(token)] * 3]
    assert times(accesses["store"], dx) == {1} and accesses["store"].total() == dx.numel()

    accesses = counting(monkeypatch)
    kernels.grad_weights(dy, x, weights, settings, seed)
    slices = -(-hidden // weight.units)
    parts = kernels.programs_a_slice(weight, tokens, hidden, x.device)
    assert [times(accesses["load"], t) for t in (x, dy, w1, b1, w2)] == [*[{slices}] * 2, *[{parts}] * 3]
    sums = 2 * dim * hidden + hidden + dim  # written by each part, read once, and written once more as gradients
    assert set(accesses["store"].values()) == {1} and accesses["store"].total() == (parts + 1) * sums
