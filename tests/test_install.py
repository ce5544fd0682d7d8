"""`pip install .` gives the three modules and a command `walker`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib

import pytest
from helpers import TESTS

ROOT = TESTS.parent


@pytest.mark.slow
def test_pip_install_gives_a_command_that_works_in_any_folder(tmp_path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()  # a build leaves files beside the sources
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    options = ["--quiet", "--no-deps", "--target", target]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, source], check=True)
    assert {path.name for path in target.glob("*.py")} == {"walker.py", "walker_core.py", "viz.py"}
    assert [path.name for path in target.glob("*.dist-info")] == [
        f"walker_ppo-{project['version']}.dist-info"
    ]
    environ = os.environ | {"PYTHONPATH": str(target)}
    command = [sys.executable, target / "bin" / "walker", "--gama", "1"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--gama" in done.stderr
