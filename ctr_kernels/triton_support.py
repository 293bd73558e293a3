"""What the Triton kernels share: precision of dots, dropout multipliers, and compilation without a GPU.

`python -m ctr_kernels.triton_support` prints the resources of every configuration for sm_80, sm_90 and sm_100.
"""

import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = (80, 90, 100)
KERNEL_MODULES = ("attention", "ffn", "sparse_update")


def input_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` treats fp32: "tf32x3" (fp32-accurate, three MMAs) at PyTorch's "highest", else "tf32".

    fp16 and bf16 have tensor cores of their own and ignore it.
    """
    exact = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return "tf32x3" if exact else "tf32"


def capability(device: torch.device) -> int:
    """Compute capability as in sm_90; 0 in the interpreter, which runs on the CPU."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@triton.jit
def dropout_multipliers(seed, rows, first_group, groups, threshold, inverse_keep, GROUPS: tl.constexpr):
    """Multipliers fp32 [R, 32 * GROUPS] of a dropout map: 0 where philox.py drops, else inverse_keep.

    seed: the 64-bit seed, loaded. rows: int64 [R], rows of the map. Columns begin at 32 * first_group; the map has
    `groups` groups of 32 columns. threshold: philox.threshold(p). A Philox call yields the columns c, c + 8, c + 16
    and c + 24 of a group, so a tile takes R * 8 * GROUPS calls. Counters are 64 bits wide.
    """
    counter = ((rows * groups + first_group) * 8)[:, None] + tl.arange(0, 8 * GROUPS)[None, :]  # [R, 8 GROUPS]
    w0, w1, w2, w3 = tl.randint4x(seed, counter)
    w0 = tl.where((w0 >> 1) >= threshold, inverse_keep, 0.0)
    w1 = tl.where((w1 >> 1) >= threshold, inverse_keep, 0.0)
    w2 = tl.where((w2 >> 1) >= threshold, inverse_keep, 0.0)
    w3 = tl.where((w3 >> 1) >= threshold, inverse_keep, 0.0)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [R, 8 GROUPS, 2, 2]: the last two count words 0 to 3
    words = tl.reshape(words, (rows.shape[0], GROUPS, 8, 4))
    return tl.reshape(tl.permute(words, (0, 1, 3, 2)), (rows.shape[0], GROUPS * 32))


class Spec(NamedTuple):
    """One configuration of a kernel, as a launcher would specialise it; `aot_specs()` of an operation lists them."""

    kernel: Any  # a @triton.jit function
    signature: dict[str, str]  # of all parameters but constexprs: "*fp32", "i32", "fp32", ...
    constexprs: dict[str, Any]
    num_warps: int
    name: str


class Compiled(NamedTuple):
    """What ptxas says of a compiled kernel: registers a thread, bytes spilled a thread, shared bytes a program."""

    registers: int
    spills: int
    shared: int
    ptx: str

    @property
    def tensor_core_instructions(self) -> int:
        """mma.sync, wgmma and tcgen05.mma in the PTX."""
        return len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", self.ptx))


def compile_ahead(spec: Spec, cc: int) -> Compiled:
    """Compile for sm_<cc> to a cubin, pointers taken to be 16-byte aligned; needs no GPU."""
    names = spec.kernel.arg_names
    signature = {name: spec.signature.get(name, "constexpr") for name in names}
    constexprs = {(names.index(name),): value for name, value in spec.constexprs.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(spec.kernel, signature, constexprs, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", cc, 32), options={"num_warps": spec.num_warps})
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([cuobjdump, "--dump-resource-usage", cubin], check=True, capture_output=True, text=True)
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout)}
    return Compiled(used["REG"], used["STACK"] + used["LOCAL"], compiled.metadata.shared, compiled.asm["ptx"])


def all_specs() -> Iterator[tuple[str, Spec]]:
    """(operation, configuration) of every kernel in the launch tables."""
    for operation in KERNEL_MODULES:
        module = importlib.import_module(f".{operation}.triton", __package__)
        for spec in module.aot_specs():
            yield operation, spec


if __name__ == "__main__":
    print("| kernel | sm | warps | registers | spilled bytes | shared bytes | tensor-core instructions |")
    print("|---|---|---|---|---|---|---|")
    for operation, spec in all_specs():
        for cc in CAPABILITIES:
            found = compile_ahead(spec, cc)
            print(f"| {operation}: {spec.name} | {cc} | {spec.num_warps} | {found.registers} | {found.spills} | "
                  f"{found.shared} | {found.tensor_core_instructions} |")
