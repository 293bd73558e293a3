"""What the README shows works: Python blocks and the marked bash block run, options and backends are the real ones."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from ctr_train import cli_eval, cli_report, cli_train
from ctr_train.data import cli as cli_data

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text()
BLOCK = re.compile(r"(?P<mark><!-- tested -->\n)?^```(?P<language>\w+)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [(TEXT[:found.start()].count("\n") + 1, found["language"], found["mark"], found["body"])
          for found in BLOCK.finditer(TEXT)]
PYTHON = [(line, body) for line, language, _, body in BLOCKS if language == "python"]
BASH = [(line, body) for line, language, _, body in BLOCKS if language == "bash"]
MARKED = [(line, body) for line, language, mark, body in BLOCKS if language == "bash" and mark]
COMMANDS = {"ctr-train": cli_train.command, "ctr-eval": cli_eval.command, "ctr-report": cli_report.command,
            **{f"ctr-data {name}": command for name, command in cli_data.command.commands.items()}}


def options_of(command):
    """Long names of an option, those of its "off" switch included."""
    return {name for parameter in command.params if isinstance(parameter, click.Option)
            for name in (*parameter.opts, *parameter.secondary_opts)}


def test_the_blocks_are_found():
    assert len(PYTHON) >= 3
    assert len(BASH) >= 2
    assert len(MARKED) == 1


@pytest.mark.parametrize(("line", "body"), PYTHON, ids=lambda value: f"line {value}" if isinstance(value, int) else "")
def test_python_blocks_run(line, body, capsys):
    exec(compile("\n" * line + body, str(README), "exec"), {"__name__": "readme"})


def test_the_marked_commands_run(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1",
                   "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-e", "-c", MARKED[0][1]], cwd=tmp_path, env=environment, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for made in ("runs/day1/data/artifacts.json", "runs/day2/gold.json", "predictions.parquet", "report/curves.png"):
        assert (tmp_path / made).stat().st_size > 0, made
    assert "best possible" in done.stdout


def test_every_command_line_parses():
    lines = [line for _, body in BASH for line in body.splitlines() if line]
    for line in lines:
        name, *arguments = shlex.split(line)
        if name == "ctr-data":
            name, arguments = f"{name} {arguments[0]}", arguments[1:]
        COMMANDS[name].make_context(name, arguments)


@pytest.mark.parametrize("name", ["ctr-train", "ctr-eval", "ctr-report", "ctr-data"])
def test_the_table_of_options_is_complete_and_true(name):
    table = re.search(rf"^\| `{name}\b.*?(?=\n\n)", TEXT, re.MULTILINE | re.DOTALL)[0]
    shown = set(re.findall(r"--[a-z-]+", "\n".join(line.split("|")[1] if name != "ctr-data" else line
                                                   for line in table.splitlines() if not line.startswith("|---"))))
    real = set().union(*(options_of(command) for key, command in COMMANDS.items() if key.split()[0] == name))
    if name == "ctr-data":
        assert shown <= real  # --help has the rest
    else:
        assert shown == real


def test_make_has_the_targets():
    makefile = (README.parent / "Makefile").read_text()
    targets = set(re.findall(r"(?:^|`)make (?:\w+=\S+ )?([a-z]+)", TEXT, re.MULTILINE))
    assert {"train", "test", "lint", "bench"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_table_of_backends_says_what_is_there():
    rows = dict(re.findall(r"^\| `(eager|native|triton)` \|.*\| (.*) \|$", TEXT, re.MULTILINE))
    assert set(rows) == {"eager", "native", "triton"} and "not yet" not in rows.values()
