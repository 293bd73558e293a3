"""Checkpoints: everything a run needs to go on bit for bit, in one file that is either whole or not there."""

import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ctr_models import MODELS, CTRModel

from .data.artifacts import Artifacts
from .errors import UserError
from .files import atomic_path
from .machine import EMBEDDING_DTYPES

FORMAT = "ctr-kernels checkpoint"
VERSION = 6
CONTENT: dict[str, Any] = {
    "model": dict, "optimizers": list, "schedulers": list, "loader": dict, "step": int, "config": dict,
    "artifacts": dict, "best": (dict, type(None)), "average": dict, "calibration": dict, "rng": dict, "log": dict,
}
# Constructor arguments of the models that a run's config holds under the same name; the others keep their defaults.
MODEL_ARGUMENTS = ("variant", "dropout", "embedding_dropout", "tables", "numeric")
UNCALIBRATED = {"scale": 1.0, "shift": 0.0}  # scored logits are scale * logit + shift


def save_checkpoint(
    path: Path | str,
    *,
    model: CTRModel,
    optimizers: Sequence[torch.optim.Optimizer],
    schedulers: Sequence[torch.optim.lr_scheduler.LRScheduler],
    loader_state: dict[str, int],
    step: int,
    config: dict[str, Any],
    artifacts: Artifacts,
    best: dict[str, Any] | None,
    average: dict[str, torch.Tensor],
    log: dict[str, Any],
) -> None:
    """Write the state after `step` steps, and that of torch's random generators, atomically.

    Args:
        config: the run's settings; config["model"] names the model. Numbers, strings, lists and dicts only.
        artifacts: those of the data the model is trained on.
        best: {"step", "logloss", "latest", ...} of the best evaluation so far; None without one.
        log: {"chain": of the last line of metrics.jsonl, "losses": of the steps after it}.
        average: the weights that scoring takes in place of the model's, by name; {} without `ema`.

    Raises UserError where the file cannot be written (an earlier file of that name stays as it is).
    """
    content = {
        "format": FORMAT,
        "version": VERSION,
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "schedulers": [scheduler.state_dict() for scheduler in schedulers],
        "loader": loader_state,
        "step": step,
        "config": config,
        "artifacts": artifacts.to_dict(),
        "best": best,
        "average": average,
        "log": log,
        "calibration": UNCALIBRATED,
        "rng": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if _cuda_in_use() else []},
    }
    write_checkpoint(path, content)


def write_checkpoint(path: Path | str, content: dict[str, Any]) -> None:
    """Write what `load_checkpoint` read, or something in its form, atomically; raises as `save_checkpoint`."""
    with atomic_path(path) as temporary, open(temporary, "wb") as handle:
        try:
            torch.save(content, handle)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch covers a full disk with an error of its own
                raise error.__context__ from None
            raise


def load_checkpoint(path: Path | str, model_name: str | None = None) -> dict[str, Any]:
    """The content of a checkpoint, tensors on the CPU: the keys that `save_checkpoint` writes.

    The checksums that the file holds are verified first, 1 to 2 GB/s. Nothing but tensors and plain values is
    unpickled, so that a file from elsewhere cannot run code.

    Raises UserError for a file that is missing, damaged or no checkpoint, and for another model than `model_name`.
    """
    try:
        with open(path, "rb") as file:
            archive = zipfile.ZipFile(file)
            if (wrong := archive.testzip()) is not None:  # torch.load does not look at them
                raise zipfile.BadZipFile(f"the checksum of its part {wrong} is wrong")
            # No checksum covers an entry of the directory; torch reads nothing where its attributes say "directory".
            for part in archive.infolist():
                if part.external_attr or part.compress_type != zipfile.ZIP_STORED:
                    raise zipfile.BadZipFile(f"the entry of its part {part.filename} is damaged")
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Exception as error:  # a damaged or foreign file surfaces as almost any type
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if isinstance(error, pickle.UnpicklingError):
            reason = "it holds more than tensors and plain values"
        raise UserError(f"{path} is no checkpoint or a damaged one ({reason})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is a PyTorch file, but no checkpoint of ctr-train")
    if content.get("version") != VERSION:
        raise UserError(f"{path} has checkpoint version {content.get('version')}; this program reads version {VERSION}")
    for key, kind in CONTENT.items():
        if key not in content or not isinstance(content[key], kind):
            found = type(content[key]).__name__ if key in content else "missing"
            raise UserError(f"{path} is damaged: its {key!r} is {found}")
    found = content["config"].get("model")
    if model_name is not None and found != model_name:
        raise UserError(f"{path} is a checkpoint of the model {found!r}, not of {model_name!r}")
    return content


