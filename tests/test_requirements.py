"""Every package that is imported is named, with its exact version, in a file of requirements."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = [ROOT / name for name in ("walker.py", "walker_core.py", "viz.py")]
OTHERS = [*sorted((ROOT / "examples").glob("*.py")), *sorted((ROOT / "tests").rglob("*.py"))]
OWN = {path.stem for path in (*PROGRAM, *OTHERS)} | {"examples", "tests", "benchmarks"}
# only inside functions; what they need to be installed is said when they are missing
OPTIONAL = {"envpool", "tensorboard"}
DISTRIBUTIONS = {  # where the name to import is not the one to install
    "imageio_ffmpeg": "imageio-ffmpeg",
    "PIL": "pillow",
    "stable_baselines3": "stable-baselines3",
    "sb3_contrib": "sb3-contrib",
    "sbx": "sbx-rl",
}
PEERS = "# peers of benchmarks/time_to_solved.py, installed by hand: "


def lines(file: str, start: str = "") -> list[str]:
    """The requirements of a file, or those behind `start` in its comments."""
    text = (ROOT / file).read_text().splitlines()
    if start:
        [peers] = (line.removeprefix(start) for line in text if line.startswith(start))
        return peers.split(", ")
    return [line for line in text if line and not line.startswith("#")]


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[=]", line)[0] for line in requirements}


RUNTIME = names(lines("requirements.txt"))
TESTS = RUNTIME | names(lines("tests/requirements.txt"))
HAND = names(lines("tests/requirements.txt", PEERS))


def imports(source: str, top_level: bool = False) -> Iterator[str]:
    """The packages that a module imports, as they are installed; only its own are left out."""
    tree = ast.parse(source)
    inside = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    skipped = {child for node in inside for child in ast.walk(node)} if top_level else set()
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            modules = [node.module]
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.importorskip":
            modules = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        for module in modules if node not in skipped else ():
            package = module.split(".")[0]
            if package not in sys.stdlib_module_names | OWN:
                yield DISTRIBUTIONS.get(package, package)


def test_imports_are_found_wherever_they_stand():
    source = "import os, numpy.linalg\ndef f():\n    from PIL import Image\n    import viz"
    assert list(imports(source)) == ["numpy", "pillow"]
    assert list(imports(source, top_level=True)) == ["numpy"]


@pytest.mark.parametrize("path", PROGRAM, ids=lambda path: path.name)
def test_the_program_imports_only_what_its_requirements_name(path):
    source = path.read_text()
    assert set(imports(source)) - OPTIONAL <= RUNTIME
    assert set(imports(source, top_level=True)) <= RUNTIME


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tests_and_examples_import_only_what_requirements_name(path):
    allowed = TESTS | HAND if path.name == "time_to_solved.py" else TESTS
    assert set(imports(path.read_text())) <= allowed


@pytest.mark.parametrize("file", ["requirements.txt", "tests/requirements.txt"])
def test_every_requirement_has_an_exact_version(file):
    for line in lines(file):
        assert re.fullmatch(r"[\w-]+(\[\w+\])?==\d+(\.\d+)+", line), line


def test_the_peers_that_are_installed_by_hand_are_those_that_the_header_names():
    header = ast.get_docstring(ast.parse((ROOT / "tests/benchmarks/time_to_solved.py").read_text()))
    used = set(imports((ROOT / "tests/benchmarks/time_to_solved.py").read_text())) - TESTS
    assert used == HAND
    assert [peer for peer in HAND if peer not in header] == []
