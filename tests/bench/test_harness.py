"""The bench harness: who runs when, paired ratios, rates, bytes kept for backward, and what is written."""

import csv
import json

import click
import harness
import pytest
import torch
from click.testing import CliRunner
from harness import Floors, Row, Settings, Timing, bench_options, measure_pairs, peak_memory, saved_bytes, time_row

from ctr_train.errors import UserError


class FakeClock:
    """A clock that only the measured functions move, in place of `time.perf_counter`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(harness.time, "perf_counter", lambda: self.now)

    def taking(self, *milliseconds: float):
        """A function whose n-th call takes the n-th time; the last one repeats."""
        calls = iter(milliseconds)
        last = [0.0]

        def function() -> None:
            last[0] = next(calls, last[0])
            self.now += last[0] / 1e3

        return function


def test_ratio_is_paired_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(monkeypatch)
    drift = [9, 1, 2, 4, 8, 16]  # a call of warm-up, then rounds on a machine that slows down 16 times
    timings = measure_pairs({"ours": clock.taking(*drift), "rival": clock.taking(*(3 * t for t in drift))},
                            rounds=5, warmup=1)
    assert timings["ours"].ratio == 1
    assert timings["rival"].ratio == pytest.approx(3)
    assert timings["ours"].p50 == pytest.approx(4) and timings["rival"].p50 == pytest.approx(12)
    assert timings["ours"].p20 == pytest.approx(1.8) and timings["ours"].p80 == pytest.approx(9.6)
    assert timings["ours"].rounds == 5


def test_rounds_alternate_in_order() -> None:
    calls: list[str] = []
    measure_pairs({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=3, warmup=2)
    assert "".join(calls) == "aabbcc" + "abc" + "cba" + "abc"


def test_time_budget_ends_the_rounds_but_not_before_the_least_number(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(harness.time, "monotonic", lambda: now[0])

    def slow() -> None:
        now[0] += 2.0

    assert measure_pairs({"slow": slow}, rounds=100, seconds=15.0)["slow"].rounds == 8
    assert measure_pairs({"slow": slow}, rounds=100, seconds=0.0)["slow"].rounds == harness.MIN_ROUNDS
    assert measure_pairs({"slow": slow}, rounds=2, seconds=0.0)["slow"].rounds == 2


@pytest.mark.parametrize("failing", ["ours", "rival"])
def test_a_provider_that_fails_is_reported_and_the_others_go_on(failing: str) -> None:
    def fail() -> None:
        raise NotImplementedError("no kernel for this\nand more")

    functions = {name: fail if name == failing else (lambda: None) for name in ("ours", "rival", "third")}
    timings = measure_pairs(functions, rounds=5)
    assert timings[failing] == Timing(error="NotImplementedError: no kernel for this")
    assert timings["third"].rounds == 5 and not timings["third"].error
    assert (timings["third"].ratio is None) == (failing == "ours")
    assert list(timings) == ["ours", "rival", "third"]


def test_rates_from_known_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "MM_SIZE", 8)
    monkeypatch.setattr(harness, "COPY_BYTES", {"cpu": 500})
    monkeypatch.setattr(harness, "measure_pairs", lambda functions, **_: dict.fromkeys(functions, Timing(p50=1e-3)))
    assert harness.mm_rate("cpu") == pytest.approx(1024 / 1e-6 / 1e9)
    assert harness.copy_bandwidth("cpu") == pytest.approx(1000 / 1e-6 / 1e9)
    monkeypatch.setattr(harness, "measure_pairs", lambda functions, **_: dict.fromkeys(functions, Timing(error="no")))
    with pytest.raises(RuntimeError, match="rate could not be measured: no"):
        harness.mm_rate("cpu")


def test_measured_floors_are_positive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "MM_SIZE", 64)
    monkeypatch.setattr(harness, "COPY_BYTES", {"cpu": 1 << 16})
    floors = harness.measure_floors("cpu", torch.float32)
    assert floors.gflops > 0 and floors.gbps > 0


def test_time_row_counts_work_against_the_slower_floor() -> None:
    floors = Floors(gflops=100.0, gbps=10.0)  # 2e9 FLOP: 20 ms; 5e7 bytes: 5 ms
    row = time_row("ours", Timing(20.0, 40.0, 50.0, 1.0, 9), kernel="ffn", mode="forward", x="B=2", flops=2e9,
                   num_bytes=5e7, floors=floors)
    assert row.percent_of_floor == pytest.approx(50)
    assert row.gflops == pytest.approx(50) and row.gbps == pytest.approx(1.25)
    assert (row.metric, row.unit, row.p20, row.p50, row.p80, row.ratio) == ("time", "ms", 20.0, 40.0, 50.0, 1.0)
    by_bytes = time_row("ours", Timing(p50=40.0), kernel="ffn", mode="forward", x="", num_bytes=2e8, floors=floors)
    assert by_bytes.percent_of_floor == pytest.approx(50) and by_bytes.gflops is None
    failed = time_row("ours", Timing(error="no"), kernel="ffn", mode="forward", x="", flops=1.0, floors=floors)
    assert failed.percent_of_floor is None and failed.error == "no"


def test_saved_bytes_counts_each_storage_once_and_no_excluded_one() -> None:
    weight = torch.randn(64, 32, requires_grad=True)
    x = torch.randn(128, 64)
    hidden_bytes = 128 * 32 * 4

    def function() -> torch.Tensor:
        return (x @ weight).sigmoid()  # matmul keeps x for the gradient of weight, sigmoid keeps its output

    assert saved_bytes(function, exclude=[x, weight]) == hidden_bytes
    assert saved_bytes(function) == hidden_bytes + 4 * 128 * 64
    assert saved_bytes(lambda: torch.mul(*function().chunk(2)), exclude=[x, weight]) == hidden_bytes  # views
    assert saved_bytes(lambda: [function() for _ in range(3)], exclude=[x, weight]) == 3 * hidden_bytes
    assert peak_memory(function, exclude=[x, weight]) == hidden_bytes
    with torch.no_grad():
        assert saved_bytes(function) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_peak_memory_and_timing_on_a_gpu() -> None:
    assert peak_memory(lambda: torch.empty(3 << 20, dtype=torch.uint8, device="cuda"), device="cuda") == 3 << 20
    x = torch.randn(2048, 2048, device="cuda")
    timings = measure_pairs({"one": lambda: x @ x, "four": lambda: x @ x @ x @ x @ x}, rounds=20, device="cuda")
    assert timings["four"].ratio > 1


ROWS = [Row("attention", "ours", "forward", "time", "ms", "B=4096", 20.0, 21.5, 23.0, 1.0, 5.0, 35.0, 37.0),
        Row("attention", "eager", "forward", "time", "ms", "B=4096", error="out of memory")]


def test_rows_are_written_whole(tmp_path) -> None:
    harness.write_json(tmp_path / "rows.json", ROWS)
    first, second = json.loads((tmp_path / "rows.json").read_text())
    assert Row(**first) == ROWS[0] and Row(**second) == ROWS[1]
    harness.write_csv(tmp_path / "rows.csv", ROWS)
    with open(tmp_path / "rows.csv", newline="") as handle:
        lines = list(csv.DictReader(handle))
    assert lines[0]["p50"] == "21.5" and lines[1]["p50"] == "" and lines[1]["error"] == "out of memory"
    assert list(lines[0]) == ["kernel", "provider", "mode", "metric", "unit", "x", "p20", "p50", "p80", "ratio", "gbps",
                              "gflops", "percent_of_floor", "error", "device", "threads", "torch", "commit"]
    with pytest.raises(UserError, match="cannot write"):
        harness.write_json(tmp_path / "rows.csv" / "below_a_file.json", ROWS)


def test_table_is_aligned_and_leaves_out_empty_columns(capsys: pytest.CaptureFixture) -> None:
    harness.print_table(ROWS)
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["kernel", "provider", "mode", "metric", "unit", "x", "p50", "p20", "p80", "ratio", "gbps",
                            "gflops", "percent_of_floor", "error"]
    assert first.split()[:7] == ["attention", "ours", "forward", "time", "ms", "B=4096", "21.5"]
    assert second.index("out of memory") == head.index("error")
    harness.print_table(ROWS[:1])
    assert "error" not in capsys.readouterr().out


@pytest.fixture
def restored_torch():
    """The options set the threads and the matmul precision of the process."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


