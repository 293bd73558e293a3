"""The quality suite's rivals see what they may see, its table says what was measured, and one run goes through."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from ctr_train.data.dataset import Rows
from ctr_train.data.synth import write_synthetic

quality, rivals = importlib.import_module("quality"), importlib.import_module("quality_rivals")


def rows(count: int, seed: int) -> Rows:
    generator = np.random.default_rng(seed)
    dense = np.concatenate([generator.random((count, 13)), generator.integers(0, 2, (count, 13))], axis=1)
    return Rows(dense.astype(np.float32), generator.integers(0, 5, (count, 26)).astype(np.int32),
                generator.integers(0, 2, count).astype(np.uint8))


def test_lightgbms_encodings_are_those_of_the_rows_before() -> None:
    train, other = rows(30, 0), rows(10, 1)
    x, x_other = rivals.encoded(train, other, 5)
    for found, part, past_of in ((x, train, lambda i: i), (x_other, other, lambda i: 30)):
        for i, field in ((0, 0), (7, 3), (9, 25)):
            past = past_of(i)
            same = train.sparse[:past, field] == part.sparse[i, field]
            mean = (train.label[:past].sum() + 1) / (past + 4)
            clicks = train.label[:past][same].sum()
            assert found[i, 13 + field] == pytest.approx((clicks + 30 * mean) / (same.sum() + 30))
            total = (train.sparse[:, field] == part.sparse[i, field]).sum() - (part is train)
            assert found[i, 39 + field] == total
            assert np.isnan(found[i, field % 13]) == (part.dense[i, 13 + field % 13] == 1)


def test_the_table_is_sorted_and_says_how_much_of_the_gap_is_closed() -> None:
    found = [quality.Quality(name, [0, 1], logloss, *([[0.5, 0.7]] * 5))
             for name, logloss in (("logistic regression", [0.5, 0.5]), ("ours", [0.42, 0.44]))]
    lines = quality.table(found, 0.4).splitlines()
    assert lines[2].startswith("| ours | 0.4300 ± 0.0141 | 0.6000 ± 0.1414 |") and lines[2].endswith("| 70% |")
    assert lines[3].startswith("| logistic regression | 0.5000 ± 0.0000 |") and lines[3].endswith("| 0% |")


def test_a_run_from_raw_rows_to_json_and_picture(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "raw.tsv", rows=3000, seed=1)
    arguments = ["--data", tmp_path / "raw.tsv", "--seeds", "1", "--hash-bins", "500", "--work", tmp_path / "work",
                 "--providers", "DCNv2, no options;logistic regression;DCNv2, auto", "--json", tmp_path / "q.json",
                 "--plot", tmp_path / "q.png"]
    result = CliRunner().invoke(quality.main, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "q.json").read_text())
    assert [row["provider"] for row in content["rows"]] == ["DCNv2, no options", "logistic regression", "DCNv2, auto"]
    for row in content["rows"]:
        assert 0.4 < row["logloss"][0] < 0.8 and row["memory_mb"][0] > 50
    assert 0.3 < content["best_possible"] < content["rows"][0]["logloss"][0]
    assert (tmp_path / "q.png").read_bytes().startswith(b"\x89PNG")
    again = CliRunner().invoke(quality.main, list(map(str, arguments)))  # nothing is trained twice
    assert json.loads((tmp_path / "q.json").read_text())["rows"] == content["rows"] and again.exit_code == 0


def test_an_unknown_provider_is_named(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "raw.tsv", rows=500, seed=1)
    result = CliRunner().invoke(quality.main, ["--data", str(tmp_path / "raw.tsv"), "--work", str(tmp_path / "work"),
                                               "--hash-bins", "50", "--providers", "XGBoost"])
    assert "'XGBoost' is not one of DCNv2, no options" in str(result.exception)
