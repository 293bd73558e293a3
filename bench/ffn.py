"""The GELU feed-forward network: ours against eager PyTorch and torch.compile."""

from collections.abc import Callable

import click
import torch
from common.harness import Floors, Row, compare_modes, measure_floors
from common.options import Settings, bench_options
from common.peers import compiled
from torch.nn import functional as F

from ctr_kernels import ffn
from ctr_train.command import run_command

Network = Callable[..., torch.Tensor]  # x [B, F, D], w1, b1, w2, b2 -> [B, F, D]
SWEPT = ("ours", "eager", "compile")


def providers() -> dict[str, Network]:
    """Everyone who does this job; ours first."""

    def eager(x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor) -> torch.Tensor:
        return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)

    return {"ours": ffn, "eager": eager, **compiled(eager)}


def measure(s: Settings, hidden: int, floors: Floors) -> list[Row]:
    """Forward, and forward + backward, of one size. The floor of the latter is three times the forward's FLOP: the
    recomputation of the hidden is not part of it."""
    sizes = [(s.batch, s.fields, s.dim), (hidden, s.dim), (hidden,), (s.dim, hidden), (s.dim,)]
    inputs = [(torch.randn(size, device=s.device) / (size[-1] ** 0.5 if len(size) == 2 else 1)).to(s.dtype)
              for size in sizes]
    grad = torch.randn(sizes[0], device=s.device).to(s.dtype)
    everyone = providers()
    flops = 4.0 * s.batch * s.fields * s.dim * hidden
    tensor = float(grad.numel() * grad.element_size())
    work = {"forward": (flops, 2 * tensor), "forward+backward": (3 * flops, 5 * tensor)}
    return compare_modes(s.choose(everyone, SWEPT), everyone["eager"], inputs, grad, s.of_modes(work),
                         exact=not s.sweep, kernel="ffn", x=f"{s.shape} hidden={hidden}", device=s.device,
                         floors=floors, **s.budget)


@click.command()
@click.option("--hidden", type=click.IntRange(min=8), help="Width of the hidden layer; default: 4 dim.")
@bench_options
def main(settings: Settings, hidden: int | None) -> None:
    """Time the FFN, forward and forward + backward."""
    floors = measure_floors(settings.device, settings.dtype)
    rows = [row for point in settings.points() for row in measure(point, hidden or 4 * point.dim, floors)]
    settings.finish(rows, floors)


if __name__ == "__main__":
    run_command(main, "bench/ffn.py")