def invoke(*arguments: str, body=lambda settings: None):
    @click.command()
    @bench_options
    def main(settings: Settings) -> None:
        body(settings)

    return CliRunner().invoke(main, [*arguments])


def test_options_reach_the_script_as_settings(restored_torch) -> None:
    seen = []
    result = invoke("--device", "cpu", "--dtype", "bf16", "--batch", "7", "--fields", "39", "--dim", "16", "--heads",
                    "2", "--providers", "b, a", "--threads", "1", body=seen.append)
    assert result.exit_code == 0, result.output
    assert seen == [Settings(torch.device("cpu"), "bf16", 7, 39, 16, 2, ("b", "a"), None, None)]
    assert seen[0].dtype == torch.bfloat16
    assert torch.get_num_threads() == 1 and torch.get_float32_matmul_precision() == "highest"
    assert seen[0].choose({"a": 1, "b": 2, "c": 3}) == {"a": 1, "b": 2}
    invoke("--device", "cpu", "--dtype", "tf32", body=seen.append)
    assert seen[1].dtype == torch.float32 and torch.get_float32_matmul_precision() == "high"
    assert seen[1].choose({"a": 1, "b": 2}) == {"a": 1, "b": 2}


def test_unknown_provider_is_named(restored_torch) -> None:
    result = invoke("--device", "cpu", "--providers", "a,d", body=lambda settings: settings.choose({"a": 1, "b": 2}))
    assert result.exit_code == 2 and "'d' is not one of a, b" in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_said(restored_torch) -> None:
    result = invoke("--device", "cuda")
    assert result.exit_code == 2 and "PyTorch finds no GPU here" in result.output


def test_finish_prints_and_writes_with_the_machine(restored_torch, tmp_path) -> None:
    result = invoke("--device", "cpu", "--threads", "1", "--json", str(tmp_path / "a.json"), "--csv",
                    str(tmp_path / "a.csv"), body=lambda settings: settings.finish([Row(*["k"] * 6, p50=2.0)]))
    assert result.exit_code == 0 and "p50" in result.output
    (row,) = json.loads((tmp_path / "a.json").read_text())
    assert row["threads"] == 1 and row["torch"] == torch.__version__ and row["device"] and row["commit"]
    assert (tmp_path / "a.csv").exists()
