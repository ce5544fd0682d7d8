"""Whole runs: the same again, stopped and resumed, stopped by a signal, and what they write."""

from __future__ import annotations

import errno
import io
import itertools
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import gymnasium as gym
import imageio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from helpers import (
    BATCH,
    CLOCK,
    before_update,
    column,
    flags,
    learned,
    rows,
    same,
    start,
    tiny,
    tree,
    wait_for,
    warned,
    without_clock,
)
from PIL import Image

import walker
import walker_core as core

EXPORT = core.export
HEADER = (
    "step,iteration,wall_s,steps_per_s,collect_s,update_s,eval_s,episodes,return_mean,return_min,"
    "return_max,length_mean,length_min,length_max,eval_return_mean,eval_return_std,eval_episodes,"
    "policy_loss,value_loss,entropy,approx_kl,clip_fraction,explained_variance,action_std,"
    "grad_norm,learning_rate"
)
LOCK = "checkpoints_walker/.lock"
WALKER = {"env": "BipedalWalker-v3", "env_kwargs": ("max_episode_steps=10",)}  # solved at 300


pytestmark = pytest.mark.usefixtures("no_pictures")  # the tests of `export` put it back


class Judge:
    """In place of `core.evaluate`: gives every episode the return that is next in its list."""

    def __init__(self, *returns: float) -> None:
        self.returns = iter(returns)
        self.seeds = []

    def __call__(self, act, config, seeds, *rest):
        self.seeds.append(list(seeds))
        return np.full(len(seeds), next(self.returns)), np.full(len(seeds), 10)


# ---- one seed, one run ---------------------------------------------------------------------------


def test_two_runs_with_one_seed_are_equal_to_the_bit(tmp_path):
    for name in ("a", "b"):
        core.train(tiny(tmp_path / name, eval_every=64, seed=3, **WALKER))
        random.random(), np.random.rand(5), torch.rand(5)  # where the streams are must not matter
    a, b = tmp_path / "a", tmp_path / "b"
    assert without_clock(rows(a)) == without_clock(rows(b))
    for file in (core.LAST, core.BEST):
        assert same(learned(a / file), learned(b / file))


def test_every_iteration_draws_by_the_runs_seed_and_its_own_step(tmp_path, monkeypatch):
    drawn = {}

    def note(name: str, iteration: int) -> None:
        drawn[name, iteration] = random.random(), np.random.rand(), float(torch.rand(()))

    for name, first in (("whole", 1), ("resumed", 3)):
        out = tmp_path / name
        if name == "resumed":
            shutil.copytree(tmp_path / "whole", out)
            shutil.copy(out / core.LAST.replace("last", "step_64"), out / core.LAST)
        with monkeypatch.context() as patch:
            numbers, collect = itertools.count(first), core.collect_rollout
            drawing = lambda *args: (note(name, next(numbers)), collect(*args))[1]  # noqa: E731, B023
            patch.setattr(core, "collect_rollout", drawing)
            core.train(tiny(out, checkpoint_every=BATCH), out / core.LAST if first > 1 else None)
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
    assert len({numbers for (name, _), numbers in drawn.items() if name == "whole"}) == 4
    assert [i for name, i in drawn if name == "resumed"] == [3, 4]
    for i in (3, 4):
        assert drawn["resumed", i] == drawn["whole", i]


def test_runs_with_different_seeds_differ(tmp_path):
    for seed in (3, 4):
        core.train(tiny(tmp_path / str(seed), seed=seed))
    a, b = tmp_path / "3", tmp_path / "4"
    for name in ("return_mean", "policy_loss", "value_loss", "grad_norm"):
        assert column(a, name)[0] != column(b, name)[0]
    assert not same(learned(a / core.LAST)["agent"], learned(b / core.LAST)["agent"])
    start, other = (core.prepare_learner(tiny(seed=seed), None).agent for seed in (3, 4))
    assert not torch.equal(start.actor[0].weight, other.actor[0].weight)


def test_evaluation_does_not_touch_training(tmp_path):
    for every in (0, BATCH):
        core.train(tiny(tmp_path / str(every), eval_every=every))
    never, always = (without_clock(rows(tmp_path / str(every))) for every in (0, BATCH))
    assert all(row["eval_return_mean"] for row in always)
    for row in always:
        row |= {name: "" for name in row if name.startswith("eval_")}
    assert never == always
    assert same(*(learned(tmp_path / str(every) / core.LAST) for every in (0, BATCH)))


# ---- metrics.csv ---------------------------------------------------------------------------------


def test_the_csv_has_the_header_and_one_row_an_iteration(tmp_path):
    core.train(tiny(tmp_path, total_timesteps=3 * BATCH + 1))
    text = (tmp_path / core.METRICS).read_bytes().decode()  # line ends as they are
    assert text.startswith(HEADER + "\n")
    assert text.endswith("\n")
    assert "\r" not in text
    assert [(row["step"], row["iteration"]) for row in rows(tmp_path)] == [
        (str(BATCH * i), str(i)) for i in (1, 2, 3, 4)
    ]