def kept_path(run: Path | str, name: str | None = None) -> Path:
    """The checkpoint `name` ("best" or "last") of a run directory; by default best.pt, or last.pt without evaluations.

    Raises UserError where `run` holds none.
    """
    run = Path(run)
    if not run.is_dir():
        raise UserError(f"{run} is no run: {'it is a file' if run.exists() else 'there is no such directory'}")
    for candidate in ("best", "last") if name is None else (name,):
        if (run / f"{candidate}.pt").exists():
            return run / f"{candidate}.pt"
    raise UserError(f"{run} holds no {'best.pt or last.pt' if name is None else name + '.pt'}: "
                    f"{'it has not saved that yet' if (run / 'config.json').exists() else 'it is no run of ctr-train'}")


def load_kept(run: Path | str, name: str | None = None) -> tuple[Path, dict[str, Any]]:
    """(path, content) of the checkpoint of `kept_path`; UserError, too, where it only stands in for a lost one."""
    path = kept_path(run, name)
    content = load_checkpoint(path)
    if name is None and path.name == "last.pt" and content["best"] is not None:
        raise _lost(path.parent, content, "; ctr-eval --checkpoint last takes those of its last step")
    return path, content


def newest_checkpoint(run: Path, model_name: str) -> tuple[str, dict[str, Any]] | None:
    """(name, state) that a run goes on from: last.pt, or best.pt if that has more steps; None where there is neither.

    Raises UserError for a damaged one, and for a best.pt that is lost though the run has evaluated.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in ("last.pt", "best.pt"):
        if (run / name).exists():
            try:
                found[name] = load_checkpoint(run / name, model_name)
            except UserError as error:
                whole = name == "last.pt" and (run / "best.pt").exists()
                raise UserError(f"{error}" + "; without it the run goes on from best.pt" * whole) from error
    if not found:
        return None
    name = max(found, key=lambda name: found[name]["step"])
    if found[name]["best"] is not None and "best.pt" not in found:
        raise _lost(run, found[name], ": begin anew with another --out")
    return name, found[name]


def _lost(run: Path, content: dict[str, Any], remedy: str) -> UserError:
    """For a best.pt that is not there, though another checkpoint of the run says that it was."""
    return UserError(f"{run / 'best.pt'} is missing, though the run has evaluated and kept the weights of step "
                     f"{content['best']['step']:,}{remedy}")


def scored_weights(content: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The model's state before calibration: with averaged weights where the run keeps an average."""
    return {**content["model"], **content["average"]}


def load_scored(model: CTRModel, content: dict[str, Any]) -> None:
    """Give `model` the weights for predictions, the checkpoint's calibration included."""
    model.load_state_dict(scored_weights(content))
    model.scale_logits(content["calibration"]["scale"])
    model.shift_logits(content["calibration"]["shift"])


def restore_rng(content: dict[str, Any]) -> None:
    """Set torch's generators to a checkpoint's; those of CUDA devices only where their number is the same."""
    torch.set_rng_state(content["rng"]["cpu"])
    if _cuda_in_use() and len(content["rng"]["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(content["rng"]["cuda"])


def build_model(config: dict[str, Any], artifacts: Artifacts, kernels: str) -> CTRModel:
    """The model that a run's config describes, newly initialised, on the CPU.

    Args:
        config: "model", MODEL_ARGUMENTS and "embedding_dtype"; "pooling" for "ft", "shortcut" for "ft" and "autoint".
        artifacts: of the data: rows of the table, numeric features with their bins, and history.
        kernels: "auto", "eager", "native" or "triton".

    Raises UserError for an unknown model or arguments that do not go together.
    """
    name = config["model"]
    if name not in MODELS:
        raise UserError(f"model {name!r}: choose one of {', '.join(MODELS)}")
    for key in (*MODEL_ARGUMENTS, "embedding_dtype", "pooling", "shortcut"):
        if key not in config:
            raise UserError(f"the settings of the model {name!r} have no {key!r}: they are of another version")
    if config["tables"] == "per-field" and artifacts.min_count > 1:
        raise UserError("--tables per-field: in these data, prepared with --min-count, each field has rows of its own "
                        "already; leave the option out")
    arguments = {key: config[key] for key in MODEL_ARGUMENTS}
    if name == "ft":
        arguments["pooling"] = config["pooling"]
    if name != "dcnv2":
        arguments["shortcut"] = config["shortcut"]
    try:
        model = MODELS[name](num_embeddings=artifacts.table_rows, num_dense=artifacts.num_numeric,
                             numeric_edges=artifacts.numeric_edges, history=artifacts.num_statistics,
                             history_moments=artifacts.history_moments or None, kernels=kernels, **arguments)
    except ValueError as error:
        raise UserError(f"model {name!r} cannot be built: {error}") from error
    if config["embedding_dtype"] != "fp32":
        model.store_embeddings_as(EMBEDDING_DTYPES[config["embedding_dtype"]])
    return model


def _cuda_in_use() -> bool:
    """Whether this process has begun to use CUDA; asking for its generators would otherwise start it."""
    return torch.cuda.is_available() and torch.cuda.is_initialized()
