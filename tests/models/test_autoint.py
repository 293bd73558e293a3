"""AutoInt, both variants, against their formulas in fp64: head order, residual and scale included."""

import math

import pytest
import torch

from ctr_models import AutoInt

TOLERANCE = {"rtol": 0.0, "atol": 1e-10}


@pytest.mark.parametrize("numeric", ["scaled", "token"])
def test_paper_variant_equals_its_formulas(make_batch, attend, layer_norm, affine, numeric):
    model = AutoInt(variant="paper", num_embeddings=200, dim=16, attention_dim=32, numeric=numeric,
                    embedding_std=1.0, kernels="eager").double().eval()
    dense, sparse = make_batch(2, high=200, dtype=torch.float64)
    with torch.no_grad():
        tokens = (torch.stack([dense[:, j, None] * model.tokenizer.dense_weight[j] for j in range(13)], dim=1)
                   if numeric != "token" else affine(dense, model.tokenizer.dense_token).unsqueeze(1))
        table = model.tokenizer.embedding.table.weight
        x = torch.cat([tokens, torch.stack([table[sparse[:, j]] for j in range(26)], dim=1)], dim=1)
        assert x.shape == (2, 39 if numeric != "token" else 27, 16)
        assert len(model.layers) == 3
        for layer in model.layers:
            q, k, v, residual = affine(x, layer.qkvr).clamp_min(0.0).split(32, dim=-1)
            x = layer_norm((attend(q, k, v, 2, 1.0) + residual).clamp_min(0.0), layer.norm)
        expected = affine(torch.cat([x[:, j] for j in range(x.shape[1])], dim=1), model.head).squeeze(1)
        torch.testing.assert_close(model(dense, sparse), expected, **TOLERANCE)


@pytest.mark.parametrize("numeric", ["token", "affine"])
def test_study_variant_equals_its_formulas(make_batch, attend, layer_norm, affine, numeric):
    model = AutoInt(num_embeddings=200, dim=32, num_heads=4, numeric=numeric, embedding_std=1.0,
                    kernels="eager").double().eval()
    dense, sparse = make_batch(2, high=200, dtype=torch.float64)
    with torch.no_grad():
        x = model.tokenizer(dense, sparse)
        assert x.shape[1] == (39 if numeric != "token" else 27)
        assert len(model.layers) == 2
        for layer in model.layers:
            q, k, v = affine(x, layer.qkv).split(32, dim=-1)
            x = layer_norm(x + affine(attend(q, k, v, 4, 1 / math.sqrt(8)), layer.out), layer.attention_norm)
            hidden = affine(x, layer.ffn_in).clamp_min(0.0)
            assert hidden.shape[-1] == 2 * 32
            x = layer_norm(x + affine(hidden, layer.ffn_out), layer.ffn_norm)
        norm, first, _, _, last = model.head
        pooled = sum(x[:, j] for j in range(x.shape[1])) / x.shape[1]
        expected = affine(affine(layer_norm(pooled, norm), first).clamp_min(0.0), last).squeeze(1)
        torch.testing.assert_close(model(dense, sparse), expected, **TOLERANCE)


def test_gradients_of_the_interacting_layer_are_right(make_batch):
    model = AutoInt(variant="paper", num_embeddings=50, dim=8, num_heads=1, num_layers=1, dropout=0.0,
                    embedding_std=1.0, kernels="eager").double()
    tokens = model.tokenizer(*make_batch(1, high=50, dtype=torch.float64)).detach()[:, :4].requires_grad_()
    assert torch.autograd.gradcheck(model.layers[0], (tokens,))


def test_defaults_of_the_variants():
    study, paper = AutoInt(num_embeddings=100), AutoInt(num_embeddings=100, variant="paper")
    assert (study.tokenizer.num_tokens, len(study.layers), study.layers[0].num_heads) == (27, 2, 4)
    assert (paper.tokenizer.num_tokens, len(paper.layers), paper.layers[0].num_heads) == (39, 3, 2)
    assert paper.head.in_features == 39 * 64


def test_bad_settings_are_quoted():
    with pytest.raises(ValueError, match="attention_dim=32: variant='study' keeps the width dim=64"):
        AutoInt(num_embeddings=100, attention_dim=32)
    with pytest.raises(ValueError, match="width 24 with num_heads=5 gives heads of width 4.8"):
        AutoInt(num_embeddings=100, variant="paper", attention_dim=24, num_heads=5)
    with pytest.raises(ValueError, match=r"D / num_heads = 130; 1 to 128 are supported; kernels='auto'"):
        AutoInt(num_embeddings=100, variant="paper", attention_dim=260, kernels="native")
    with pytest.raises(ValueError, match="variant=''"):
        AutoInt(num_embeddings=100, variant="")
