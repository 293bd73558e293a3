"""Launch configurations of the Triton kernels compiled for sm_80, sm_90 and sm_100, and what ptxas says of them.

Those of the tuned shapes; with CTR_KERNELS_ALL_CONFIGURATIONS=1 all of docs/triton-resources.md, in twice the time.
"""

import os
from collections import Counter
from typing import NamedTuple

import pytest

pytest.importorskip("triton")
from triton_buffers import refilled  # noqa: E402

from ctr_kernels.triton_support import CAPABILITIES, KERNEL_MODULES, Compiled, Spec, compile_all  # noqa: E402

MEASURED_SPILLS, MEASURED_WARPS = 256, 4
ALL = os.environ.get("CTR_KERNELS_ALL_CONFIGURATIONS") == "1"


class Result(NamedTuple):
    operation: str
    spec: Spec
    cc: int
    compiled: Compiled

    def __repr__(self) -> str:
        return f"{self.operation}: {self.spec.name} for sm_{self.cc}"


@pytest.fixture(scope="module")
def results() -> list[Result]:
    return [Result(*result) for result in compile_all(tuned=not ALL)]


def test_every_operation_is_compiled_for_every_architecture(results: list[Result]) -> None:
    assert {(r.operation, r.cc) for r in results} == {(name, cc) for name in KERNEL_MODULES for cc in CAPABILITIES}
    assert len({(r.operation, r.spec.name, r.cc) for r in results}) == len(results)


def test_nothing_spills(results: list[Result]) -> None:
    """Of the tuned shapes; of others not more than they state; of what a GPU chose a little."""
    assert all(r.spec.spills == 0 for r in results if r.spec.tuned)
    assert {str(r): r.compiled.spills for r in results
            if r.compiled.spills > (MEASURED_SPILLS if r.spec.measured else r.spec.spills)} == {}


def test_the_stated_number_of_warps_is_resident(results: list[Result]) -> None:
    resident = [(r, r.compiled.resident_warps(r.spec.num_warps, r.cc)) for r in results]
    assert {str(r): warps for r, warps in resident
            if warps < (MEASURED_WARPS if r.spec.measured else r.spec.resident_warps)} == {}


def test_products_of_matrices_are_on_tensor_cores(results: list[Result]) -> None:
    assert {str(r) for r in results if r.spec.tensor_cores != (r.compiled.tensor_core_instructions > 0)} == set()


def test_memory_is_read_and_written_16_bytes_a_thread(results: list[Result]) -> None:
    """Attention at the tuned shapes, whose every access is a row of a head, has no other but the seed's, and one query
    stores its one row with fewer; all have some, where rows of an input of W columns are aligned."""
    for r in results:
        loads, stores, head_dim = r.compiled.accesses("ld"), r.compiled.accesses("st"), r.spec.constexprs.get("DH", 16)
        if r.operation == "attention" and r.spec.tuned:
            assert loads - Counter({8: 1}) == {16: loads[16]}, (r, loads)
            assert set(stores) == {16} or r.spec.constexprs["Q"] == 1, (r, stores)
        elif r.spec.constexprs.get("W", 16) % 16 == 0 and head_dim % 8 == 0 and "sum_kernel" not in r.spec.name:
            assert loads[16], (r, loads)


LOOP = """
    %x = ttg.local_alloc : () -> !ttg.memdesc<{buffers}x32x64xbf16, #shared, #smem, mutable>
    %last:2 = scf.for %i = %0 to %n step %1 iter_args(%sum = %zero, %token = %first) -> (tensor<64x64xf32, #mma>) {{
      %tile = ttg.memdesc_index %x[%slot] : !ttg.memdesc<1x32x64xbf16, #shared, #smem, mutable>
      %sum_2 = ttng.warp_group_dot %a, %tile, %sum {{isAsync = true}} : tensor<64x32xbf16> -> tensor<64x64xf32, #mma>
      {wait}
      %next = ttg.memdesc_index %x[%slot_2] : !ttg.memdesc<1x32x64xbf16, #shared, #smem, mutable>
      %copy = ttg.async_copy_global_to_local %pointers, %next mask %m : tensor<32x64x!tt.ptr<bf16>> -> <32x64xbf16>
      scf.yield %sum_2, %copy : tensor<64x64xf32, #mma>, !ttg.async.token
    }} loc(#loc1)
"""


@pytest.mark.parametrize(("buffers", "pendings", "found"), [(1, None, {"%x"}), (1, 1, {"%x"}), (1, 0, set()),
                                                            (2, None, {"%x"}), (2, 1, set()), (3, 1, set())])
def test_a_buffer_that_is_refilled_too_early_is_found(buffers: int, pendings: int | None, found: set[str]) -> None:
    wait = "" if pendings is None else f"%w = ttng.warp_group_dot_wait %sum_2 {{pendings = {pendings} : i32}}"
    assert refilled(LOOP.format(buffers=buffers, wait=wait)) == found


def test_no_buffer_is_refilled_while_a_product_may_read_it(results: list[Result]) -> None:
    assert sum("warp_group_dot" in r.compiled.ttgir for r in results) > 20
    assert {str(r): names for r in results if (names := refilled(r.compiled.ttgir))} == {}
