"""Each bench script at a tiny size: every provider has a row, right against fp64, or one that says why it has none."""

import importlib
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from common import harness, peers, records

SMALL = ("--device", "cpu", "--batch", "8", "--threads", "1")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a script by name with arguments; its rows, with the output if it failed."""
    monkeypatch.setattr(harness, "MM_SIZE", 64)
    monkeypatch.setattr(harness, "COPY_BYTES", {"cpu": 1 << 16})
    measure_pairs = harness.measure_pairs
    monkeypatch.setattr(harness, "measure_pairs", lambda functions, **options: measure_pairs(
        functions, **{**options, "rounds": 2, "warmup": 1}))
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()

    def run(name: str, *arguments: str) -> list[records.Row]:
        path = tmp_path / f"{name}.json"
        result = CliRunner().invoke(importlib.import_module(name).main, [*arguments, "--json", str(path)])
        assert result.exit_code == 0, result.output
        machine, rows = records.read_rows(path)
        assert machine.torch == torch.__version__
        return rows

    yield run
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


def check(rows: list[records.Row], providers: set[str], modes: set[str]) -> None:
    assert {row.provider for row in rows} == providers and {row.mode for row in rows} == modes
    for row in rows:
        assert row.version or row.note.startswith("not installed")
        assert bool(row.p50) != bool(row.note), row
        if row.p50:
            assert row.memory_mb and row.percent_of_floor and row.ratio
            assert row.fp64_error is not None and row.fp64_error < 1e-5, row


@pytest.mark.parametrize(("name", "providers"), [
    ("attn", "ours,eager,sdpa,sdpa math,sdpa cudnn"),
    ("ffn", "ours,eager"),
    ("cross", "ours,eager"),
    ("layer", "ours,eager,nn.TransformerEncoderLayer,nn.TransformerEncoderLayer fast path"),
])
def test_operations(run, name: str, providers: str) -> None:
    rows = run(name, *SMALL, "--providers", providers)
    check(rows, set(providers.split(",")), {"forward", "forward+backward"})
    notes = {(row.provider, row.mode): row.note for row in rows if row.note}
    if name == "attn":
        assert {key[0] for key in notes} == {"sdpa cudnn"}
        assert all(note.startswith("does not run on cpu: ") for note in notes.values())
    elif name == "layer":
        assert notes == {("nn.TransformerEncoderLayer fast path", "forward+backward"): "for inference only"}
    else:
        assert not notes


def test_gated_networks(run) -> None:
    rows = run("ffn", *SMALL, "--providers", "ours,eager", "--activation", "reglu", "--dim", "20", "--hidden", "17")
    check(rows, {"ours", "eager"}, {"forward", "forward+backward"})
    assert {row.kernel for row in rows} == {"ffn reglu"}


def test_the_step_of_the_paper_beside_its_authors(run) -> None:
    pytest.importorskip("rtdl_revisiting_models")
    rows = run("step", *SMALL, "--recipe", "paper", "--providers", "ours,eager,rtdl_revisiting_models")
    assert [(row.kernel, row.provider, row.x) for row in rows] == [
        ("paper step ft", provider, "B=8 fp32") for provider in ("ours", "eager", "rtdl_revisiting_models")]
    assert all(row.rows_per_s and row.memory_mb for row in rows)


def test_row_updates(run, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse_update = importlib.import_module("sparse_update")
    monkeypatch.setattr(sparse_update, "need", _absent)
    rows = run("sparse_update", *SMALL, "--num-rows", "500")
    check(rows, {name for group in sparse_update.PROVIDERS.values() for name in group}, set(sparse_update.PROVIDERS))
    assert {row.note for row in rows if row.provider.startswith("FBGEMM")} == {"not installed: make bench-peers"}
    assert all(row.p50 for row in rows if not row.provider.startswith("FBGEMM"))
    assert {row.x.split()[-1] for row in rows} == {"uniform", "skewed"}


def _absent(module: str) -> None:
    peers.need(f"absent_{module}")


def test_steps(run, monkeypatch: pytest.MonkeyPatch) -> None:
    step, training = importlib.import_module("step"), importlib.import_module("common.training")
    for module in (step, training):
        monkeypatch.setattr(module, "NUM_EMBEDDINGS", 500)
    providers = "ours,eager,eager bf16,eager + AdamW on all"
    rows = run("step", *SMALL, "--providers", providers)
    models = ("ft", "autoint", "dcnv2")
    assert [(row.kernel, row.provider) for row in rows] == [
        *((f"default step {model}", name) for model in models for name in ("ours", "eager", "eager bf16")),
        *((f"step {model}", name) for model in models for name in ("ours", "eager", "eager + AdamW on all"))]
    assert all(row.rows_per_s == pytest.approx(8e3 / row.p50) and row.memory_mb for row in rows)
    assert {row.x for row in rows} == {"B=8 fp32"}


def test_the_step_of_the_default_recipe_is_the_one_of_ctr_train(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its batch, unless one is given; tokens, shortcut, pooling, dropout and optimizers."""
    step, training = importlib.import_module("step"), importlib.import_module("common.training")
    for module in (step, training):
        monkeypatch.setattr(module, "NUM_EMBEDDINGS", 500)
    rows = run("step", "--device", "cpu", "--threads", "1", "--providers", "ours", "--models", "dcnv2", "--recipe",
               "default")
    assert [(row.kernel, row.x) for row in rows] == [("default step dcnv2", "B=512 fp32")]
    config = training.default_recipe("ft")
    model = training.recipe_model(config, "eager", 500)
    tables, others = training.recipe_optimizers(model, config, "eager")
    assert type(tables).__name__ == "SparseRowwiseAdagrad" and tables.param_groups[0]["lr"] == config["embedding_lr"]
    assert others.param_groups[0]["weight_decay"] == config["weight_decay"]
    assert model.tokenizer.num_tokens == 39 and model.tokenizer.embedding_dropout == config["embedding_dropout"] > 0
    assert model.pooling == "mean" and model.shortcut is not None and model.layers[0].dropout == config["dropout"]
    assert training.random_batch(3, torch.device("cpu"), training.STATISTICS)[0].shape == (3, model.tokenizer.width)


