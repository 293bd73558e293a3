"""Features like Criteo's: each column's missing rate, cardinality and heavy-tailed frequencies, drawn at random.

The figures below are aggregates measured on a 0.3% sample (82,000 rows) of the Criteo Display Advertising Challenge
training file; cardinalities of the categorical fields are those of the whole file. Columns that are always missing
together in it are so here as well; apart from that columns are independent of each other.

Frequencies are the same on every day, but from day 2 on some of the frequent values of fields with many values give
way to new ones, as ads and users come and go: `replaced` says which, `identities` what stands in their place.
"""

import numpy as np

from .protocol import DENSE_NAMES, SPARSE_NAMES

# name: (missing rate, least value, greatest value, share of the values below 1, 2, 3, 5, ... of NUMBER_EDGES)
NUMBER_EDGES = (1, 2, 3, 5, 10, 30, 100, 300, 1_000, 3_000, 10_000, 100_000)
NUMBERS: dict[str, tuple[float, int, int, tuple[float, ...]]] = {
    "I1": (.4544, 0, 330, (.4217, .6011, .6974, .8001, .907, .9833, .9988)),
    "I2": (0, -2, 9814, (.2737, .428, .485, .537, .6085, .7283, .8522, .9268, .9711, .9957)),
    "I3": (.2099, 0, 38443, (.0042, .1653, .272, .4182, .6113, .8484, .968, .9939, .9989, .9995, .9998)),
    "I4": (.2122, 0, 349, (.0548, .2179, .3472, .523, .7458, .9656, .9999)),
    "I5": (.0268, 0, 1693509, (.0188, .0423, .0574, .0693, .0926, .1388, .1899, .2442, .3193, .5213, .7454, .9634)),
    "I6": (.2241, 0, 111105, (.0651, .0998, .1301, .1808, .2729, .4801, .743, .9079, .9832, .998, .9998)),
    "I7": (.0424, 0, 3870, (.2284, .3647, .4551, .5704, .7201, .8871, .9715, .9941, .9995, .9999)),
    "I8": (.0005, 0, 1689, (.1144, .1966, .2674, .379, .5649, .8656, .9997, .9999)),
    "I9": (.0424, 0, 9465, (.0326, .0724, .1044, .1541, .2429, .4449, .7332, .9165, .9904, .9994)),
    "I10": (.4544, 0, 7, (.4712, .9218, .9859, .9993)),
    "I11": (.0424, 0, 115, (.2399, .5913, .7342, .8565, .9438, .9931)),
    "I12": (.7693, 0, 161, (.7497, .9046, .9365, .9591, .9782, .9948, .9998)),
    "I13": (.2122, 0, 1574, (.0635, .2229, .3478, .5175, .7308, .9517, .9985, .9999)),
}
# name: (missing rate, cardinality, share of the 1, 2, 3, ... of RANKS most frequent values)
RANKS = (1, 2, 3, 4, 5, 6, 10, 30, 100, 300, 1_000)
CATEGORIES: dict[str, tuple[float, int, tuple[float, ...]]] = {
    "C1": (0, 1_459, (.5022, .6687, .7523, .8025, .8356, .8582, .9104, .969, .9912, .998)),
    "C2": (0, 582, (.1138, .1595, .2015, .2403, .2758, .309, .4137, .6387, .8678, .9843)),
    "C3": (.0358, 10_131_226, (.0258, .0368, .0478, .0576, .0666, .075, .1048, .1802, .2703, .362, .4523)),
    "C4": (.0358, 2_202_607, (.0368, .0608, .0829, .1031, .1226, .1374, .1729, .2675, .3871, .5044, .6267)),
    "C5": (0, 304, (.6732, .8295, .8916, .9251, .9433, .9561, .9785, .9961, .9997)),
    "C6": (.1293, 23, (.4571, .7075, .9092, .9456, .9785, .9995, .9999)),
    "C7": (0, 12_516, (.0199, .0336, .043, .0513, .0589, .066, .0917, .1677, .2894, .4503, .6778)),
    "C8": (0, 632, (.5963, .7612, .836, .8766, .902, .9204, .9561, .9884, .9979)),
    "C9": (0, 3, (.8982, .9998)),
    "C10": (0, 93_144, (.2177, .2325, .2397, .2455, .2511, .2562, .2738, .3299, .4246, .549, .7153)),
    "C11": (0, 5_682, (.0299, .0518, .071, .0846, .0964, .1059, .1407, .2496, .4051, .5958, .8333)),
    "C12": (.0358, 8_351_592, (.0258, .0498, .0608, .0717, .0816, .0906, .1215, .2018, .3001, .3958, .489)),
    "C13": (0, 3_193, (.0299, .0544, .0748, .0899, .1036, .1167, .1581, .2792, .4489, .6523, .8836)),
    "C14": (0, 26, (.3534, .6935, .8455, .8907, .9199, .9441, .9834)),
    "C15": (0, 14_991, (.0159, .0271, .0365, .0455, .0543, .0628, .095, .2139, .412, .6295, .8523)),
    "C16": (.0358, 5_461_305, (.0258, .0498, .0608, .0717, .0816, .0908, .1235, .2183, .3344, .4422, .5467)),
    "C17": (0, 10, (.4602, .5939, .7095, .7926, .8448, .8886)),
    "C18": (0, 5_651, (.0337, .0623, .0892, .1138, .1345, .1543, .2203, .3787, .6073, .8192, .9613)),
    "C19": (.4366, 2_172, (.6196, .6543, .6686, .6829, .6931, .7031, .7291, .7927, .8746, .9437, .9962)),
    "C20": (.4366, 3, (.3445, .6752)),
    "C21": (.0358, 7_046_546, (.0258, .0498, .0608, .0717, .0816, .0907, .1232, .2108, .3157, .4176, .5138)),
    "C22": (.765, 17, (.5592, .9265, .959, .9806, .9971, .9987, .9999)),
    "C23": (0, 14, (.4359, .6387, .7583, .8296, .8866, .9407, .9943)),
    "C24": (.0358, 286_180, (.0537, .1038, .1503, .1952, .2186, .2414, .305, .4341, .5606, .6725, .7941)),
    "C25": (.4366, 104, (.2655, .4582, .5998, .674, .7313, .7856, .9319, .9976)),
    "C26": (.4366, 142_571, (.0717, .1052, .1339, .1624, .1867, .2055, .2575, .3539, .4871, .6172, .7645)),
}
MISSING_TOGETHER = (("I1", "I10"), ("I4", "I13"), ("I7", "I9", "I11"), ("C3", "C4", "C12", "C16", "C21", "C24"),
                    ("C19", "C20", "C25", "C26"))
