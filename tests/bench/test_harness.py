"""The bench harness: who runs when, paired ratios, rates, bytes kept for backward, and what is written."""

import csv

import click
import pytest
import torch
from click.testing import CliRunner
from common import harness, peers, records
from common.harness import (
    Floors,
    Timing,
    compare,
    forward,
    forward_backward,
    measure_pairs,
    peak_memory,
    relative_error,
    saved_bytes,
    time_row,
)
from common.options import Settings, bench_options
from common.records import Machine, Row

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
    assert timings[failing] == Timing(note="does not run on cpu: NotImplementedError: no kernel for this")
    assert timings["third"].rounds == 5 and not timings["third"].note
    assert (timings["third"].ratio is None) == (failing == "ours")
    assert list(timings) == ["ours", "rival", "third"]


def test_rates_from_known_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "MM_SIZE", 8)
    monkeypatch.setattr(harness, "COPY_BYTES", {"cpu": 500})
    monkeypatch.setattr(harness, "measure_pairs", lambda functions, **_: dict.fromkeys(functions, Timing(p50=1e-3)))
    assert harness.mm_rate("cpu") == pytest.approx(1024 / 1e-6 / 1e9)
    assert harness.copy_bandwidth("cpu") == pytest.approx(1000 / 1e-6 / 1e9)
    monkeypatch.setattr(harness, "measure_pairs", lambda functions, **_: dict.fromkeys(functions, Timing(note="no")))
    with pytest.raises(RuntimeError, match="rate could not be measured: no"):
        harness.mm_rate("cpu")


def test_measured_floors_are_positive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "MM_SIZE", 64)
    monkeypatch.setattr(harness, "COPY_BYTES", {"cpu": 1 << 16})
    floors = harness.measure_floors("cpu", torch.float32)
    assert floors.gflops > 0 and floors.gbps > 0


def test_time_row_counts_work_against_the_slower_floor() -> None:
    floors = Floors(gflops=100.0, gbps=10.0)  # 2e9 FLOP: 20 ms; 5e7 bytes: 5 ms
    about = {"kernel": "ffn", "mode": "forward", "x": "B=2", "device": torch.device("cpu"), "samples": 8}
    row = time_row("ours", Timing(20.0, 40.0, 50.0, 1.0, 9), **about, flops=2e9, num_bytes=5e7, floors=floors)
    assert row.percent_of_floor == pytest.approx(50)
    assert row.gflops == pytest.approx(50) and row.gbps == pytest.approx(1.25)
    assert (row.p20, row.p50, row.p80, row.ratio, row.rows_per_s) == (20.0, 40.0, 50.0, 1.0, 200.0)
    by_bytes = time_row("ours", Timing(p50=40.0), **about, num_bytes=2e8, floors=floors)
    assert by_bytes.percent_of_floor == pytest.approx(50) and by_bytes.gflops is None
    failed = time_row("ours", Timing(note="no"), **about, flops=1.0, floors=floors)
    assert failed.percent_of_floor is None and failed.note == "no"


def test_compare_measures_time_memory_and_error_of_each() -> None:
    x = torch.randn(256, 64)
    exact = [x.double() * 2]
    wrong = 1e-3 * exact[0].abs().max().float()
    rows = compare({"ours": lambda: [x + x], "rival": lambda: [(x + x).add(wrong)], "absent": _absent}, kernel="k",
                   mode="forward", x="", device=torch.device("cpu"), exact=exact, rounds=5)
    assert [row.fp64_error for row in rows] == [0.0, pytest.approx(1e-3, rel=1e-3), None]
    assert [row.memory_mb for row in rows] == [256 * 64 * 4 / 1e6, 2 * 256 * 64 * 4 / 1e6, None]
    assert rows[2].note == "not installed: make bench-peers" and rows[2].ratio is None


def _absent() -> None:
    peers.need("a_rival_that_nobody_has")


def test_relative_error_takes_the_worst_tensor_by_its_own_scale() -> None:
    exact = [torch.tensor([100.0, 1.0]).double(), torch.tensor([0.01, 0.0]).double()]
    assert relative_error([torch.tensor([100.0, 2.0]), torch.tensor([0.01, 0.001])], exact) == pytest.approx(0.1)


def test_forward_backward_returns_every_gradient_and_leaves_none() -> None:
    linear, x = torch.nn.Linear(4, 3), torch.randn(5, 4)
    run = forward_backward(linear, [x], torch.ones(5, 3), linear.parameters())
    out, grad_x, grad_weight, grad_bias = run()
    assert torch.equal(out, linear(x).detach()) and torch.equal(grad_bias, torch.full((3,), 5.0))
    assert torch.equal(grad_weight, x.sum(0).expand(3, 4)) and torch.allclose(grad_x, linear.weight.sum(0).expand(5, 4))
    assert linear.weight.grad is None
    assert torch.equal(run()[3], grad_bias)  # not added to the last call's
    (inference,) = forward(linear, [x])()
    assert not inference.requires_grad


