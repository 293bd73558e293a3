"""What every model promises: shapes, parameter groups, dropout, reproducible weights, one step that learns."""

import inspect

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from ctr_kernels import SparseSGD
from ctr_models import MODELS, AutoInt, DCNv2, FTTransformer, autoint

CASES = {
    "ft-cls": (FTTransformer, {}),
    "ft-mean": (FTTransformer, {"pooling": "mean"}),
    "ft-39": (FTTransformer, {"numeric": "affine"}),
    "ft-shortcut": (FTTransformer, {"shortcut": "mlp", "pooling": "mean"}),
    "ft-paper": (FTTransformer, {"variant": "paper"}),
    "ft-paper-27": (FTTransformer, {"variant": "paper", "numeric": "token"}),
    "autoint": (AutoInt, {}),
    "autoint-39": (AutoInt, {"numeric": "affine"}),
    "autoint-shortcut": (AutoInt, {"shortcut": "linear"}),
    "autoint-cross": (AutoInt, {"shortcut": "cross"}),
    "autoint-paper": (AutoInt, {"variant": "paper", "dim": 16, "attention_dim": 64}),
    "dcnv2": (DCNv2, {}),
    "dcnv2-experts": (DCNv2, {"num_experts": 4}),
    "dcnv2-39": (DCNv2, {"numeric": "affine"}),
    "dcnv2-batch-norm": (DCNv2, {"norm": "batch"}),
    "dcnv2-paper": (DCNv2, {"variant": "paper"}),
    "dcnv2-paper-experts": (DCNv2, {"variant": "paper", "rank": 8, "num_experts": 2, "structure": "stacked"}),
}


@pytest.fixture(params=CASES, ids=str)
def case(request):
    """(build(**overrides) -> model, name); small tables."""
    model_class, settings = CASES[request.param]

    def build(**overrides):
        return model_class(**{"num_embeddings": 1000, **settings, **overrides})

    return build, request.param


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_any_batch_gives_finite_logits_and_gradients(case, make_batch, rows):
    build, name = case
    model = build()
    if "batch-norm" in name and rows < 2:
        model.eval()
    logits = model(*make_batch(rows, ids=torch.int32))
    assert logits.shape == (rows,) and logits.dtype == torch.float32
    logits.sum().backward()
    for parameter in model.parameters():
        grad = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
        assert grad.shape == parameter.shape and torch.isfinite(grad).all()


def test_a_shift_moves_every_logit_by_as_much(case, make_batch):
    build, _ = case
    model = build().eval()
    batch = make_batch(5)
    before = model(*batch)
    model.shift_logits(0.25)
    torch.testing.assert_close(model(*batch), before + 0.25)


def test_a_scale_multiplies_every_logit(case, make_batch):
    build, _ = case
    model = build().eval()
    batch = make_batch(5)
    before = model(*batch)
    model.scale_logits(0.5)
    torch.testing.assert_close(model(*batch), before / 2)


def test_a_row_does_not_depend_on_the_others(case, make_batch):
    build, _ = case
    model = build(embedding_std=1.0).double().eval()
    dense, sparse = make_batch(5, dtype=torch.float64)
    together = model(dense, sparse)
    alone = torch.cat([model(dense[i:i + 1], sparse[i:i + 1]) for i in range(5)])
    assert together.std() > 1e-3
    torch.testing.assert_close(together, alone, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("tables", ["shared", "per-field"])
def test_parameters_lie_in_exactly_one_group(case, tables):
    build, _ = case
    model = build(tables=tables)
    tables_found = model.embedding_parameters()
    decayed, kept = model.dense_parameter_groups(0.03)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.03, 0.0)
    found = [id(p) for p in [*tables_found, *decayed["params"], *kept["params"]]]
    assert len(found) == len(set(found))
    assert set(found) == {id(p) for p in model.parameters()}
    assert [p.shape[0] for p in tables_found] == [1000 if tables == "shared" else 988]
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(p.dim() == 2 and names[id(p)].endswith(".weight") for p in decayed["params"])
    for parameter in kept["params"]:
        name = names[id(parameter)]
        assert parameter.dim() == 1 or name.startswith("tokenizer."), name


def test_dropout_acts_in_training_only(case, make_batch):
    build, name = case
    batch = make_batch(64)
    torch.manual_seed(5)
    model = build(dropout=0.5, embedding_std=1.0).eval()
    torch.manual_seed(5)
    without = build(dropout=0.0, embedding_std=1.0).eval()
    assert torch.equal(model(*batch), model(*batch))
    assert torch.equal(model(*batch), without(*batch))
    model.train()
    assert not torch.allclose(model(*batch), model(*batch))
    without.train()
    assert torch.equal(without(*batch), without(*batch))


def test_the_seed_fixes_the_weights_and_the_masks(case, make_batch):
    build, _ = case
    batch = make_batch(8)

    def train_step(seed):
        torch.manual_seed(seed)
        model = build()
        logits = model(*batch)
        return [logits, *model.parameters()]

    first, second, other = train_step(3), train_step(3), train_step(4)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("tables", ["shared", "per-field"])
