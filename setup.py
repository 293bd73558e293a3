"""Build the native CPU kernels; everything declarative lives in pyproject.toml.

The extension is built against PyTorch's stable ABI, so one binary serves every Python >= 3.10 and
torch >= 2.11. Without torch or a C++ compiler the package still installs, with the eager and Triton
backends; the reason is printed and kept for `ctr_kernels.backends()`.
"""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
ABSENT = Path("ctr_kernels") / "_native_absent.txt"

# Sources whose name ends so are compiled for that instruction set; the others for any CPU of the
# architecture. The choice between them is made when the library is loaded, never at build time.
ISA_FLAGS = {
    "_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c",
                    "-mprefer-vector-width=512"],
}
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")


def report_absent(directory: Path, reason: str) -> None:
    """Say plainly that the native kernels are absent, and leave the reason where backends() reads it."""
    print(f"ctr-kernels: building without the native CPU kernels: {reason}", file=sys.stderr)
    path = directory / ABSENT
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(reason + "\n")


def native_build():
    """(ext_modules, cmdclass) of the native extension, or empty ones where it cannot be built."""
    (ROOT / ABSENT).unlink(missing_ok=True)
    if os.environ.get("CTR_KERNELS_NO_NATIVE") == "1":
        report_absent(ROOT, "it was built with CTR_KERNELS_NO_NATIVE=1")
        return [], {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        report_absent(ROOT, f"torch could not be imported when ctr-kernels was built ({error}); "
                            "install torch first, then `pip install --no-build-isolation ctr-kernels`")
        return [], {}

    class Build(BuildExtension):
        """BuildExtension that adds instruction-set flags by file name, compiles in parallel, and survives no compiler.

        MAX_JOBS: how many compilers run at once; all cores by default.
        """

        def build_extensions(self):
            compile_one, link = self.compiler._compile, self.compiler.link_shared_object
            jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
            compiled = []

            def compile_with_isa(obj, src, ext, cc_args, extra_postargs, pp_opts):
                flags = next((f for end, f in ISA_FLAGS.items() if src.endswith(end)), [])
                compiled.append(pool.submit(compile_one, obj, src, ext, cc_args, [*extra_postargs, *flags], pp_opts))

            def link_what_is_compiled(*args, **options):
                for one in compiled:
                    one.result()
                link(*args, **options)

            self.compiler._compile, self.compiler.link_shared_object = compile_with_isa, link_what_is_compiled
            with ThreadPoolExecutor(jobs) as pool:
                super().build_extensions()

        def run(self):
            try:
                super().run()
            except Exception as error:  # a missing compiler surfaces as many types
                self.give_up(error)

        def build_extension(self, ext):
            try:
                super().build_extension(ext)
            except Exception as error:
                self.give_up(error)
                raise  # the extension is optional: setuptools goes on without it

        def give_up(self, error):
            last_line = (str(error).strip() or repr(error)).splitlines()[-1]
            report_absent(ROOT if self.editable_mode or self.inplace else Path(self.build_lib),
                          f"the C++ build failed: {last_line}")

    sanitize = os.environ.get("CTR_KERNELS_SANITIZE", "")
    # -O1: at -O3 the checks of unrolled tiles take GCC more than half an hour.
    sanitizer_flags = [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer", "-g1", "-O1"] if sanitize else []
    # The kernels of an instruction set take longest, and come first.
    paths = sorted((ROOT / "csrc").glob("*.cpp"), key=lambda path: (not path.name.startswith("isa_"), path.name))
    sources = [str(path.relative_to(ROOT)) for path in paths]
    if not IS_X86:
        sources = [s for s in sources if not s.endswith(tuple(ISA_FLAGS))]
    extension = CppExtension(
        "ctr_kernels._native",
        sources,
        depends=[*sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.h")), "ctr_kernels/operators.inc"],
        define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000")],
        extra_compile_args=["-O3", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=fast",
                            "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-psabi",
                            "-Wno-unused-parameter", "-g0",
                            *sanitizer_flags],
        extra_link_args=sanitizer_flags,
        py_limited_api=True,
        optional=True,
    )
    return [extension], {"build_ext": Build.with_options(no_python_abi_suffix=True, use_ninja=False)}


ext_modules, cmdclass = native_build()
options = {"bdist_wheel": {"py_limited_api": "cp310"}} if ext_modules else {}
setup(ext_modules=ext_modules, cmdclass=cmdclass, options=options)
