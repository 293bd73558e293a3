"""FT-Transformer: the paper variant equals rtdl_revisiting_models, the study variant its formulas, both in fp64."""

import math

import pytest
import torch
from rtdl_revisiting_models import FTTransformer as Reference

from ctr_models import FTTransformer

ROWS_PER_FIELD = 40
TOLERANCE = {"rtol": 0.0, "atol": 1e-10}


def paper_pair(num_layers: int, num_heads: int) -> tuple[FTTransformer, Reference, list]:
    """Our model and rtdl's with equal weights, and the pairs (our parameter, their parameters joined)."""
    ours = FTTransformer(variant="paper", num_embeddings=26 * ROWS_PER_FIELD, tables="per-field", dropout=0.0,
                         num_layers=num_layers, num_heads=num_heads, kernels="eager").double()
    theirs = Reference(n_cont_features=13, cat_cardinalities=[ROWS_PER_FIELD] * 26, d_out=1, n_blocks=num_layers,
                       d_block=64, attention_n_heads=num_heads, attention_dropout=0.0, ffn_d_hidden=None,
                       ffn_d_hidden_multiplier=4 / 3, ffn_dropout=0.0, residual_dropout=0.0).double()
    pairs = [
        (ours.tokenizer.cls, [theirs.cls_embedding.weight]),
        (ours.tokenizer.dense_weight, [theirs.cont_embeddings.weight]),
        (ours.tokenizer.dense_bias, [theirs.cont_embeddings.bias]),
        (ours.tokenizer.embedding.table.weight, [table.weight for table in theirs.cat_embeddings.embeddings]),
        (ours.tokenizer.field_bias, [theirs.cat_embeddings.bias]),
        (ours.head[0].weight, [theirs.backbone.output.normalization.weight]),
        (ours.head[0].bias, [theirs.backbone.output.normalization.bias]),
        (ours.head[2].weight, [theirs.backbone.output.linear.weight]),
        (ours.head[2].bias, [theirs.backbone.output.linear.bias]),
    ]
    for block, other in zip(ours.layers, theirs.backbone.blocks, strict=True):
        attention = other["attention"]
        modules = [(block.ffn_norm, other["ffn_normalization"]), (block.ffn_in, other["ffn"].linear1),
                   (block.ffn_out, other["ffn"].linear2)]
        if attention.W_out is not None:
            modules.append((block.out, attention.W_out))
        if "attention_normalization" in other:
            modules.append((block.attention_norm, other["attention_normalization"]))
        for name in ("weight", "bias"):
            pairs += [(getattr(mine, name), [getattr(its, name)]) for mine, its in modules]
            qkv = [getattr(m, name) for m in (attention.W_q, attention.W_k, attention.W_v)]
            pairs.append((getattr(block.qkv, name), qkv))
    with torch.no_grad():
        for parameter in theirs.parameters():  # zero biases would hide a forgotten bias
            parameter.add_(0.1 * torch.randn_like(parameter))
        for mine, others in pairs:
            mine.copy_(torch.cat(others))
    return ours, theirs, pairs


@pytest.mark.parametrize(("num_layers", "num_heads"), [(3, 8), (1, 4), (2, 1)])
def test_paper_variant_equals_rtdl_forward_and_gradients(make_batch, num_layers, num_heads):
    ours, theirs, pairs = paper_pair(num_layers, num_heads)
    assert {id(mine) for mine, _ in pairs} == {id(p) for p in ours.parameters()}
    assert {id(p) for _, others in pairs for p in others} == {id(p) for p in theirs.parameters()}
    dense, sparse = make_batch(7, high=ROWS_PER_FIELD, dtype=torch.float64)
    got, expected = ours(dense, sparse), theirs(dense, sparse).squeeze(1)
    assert expected.std() > 0.05
    torch.testing.assert_close(got, expected, **TOLERANCE)
    upstream = torch.randn_like(got)
    got.backward(upstream)
    expected.backward(upstream)
    for mine, others in pairs:
        grad = mine.grad.to_dense() if mine.grad.is_sparse else mine.grad
        torch.testing.assert_close(grad, torch.cat([p.grad for p in others]), **TOLERANCE)


