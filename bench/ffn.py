"""The feed-forward network, plain or gated: ours against eager PyTorch and torch.compile."""

from collections.abc import Callable
from functools import partial

import click
import torch
from common.harness import Floors, Row, compare_modes, measure_floors
from common.options import Settings, bench_options
from common.peers import compiled
from torch.nn import functional as F

from ctr_kernels import ffn
from ctr_kernels.ffn.reference import ACTIVATIONS, GATED, activate
from ctr_train.command import run_command

Network = Callable[..., torch.Tensor]  # x [B, F, D], w1, b1, w2, b2 -> [B, F, D]
SWEPT = ("ours", "eager", "compile")


def providers(activation: str) -> dict[str, Network]:
    """Everyone who does this job; ours first."""

    def eager(x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor) -> torch.Tensor:
        return F.linear(activate(F.linear(x, w1, b1), activation, 0.0, None), w2, b2)

    return {"ours": partial(ffn, activation=activation), "eager": eager, **compiled(eager)}


def measure(s: Settings, hidden: int, activation: str, floors: Floors) -> list[Row]:
    """Forward, and forward + backward, of one size. The floor of the latter is three times the forward's FLOP: the
    recomputation of the hidden is not part of it."""
    rows = 2 * hidden if activation in GATED else hidden
    sizes = [(s.batch, s.fields, s.dim), (rows, s.dim), (rows,), (s.dim, hidden), (s.dim,)]
    inputs = [(torch.randn(size, device=s.device) / (size[-1] ** 0.5 if len(size) == 2 else 1)).to(s.dtype)
              for size in sizes]
    grad = torch.randn(sizes[0], device=s.device).to(s.dtype)
    everyone = providers(activation)
    flops = 2.0 * s.batch * s.fields * s.dim * (rows + hidden)
    tensor = float(grad.numel() * grad.element_size())
    work = {"forward": (flops, 2 * tensor), "forward+backward": (3 * flops, 5 * tensor)}
    return compare_modes(s.choose(everyone, SWEPT), everyone["eager"], inputs, grad, s.of_modes(work),
                         exact=not s.sweep, kernel="ffn" if activation == "gelu" else f"ffn {activation}",
                         x=f"{s.shape} hidden={hidden}", device=s.device,
                         floors=floors, **s.budget)


@click.command()
@click.option("--hidden", type=click.IntRange(min=1), help="Width of the hidden layer; default: 4 dim.")
@click.option("--activation", type=click.Choice(tuple(ACTIVATIONS)), default="gelu", show_default=True)
@bench_options
def main(settings: Settings, hidden: int | None, activation: str) -> None:
    """Time the FFN, forward and forward + backward."""
    floors = measure_floors(settings.device, settings.dtype)
    rows = [row for point in settings.points() for row in measure(point, hidden or 4 * point.dim, activation, floors)]
    settings.finish(rows, floors)


if __name__ == "__main__":
    run_command(main, "bench/ffn.py")
