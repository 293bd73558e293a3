"""The training step as one CUDA graph: recorded once, then launched whole for every batch.

A step launches some hundred kernels, each short beside the host's time to launch it. A graph needs one launch, but
it knows addresses only, and constants as they were when it was recorded. So a batch is copied into the buffers of the
first one; learning rates are read from device memory, where those of the schedule are written before each step; and
dropout draws its seeds from torch's generator, whose position each launch moves on. Nothing in a step may wait for
the device: the losses stay there until they are read, many at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch

from .errors import UserError

if TYPE_CHECKING:
    from .data.loader import Batch

Step = Callable[["Batch"], torch.Tensor]  # trains on a batch; its loss [], without a graph of autograd
WARM_UPS = 3  # steps run before the recording: they compile kernels and make the optimizers' states


class Recorder(Protocol):
    """Runs a function where it can be recorded, and records it."""

    def warm_up(self, function: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run `function` as the recording will, and return its result."""

    def record(self, function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Record `function` without running it; a call of what is returned does what was recorded."""


class CudaRecorder:
    """`Recorder` of CUDA graphs, on a stream of its own.

    The capture minds the calls of its own thread alone ("thread_local"): the loader's thread pins memory meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def warm_up(self, function: Callable[[], torch.Tensor]) -> torch.Tensor:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = function()
        current.wait_stream(self._stream)
        return result

    def record(self, function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.cuda.graph(graph, stream=self._stream,
                                                               capture_error_mode="thread_local"):
            result = function()

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay


class DeviceRates:
    """The learning rate of every parameter group in a tensor [] on the device."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], device: torch.device) -> None:
        self._optimizers = optimizers
        # The fused AdamW of CUDA reads float32 only. On a CPU float64 gives the bits that a Python number gives.
        dtype = torch.float32 if device.type == "cuda" else torch.float64
        self._tensors = [torch.zeros((), dtype=dtype, device=device) for _ in self._groups()]
        self._values: list[float | None] = [None] * len(self._tensors)

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def update(self) -> None:
        """Write the rates that the schedulers have set; only those that changed."""
        for i, (tensor, group) in enumerate(zip(self._tensors, self._groups(), strict=True)):
            if group["lr"] != self._values[i]:
                tensor.fill_(group["lr"])
                self._values[i] = group["lr"]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within: the optimizers take the tensors; schedulers and checkpoints never see them."""
        groups = self._groups()
        rates = [group["lr"] for group in groups]
        try:
            for group, tensor in zip(groups, self._tensors, strict=True):
                group["lr"] = tensor
            yield
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate


class GraphedStep:
    """`step`, from the fourth call on as a recording of it; every call trains on its batch.

    Args:
        step: may read the host's state only where that never changes.
        optimizers: those that `step` calls. Their parameters and states must keep their memory from the first call on.
        recorder: `CudaRecorder`, but in tests.
        before_recording: called once, before `step` is recorded.
    """

    def __init__(self, step: Step, optimizers: Sequence[torch.optim.Optimizer], recorder: Recorder,
                 before_recording: Callable[[], None]) -> None:
        self._step, self._optimizers, self._recorder = step, optimizers, recorder
        self._before_recording = before_recording
        self._calls = 0
        self._buffers: Batch | None = None
        self._replay: Callable[[], torch.Tensor] | None = None

    def __call__(self, batch: "Batch") -> torch.Tensor:
        """Train on `batch`; its loss, a new tensor [] on the device.

        Raises ValueError for a batch of other shapes than the first one's, UserError for a step that cannot be
        recorded.
        """
        self._fill(batch)
        self._rates.update()
        self._calls += 1
        if self._calls <= WARM_UPS:
            with self._rates.in_use():
                return self._recorder.warm_up(self._run).clone()
        if self._replay is None:
            self._replay = self._record()
        return self._replay().clone()

    def _fill(self, batch: "Batch") -> None:
        """Copy the batch to where the graph reads it."""
        if self._buffers is None:
            self._buffers = type(batch)(*(torch.empty_like(x) for x in batch))
            self._rates = DeviceRates(self._optimizers, batch.dense.device)
        for buffer, values in zip(self._buffers, batch, strict=True):
            if buffer.shape != values.shape or buffer.dtype != values.dtype:
                raise ValueError(f"a batch of {values.dtype} {tuple(values.shape)} after one of {buffer.dtype} "
                                 f"{tuple(buffer.shape)}: a recorded step takes batches of one shape")
            buffer.copy_(values, non_blocking=True)

    def _run(self) -> torch.Tensor:
        assert self._buffers is not None
        return self._step(self._buffers)

    def _record(self) -> Callable[[], torch.Tensor]:
        self._before_recording()
        try:
            with self._rates.in_use():
                return self._recorder.record(self._run)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"the training step cannot be recorded as a CUDA graph ({reason}); use --no-cuda-graph") \
                from error


def choose_cuda_graph(asked: bool | None, device: torch.device, backends: Mapping[str, str]) -> bool:
    """Whether steps run as a CUDA graph; None: wherever they can, on CUDA with Triton kernels.

    Args:
        backends: operation -> backend that runs it.

    Raises UserError where a graph is asked for and cannot be had.
    """
    others = sorted({backend for backend in backends.values() if backend != "triton"})
    if device.type != "cuda":
        reason = f"the device is {device}, and CUDA graphs need an NVIDIA GPU; choose --device cuda"
    elif others:
        reason = f"--kernels {others[0]} waits for the device within a step; choose --kernels triton"
    else:
        return asked is not False
    if asked:
        raise UserError(f"--cuda-graph: {reason}")
    return False