def test_paper_variant_leaves_out_decay_where_rtdl_does(make_batch):
    ours, theirs, pairs = paper_pair(2, 8)
    kept = {id(p) for p in ours.dense_parameter_groups(0.01)[1]["params"]}
    kept |= {id(p) for p in ours.embedding_parameters()}
    kept_by_rtdl = {id(p) for p in theirs.make_parameter_groups()[1]["params"]}
    for mine, others in pairs:
        if mine is ours.head[0].weight:  # the difference that base.py notes
            assert id(mine) in kept and id(others[0]) not in kept_by_rtdl
        else:
            assert {id(mine) in kept} == {id(p) in kept_by_rtdl for p in others}


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("numeric", ["token", "affine"])
def test_study_variant_equals_its_formulas(make_batch, attend, layer_norm, affine, pooling, numeric):
    model = FTTransformer(num_embeddings=200, dim=32, num_heads=4, pooling=pooling, numeric=numeric,
                          embedding_std=1.0, kernels="eager").double().eval()
    dense, sparse = make_batch(2, high=200, dtype=torch.float64)
    with torch.no_grad():
        x = model.tokenizer(dense, sparse)
        assert x.shape[1] == (39 if numeric != "token" else 27) + (pooling == "cls")
        assert len(model.layers) == 2
        for layer in model.layers:
            q, k, v = affine(layer_norm(x, layer.attention_norm), layer.qkv).split(32, dim=-1)
            x = x + affine(attend(q, k, v, 4, 1 / math.sqrt(8)), layer.out)
            hidden = affine(layer_norm(x, layer.ffn_norm), layer.ffn_in)
            assert hidden.shape[-1] == 4 * 32
            x = x + affine(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), layer.ffn_out)
        pooled = x[:, 0] if pooling == "cls" else sum(x[:, j] for j in range(x.shape[1])) / x.shape[1]
        norm, first, _, _, last = model.head
        expected = affine(affine(layer_norm(pooled, norm), first).clamp_min(0.0), last).squeeze(1)
        torch.testing.assert_close(model(dense, sparse), expected, **TOLERANCE)


def test_defaults_of_the_variants():
    study, paper = FTTransformer(num_embeddings=100), FTTransformer(num_embeddings=100, variant="paper")
    assert (study.tokenizer.num_tokens, len(study.layers), study.layers[0].num_heads) == (28, 2, 4)
    assert (paper.tokenizer.num_tokens, len(paper.layers), paper.layers[0].num_heads) == (40, 3, 8)
    assert paper.layers[0].ffn_out.in_features == 85


def test_bad_settings_are_quoted():
    with pytest.raises(ValueError, match="pooling='mean': variant='paper'"):
        FTTransformer(num_embeddings=100, variant="paper", pooling="mean")
    with pytest.raises(ValueError, match="variant='papers'"):
        FTTransformer(num_embeddings=100, variant="papers")
    with pytest.raises(ValueError, match="pooling='max'"):
        FTTransformer(num_embeddings=100, pooling="max")
    with pytest.raises(ValueError, match="width 64 with num_heads=3 gives heads of width 21.3"):
        FTTransformer(num_embeddings=100, num_heads=3)
    with pytest.raises(ValueError, match="157 tokens of width 64 with kernels='native': "
                                         "157 queries of F=157 fields; F from 1 to 128 is supported"):
        FTTransformer(num_embeddings=100, num_dense=130, numeric="affine", kernels="native")
    with pytest.raises(ValueError, match="num_layers=0"):
        FTTransformer(num_embeddings=100, num_layers=0)
    with pytest.raises(ValueError, match="dropout=1.5"):
        FTTransformer(num_embeddings=100, dropout=1.5)