def test_one_step_lowers_the_loss_and_leaves_other_rows_alone(case, make_batch, tables):
    build, _ = case
    model = build(dropout=0.0, tables=tables)
    dense, sparse = make_batch(16, high=500)
    label = (torch.arange(16) % 4 == 0).float()
    (table,) = model.embedding_parameters()
    before_table = table.detach().clone()
    optimizers = [SparseSGD([table], lr=0.1), torch.optim.AdamW(model.dense_parameter_groups(0.01), lr=1e-4)]
    before = binary_cross_entropy_with_logits(model(dense, sparse), label)
    before.backward()
    touched = torch.zeros(table.shape[0], dtype=torch.bool)
    touched[table.grad.coalesce().indices()[0]] = True
    for optimizer in optimizers:
        optimizer.step()
    after = binary_cross_entropy_with_logits(model(dense, sparse), label)
    assert after < before
    changed = (table.detach() != before_table).any(dim=1)
    assert changed.any() and not changed[~touched].any()


def test_state_survives_a_round_trip(case, make_batch, tmp_path):
    build, _ = case
    batch = make_batch(4)
    model = build(tables="per-field").eval()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = build(tables="per-field").eval()
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(model(*batch), other(*batch))


def test_logits_stay_fp32_under_autocast(case, make_batch):
    build, _ = case
    model = build(embedding_std=1.0).eval()
    dense, sparse = make_batch(256)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(dense, sparse)
    assert logits.dtype == torch.float32
    assert (logits.bfloat16().float() != logits).float().mean() > 0.9  # not merely a cast of rounded values
    full = model(dense, sparse)
    torch.testing.assert_close(logits, full, rtol=0.0, atol=0.1 * full.std().item() + 0.02)


def test_missing_indicators_fit(case, make_batch):
    build, _ = case
    assert build(num_dense=26).eval()(*make_batch(3, num_dense=26)).shape == (3,)


def test_bad_input_is_quoted(case, make_batch):
    model = case[0]()
    dense, sparse = make_batch(4)
    with pytest.raises(ValueError, match=r"dense has shape \(4, 14\); \[B, 13\]"):
        model(torch.zeros(4, 14), sparse)
    with pytest.raises(ValueError, match=r"sparse has shape \(4, 25\); \[B, 26\]"):
        model(dense, sparse[:, :25])
    with pytest.raises(TypeError, match="sparse has dtype torch.float32"):
        model(dense, sparse.float())


def test_kernels_reach_every_operation(case, make_batch, monkeypatch):
    build, _ = case
    with pytest.raises(ValueError, match="kernels='fast'"):
        build(kernels="fast")
    model = build(kernels="eager")
    chosen = {name: module.kernels for name, module in model.named_modules() if hasattr(module, "kernels")}
    assert chosen and set(chosen.values()) == {"eager"}
    seen = []
    attention = autoint.field_attention
    monkeypatch.setattr(autoint, "field_attention",
                        lambda *args, **kw: (seen.append(kw["kernels"]), attention(*args, **kw))[1])
    model.eval()(*make_batch(2))
    assert set(seen) <= {"eager"}
    if build().__class__ is not DCNv2 and "TransformerLayer" not in {type(m).__name__ for m in model.modules()}:
        assert len(seen) == 3


@pytest.mark.parametrize("model_class", [FTTransformer, AutoInt])
@pytest.mark.parametrize("variant", ["study", "paper"])
@pytest.mark.parametrize("shortcut", ["linear", "mlp"])
def test_a_shortcut_is_added_to_the_logits(make_batch, affine, model_class, variant, shortcut):
    model = model_class(num_embeddings=1000, variant=variant, shortcut=shortcut, embedding_std=1.0).double().eval()
    batch = make_batch(4, dtype=torch.float64)
    with torch.no_grad():
        logits, x = model(*batch), model.tokenizer(*batch).flatten(1)
        *hidden, last = [module for module in model.shortcut if isinstance(module, torch.nn.Linear)]
        for linear in hidden:
            x = affine(x, linear).clamp_min(0.0)
        assert [linear.out_features for linear in hidden] == ([256, 128, 64] if shortcut == "mlp" else [])
        model.shortcut = None
        expected = model(*batch) + affine(x, last).squeeze(1)
    torch.testing.assert_close(logits, expected, rtol=0.0, atol=1e-10)
    with pytest.raises(ValueError, match="shortcut='wide': choose one of none, linear, mlp"):
        model_class(num_embeddings=1000, shortcut="wide")


def test_arguments_are_keywords_that_a_command_line_can_share():
    assert {"dcnv2": DCNv2, "autoint": AutoInt, "ft": FTTransformer} == MODELS
    shared = {"num_embeddings", "dim", "num_dense", "num_sparse", "num_layers", "dropout", "variant", "tables",
              "numeric", "embedding_std", "kernels"}
    for model_class in MODELS.values():
        parameters = inspect.signature(model_class).parameters
        assert shared <= set(parameters)
        assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in parameters.values())
        assert parameters["num_embeddings"].default == 2_000_000
