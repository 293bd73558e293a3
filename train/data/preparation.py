"""What a recipe wants of the data: the part of preparing rows that decides what a model can learn from them."""

from dataclasses import asdict, dataclass
from typing import Any

from .artifacts import Artifacts


@dataclass(frozen=True)
class Preparation:
    """Settings of `prepare.prepare` that go with a recipe; `Artifacts` says what each of them means."""

    min_count: int = 1
    history: bool = False
    folds: int = 0
    missing_indicator: bool = False

    def settings(self, overrides: dict[str, Any]) -> dict[str, Any]:
        """Arguments for `prepare.prepare`: these, and those of `overrides` that are not None in their place."""
        return {**asdict(self), **{name: value for name, value in overrides.items() if value is not None}}

    def is_that_of(self, found: Artifacts) -> bool:
        """Whether data were prepared in this way."""
        return all(getattr(found, name) == value for name, value in asdict(self).items())

    def options(self) -> str:
        """As options of `ctr-data prepare`, for a person to read."""
        history = f"--history --folds {self.folds}" if self.history else "--no-history"
        return f"{history} --min-count {self.min_count}" + (" --missing-indicator" if self.missing_indicator else "")
