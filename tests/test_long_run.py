"""A long run does not grow: `python tests/benchmarks/long_run.py`, in short."""

from __future__ import annotations

import pytest
from benchmarks.long_run import figures
from helpers import BATCH, flags


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
