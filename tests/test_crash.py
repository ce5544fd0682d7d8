"""Killed anywhere and resumed: `python tests/crash.py --points --random 100`, in short."""

from __future__ import annotations

import random
import secrets

import pytest
from crash import POINTS, ROW, SETTINGS, WHOLE, Campaign, Fault, checkpoint
from helpers import BATCH, flags, rows

import walker_core as core

pytestmark = pytest.mark.slow


def test_a_run_killed_at_every_point_of_every_writer_loses_no_row_and_no_file(trainings, tmp_path):
    campaign = Campaign(trainings, tmp_path)
    campaign.run(POINTS)
    assert set(campaign.table) == {(fault.file, fault.moment) for fault in POINTS}
    for name, counts in campaign.table.items():
        assert +counts == {"tried": 1, "killed": 1, "resumed": 1}, name
    assert max(campaign.redone) <= 3  # last.pt is written every third iteration there


def test_a_run_killed_at_random_moments_loses_no_row_and_no_file(trainings, tmp_path):
    seed = secrets.randbits(32)
    campaign = Campaign(trainings, tmp_path)
    chance = random.Random(seed)
    campaign.run([chance.uniform(0, 2) for _ in range(4)])  # seconds; a whole run takes about two
    wrong = {"failed", "lost", "repeated", "torn", "broken", "unfinished"} & set(+campaign.total())
    assert not wrong, f"seed {seed}:\n{campaign}"


@pytest.mark.parametrize("moment", WHOLE)
@pytest.mark.parametrize("file", ["config.json", "metrics.csv", "last.pt"])
def test_a_run_killed_before_its_first_iteration_starts_again(file, moment, trainings, tmp_path):
    out, typed = tmp_path / "run", flags(**SETTINGS)
    assert trainings.run(out, *typed, fault=Fault(file, moment)) == -9
    if (out / core.LAST).exists():
        assert checkpoint(out / core.LAST)["step"] == 0
        typed = ["--resume"]
    assert trainings.run(out, *typed, fault=Fault("row", ROW[-1], 2)) == -9
    assert [row["iteration"] for row in rows(out)] == ["1", "2"]


def test_a_best_that_is_newer_than_the_last_stays_until_a_better_one(trainings, tmp_path):
    out, typed = tmp_path / "run", flags(**SETTINGS, seed=1)
    before_last = Fault("row", ROW[0], 3)  # the best is of iteration 2, the last of 0
    assert trainings.run(out, *typed, fault=before_last, scores=[5.0]) == -9
    best = (out / core.BEST).read_bytes()
    assert checkpoint(out / core.BEST)["step"] == 2 * BATCH
    assert checkpoint(out / core.LAST)["step"] == 0

    before_last = Fault("row", ROW[0], 6)  # after three evaluations
    assert trainings.run(out, "--resume", fault=before_last, scores=[4.0, 4.5, 4.2]) == -9
    assert (out / core.BEST).read_bytes() == best
    assert trainings.run(out, "--resume", fault=before_last, scores=[4.9, 4.8, 6.0]) == -9
    assert checkpoint(out / core.BEST)["best_return"] == 6
