"""Benchmarks in short: a long run does not grow, and the script for a GPU works."""

from __future__ import annotations

import subprocess
import sys

import pytest
from benchmarks.long_run import figures
from helpers import BATCH, TESTS, flags


@pytest.mark.slow
def test_memory_open_files_and_time_do_not_grow_with_the_iterations(trainings, tmp_path):
    samples = tmp_path / "samples.txt"
    hook = f"from benchmarks.long_run import sample\nsample({str(samples)!r})\n"
    hook += "core.export = lambda *args, **kwargs: None"
    typed = flags(tmp_path, total_timesteps=250 * BATCH, eval_every=20 * BATCH)
    assert trainings.run(tmp_path, *typed, hook=hook) == 0
    found = figures(samples, warm=100)
    assert found.memory_kib < 2500  # per 1000: 850 is the heap that settles, which ends by 500
    assert found.files[0] == found.files[1]
    assert found.times_ms[1] < 3 * found.times_ms[0]


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_to_its_end_on_a_cpu():
    script = TESTS / "benchmarks/gpu.py"
    command = [sys.executable, script, "--device", "cpu", "--small"]
    pytest.importorskip("envpool")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "the same again on cpu: differs by 0.0e+00" in done.stdout
    assert "resumed on cpu: steps [512, 1024], 0.0e+00" in done.stdout
    assert lines[-1].startswith("EnvPool, networks on cpu: solved after None")
