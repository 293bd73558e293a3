"""The search for launch configurations, with a timer that needs no GPU; of real kernels in Triton's interpreter."""

import ast
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import NamedTuple

import pytest
import torch
from triton_interpreter import interpreted, outside, run_in_the_interpreter

from ctr_kernels import (
    EmbeddingTable,
    SparseLazyAdam,
    SparseSGD,
    TransformerLayer,
    ffn,
    field_attention,
    field_tokens,
    low_rank_cross,
)

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources, PTXASError  # noqa: E402

from ctr_kernels import triton_launch  # noqa: E402
from ctr_kernels.triton_launch import Key, launch_choice  # noqa: E402


class Tile(NamedTuple):
    rows: int
    warps: int = 4


class Clock:
    """A timer of runs that say how many milliseconds they take, by their rows, and which were run."""

    def __init__(self, milliseconds: dict[int, float]) -> None:
        self.milliseconds, self.runs = milliseconds, []

    def run(self, choice: Tile) -> float:
        self.runs.append(choice.rows)
        if choice.rows == 5:
            raise PTXASError("too many registers")
        if choice.rows == 6:
            raise RuntimeError("PassManager::run failed")
        if choice.rows not in self.milliseconds:
            raise OutOfResources(300_000, 200_000, "shared memory")
        return self.milliseconds[choice.rows]

    def __call__(self, run) -> float:
        return run()


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "_chosen", {})


def tiles(*rows: int) -> list[Tile]:
    return [Tile(r) for r in rows]


KEY = Key("attention", "forward", (32, 16), "half", 90)


def choose(default: int, rows: list[int], clock: Clock, key: Key = KEY) -> Tile:
    return launch_choice(key, lambda _: Tile(default), lambda _: tiles(*rows), clock.run, clock)


def test_the_table_stands_unless_a_search_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CTR_KERNELS_AUTOTUNE", raising=False)
    clock = Clock({1: 2.0, 2: 1.0})
    assert choose(1, [2], clock) == Tile(1) and clock.runs == []


def test_the_fastest_is_chosen_once_and_printed(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("CTR_KERNELS_AUTOTUNE", "1")
    clock = Clock({1: 0.012, 2: 0.009, 3: 0.010})
    found = [choose(1, [1, 2, 3, 4, 5, 6], clock) for _ in range(2)]
    assert found == tiles(2, 2)
    assert clock.runs == [1, 2, 3, 4, 5, 6]  # the default is timed once; 4 does not fit, 5 and 6 do not compile
    assert capsys.readouterr().err == ("    ('attention', 'forward', (32, 16), 'half', 90): (2, 4),  "
                                       "# Tile(rows=2, warps=4): 9.0 us; Tile(rows=1, warps=4): 12.0 us; "
                                       "(3, 4): 10.0\n")
    assert choose(3, [], clock, KEY._replace(architecture=80)) == Tile(3) and clock.runs[-1] == 3


def test_nothing_that_fits_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTR_KERNELS_AUTOTUNE", "1")
    clock = Clock({})
    with pytest.raises(RuntimeError, match=r"no launch configuration of .* fits this GPU: Tile\(rows=1, "):
        choose(1, [2], clock)


def test_a_search_during_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTR_KERNELS_AUTOTUNE", "1")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    clock = Clock({1: 1.0})
    with pytest.raises(RuntimeError, match=r"cannot time \('attention', .* is captured: run a step first"):
        choose(1, [], clock)


@outside
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__, 11)


