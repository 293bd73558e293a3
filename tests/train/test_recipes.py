"""Recipes, schedules and optimizers: what a run's hyperparameters become."""

import math

import pytest
import torch

from ctr_kernels import SparseAdagrad, SparseLazyAdam, SparseRowwiseAdagrad, SparseSGD
from ctr_models import FTTransformer
from ctr_train import recipes
from ctr_train.data.artifacts import Artifacts
from ctr_train.data.preparation import Preparation
from ctr_train.errors import UserError
from ctr_train.optim import make_optimizers
from ctr_train.recipes import HYPERPARAMETERS, RECIPES, Facts, Recipe, resolve_recipe
from ctr_train.schedule import factor_at, make_schedulers, warmup_steps


def test_baseline_v1_is_the_studys():
    assert resolve_recipe("baseline-v1", "ft", {}) == {
        "epochs": 2, "steps_per_epoch": 2000, "batch_size": 4096, "lr": 1e-3, "weight_decay": 0.01,
        "embedding_lr": 0.01, "embedding_optimizer": "sgd", "embedding_weight_decay": 0.0, "embedding_dtype": "fp32",
        "schedule": "constant", "warmup": 0.0, "dropout": 0.1, "embedding_dropout": 0.0, "pooling": "cls",
        "shortcut": "none", "variant": "study", "tables": "shared", "numeric": None, "precision": "fp32",
        "validation_share": 0.0, "eval_every": 0, "patience": 0, "ema": 0.0, "temperature": 1.0, "calibration_rows": 0,
    }


def test_an_option_wins_over_the_model_and_the_model_over_the_recipe(monkeypatch):
    monkeypatch.setitem(RECIPES, "test", Recipe(lr=0.5, dropout=0.2, by_model={"ft": {"lr": 0.25, "dropout": 0.3}}))
    assert resolve_recipe("test", "dcnv2", {})["lr"] == 0.5
    resolved = resolve_recipe("test", "ft", {"lr": 0.125, "epochs": None})
    assert (resolved["lr"], resolved["dropout"], resolved["epochs"]) == (0.125, 0.3, 1)
    assert resolve_recipe("test", "ft", {"dropout": 0.0})["dropout"] == 0.0  # zero is a value, not an absence
    assert tuple(resolved) == HYPERPARAMETERS


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("model", ["dcnv2", "autoint", "ft"])
def test_every_recipe_is_within_range_for_every_model(name, model):
    assert resolve_recipe(name, model, {}).keys() == set(HYPERPARAMETERS)
    assert set(recipes.RECIPES[name].by_model) <= {"dcnv2", "autoint", "ft"}


@pytest.mark.parametrize(("override", "message"), [
    ({"epochs": 0}, "--epochs 0: at least 1"), ({"batch_size": -5}, "--batch-size -5: at least 1"),
    ({"lr": float("nan")}, "--lr nan: at least 0.0 and finite"), ({"lr": -1.0}, "--lr -1.0: at least 0.0"),
    ({"embedding_lr": float("inf")}, "--embedding-lr inf: at least"), ({"dropout": 1.0}, "--dropout 1.0: below 1"),
    ({"weight_decay": -0.1}, "--weight-decay -0.1"), ({"warmup": -1.0}, "--warmup -1.0"),
    ({"steps_per_epoch": 0}, "--steps-per-epoch 0"), ({"eval_every": -1}, "--eval-every -1"),
    ({"ema": 1.0}, "--ema 1.0: below 1 is needed"),
    ({"temperature": 0.0}, "--temperature 0.0: at least 0.01 and finite is needed"),
    ({"calibration_rows": -1}, "--calibration-rows -1: at least 0"),
    ({"embedding_weight_decay": -1.0}, "--embedding-weight-decay -1.0: at least 0.0"),
    ({"embedding_lr": 0.5, "embedding_weight_decay": 2.0}, "--embedding-weight-decay 2.0: times the embeddings' "),
    ({"patience": 3, "eval_every": 0}, "--patience 3 needs --eval-every"),
    ({"validation_share": 1.0}, "--validation-share 1.0: below 1 is needed"),
])
def test_values_out_of_range_are_quoted_with_their_option(override, message):
    with pytest.raises(UserError, match=message):
        resolve_recipe("small", "ft", override)


def test_pooling_and_shortcut_are_not_ignored_for_models_without():
    assert resolve_recipe("small", "ft", {"pooling": "mean"})["pooling"] == "mean"
    with pytest.raises(UserError, match="--pooling mean: the model autoint has no choice of pooling"):
        resolve_recipe("small", "autoint", {"pooling": "mean"})
    assert resolve_recipe("small", "autoint", {"shortcut": "mlp"})["shortcut"] == "mlp"
    with pytest.raises(UserError, match="--shortcut mlp: the model dcnv2 has none"):
        resolve_recipe("small", "dcnv2", {"shortcut": "mlp"})


def test_the_papers_form_reads_its_own_token_unless_another_is_asked_for():
    assert resolve_recipe("small", "ft", {})["pooling"] == "mean"
    assert resolve_recipe("small", "ft", {"variant": "paper"})["pooling"] == "cls"
    assert resolve_recipe("small", "ft", {"variant": "paper", "pooling": "mean"})["pooling"] == "mean"


