"""The search for launch configurations, with a timer that needs no GPU."""

import pytest

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources  # noqa: E402

from ctr_kernels import triton_autotune  # noqa: E402
from ctr_kernels.triton_autotune import launch_choice  # noqa: E402


class Clock:
    """A timer of runs that say how many milliseconds they take, and what was run."""

    def __init__(self, milliseconds: dict[int, float]) -> None:
        self.milliseconds, self.runs = milliseconds, []

    def run(self, choice: int) -> float:
        self.runs.append(choice)
        if choice not in self.milliseconds:
            raise OutOfResources(300_000, 200_000, "shared memory")
        return self.milliseconds[choice]

    def __call__(self, run) -> float:
        return run()


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_autotune, "_chosen", {})


def test_the_table_stands_unless_a_search_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CTR_KERNELS_AUTOTUNE", raising=False)
    clock = Clock({1: 2.0, 2: 1.0})
    assert launch_choice("key", 1, [2], clock.run, clock) == 1 and clock.runs == []


def test_the_fastest_is_chosen_once_and_printed(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("CTR_KERNELS_AUTOTUNE", "1")
    clock = Clock({1: 0.012, 2: 0.009, 3: 0.010})
    key = ("forward", "fp32", 32, 16, 90)
    assert [launch_choice(key, 1, [1, 2, 3, 4], clock.run, clock) for _ in range(2)] == [2, 2]
    assert clock.runs == [1, 2, 3, 4]  # the default is timed once, 4 does not fit
    assert capsys.readouterr().err == "    ('forward', 'fp32', 32, 16, 90): 2,  # 9.0 us; 1 12.0 us\n"
    assert launch_choice("another", 3, [], clock.run, clock) == 3 and clock.runs[-1] == 3


def test_nothing_that_fits_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTR_KERNELS_AUTOTUNE", "1")
    clock = Clock({})
    with pytest.raises(RuntimeError, match="no launch configuration of key fits this GPU: 1, 2 were tried"):
        launch_choice("key", 1, [2], clock.run, clock)


def test_a_search_during_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTR_KERNELS_AUTOTUNE", "1")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    clock = Clock({1: 1.0})
    with pytest.raises(RuntimeError, match="cannot time key while a CUDA graph is captured: run a step first"):
        launch_choice("key", 1, [], clock.run, clock)
