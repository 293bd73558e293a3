"""`make gpu` rehearsed on a CPU: its parts run, their findings are kept whatever happens, and no figure is a result."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from on_gpu.bars import bars, markdown

ROOT = Path(__file__).parents[2]


def rehearse(out: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    """`bench/gpu.py --rehearse`, and its gpu.json."""
    done = subprocess.run([sys.executable, ROOT / "bench" / "gpu.py", "--rehearse", *arguments], capture_output=True,
                          text=True, timeout=400, env={**os.environ, "OUT": str(out)})
    return done, json.loads((out / "gpu.json").read_text())


def test_a_rehearsal_runs_the_parts_and_shows_no_figure(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    parts = "build,training,speed attention fp32,speed ffn fp32,kernels"
    done, report = rehearse(tmp_path, "--parts", parts)
    assert done.returncode == 0, done.stdout + (tmp_path / "gpu.log").read_text()
    assert report["rehearsal"] is True and report["bars"] == []
    assert list(report["parts"]) == parts.split(",")
    assert {part["status"] for part in report["parts"].values()} == {"done"}
    checks = report["parts"]["training"]["found"]
    assert {name for name, check in checks.items() if check["status"] != "passed"} == {
        "loss curve bf16", "no waiting", "peak memory"}
    assert report["parts"]["build"]["found"]["eager"][0]
    assert {"machine", "rows"} == set(report["parts"]["speed attention fp32"]["found"])
    assert report["machine"]["versions"]["torch"] and report["machine"]["commit"]
    assert "REHEARSAL" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.log", "gpu.md"]


def test_a_part_out_of_time_is_stopped_and_said_so(tmp_path: Path) -> None:
    done, report = rehearse(tmp_path, "--parts", "parity,speed ffn fp32", "--seconds", "16")
    assert done.returncode == 1
    assert report["parts"]["parity"]["status"].startswith("stopped after")
    assert report["parts"]["speed ffn fp32"]["status"] == "not done: the time of the call was used up"


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, ROOT / "bench" / "gpu.py", "--parts", "steps"], capture_output=True,
                          text=True)
    assert done.returncode == 2 and "--parts steps: choose of checks, speed, build, parity" in done.stderr


def a_report() -> dict:
    def row(provider: str, mode: str, x: str = "", **figures: float) -> dict:
        return {"provider": provider, "mode": mode, "x": x, **figures}

    def speed(*rows: dict) -> dict:
        return {"status": "done", "found": {"machine": {"copy_gbps": 1000.0}, "rows": list(rows)}}

    checks = {"new masks": {"status": "passed"}, "loss curve fp32": {"status": "failed", "reason": "it rose"},
              "peak memory": {"status": "passed", "figures": {"fp32 graph": 812.5, "bf16 graph": 700.0}}}
    return {"rehearsal": False, "machine": {"versions": {"torch": "2"}, "commit": "abc"}, "parts": {
        "training": {"status": "done", "found": checks},
        "speed attention fp32": speed(row("ours", "forward", p50=1.0, gbps=801.0, ratio=1.0),
                                      row("sdpa", "forward", p50=2.9, ratio=2.9),
                                      row("ours, twice", "forward", p50=2.0, ratio=0.5),
                                      row("eager", "forward", p50=9.0, ratio=9.0), row("flex", "forward", note="no")),
        "speed sparse_update": speed(row("ours SGD", "SGD", "B=4096 skewed", p50=1.0, gbps=399.0, ratio=1.0),
                                     row("Embedding dense + SGD", "SGD", "B=4096 skewed", p50=20.0, ratio=20.0)),
        "speed step fp32": speed(row("ours", "training step", p50=2.0, ratio=1.0),
                                 row("eager", "training step", p50=18.0, ratio=9.0)),
        "speed step tf32": speed(row("ours", "training step", p50=1.4, ratio=1.0)),
        "speed step bf16": speed(row("ours", "training step", p50=1.0, ratio=1.0),
                                 row("compile", "training step", p50=4.0, ratio=4.0),
                                 row("compile with CUDA graphs", "training step", p50=3.5, ratio=3.5)),
    }}


def test_bars_stand_beside_what_was_found() -> None:
    found = {bar["what"]: (bar["found"], bar["met"]) for bar in bars(a_report())}
    assert found["attention forward fp32, % of copy bandwidth"] == (pytest.approx(80.1), True)
    assert found["attention forward fp32, x the best peer"] == (2.9, False)
    assert found["attention forward bf16, x the best peer"] == (None, None)
    assert found["row update, skewed ids, % of copy bandwidth"] == (pytest.approx(39.9), False)
    assert found["row update, skewed ids, x dense-gradient SGD"] == (20.0, True)
    assert found["FT step fp32, x eager fp32"] == (9.0, True)
    assert found["FT step fp32, x torch.compile in fp32"] == (None, None)
    assert found["FT step bf16, x eager fp32"] == (18.0, True)
    assert found["FT step bf16, x torch.compile in bf16"] == (3.5, True)
    assert found["FT step bf16, x our tf32 step"] == (1.4, False)
    report = a_report()
    report["parts"]["speed step bf16"]["status"] = "stopped after 90 s"  # the other rivals may be faster
    late = {bar["what"]: (bar["found"], bar["met"], bar["peer"]) for bar in bars(report)}
    assert late["FT step bf16, x torch.compile in bf16"] == (3.5, None, "compile with CUDA graphs; not all timed")
    assert found["peak memory of FT training, fp32 graph, MB"] == (812.5, False)
    assert found["peak memory of FT training, bf16 graph, MB"] == (700.0, True)
    assert found["new masks"] == ("passed", True) and found["loss curve fp32"] == ("failed", False)


def test_the_table_names_what_missed_and_what_has_no_figure() -> None:
    report = a_report()
    report["bars"] = bars(report)
    text = markdown(report)
    assert "| attention forward fp32, x the best peer | at least 3 | 2.9 (sdpa; without flex) | MISSED |" in text
    assert "| FT step fp32, x torch.compile in fp32 | at least 3 | - | no figure |" in text
    assert "- training, loss curve fp32: failed: it rose" in text


def test_a_rehearsal_has_no_bars() -> None:
    assert bars({**a_report(), "rehearsal": True}) == []
