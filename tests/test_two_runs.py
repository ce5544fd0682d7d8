"""Two runs in one folder: the second is refused and changes nothing, however it is asked for."""

from __future__ import annotations

import os
import signal

import pytest
from crash import Fault
from helpers import flags, rows, tree
from test_signals import ENDLESS, NO_PICTURES, held

import walker
import walker_core as core


@pytest.mark.parametrize("asked", ["", "--resume", "--overwrite"])
def test_a_second_run_in_a_folder_is_one_line_and_changes_nothing(
    asked, trainings, tmp_path, capsys
):
    out = tmp_path / "run"
    child = held(out, trainings, "update", 60, **ENDLESS)
    try:
        before = tree(tmp_path)
        typed = flags(out)  # short, in case it is not refused
        assert walker.main([*typed, *asked.split()]) == 2
        assert tree(tmp_path) == before
    finally:
        os.kill(child, signal.SIGKILL)
        trainings.wait()
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(out) in error
    assert ("is in use by a run that is still going" in error) == (asked != "")
    assert trainings.run(out, "--resume", "--total-timesteps", "64", hook=NO_PICTURES) == 0


def test_the_lock_of_a_killed_run_is_not_in_the_way(trainings, tmp_path):
    out = tmp_path / "run"
    assert trainings.run(out, *flags(out), fault=Fault("row", "half a row", 2)) == -9
    assert (out / core.LAST).with_name(".lock").exists()
    assert trainings.run(out, "--resume", hook=NO_PICTURES) == 0
    assert len(rows(out)) == 4