# Of a field of more than FREQUENT values, each of the FREQUENT most frequent ones is replaced on a day with this
# probability, unless it has more than the LASTING share of the field's rows: that is a default, no ad and no user.
FREQUENT, REPLACED, LASTING = 1_000, 0.05, 0.05
CHANGING = tuple(name for name in SPARSE_NAMES if CATEGORIES[name][1] > FREQUENT)
LAST_DAY = 10_000
WORLD = 20140624  # seed of all that belongs to the world and not to a sample of it
_FIRST_NEW = 1 << 24  # numbers of new values: above every cardinality
_FIRST_OF_GROUP = {name: group[0] for group in MISSING_TOGETHER for name in group}


class HeavyTail:
    """A distribution of integers given by its cumulative shares at a few edges, its density ~ 1 / x between them.

    Args:
        least: the least integer.
        edges: increasing integers above it.
        below: share of the values below each edge; the share below the last edge is 1.
    """

    def __init__(self, least: int, edges: tuple[int, ...], below: tuple[float, ...]) -> None:
        self.least, self.last = least, edges[-1] - 1
        self._log_edges = np.log(np.array([least, *edges], dtype=np.float64) - least + 1)
        self._below = np.array([0.0, *below])

    def at(self, uniform: np.ndarray) -> np.ndarray:
        """The integers int64 at uniform draws of [0, 1), by inversion of the cumulative distribution."""
        position = np.interp(uniform, self._below, self._log_edges)
        np.exp(position, out=position)
        return np.clip(position.astype(np.int64) + (self.least - 1), self.least, self.last)

    def share(self, values: np.ndarray) -> np.ndarray:
        """Probability of each integer."""
        below, above = (np.interp(np.log(values + offset - self.least + 1.0), self._log_edges, self._below)
                        for offset in (0, 1))
        return above - below


def number_distribution(name: str) -> HeavyTail:
    """Of the values of I1..I13 that are not missing."""
    _, least, greatest, below = NUMBERS[name]
    return HeavyTail(least, (*NUMBER_EDGES[:len(below)], greatest + 1), (*below, 1.0))


def rank_distribution(name: str) -> HeavyTail:
    """Of the ranks (from 0, by frequency) of the values of C1..C26 that are not missing."""
    _, cardinality, most_frequent = CATEGORIES[name]
    return HeavyTail(0, (*RANKS[:len(most_frequent)], cardinality), (*most_frequent, 1.0))


_NUMBER = {name: number_distribution(name) for name in DENSE_NAMES}
_RANK = {name: rank_distribution(name) for name in SPARSE_NAMES}


def draw_features(generator: np.random.Generator, rows: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Columns of `rows` rows: ({name: values int64 [rows]}, {name: missing bool [rows]}).

    Values are those of I1..I13 and the ranks of C1..C26; those of missing entries mean nothing. Columns that are
    never missing are absent from the second dictionary.
    """
    values = {name: _NUMBER[name].at(generator.random(rows)) for name in DENSE_NAMES}
    values |= {name: _RANK[name].at(generator.random(rows)) for name in SPARSE_NAMES}
    missing: dict[str, np.ndarray] = {}
    for name, (rate, *_) in (NUMBERS | CATEGORIES).items():
        first = _FIRST_OF_GROUP.get(name, name)
        if rate:
            missing[name] = missing[first] if first in missing else generator.random(rows) < rate
    return values, missing


def replaced(day: int) -> dict[str, np.ndarray]:
    """{name: bool [FREQUENT]} of the fields CHANGING: the ranks whose values appear on that day (2 or later)."""
    generator = np.random.default_rng([WORLD, 0, day])
    return {name: (generator.random(FREQUENT) < REPLACED) & _MAY_CHANGE[name] for name in CHANGING}


def identities(day: int) -> dict[str, np.ndarray]:
    """{name: int64 [FREQUENT]} of the fields CHANGING: which value has each frequent rank on that day.

    It is the rank itself on days 0 and 1 and for as long as the value of the beginning stays, then a number that no
    other value of the field ever has. Ranks beyond FREQUENT always stand for themselves.

    Raises ValueError: day below 0 or above LAST_DAY.
    """
    if not 0 <= day <= LAST_DAY:
        raise ValueError(f"day {day:,} is not between 0 and {LAST_DAY:,}")
    ranks = np.arange(FREQUENT)
    values = {name: ranks.copy() for name in CHANGING}
    for past in range(2, day + 1):
        for name, new in replaced(past).items():
            values[name][new] = (_FIRST_NEW + past * FREQUENT + ranks)[new]
    return values


_MAY_CHANGE = {name: _RANK[name].share(np.arange(FREQUENT)) <= LASTING for name in CHANGING}
