"""The planted teacher: true click probabilities with main effects and interactions of two and three fields.

A value of an active field carries a latent code of two signs, as if it belonged to one of four groups. The signs
have main effects, so that embeddings of values of a group come to lie together; their products across fields make
the interactions, which no sum over fields can express. Values beyond a field's most frequent ones have no effect, for
nobody could learn it.

From day to day the effects of values on their own drift, as tastes do, while codes and interactions, the structure of
the world, stay. An effect is a mean of the field, which stays too, and a deviation, an autoregressive process of order
one: e_d = KEPT e_(d-1) + sqrt(1 - KEPT^2) noise, the noise as large as effects on day 1. So effects of all days are
alike, and those of near days nearly the same. A value that replaces another (`synth_features.replaced`) has an effect
of its own, with nothing of its predecessor's. The deviations of a field have mean 0 over the rows of each day, so that
the click rate follows the bias, which wanders likewise.
The teacher of a day never changes, so that data of several seeds are samples of one world on the same days.
"""

import numpy as np

from .synth_features import CATEGORIES, WORLD, rank_distribution, replaced

BIAS = -2.654  # gives the label rate 0.256
BIAS_DEVIATION = 0.1  # standard deviation of the bias over days
KEPT = 0.95  # what is left after a day of an effect's and the bias's deviation
HEAD = 100  # a field's most frequent values, which have effects

# What the signs of a field's values weigh in the logit on their own: (first sign, second sign).
MAIN = {
    "C1": (.2, .1), "C2": (.3, .2), "C5": (.2, .1), "C6": (.3, .2), "C8": (.2, .1), "C9": (.2, .1), "C14": (.3, .2),
    "C17": (.3, .2), "C18": (.2, .1), "C20": (.3, .2), "C22": (.2, .1), "C23": (.3, .2), "C25": (.3, .2),
}
# Standard deviation of an effect of each value of its own, of fields without interactions.
OWN = dict.fromkeys(("C3", "C4", "C7", "C10", "C11", "C12", "C13", "C15", "C16", "C19", "C21", "C24", "C26"), .15)
# Numbers: an effect of log1p(max(x, 0)), missing as 0; and the first value of the upper half, whose sign is positive.
SLOPE = {"I1": .15, "I3": .06, "I4": -.08, "I6": -.1, "I7": .1, "I8": .05, "I11": .2, "I13": -.08}
UPPER = {"I6": 20, "I11": 2}
# Products of first signs, and products of three second signs; numbers have one sign.
PAIRS = {
    ("C6", "C14"): .6, ("C17", "C23"): .6, ("C14", "C17"): .6, ("C20", "C6"): .6, ("C25", "C23"): .4, ("I6", "C14"): .5,
    ("I11", "C23"): .5,
}
TRIPLES = {("C6", "C17", "C14"): .5, ("C14", "C23", "C20"): .4}


class Teacher:
    """`logits(values, missing)` of columns as `synth_features.draw_features` gives them.

    Args:
        day: whose effects; 0 and 1 are the beginning. A day's are the same however many days follow.
    """

    def __init__(self, day: int = 0) -> None:
        generator = np.random.default_rng(WORLD)
        self._codes = {name: _balanced_codes(name, generator) for name in MAIN}  # [2, HEAD + 2] of -1, 0, 1
        self._main = {name: (np.array(MAIN[name]) @ codes).astype(np.float32) for name, codes in self._codes.items()}
        for name, deviation in OWN.items():
            self._main[name] = np.append(generator.normal(0, deviation, HEAD + 1), 0.0).astype(np.float32)
        self.bias = BIAS
        if day > 1:
            self._drift(day)

    def _drift(self, day: int) -> None:
        """From the effects and the bias of day 1 to those of `day`."""
        shares = {name: _row_shares(name) for name in self._main}
        shares = {name: share / share.sum() for name, share in shares.items()}  # of the rows that have an effect
        scale = {name: float(np.hypot(*weights)) for name, weights in MAIN.items()} | OWN
        means, deviations = {}, {}
        for name, effects in self._main.items():
            known = effects[:-1].astype(np.float64)
            means[name] = known @ shares[name]
            deviations[name] = known - means[name]
        for past in range(2, day + 1):
            generator = np.random.default_rng([WORLD, 1, past])
            self.bias += (KEPT - 1) * (self.bias - BIAS) + (1 - KEPT**2)**0.5 * generator.normal(0, BIAS_DEVIATION)
            new = replaced(past)
            for name in self._main:
                kept = np.full(HEAD + 1, KEPT)
                if name in new:
                    kept[1:][new[name][:HEAD]] = 0.0
                noise = generator.normal(0, scale[name], HEAD + 1)
                moved = kept * deviations[name] + np.sqrt(1 - kept**2) * noise
                deviations[name] = moved - moved @ shares[name]
        for name, effects in self._main.items():
            effects[:-1] = means[name] + deviations[name]

    def logits(self, values: dict[str, np.ndarray], missing: dict[str, np.ndarray]) -> np.ndarray:
        """True logits float32 [rows]."""
        rows = len(values["I1"])
        index, signs = {}, {}
        for name in self._main:
            place = np.minimum(values[name] + 1, HEAD + 1)  # 0: missing, 1..HEAD: frequent values, HEAD + 1: others
            if name in missing:
                place[missing[name]] = 0
            index[name] = place
        for name, codes in self._codes.items():
            signs[name] = codes[0][index[name]], codes[1][index[name]]
        logits = np.full(rows, self.bias, dtype=np.float32)
        for name, effect in self._main.items():
            logits += effect[index[name]]
        for name, slope in SLOPE.items():
            logits += np.float32(slope) * np.log1p(_number(values, missing, name).astype(np.float32))
        for name, first in UPPER.items():
            sign = np.where(_number(values, missing, name) >= first, np.float32(1), np.float32(-1))
            signs[name] = sign, sign
        for (a, b), weight in PAIRS.items():
            logits += np.float32(weight) * signs[a][0] * signs[b][0]
        for (a, b, c), weight in TRIPLES.items():
            logits += np.float32(weight) * signs[a][1] * signs[b][1] * signs[c][1]
        return logits


def _number(values: dict[str, np.ndarray], missing: dict[str, np.ndarray], name: str) -> np.ndarray:
    """max(x, 0), missing as 0: what a model sees after the transform."""
    number = np.maximum(values[name], 0)
    if name in missing:
        number[missing[name]] = 0
    return number


def _row_shares(name: str) -> np.ndarray:
    """Of a field's entries float64 [HEAD + 1]: missing, the HEAD most frequent values."""
    missing_rate, cardinality, _ = CATEGORIES[name]
    ranks = np.arange(min(HEAD, cardinality))
    share = np.zeros(HEAD + 1)
    share[0], share[1:len(ranks) + 1] = missing_rate, (1 - missing_rate) * rank_distribution(name).share(ranks)
    return share


def _balanced_codes(name: str, generator: np.random.Generator) -> np.ndarray:
    """Signs float32 [2, HEAD + 2] of a field's entries: missing, the HEAD most frequent values, all others (0).

    Of many random draws that whose two signs have the least mean and correlation over rows: an unbalanced sign is
    mostly a constant, its products mostly main effects.
    """
    share = _row_shares(name)
    draws = generator.choice([-1.0, 1.0], size=(1000, 2, HEAD + 1))
    imbalance = np.abs(draws @ share).sum(axis=1) + np.abs((draws[:, 0] * draws[:, 1]) @ share)
    best = draws[imbalance.argmin()]
    return np.concatenate([best, np.zeros((2, 1))], axis=1).astype(np.float32)
