"""artifacts.json: how data was prepared, what came out, and what a model needs to prepare other rows the same way."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import read_record, write_record
from .protocol import (
    GOLD_ROWS,
    HASH_BINS,
    NUM_DENSE,
    NUM_SPARSE,
    PROTOCOL,
    PROTOCOL_VERSION,
    SPLIT_RULE,
    TRANSFORM,
    VALID_RATIO,
)
from .values import FILE as VALUES_FILE
from .values import STATISTICS

FILE = "artifacts.json"
KIND = "artifacts 1"  # of the record, and its version
# What a model depends on.
MODEL_FIELDS = ("protocol", "version", "hash_bins", "missing_indicator", "transform", "min_count", "history")


@dataclass
class Artifacts:
    """The record of a prepared directory.

    Attributes:
        protocol, version, hash_bins, valid_ratio, gold_rows, missing_indicator, split: the settings.
        min_count: values of fewer training rows share a row of their field in the table, the others have rows of
            their own, `table_rows` in all; 1: a value's row is its hashed id.
        history: whether each field has the statistics of `values.ValueCounts` behind the numeric features.
        folds: of cross-fitted history (`folds.FoldCounts`); 0: the training rows' history is ordered by the file.
        recipe: name of the recipe that the data were prepared for; empty if none was named.
        continued: SHA-256 of the counts of values of the run that these data go on from; empty if they stand alone.
        transform, split_rule: the rules in words.
        counts, label_rate: rows and mean label of "train", "valid", "gold". The gold rows are the first validation
            rows and are in valid.arrow too; neither is ever in train.arrow.
        sources: {"file", "bytes", "sha256", "rows"} of each input, in order; rows are its lines.
        outputs: split -> {"file", "rows", "bytes", "sha256"}.
        skipped_lines, first_skipped: bad lines left out, which count as lines for the split; and what was wrong with
            the first one.
        best_possible: split -> {"logloss", "auc"} of the true probabilities, for synthetic data; else None.
        fields: name -> {"missing": share of rows}, and for categorical fields {"distinct_ids", "distinct_values",
            "collisions"}; the last two are estimates.
        numeric_edges: edges of the bins of each numeric feature, fitted to the training rows.
        history_moments: mean and standard deviation of each history feature over the training rows; empty without.
        values: {"file", "ids", "rows", "clicks", "table_rows", "bytes", "sha256"} of the counts that min_count and
            history need for other rows; empty without both.
    """

    protocol: str = PROTOCOL
    version: int = PROTOCOL_VERSION
    hash_bins: int = HASH_BINS
    valid_ratio: float = VALID_RATIO
    gold_rows: int = GOLD_ROWS
    missing_indicator: bool = False
    split: str = "hash"
    min_count: int = 1
    history: bool = False
    folds: int = 0
    recipe: str = ""
    continued: str = ""
    transform: str = TRANSFORM
    split_rule: str = SPLIT_RULE
    counts: dict[str, int] = field(default_factory=dict)
    label_rate: dict[str, float | None] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped_lines: int = 0
    first_skipped: str = ""
    best_possible: dict[str, dict[str, float]] | None = None
    fields: dict[str, dict[str, Any]] = field(default_factory=dict)
    numeric_edges: list[list[float]] = field(default_factory=list)
    history_moments: list[list[float]] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def num_numeric(self) -> int:
        """Numeric features: 13, or 26 with missing indicators."""
        return NUM_DENSE * (2 if self.missing_indicator else 1)

    @property
    def num_statistics(self) -> int:
        """History features of each field: 2 or none."""
        return STATISTICS if self.history else 0

    @property
    def num_dense(self) -> int:
        """Width of the dense features: the numeric ones, then history."""
        return self.num_numeric + self.num_statistics * NUM_SPARSE

    @property
    def table_rows(self) -> int:
        """Rows of the embedding table: ids of the prepared rows are below."""
        return self.values["table_rows"] if self.min_count > 1 else self.hash_bins

    @property
    def counts_values(self) -> bool:
        """Whether features depend on counts of values."""
        return self.history or self.min_count > 1

    def differences(self, other: "Artifacts", *, values: bool = True) -> list[str]:
        """What a model trained on these would find different in `other`, a phrase for each; empty if nothing.

        values: whether the counts of values must be the same, too.
        """
        found = [f"{name} is {getattr(self, name)!r} there and {getattr(other, name)!r} here" for name in MODEL_FIELDS
                 if getattr(self, name) != getattr(other, name)]
        if values and not found and self.values.get("sha256") != other.values.get("sha256"):
            found = [f"its counts of values ({VALUES_FILE}) are those of other training rows"]
        return found

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
        write_record(Path(directory) / FILE, KIND, self.to_dict())

    @classmethod
    def load(cls, directory: Path | str) -> "Artifacts":
        """Read a directory's artifacts.json; UserError where it is missing or damaged."""
        path = Path(directory) / FILE
        if Path(directory).is_file():
            raise UserError(f"{directory} is a file; a directory made by `ctr-data prepare` is needed here")
        if not path.exists():
            raise UserError(f"{path} does not exist: {directory} holds no prepared data; make some with "
                            "`ctr-data prepare`")
        try:
            content = read_record(path, KIND)
        except UserError as error:
            raise UserError(f"{error}; prepare the rows again") from None
        try:
            found = cls.from_dict(content)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        if (found.protocol, found.version) != (PROTOCOL, PROTOCOL_VERSION):
            raise UserError(f"{directory} was prepared by protocol {found.protocol} version {found.version}; this "
                            f"program knows {PROTOCOL} version {PROTOCOL_VERSION}: prepare the rows again")
        return found
