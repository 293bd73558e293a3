"""What Triton's kernels of `field_tokens` take."""

TRITON_MAX_TILE = 16384  # elements that a program of Triton's holds at once, those of its sums included


def supports(backend: str, dim: int, statistics: int) -> str | None:
    """Why the kernels of `backend` do not take tokens of width `dim` with that many statistics of a field, or None."""
    if max(16, 1 << (dim - 1).bit_length()) * (2 + statistics) > TRITON_MAX_TILE:
        return (f"D={dim} with {statistics} statistics of a field: kernels={backend!r} takes up to {TRITON_MAX_TILE} "
                "elements of a token, its gradient and those of its statistics' vectors, D rounded up to a power of 2")
    return None
