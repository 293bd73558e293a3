"""Tables of any dtype, layout and size: lookups agree in all backends, and optimizers take what they give."""

import copy
from typing import Any

import pytest
import torch
from row_tables import needs_native
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ctr_kernels import EmbeddingTable, SparseAdagrad, SparseLazyAdam, SparseSGD
from ctr_models import AutoInt, DCNv2, FTTransformer

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IDS = torch.tensor([[3, 1, 3], [0, 4, 2]])


@pytest.mark.parametrize("kernels", ["auto", "eager"])
@pytest.mark.parametrize("lookups", FLOATS, ids=str)
@pytest.mark.parametrize("stored", FLOATS, ids=str)
def test_a_lookup_has_its_dtype_and_the_step_that_follows_takes_its_rows(stored: torch.dtype, lookups: torch.dtype,
                                                                         kernels: str) -> None:
    table = EmbeddingTable(5, 8, std=1.0, kernels=kernels).to(lookups)
    table.store_as(stored)
    out = table(IDS)
    assert out.dtype == lookups and torch.equal(out, table.weight[IDS].to(lookups))
    out.sum().backward()
    assert table.weight.grad.dtype == lookups
    if lookups == torch.float64 != stored:
        return  # such rows of a narrower table are refused
    before = table.weight.detach().double().clone()
    SparseSGD(table.parameters(), lr=1.0, kernels=kernels, seed=1).step()
    expected = before - torch.bincount(IDS.flatten(), minlength=5)[:, None]
    torch.testing.assert_close(table.weight.detach().double(), expected, rtol=0.0, atol=2e-2)


@pytest.mark.parametrize("model_class", [FTTransformer, AutoInt, DCNv2])
def test_a_model_of_half_precision_with_its_table_in_fp32(model_class: Any) -> None:
    model = model_class(num_embeddings=100, num_sparse=3, num_dense=2).bfloat16()
    model.store_embeddings_as(torch.float32)
    out = model(torch.rand(4, 2), torch.randint(100, (4, 3)))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    SparseSGD(model.embedding_parameters(), lr=0.1).step()


