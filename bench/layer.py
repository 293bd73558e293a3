"""One pre-norm transformer layer: ours against eager PyTorch, torch.compile and nn.TransformerEncoderLayer."""

from collections.abc import Callable

import click
import torch
from common.harness import Floors, Row, compare_modes, measure_floors
from common.options import Settings, bench_options
from common.peers import Unavailable, compiled
from torch import nn

from ctr_kernels import TransformerLayer
from ctr_train.command import run_command

Layer = Callable[[torch.Tensor], torch.Tensor]  # [B, F, D] -> [B, F, D]
ENCODER = "nn.TransformerEncoderLayer"
SWEPT = ("ours", "eager", "compile", ENCODER)


def as_encoder_layer(ours: TransformerLayer, s: Settings) -> nn.TransformerEncoderLayer:
    """PyTorch's own layer with the same weights and formula."""
    assert ours.out is not None
    theirs = nn.TransformerEncoderLayer(s.dim, s.heads, ours.ffn_in.out_features, dropout=0.0, activation="gelu",
                                        batch_first=True, norm_first=True)
    pairs = {theirs.self_attn.in_proj_weight: ours.qkv.weight, theirs.self_attn.in_proj_bias: ours.qkv.bias,
             theirs.self_attn.out_proj.weight: ours.out.weight, theirs.self_attn.out_proj.bias: ours.out.bias,
             theirs.linear1.weight: ours.ffn_in.weight, theirs.linear1.bias: ours.ffn_in.bias,
             theirs.linear2.weight: ours.ffn_out.weight, theirs.linear2.bias: ours.ffn_out.bias}
    with torch.no_grad():
        for target, source in pairs.items():
            target.copy_(source)
    return theirs


def providers(s: Settings, ffn_dim: int, mode: str) -> tuple[dict[str, Layer], dict[str, nn.Module]]:
    """Everyone who does this job, ours first, and the module whose gradients each one makes; equal weights."""
    ours, eager = (TransformerLayer(s.dim, s.heads, ffn_dim, kernels=kernels) for kernels in ("auto", "eager"))
    eager.load_state_dict(ours.state_dict())
    encoder = as_encoder_layer(ours, s)
    modules: dict[str, nn.Module] = {"ours": ours, "eager": eager, ENCODER: encoder}
    for module in modules.values():
        module.to(s.device, s.dtype).train(mode != "forward")

    def without_fast_path(x: torch.Tensor) -> torch.Tensor:
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return encoder(x)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)

    def fast_path(x: torch.Tensor) -> torch.Tensor:
        if mode != "forward":
            raise Unavailable("for inference only")
        return encoder(x)

    layers: dict[str, Layer] = {"ours": ours, "eager": eager, **compiled(eager), ENCODER: without_fast_path,
                                f"{ENCODER} fast path": fast_path}
    return layers, {name: modules.get(name, encoder if name.startswith(ENCODER) else eager) for name in layers}


def measure(s: Settings, ffn_dim: int, floors: Floors) -> list[Row]:
    """Forward (eval), and forward + backward, of one size. The floor counts the layer's input and output (and their
    gradients), and three times the forward's FLOP for both directions."""
    x = torch.randn(s.batch, s.fields, s.dim, device=s.device).to(s.dtype)
    grad = torch.randn_like(x)
    tokens = float(s.batch * s.fields)
    flops = tokens * (8 * s.dim**2 + 4 * s.fields * s.dim + 4 * s.dim * ffn_dim)
    tensor = float(x.numel() * x.element_size())
    rows = []
    for mode, work in s.of_modes({"forward": (flops, 2 * tensor), "forward+backward": (3 * flops, 5 * tensor)}).items():
        layers, modules = providers(s, ffn_dim, mode)
        wide = TransformerLayer(s.dim, s.heads, ffn_dim, kernels="eager").to(s.device, torch.float64)
        wide.load_state_dict(modules["ours"].state_dict())
        # Of the gradients the input's is compared: the modules keep their weights in different orders.
        rows += compare_modes(s.choose(layers, SWEPT), wide, [x], grad, {mode: work},
                              parameters={name: list(module.parameters()) for name, module in modules.items()},
                              exact=not s.sweep, kernel="layer", x=f"{s.shape} hidden={ffn_dim}", device=s.device,
                              floors=floors, **s.budget)
    return rows


@click.command()
@click.option("--hidden", type=click.IntRange(min=8), help="Width of the FFN's hidden layer; default: 4 dim.")
@bench_options
def main(settings: Settings, hidden: int | None) -> None:
    """Time a whole transformer layer, forward (as in inference) and forward + backward, without dropout."""
    floors = measure_floors(settings.device, settings.dtype)
    rows = [row for point in settings.points() for row in measure(point, hidden or 4 * point.dim, floors)]
    settings.finish(rows, floors)


if __name__ == "__main__":
    run_command(main, "bench/layer.py")
