"""Tokens have the values and the order of their formulas, in shared and per-field tables, and bad input is named."""

import pytest
import torch

from ctr_kernels import field_tokens
from ctr_models import MODELS
from ctr_models import tokenizer as tokenizer_module
from ctr_models.tokenizer import FeatureTokenizer, FieldEmbedding
from ctr_train.checkpoint import build_model
from ctr_train.data.artifacts import Artifacts
from ctr_train.recipes import DEFAULT, resolve_recipe


def test_tokens_are_cls_numeric_categorical_in_this_order(make_batch):
    dense, sparse = make_batch(3)
    tokenizer = FeatureTokenizer(num_embeddings=1000, dim=8, dense="affine", field_bias=True, cls=True)
    tokens = tokenizer(dense, sparse)
    assert tokens.shape == (3, 40, 8)
    table = tokenizer.embedding.table.weight
    for row in range(3):
        assert torch.equal(tokens[row, 0], tokenizer.cls)
        for j in range(13):
            expected = dense[row, j] * tokenizer.dense_weight[j] + tokenizer.dense_bias[j]
            torch.testing.assert_close(tokens[row, 1 + j], expected)
        for j in range(26):
            torch.testing.assert_close(tokens[row, 14 + j], table[sparse[row, j]] + tokenizer.field_bias[j])


def test_one_dense_token_is_a_linear_of_all_numeric_features(make_batch):
    dense, sparse = make_batch(3)
    tokenizer = FeatureTokenizer(num_embeddings=1000, dim=8)
    tokens = tokenizer(dense, sparse)
    assert tokens.shape == (3, 27, 8)
    expected = dense @ tokenizer.dense_token.weight.T + tokenizer.dense_token.bias
    torch.testing.assert_close(tokens[:, 0], expected)
    assert torch.equal(tokens[:, 1:], tokenizer.embedding.table.weight[sparse])


def test_scaled_tokens_vanish_with_their_value(make_batch):
    dense, sparse = make_batch(3)
    dense[:, 4] = 0.0
    tokens = FeatureTokenizer(num_embeddings=1000, dim=8, dense="scaled")(dense, sparse)
    assert tokens.shape == (3, 39, 8)
    assert torch.all(tokens[:, 4] == 0.0) and torch.all(tokens[:, 5].abs().sum(dim=1) > 0.0)


def test_missing_indicators_widen_the_numeric_part(make_batch):
    dense, sparse = make_batch(2, num_dense=26)
    assert FeatureTokenizer(num_embeddings=1000, dim=8, num_dense=26)(dense, sparse).shape == (2, 27, 8)
    per_feature = FeatureTokenizer(num_embeddings=1000, dim=8, num_dense=26, dense="affine", cls=True)
    assert per_feature(dense, sparse).shape == (2, 53, 8)


def test_per_field_tables_share_no_row_and_wrap_ids():
    embedding = FieldEmbedding(num_embeddings=107, dim=4, num_fields=5, tables="per-field")  # 21 rows a field
    assert embedding.table.weight.shape == (105, 4)
    weight = embedding.table.weight.reshape(5, 21, 4)
    ids = torch.tensor([[0, 0, 0, 0, 0], [20, 21, 42, 106, 105]])
    out = embedding(ids)
    for field in range(5):
        assert torch.equal(out[0, field], weight[field, 0])
        assert torch.equal(out[1, field], weight[field, ids[1, field] % 21])
    assert torch.unique(out[0], dim=0).shape[0] == 5  # id 0, the missing value, differs by field


def test_shared_table_gives_equal_ids_one_row():
    out = FieldEmbedding(num_embeddings=107, dim=4, num_fields=5)(torch.zeros(1, 5, dtype=torch.int32))
    assert torch.unique(out[0], dim=0).shape[0] == 1


@pytest.mark.parametrize("tables", ["shared", "per-field"])
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
def test_id_types_agree_and_an_id_out_of_range_is_named(make_batch, tables, ids):
    dense, sparse = make_batch(4)
    tokenizer = FeatureTokenizer(num_embeddings=1000, dim=8, tables=tables)
    assert torch.equal(tokenizer(dense, sparse.to(ids)), tokenizer(dense, sparse))
    for bad in (-1, 1000):
        wrong = sparse.to(ids)
        wrong[2, 7] = bad
        with pytest.raises(IndexError, match=rf"id {bad} at position \[2, 7\].* 1000 rows"):
            tokenizer(dense, wrong)


