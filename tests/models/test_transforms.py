"""torch.export, torch.jit.trace, torch.func and second derivatives of whole models."""

import pytest
import torch
from torch.func import functional_call, grad, vmap

from ctr_kernels import EmbeddingTable
from ctr_models import AutoInt, DCNv2, FTTransformer

MODELS = {
    "ft": (FTTransformer, {}), "ft-per-field": (FTTransformer, {"tables": "per-field", "pooling": "mean"}),
    "ft-paper": (FTTransformer, {"variant": "paper"}),
    "autoint": (AutoInt, {}), "autoint-paper": (AutoInt, {"variant": "paper", "dim": 16}),
    "dcnv2": (DCNv2, {}), "dcnv2-experts": (DCNv2, {"num_experts": 2, "tables": "per-field"}),
}


@pytest.fixture(params=MODELS)
def build(request):
    model_class, settings = MODELS[request.param]
    settings = {"num_embeddings": 1000, "embedding_std": 1.0, **settings}
    return lambda kernels="eager": model_class(kernels=kernels, **settings).eval()


@pytest.mark.parametrize("strict", [False, True])
def test_a_model_is_exported_with_any_batch(build, make_batch, strict):
    model, batch = build(), torch.export.Dim("batch", min=2)
    program = torch.export.export(model, make_batch(4), strict=strict, dynamic_shapes=({0: batch}, {0: batch})).module()
    other = make_batch(9)
    torch.testing.assert_close(program(*other), model(*other))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_model_is_traced(build, make_batch):
    model = build()
    traced = torch.jit.trace(model, make_batch(4))
    other = make_batch(9)
    torch.testing.assert_close(traced(*other), model(*other))


@pytest.mark.parametrize("kernels", ["auto", "eager"])
def test_gradients_of_each_row_sum_up_to_those_of_the_batch(build, make_batch, kernels):
    model, (dense, sparse) = build(kernels), make_batch(3)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, dense, sparse):
        return functional_call(model, parameters, (dense[None], sparse[None])).square().sum()

    rows = vmap(grad(loss), (None, 0, 0))(parameters, dense, sparse)
    model(dense, sparse).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(rows[name].sum(0), p.grad.to_dense(), rtol=1e-3, atol=1e-4)


def test_a_table_is_mapped_over_ids():
    table, ids = EmbeddingTable(10, 4), torch.randint(10, (3, 5))
    assert torch.equal(vmap(table)(ids), table.weight[ids])
    with pytest.raises(IndexError):
        table(torch.tensor([10]))


@pytest.mark.parametrize("kernels", ["auto", "eager"])
def test_a_second_derivative_of_a_lookup(kernels):
    table = EmbeddingTable(10, 4, kernels=kernels)
    rows = table(torch.tensor([[1, 2]]))
    (gradient,) = torch.autograd.grad(rows.pow(3).sum(), table.weight, create_graph=True)
    if kernels == "eager":
        gradient.to_dense().square().sum().backward()
        torch.testing.assert_close(table.weight.grad.to_dense()[1], 36.0 * table.weight[1].detach().pow(3))
        return
    with pytest.raises(RuntimeError, match="double backward needs kernels='eager'"):
        gradient.to_dense().square().sum().backward()


def test_a_gradient_penalty_of_dense_parameters_runs(make_batch):
    """create_graph through a lookup, whose own gradient is not asked for twice."""
    model = FTTransformer(num_embeddings=1000, dim=16, num_heads=2, kernels="eager")
    model.tokenizer.embedding.table.kernels = "auto"
    head = model.head[1].weight
    (gradient,) = torch.autograd.grad(model(*make_batch(4)).square().sum(), head, create_graph=True)
    gradient.square().sum().backward()
    assert model.tokenizer.embedding.table.weight.grad.is_sparse
