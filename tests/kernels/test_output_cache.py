"""The cache of the native kernels' outputs."""

import concurrent.futures
import math
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from parity import nan_memory

from ctr_kernels import (
    EmbeddingTable,
    TransformerLayer,
    empty_output_cache,
    ffn,
    field_attention,
    low_rank_cross,
    output_cache_stats,
    set_output_cache,
)
from ctr_kernels.library import NATIVE_ABSENT

pytestmark = pytest.mark.skipif(NATIVE_ABSENT is not None, reason=str(NATIVE_ABSENT))

BATCH = 1024  # an output of 7 MB, in 8
MB = 1 << 20


def attention(batch: int = BATCH) -> torch.Tensor:
    x = torch.ones(27, 64).expand(batch, 27, 64)
    return field_attention(x, x, x, num_heads=4, kernels="native")


@pytest.fixture(autouse=True)
def bound():
    before = set_output_cache(256 * MB)
    empty_output_cache()
    yield
    set_output_cache(before)


def resident() -> int:
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("no /proc/self/statm here")
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def test_a_freed_output_is_used_again_without_page_faults() -> None:
    first = attention().data_ptr()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        assert attention().data_ptr() == first
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 200  # one output has 4 to 1,728


def test_outputs_that_live_never_share_memory() -> None:
    outputs = [attention() for _ in range(4)]
    view = outputs.pop()[5:7]  # keeps the memory of the whole
    outputs += [attention(), attention()]
    starts = sorted(x.data_ptr() for x in [*outputs, view])
    assert all(b - a >= 2 * 27 * 64 * 4 for a, b in zip(starts, starts[1:], strict=False))
    for i, x in enumerate(outputs):
        x.fill_(i)
    assert all((x == i).all() for i, x in enumerate(outputs)) and (view == 1).all()


