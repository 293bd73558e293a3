"""Launch configurations that were the fastest on a GPU: lines that CTR_KERNELS_AUTOTUNE=1 printed, as they are.

What is not here has its default in the operation's table, chosen by what the compiler says of it.
"""

from typing import Any

TUNED: dict[tuple[Any, ...], tuple[int, ...]] = {
}
