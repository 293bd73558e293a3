"""The dropout mask that every backend draws bit for bit: Philox 4x32-10 (Salmon et al. 2011).

Specification. A map of `rows` x `width` elements is cut into groups of 32 columns; with
`groups = ceil(width / 32)`, the element (row, column) takes

    counter = (row * groups + column // 32) * 8 + column % 8        64 bit: low word c0, high word c1
    word    = (column % 32) // 8                                    of the four that Philox yields
    keep    = (word >> 1) >= round(p * 2^31)                        integers throughout

with the 64-bit seed as key. One Philox call thus serves four elements whose columns are 8 apart, which
is what both 8-lane CPU vectors and `tl.randint4x(seed, counter)` yield without a shuffle.
Kept elements are scaled by 1 / (1 - p). For an attention map, row = (b * H + h) * F + query and column = key;
for a hidden layer, row = token and column = hidden unit; for rows of a table, row = sample and column = field.
"""

import torch

from .library import LIBRARY, NATIVE_ABSENT

_MASK32 = 0xFFFFFFFF
_CHUNK = 1 << 15  # counters worked on at a time, so that the ten rounds stay in the cache


def as_seed(seed: int | torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """The seed as an int64 tensor [1] on `device`; None draws one from torch's generator of that device."""
    if seed is None:
        return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(f"seed must be an int64 tensor of one element, not {seed.dtype} {tuple(seed.shape)}")
        return seed.reshape(1).to(device)
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed={seed} does not fit in 64 bits")
    return torch.tensor([seed], dtype=torch.int64, device=device)


def threshold(dropout_p: float) -> int:
    """round(p * 2^31): a 31-bit draw below it drops the element."""
    return round(dropout_p * 2**31)


def check_dropout(dropout_p: float, name: str = "dropout_p") -> None:
    """ValueError unless 0 <= dropout_p < 1."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{name}={dropout_p} is outside [0, 1)")


def philox(seed: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
    """Four 32-bit words a counter: int64 [n] -> int64 [n, 4]; products wrap modulo 2^64 as they must."""
    c0, c1 = counter & _MASK32, (counter >> 32) & _MASK32
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((b >> 32) & _MASK32) ^ c1 ^ k0, b & _MASK32
        c2, c3 = ((a >> 32) & _MASK32) ^ c3 ^ k1, a & _MASK32
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return torch.stack([c0, c1, c2, c3], dim=-1)


def dropout_mask_torch(rows: int, width: int, dropout_p: float, seed: torch.Tensor) -> torch.Tensor:
    """The specification itself in torch operations; bool [rows, width], true = keep."""
    groups = -(-width // 32)
    mask = torch.empty(rows * groups, 32, dtype=torch.bool, device=seed.device)
    limit = threshold(dropout_p)
    step = max(1, _CHUNK // 8) if seed.device.type == "cpu" else max(1, rows * groups)
    for start in range(0, rows * groups, step):
        stop = min(start + step, rows * groups)
        words = philox(seed, torch.arange(start * 8, stop * 8, device=seed.device))
        keep = (words >> 1) >= limit  # [n * 8, 4]
        mask[start:stop] = keep.view(-1, 8, 4).transpose(1, 2).reshape(-1, 32)
    return mask.view(rows, groups * 32)[:, :width]


@torch.library.register_fake("ctr::dropout_mask", lib=LIBRARY)
def _fake_mask(rows: int, width: int, threshold: int, seed: torch.Tensor) -> torch.Tensor:
    return seed.new_empty((rows, width), dtype=torch.bool)


def dropout_mask(rows: int, width: int, dropout_p: float, seed: torch.Tensor) -> torch.Tensor:
    """Keep-mask bool [rows, width] for `seed` (int64 [1]); on CPUs drawn by the native library if it is built."""
    if seed.device.type == "cpu" and NATIVE_ABSENT is None:
        return torch.ops.ctr.dropout_mask(rows, width, threshold(dropout_p), seed)
    return dropout_mask_torch(rows, width, dropout_p, seed)