def inputs(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [(torch.randn(shape) / shape[-1] ** 0.5).requires_grad_() for shape in shapes]


def attend() -> tuple[torch.Tensor, list[torch.Tensor]]:
    leaves = inputs((1, 40, 32), (1, 40, 32), (1, 40, 32))
    return field_attention(*leaves, num_heads=1, kernels="triton"), leaves


def feed_forward() -> tuple[torch.Tensor, list[torch.Tensor]]:
    leaves = inputs((3, 16), (40, 16), (40,), (16, 40), (16,))
    return ffn(*leaves, kernels="triton"), leaves


def layer() -> tuple[torch.Tensor, list[torch.Tensor]]:
    leaves = inputs((1, 3, 16))
    module = TransformerLayer(16, 2, 40, norm="post", kernels="triton")
    return module(*leaves), [*leaves, *module.parameters()]


def cross() -> tuple[torch.Tensor, list[torch.Tensor]]:
    leaves = inputs((3, 40), (3, 40), (5, 40), (40, 5), (40,))
    return low_rank_cross(*leaves, kernels="triton"), leaves


def tokens() -> tuple[torch.Tensor, list[torch.Tensor]]:
    leaves = inputs((9, 16), (3, 2), (16, 2), (16,), (16,))
    return field_tokens(leaves[0], torch.arange(6).view(3, 2), *leaves[1:], None, kernels="triton"), leaves


def both_ways(compute: Callable[[], tuple[torch.Tensor, list[torch.Tensor]]]) -> list[torch.Tensor]:
    """The output and its gradients."""
    out, leaves = compute()
    return [out.detach(), *(g.to_dense() for g in torch.autograd.grad(out.cos().sum(), leaves))]


def updated(kind: type[torch.optim.Optimizer], width: int) -> list[torch.Tensor]:
    """A table after two steps on skewed ids, and the state of its optimizer."""
    torch.manual_seed(0)
    table = EmbeddingTable(30, width, std=1.0, kernels="triton")
    optimizer = kind(table.parameters(), lr=0.1, kernels="triton")
    for _ in range(2):
        table((torch.rand(90) ** 4 * 30).long()).backward(torch.randn(90, width))
        optimizer.step()
        optimizer.zero_grad()
    return [table.weight.detach(), *optimizer.state[table.weight].values()]


# What it computes, and how many kinds of launch it has by operation.
SEARCHED: dict[str, tuple[Callable[[], list[torch.Tensor]], dict[str, int]]] = {
    "attention": (partial(both_ways, attend), {"attention": 2}),
    "ffn": (partial(both_ways, feed_forward), {"ffn": 3}),
    "layer": (partial(both_ways, layer), {"attention": 2, "ffn": 3, "layer": 6}),
    "cross": (partial(both_ways, cross), {"cross": 3}),
    "tokenizer": (partial(both_ways, tokens), {"tokenizer": 2}),
    "rows, SGD": (partial(updated, SparseSGD, 13), {"sparse_update": 1}),
    "rows, Adam": (partial(updated, SparseLazyAdam, 40), {"sparse_update": 1}),
}


@interpreted
@pytest.mark.parametrize("name", SEARCHED)
def test_a_search_runs_every_candidate_and_prints_lines_for_the_table(name: str, monkeypatch: pytest.MonkeyPatch,
                                                                      capsys) -> None:
    """Each candidate takes longer than the one tried after it: the last, which is not the table's, is the fastest."""
    results, kinds = SEARCHED[name]
    expected, tried = results(), []

    def milliseconds(run: Callable[[], object]) -> float:
        run()
        tried.append(run.args[0])
        return 1.0 / len(tried)

    monkeypatch.setattr(triton_launch, "_milliseconds", milliseconds)
    monkeypatch.setenv("CTR_KERNELS_AUTOTUNE", "1")
    torch.testing.assert_close(results(), expected)
    pasted = ast.literal_eval("{" + capsys.readouterr().err + "}")
    assert Counter(key[0] for key in pasted) == kinds
    assert len(tried) >= 10 * len(pasted)

    monkeypatch.delenv("CTR_KERNELS_AUTOTUNE")
    monkeypatch.setattr(triton_launch, "TUNED", pasted)
    chosen = {}

    def recorded(key: Key, default: Callable[[Key], tuple], *rest: object) -> tuple:
        chosen[tuple(key)] = launch_choice(key, default, *rest)
        assert type(chosen[key]) is type(default(key)) and chosen[key] != default(key)
        return chosen[key]

    for kind in kinds:
        monkeypatch.setattr(import_module(f"ctr_kernels.{kind}.triton"), "launch_choice", recorded)
    torch.testing.assert_close(results(), expected)
    assert chosen == pasted
