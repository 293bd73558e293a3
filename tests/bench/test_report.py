"""The documents have the figures of bench/results, and the report makes tables and pictures of any results."""

from pathlib import Path

import pytest
import report
from common.records import Machine, Row, write_json

MACHINE = Machine("A CPU", 2, "2.13", "", "3.11", "abc1234", 0.5, 180.0, 29.0)
ATTENTION = {"kernel": "field_attention", "x": "B=4096 F=27 D=64 H=4 fp32"}
ROWS = [
    Row(**ATTENTION, provider="ours", mode="forward", p20=8.0, p50=8.4, p80=9.0, ratio=1.0),
    Row(**ATTENTION, provider="eager", mode="forward", p20=80.0, p50=86.1, p80=90.0, ratio=10.19),
    Row(**ATTENTION, provider="sdpa", mode="forward", p20=40.0, p50=41.7, p80=43.0, ratio=4.92),
    Row(**ATTENTION, provider="sdpa cudnn", mode="forward", note="does not run on cpu"),
]


@pytest.mark.parametrize("path", report.DOCUMENTS, ids=lambda path: path.name)
def test_the_document_has_the_figures_of_the_results(path: Path) -> None:
    assert report.fill(path.read_text(), report.machines()) == path.read_text(), "run bench/report.py"


@pytest.mark.parametrize("path", report.DOCUMENTS, ids=lambda path: path.name)
def test_pictures_that_are_shown_are_there(path: Path) -> None:
    for _, _, picture in report.re.findall(r"(!\[([^\]]*)\]\()([^)]*)\)", path.read_text()):
        assert (path.parent / picture).exists(), picture


def test_summary_names_the_fastest_rival_and_plain_pytorch() -> None:
    text = report.summary({"cpu": {"attn": (MACHINE, ROWS)}})
    assert "| attention, forward | 8.4 ms | 4.9x | sdpa | 10.2x |" in text
    assert "`cpu`: A CPU, 2 CPU threads, torch 2.13; commit abc1234; load before: 0.5 to 0.5." in text
    assert "FFN" not in text  # nothing was measured of it


def test_a_block_is_replaced_and_nothing_else() -> None:
    everything = {"cpu": {"attn": (MACHINE, ROWS)}}
    text = "before\n<!-- results: summary -->\nold 3.3x\n<!-- end of results -->\nafter 3.3x\n"
    filled = report.fill(text, everything)
    assert filled.startswith("before\n") and filled.endswith("\nafter 3.3x\n") and "old" not in filled
    assert "10.2x" in filled
    assert report.fill(filled, everything) == filled


def test_every_row_is_in_the_full_table_and_its_pictures_are_drawn(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "results" / "cpu"
    write_json(folder / "attn.json", ROWS, MACHINE)
    swept = [Row("field_attention", name, "forward+backward", f"B={batch} F=27", p50=batch * slower)
             for batch in (256, 1024) for name, slower in (("ours", 1.0), ("eager", 2.5))]
    write_json(folder / "attn-batch.json", swept, MACHINE)
    memory = [Row("memory ft", name, mode, "B=4096", memory_mb=size) for name in ("ours", "eager")
              for mode, size in (("embedding table", 512.0), ("optimizer state", 1.0), ("step, in all", 900.0))]
    memory += [Row("memory ft", name, "largest batch in 24 GB", "B=4096", rows=2000) for name in ("ours", "eager")]
    write_json(folder / "memory.json", memory, MACHINE)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "PICTURES", tmp_path / "pictures")
    everything = report.machines()
    text = report.full(everything)
    assert "does not run on cpu" in text and "41.70" in text and "512.0" in text
    assert "| ft, B=4096 | ours | 900 MB | 2,000 |" in report.summary(everything)
    report.draw("cpu", everything["cpu"])
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {
        "cpu-times.png", "cpu-memory.png", "cpu-attn-batch.png"}