def test_a_gradient_that_is_missing_is_an_error() -> None:
    run = forward_backward(lambda x, y: x * 2, [torch.ones(2), torch.ones(3)], torch.ones(2))
    with pytest.raises(RuntimeError, match=r"no gradient of an input \(3,\)"):
        run()


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
    with torch.no_grad():
        assert saved_bytes(function) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_peak_memory_and_timing_on_a_gpu() -> None:
    assert peak_memory(lambda: torch.empty(3 << 20, dtype=torch.uint8, device="cuda"), device="cuda") == 3 << 20
    x = torch.randn(2048, 2048, device="cuda")
    timings = measure_pairs({"one": lambda: x @ x, "four": lambda: x @ x @ x @ x @ x}, rounds=20, device="cuda")
    assert timings["four"].ratio > 1


def test_peak_memory_counts_what_lives_at_once() -> None:
    def function() -> torch.Tensor:
        first = torch.empty(3 << 20, dtype=torch.uint8)
        del first
        return torch.empty(1 << 20, dtype=torch.uint8)

    def both() -> list[torch.Tensor]:
        return [torch.empty(3 << 20, dtype=torch.uint8), torch.empty(1 << 20, dtype=torch.uint8)]

    assert peak_memory(function) == 3 << 20
    assert peak_memory(both) == 4 << 20


ROWS = [Row("attention", "ours", "forward", "B=4096", 20.0, 21.5, 23.0, 1.0, 5.0, 35.0, 37.0, fp64_error=3e-7),
        Row("attention", "eager", "forward", "B=4096", note="out of memory")]
MACHINE = Machine("CPU", 2, "2.13", "", "3.11", "abc", 0.5, 180.0, 29.0)


def test_rows_are_written_whole(tmp_path) -> None:
    records.write_json(tmp_path / "rows.json", ROWS, MACHINE)
    assert records.read_rows(tmp_path / "rows.json") == (MACHINE, ROWS)
    records.write_csv(tmp_path / "rows.csv", ROWS, MACHINE)
    with open(tmp_path / "rows.csv", newline="") as handle:
        lines = list(csv.DictReader(handle))
    assert lines[0]["p50"] == "21.5" and lines[1]["p50"] == "" and lines[1]["note"] == "out of memory"
    assert lines[0]["device"] == lines[1]["device"] == "CPU" and lines[0]["copy_gbps"] == "29.0"
    with pytest.raises(UserError, match="cannot write"):
        records.write_json(tmp_path / "rows.csv" / "below_a_file.json", ROWS, MACHINE)


def test_table_says_once_what_is_the_same_and_leaves_out_empty_columns(capsys: pytest.CaptureFixture) -> None:
    records.print_table(ROWS)
    above, head, first, second = capsys.readouterr().out.splitlines()
    assert above == "attention, B=4096, forward"
    assert [name for name in head.split("  ") if name][:3] == ["provider", "p20 ms", "p50 ms"]
    assert first.split() == ["ours", "20.00", "21.50", "23.00", "1.00", "5.0", "35.0", "37", "3.0e-07"]
    assert second.index("out of memory") == head.index("note")
    records.print_table([ROWS[0], Row("ffn", "ours", "forward", "B=4096", p50=1.0)])
    above, head, *_ = capsys.readouterr().out.splitlines()
    assert above == "B=4096, forward" and head.startswith("kernel") and "note" not in head


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
    assert seen == [Settings(torch.device("cpu"), "bf16", 7, 39, 16, 2, True, ("b", "a"))]
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


def test_heads_that_do_not_divide_the_width_are_named(restored_torch) -> None:
    result = invoke("--device", "cpu", "--dim", "60", "--heads", "7")
    assert result.exit_code == 2 and "--dim 60 is not divisible into 7 heads" in result.output


def test_a_sweep_measures_every_size_of_few_providers(restored_torch) -> None:
    settings = Settings(torch.device("cpu"), sweep="fields", heads=2)
    assert [point.fields for point in settings.points()] == [8, 16, 27, 32, 48, 64]
    assert all(point.heads == 2 and point.batch == 4096 for point in settings.points())
    both = {"forward": 1, "forward+backward": 2}
    assert settings.of_modes(both) == {"forward+backward": 2}
    assert Settings(torch.device("cpu")).of_modes(both) == both
    assert Settings(torch.device("cpu"), backward=False, sweep="batch").of_modes(both) == {"forward": 1}
    assert settings.choose({"a": 1, "b": 2}, ("b",)) == {"b": 2}
    assert Settings(torch.device("cpu")).choose({"a": 1, "b": 2}, ("b",)) == {"a": 1, "b": 2}
    seen = []
    invoke("--device", "cpu", "--plot", "x.png", body=seen.append)
    assert seen[0].sweep == "batch"


def test_finish_prints_and_writes_with_the_machine(restored_torch, tmp_path) -> None:
    result = invoke("--device", "cpu", "--threads", "1", "--json", str(tmp_path / "a.json"), "--csv",
                    str(tmp_path / "a.csv"),
                    body=lambda settings: settings.finish([Row(*"kkkk", p50=2.0)], Floors(5.0, 6.0)))
    assert result.exit_code == 0 and "p50" in result.output and "mm 5 GFLOP/s, copy 6.0 GB/s" in result.output
    machine, rows = records.read_rows(tmp_path / "a.json")
    assert rows == [Row(*"kkkk", p50=2.0)]
    assert machine.threads == 1 and machine.torch == torch.__version__ and machine.device and machine.commit
    assert (tmp_path / "a.csv").exists()
