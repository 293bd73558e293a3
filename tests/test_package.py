"""The wheel: what it holds, that it installs and runs outside the checkout, and what happens without a compiler."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"ctr_kernels": "ctr_kernels", "ctr_models": "models", "ctr_train": "train"}  # package -> its folder
SCRIPTS = {"ctr-train", "ctr-data", "ctr-eval", "ctr-report"}


def run(command: list[str | Path], cwd: Path, **environment: str) -> str:
    """Output of a command that must succeed; without variables that would let Python find the checkout."""
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment
    result = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}:\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = run(["git", "ls-files", "-z"], ROOT).split("\0")
    return [name for name in names if name and (ROOT / name).exists()]


def build(tracked: list[str], directory: Path, **environment: str) -> Path:
    """A wheel of a copy of the tracked files, built in `directory`."""
    source = directory / "source"
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    run([sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-index", "--no-deps",
         "--no-build-isolation", "--wheel-dir", directory, source], directory, **environment)
    (wheel,) = directory.glob("*.whl")
    return wheel


def install(wheel: Path, directory: Path) -> Path:
    """The `bin` folder of a new virtual environment with the wheel.

    It borrows the dependencies from the environment of the tests by a path, and so sees no editable install there.
    """
    venv.create(directory, with_pip=False)
    python = directory / "bin" / "python"
    site = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], directory).strip()
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(site, "dependencies.pth").write_text("\n".join(sorted(borrowed)) + "\n")
    run([sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, "install", "--quiet",
         "--no-index", "--no-deps", "--ignore-installed", wheel], directory)
    return directory / "bin"


@pytest.fixture(scope="module")
def wheel(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tracked, tmp_path_factory.mktemp("wheel"), CTR_KERNELS_NO_NATIVE="1")


def test_wheel_holds_the_three_packages_and_nothing_else(wheel: Path, tracked: list[str]) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    (info,) = {name.split("/")[0] for name in names} - FOLDERS.keys()
    assert re.fullmatch(r"ctr_kernels-[0-9.]+\.dist-info", info)
    expected = {package + name[len(folder):] for package, folder in FOLDERS.items() for name in tracked
                if name.startswith(folder + "/")}
    held = {name for name in names if not name.startswith(info)}
    assert held == expected | {"ctr_kernels/_native_absent.txt"}
    assert {name for name in expected if not name.endswith(".py")} == {"ctr_kernels/operators.inc"}


def test_wheel_names_its_scripts_and_dependencies(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        section, *lines = archive.read(entry_points).decode().split("\n")
        metadata = archive.read(entry_points.replace("entry_points.txt", "METADATA")).decode()
    assert section == "[console_scripts]"
    assert {line.split(" = ")[0] for line in lines if line} == SCRIPTS
    required = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata, flags=re.M)
    assert set(required) == {"torch", "numpy", "pyarrow", "click", "tqdm", "matplotlib"}
    assert "Requires-Python: >=3.10\n" in metadata
    assert "Classifier: License :: OSI Approved :: Apache Software License\n" in metadata


def test_an_older_setuptools_reads_pyproject() -> None:
    """Python 3.11 comes with setuptools 65, torch 2.11 wants one below 82; licences of 77 they refuse."""
    text = (ROOT / "pyproject.toml").read_text()
    project = text[text.index("[project]\n"):text.index("[project.optional-dependencies]")]
    assert not re.search(r"^license", project, flags=re.M)
    assert re.search(r'^requires = \["setuptools>=(\d+)"', text, flags=re.M)[1] == "64"


def test_wheel_runs_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    programs = install(wheel, tmp_path / "venv")
    assert {path.name for path in programs.iterdir()} >= SCRIPTS
    code = ("import importlib.metadata, json, ctr_kernels, ctr_models, ctr_train; "
            "points = importlib.metadata.distribution('ctr-kernels').entry_points; "
            "print(json.dumps({'files': [m.__file__ for m in (ctr_kernels, ctr_models, ctr_train)], "
            "'scripts': {p.name: callable(p.load()) for p in points}, "
            "'native': ctr_kernels.backends()['native'][:2]}))")
    found = json.loads(run([programs / "python", "-c", code], tmp_path))
    assert all(Path(file).is_relative_to(tmp_path / "venv") for file in found["files"])
    assert found["scripts"] == dict.fromkeys(SCRIPTS, True)
    assert found["native"] == [None, "it was built with CTR_KERNELS_NO_NATIVE=1"]
    assert "synth" in run([programs / "ctr-data", "--help"], tmp_path)


def test_without_a_compiler_it_installs_and_says_why_native_is_absent(tracked: list[str], tmp_path: Path) -> None:
    wheel = build(tracked, tmp_path, CC="/nonexistent/cc", CXX="/nonexistent/c++")
    programs = install(wheel, tmp_path / "venv")
    code = "import ctr_kernels, json; print(json.dumps(ctr_kernels.backends()['native'][:2]))"
    level, reason = json.loads(run([programs / "python", "-c", code], tmp_path))
    assert level is None
    assert "C++ build failed" in reason and "/nonexistent/c" in reason


def test_constraints_pin_one_version_for_every_python() -> None:
    """Each line is `name==version`, or one of a pair for Python from 3.11 and before it."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins: dict[str, list[str]] = {}
    for line in lines:
        match = re.fullmatch(r'([A-Za-z0-9_.-]+)==([0-9][0-9A-Za-z.]*)(?:; python_version (<|>=) "3\.11")?', line)
        assert match, line
        pins.setdefault(match[1].lower(), []).append(match[3])
    only_before = {"exceptiongroup", "six", "tomli"}  # which other packages need on Python 3.10 alone
    for name, markers in pins.items():
        assert sorted(markers, key=str) in ([[None], ["<", ">="]] if name not in only_before else [["<"]]), name
    assert {"torch==2.13.0", "triton==3.7.1"} <= set(lines)  # that torch for CUDA requires exactly that Triton
