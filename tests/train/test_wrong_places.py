"""Raw rows where prepared ones are needed, and the other way round: one sentence, nothing written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from raw_lines import raw_lines

from ctr_train import cli_eval, cli_train
from ctr_train.data import cli as cli_data
from ctr_train.data.artifacts import Artifacts
from ctr_train.data.prepare import prepare


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """(module, *arguments) -> what that command does in `tmp_path`, in this process."""
    monkeypatch.chdir(tmp_path)

    def run(module, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", [module.NAME, *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            module.main()
        return subprocess.CompletedProcess(arguments, exit_.value.code, *capfd.readouterr())

    return run


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    """rows.tsv, prepared as `rows` and by another protocol as `foreign`, and a model trained on them, `run`."""
    directory = tmp_path_factory.mktemp("places")
    (directory / "rows.tsv").write_text("".join(line + "\n" for line in raw_lines(400)))
    for name in ("rows", "foreign"):
        prepare([directory / "rows.tsv"], directory / name, hash_bins=100)
    content = {**Artifacts.load(directory / "foreign").to_dict(), "protocol": "their own", "version": 7}
    (directory / "foreign" / "artifacts.json").write_text(json.dumps(content))
    arguments = ("--model", "dcnv2", "--recipe", "small", "--data", directory / "rows", "--out", directory / "run")
    done = subprocess.run([sys.executable, "-m", "ctr_train.cli_train", *arguments], capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    return directory


RAW_NEEDED, PREPARED_NEEDED = "raw rows are needed here", "a directory made by `ctr-data prepare` is needed here"
FOREIGN = "was prepared by protocol their own version 7; this program knows baseline-v1 version 1: prepare the rows"


@pytest.mark.parametrize(("module", "arguments", "sentence"), [
    (cli_data, ("prepare", "--input", "rows", "--out", "new"), "rows is a directory of prepared data; raw files are"),
    (cli_data, ("prepare", "--input", "run", "--out", "new"), "run is a directory of prepared data; raw files are"),
    (cli_data, ("prepare", "--from", "rows.tsv", "--input", "rows.tsv", "--out", "new"), PREPARED_NEEDED),
    (cli_data, ("prepare", "--from", "run", "--min-count", "3", "--input", "rows.tsv", "--out", "new"),
     "--min-count 3: --from run takes the settings of that run"),
    (cli_data, ("inspect", "rows.tsv"), PREPARED_NEEDED),
    (cli_data, ("inspect", "foreign"), FOREIGN),
    (cli_eval, ("run", "--data", "rows.tsv"), PREPARED_NEEDED),
    (cli_eval, ("run", "--data", "foreign"), FOREIGN),
    (cli_eval, ("run", "--input", "rows"), RAW_NEEDED),
    (cli_eval, ("rows.tsv", "--data", "rows"), "rows.tsv is no run: it is a file"),
    (cli_train, ("--model", "dcnv2", "--data", "foreign", "--out", "new"), FOREIGN),
    (cli_train, ("--model", "dcnv2", "--data", "rows", "--data", "foreign", "--out", "new"), "one prepared directory"),
    (cli_train, ("--model", "dcnv2", "--data", "rows.tsv", "--prepared", "rows.tsv", "--out", "new"),
     "rows.tsv is a file, not a directory"),
], ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_a_wrong_place_is_one_sentence_and_leaves_nothing(command, places, tmp_path, module, arguments, sentence):
    for path in places.iterdir():
        (tmp_path / path.name).symlink_to(path)
    before = sorted(path.name for path in tmp_path.iterdir())
    done = command(module, *arguments)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"{module.NAME}: ") and done.stderr.count("\n") == 1, done.stderr
    assert sentence in done.stderr, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before
