"""The launch configurations of the feed-forward network's Triton kernels."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton

from ..triton_launch import ANY, Key, architecture, arithmetic_of, row_of


class Tile(NamedTuple):
    """A launch configuration: tokens and hidden units at a time (of these a multiple of 32), warps, tiles in flight
    while one is worked on, columns of D at a time in products over D (0 for all), and of the weight kernel programs
    that share a multiprocessor (0: 8 warps' worth)."""

    tokens: int
    units: int
    warps: int
    stages: int = 2
    columns: int = 0
    resident: int = 0


class Tiles(NamedTuple):
    """The launch configurations of the three kernels, and the passes of the third (its LAYERS; none: all at once)."""

    forward: Tile
    token: Tile
    weight: Tile
    passes: tuple[int, ...] = ()


# By arithmetic ("half": fp16 and bf16), widest D, gate and architecture (sm_80 stands for all but 9x and 10x).
# Chosen by what the ptxas of triton 3.7 and 3.6 say: no spills, then the larger tile; where both sums of a wide slice
# spill, each has its pass. (One is left: 8 bytes of the weight kernel of "fp16x3", 128, 80 with triton 3.6.)
TILES: dict[tuple, Tiles] = {
    ("half", 64, False, 80): Tiles(Tile(128, 64, 8), Tile(128, 64, 8), Tile(64, 32, 4)),
    ("half", 64, False, 90): Tiles(Tile(64, 64, 4), Tile(64, 64, 4), Tile(64, 64, 4, 1, 0, 2)),
    ("half", 64, False, 100): Tiles(Tile(128, 64, 8), Tile(128, 64, 8), Tile(32, 64, 8)),
    ("half", 128, False, 80): Tiles(Tile(128, 64, 8), Tile(128, 32, 8), Tile(32, 32, 4)),
    ("half", 128, False, 90): Tiles(Tile(128, 64, 8), Tile(128, 32, 8), Tile(32, 64, 8)),
    ("half", 128, False, 100): Tiles(Tile(128, 64, 8), Tile(128, 32, 8), Tile(32, 64, 8)),
    ("tf32", 64, False, 80): Tiles(Tile(64, 32, 4), Tile(64, 32, 4), Tile(32, 32, 4)),
    ("tf32", 64, False, 90): Tiles(Tile(64, 32, 4), Tile(64, 32, 4, 1), Tile(64, 128, 8, 1, 0, 1)),
    ("tf32", 64, False, 100): Tiles(Tile(64, 32, 4), Tile(64, 64, 8), Tile(32, 64, 8)),
    ("tf32", 128, False, 80): Tiles(Tile(64, 32, 4), Tile(32, 32, 8), Tile(16, 32, 4)),
    ("tf32", 128, False, 90): Tiles(Tile(128, 32, 8), Tile(64, 32, 8), Tile(16, 32, 4)),
    ("tf32", 128, False, 100): Tiles(Tile(128, 32, 8), Tile(64, 32, 8), Tile(32, 32, 8)),
    ("fp16x3", 64, False, 80): Tiles(Tile(32, 32, 4), Tile(32, 32, 8, 1), Tile(32, 32, 8)),
    ("fp16x3", 64, False, 90): Tiles(Tile(64, 32, 4, 1), Tile(64, 32, 4, 1), Tile(64, 64, 4, 1, 0, 2)),
    ("fp16x3", 64, False, 100): Tiles(Tile(64, 32, 8), Tile(64, 32, 8), Tile(32, 64, 8)),
    ("fp16x3", 128, False, 80): Tiles(Tile(32, 32, 8), Tile(16, 32, 8), Tile(16, 32, 8, stages=1), (1, 2)),
    ("fp16x3", 128, False, 90): Tiles(Tile(32, 32, 8), Tile(16, 32, 8), Tile(16, 32, 8), (1, 2)),
    ("fp16x3", 128, False, 100): Tiles(Tile(64, 32, 8), Tile(16, 32, 8), Tile(16, 32, 8), (1, 2)),
    ("half", 64, True, ANY): Tiles(Tile(128, 32, 8), Tile(64, 32, 8), Tile(32, 32, 8)),
    ("half", 128, True, ANY): Tiles(Tile(64, 32, 8), Tile(64, 32, 8), Tile(16, 32, 8), (1, 2, 4)),
    ("half", 128, True, 100): Tiles(Tile(64, 32, 8), Tile(32, 32, 8), Tile(16, 32, 8, 1, 64), (1, 2, 4)),
    ("half", 256, False, ANY): Tiles(Tile(32, 32, 8, 1, 64), Tile(32, 32, 8, 1, 64), Tile(16, 32, 8, 1, 64), (1, 2)),
    ("half", 256, True, ANY): Tiles(Tile(32, 32, 8, 1, 64), Tile(32, 32, 8, 1, 64), Tile(16, 32, 8, 1, 64), (1, 2, 4)),
    ("half", 256, True, 100): Tiles(Tile(32, 32, 8, 1, 32), Tile(32, 32, 8, 1, 32), Tile(16, 32, 8, 1, 32), (1, 2, 4)),
    ("tf32", 64, True, ANY): Tiles(Tile(32, 32, 4), Tile(32, 32, 8), Tile(32, 32, 8), (1, 2, 4)),
    ("tf32", 128, True, ANY): Tiles(Tile(32, 32, 8), Tile(16, 32, 8), Tile(16, 32, 8, 1, 32), (1, 2, 4)),
    ("tf32", 256, True, 100): Tiles(Tile(16, 32, 8, 1, 32), Tile(16, 32, 8, 1, 32), Tile(16, 32, 8, 1, 32), (1, 2, 4)),
    ("fp16x3", 64, True, ANY): Tiles(Tile(32, 32, 4), Tile(32, 32, 8, 1, 32), Tile(32, 32, 8), (1, 2, 4)),
    ("fp16x3", 128, True, ANY):
    Tiles(Tile(32, 32, 8, 1, 32), Tile(32, 32, 8, 1, 32), Tile(16, 32, 8, 1, 32), (1, 2, 4)),
    **{(arithmetic, 256, gated, ANY):
       Tiles(Tile(32, 32, 8, 1, 32), Tile(32, 32, 8, 1, 32), Tile(16, 32, 8, 1, 32), passes)
       for arithmetic in ("tf32", "fp16x3") for gated, passes in ((False, (1, 2)), (True, (1, 2, 4)))},
}


def launch_key(kernel: str, dim: int, hidden: int, norm: int, gated: bool, dtype: torch.dtype, cc: int) -> Key:
    """shape: D as a tile has it, 64 at least, hidden units, norm and gate."""
    shape = (max(64, triton.next_power_of_2(dim)), hidden, norm, int(gated))
    return Key("ffn", kernel, shape, arithmetic_of(dtype), architecture(cc))


def tiles_for(key: Key) -> Tiles:
    """The row of the three kernels, whichever of them the key is of."""
    width, _, _, gated = key.shape
    tiles = row_of(TILES, key.arithmetic, width, bool(gated), key.architecture)
    assert tiles is not None, key  # operator.py refuses a wider one
    return tiles


def default(key: Key) -> Tile:
    """What the table has."""
    tile: Tile = getattr(tiles_for(key), key.kernel)
    return tile


def candidates(key: Key) -> Iterator[Tile]:
    """What a search tries."""
    width, *_ = key.shape
    slices = (0,) if width <= 128 else (32, 64)
    shapes = [(32, 32, 4), (32, 64, 4), (64, 32, 4), (64, 64, 4), (64, 64, 8), (128, 32, 4), (128, 32, 8), (128, 64, 8),
              (32, 128, 8), (64, 128, 8)]
    resident = (1, 2, 3) if key.kernel == "weight" else (0,)
    return (Tile(*shape, stages, columns, programs)
            for shape, stages, columns, programs in itertools.product(shapes, (1, 2), slices, resident))
