"""What the Triton kernels share: precision of dots, dropout multipliers, and compilation without a GPU.

`python -m ctr_kernels.triton_support` prints the resources of every configuration for sm_80, sm_90 and sm_100.
"""

import importlib
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = (80, 90, 100)
SHARED_BYTES = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}  # of a multiprocessor; CUDA programming guide, table 30
KERNEL_MODULES = ("attention", "cross", "ffn", "layer", "sparse_update", "tokenizer")
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # the interpreter has no inline assembly


@triton.jit
def _split(x):
    """fp32 x = (high + low) / scale in two fp16 tiles, with a power of two that brings the largest |x| to [2^14, 2^15):
    of the tile, or of each matrix of a 3-D one.

    high and low hold 22 bits of an element of 2^-17 times the largest or more, and 2^-39 of the largest below that. An
    infinite element, or a NaN, makes all products of the tile NaN. Returns high, low and 1 / scale.
    """
    if len(x.shape) == 3:
        largest = tl.max(tl.max(tl.abs(x), 2, keep_dims=True), 1, keep_dims=True).to(tl.int32, bitcast=True)
    else:
        largest = tl.max(tl.reshape(tl.abs(x), (x.numel,)), 0).to(tl.int32, bitcast=True)
    exponent = tl.maximum(largest >> 23, 15)  # biased; below it the scale would overflow
    scaled = x * ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    high = scaled.to(tl.float16)
    low = (scaled - high.to(tl.float32)).to(tl.float16)
    return high, low, ((exponent - 14) << 23).to(tl.float32, bitcast=True)


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """What `product` takes of a tile: worth having where a tile is a factor of several products."""
    if PRECISION == "fp16x3":
        return _split(x)
    else:  # noqa: RET505 (a branch of its own for the compiler: the two return other types)
        return x, x, 1.0


@triton.jit
def turned(x):
    """The transpose of an operand, which costs nothing."""
    return tl.trans(x[0]), tl.trans(x[1]), x[2]


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in fp32 of two operands, 2-D or 3-D; acc may be None. PRECISION: `triton_launch.input_precision`.

    "fp16x3": a_high b_high + a_low b_high + a_high b_low of `_split`, an error of about 2^-23 of each product at twice
    the rate of TF32, with operands that tensor cores take transposed, too. Tensor cores cut off what does not fit into
    their sums (Ootomo and Yokota 2022), so that only the products of one call are summed there, and acc outside.
    """
    if PRECISION == "fp16x3":
        total = tl.dot(a[1], b[0])
        total = tl.dot(a[0], b[1], total)
        total = tl.dot(a[0], b[0], total) * (a[2] * b[2])
        if acc is None:
            acc = total
        else:
            acc += total
    else:
        acc = tl.dot(a[0], b[0], acc, input_precision=PRECISION)
    return acc


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """`product` of two tiles, that is a b in fp32 plus acc, which may be None."""
    return product(operand(a, PRECISION), operand(b, PRECISION), acc, PRECISION)


@triton.jit
def philox(seed, counter):
    """The four uint32 words of each counter (int64) under the 64-bit seed, as `philox.philox` has them.

    Equal to `tl.randint4x(seed, counter)`, but one wide multiplication yields both halves of a product.
    """
    c0, c1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    c2, c3 = c0 * 0, c0 * 0
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        a, b = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (b >> 32).to(tl.uint32) ^ c1 ^ k0, b.to(tl.uint32)
        c2, c3 = (a >> 32).to(tl.uint32) ^ c3 ^ k1, a.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def dropout_keep(seed, rows, first_group, groups, threshold, GROUPS: tl.constexpr):
    """Keep-mask bool [R, 32 * GROUPS] of a dropout map, philox.py's bit for bit.

    seed: the 64-bit seed, loaded. rows: int64 [R], rows of the map. Columns begin at 32 * first_group; the map has
    `groups` groups of 32 columns. threshold: philox.threshold(p). A Philox call yields the columns c, c + 8, c + 16
    and c + 24 of a group, so a tile takes R * 8 * GROUPS calls: about 100 instructions for four elements. An MMA
    accumulator holds these four in one thread, so that no layout is changed. Counters are 64 bits wide.
    """
    counter = ((rows * groups + first_group) * 8)[:, None] + tl.arange(0, 8 * GROUPS)[None, :]  # [R, 8 GROUPS]
    w0, w1, w2, w3 = philox(seed, counter)
    keep = ((w0 >> 1) >= threshold).to(tl.int32)  # one bit a word, so that a change of layout, if any, moves little
    keep |= ((w1 >> 1) >= threshold).to(tl.int32) << 1
    keep |= ((w2 >> 1) >= threshold).to(tl.int32) << 2
    keep |= ((w3 >> 1) >= threshold).to(tl.int32) << 3
    keep = tl.reshape(keep, (rows.shape[0], GROUPS, 1, 8)) >> tl.arange(0, 4)[None, None, :, None]  # [R, GROUPS, 4, 8]
    return tl.reshape((keep & 1) != 0, (rows.shape[0], GROUPS * 32))


@triton.jit
def dropout_multipliers(seed, rows, first_group, groups, threshold, inverse_keep, GROUPS: tl.constexpr):
    """Multipliers fp32 [R, 32 * GROUPS] of a dropout map: inverse_keep where `dropout_keep` is true, else 0."""
    return tl.where(dropout_keep(seed, rows, first_group, groups, threshold, GROUPS), inverse_keep, 0.0)


@triton.jit
def exp2_flushed(x):
    """2^x, results below 2^-126 flushed to zero: one instruction, where `tl.exp2` takes four for their sake."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


