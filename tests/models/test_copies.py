"""Models that were moved, converted, copied or filled from a checkpoint compute what the original does."""

import copy
import io
import pickle

import pytest
import torch

from ctr_kernels import EmbeddingTable, TransformerLayer
from ctr_models import AutoInt, DCNv2, FTTransformer
from ctr_models.numeric import FieldHistory, PiecewiseLinear
from ctr_models.tokenizer import FieldEmbedding

EDGES = [[0.0, 0.1 + j, 1000.3 + j, 70000.0 + j] for j in range(13)]
MOMENTS = [[100000.0 + 0.3 * j for j in range(52)], [0.1 + j for j in range(52)]]
CASES = {
    "ft": (FTTransformer, {}),
    "ft-per-field": (FTTransformer, {"tables": "per-field"}),
    "ft-piecewise": (FTTransformer, {"tables": "per-field", "numeric": "piecewise", "numeric_edges": EDGES}),
    "ft-history": (FTTransformer, {"numeric": "affine", "history": 2, "history_moments": MOMENTS}),
    "autoint-per-field": (AutoInt, {"tables": "per-field", "variant": "paper", "dim": 16}),
    "dcnv2-per-field": (DCNv2, {"tables": "per-field", "num_experts": 2}),
    "dcnv2-batch-norm": (DCNv2, {"norm": "batch", "numeric": "periodic"}),
}


@pytest.fixture(params=CASES, ids=str)
def case(request, make_batch):
    """build() -> a model in eval(), and a batch for it."""
    model_class, settings = CASES[request.param]

    def build():
        return model_class(**{"num_embeddings": 1000, "embedding_std": 1.0, **settings}).eval()

    return build, make_batch(5, num_dense=13 + 26 * settings.get("history", 0))


def on_meta(build):
    with torch.device("meta"):
        return build()


WAYS = {
    "to_empty and load": lambda build, model: load(on_meta(build).to_empty(device="cpu"), model),
    "load with assign": lambda build, model: load(on_meta(build), model, assign=True),
    "filled and loaded": lambda build, model: load(spoil(build()), model),
    "deepcopy": lambda build, model: copy.deepcopy(model),
    "pickle": lambda build, model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda build, model: through_a_file(model),
    "double and back": lambda build, model: copy.deepcopy(model).double().float(),
}


def load(model, of, **options):
    state = copy.deepcopy(of.state_dict())
    model.load_state_dict(state, **options)
    return model