def test_dense_is_converted_to_the_dtype_of_the_table(make_batch):
    dense, sparse = make_batch(2, dtype=torch.float64)
    assert FeatureTokenizer(num_embeddings=1000, dim=8)(dense, sparse).dtype == torch.float32


def test_bad_input_is_quoted(make_batch):
    dense, sparse = make_batch(4)
    tokenizer = FeatureTokenizer(num_embeddings=1000, dim=8)
    with pytest.raises(ValueError, match=r"dense has shape \(4, 12\); \[B, 13\]"):
        tokenizer(dense[:, :12], sparse)
    with pytest.raises(ValueError, match=r"dense has shape \(13,\)"):
        tokenizer(dense[0], sparse)
    with pytest.raises(ValueError, match=r"sparse has shape \(4, 27\); \[B, 26\]"):
        tokenizer(dense, torch.zeros(4, 27, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"sparse has shape \(4, 26, 1\)"):
        tokenizer(dense, sparse.unsqueeze(-1))
    with pytest.raises(ValueError, match="dense has 3 rows, sparse has 4"):
        tokenizer(dense[:3], sparse)
    with pytest.raises(TypeError, match="sparse has dtype torch.float32"):
        tokenizer(dense, sparse.float())
    with pytest.raises(TypeError, match="dense has dtype torch.int64"):
        tokenizer(dense.long(), sparse)


def test_bad_settings_are_quoted():
    with pytest.raises(ValueError, match="tables='private'"):
        FeatureTokenizer(num_embeddings=1000, dim=8, tables="private")
    with pytest.raises(ValueError, match="dense='tokens'"):
        FeatureTokenizer(num_embeddings=1000, dim=8, dense="tokens")
    with pytest.raises(ValueError, match="num_dense=0"):
        FeatureTokenizer(num_embeddings=1000, dim=8, num_dense=0)
    with pytest.raises(ValueError, match="num_embeddings=25 leaves no row for each of 26 fields"):
        FeatureTokenizer(num_embeddings=25, dim=8, tables="per-field")


@pytest.mark.parametrize("name", MODELS)
def test_the_default_recipe_has_its_tokens_from_one_operation(make_batch, monkeypatch, name):
    """Where Triton serves; here the operation computes in plain PyTorch."""
    config = {"model": name, **resolve_recipe(DEFAULT, name, {})}
    model = build_model({**config, "embedding_dtype": "bf16"}, Artifacts(hash_bins=1000, history=True), "auto")
    dense, sparse = make_batch(4, num_dense=model.tokenizer.width)
    torch.manual_seed(1)
    composed = model.tokenizer(dense, sparse)
    calls = []

    def fused(*tensors, **options):
        calls.append(options.pop("kernels"))
        return field_tokens(*tensors, **options, kernels="eager")

    monkeypatch.setattr(tokenizer_module, "on_triton", lambda *of: True)
    monkeypatch.setattr(tokenizer_module, "field_tokens", fused)
    torch.manual_seed(1)
    tokens = model.tokenizer(dense, sparse)
    assert calls == ["triton"] and tokens.dtype == torch.float32
    torch.testing.assert_close(tokens, composed)
    tokens.sum().backward()
    assert all(p.grad is not None for p in model.tokenizer.parameters())
    assert model.tokenizer.embedding.table.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("settings", [{"dense": "periodic"}, {"dense": "piecewise", "numeric_edges": [[0.0, 1.0]] * 13},
                                      {"dense": "affine"}], ids=lambda settings: settings["dense"])
def test_what_the_operation_does_not_have_is_composed(make_batch, monkeypatch, settings):
    """Maps of numbers that it does not know, and parameters of another dtype than the lookups."""
    tokenizer = FeatureTokenizer(num_embeddings=1000, dim=8, **settings)
    if settings["dense"] == "affine":
        tokenizer.double().embedding.table.float()
    monkeypatch.setattr(tokenizer_module, "on_triton", lambda *of: True)
    monkeypatch.setattr(tokenizer_module, "field_tokens", None)
    assert tokenizer(*make_batch(2)).shape == (2, 39, 8)
