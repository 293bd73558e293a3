"""On a GPU: the reference operations in every dtype against fp64 on the CPU, and the dropout mask bit for bit."""

import pytest
import torch

from ctr_kernels import EmbeddingTable, SparseRowwiseAdagrad, SparseSGD, ffn, field_attention
from ctr_kernels.philox import dropout_mask, dropout_mask_torch

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU is visible to torch")]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}  # of the largest element


def assert_close(found: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    error = (found.double().cpu() - exact).abs().max()
    assert error <= TOLERANCE[dtype] * max(1.0, exact.abs().max().item())


@pytest.mark.parametrize("shape", [(2000, 27), (5, 64), (0, 8)])
def test_the_mask_is_that_of_the_cpu(shape: tuple[int, int]) -> None:
    drawn = dropout_mask(*shape, 0.3, torch.tensor([77], device="cuda"))
    assert torch.equal(drawn.cpu(), dropout_mask_torch(*shape, 0.3, torch.tensor([77])))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kernels", ["auto", "eager"])
def test_attention_and_ffn(kernels: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 27, 64).to(dtype)
    weights = [torch.randn(256, 64) / 8, torch.randn(256), torch.randn(64, 256) / 16, torch.randn(64)]
    results = []
    for device, kind in (("cuda", dtype), ("cpu", torch.float64)):
        inputs = [t.to(dtype).to(device, kind).requires_grad_() for t in (x, *weights)]
        used = kernels if device == "cuda" else "eager"
        out = field_attention(*[inputs[0]] * 3, num_heads=4, dropout_p=0.1, seed=3, kernels=used)
        out = ffn(out, *inputs[1:], dropout_p=0.1, seed=4, kernels=used)
        results.append([out, *torch.autograd.grad(out.sum(), inputs)])
    for found, exact in zip(*results, strict=True):
        assert_close(found, exact, dtype)


@pytest.mark.parametrize("optimizer", [SparseSGD, SparseRowwiseAdagrad])
def test_lookup_and_update(optimizer: type[torch.optim.Optimizer]) -> None:
    torch.manual_seed(1)
    weight, ids, rows = torch.randn(1000, 64), (torch.rand(500, 26) ** 5 * 1000).long(), torch.randn(500, 26, 64)
    tables = []
    for device, dtype in (("cuda", torch.float32), ("cpu", torch.float64)):
        table = EmbeddingTable(1000, 64).to(device, dtype)
        table.weight.data.copy_(weight)
        table(ids.to(device)).backward(rows.to(device, dtype))
        optimizer(table.parameters(), lr=0.1).step()
        tables.append(table.weight.detach())
    assert_close(tables[0], tables[1], torch.float32)
