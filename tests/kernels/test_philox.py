"""The dropout mask: Philox's published vectors, the specification in plain Python, and every drawer bit for bit."""

import pytest
import torch

from ctr_kernels.philox import dropout_mask, dropout_mask_torch, philox, threshold


def slow_philox(key: int, counter: int) -> list[int]:
    """Philox 4x32-10 on Python integers."""
    c = [counter & 0xFFFFFFFF, counter >> 32, 0, 0]
    k = [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_the_published_vector() -> None:
    """Random123's known answer for counter 0, key 0."""
    assert slow_philox(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("key", [0, 1, 2**63 - 1, 0x1234_5678_9ABC_DEF0])
def test_philox_of_torch(key: int) -> None:
    counters = [0, 1, 2**32 - 1, 2**32, 2**40 + 12345]
    found = philox(torch.tensor([key]), torch.tensor(counters))
    assert found.tolist() == [slow_philox(key, counter) for counter in counters]


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 27), (9, 64), (3, 33), (2000, 31), (0, 8)])
@pytest.mark.parametrize("seed", [3, -5])
def test_the_mask_follows_the_specification(rows: int, width: int, seed: int) -> None:
    drawn = dropout_mask_torch(rows, width, 0.3, torch.tensor([seed]))
    assert torch.equal(dropout_mask(rows, width, 0.3, torch.tensor([seed])), drawn)
    groups = -(-width // 32)
    for row in range(0, rows, max(1, rows // 7)):
        for column in range(width):
            counter = (row * groups + column // 32) * 8 + column % 8
            word = slow_philox(seed % 2**64, counter)[column % 32 // 8]
            assert bool(drawn[row, column]) == ((word >> 1) >= threshold(0.3))


def test_the_rate() -> None:
    kept = dropout_mask(4000, 64, 0.3, torch.tensor([11])).float()
    assert kept.mean().item() == pytest.approx(0.7, abs=0.005)
    assert kept.mean(dim=0).min() > 0.65  # no column is favoured


def test_torch_compile_takes_the_mask_into_its_graph() -> None:
    """What is compared with torch.compile is not broken into pieces at each dropout."""
    explained = torch._dynamo.explain(lambda seed: dropout_mask(6, 26, 0.3, seed).float() * 2.0)(torch.tensor([1]))
    assert explained.graph_break_count == 0, explained.break_reasons
