"""The low-rank cross layer of DCN-V2: ours against eager PyTorch and torch.compile."""

from collections.abc import Callable

import click
import torch
from common.harness import Floors, Row, compare_modes, measure_floors
from common.options import Settings, bench_options
from common.peers import compiled

from ctr_kernels import low_rank_cross
from ctr_kernels.cross.reference import low_rank_cross_reference
from ctr_train.command import run_command

Cross = Callable[..., torch.Tensor]  # x0, x [B, W], u [R, W], v [W, R], bias [W] -> [B, W]
SWEPT = ("ours", "eager", "compile")


def providers() -> dict[str, Cross]:
    """Everyone who does this job; ours first."""
    return {"ours": low_rank_cross, "eager": low_rank_cross_reference, **compiled(low_rank_cross_reference)}


def measure(s: Settings, width: int, rank: int, floors: Floors) -> list[Row]:
    """Forward, and forward + backward, of one size. The floor counts x0, x and y; and for backward x0, x, the gradient
    of y and the two of x0 and x."""
    sizes = [(s.batch, width), (s.batch, width), (rank, width), (width, rank), (width,)]
    inputs = [(torch.randn(size, device=s.device) / (size[-1] ** 0.5 if i in (2, 3) else 1)).to(s.dtype)
              for i, size in enumerate(sizes)]
    grad = torch.randn(sizes[0], device=s.device).to(s.dtype)
    everyone = providers()
    flops, tensor = 4.0 * s.batch * width * rank, float(grad.numel() * grad.element_size())
    work = {"forward": (flops, 3 * tensor), "forward+backward": (3 * flops, 8 * tensor)}
    return compare_modes(s.choose(everyone, SWEPT), everyone["eager"], inputs, grad, s.of_modes(work),
                         exact=not s.sweep, kernel="low_rank_cross", x=f"B={s.batch} W={width} R={rank} {s.precision}",
                         device=s.device, floors=floors, **s.budget)


@click.command()
@click.option("--width", type=click.IntRange(min=1), default=429, show_default=True, help="W, columns of x.")
@click.option("--rank", type=click.IntRange(min=1), default=32, show_default=True)
@bench_options
def main(settings: Settings, width: int, rank: int) -> None:
    """Time a cross layer, forward and forward + backward. --fields, --dim and --heads do not apply."""
    if settings.sweep == "fields":
        raise click.BadParameter("a cross layer has no fields; only the batch can be swept", param_hint="--sweep")
    floors = measure_floors(settings.device, settings.dtype)
    settings.finish([row for point in settings.points() for row in measure(point, width, rank, floors)], floors)


if __name__ == "__main__":
    run_command(main, "bench/cross.py")
