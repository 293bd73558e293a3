"""Offsets into tensors of more than 2^31 elements do not overflow, in any Triton kernel: seen in the interpreter."""

import numpy as np
import pytest
import torch
from triton_interpreter import interpreted, outside, run_in_the_interpreter

pytest.importorskip("triton")
from ctr_kernels.triton_support import Spec, all_specs  # noqa: E402

LARGE = 3 << 30  # elements: negative where it wraps at 32 bits


@outside
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__, 40)


def kernels() -> dict[str, Spec]:
    """One fp32 configuration of each kernel. Not of the sparse updates, whose programs follow ids, nor of the sums of
    parts, whose loop is as long as their number."""
    found = {}
    for operation, spec in all_specs():
        left_out = operation == "sparse_update" or spec.kernel.__name__ == "sum_kernel"
        if not left_out and 80 in spec.capabilities and "*bf16" not in spec.signature.values():
            norm = "-norm" if "-norm" in spec.name else ""
            found.setdefault(f"{operation} {spec.kernel.__name__}{norm}", spec)
    return found


@interpreted
@pytest.mark.parametrize("width", [64, 192])
@pytest.mark.parametrize("name", kernels())
def test_the_program_of_a_distant_tile_stays_in_its_tensors(name: str, width: int,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """A program whose rows of `width` elements lie LARGE elements away: all addresses are at or behind the bases."""
    from triton.runtime import interpreter

    builder, spec = interpreter.interpreter_builder, kernels()[name]
    tile = next(spec.constexprs[key] for key in ("BM", "ROWS", "PAIRS") if key in spec.constexprs)
    row = 27 * 64 / 4 if "PAIRS" in spec.constexprs else 28 * 64 if "ROWS" in spec.constexprs else (
        spec.constexprs.get("W", 64))
    program = int(LARGE * 64 / width / (tile * row))
    if "weight_kernel" in name:  # its programs are shared among slices of the outputs
        outputs = next(spec.constexprs[key] for key in ("HIDDEN", "N", "W") if key in spec.constexprs)
        program *= -(-outputs // spec.constexprs.get("BH", spec.constexprs.get("BN")))
    programs = [program]
    if "TOKENS" in spec.constexprs:  # so are those of slices of tokens, those of the fields first
        fields, features, one, cls, tokens = (spec.constexprs[key] for key in ("K", "N", "ONE", "CLS", "TOKENS"))
        head = cls + (1 if one and "forward" in name else features)
        slices = -(-fields // tokens) - (-head // tokens)
        programs = [program * slices, program * slices + slices - 1]
    addresses = []

    def load(pointers, mask, other, *_):
        dtype = pointers.get_element_ty()
        addresses.append(pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)])
        kind = interpreter._get_np_dtype(dtype)
        ids = np.dtype(kind).kind == "i" and "ids" in spec.signature
        return interpreter.TensorHandle(np.full(pointers.data.shape, LARGE // 64 if ids else 1, kind), dtype)

    def store(pointers, value, mask, *_):
        addresses.append(pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)])

    def constant(value: int):
        return lambda axis: interpreter.TensorHandle(np.array([value], np.int32), interpreter.tl.int32)

    monkeypatch.setattr(builder, "create_masked_load", load)
    monkeypatch.setattr(builder, "create_masked_store", store)
    monkeypatch.setattr(builder, "create_get_num_programs", constant(2**31 - 1))  # one turn of a persistent loop
    storage = torch.zeros(64 * len(spec.signature), dtype=torch.int64)
    arguments = {}
    for i, (parameter, kind) in enumerate(spec.signature.items()):
        dtypes = {"*fp32": torch.float32, "*i64": torch.int64, "*i32": torch.int32}
        if kind in dtypes:
            arguments[parameter] = storage[64 * i:64 * (i + 1)].view(dtypes[kind])
        elif "stride" in parameter:
            arguments[parameter] = 3 * 64 * (27 if parameter.endswith("_b") else 1)
        else:
            arguments[parameter] = 0.5 if kind == "fp32" else 2**31 - 2**16
    for program in programs:
        monkeypatch.setattr(builder, "create_get_program_id", constant(program))
        addresses.clear()
        spec.kernel[(1,)](**arguments, **spec.constexprs)
        touched = np.concatenate([a.ravel() for a in addresses]).astype(np.int64)
        assert touched.min() >= storage.data_ptr()
        assert width > 64 or touched.max() >= storage.data_ptr() + 4 * 2**31