@pytest.mark.parametrize("model", ["dcnv2", "autoint", "ft"])
def test_the_default_recipe_depends_on_what_the_data_hold(model):
    def resolved(**facts):
        return resolve_recipe(recipes.DEFAULT, model, {}, Facts(**{"rows": 100_000, "history": True, **facts}))

    assert resolved() == resolve_recipe("small", model, {})
    assert resolved(rows=5_000_001) == resolve_recipe("full", model, {})
    assert resolved()["epochs"] == (3 if model == "dcnv2" else 2)
    assert resolved(history=False)["epochs"] == 1  # it would learn by heart the second time
    assert resolved(history=False)["embedding_lr"] > resolved()["embedding_lr"]
    few = resolved(rows=9000)
    assert few["batch_size"] == 64 and few["lr"] == pytest.approx(resolved()["lr"] / 8**0.5)
    assert resolved(rows=100)["batch_size"] == recipes.MIN_BATCH
    given = resolve_recipe(recipes.DEFAULT, model, {"batch_size": 256}, Facts(rows=9000))
    assert (given["batch_size"], given["lr"]) == (256, resolved()["lr"])
    with_epochs = resolve_recipe(recipes.DEFAULT, model, {"epochs": 3}, Facts(history=False))
    assert with_epochs["epochs"] == 3


def test_the_run_is_watched_unless_that_is_turned_off():
    watched = resolve_recipe("auto", "ft", {})
    assert watched["validation_share"] > 0.0 and watched["eval_every"] > 0.0 and watched["patience"] > 0
    off = resolve_recipe("auto", "ft", {"validation_share": 0.0})
    assert (off["eval_every"], off["patience"]) == (0.0, 0)
    assert resolve_recipe("baseline-v1", "ft", {"eval_every": 100})["validation_share"] > 0.0
    with pytest.raises(UserError, match="--eval-every 100 needs a --validation-share above 0"):
        resolve_recipe("auto", "ft", {"validation_share": 0.0, "eval_every": 100})


def test_a_recipe_owns_its_preparation():
    assert recipes.preparation_of("baseline-v1") == Preparation()  # the study's features
    wanted = recipes.preparation_of(recipes.DEFAULT)
    assert wanted.history and wanted.folds and wanted.min_count > 1
    assert wanted.settings({"min_count": 3, "history": None})["min_count"] == 3
    assert wanted.settings({"history": False})["history"] is False
    assert wanted.is_that_of(Artifacts(min_count=wanted.min_count, history=True, folds=wanted.folds))
    assert not wanted.is_that_of(Artifacts())


def test_an_unknown_recipe_is_refused():
    with pytest.raises(UserError, match="recipe 'best': choose one of auto, small, full, baseline-v1"):
        resolve_recipe("best", "ft", {})


def test_schedules_follow_their_formulas():
    constant, linear, cosine = (factor_at(name, 4, 14) for name in ("constant", "linear", "cosine"))
    for factor in (constant, linear, cosine):
        assert [factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    for step in range(4, 15):
        done = (step - 4) / 10
        assert constant(step) == 1.0
        assert linear(step) == pytest.approx(1 - done)
        assert cosine(step) == pytest.approx((1 + math.cos(math.pi * done)) / 2)
    assert linear(14) == cosine(14) == linear(20) == 0.0
    assert factor_at("linear", 0, 10)(0) == 1.0
    assert factor_at("cosine", 20, 10)(9) == 0.5  # a warm-up longer than the run
    assert (warmup_steps(0.25, 1000), warmup_steps(1, 1000), warmup_steps(0.0, 1000)) == (250, 1, 0)
    with pytest.raises(ValueError, match="schedule='step': choose one of"):
        factor_at("step", 0, 10)


@pytest.mark.parametrize(("name", "kind"), [("sgd", SparseSGD), ("rowwise-adagrad", SparseRowwiseAdagrad),
                                            ("adagrad", SparseAdagrad), ("lazy-adam", SparseLazyAdam)])
def test_every_parameter_has_one_optimizer_and_both_follow_the_schedule(name, kind):
    model = FTTransformer(num_embeddings=50)
    optimizers = make_optimizers(model, embedding_optimizer=name, embedding_lr=0.5, lr=0.1, weight_decay=0.3,
                                 kernels="eager")
    rows, dense = optimizers
    assert isinstance(rows, kind) and rows.kernels == "eager"
    assert isinstance(dense, torch.optim.AdamW)
    held = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) and set(held) == set(model.parameters())
    assert rows.param_groups[0]["params"] == [model.tokenizer.embedding.table.weight]
    assert sorted(group["weight_decay"] for group in dense.param_groups) == [0.0, 0.3]
    schedulers = make_schedulers(optimizers, "linear", 0.5, 4)
    rates = []
    for _ in range(4):
        rates.append((rows.param_groups[0]["lr"], dense.param_groups[0]["lr"], dense.param_groups[1]["lr"]))
        for step in (*optimizers, *schedulers):
            step.step()
    assert rates == [pytest.approx((0.5 * f, 0.1 * f, 0.1 * f)) for f in (0.5, 1.0, 1.0, 0.5)]


def test_an_unknown_embedding_optimizer_is_refused():
    with pytest.raises(ValueError, match="embedding_optimizer='adam': choose one of sgd, rowwise-adagrad"):
        make_optimizers(FTTransformer(num_embeddings=50), embedding_optimizer="adam", embedding_lr=0.1, lr=0.1,
                        weight_decay=0.0, kernels="auto")