def test_steps_name_an_unknown_recipe() -> None:
    result = CliRunner().invoke(importlib.import_module("step").main, ["--recipe", "full"])
    assert result.exit_code == 2 and "'full' is not one of default, study" in result.output


def test_memory_computed_and_measured(run, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, training = importlib.import_module("memory"), importlib.import_module("common.training")
    for module in (memory, training):
        monkeypatch.setattr(module, "NUM_EMBEDDINGS", 500)
    rows = {(row.kernel, row.mode, row.provider): row for row in run("memory", *SMALL)}
    token = 8 * 27 * 64 * 4 / 1e6
    layer = {(mode, provider): rows["memory ft layer", mode, provider].memory_mb
             for mode in ("attention map", "Q, K, V", "FFN hidden", "rest", "layer, in all")
             for provider in ("eager", "ours")}
    assert layer["attention map", "ours"] == layer["FFN hidden", "ours"] == 0
    assert layer["attention map", "eager"] >= 8 * 4 * 27**2 * 4 / 1e6
    assert layer["FFN hidden", "eager"] >= 4 * token
    assert layer["Q, K, V", "ours"] == pytest.approx(3 * token)
    assert layer["rest", "ours"] < 0.1 * token
    assert layer["layer, in all", "ours"] < 0.5 * layer["layer, in all", "eager"]
    for model, dim in (("ft", 64), ("autoint", 64), ("dcnv2", 16)):
        for provider in memory.REGIMES:
            for mode in ("embedding table", "gradient of the table"):
                row = rows[f"memory {model}", mode, provider]
                assert row.memory_mb == pytest.approx(row.computed_mb)
            state = rows[f"memory {model}", "optimizer state", provider]
            assert state.memory_mb == pytest.approx(state.computed_mb, rel=0.01)  # and a step count each
            whole = rows[f"memory {model}", "step, in all", provider]
            assert whole.memory_mb == pytest.approx(whole.computed_mb, rel=0.15)
        assert rows[f"memory {model}", "embedding table", "ours"].memory_mb == pytest.approx(500 * dim * 4 / 1e6)
    fits = [rows["memory ft", f"largest batch in {gb} GB", "ours"].rows for gb in memory.CAPACITIES]
    assert fits == sorted(fits) and fits[0] > rows["memory ft", "largest batch in 8 GB", "eager + SGD on rows"].rows > 0


def test_data(run) -> None:
    rows = run("data", "--rows", "1000", "--threads", "1")
    assert [(row.kernel, row.provider) for row in rows] == [
        ("prepare", "ours"), ("prepare", "ours, default recipe"), ("prepare", "pyarrow.csv.read_csv"),
        ("prepare", "line by line"), ("loader", "ours"), ("loader", "ours")]
    assert all(row.rows_per_s and row.version for row in rows) and rows[0].memory_mb > 10


def test_a_sweep_is_measured_and_drawn(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = importlib.import_module("common.options")
    monkeypatch.setattr(options, "SWEEPS", {"batch": (4, 8, 16)})
    picture = tmp_path / "ffn.png"
    rows = run("ffn", "--device", "cpu", "--threads", "1", "--providers", "ours,eager", "--plot", str(picture))
    assert [row.x.split()[0] for row in rows] == ["B=4"] * 2 + ["B=8"] * 2 + ["B=16"] * 2
    assert {row.mode for row in rows} == {"forward+backward"}
    assert picture.read_bytes().startswith(b"\x89PNG")