def spoil(model):
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(5)
    return model


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_computes_the_same(case, way):
    build, batch = case
    torch.manual_seed(3)
    model = build()
    other = WAYS[way](build, model)
    assert torch.equal(other.eval()(*batch), model(*batch))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_converted_model_is_that_of_its_dtype(case, dtype):
    """The conversion rounds parameters and activations; numbers of the data, beyond 65504 here, stay what they are."""
    build, (dense, sparse) = case
    dense = dense * 10.0
    model = build()
    if model.__class__ is FTTransformer and dense.shape[1] > 13:
        dense[:, 13:] += 100000.0
    expected = model(dense, sparse)
    found = copy.deepcopy(model).to(dtype)(dense, sparse)
    assert found.dtype == dtype
    scale = {torch.float64: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    assert (found.float() - expected).abs().max() <= scale * (1.0 + expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_edges_and_moments_keep_their_bits(dtype):
    numeric, history = PiecewiseLinear(EDGES, 8), FieldHistory(2, 26, 8, MOMENTS)
    for module in (numeric, history):
        before = {name: buffer.clone() for name, buffer in module.named_buffers()}
        module.to(dtype).float()
        assert all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())
        assert {b.dtype for b in module.double().buffers()} == {torch.float64}
        assert {b.dtype for b in module.to(dtype).buffers()} == {torch.float32}
        assert {p.dtype for p in module.parameters()} == {dtype}


def test_an_old_state_dict_loads(case):
    """Constants that are computed where they are used have no keys, and had none."""
    build, _ = case
    assert not any("first_row" in name for name in build().state_dict())
    assert not any("first_row" in name for name, _ in build().named_buffers())


def test_rows_of_fields_do_not_depend_on_the_device_of_construction():
    with torch.device("meta"):
        embedding = FieldEmbedding(num_embeddings=107, dim=4, num_fields=5, tables="per-field")
    embedding.to_empty(device="cpu")
    ids = torch.tensor([[0, 1, 20, 21, 106]])
    for dtype in (torch.int32, torch.int64):
        assert embedding.rows(ids.to(dtype)).tolist() == [[0, 22, 62, 63, 85]]


@pytest.mark.parametrize("kernels", ["auto", "eager"])
def test_a_default_dtype_of_float64_makes_a_model_of_float64(case, kernels):
    build, (dense, sparse) = case
    torch.set_default_dtype(torch.float64)
    try:
        model = build()
    finally:
        torch.set_default_dtype(torch.float32)
    for module in model.modules():
        if hasattr(module, "kernels"):
            module.kernels = kernels
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    out = model(dense.double(), sparse)
    out.sum().backward()
    assert out.dtype == torch.float64
    assert {p.grad.dtype for p in model.parameters()} == {torch.float64}


def test_auto_is_eager_in_float64(case):
    build, (dense, sparse) = case
    model = build().double()
    expected = copy.deepcopy(model)
    for module in expected.modules():
        if hasattr(module, "kernels"):
            module.kernels = "eager"
    assert torch.equal(model(dense.double(), sparse), expected(dense.double(), sparse))


@pytest.mark.parametrize("convert", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_table_stored_in_bf16_is_converted_with_its_model(case, convert):
    build, (dense, sparse) = case
    model = build()
    model.store_embeddings_as(torch.bfloat16)
    model(dense, sparse).sum().backward()  # its rows are of fp32, now and
    model.to(convert)
    model.zero_grad()
    out = model(dense, sparse)
    out.sum().backward()
    (table,) = model.embedding_parameters()
    assert out.dtype == table.dtype == table.grad.dtype == convert


@pytest.mark.parametrize("assign", [False, True])
def test_a_model_with_a_table_in_bf16_is_loaded(case, assign, tmp_path):
    build, batch = case
    model = build()
    model.store_embeddings_as(torch.bfloat16)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    other = on_meta(build) if assign else build()
    other.load_state_dict(state, assign=assign)
    assert torch.equal(other.eval()(*batch), model(*batch))
    (table,) = other.embedding_parameters()
    assert table.dtype == (torch.bfloat16 if assign else torch.float32)
    whole = on_meta(build)
    whole.load_state_dict(build().bfloat16().state_dict(), assign=True)
    assert whole(*batch).dtype == torch.bfloat16


def test_a_move_leaves_a_stored_dtype_alone():
    table = EmbeddingTable(10, 4)
    table.store_as(torch.bfloat16)
    table.to("cpu").cpu().share_memory()
    assert (table.weight.dtype, table.lookup_dtype) == (torch.bfloat16, torch.float32)
    table.to("meta")
    assert (table.weight.dtype, table.lookup_dtype) == (torch.bfloat16, torch.float32)
    assert table(torch.empty(2, 3, dtype=torch.int64, device="meta")).dtype == torch.float32


def test_gradients_that_are_there_are_converted_too():
    table = EmbeddingTable(10, 4)
    table.store_as(torch.bfloat16)
    table(torch.tensor([1])).sum().backward()
    table.double()
    table(torch.tensor([1])).sum().backward()
    assert table.weight.grad.dtype == torch.float64
    assert table.weight.grad.to_dense()[1].tolist() == [2.0] * 4


def test_factory_arguments_and_the_meta_device():
    table = EmbeddingTable(10, 4, device="meta", dtype=torch.float64)
    assert (table.weight.device.type, table.weight.dtype) == ("meta", torch.float64)
    layer = TransformerLayer(16, 2, 32, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}
    with torch.device("meta"):
        for model_class in (FTTransformer, AutoInt, DCNv2):
            for kernels in ("auto", "eager"):
                model = model_class(num_embeddings=1000, kernels=kernels)
                out = model(torch.empty(3, 13), torch.empty(3, 26, dtype=torch.int64))
                assert (out.device.type, out.shape) == ("meta", (3,))
