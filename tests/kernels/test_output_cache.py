"""The cache of the native kernels' outputs."""

import os
import resource
import subprocess
import sys

import pytest
import torch
from parity import nan_memory

from ctr_kernels import EmbeddingTable, TransformerLayer, ffn, field_attention, low_rank_cross, set_output_cache
from ctr_kernels.library import NATIVE_ABSENT

pytestmark = pytest.mark.skipif(NATIVE_ABSENT is not None, reason=str(NATIVE_ABSENT))

BATCH = 1024  # an output of 7 MB


def attention(batch: int = BATCH) -> torch.Tensor:
    x = torch.ones(27, 64).expand(batch, 27, 64)
    return field_attention(x, x, x, num_heads=4, kernels="native")


@pytest.fixture(autouse=True)
def bound():
    before = set_output_cache(256 << 20)
    yield
    set_output_cache(before)


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


@pytest.mark.parametrize("name", CALLS)
def test_parity_tests_see_large_outputs_that_are_not_written(name: str) -> None:
    """The memory that an operation writes to comes filled with NaN, not from the cache with the right answer in it."""
    before = CALLS[name]().data_ptr()
    with nan_memory(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                              profile_memory=True) as profile:
        assert torch.empty(X.shape).isnan().all()
        out = CALLS[name]()
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert sizes.count(X.nbytes) >= 2 and out.data_ptr() != before


def test_what_is_beyond_the_bound_is_given_back() -> None:
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    if not os.path.exists("/proc/self/statm"):
        pytest.skip("no /proc/self/statm here")
    outputs = [attention() for _ in range(16)]
    outputs.clear()
    kept = resident()
    assert set_output_cache(16 << 20) == 256 << 20
    assert kept - resident() > 64 << 20  # of 16 x 8 MB


def test_a_smaller_output_does_not_take_a_much_larger_block() -> None:
    large = attention().data_ptr()
    assert attention(BATCH // 2).data_ptr() != large


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
