"""Predictions of a model on prepared rows, and how good they are; the report on the gold rows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ctr_models import CTRModel

from .data.artifacts import Artifacts
from .data.dataset import Part, Split, open_verified
from .interrupt import Interrupted
from .metrics import evaluate_logits, reliability

LABEL_ROWS = 65_536
Progress = Callable[[int], None]  # called with the number of rows done since the last call


@contextmanager
def scoring(model: CTRModel, device: torch.device | str, precision: str) -> Iterator[None]:
    """Within: `model` in eval mode (afterwards in the mode it had), no autograd, bf16 autocast if that is `precision`.

    "tf32" is a process-wide switch, which `machine.set_up_torch` sets.
    """
    was_training = model.training
    model.eval()
    try:
        with (
            torch.inference_mode(),
            torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=precision == "bf16"),
        ):
            yield
    finally:
        model.train(was_training)


def batch_logits(model: CTRModel, dense: np.ndarray, sparse: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """Logits [B] float32, on `device`, of dense float32 [B, num_dense] and sparse int32 [B, 26]."""
    # Copied first: the arrays are read-only views of a file, and torch has no read-only tensors.
    return model(*(torch.from_numpy(array.copy()).to(device) for array in (dense, sparse))).float()


def predict(
    model: CTRModel,
    split: Split | Part,
    *,
    batch_size: int,
    device: torch.device | str,
    precision: str,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
) -> np.ndarray:
    """Logits float32 [split.rows], in the order of the rows, by batches of `batch_size` rows.

    Args:
        model: on `device`; its training mode is left as it was.
        precision: "fp32", "tf32" or "bf16".
        progress: called with the number of rows of each batch once it is scored.
        stop: asked before each batch; Interrupted is raised once it says True.
    """
    logits = []  # kept on the device: fetching each batch would make the host wait for it
    with scoring(model, device, precision):
        for start in range(0, split.rows, batch_size):
            if stop is not None and stop():
                raise Interrupted
            rows = split.slice(start, start + batch_size)
            logits.append(batch_logits(model, rows.dense, rows.sparse, device))
            if progress is not None:
                progress(len(rows.label))
        return torch.cat(logits).cpu().numpy()


def evaluate(model: CTRModel, split: Split | Part, **options: Any) -> dict[str, Any]:
    """The metrics of `metrics.evaluate_logits` over all rows of a split; `options` as for `predict`.

    Raises UserError for NaN or infinite logits.
    """
    return evaluate_logits(predict(model, split, **options), labels_of(split))


def labels_of(split: Split | Part) -> np.ndarray:
    """All labels uint8 [rows] of a split; piece by piece, because a slice may copy the features beside them."""
    return np.concatenate([split.slice(start, start + LABEL_ROWS).label for start in range(0, split.rows, LABEL_ROWS)])


def split_report(model: CTRModel, data: Path | str, artifacts: Artifacts, name: str, *, rows: Split | None = None,
                 **options: Any) -> dict[str, Any]:
    """Metrics of a whole split, and which file they are of; `options` as for `predict`.

    Args:
        data: the prepared directory.
        artifacts: those of `data`.
        name: "train", "valid" or "gold".
        rows: the split, if it was opened and verified before.

    Returns: {"split", "file", "sha256", the metrics of `evaluate_logits`, "best_possible": {"logloss", "auc"} or None
    where it is not known, "reliability": the bins of `metrics.reliability`}.

    Raises UserError where the file is missing, or is not the one whose checksum the artifacts hold.
    """
    split = open_verified(data, name, artifacts) if rows is None else rows
    logits, labels = predict(model, split, **options), labels_of(split)
    return {
        "split": name,
        "file": split.path.name,
        "sha256": artifacts.outputs[name]["sha256"],
        **evaluate_logits(logits, labels),
        "best_possible": (artifacts.best_possible or {}).get(name),
        "reliability": reliability(logits, labels),
    }


def gold_report(model: CTRModel, data: Path | str, artifacts: Artifacts, **options: Any) -> dict[str, Any]:
    """`split_report` of the gold rows: what a run's gold.json holds."""
    return split_report(model, data, artifacts, "gold", **options)
