"""Raw Criteo lines for tests, and their features worked out one value at a time."""

import math
import random

from ctr_train.data.protocol import NUM_DENSE, NUM_SPARSE


def raw_lines(count: int, seed: int = 0, labelled: bool = True) -> list[str]:
    """Random well-formed lines: missing values, negative and large numbers, short strings."""
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        label = [str(int(draw.random() < 0.25))] if labelled else []
        numbers = ["" if draw.random() < 0.2 else str(draw.choice([0, 3, -2, 70_000, 10**17, draw.randrange(5000)]))
                   for _ in range(NUM_DENSE)]
        strings = ["" if draw.random() < 0.1 else f"{draw.randrange(2**32):08x}"[:draw.choice([8, 8, 8, 3])]
                   for _ in range(NUM_SPARSE)]
        lines.append("\t".join(label + numbers + strings))
    return lines


def features(line: str, hash_bins: int) -> tuple[int, list[float], list[int]]:
    """(label, dense, sparse) of a labelled line, as the protocol words it."""
    label, *values = line.split("\t")
    dense = [math.log1p(max(int(v), 0)) if v else 0.0 for v in values[:NUM_DENSE]]
    sparse = []
    for field, string in enumerate(values[NUM_DENSE:]):
        state = 2166136261 ^ (42 + field)
        for character in string:
            state = ((state ^ ord(character)) * 16777619) % 2**32
        sparse.append(state % hash_bins if string else 0)
    return int(label), dense, sparse


def history(id_: int, past: list[tuple[int, int]]) -> tuple[float, float]:
    """The history features (rate, frequency) of an id that comes in these rows (id, label), worked out one by one."""
    count = sum(other == id_ for other, _ in past)
    clicks = sum(label for other, label in past if other == id_)
    mean = (sum(label for _, label in past) + 1) / (len(past) + 4)
    rate = (clicks + 10 * mean) / (count + 10)
    return math.log(rate / (1 - rate)) - math.log(mean / (1 - mean)), math.log10((count + 1) / (len(past) + 100))