class Spec(NamedTuple):
    """One configuration of a kernel, as a launcher would specialise it; `aot_specs()` of an operation lists them."""

    kernel: Any  # a @triton.jit function
    signature: dict[str, str]  # of all parameters but constexprs: "*fp32", "fp32", "i32", "i32:16" (a multiple of 16)
    constexprs: dict[str, Any]
    num_warps: int
    name: str
    capabilities: tuple[int, ...] = CAPABILITIES  # the architectures it is meant for
    tensor_cores: bool = False  # whether its products belong on tensor cores
    resident_warps: int = 8  # warps that a multiprocessor must hold at once, 64 at most
    max_registers: int | None = None  # of a thread, as the launch limits them
    spills: int = 0  # bytes that a thread may spill, where no launch configuration has none
    measured: bool = False  # a configuration that a GPU chose: what it spills and how few warps fit is known to pay
    tuned: bool = True  # a shape of the three models' recipes; the tests compile the others only when asked to


class Compiled(NamedTuple):
    """What ptxas and the PTX say of a kernel: registers and bytes spilled a thread, shared bytes a program."""

    registers: int
    spills: int
    shared: int
    tensor_memory: int  # columns of 512, on sm_100
    ptx: str
    ttgir: str  # Triton's own code before that

    @property
    def tensor_core_instructions(self) -> int:
        """mma.sync, wgmma and tcgen05.mma in the PTX."""
        return len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", self.ptx))

    def accesses(self, kind: str) -> Counter:
        """Loads or stores of global memory in the PTX: bytes a thread -> instructions; kind is "ld" or "st"."""
        found = Counter()
        for vector, bits in re.findall(rf"\b{kind}\.global[.\w:]*?(?:\.v(\d))?\.b(\d+)", self.ptx):
            found[int(vector or 1) * int(bits) // 8] += 1
        if kind == "ld":
            for size in re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?, (0x\w+|\d+)", self.ptx):
                found[int(size, 0)] += 1
        return found

    def resident_warps(self, num_warps: int, cc: int) -> int:
        """Warps of programs of num_warps that a multiprocessor of sm_<cc> holds at once."""
        registers = 65536 // (-(-self.registers // 8) * 8 * 32 * num_warps)
        shared = SHARED_BYTES[cc] // (self.shared + 1024)  # 1 KB a program is the system's
        columns = 512 // max(1, self.tensor_memory)
        return num_warps * min(registers, shared, columns, 64 // num_warps, 32)


def compile_ahead(spec: Spec, cc: int) -> Compiled:
    """Compile for sm_<cc> to a cubin, pointers taken to be 16-byte aligned; needs no GPU."""
    names = spec.kernel.arg_names
    types = [spec.signature.get(name, "constexpr") for name in names]
    constexprs = {(names.index(name),): value for name, value in spec.constexprs.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types) if re.search(r"^\*|:16$", kind)}
    signature = {name: kind.removesuffix(":16") for name, kind in zip(names, types, strict=True)}
    source = ASTSource(spec.kernel, signature, constexprs, aligned)
    options = {"num_warps": spec.num_warps, "maxnreg": spec.max_registers}
    compiled = triton.compile(source, target=GPUTarget("cuda", cc, 32), options=options)
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([cuobjdump, "--dump-resource-usage", cubin], check=True, capture_output=True, text=True)
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout)}
    tensor_memory = getattr(compiled.metadata, "tmem_size", 0)
    return Compiled(used["REG"], used["STACK"] + used["LOCAL"], compiled.metadata.shared, tensor_memory,
                    compiled.asm["ptx"], compiled.asm["ttgir"])


