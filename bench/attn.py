"""Attention over 27 fields: ours against eager PyTorch, SDPA and torch.compile, from one q | k | v projection."""

from collections.abc import Callable

import click
import torch
from harness import Row, Settings, bench_options, measure_floors, measure_pairs, saved_bytes, time_row
from torch.nn import functional as F

from ctr_kernels.attention import field_attention_packed
from ctr_kernels.attention.reference import field_attention_reference

Attention = Callable[[torch.Tensor], torch.Tensor]  # qkv [B, F, 3 D] -> [B, F, D]


def providers(heads: int) -> dict[str, Attention]:
    """Everyone who does this job; ours first."""

    def eager(qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv.chunk(3, dim=-1)
        return field_attention_reference(q, k, v, heads, (q.shape[-1] // heads) ** -0.5, 0.0, None)

    def sdpa(qkv: torch.Tensor) -> torch.Tensor:
        batch, fields, _ = qkv.shape
        q, k, v = (x.view(batch, fields, heads, -1).transpose(1, 2) for x in qkv.chunk(3, dim=-1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, fields, -1)

    return {
        "ours": lambda qkv: field_attention_packed(qkv, num_heads=heads),
        "sdpa": sdpa,
        "eager": eager,
        "compile(eager)": torch.compile(eager, dynamic=False),
        "compile(sdpa)": torch.compile(sdpa, dynamic=False),
    }


def forward(attention: Attention, qkv: torch.Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return attention(qkv)

    return run


def forward_backward(attention: Attention, qkv: torch.Tensor, grad: torch.Tensor) -> Callable[[], object]:
    qkv = qkv.detach().requires_grad_()

    def run() -> object:
        qkv.grad = None
        return attention(qkv).backward(grad)

    return run


@click.command()
@bench_options
def main(settings: Settings) -> None:
    """Time attention, forward and forward + backward. The floor counts q, k, v, out (and gradients) once each."""
    s = settings
    shape = f"B={s.batch} F={s.fields} D={s.dim} H={s.heads} {s.precision}"
    qkv = torch.randn(s.batch, s.fields, 3 * s.dim, device=s.device).to(s.dtype)
    grad = torch.randn(s.batch, s.fields, s.dim, device=s.device).to(s.dtype)
    chosen = s.choose(providers(s.heads))
    floors = measure_floors(s.device, s.dtype)
    flops = 4.0 * s.batch * s.fields**2 * s.dim
    tensor = float(grad.numel() * grad.element_size())
    rows = []
    for mode, functions, work, traffic in (
        ("forward", {name: forward(f, qkv) for name, f in chosen.items()}, flops, 4 * tensor),
        ("forward+backward", {name: forward_backward(f, qkv, grad) for name, f in chosen.items()}, 3.5 * flops,
         12 * tensor),
    ):
        for name, timing in measure_pairs(functions, device=s.device).items():
            rows.append(time_row(name, timing, kernel="field_attention", mode=mode, x=shape, flops=work,
                                 num_bytes=traffic, floors=floors))
    leaf = qkv.detach().requires_grad_()
    rows += [Row(kernel="field_attention", provider=name, mode="saved for backward", metric="memory", unit="MB",
                 x=shape, p50=saved_bytes(lambda f=f: f(leaf), exclude=[leaf]) / 1e6)
             for name, f in chosen.items() if not name.startswith("compile")]
    s.finish(rows)


if __name__ == "__main__":
    main()
