"""The real `ctr-report`: the table's order and marks, what the pictures hold, mistakes in one sentence."""

import json
import sys

import numpy as np
import pytest
from matplotlib.image import imread

from ctr_train import cli_report, cli_train, plots
from ctr_train.metrics import evaluate_logits, reliability
from ctr_train.plots import MIN_ROWS, RunCurves, smooth, wilson_interval
from ctr_train.recipes import resolve_recipe
from ctr_train.records import read_result, write_config, write_result
from ctr_train.runlog import RunLog

OURS, OTHER = "ab" * 32, "cd" * 32  # checksums of gold files


@pytest.fixture
def report(monkeypatch, capsys, tmp_path):
    """(*arguments) -> (exit code, stdout, stderr) of ctr-report, in `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["ctr-report", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli_report.main()
        captured = capsys.readouterr()
        return stopped.value.code, captured.out, captured.err

    return call


def write_run(directory, *, logloss=0.5, model="ft", sha256=OURS, best_possible=None, kernels=None, finished=True,
              evaluations=True, log=True):
    """A run directory as ctr-train leaves it, with a given gold logloss."""
    directory.mkdir(parents=True)
    config = {**resolve_recipe("small", model, {"batch_size": 100}), "model": model, "recipe": "default", "seed": 0,
              "deterministic": False, "from": None, "data": "rows", "train_rows": 1000, "history": True, "versions": {},
              "kernels_resolved": kernels or {"ffn": "eager", "sparse_update": "eager"}}
    write_config(directory, config)
    entries = [{"step": step, "epoch": 0.1, "loss": 0.6 - step / 1000, "rows_per_s": 2000.0, "lr": 1e-3}
               for step in range(10, 101, 10)]
    if evaluations:
        entries += [{"event": "eval", "step": step, "logloss": 0.55} for step in (50, 100)]
    chain = 0
    if log:
        with RunLog(directory, 0) as metrics:
            for entry in entries:
                metrics.write(entry)
            chain = metrics.chain
    if finished:
        rng = np.random.default_rng(0)
        logits = rng.normal(-1, 1, 1000).astype(np.float32)
        labels = (rng.random(1000) < 1 / (1 + np.exp(-logits))).astype(np.uint8)
        gold = {**evaluate_logits(logits, labels), "logloss": logloss, "sha256": sha256, "rows_trained": 10_000,
                "rows_per_s": 2345.6, "best_possible": best_possible, "reliability": reliability(logits, labels),
                "checkpoint": "best.pt", "steps": 100, "training_loss": 0.5, "validation": None, "log": chain}
        write_result(directory, gold)
    return directory


def table(out):
    """The markdown table as a list of {column: cell}."""
    lines = [line for line in out.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert all(len(row) == len(cells[0]) for row in cells)
    assert all(set(cell) <= set("-:") for cell in cells[1])
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def test_runs_are_sorted_by_gold_logloss_and_unfinished_ones_come_last(report, tmp_path):
    runs = [write_run(tmp_path / "slow", logloss=0.47), write_run(tmp_path / "going", finished=False),
            write_run(tmp_path / "best", logloss=0.4611, model="autoint", best_possible={"logloss": 0.44, "auc": 0.8},
                      kernels={"ffn": "native", "sparse_update": "eager"}),
            write_run(tmp_path / "new", finished=False, log=False)]
    code, out, err = report(*runs, "--out", "made/here")
    assert code == 0, err
    rows = table(out)
    assert [row["run"] for row in rows] == ["best", "slow", "going", "new"]
    assert rows[0] == {"run": "best", "model": "autoint", "variant": "study", "recipe": "default",
                       "kernels": "native (sparse_update: eager)", "rows trained": "10,000", "rows/s": "2,346",
                       "gold logloss": "0.4611", "AUC": rows[0]["AUC"], "NE": rows[0]["NE"],
                       "calibration": rows[0]["calibration"], "best possible": "0.4400"}
    gold = json.loads((tmp_path / "best" / "gold.json").read_text())
    assert [float(rows[0][name]) for name in ("AUC", "NE", "calibration")] == pytest.approx(
        [gold["auc"], gold["normalised_entropy"], gold["calibration"]], abs=5e-5)
    assert rows[1]["best possible"] == "-"
    assert (rows[2]["gold logloss"], rows[2]["rows trained"], rows[2]["rows/s"]) == ("unfinished", "10,000", "2,000")
    assert (rows[3]["gold logloss"], rows[3]["rows trained"], rows[3]["rows/s"]) == ("unfinished", "0", "-")
    assert "comparable" not in out
    made = tmp_path / "made" / "here"
    assert sorted(path.name for path in made.iterdir()) == ["curves.png", "reliability.png", "report.md"]
    assert (made / "report.md").read_text().startswith(out)
    for name in ("curves.png", "reliability.png"):
        assert imread(made / name).std() > 0.01  # a picture, not a blank


def test_runs_on_other_gold_files_are_marked_and_never_ranked_among_each_other(report, tmp_path):
    runs = [write_run(tmp_path / "a", logloss=0.48), write_run(tmp_path / "b", logloss=0.40, sha256=OTHER),
            write_run(tmp_path / "c", logloss=0.47), write_run(tmp_path / "d", finished=False)]
    code, out, err = report(*runs)
    assert code == 0, err
    assert [(row["run"], row["gold file"]) for row in table(out)] == [("c", "A"), ("a", "A"), ("b", "B"), ("d", "-")]
    warning = out.splitlines()[-1]
    assert "Not comparable" in warning
    assert f"A: 1,000 rows, SHA-256 {OURS[:12]}" in warning
    assert f"B: 1,000 rows, SHA-256 {OTHER[:12]}" in warning
    assert (tmp_path / "report" / "report.md").exists()


def test_names_tell_runs_apart_and_a_run_given_twice_counts_once(report, tmp_path):
    runs = [write_run(tmp_path / "x" / "ft", logloss=0.5), write_run(tmp_path / "y" / "ft", logloss=0.4),
            write_run(tmp_path / "a|b", logloss=0.6)]
    code, out, err = report(*runs, tmp_path / "x" / ".." / "x" / "ft")
    assert code == 0, err
    assert [row["run"] for row in table(out)] == [str(runs[1]), str(runs[0]), "a\\|b"]


def test_undefined_metrics_are_a_dash(report, tmp_path):
    gold = read_result(write_run(tmp_path / "a"))
    write_result(tmp_path / "a", {**gold, "auc": None, "rows_per_s": None})
    row = table(report(tmp_path / "a")[1])[0]
    assert (row["AUC"], row["rows/s"]) == ("-", "-")


def test_a_run_of_ctr_train_is_read(report, tmp_path, prepared, monkeypatch):
    monkeypatch.setattr(sys, "argv", [
        "ctr-train", "--model", "dcnv2", "--data", str(prepared), "--out", "dcnv2", "--batch-size", "256",
        "--epochs", "1", "--steps-per-epoch", "10", "--eval-every", "5", "--kernels", "eager", "--device", "cpu"])
    with pytest.raises(SystemExit) as stopped:
        cli_train.main()
    assert stopped.value.code == 0
    code, out, err = report("dcnv2")
    assert code == 0, err
    gold = json.loads((tmp_path / "dcnv2" / "gold.json").read_text())
    row = table(out)[0]
    assert (row["model"], row["rows trained"], row["kernels"]) == ("dcnv2", "2,560", "eager")
    assert row["gold logloss"] == f"{gold['logloss']:.4f}"
    assert row["best possible"] == f"{gold['best_possible']['logloss']:.4f}"


def test_mistakes_are_one_sentence_and_write_nothing(report, tmp_path):
    good = write_run(tmp_path / "good")

    def says(*words, run, out=None):
        code, printed, err = report(good, run, *([] if out is None else ["--out", out]))
        assert (code, printed, err.count("\n")) == (1, "", 1)
        assert err.startswith("ctr-report: ")
        for word in words:
            assert word in err
        assert not (tmp_path / "report").exists()

    (tmp_path / "empty").mkdir()
    says("nowhere", "no such directory", run="nowhere")
    says("empty", "no config.json", run="empty")
    damaged = write_run(tmp_path / "damaged")
    (damaged / "gold.json").write_text('{"logloss": 0.5')
    says("gold.json", run=damaged)
    write_result(damaged, {"logloss": 0.5})
    says("gold.json", "has no 'rows'", run=damaged)
    write_result(damaged, read_result(good))
    (damaged / "gold.json").write_text((damaged / "gold.json").read_text().replace("2345.6", "2345.7"))
    says("gold.json", "its checksum is that of another content", run=damaged)
    (damaged / "gold.json").unlink()
    (damaged / "metrics.jsonl").write_text('{"step": 1\n{"step": 2}\n')
    says("metrics.jsonl", run=damaged)
    says("good/config.json: it is a file; the report needs a directory", run=good, out=good / "config.json")
    assert report()[0] == 2  # click's own usage error


def test_smoothing_is_the_mean_of_what_came_last():
    np.testing.assert_allclose(smooth([4.0, 2.0, 6.0, 8.0], 2), [4.0, 3.0, 4.0, 7.0])
    np.testing.assert_allclose(smooth([4.0, 2.0, 6.0], 100), [4.0, 3.0, 4.0])


def test_the_interval_is_that_of_wilson_and_holds_at_zero_and_one():
    low, high = wilson_interval(np.array([0.0, 0.1, 1.0]), np.array([10, 50, 10]))
    np.testing.assert_allclose(low, [0.0, 0.0435, 0.7225], atol=1e-4)  # published values of the Wilson interval
    np.testing.assert_allclose(high, [0.2775, 0.2136, 1.0], atol=1e-4)


def drawn(monkeypatch, draw, runs, path):
    """The figure that a function draws, before it is saved."""
    figures = []
    save = plots.save_png
    monkeypatch.setattr(plots, "save_png", lambda figure, path: (figures.append(figure), save(figure, path)))
    draw(runs, path)
    assert path.stat().st_size > 0
    return figures[0].axes


def test_curves_show_rows_against_loss(monkeypatch, tmp_path):
    runs = [RunCurves("a", training=[(100, 0.7), (200, 0.5)], validation=[(200, 0.6)], gold=(200, 0.55),
                      best_possible=0.4), RunCurves("b", gold=(300, 0.5)), RunCurves("c")]
    left, right = drawn(monkeypatch, plots.draw_curves, runs, tmp_path / "c.png")
    np.testing.assert_allclose(left.lines[0].get_xydata(), [[100, 0.7], [200, 0.6]])
    assert [line.get_xydata().tolist()[0] for line in right.lines[:3]] == [[200, 0.6], [200, 0.55], [300, 0.5]]
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["a"]
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["a", "b"]
    assert [text.get_text() for text in right.texts] == ["best possible 0.4000"]


def test_pictures_without_any_figures_say_so(monkeypatch, tmp_path):
    axes = drawn(monkeypatch, plots.draw_curves, [RunCurves("a")], tmp_path / "c.png")
    assert [axis.texts[0].get_text() for axis in axes] == ["no training steps yet", "no evaluations yet"]
    axes = drawn(monkeypatch, plots.draw_reliability, [RunCurves("a")], tmp_path / "r.png")
    assert axes[0].texts[0].get_text() == "no finished run yet"


def test_reliability_counts_every_bin_but_draws_no_rate_of_a_few_rows(monkeypatch, tmp_path):
    bins = [{"lower": 0.0, "upper": 0.05, "count": 100, "mean_prediction": 0.03, "observed_rate": 0.02},
            {"lower": 0.1, "upper": 0.15, "count": 200, "mean_prediction": 0.12, "observed_rate": 0.2},
            {"lower": 0.95, "upper": 1.0, "count": MIN_ROWS - 1, "mean_prediction": 0.97, "observed_rate": 0.0}]
    top, bottom = drawn(monkeypatch, plots.draw_reliability, [RunCurves("a", reliability=bins)], tmp_path / "r.png")
    np.testing.assert_allclose(top.containers[0].lines[0].get_xydata(), [[0.03, 0.02], [0.12, 0.2]])
    counts, edges, _ = bottom.patches[0].get_data()
    assert counts.tolist() == [100, 0, 200] + [0] * 16 + [MIN_ROWS - 1]
    np.testing.assert_allclose(edges, np.arange(21) / 20)
