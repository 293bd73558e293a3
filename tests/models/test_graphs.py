"""The models in graphs: torch.export, strict and not, and torch.compile without a break, for batches of any size."""

import pytest
import torch
from torch.export import Dim, export

from ctr_kernels.backend import backends
from ctr_models import MODELS

BACKENDS = ["eager", pytest.param("native", marks=pytest.mark.skipif(backends()["native"].level is None,
                                                                     reason=str(backends()["native"].reason)))]
CASES = [("dcnv2", "study"), ("autoint", "study"), ("ft", "paper")]


def build(name: str, variant: str, kernels: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return MODELS[name](num_embeddings=1000, variant=variant, dropout=0.0, kernels=kernels)


def batch(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(rows, 13), torch.randint(1000, (rows, 26))


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_models_are_exported_for_batches_of_any_size(name: str, variant: str, kernels: str) -> None:
    model, rows = build(name, variant, kernels).eval(), Dim("rows", min=1, max=4096)
    for strict in (True, False):
        program = export(model, batch(4), dynamic_shapes={"dense": {0: rows}, "sparse": {0: rows}}, strict=strict)
        for size in (1, 7, 300):
            inputs = batch(size)
            torch.testing.assert_close(program.module()(*inputs), model(*inputs))


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_models_compile_without_a_graph_break(name: str, variant: str, kernels: str) -> None:
    """In training, too: the gradient of the table is sparse, as it is without torch.compile.

    By Inductor, but for two models whose eager operations it writes C++ for, for most of a minute.
    """
    torch._dynamo.reset()
    backend = "aot_eager" if kernels == "eager" and name != "dcnv2" else "inductor"
    model = build(name, variant, kernels)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for size in (4, 7, 300):
        inputs, results = batch(size), []
        for run in (model, compiled):
            model.zero_grad()
            logits = run(*inputs)
            logits.square().sum().backward()
            (table,) = model.embedding_parameters()
            assert table.grad.is_sparse and table.grad._nnz() == 26 * size
            results.append([logits, *(p.grad.to_dense() for p in model.parameters() if p.grad is not None)])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(backends()["native"].level is None, reason=str(backends()["native"].reason))
def test_a_compiled_lookup_refuses_an_id_outside_the_table() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(build("dcnv2", "study", "native"), fullgraph=True, backend="aot_eager")
    dense, sparse = batch(4)
    sparse[2, 5] = 1000
    with pytest.raises((IndexError, RuntimeError), match="id 1000 .* is outside the table of 1000 rows"):
        compiled(dense, sparse)
