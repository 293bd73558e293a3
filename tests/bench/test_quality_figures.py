"""The quality tables of README.md and docs/recipes.md have the figures of bench/results/quality-*.json."""

import json
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = json.loads((ROOT / "bench/results/quality-xeon-2-cores.json").read_text())["rows"]
SHOWN_FIRST = ("no options", "LightGBM", "logistic regression", "baseline-v1")  # README leaves the preparations out


def cells_of(document: str, provider: str) -> list[str]:
    text = (ROOT / document).read_text().replace(", ordered encodings", "")
    line = next(line for line in text.splitlines() if line.startswith(f"| {provider} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


@pytest.mark.parametrize("document", ["README.md", "docs/recipes.md"])
def test_the_tables_are_those_of_the_committed_result(document: str) -> None:
    for row in ROWS:
        if document == "README.md" and not row["provider"].endswith(SHOWN_FIRST):
            continue
        cells = cells_of(document, row["provider"])
        assert cells[0].split(" ")[0] == f"{statistics.mean(row['logloss']):.4f}"
        if len(row["seeds"]) > 1:
            assert cells[0].endswith(f"{statistics.stdev(row['logloss']):.4f}")
        assert cells[1].split(" ")[0] == f"{statistics.mean(row['auc']):.4f}"
        if document != "README.md":
            assert cells[3] == f"{statistics.mean(row['calibration']):.3f}"


def test_the_default_path_is_the_good_one() -> None:
    """What is published: without any option every model is close to LightGBM, and no preparation is a trap."""
    logloss = {row["provider"]: statistics.mean(row["logloss"]) for row in ROWS}
    for provider, value in logloss.items():
        if provider.endswith("no options"):
            assert value <= logloss["LightGBM"] + 0.003, provider
        if ", auto" in provider:
            assert value <= logloss["logistic regression"] + 0.005, provider