def test_a_bound_of_zero_leaves_every_output_to_pytorch() -> None:
    set_output_cache(0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        attention()
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert BATCH * 27 * 64 * 4 in sizes


X = torch.ones(1024, 27, 64)  # 7 MB
LAYER, TABLE = TransformerLayer(64, 4, 256, kernels="native"), EmbeddingTable(100, 64, kernels="native")
CALLS = {
    "field_attention": attention,
    "ffn": lambda: ffn(X, LAYER.ffn_in.weight, LAYER.ffn_in.bias, LAYER.ffn_out.weight, LAYER.ffn_out.bias,
                       kernels="native"),
    "layer": lambda: LAYER(X),
    "low_rank_cross": lambda: low_rank_cross(*X.flatten(1)[None].expand(2, -1, -1), torch.ones(8, 1728),
                                             torch.ones(1728, 8), torch.ones(1728), kernels="native"),
    "lookup": lambda: TABLE(torch.ones(1024, 27, dtype=torch.int64)),
}


def filled(call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, set[int]]:
    """What a call returns, and the numbers of elements of the tensors that were filled meanwhile."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        out = call()
    return out, {math.prod(event.input_shapes[0]) for event in profile.events() if event.name == "aten::fill_"}


@pytest.mark.parametrize("name", CALLS)
def test_parity_tests_see_large_outputs_that_are_not_written(name: str) -> None:
    """An output comes filled with NaN, not from the cache with the right answer in it."""
    CALLS[name]()
    kept = output_cache_stats().kept
    with nan_memory():
        out, sizes = filled(CALLS[name])
    assert out.numel() in sizes and output_cache_stats().kept <= kept - out.nbytes  # it is of the cache


@pytest.mark.parametrize("fill", [False, True])
def test_outputs_are_filled_where_pytorch_fills_its_own(fill: bool) -> None:
    with nan_memory():
        attention()  # whose memory, and that of torch, was filled once
        torch.utils.deterministic.fill_uninitialized_memory = fill
        try:
            out, sizes = filled(attention)
        finally:
            torch.utils.deterministic.fill_uninitialized_memory = True
    assert (out == 1).all() and (out.numel() in sizes) == fill


def test_nothing_is_filled_after_the_deterministic_mode() -> None:
    """Small memory that was filled once, and freed, comes back as it was."""
    with nan_memory():
        for _ in range(100):
            torch.empty(8, dtype=torch.int64)
    for _ in range(10):
        out, sizes = filled(attention)
        assert out.numel() not in sizes


def test_what_is_beyond_the_bound_is_given_back() -> None:
    outputs = [attention() for _ in range(16)]
    outputs.clear()
    kept = resident()
    assert output_cache_stats() == (128 * MB, 0, 128 * MB)
    assert set_output_cache(17 * MB) == 256 * MB
    assert kept - resident() > 64 * MB and output_cache_stats().kept == 16 * MB  # in pages of 2 MB


def test_no_more_is_held_than_was_in_use_at_once() -> None:
    sizes = [1024, 300, 2048, 700, 1500, 2400, 900, 1200]
    for batch in sizes * 2:
        outputs = [attention(batch), attention(batch)]
        del outputs
        kept, in_use, most = output_cache_stats()
        assert in_use == 0 and kept <= most
    assert most == 2 * 16 * MB  # of two outputs of 2400 x 27 x 64 floats


def test_what_is_in_use_counts_against_what_is_kept() -> None:
    first = [attention(), attention(), attention()]
    del first[1:]
    larger = attention(3 * BATCH)  # 22 MB; 16 were kept
    assert output_cache_stats() == (0, 30 * MB, 30 * MB) and (larger == 1).all()
    del larger
    assert output_cache_stats() == (22 * MB, 8 * MB, 30 * MB) and (first[0] == 1).all()


def test_what_was_kept_longest_is_freed_first() -> None:
    outputs = [attention() for _ in range(5)]
    where = [x.data_ptr() for x in outputs]
    del outputs[3], outputs[1]  # with one in use between them; the fourth is freed first
    assert output_cache_stats().kept == 16 * MB
    set_output_cache(8 * MB)
    assert attention().data_ptr() == where[1]


def test_outputs_of_several_sizes_share_memory_without_page_faults() -> None:
    def step() -> None:
        for batch in (2400, 300, 1024, 700, 1500):
            attention(batch)

    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        step()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 200
    assert output_cache_stats() == (16 * MB, 0, 16 * MB)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_a_block_is_cut_and_grows_together_again(order: tuple[int, ...]) -> None:
    whole = attention(2400).data_ptr()  # 16 MB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        parts = [attention(batch) for batch in (300, BATCH, 700)]  # 2, 8 and 6 MB
        assert [x.data_ptr() - whole for x in parts] == [0, 2 * MB, 10 * MB]
        for i in order:
            parts[i] = torch.empty(0)
        attention(2400)
    # Memory that is mapped anew, often at the same address, has at least 8 faults each time.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 200
    assert output_cache_stats() == (16 * MB, 0, 16 * MB)


def test_memory_goes_back_on_request() -> None:
    outputs = [attention() for _ in range(16)]
    del outputs[1:]
    before = resident()
    empty_output_cache()
    assert before - resident() > 64 * MB and output_cache_stats() == (0, 8 * MB, 8 * MB) and (outputs[0] == 1).all()


def test_the_system_may_take_what_is_kept() -> None:
    modes = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not modes.exists() or "[never]" in modes.read_text() or not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("no huge pages, or no smaps, here")

    def offered() -> int:
        with open("/proc/self/smaps_rollup") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("LazyFree"))

    outputs, before = [attention() for _ in range(8)], offered()
    outputs.clear()
    assert offered() - before >= 48 * MB  # of 64
    again = [attention() for _ in range(8)]
    assert offered() - before < 16 * MB and all((x == 1).all() for x in again)


def test_an_output_can_be_made_smaller_and_not_larger() -> None:
    out = attention()
    assert (out.resize_(5, 27, 64) == 1).all()
    with pytest.raises(RuntimeError, match="^Trying to resize storage that is not resizable$"):
        out.resize_(2 * BATCH, 27, 64)


def test_outputs_taken_and_freed_by_many_threads() -> None:
    def work(number: int) -> bool:
        right = True
        for i in range(30):
            batch = 300 + 137 * ((7 * i + number) % 9)
            out = attention(batch)
            out.fill_(number)
            right &= bool((out == number).all())
        return right

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    kept, in_use, most = output_cache_stats()
    assert in_use == 0 and kept <= most <= 4 * 2 * 10 * MB


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_large_outputs_of_other_dtypes_have_room(dtype: torch.dtype) -> None:
    table = torch.arange(6400, dtype=dtype).view(100, 64) / 8
    ids = torch.arange(100).repeat(100)
    found = [torch.ops.ctr.embedding_lookup(table, ids, False) for _ in range(2)]
    assert all(torch.equal(x, table[ids]) for x in found)


def test_bad_bounds_are_named() -> None:
    with pytest.raises(ValueError, match="num_bytes=-1"):
        set_output_cache(-1)
    code = "import ctr_kernels; ctr_kernels.set_output_cache(0)"
    run = subprocess.run([sys.executable, "-c", code], env={**os.environ, "CTR_KERNELS_CACHE_MB": "lots"},
                         capture_output=True, text=True, timeout=120)
    assert run.returncode != 0 and "CTR_KERNELS_CACHE_MB=lots: a number of megabytes" in run.stderr
