"""artifacts.json: how data was prepared, what came out, and what a model needs to prepare other rows the same way."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import read_json, write_json
from .protocol import GOLD_ROWS, HASH_BINS, NUM_DENSE, PROTOCOL, PROTOCOL_VERSION, SPLIT_RULE, TRANSFORM, VALID_RATIO

FILE = "artifacts.json"
MODEL_FIELDS = ("protocol", "version", "hash_bins", "missing_indicator", "transform")  # what a model depends on


@dataclass
class Artifacts:
    """The record of a prepared directory.

    Attributes:
        protocol, version, hash_bins, valid_ratio, gold_rows, missing_indicator: the settings.
        transform, split_rule: the rules in words.
        counts, label_rate: rows and mean label of "train", "valid", "gold". The gold rows are the first validation
            rows and are in valid.arrow too; neither is ever in train.arrow.
        sources: {"file", "bytes", "sha256", "rows"} of each input, in order; rows are its lines.
        outputs: split -> {"file", "rows", "bytes", "sha256"}.
        skipped_lines: bad lines left out; they count as lines for the split.
        best_possible: split -> {"logloss", "auc"} of the true probabilities, for synthetic data; else None.
        fields: name -> {"missing": share of rows}, and for categorical fields {"distinct_ids", "distinct_values",
            "collisions"}; the last two are estimates.
    """

    protocol: str = PROTOCOL
    version: int = PROTOCOL_VERSION
    hash_bins: int = HASH_BINS
    valid_ratio: float = VALID_RATIO
    gold_rows: int = GOLD_ROWS
    missing_indicator: bool = False
    transform: str = TRANSFORM
    split_rule: str = SPLIT_RULE
    counts: dict[str, int] = field(default_factory=dict)
    label_rate: dict[str, float | None] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped_lines: int = 0
    best_possible: dict[str, dict[str, float]] | None = None
    fields: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def num_dense(self) -> int:
        """Width of the dense features: 13, or 26 with missing indicators."""
        return NUM_DENSE * (2 if self.missing_indicator else 1)

    def differences(self, other: "Artifacts") -> list[str]:
        """What a model trained on these would find different in `other`, a phrase for each; empty if nothing."""
        return [f"{name} is {getattr(self, name)!r} there and {getattr(other, name)!r} here" for name in MODEL_FIELDS
                if getattr(self, name) != getattr(other, name)]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON content."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Any) -> "Artifacts":
        """The inverse of `to_dict`; UserError where a key is missing, unknown or of another type."""
        expected = {f.name: type(getattr(cls(), f.name)) for f in fields(cls)}
        if not isinstance(content, dict):
            raise UserError(f"artifacts are a {type(content).__name__}, not an object of named settings")
        missing, unknown = sorted(expected.keys() - content.keys()), sorted(content.keys() - expected.keys())
        if missing or unknown:
            raise UserError(f"artifacts lack {missing or 'nothing'} and have unknown entries {unknown or 'none'}: "
                            "made by another version?")
        for name, kind in expected.items():
            if name != "best_possible" and not isinstance(content[name], kind):
                raise UserError(f"artifacts: {name} is {content[name]!r}; a {kind.__name__} is needed")
        return cls(**content)

    def save(self, directory: Path | str) -> None:
        """Write artifacts.json into the directory, atomically."""
        write_json(Path(directory) / FILE, self.to_dict())

    @classmethod
    def load(cls, directory: Path | str) -> "Artifacts":
        """Read a directory's artifacts.json; UserError where it is missing or damaged."""
        path = Path(directory) / FILE
        if not path.exists():
            raise UserError(f"{path} does not exist: {directory} holds no prepared data; make some with "
                            "`ctr-data prepare`")
        try:
            return cls.from_dict(read_json(path))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
