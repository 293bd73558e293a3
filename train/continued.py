"""Going on with a trained model on later rows: the daily job of a click model (`ctr-train --from RUN`).

Weights, ids, bins and moments of features, counts of values and the optimizers' states are the run's. Values that have
come often enough by now get rows of their own at the end of the table. Learning rates begin a new, shorter schedule.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ctr_models import CTRModel

from .checkpoint import kept_path, load_kept, scored_weights
from .data.artifacts import Artifacts
from .data.base import Base
from .errors import UserError
from .recipes import HYPERPARAMETERS

# What the shapes of weights and optimizer states depend on, and what a feature means: they stay the run's.
FIXED = ("variant", "tables", "numeric", "pooling", "shortcut", "embedding_optimizer", "embedding_dtype")
EPOCHS = 1  # over the later rows, unless asked otherwise


@dataclass(frozen=True)
class Continued:
    """A finished run that another one goes on with.

    Attributes:
        run: its directory.
        config: its settings.
        base: its data, for preparing the rows that follow.
    """

    run: Path
    config: dict[str, Any]
    base: Base

    @classmethod
    def load(cls, run: Path) -> "Continued":
        """UserError where the directory holds no finished run."""
        kept_path(run)  # says what is no run
        if not (run / "gold.json").exists():
            raise UserError(f"{run} holds a run that has not finished: ctr-train --resume --out {run}")
        _, content = load_kept(run)
        return cls(run, content["config"], Base.load(run))

    def hyperparameters(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the run, one pass, and overrides that are not None; UserError for one that cannot change."""
        given = {name: value for name, value in overrides.items() if value is not None}
        for name in FIXED:
            if name in given and given[name] != self.config[name]:
                raise UserError(f"--{name.replace('_', '-')} {given[name]}: the run in {self.run} has "
                                f"{self.config[name]}, and its weights fit nothing else")
        return {**{name: self.config[name] for name in HYPERPARAMETERS}, "epochs": EPOCHS, **given}

    def check_data(self, data: Path, artifacts: Artifacts) -> None:
        """UserError unless the rows were prepared to go on from the run's."""
        expected = self.base.applied_to(artifacts)
        command = f"ctr-data prepare --from {self.run} --input FILES --out DIR"
        differences = expected.differences(artifacts, values=False)
        if differences:
            raise UserError(f"{data} has other features than {self.run}: {'; '.join(differences)}; prepare its rows "
                            f"with `{command}`")
        if artifacts.continued != expected.continued:
            raise UserError(f"{data} was not prepared to go on from {self.run}: its ids are others; prepare its rows "
                            f"with `{command}`")

    def state(self, model: CTRModel, artifacts: Artifacts) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        """(weights, optimizer states) of the run's kept model, with rows for the values that are new in `artifacts`.

        Args:
            model: newly made for `artifacts`; the rows added have its weights.
        """
        _, content = load_kept(self.run)
        weights, states = scored_weights(content), content["optimizers"]
        before, now = self.base.artifacts.table_rows, artifacts.table_rows
        if now > before:
            tables = {id(table) for table in model.embedding_parameters()}
            for name, parameter in model.named_parameters():
                if id(parameter) in tables:
                    weights[name] = torch.cat([weights[name], parameter.detach().cpu()[before:]])
            for state in states[0]["state"].values():
                for name, value in state.items():
                    if isinstance(value, torch.Tensor) and value.dim() and len(value) == before:
                        state[name] = _longer(value, now, fill=int(state["step"]) if name == "last_step" else 0)
        return weights, states


def _longer(value: torch.Tensor, rows: int, fill: int) -> torch.Tensor:
    """[before, ...] -> [rows, ...], the rows added filled with a number."""
    return torch.cat([value, value.new_full((rows - len(value), *value.shape[1:]), fill)])
