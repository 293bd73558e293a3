"""The quality tables of README.md and docs/recipes.md have the figures of bench/results/quality-*.json."""

import json
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = json.loads((ROOT / "bench/results/quality-amd-epyc-zen4-2-cores.json").read_text())["rows"]


@pytest.mark.parametrize("document", ["README.md", "docs/recipes.md"])
def test_the_tables_are_those_of_the_committed_result(document: str) -> None:
    text = (ROOT / document).read_text().replace("`", "").replace(", ordered encodings", "")
    for row in ROWS:
        line = next(line for line in text.splitlines() if line.startswith(f"| {row['provider']} |"))
        cells = [cell.strip() for cell in line.split("|")[2:-1]]
        assert cells[0].split(" ")[0] == f"{statistics.mean(row['logloss']):.4f}"
        if len(row["seeds"]) > 1:
            assert cells[0].endswith(f"{statistics.stdev(row['logloss']):.4f}")
        assert cells[1].split(" ")[0] == f"{statistics.mean(row['auc']):.4f}"
        if document != "README.md":
            assert cells[3] == f"{statistics.mean(row['calibration']):.3f}"