def test_a_cell_without_a_value_is_empty_and_every_other_is_a_finite_number(tmp_path, monkeypatch):
    monkeypatch.setattr(core, "restart_some", lambda *_: None)
    kwargs = ("max_episode_steps=40",)  # an episode ends in the third iteration, not before
    core.train(tiny(tmp_path, env_kwargs=kwargs, eval_every=2 * BATCH))
    ended = {f"{what}_{how}" for what in ("return", "length") for how in ("mean", "min", "max")}
    evaluated = {"eval_return_mean", "eval_return_std", "eval_episodes"}
    for i, row in enumerate(rows(tmp_path), start=1):
        empty = {name for name, cell in row.items() if cell == ""}
        assert empty == (set() if i == 3 else ended) | (evaluated if i % 2 else set())
        assert all(np.isfinite(float(cell)) for cell in row.values() if cell)
        assert row["episodes"] == ("2" if i == 3 else "0")
    assert rows(tmp_path)[2]["length_mean"] == "40"
    assert rows(tmp_path)[3]["eval_episodes"] == "2"


def test_the_times_of_an_iteration_fit_into_the_clock(tmp_path):
    core.train(tiny(tmp_path, eval_every=BATCH))
    wall = np.diff([0, *column(tmp_path, "wall_s")])
    parts = np.sum([column(tmp_path, name) for name in ("collect_s", "update_s", "eval_s")], 0)
    assert (parts > 0).all()
    assert (parts <= wall + 1e-3).all()
    learning = np.add(column(tmp_path, "collect_s"), column(tmp_path, "update_s"))
    assert column(tmp_path, "steps_per_s") == pytest.approx(BATCH / learning, rel=1e-3)


# ---- cadences ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "batch"), [(100, 48), (100, 100), (7, 32), (1000, 32), (96, 32)])
def test_a_cadence_fires_at_the_first_end_of_an_iteration_at_or_past_each_multiple(every, batch):
    ends = range(batch, 50 * batch + 1, batch)
    due = {
        min(end for end in ends if end >= multiple) for multiple in range(every, ends[-1], every)
    }
    due |= {ends[-1]} if ends[-1] % every == 0 else set()
    assert [end for end in ends if core.is_due(every, end, batch)] == sorted(due)


def test_a_cadence_of_zero_never_fires():
    assert not any(core.is_due(0, step, 32) for step in range(32, 3200, 32))


def test_evaluations_and_kept_checkpoints_come_at_their_steps(tmp_path):
    core.train(tiny(tmp_path, total_timesteps=288, eval_every=80, checkpoint_every=100))
    evaluated = [int(row["step"]) for row in rows(tmp_path) if row["eval_return_mean"]]
    assert evaluated == [96, 160, 256, 288]  # and at the end
    kept = sorted((tmp_path / core.LAST).parent.glob("step_*"))
    assert [path.name for path in kept] == ["step_128.pt", "step_224.pt"]
    for path in kept:
        assert path.stem == f"step_{core.load_checkpoint(path)['counters']['step']}"


def test_a_run_without_evaluations_has_no_best(tmp_path):
    core.train(tiny(tmp_path, eval_every=0))
    assert {path.name for path in (tmp_path / core.LAST).parent.iterdir()} == {
        *(".lock", "config.json", "last.pt", "metrics.csv")
    }
    assert not any(row["eval_return_mean"] for row in rows(tmp_path))


def test_the_last_checkpoint_is_written_where_cheap_or_late(tmp_path):
    learner = core.Learner(tiny(tmp_path))
    (tmp_path / core.LAST).parent.mkdir()

    def writes(iteration_s, since):
        (tmp_path / core.LAST).unlink(missing_ok=True)
        learner.save_s, learner.saved_at = 0.5, time.perf_counter() - since
        core.save(learner, BATCH, iteration_s, is_best=False)
        return (tmp_path / core.LAST).exists()

    assert writes(iteration_s=60, since=0)  # under 1 %
    assert not writes(iteration_s=40, since=5)
    assert writes(iteration_s=40, since=11)
    assert not (tmp_path / core.BEST).exists()


