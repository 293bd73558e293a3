"""Attention over 27 fields: ours against eager PyTorch, every SDPA backend, FlexAttention and torch.compile."""

from collections.abc import Callable

import click
import torch
from common.harness import Floors, Row, compare_modes, measure_floors
from common.options import Settings, bench_options
from common.peers import compiled
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ctr_kernels.attention import field_attention_packed
from ctr_kernels.attention.reference import field_attention_reference
from ctr_train.command import run_command

Attention = Callable[[torch.Tensor], torch.Tensor]  # qkv [B, F, 3 D] -> [B, F, D]
SDPA = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa mem-efficient": SDPBackend.EFFICIENT_ATTENTION,
        "sdpa cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa math": SDPBackend.MATH}
SWEPT = ("ours", "eager", "compile", "sdpa")


def split(qkv: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v [B, H, F, D / H] as views of the projection."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v


def joined(out: torch.Tensor) -> torch.Tensor:
    """[B, H, F, D / H] -> [B, F, D]."""
    return out.transpose(1, 2).flatten(2)


def providers(heads: int) -> dict[str, Attention]:
    """Everyone who does this job; ours first. All start from one projection, and end with heads side by side."""

    def eager(qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv.chunk(3, dim=-1)
        return field_attention_reference(q, k, v, heads, (q.shape[-1] // heads) ** -0.5, 0.0, None)

    def sdpa(qkv: torch.Tensor) -> torch.Tensor:
        return joined(F.scaled_dot_product_attention(*split(qkv, heads)))

    def sdpa_by(backend: SDPBackend) -> Attention:
        def run(qkv: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(backend):
                return sdpa(qkv)

        return run

    def flex(qkv: torch.Tensor) -> torch.Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        return joined(flex_attention(*split(qkv, heads)))

    return {
        "ours": lambda qkv: field_attention_packed(qkv, num_heads=heads),
        "eager": eager,
        **compiled(eager),
        "sdpa": sdpa,
        **{name: sdpa_by(backend) for name, backend in SDPA.items()},
        "compile sdpa": compiled(sdpa)["compile"],
        "flex_attention": compiled(flex)["compile"],
    }


def measure(s: Settings, floors: Floors) -> list[Row]:
    """Forward, and forward + backward, of one size.

    The floor counts q, k, v and out; and for backward q, k, v, the gradient of out and the three gradients.
    """
    qkv = torch.randn(s.batch, s.fields, 3 * s.dim, device=s.device).to(s.dtype)
    grad = torch.randn(s.batch, s.fields, s.dim, device=s.device).to(s.dtype)
    everyone = providers(s.heads)
    flops = 4.0 * s.batch * s.fields**2 * s.dim
    tensor = float(grad.numel() * grad.element_size())
    work = {"forward": (flops, 4 * tensor), "forward+backward": (3.5 * flops, 11 * tensor)}
    return compare_modes(s.choose(everyone, SWEPT), everyone["eager"], [qkv], grad, s.of_modes(work),
                         exact=not s.sweep, kernel="field_attention", x=s.shape, device=s.device, floors=floors,
                         **s.budget)


@click.command()
@bench_options
def main(settings: Settings) -> None:
    """Time attention, forward and forward + backward, from one q | k | v projection."""
    floors = measure_floors(settings.device, settings.dtype)
    rows = [row for point in settings.points() for row in measure(point, floors)]
    settings.finish(rows, floors)


if __name__ == "__main__":
    run_command(main, "bench/attn.py")