def all_specs() -> Iterator[tuple[str, Spec]]:
    """(operation, configuration) of every kernel in the launch tables."""
    for operation in KERNEL_MODULES:
        module = importlib.import_module(f".{operation}.triton", __package__)
        for spec in module.aot_specs():
            yield operation, spec


def _compile_one(position: int, cc: int) -> Compiled:
    """The position-th of all_specs(): a kernel itself cannot be sent to another process."""
    return compile_ahead(list(all_specs())[position][1], cc)


def compile_all(tuned: bool = False) -> Iterator[tuple[str, Spec, int, Compiled]]:
    """(operation, configuration, compute capability, result) of all or all tuned ones, in a process for each CPU."""
    specs = list(all_specs())
    jobs = [(i, cc) for i, (_, spec) in enumerate(specs) if spec.tuned or not tuned for cc in spec.capabilities]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for (i, cc), compiled in zip(jobs, pool.map(_compile_one, *zip(*jobs, strict=True)), strict=True):
            yield *specs[i], cc, compiled


def _counts(accesses: Counter) -> str:
    return " ".join(f"{number}x{size}" for size, number in sorted(accesses.items(), reverse=True))


def print_table() -> None:
    """The markdown table of docs/triton-resources.md."""
    print(f"""# Resources of the Triton kernels

Made by `python -m ctr_kernels.triton_support > docs/triton-resources.md` with triton {triton.__version__}, whose ptxas
compiles for architectures that are not there; no GPU was used. tests/kernels/test_triton_resources.py compiles those
of the tuned shapes, or all, and holds them to: no spills (of shapes that are not tuned, not more than the kernel
states), the resident warps that the kernel states, tensor-core instructions where it multiplies matrices. What a GPU
chose (ctr_kernels/triton_tuned.py) may spill 256 bytes and fill a multiprocessor with 4 warps.

Registers and spilled bytes are a thread's, shared bytes a program's; resident warps are what a multiprocessor holds
(64 at most). Tensor: mma.sync, wgmma and tcgen05.mma instructions in the PTX. Loads and stores: instructions x bytes a
thread; 16 is the widest. Loads include asynchronous copies to shared memory.

| kernel | sm | warps | registers | spilled | shared | resident | tensor | loads | stores |
|---|---|---|---|---|---|---|---|---|---|""")
    for operation, spec, cc, found in compile_all():
        print(f"| {operation}: {spec.name} | {cc} | {spec.num_warps} | {found.registers} | {found.spills} | "
              f"{found.shared} | {found.resident_warps(spec.num_warps, cc)} | {found.tensor_core_instructions} | "
              f"{_counts(found.accesses('ld'))} | {_counts(found.accesses('st'))} |")


if __name__ == "__main__":
    from ctr_kernels.triton_support import print_table as run  # not this module's twin called __main__

    run()