def test_the_last_checkpoint_is_written_at_the_end_however_late_the_one_before(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(core, "save", lambda *args: None)  # nothing was due
    core.train(tiny(tmp_path))
    assert core.load_checkpoint(tmp_path / core.LAST)["counters"]["iteration"] == 4


def test_files_are_written_in_the_order_row_best_last(tmp_path, monkeypatch):
    order, save = [], core.Learner.save

    def noted(learner, name):
        csv = tmp_path / core.METRICS  # not there yet when the first checkpoint is written
        order.append((Path(name).stem, csv.read_text().count("\n") - 1 if csv.exists() else None))
        save(learner, name)

    monkeypatch.setattr(core.Learner, "save", noted)
    monkeypatch.setattr(core, "evaluate", Judge(1, 2))
    core.train(tiny(tmp_path, total_timesteps=2 * BATCH, eval_every=BATCH))
    first, *order = dict.fromkeys(order)  # of the last.pt of one iteration, the first
    assert first == ("last", None)  # before the first iteration, and before metrics.csv
    if ("last", 1) in order:
        assert order.index(("best", 1)) < order.index(("last", 1)) < order.index(("best", 2))
        order.remove(("last", 1))
    assert order == [("best", 1), ("best", 2), ("last", 2)]


# ---- best and solved -----------------------------------------------------------------------------


def test_best_is_the_policy_of_the_best_evaluation(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(core, "evaluate", Judge(1, 5, 3, 5, 4))
    counters, _ = core.train(
        tiny(tmp_path, total_timesteps=5 * BATCH, eval_every=BATCH, checkpoint_every=BATCH)
    )
    best = tmp_path / core.BEST
    assert same(learned(best), learned(best.with_name("step_64.pt")))
    assert not same(learned(best), learned(best.with_name("step_32.pt")))
    assert counters.best_return == 5
    state = core.load_checkpoint(best)
    assert (state["counters"]["step"], state["counters"]["best_return"]) == (64, 5)
    said = [line for line in capsys.readouterr().out.splitlines() if "evaluation" in line]
    assert ["the best so far" in line for line in said[:5]] == [True, True, False, False, False]


def test_a_run_that_always_fails_has_a_best_too(tmp_path, monkeypatch):
    monkeypatch.setattr(core, "evaluate", Judge(-900, -800))
    core.train(tiny(tmp_path, total_timesteps=2 * BATCH, eval_every=BATCH))
    assert core.load_checkpoint(tmp_path / core.BEST)["counters"]["best_return"] == -800


def test_solved_means_that_a_hundred_fresh_episodes_reach_the_threshold_too(tmp_path, monkeypatch):
    #             32, 64 and its 100, 96 and its 100: the run is solved there, and ends
    judge = Judge(10, 310, 299.9, 305, 300, 1, 1, 1)
    monkeypatch.setattr(core, "evaluate", judge)
    config = tiny(
        tmp_path, total_timesteps=6 * BATCH, eval_every=BATCH, stop_when_solved=True, **WALKER
    )
    counters, stopped_by = core.train(config)
    assert (counters.step, counters.solved_step, stopped_by) == (96, 96, None)
    assert column(tmp_path, "wall_s")[1] < counters.solved_wall_s <= counters.wall_s
    assert counters.solved_wall_s == pytest.approx(counters.wall_s, abs=0.1)
    assert [float(row["eval_return_mean"]) for row in rows(tmp_path)] == [10, 310, 305]
    assert [row["eval_episodes"] for row in rows(tmp_path)] == ["2"] * 3

    assert [len(seeds) for seeds in judge.seeds] == [2, 2, 100, 2, 100]
    periodic, first, second = judge.seeds[0], judge.seeds[2], judge.seeds[4]
    assert judge.seeds[1] == judge.seeds[3] == periodic
    training = core.env_seeds(config.seed, core.TRAIN, config.num_envs)
    assert len({*periodic, *first, *second, *training}) == 2 + 100 + 100 + 2  # all fresh
    last = core.load_checkpoint(tmp_path / core.LAST)["counters"]
    assert (last["step"], last["solved_step"]) == (96, 96)


def test_a_lucky_evaluation_is_not_solved(tmp_path, monkeypatch):
    monkeypatch.setattr(core, "evaluate", Judge(310, 299, 320, 298, 330, 297, 340, 296))
    counters, _ = core.train(tiny(tmp_path, eval_every=BATCH, stop_when_solved=True, **WALKER))
    assert counters.step == 4 * BATCH  # it ran to its end
    assert (counters.solved_step, counters.solved_wall_s) == (None, None)


def test_a_lucky_evaluation_does_not_displace_a_better_policy(tmp_path, monkeypatch):
    monkeypatch.setattr(core, "evaluate", Judge(280, 310, 250, 100, 100))
    counters, _ = core.train(tiny(tmp_path, eval_every=BATCH, **WALKER))
    assert counters.best_return == 280
    assert core.load_checkpoint(tmp_path / core.BEST)["counters"]["step"] == 32


def test_a_solved_run_goes_on_where_it_was_not_asked_to_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(core, "evaluate", Judge(301, 302, 400, 400, 200, 200))
    counters, _ = core.train(tiny(tmp_path, eval_every=BATCH, **WALKER))
    assert (counters.step, counters.solved_step, counters.best_return) == (128, 32, 400)
    assert core.load_checkpoint(tmp_path / core.BEST)["counters"]["step"] == 64


def test_an_environment_without_a_threshold_is_never_solved(tmp_path, monkeypatch):
    judge = Judge(*[1e9] * 4)
    monkeypatch.setattr(core, "evaluate", judge)
    counters, _ = core.train(tiny(tmp_path, eval_every=BATCH, stop_when_solved=True))
    assert (counters.step, counters.solved_step) == (4 * BATCH, None)
    assert [len(seeds) for seeds in judge.seeds] == [2] * 4


# ---- resume --------------------------------------------------------------------------------------


def stopped_at(iteration: int, out: Path, monkeypatch, **changes) -> None:
    """A run that gets a SIGTERM in that iteration, as from a cluster's scheduler."""
    with monkeypatch.context() as patch:
        before_update(patch, iteration, lambda: signal.raise_signal(signal.SIGTERM))
        assert walker.main(flags(out, **changes)) == 143


def resumed(out: Path, *typed: str) -> list[dict[str, str]]:
    assert walker.main(["--resume", "--out", str(out), *typed]) == 0
    return rows(out)


def test_a_stopped_and_resumed_run_has_every_iteration_once(tmp_path, monkeypatch):
    settings = {"total_timesteps": 7 * BATCH + 1, "eval_every": 3 * BATCH}
    stopped_at(3, tmp_path, monkeypatch, **settings)
    first = rows(tmp_path)
    assert [row["iteration"] for row in first] == ["1", "2", "3"]
    assert core.load_checkpoint(tmp_path / core.LAST)["counters"]["iteration"] == 3

    both = resumed(tmp_path)
    assert both[:3] == first
    assert [row["step"] for row in both] == [str(BATCH * i) for i in range(1, 9)]
    assert [row["iteration"] for row in both] == [str(i) for i in range(1, 9)]
    evaluated = [row["step"] for row in both if row["eval_return_mean"]]
    assert evaluated == [str(BATCH * i) for i in (3, 6, 8)]
    wall = column(tmp_path, "wall_s")
    assert wall == sorted(wall)
    assert wall[3] > wall[2]
    state = core.load_checkpoint(tmp_path / core.LAST)
    assert state["counters"]["iteration"] == 8
    assert state["counters"]["wall_s"] == pytest.approx(wall[-1], rel=1e-4)


def test_the_clock_goes_on_where_it_stopped(tmp_path, monkeypatch):
    stopped_at(2, tmp_path, monkeypatch)
    state = core.load_checkpoint(tmp_path / core.LAST)
    state["counters"]["wall_s"] = 5000.0
    torch.save(state, tmp_path / core.LAST)
    wall = [float(row["wall_s"]) for row in resumed(tmp_path)]
    assert wall[1] < 10 < 5000 < wall[2] <= wall[3] < 5010  # in hundredths


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_learning_rate_is_that_of_the_absolute_step(schedule, tmp_path, monkeypatch):
    share = {
        "linear": lambda done: 1 - done,
        "cosine": lambda done: 0.5 * (1 + np.cos(np.pi * done)),
        "constant": lambda done: 1.0,
    }[schedule]
    settings = {"lr_schedule": schedule, "learning_rate": 2e-3, "total_timesteps": 4 * BATCH}
    stopped_at(2, tmp_path, monkeypatch, **settings)
    expected = [2e-3 * share(i / 4) for i in range(4)]  # each from the start of its iteration
    resumed(tmp_path)
    assert column(tmp_path, "learning_rate") == pytest.approx(expected, rel=1e-5)
    resumed(tmp_path, "--total-timesteps", str(8 * BATCH))
    expected += [2e-3 * share(i / 8) for i in range(4, 8)]  # of the new total
    assert column(tmp_path, "learning_rate") == pytest.approx(expected, rel=1e-5)


def test_the_adaptive_rate_goes_on_where_it_stood(tmp_path):
    core.train(tiny(tmp_path, lr_schedule="adaptive", learning_rate=1e-3, desired_kl=1e-9))
    reached = column(tmp_path, "learning_rate")[-1]
    assert reached < 5e-4
    config = tiny(tmp_path, lr_schedule="adaptive", learning_rate=1e-3, desired_kl=1e-9)
    rate = core.prepare_learner(config, tmp_path / core.LAST).optimizer.param_groups[0]["lr"]
    assert float(rate) == pytest.approx(reached, rel=1e-5)


def test_a_resume_drops_a_torn_last_line_and_rows_past_its_checkpoint(tmp_path):
    core.train(tiny(tmp_path, checkpoint_every=BATCH))
    last, csv = tmp_path / core.LAST, tmp_path / core.METRICS
    before = rows(tmp_path)
    shutil.copy(last.with_name("step_64.pt"), last)  # killed before a later one was written
    with open(csv, "a") as file:
        file.write("160,5,0.1")
    after = resumed(tmp_path)
    assert after[:2] == before[:2]
    assert [row["step"] for row in after] == ["32", "64", "96", "128"]
    assert csv.read_text().startswith(HEADER + "\n")
    assert csv.read_text().count("\n") == 5


def test_a_torn_line_of_a_step_within_the_checkpoint_is_dropped_too(tmp_path):
    core.train(tiny(tmp_path))
    csv = tmp_path / core.METRICS
    whole = csv.read_text()
    csv.write_text(whole + "12")  # of 128: a number as well
    resumed(tmp_path)
    assert csv.read_text() == whole


def test_a_resume_from_an_earlier_checkpoint_takes_the_run_back_there(tmp_path):
    core.train(tiny(tmp_path, checkpoint_every=BATCH))
    folder = tmp_path / "checkpoints_walker"
    assert walker.main(["--resume", str(folder / "step_64.pt"), "--total-timesteps", "96"]) == 0
    assert [row["step"] for row in rows(tmp_path)] == ["32", "64", "96"]
    assert core.load_checkpoint(folder / "last.pt")["counters"]["step"] == 96


def test_two_resumes_of_one_file_are_equal_to_the_bit(tmp_path, monkeypatch):
    a, b = tmp_path / "a", tmp_path / "b"
    stopped_at(2, a, monkeypatch, eval_every=BATCH, total_timesteps=5 * BATCH)
    shutil.copytree(a, b)
    torch.rand(7)
    after_a = resumed(a)
    np.random.rand(3), random.random(), torch.rand(3)
    assert without_clock(after_a) == without_clock(resumed(b))
    for file in (core.LAST, core.BEST):
        assert same(learned(a / file), learned(b / file))


def test_a_resumed_run_steps_in_worlds_of_its_own_step(tmp_path, monkeypatch):
    given = []
    make = core.make_vector_env

    def noted(config, seeds):
        given.append(tuple(seeds))
        return make(config, seeds)

    monkeypatch.setattr(core, "make_vector_env", noted)
    core.train(tiny(tmp_path, checkpoint_every=BATCH))
    for name in ("step_32.pt", "step_32.pt", "step_64.pt"):
        walker.main(["--resume", str(tmp_path / core.LAST).replace("last.pt", name)])
    fresh, at_32, again_at_32, at_64 = given
    assert at_32 == again_at_32
    assert len({*fresh, *at_32, *at_64}) == 6


def test_a_finished_run_resumed_does_nothing_more(tmp_path):
    core.train(tiny(tmp_path, eval_every=2 * BATCH))
    before = rows(tmp_path), learned(tmp_path / core.LAST)
    resumed(tmp_path)
    assert rows(tmp_path) == before[0]
    assert same(learned(tmp_path / core.LAST), before[1])


def test_the_best_so_far_is_remembered_across_a_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(core, "evaluate", Judge(5, 4, 3, 6))
    stopped_at(2, tmp_path, monkeypatch, eval_every=BATCH)
    best = (tmp_path / core.BEST).read_bytes()
    resumed(tmp_path, "--total-timesteps", str(3 * BATCH))
    assert (tmp_path / core.BEST).read_bytes() == best
    resumed(tmp_path, "--total-timesteps", str(4 * BATCH))
    assert core.load_checkpoint(tmp_path / core.BEST)["counters"]["step"] == 4 * BATCH


def test_a_resume_does_not_displace_a_best_that_is_newer_than_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(core, "evaluate", Judge(1, 7, 3, 6, 5, 9))
    core.train(tiny(tmp_path, eval_every=BATCH, checkpoint_every=BATCH, total_timesteps=3 * BATCH))
    best, last = tmp_path / core.BEST, tmp_path / core.LAST
    before = best.read_bytes()
    shutil.copy(last.with_name("step_32.pt"), last)  # killed before the next was written
    assert core.load_checkpoint(last)["counters"]["best_return"] == 1
    counters, _ = core.train(tiny(tmp_path, eval_every=BATCH, total_timesteps=3 * BATCH), last)
    assert (counters.step, counters.best_return) == (3 * BATCH, 7)
    assert best.read_bytes() == before
    core.train(tiny(tmp_path, eval_every=BATCH, total_timesteps=4 * BATCH), last)
    assert core.load_checkpoint(best)["counters"]["best_return"] == 9


def test_a_resume_into_a_new_folder_starts_with_no_best_and_makes_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(core, "evaluate", Judge(1000, 990, 3, 2))
    core.train(tiny(tmp_path / "old", eval_every=BATCH, total_timesteps=2 * BATCH))
    old, last = tree(tmp_path / "old"), tmp_path / "old" / core.LAST
    new = tiny(tmp_path / "new", eval_every=BATCH)
    learner = core.prepare_learner(new, last)
    assert learner.counters.best_return is None
    counters, _ = core.train(new, last)
    assert counters.best_return == 3
    assert core.load_checkpoint(tmp_path / "new" / core.BEST)["counters"]["step"] == 3 * BATCH
    assert tree(tmp_path / "old") == old


# ---- the folder of a run -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "metrics.csv"])
def test_a_fresh_start_is_refused_where_a_run_is(name, tmp_path, capsys):
    file = tmp_path / "checkpoints_walker" / name
    file.parent.mkdir()
    file.write_text("precious")
    before = tree(tmp_path)
    assert walker.main(flags(tmp_path)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for part in (str(tmp_path), "--resume", "--out", "--overwrite"):
        assert part in error
    assert tree(tmp_path) == before


def test_overwrite_removes_exactly_what_a_run_writes(tmp_path):
    runs = [
        *("best.pt", "last.pt", "step_64.pt", "step_1000000.pt", "metrics.csv", "config.json"),
        *("../videos/walker_final.mp4", "../videos/walker_final.gif"),
        "../plots/training_curves.png",
    ]
    others = [
        *("pretrained.pt", "pretrained_hardcore.pt", "pretrained_metrics.csv", "step_x.pt"),
        *("step_.pt", "step_64.pt.bak", "my_step_64.pt", "best.txt", "deeper/last.pt"),
        *("../last.pt", "../videos/pretrained.mp4", "../videos/pretrained.gif"),
        *("../videos/best.mp4", "../plots/pretrained_curves.png", "../notes.md"),
    ]
    for name in runs + others:
        path = tmp_path / "checkpoints_walker" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("of old")
    foreign = {Path(os.path.normpath(f"checkpoints_walker/{name}")).as_posix() for name in others}
    assert walker.main([*flags(tmp_path, total_timesteps=BATCH), "--overwrite"]) == 0
    after = {name: data for name, data in tree(tmp_path).items() if data is not None}
    assert {name for name, data in after.items() if data == b"of old"} == foreign
    assert set(after) - foreign == {LOCK, core.LAST, core.METRICS, core.CONFIG}
    assert len(rows(tmp_path)) == 1


@pytest.mark.parametrize("typed", [["--overwrite"], ["--resume"]], ids=" ".join)
def test_a_folder_in_which_a_run_is_going_is_refused(typed, tmp_path, capsys):
    core.train(tiny(tmp_path, total_timesteps=BATCH))
    before, lock = tree(tmp_path), core.claim_folder(tmp_path, tmp_path / core.LAST, False)
    capsys.readouterr()
    assert walker.main([*flags(tmp_path, total_timesteps=2 * BATCH), *typed]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{tmp_path / 'checkpoints_walker'} is in use" in error
    assert tree(tmp_path) == before
    lock.release()
    assert walker.main([*flags(tmp_path, total_timesteps=2 * BATCH), *typed]) == 0


def test_overwrite_of_nothing_is_a_fresh_start(tmp_path):
    assert walker.main([*flags(tmp_path, total_timesteps=BATCH), "--overwrite"]) == 0
    assert len(rows(tmp_path)) == 1


# ---- when training cannot go on ------------------------------------------------------------------


def test_losses_that_are_not_finite_end_the_run_and_leave_the_checkpoint_of_before(
    tmp_path, monkeypatch, capsys
):
    saved = []
    update, numbers = core.update, itertools.count(1)

    def diverge(agent, *args):
        losses = update(agent, *args)
        if next(numbers) < 3:
            return losses
        saved.append((tmp_path / core.LAST).read_bytes())
        with torch.no_grad():
            agent.raw_std.fill_(float("nan"))
        return losses | {"policy_loss": float("nan")}

    monkeypatch.setattr(core, "update", diverge)
    with pytest.raises(
        core.TrainingError, match="policy_loss is nan in the iteration after step 64"
    ):
        core.train(tiny(tmp_path))
    assert [(tmp_path / core.LAST).read_bytes()] == saved
    assert torch.isfinite(learned(tmp_path / core.LAST)["agent"]["raw_std"]).all()
    assert [row["step"] for row in rows(tmp_path)] == ["32", "64"]


def test_a_run_that_diverges_is_one_line_and_code_1(tmp_path, capsys):
    code = walker.main(flags(tmp_path, learning_rate=1e30, lr_schedule="constant"))
    assert code == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--learning-rate" in error
    agent = learned(tmp_path / core.LAST)["agent"]
    assert all(torch.isfinite(tensor).all() for tensor in agent.values())
    assert rows(tmp_path) == []


# ---- what is shown -------------------------------------------------------------------------------


def shown_row(step: int = BATCH) -> dict[str, float]:
    row = {"step": step, "best_return": 12.5, "return_mean": -3.25, "steps_per_s": 100.0}
    return row | {"wall_s": 90.0}


def test_where_no_terminal_is_the_log_is_plain_lines(tmp_path, capsys):
    log = core.RunLog(tmp_path / "metrics.csv", tiny(), core.Counters(0, 0, 0.0))
    log.row(shown_row())
    assert capsys.readouterr() == ("", "")  # not a line an iteration
    log.said_at -= 60
    log.row(shown_row(2 * BATCH))
    log.close()
    out, err = capsys.readouterr()
    assert err == ""
    assert out == "step 64 of 128: return -3.2, best 12.5, 100 steps/s, 1.5 min\n"


def test_on_a_terminal_a_bar_shows_return_best_rate_and_time_left(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    log = core.RunLog(tmp_path / "metrics.csv", tiny(), core.Counters(0, 0, 0.0))
    log.row(shown_row())
    time.sleep(0.15)  # tqdm draws at most every 0.1 s
    log.row(shown_row(2 * BATCH))
    log.close()
    bar = terminal.getvalue().split("\r")[-1]
    assert "50%" in bar
    for part in ("return -3.2", "best 12.5", "steps/s"):
        assert part in bar
    assert re.search(r"\[\d\d:\d\d<\d\d:\d\d", bar)  # time gone < time left


# ---- signals -------------------------------------------------------------------------------------


def ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.mark.parametrize(
    ("number", "inherited", "code", "films"),
    [
        (signal.SIGINT, None, 130, True),
        (signal.SIGINT, ignore_interrupts, 130, True),  # as in a background job of a script
        (signal.SIGTERM, None, 143, False),
    ],
    ids=["SIGINT", "SIGINT inherited as ignored", "SIGTERM"],
)
def test_a_signal_ends_the_iteration_saves_all_and_plots(number, inherited, code, films, tmp_path):
    typed = flags(tmp_path, total_timesteps=10**9, eval_every=64)
    process = start(tmp_path, *typed, preexec_fn=inherited)
    try:
        csv = tmp_path / core.METRICS
        wait_for(process, lambda: csv.exists() and csv.read_text().count("\n") > 3)
        process.send_signal(number)
        assert process.wait(60) == code
    finally:
        process.kill()
    assert (tmp_path / core.CURVES).exists()
    for film in (tmp_path / core.FILM, (tmp_path / core.FILM).with_suffix(".gif")):
        assert film.exists() is films
    steps = [int(row["step"]) for row in rows(tmp_path)]
    assert steps == [BATCH * i for i in range(1, len(steps) + 1)]
    state = core.load_checkpoint(tmp_path / core.LAST)
    assert state["counters"]["step"] == steps[-1] < 10**9
    assert list(tmp_path.rglob(".*")) == [tmp_path / LOCK]  # no temporary file
    out, err = ((tmp_path / name).read_bytes().decode() for name in ("out.txt", "err.txt"))
    assert "once more to leave at once" in err
    assert "Traceback" not in err
    assert "evaluation" in out
    for text in (out, err):
        assert text.replace("\n", "").isprintable()  # no carriage returns, no escapes


def test_a_second_signal_leaves_at_once_unless_it_came_with_the_first(tmp_path):
    long = flags(tmp_path, rollout_steps=300_000, total_timesteps=10**9)  # minutes an iteration
    process = start(tmp_path, *long)
    try:
        wait_for(process, (tmp_path / core.METRICS).exists)
        time.sleep(1)  # the first iteration has begun
        process.send_signal(signal.SIGINT)
        wait_for(process, lambda: "once more" in (tmp_path / "err.txt").read_text())
        process.send_signal(signal.SIGINT)  # the same keypress, from a launcher that passes it on
        time.sleep(1.2)
        assert process.poll() is None  # the iteration goes on
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 143
    finally:
        process.kill()
    assert core.load_checkpoint(tmp_path / core.LAST)["counters"]["step"] == 0
    assert rows(tmp_path) == []
    assert not (tmp_path / core.CURVES).exists()


def test_signals_are_handled_as_before_once_training_is_over(tmp_path, monkeypatch):
    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.getsignal(number) for number in numbers]
    during = []
    before_update(monkeypatch, 1, lambda: during.extend(map(signal.getsignal, numbers)))
    core.train(tiny(tmp_path, total_timesteps=BATCH))
    assert [signal.getsignal(number) for number in numbers] == before
    assert len(during) == 2
    assert not set(during) & set(before)


# ---- the whole command ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Path:
    """The folder of one iteration of the real command, with short episodes."""
    out = tmp_path_factory.mktemp("smoke")
    typed = "--total-timesteps 4000 --num-envs 64 --rollout-steps 64 --minibatch-size 512 "
    typed += "--env-kwargs max_episode_steps=60 --eval-episodes 3 --seed 5 --device cpu"
    process = start(out, *typed.split())
    assert process.wait(120) == 0, (out / "err.txt").read_text()
    return out


def test_the_command_writes_exactly_the_files_of_a_run(smoke):
    written = {name for name, data in tree(smoke).items() if data is not None}
    assert written == {
        *("checkpoints_walker/best.pt", "checkpoints_walker/last.pt"),
        *("checkpoints_walker/config.json", "checkpoints_walker/metrics.csv", LOCK),
        *("videos/walker_final.mp4", "videos/walker_final.gif", "plots/training_curves.png"),
        *("out.txt", "err.txt"),
    }
    assert (smoke / core.METRICS).read_text().splitlines()[0] == HEADER
    [row] = rows(smoke)
    assert (row["step"], row["eval_episodes"]) == ("4096", "3")
    assert core.load_checkpoint(smoke / core.BEST)["counters"]["step"] == 4096
    for name in ("out.txt", "err.txt"):
        assert (smoke / name).read_bytes().decode().replace("\n", "").isprintable()


def test_the_film_plays_in_browsers_at_the_size_and_speed_of_the_environment(smoke):
    frames = imageio_ffmpeg.read_frames(smoke / core.FILM)
    meta = next(frames)
    assert meta["codec"] == "h264"
    assert meta["pix_fmt"].startswith("yuv420p")
    assert (meta["size"], meta["fps"]) == ((600, 400), 50)
    pictures = [np.frombuffer(frame, np.uint8).reshape(400, 600, 3) for frame in frames]
    assert 2 <= len(pictures) <= 61  # the episode's steps, and where it ended
    assert np.ptp(pictures[0]) > 100
    moved = [np.abs(a.astype(int) - b).max() > 50 for a, b in itertools.pairwise(pictures)]
    assert np.mean(moved) > 0.5


def test_the_gif_is_small_and_as_fast_as_the_film(smoke):
    path = (smoke / core.FILM).with_suffix(".gif")
    assert path.stat().st_size <= 3_000_000
    frames = sum(1 for _ in imageio_ffmpeg.read_frames(smoke / core.FILM)) - 1
    with Image.open(path) as gif:
        assert gif.size == (300, 200)
        assert gif.info["duration"] == 60  # milliseconds: every third frame of 50 a second
        assert gif.info["loop"] == 0
        assert gif.n_frames == -(-frames // 3)
        first = np.asarray(gif.convert("RGB"), int)
        gif.seek(gif.n_frames - 1)
        assert np.abs(first - np.asarray(gif.convert("RGB"), int)).max() > 50


def test_the_curves_are_not_blank(smoke):
    with Image.open(smoke / core.CURVES) as png:
        assert png.format == "PNG"
        assert min(png.size) >= 400
        pixels = np.asarray(png.convert("RGB"))[::3, ::3]
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    assert 0.005 < np.mean(pixels.min(axis=-1) < 200) < 0.5  # drawn on, most of it left white


def test_a_runs_config_runs_again_to_the_same_numbers(smoke, tmp_path):
    assert walker.main(["--config", str(smoke / core.CONFIG), "--out", str(tmp_path)]) == 0
    assert without_clock(rows(tmp_path)) == without_clock(rows(smoke))
    assert (tmp_path / core.CONFIG).read_text() == (smoke / core.CONFIG).read_text()
    assert same(learned(tmp_path / core.LAST), learned(smoke / core.LAST))


# ---- pictures ------------------------------------------------------------------------------------


def test_a_gif_that_would_be_too_large_is_cut_and_still_whole_and_at_the_true_speed(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (96, 80, 120, 3), np.uint8)
    imageio.mimwrite(tmp_path / "a.mp4", noise, fps=50, macro_block_size=2)
    frames = {}
    for limit in (10**9, 60_000, 20_000):
        core._write_gif(tmp_path / "a.mp4", tmp_path / "a.gif", limit)
        assert (tmp_path / "a.gif").stat().st_size <= limit + 5000  # it notices a frame too late
        frames[limit] = imageio.mimread(tmp_path / "a.gif")
        with Image.open(tmp_path / "a.gif") as gif:
            assert gif.info["duration"] == 60
    whole, *cut = frames.values()
    assert len(whole) == 32 > len(cut[0]) > len(cut[1]) >= 4
    for some in cut:
        assert all(np.array_equal(a, b) for a, b in zip(some, whole, strict=False))


class Blind(gym.Env):
    """Cannot render: it takes no render_mode, as an environment of a user's own may."""

    observation_space = gym.spaces.Box(-1, 1, (3,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample() * 0, {}

    def step(self, action):
        obs = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        return obs, float(-(action[0] ** 2)), False, False, {}


class Unfinished(Blind):
    """Takes a render_mode and has no render method: Gymnasium's own raises NotImplementedError."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012

    def __init__(self, render_mode=None):
        self.render_mode = render_mode


class Mute(Unfinished):
    """Its pictures are no pictures."""

    def render(self):
        return None


class Dark(Unfinished):
    """Its pictures fail as MuJoCo's do on a machine without a screen: with an error of its own."""

    class FatalError(Exception):
        pass

    def render(self):
        raise self.FatalError("gladLoadGL error")


@pytest.mark.parametrize("env_class", [Blind, Unfinished, Mute, Dark])
def test_an_environment_that_cannot_render_is_skipped_with_one_line(
    env_class, tmp_path, monkeypatch, capsys, recwarn
):
    monkeypatch.setattr(core, "export", EXPORT)
    gym.register("NoPictures-v0", env_class, max_episode_steps=10)
    try:
        argv = flags(tmp_path, env="NoPictures-v0", env_kwargs=(), total_timesteps=BATCH)
        assert walker.main(argv) == 0
    finally:
        del gym.registry["NoPictures-v0"]
    printed = capsys.readouterr()
    assert sum("no video" in line for line in printed.out.splitlines()) == 1
    assert (printed.err, warned(recwarn)) == ("", [])
    assert (tmp_path / core.CURVES).exists()
    assert not list((tmp_path / core.FILM).parent.iterdir())


def test_the_film_shows_the_best_policy_and_not_the_last(tmp_path, monkeypatch):
    played = []

    def note(act, config, seed, *rest):
        played.append(act(np.ones((1, 3), np.float32)))

    monkeypatch.setattr(core, "export", EXPORT)
    monkeypatch.setattr(core, "record_episode", note)
    monkeypatch.setattr(core, "evaluate", Judge(1, 5, 3, 4))
    core.train(tiny(tmp_path, eval_every=BATCH, learning_rate=0.01))
    actions = []
    for name in (core.BEST, core.LAST):
        learner = core.Learner(tiny())
        learner.load(core.load_checkpoint(tmp_path / name), name, core.POLICY)
        actions.append(learner.act(np.ones((1, 3), np.float32)))
    assert np.array_equal(played[0], actions[0])
    assert not np.array_equal(*actions)


def test_a_metrics_file_that_another_program_spoilt_is_one_line(tmp_path, monkeypatch, capsys):
    def spoil():
        with open(tmp_path / core.METRICS, "a") as file:
            file.write("32,1\n")

    monkeypatch.setattr(core, "export", EXPORT)
    monkeypatch.setattr(core, "film", lambda *args: None)
    before_update(monkeypatch, 3, spoil)
    assert walker.main(flags(tmp_path)) == 1
    line = capsys.readouterr().err.strip()
    assert line.startswith("walker.py: no curves: ")
    assert "metrics.csv, line" in line
    assert core.load_checkpoint(tmp_path / core.LAST)["counters"]["step"] == 4 * BATCH


def test_what_is_not_the_clocks_is_all_the_rest():
    assert set(CLOCK) < set(core.CSV_COLUMNS)
    assert ",".join(core.CSV_COLUMNS) == HEADER


def test_a_full_disk_is_one_line_and_code_1_and_leaves_the_last_good_checkpoint(
    monkeypatch, tmp_path, capsys
):
    write, room = Path.write_bytes, [2]  # writes that still fit

    def write_until_full(path: Path, data: bytes) -> int:
        room[0] -= 1
        if room[0] < 0:
            write(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", write_until_full)
    assert walker.main(flags(tmp_path)) == 1
    said = f"walker.py: {tmp_path / core.LAST} cannot be written: No space left on device\n"
    assert capsys.readouterr().err == said
    assert core.load_checkpoint(tmp_path / core.LAST)["counters"]["iteration"] == 1
    assert list(tmp_path.rglob(".*")) == [tmp_path / LOCK]  # no half-written file is left