LAYOUTS = {
    "transposed": lambda: torch.randn(8, 6).t(), "columns": lambda: torch.randn(6, 16)[:, ::2],
    "rows": lambda: torch.randn(12, 8)[::2], "a slice": lambda: torch.randn(6, 10)[:, :8],
    "expanded": lambda: torch.randn(1, 8).expand(6, 8),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_table_of_any_layout_is_read(layout: str) -> None:
    table = EmbeddingTable(6, 8)
    table.weight.data = LAYOUTS[layout]()
    out = table(IDS)
    assert torch.equal(out, table.weight[IDS])
    out.sum().backward()
    assert table.weight.grad._indices().tolist() == [IDS.flatten().tolist()]
    table.store_as(torch.bfloat16)
    assert table.weight.is_contiguous() and table(IDS).dtype == torch.float32


@needs_native
def test_a_layout_that_the_chosen_backend_does_not_take_is_named() -> None:
    table = EmbeddingTable(6, 8, kernels="native")
    table.weight.data = torch.randn(8, 6).t()
    with pytest.raises(ValueError, match=r"kernels='native': the table has strides \(1, 6\)"):
        table(IDS)


@pytest.mark.parametrize("kernels", ["auto", "eager"])
def test_a_table_that_grew_or_shrank_is_read_to_its_end(kernels: str) -> None:
    table = EmbeddingTable(100, 8, kernels=kernels)
    for rows in (200, 50):
        table.weight = nn.Parameter(torch.randn(rows, 8))
        assert torch.equal(table(torch.tensor([rows - 1])), table.weight[-1:])
        with pytest.raises(IndexError, match=f"id {rows} at position .* the table of {rows} rows"):
            table(torch.tensor([0, rows]))


def plain(module: nn.Module) -> dict[str, torch.Tensor]:
    """A state_dict without metadata, as other formats keep it."""
    return dict(module.state_dict().items())


def test_an_assigned_table_keeps_what_lookups_give() -> None:
    stored = EmbeddingTable(5, 8)
    stored.store_as(torch.bfloat16)
    for weights in (plain(stored), stored.state_dict()):
        table = EmbeddingTable(5, 8)
        table.load_state_dict(weights, assign=True)
        assert table.weight.dtype == torch.bfloat16 and table(IDS).dtype == torch.float32
        again = copy.deepcopy(stored)
        again.load_state_dict(weights, assign=True)
        assert again(IDS).dtype == torch.float32
    wide = EmbeddingTable(5, 8).double()
    stored.load_state_dict(plain(wide), assign=True)
    assert stored(IDS).dtype == torch.float64


def test_a_table_that_is_not_loaded_stays_as_it_is() -> None:
    for content in ({}, {"weight": torch.zeros(4, 8)}):
        table, other = EmbeddingTable(5, 8), EmbeddingTable(5, 8).state_dict()
        table.store_as(torch.bfloat16)
        del other["weight"]
        other.update(content)
        try:
            table.load_state_dict(other, strict=False, assign=True)
        except RuntimeError as error:
            assert "size mismatch" in str(error) and content
        assert table.weight.dtype == torch.bfloat16 and table(IDS).dtype == torch.float32


@pytest.mark.parametrize("kernels", ["auto", "eager"])
def test_shapes_are_found_without_values(kernels: str) -> None:
    with FakeTensorMode():
        table = EmbeddingTable(5, 8, kernels=kernels)
        assert table(torch.zeros(2, 3, dtype=torch.int64)).shape == (2, 3, 8)
        model = DCNv2(num_embeddings=100, tables="per-field", kernels=kernels)
        assert model(torch.rand(2, 13), torch.zeros(2, 26, dtype=torch.int64)).shape == (2,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_states_of_torch_in_the_dtype_of_the_table_are_loaded(dtype: torch.dtype) -> None:
    for theirs, ours in ((torch.optim.SparseAdam, SparseLazyAdam), (torch.optim.Adagrad, SparseAdagrad)):
        table = nn.Embedding(5, 8, sparse=True, dtype=dtype)
        table(IDS).sum().backward()
        saved = theirs(table.parameters(), lr=0.01)
        if dtype == torch.float64:
            saved.step()
        else:
            entry = {"exp_avg": 1, "exp_avg_sq": 1, "step": 1} if ours is SparseLazyAdam else {"sum": 1, "step": 1}
            saved.state[table.weight] = {name: 1 if name == "step" else torch.ones_like(table.weight)
                                         for name in entry}
        content = saved.state_dict()
        if ours is SparseAdagrad:
            content["state"][0].pop("step")
        optimizer = ours(table.parameters(), lr=0.01)
        optimizer.load_state_dict(content)
        for name, value in optimizer.state[table.weight].items():
            assert name == "step" or value.dtype == torch.float32
        optimizer.step()


@pytest.mark.parametrize(("theirs", "ours"), [(torch.optim.Adam, SparseLazyAdam),
                                              (torch.optim.Adagrad, SparseAdagrad)])
def test_weight_decay_of_another_kind_is_refused(theirs: Any, ours: Any) -> None:
    weight = nn.Parameter(torch.ones(4, 8))
    saved, optimizer = theirs([weight], lr=0.01, weight_decay=0.1).state_dict(), ours([weight], lr=0.01)
    with pytest.raises(ValueError, match=r"param group 0 of the state_dict adds weight_decay=0\.1 times the weight"):
        optimizer.load_state_dict(saved)
    saved["param_groups"][0]["weight_decay"] = 0.0
    optimizer.load_state_dict(saved)
    optimizer.param_groups[0]["weight_decay"] = 0.1  # ours from now on
    ours([weight], lr=0.01).load_state_dict(optimizer.state_dict())


def test_decoupled_weight_decay_of_torch_is_loaded() -> None:
    weight = nn.Parameter(torch.ones(4, 8))
    for saved in (torch.optim.AdamW([weight], weight_decay=0.1), torch.optim.Adam([weight], weight_decay=0.1,
                                                                                decoupled_weight_decay=True)):
        optimizer = SparseLazyAdam([weight])
        optimizer.load_state_dict(saved.state_dict())
        assert optimizer.param_groups[0]["weight_decay"] == 0.1
