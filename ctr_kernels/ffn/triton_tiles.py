"""The launch configurations of the feed-forward network's Triton kernels."""

import itertools
from typing import NamedTuple

import torch

from ..triton_support import architecture, arithmetic_of, input_precision


class Tile(NamedTuple):
    """A launch configuration: tokens and hidden units at a time (of these a multiple of 32), warps, and tiles in flight
    while one is worked on."""

    tokens: int
    units: int
    warps: int
    stages: int = 2


class Tiles(NamedTuple):
    """The launch configurations of the three kernels, and the passes of the third (its LAYERS)."""

    forward: Tile
    token: Tile
    weight: Tile
    passes: tuple[int, ...] = (3,)


# By arithmetic ("half": fp16 and bf16), whether D exceeds 64, and architecture (sm_80 stands for all but 9x and 10x).
# Chosen by what the ptxas of triton 3.7 and 3.6 say: no spills, then the larger tile; where both sums of a wide slice
# spill, each has its pass. (One is left: 8 bytes of the weight kernel of "tf32x3", True, 80 with triton 3.6.)
TILES: dict[tuple[str, bool, int], Tiles] = {
    ("half", False, 80): Tiles(Tile(128, 64, 8), Tile(128, 64, 8), Tile(64, 32, 4)),
    ("half", False, 90): Tiles(Tile(128, 64, 8), Tile(128, 64, 8), Tile(32, 64, 4)),
    ("half", False, 100): Tiles(Tile(128, 64, 8), Tile(128, 64, 8), Tile(32, 64, 8)),
    ("half", True, 80): Tiles(Tile(128, 64, 8), Tile(128, 32, 8), Tile(32, 32, 4)),
    ("half", True, 90): Tiles(Tile(128, 64, 8), Tile(128, 32, 8), Tile(32, 64, 8)),
    ("half", True, 100): Tiles(Tile(128, 64, 8), Tile(128, 32, 8), Tile(32, 64, 8)),
    ("tf32", False, 80): Tiles(Tile(64, 32, 4), Tile(64, 32, 4), Tile(32, 32, 4)),
    ("tf32", False, 90): Tiles(Tile(128, 32, 8), Tile(64, 32, 4), Tile(32, 64, 8)),
    ("tf32", False, 100): Tiles(Tile(64, 32, 4), Tile(64, 64, 8), Tile(32, 64, 8)),
    ("tf32", True, 80): Tiles(Tile(64, 32, 4), Tile(32, 32, 8), Tile(16, 32, 4)),
    ("tf32", True, 90): Tiles(Tile(128, 32, 8), Tile(64, 32, 8), Tile(16, 32, 4)),
    ("tf32", True, 100): Tiles(Tile(128, 32, 8), Tile(64, 32, 8), Tile(32, 32, 8)),
    ("tf32x3", False, 80): Tiles(Tile(32, 32, 4), Tile(32, 32, 4), Tile(32, 32, 8)),
    ("tf32x3", False, 90): Tiles(Tile(128, 32, 8), Tile(32, 32, 4), Tile(32, 32, 8)),
    ("tf32x3", False, 100): Tiles(Tile(64, 32, 8), Tile(64, 32, 8), Tile(32, 64, 8)),
    ("tf32x3", True, 80): Tiles(Tile(32, 32, 8), Tile(16, 32, 8), Tile(16, 32, 8, stages=1), (1, 2)),
    ("tf32x3", True, 90): Tiles(Tile(32, 32, 8), Tile(16, 32, 8), Tile(16, 32, 8), (1, 2)),
    ("tf32x3", True, 100): Tiles(Tile(64, 32, 8), Tile(16, 32, 8), Tile(16, 32, 8), (1, 2)),
}
CANDIDATES = [Tile(*shape) for shape in itertools.product((16, 32, 64, 128), (32, 64), (4, 8))]  # of a search


def table_key(dim: int, dtype: torch.dtype, cc: int) -> tuple[str, bool, int]:
    """The row of TILES for D = dim on sm_<cc>; 0 is the interpreter."""
    return arithmetic_of(dtype), dim > 64, architecture(cc)


def tiles_for(dim: int, dtype: torch.dtype, cc: int) -> tuple[Tiles, str]:
    """Launch configurations and input precision for D = dim on sm_<cc>."""
    return TILES[table_key(dim, dtype, cc)], input_precision(dtype)
