"""The features' distributions and the planted teacher: effects, interactions, drift, and what a sum cannot express."""

import itertools

import numpy as np
import pytest
from scipy.sparse import csr_matrix, hstack
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import OneHotEncoder

from ctr_train.data.protocol import DENSE_NAMES, SPARSE_NAMES
from ctr_train.data.synth_features import (
    CATEGORIES,
    HeavyTail,
    draw_features,
    identities,
    number_distribution,
    rank_distribution,
)
from ctr_train.data.teacher import BIAS, HEAD, KEPT, MAIN, OWN, PAIRS, TRIPLES, UPPER, Teacher
from ctr_train.metrics import logloss

TEACHER = Teacher()


def neutral(rows: int) -> dict[str, np.ndarray]:
    """Columns without any effect: rare values of every field, and numbers 0."""
    return {name: np.zeros(rows, dtype=np.int64) for name in DENSE_NAMES} | {
        name: np.full(rows, HEAD, dtype=np.int64) for name in SPARSE_NAMES}


def opposite(name: str, sign: int) -> tuple[int, int]:
    """Two values of a field whose first (0) or second (1) signs differ."""
    if name in UPPER:
        return 0, UPPER[name]
    ranks = np.arange(min(HEAD, CATEGORIES[name][1]))
    values = neutral(len(ranks))
    values[name] = ranks
    first, second = MAIN[name]
    effects = TEACHER.logits(values, {}) - TEACHER.logits(neutral(1), {})  # +-first +-second
    signs = np.sign(effects) if sign == 0 else np.sign(effects - np.sign(effects) * first)  # first > second
    return int(np.flatnonzero(signs > 0)[0]), int(np.flatnonzero(signs < 0)[0])


def mixed_difference(fields: tuple[str, ...], sign: int, teacher: Teacher = TEACHER) -> float:
    """Sum over all corners of (product of their +-) x logit: what no sum of functions of fewer fields has."""
    choices = [opposite(name, sign) for name in fields]
    corners = list(itertools.product((0, 1), repeat=len(fields)))
    values = neutral(len(corners))
    for i, name in enumerate(fields):
        values[name] = np.array([choices[i][corner[i]] for corner in corners])
    logits = teacher.logits(values, {}).astype(np.float64)
    return float(sum((-1) ** sum(corner) * logit for corner, logit in zip(corners, logits, strict=True)))


@pytest.mark.parametrize("fields", PAIRS)
def test_pairs_interact(fields: tuple[str, str]) -> None:
    assert abs(mixed_difference(fields, 0)) == pytest.approx(4 * PAIRS[fields], rel=1e-3)


@pytest.mark.parametrize("fields", TRIPLES)
def test_triples_interact(fields: tuple[str, str, str]) -> None:
    assert abs(mixed_difference(fields, 1)) == pytest.approx(8 * TRIPLES[fields], rel=1e-3)


def test_rare_values_have_no_effect_and_missing_ones_have_their_own() -> None:
    rare = neutral(2)
    rare["C6"][1] = CATEGORIES["C3"][1] - 1
    rare["C3"][1] = CATEGORIES["C3"][1] - 1
    logits = TEACHER.logits(rare, {})
    assert logits[0] == logits[1]
    assert logits[0] == pytest.approx(BIAS)
    for name in ("C6", "C3"):
        logits = TEACHER.logits(neutral(2), {name: np.array([False, True])})
        assert logits[0] != logits[1]


def test_missing_numbers_count_as_zero() -> None:
    values = neutral(3)
    for name in DENSE_NAMES:
        values[name] = np.array([0, 1_000, -2])
    logits = TEACHER.logits(values, {name: np.array([False, True, False]) for name in DENSE_NAMES})
    assert logits[0] == logits[1] == logits[2]


def test_teacher_and_columns_are_not_changed_by_use() -> None:
    values, missing = draw_features(np.random.default_rng(0), 1_000)
    copies = {name: column.copy() for name, column in values.items()}
    logits = TEACHER.logits(values, missing)
    assert all((values[name] == copies[name]).all() for name in values)
    assert (Teacher().logits(values, missing) == logits).all()


def test_no_additive_model_comes_near_the_truth() -> None:
    generator = np.random.default_rng(1)
    values, missing = draw_features(generator, 40_000)
    logits = TEACHER.logits(values, missing)
    labels = (generator.random(len(logits)) < 1 / (1 + np.exp(-logits.astype(np.float64)))).astype(np.uint8)
    absent = np.zeros(len(labels), dtype=bool)
    ranks = np.stack([np.where(missing.get(name, absent), -1, np.minimum(values[name], HEAD))
                      for name in SPARSE_NAMES], axis=1)
    numbers = np.stack([np.log1p(np.where(missing.get(name, absent), 0, np.maximum(values[name], 0)))
                        for name in DENSE_NAMES], axis=1)
    features = hstack([OneHotEncoder().fit_transform(ranks), csr_matrix(numbers)]).tocsr()
    model = LogisticRegression(max_iter=500, tol=1e-3).fit(features, labels)
    # On its own training rows, which flatters it.
    assert logloss(model.decision_function(features), labels) > logloss(logits, labels) + 0.05


@pytest.fixture(scope="module")
def teachers() -> dict[int, Teacher]:
    return {day: Teacher(day) for day in (0, 1, 2, 3, 5, 9, 17)}


def effects(teacher: Teacher) -> np.ndarray:
    """Of the frequent values of all fields, [fields, HEAD], less their field's mean; NaN beyond a field's values."""
    found = np.full((len(SPARSE_NAMES), HEAD), np.nan)
    for row, name in zip(found, SPARSE_NAMES, strict=True):
        values = neutral(min(HEAD, CATEGORIES[name][1]))
        values[name] = np.arange(len(values[name]))
        row[:len(values[name])] = teacher.logits(values, {}) - teacher.logits(neutral(1), {})
    return found - np.nanmean(found, axis=1, keepdims=True)


