"""Where a run computes: device, threads, precision, determinism and the backend of every operation."""

import os
import platform
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ctr_kernels import BackendUnavailable
from ctr_kernels.backend import resolve

from .errors import UserError

PRECISIONS = ("fp32", "tf32", "bf16")
EMBEDDING_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MANY_THREADS = 256  # or four for each CPU, where that is more
OPERATIONS = {"dcnv2": ("sparse_update",)}  # of a model; all three where it is not listed
ALL_OPERATIONS = ("field_attention", "ffn", "sparse_update")


def choose_device(name: str | None) -> torch.device:
    """The device of that name; None takes CUDA where there is a device. UserError for one that is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: choose cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: choose cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices that torch "
                        f"{torch.__version__} can use")
    return device


def set_up_torch(*, threads: int | None, precision: str, deterministic: bool) -> None:
    """Set torch's process-wide switches. UserError for more threads than a machine can be asked for."""
    if threads is not None:
        most = max(MANY_THREADS, 4 * (os.cpu_count() or 1))
        if threads > most:  # the system runs out of threads somewhere above, without a word
            raise UserError(f"--threads {threads}: this machine has {os.cpu_count()} CPUs; at most {most} threads are "
                            "supported here")
        torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)


def resolve_kernels(kernels: str, device: torch.device, model: str) -> dict[str, str]:
    """The backend of each operation of a model; UserError where the chosen one cannot run here."""
    try:
        return {name: resolve(kernels, device, name) for name in OPERATIONS.get(model, ALL_OPERATIONS)}
    except BackendUnavailable as error:
        raise UserError(f"--kernels {kernels}: {error}") from error


def versions() -> dict[str, Any]:
    """Versions of what decides a run's figures."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__,
            "pyarrow": pa.__version__, "platform": platform.platform(),
            "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None}
