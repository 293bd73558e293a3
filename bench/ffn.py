"""The GELU feed-forward network: ours against eager PyTorch and torch.compile."""

from collections.abc import Callable

import click
import torch
from harness import Row, Settings, bench_options, measure_floors, measure_pairs, saved_bytes, time_row
from torch.nn import functional as F

from ctr_kernels import ffn

Network = Callable[..., torch.Tensor]  # x [B, F, D], w1, b1, w2, b2 -> [B, F, D]


def eager(x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor) -> torch.Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def forward(network: Network, inputs: list[torch.Tensor]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return network(*inputs)

    return run


def forward_backward(network: Network, inputs: list[torch.Tensor], grad: torch.Tensor) -> Callable[[], object]:
    inputs = [x.detach().requires_grad_() for x in inputs]

    def run() -> object:
        for x in inputs:
            x.grad = None
        return network(*inputs).backward(grad)

    return run


@click.command()
@click.option("--hidden", type=click.IntRange(min=8), help="Width of the hidden layer; default: 4 dim.")
@bench_options
def main(settings: Settings, hidden: int | None) -> None:
    """Time the FFN, forward and forward + backward. The floor of both is three times the forward's FLOP for the
    latter: the recomputation of the hidden is not part of it."""
    s = settings
    hidden = hidden or 4 * s.dim
    shape = f"B={s.batch} F={s.fields} D={s.dim} hidden={hidden} {s.precision}"
    sizes = [(s.batch, s.fields, s.dim), (hidden, s.dim), (hidden,), (s.dim, hidden), (s.dim,)]
    inputs = [(torch.randn(size, device=s.device) / (size[-1] ** 0.5 if len(size) == 2 else 1)).to(s.dtype)
              for size in sizes]
    grad = torch.randn(sizes[0], device=s.device).to(s.dtype)
    chosen = s.choose({"ours": ffn, "eager": eager, "compile(eager)": torch.compile(eager, dynamic=False)})
    floors = measure_floors(s.device, s.dtype)
    flops = 4.0 * s.batch * s.fields * s.dim * hidden
    tensor = float(grad.numel() * grad.element_size())
    rows = []
    for mode, functions, work, traffic in (
        ("forward", {name: forward(f, inputs) for name, f in chosen.items()}, flops, 2 * tensor),
        ("forward+backward", {name: forward_backward(f, inputs, grad) for name, f in chosen.items()}, 3 * flops,
         5 * tensor),
    ):
        for name, timing in measure_pairs(functions, device=s.device).items():
            rows.append(time_row(name, timing, kernel="ffn", mode=mode, x=shape, flops=work, num_bytes=traffic,
                                 floors=floors))
    leaves = [x.detach().requires_grad_() for x in inputs]
    rows += [Row(kernel="ffn", provider=name, mode="saved for backward", metric="memory", unit="MB", x=shape,
                 p50=saved_bytes(lambda f=f: f(*leaves), exclude=leaves) / 1e6)
             for name, f in chosen.items() if not name.startswith("compile")]
    s.finish(rows)


if __name__ == "__main__":
    main()