def test_the_first_day_is_the_beginning(teachers: dict[int, Teacher]) -> None:
    values, missing = draw_features(np.random.default_rng(2), 1_000)
    for day in (0, 1):
        assert (teachers[day].logits(values, missing) == TEACHER.logits(values, missing)).all()
    later = teachers[3].logits(values, missing)
    assert (Teacher(3).logits(values, missing) == later).all() and (later != TEACHER.logits(values, missing)).all()


def test_effects_drift_with_the_distance_in_days(teachers: dict[int, Teacher]) -> None:
    day_of, first = {day: effects(teacher) for day, teacher in teachers.items()}, effects(TEACHER)
    correlations = []
    for day in (2, 3, 5, 9, 17):
        same = np.isfinite(first)
        for row, name in zip(same, SPARSE_NAMES, strict=True):
            row &= identities(day).get(name, np.arange(HEAD))[:HEAD] == np.arange(HEAD)
        correlations.append(float(np.corrcoef(first[same], day_of[day][same])[0, 1]))
        assert correlations[-1] == pytest.approx(KEPT**(day - 1), abs=0.03)
        new = np.isfinite(first) & ~same
        if new.sum() > 100:
            assert abs(np.corrcoef(first[new], day_of[day][new])[0, 1]) < 0.2  # nothing of the predecessors'
        for group in (MAIN, OWN):  # and not larger or smaller
            rows = [SPARSE_NAMES.index(name) for name in group]
            assert np.nanstd(day_of[day][rows]) == pytest.approx(np.nanstd(first[rows]), rel=0.1)
    assert correlations == sorted(correlations, reverse=True)
    shown = [float(np.corrcoef(day_of[9][np.isfinite(first)], day_of[day][np.isfinite(first)])[0, 1])
             for day in (9, 5, 3, 1)]
    assert shown == sorted(shown, reverse=True)  # from any day, not only from the first


def test_logits_of_the_same_rows_drift(teachers: dict[int, Teacher]) -> None:
    values, missing = draw_features(np.random.default_rng(3), 20_000)
    logits = [teachers[day].logits(values, missing) for day in (1, 2, 3, 5, 9, 17)]
    correlations = [float(np.corrcoef(logits[0], later)[0, 1]) for later in logits]
    assert correlations == sorted(correlations, reverse=True)
    assert correlations[1] > 0.97 and correlations[-1] < 0.9


def test_interactions_stay(teachers: dict[int, Teacher]) -> None:
    for sign, products in enumerate((PAIRS, TRIPLES)):
        for fields in products:
            before, now = (mixed_difference(fields, sign, teacher) for teacher in (TEACHER, teachers[17]))
            assert now == pytest.approx(before, rel=1e-3), fields


def test_the_click_rate_follows_the_bias_which_moves_a_little(teachers: dict[int, Teacher]) -> None:
    values, missing = draw_features(np.random.default_rng(4), 50_000)
    first = TEACHER.logits(values, missing)
    biases = {day: teacher.bias for day, teacher in teachers.items()}
    assert biases[0] == biases[1] == BIAS and len(set(biases.values())) == len(biases) - 1
    for teacher in teachers.values():
        assert teacher.logits(neutral(1), {})[0] == pytest.approx(teacher.bias)
        assert abs(teacher.bias - BIAS) < 0.3
        moved = teacher.logits(values, missing) - first
        assert moved.mean() == pytest.approx(teacher.bias - BIAS, abs=0.01)
    assert abs(biases[3] - biases[2]) < 0.1


def test_after_years_the_world_is_as_wide_as_at_the_beginning() -> None:
    late = Teacher(1_500)
    assert 0 < abs(late.bias - BIAS) < 0.3
    assert np.nanstd(effects(late)) == pytest.approx(np.nanstd(effects(TEACHER)), rel=0.15)


def test_stale_effects_cost_a_little_logloss(teachers: dict[int, Teacher]) -> None:
    values, missing = draw_features(np.random.default_rng(5), 100_000)
    logits = {day: teachers[day].logits(values, missing).astype(np.float64) for day in (1, 2, 3)}
    probability = 1 / (1 + np.exp(-logits[3]))
    expected = {day: float((np.logaddexp(0, logit) - probability * logit).mean()) for day, logit in logits.items()}
    assert 0.005 < expected[1] - expected[3] < 0.02
    assert 0.002 < expected[2] - expected[3] < 0.7 * (expected[1] - expected[3])


@pytest.mark.parametrize("distribution", [rank_distribution("C3"), rank_distribution("C20"), number_distribution("I2"),
                                          number_distribution("I5")], ids=["C3", "C20", "I2", "I5"])
def test_shares_are_those_of_the_draws(distribution: HeavyTail) -> None:
    values = distribution.at((np.arange(400_000) + 0.5) / 400_000)
    assert values.min() >= distribution.least and values.max() <= distribution.last
    first = np.arange(distribution.least, min(distribution.last, distribution.least + 50) + 1)
    drawn = (values[:, None] == first).mean(axis=0)
    np.testing.assert_allclose(distribution.share(first), drawn, atol=1e-5)
    every = np.arange(distribution.least, min(distribution.last, 2_000_000) + 1)
    if every[-1] == distribution.last:
        assert distribution.share(every).sum() == pytest.approx(1.0)


def test_the_ends_of_a_distribution_are_reached() -> None:
    distribution = HeavyTail(-2, (0, 1, 10), (0.5, 0.5, 1.0))
    assert distribution.at(np.array([0.0, 0.499, 0.5, 1 - 1e-16])).tolist() == [-2, -1, 1, 9]
