"""What later data take over from the data that a run was trained on: settings, bins, moments and counts of values."""

from dataclasses import dataclass, replace
from pathlib import Path

from .artifacts import MODEL_FIELDS, Artifacts
from .values import ValueCounts


@dataclass(frozen=True)
class Base:
    """The data behind a trained model, which rows of later days are prepared to follow.

    Attributes:
        artifacts: of those data.
        counts: of the values of all rows trained on so far; None where no feature needs them.
    """

    artifacts: Artifacts
    counts: ValueCounts | None

    @classmethod
    def load(cls, directory: Path | str) -> "Base":
        """From a run directory, or a prepared one. UserError where its files are missing or damaged."""
        artifacts = Artifacts.load(directory)
        counts = None
        if artifacts.counts_values:
            counts = ValueCounts.load(directory, artifacts.values, artifacts.hash_bins)
        return cls(artifacts, counts)

    def applied_to(self, settings: Artifacts) -> Artifacts:
        """`settings` with all that the model depends on as it is here; how rows are split stays as asked for."""
        taken = {name: getattr(self.artifacts, name) for name in (*MODEL_FIELDS, "folds", "recipe")}
        return replace(settings, **taken, continued=self.artifacts.values.get("sha256", ""))
