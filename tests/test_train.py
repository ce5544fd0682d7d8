"""Whole runs: the same again, stopped and resumed, and what they write and film."""

import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import imageio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from helpers import (
    BATCH,
    CLOCK,
    before,
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

import viz
import walker
import walker_core as core

PICTURES = {"export": core.export, "draw_curves": core.draw_curves}
HEADER = (
    "step,iteration,wall_s,steps_per_s,collect_s,update_s,eval_s,episodes,return_mean,return_min,"
    "return_max,length_mean,length_min,length_max,eval_return_mean,eval_return_std,eval_episodes,"
    "policy_loss,value_loss,entropy,approx_kl,clip_fraction,explained_variance,action_std,"
    "grad_norm,learning_rate,training_return,desired_kl,failure_cost,action_cost,entropy_coef"
)
LOCK = "checkpoints_walker/.lock"
WALKER = {"env": "BipedalWalker-v3", "env_kwargs": ("max_episode_steps=10",)}  # solved at 300


pytestmark = pytest.mark.usefixtures("no_pictures")  # the tests of `export` put it back


def with_pictures(monkeypatch) -> None:
    for name, function in PICTURES.items():
        monkeypatch.setattr(core, name, function)


@pytest.fixture
def judge(monkeypatch):
    """Has every episode of the next evaluation return the next number of a list."""

    def set_returns(*returns: float) -> list[list[int]]:
        numbers, all_seeds = iter(returns), []

        def evaluate_policy(act, config, seeds):
            all_seeds.append(list(seeds))
            return np.full(len(seeds), next(numbers)), np.full(len(seeds), 10)

        monkeypatch.setattr(core, "evaluate_policy", evaluate_policy)
        return all_seeds

    return set_returns


def counters_of(out: Path, name: str = core.LAST) -> dict:
    return core.load_checkpoint(out / name)["counters"]


# ---- one seed, one run ---------------------------------------------------------------------------


def test_two_runs_are_equal_to_the_bit_with_one_seed_and_differ_with_two(tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    for out, seed in ((a, 3), (b, 3), (c, 4)):
        core.train(tiny(out, eval_every=2 * BATCH, total_timesteps=2 * BATCH, seed=seed, **WALKER))
        np.random.rand(5), torch.rand(5)  # where the generators stand must not matter
    assert without_clock(rows(a)) == without_clock(rows(b))
    for file in (core.LAST, core.BEST):
        assert same(learned(a / file), learned(b / file))
    assert column(a, "policy_loss")[0] != column(c, "policy_loss")[0]
    networks = [core.prepare_learner(tiny(seed=seed), None).agent.actor[0] for seed in (3, 4)]
    assert not torch.equal(networks[0].weight, networks[1].weight)


def test_a_run_is_the_same_whatever_the_number_of_threads(tmp_path):
    """From the first networks on, to the bit."""
    found = []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        core.train(tiny(tmp_path / str(threads), actor_hidden=(64, 64)))
        found.append(without_clock(rows(tmp_path / str(threads))))
    assert found[0] == found[1]


def test_evaluation_does_not_touch_training(tmp_path):
    for every in (0, BATCH):
        core.train(tiny(tmp_path / str(every), eval_every=every))
    never, always = (without_clock(rows(tmp_path / str(every))) for every in (0, BATCH))
    assert all(row["eval_return_mean"] for row in always)
    for row in always:
        row.update({name: "" for name in row if name.startswith("eval_")})
    assert never == always
    assert same(*(learned(tmp_path / str(every) / core.LAST) for every in (0, BATCH)))


# ---- metrics.csv ---------------------------------------------------------------------------------


def test_the_csv_has_one_row_an_iteration_until_the_total_is_reached(tmp_path):
    core.train(tiny(tmp_path, total_timesteps=3 * BATCH + 1))
    text = (tmp_path / core.METRICS_CSV).read_bytes().decode()  # line ends as they are
    assert text.startswith(HEADER + "\n")
    assert text.endswith("\n")
    assert "\r" not in text
    assert column(tmp_path, "step") == [BATCH, 2 * BATCH, 3 * BATCH, 4 * BATCH]
    assert column(tmp_path, "iteration") == [1, 2, 3, 4]
    assert set(CLOCK) < set(core.CSV_COLUMNS)


def test_a_cell_without_a_value_is_empty_and_every_other_is_a_finite_number(tmp_path, monkeypatch):
    monkeypatch.setattr(core, "stagger_episode_starts", lambda *_: None)
    kwargs = ("max_episode_steps=40",)  # an episode ends in the third iteration, not before
    core.train(tiny(tmp_path, env_kwargs=kwargs, eval_every=2 * BATCH))
    ended = {f"{what}_{how}" for what in ("return", "length") for how in ("mean", "min", "max")}
    evaluated = {"eval_return_mean", "eval_return_std", "eval_episodes"}
    for i, row in enumerate(rows(tmp_path), start=1):
        empty = {name for name, cell in row.items() if cell == ""}
        expected = (set() if i == 3 else ended) | (evaluated if i % 2 else set())
        assert empty == expected | ({"training_return"} if i < 3 else set())
        assert all(np.isfinite(float(cell)) for cell in row.values() if cell)
        assert row["episodes"] == ("2" if i == 3 else "0")
    assert rows(tmp_path)[2]["length_mean"] == "40"


def test_the_running_return_gives_each_episode_a_weight_of_a_fiftieth():
    average = core.average_return
    assert average(-math.inf, []) == -math.inf
    assert average(-math.inf, [(4.0, 9), (8.0, 1)]) == 6
    assert average(6.0, []) == 6
    assert average(6.0, [(106.0, 9)]) == pytest.approx(6 + 100 / 50)
    two = average(average(6.0, [(106.0, 9)]), [(106.0, 1)])
    assert average(6.0, [(106.0, 9), (106.0, 1)]) == pytest.approx(two)


def test_a_row_has_the_running_return_after_its_iteration_and_the_settings_that_it_began_with(
    tmp_path,
):
    moving = {"entropy_coef": (0.1, 0.0), "action_cost": (0.0, 1.0, -100.0, 0.0)}
    core.train(tiny(tmp_path, failure_cost=3.0, **moving))
    average, found = -math.inf, rows(tmp_path)
    for i, row in enumerate(found):
        cost = 0 if average == -math.inf else 1 + average / 100
        assert float(row["action_cost"]) == pytest.approx(cost, rel=1e-4)
        assert float(row["entropy_coef"]) == pytest.approx(0.1 * (1 - i / 4))
        assert (row["failure_cost"], row["desired_kl"]) == ("3", "0.01")
        kept, mean = 0.98 ** int(row["episodes"]), float(row["return_mean"])
        average = mean if average == -math.inf else kept * average + (1 - kept) * mean
        assert float(row["training_return"]) == pytest.approx(average, rel=1e-4)
    assert -100 < average < 0
    assert found[0]["action_cost"] != found[-1]["action_cost"]


def test_what_actions_cost_is_learned_and_not_logged(tmp_path):
    for cost in ("0", "5"):
        core.train(tiny(tmp_path / cost, action_cost=cost, total_timesteps=BATCH))
    free, costly = (rows(tmp_path / cost)[0] for cost in ("0", "5"))
    for name in ("return_mean", "return_min", "return_max", "training_return"):
        assert free[name] == costly[name]
    assert free["value_loss"] != costly["value_loss"]


@pytest.mark.slow
def test_the_times_of_an_iteration_fit_into_the_clock(tmp_path):
    core.train(tiny(tmp_path, eval_every=2 * BATCH))
    wall = np.diff([0, *column(tmp_path, "wall_s")])
    collected, updated, evaluated = (column(tmp_path, name) for name in CLOCK[2:])
    assert (np.add(np.add(collected, updated), evaluated) <= wall + 1e-3).all()
    learning = np.add(collected, updated)
    assert column(tmp_path, "steps_per_s") == pytest.approx(BATCH / learning, rel=1e-3)


# ---- cadences ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "batch"), [(100, 48), (7, 32), (1000, 32), (96, 32), (0, 32)])
def test_a_cadence_fires_at_the_first_end_of_an_iteration_at_or_past_each_multiple(every, batch):
    config = tiny(rollout_steps=batch // 2)
    ends = range(batch, 50 * batch + 1, batch)
    multiples = range(every, ends[-1] + 1, every) if every else ()
    due = {min(end for end in ends if end >= multiple) for multiple in multiples}
    assert [end for end in ends if core.is_due(every, end, config)] == sorted(due)


def test_evaluations_and_kept_checkpoints_come_at_their_steps(tmp_path):
    core.train(tiny(tmp_path, total_timesteps=288, eval_every=80, checkpoint_every=100))
    evaluated = [int(row["step"]) for row in rows(tmp_path) if row["eval_return_mean"]]
    assert evaluated == [96, 160, 256, 288]  # and at the end
    kept = sorted((tmp_path / core.LAST).parent.glob("step_*"))
    assert [path.name for path in kept] == ["step_128.pt", "step_224.pt"]
    assert [core.load_checkpoint(path)["counters"]["step"] for path in kept] == [128, 224]


def test_the_last_checkpoint_is_written_where_cheap_or_late(tmp_path):
    learner = core.Learner(tiny(tmp_path))

    def writes(save_s, since):
        (tmp_path / core.LAST).unlink(missing_ok=True)
        learner.save_s, learner.saved_at = save_s, time.perf_counter() - since
        core.save_if_due(learner, False)
        return (tmp_path / core.LAST).exists()

    assert writes(save_s=0.05, since=6)  # under 1 %
    assert not writes(save_s=0.05, since=4)
    assert not writes(save_s=0.5, since=9)
    assert writes(save_s=0.5, since=11)


def test_a_run_ends_with_its_last_checkpoint_and_without_evaluations_has_no_best(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(core, "save_if_due", lambda *args: None)
    core.train(tiny(tmp_path, eval_every=0))
    assert counters_of(tmp_path)["iteration"] == 4
    written = {path.name for path in (tmp_path / core.LAST).parent.iterdir()}
    assert written == {".lock", "config.json", "last.pt", "metrics.csv"}


def test_files_are_written_in_the_order_row_best_last(tmp_path, monkeypatch, judge):
    order, save = [], core.Learner.save

    def note(learner, name):
        csv = tmp_path / core.METRICS_CSV  # not there yet when the first checkpoint is written
        order.append((Path(name).stem, csv.read_text().count("\n") - 1 if csv.exists() else None))
        save(learner, name)
        learner.save_s = 0.0  # so that it is always cheap

    monkeypatch.setattr(core.Learner, "save", note)
    judge(1, 2)
    core.train(tiny(tmp_path, total_timesteps=2 * BATCH, eval_every=BATCH))
    expected = [("last", None), ("best", 1), ("last", 1), ("best", 2), ("last", 2), ("last", 2)]
    assert order == expected


# ---- best and solved -----------------------------------------------------------------------------


def test_best_is_the_policy_of_the_best_evaluation(tmp_path, judge):
    judge(-11, -5, -7, -5)
    counters = core.train(tiny(tmp_path, eval_every=BATCH, checkpoint_every=BATCH))
    best = tmp_path / core.BEST
    assert same(learned(best), learned(best.with_name("step_64.pt")))
    assert not same(learned(best), learned(best.with_name("step_32.pt")))
    saved = counters_of(tmp_path, core.BEST)
    assert (saved["step"], saved["best_return"], counters.best_return) == (64, -5, -5)


def test_solved_means_that_a_hundred_fresh_episodes_reach_the_threshold_too(tmp_path, judge):
    #                 32, 64 and its 100, 96 and its 100: the run is solved there, and ends
    all_seeds = judge(10, 310, 299.9, 305, 300, 1, 1, 1)
    config = tiny(
        tmp_path, total_timesteps=6 * BATCH, eval_every=BATCH, stop_when_solved=True, **WALKER
    )
    counters = core.train(config)
    assert (counters.step, counters.solved_step) == (96, 96)
    assert column(tmp_path, "eval_return_mean") == [10, 310, 305]
    assert column(tmp_path, "eval_episodes") == [2, 2, 2]
    assert counters_of(tmp_path)["solved_step"] == 96

    assert [len(seeds) for seeds in all_seeds] == [2, 2, 100, 2, 100]
    periodic, second_periodic, first, third_periodic, second = all_seeds
    assert periodic == second_periodic == third_periodic
    training = core.env_seeds(config.seed, core.TRAIN, config.num_envs)
    assert len({*periodic, *first, *second, *training}) == 2 + 100 + 100 + 2  # all fresh


@pytest.mark.parametrize(
    ("returns", "stops", "step", "solved_step", "best_return", "best_step"),
    [
        # the confirmation of each is below 300
        ((310, 299, 320, 298, 330, 297, 340, 296), True, 128, None, 299, 32),
        ((280, 310, 250, 100, 100), False, 128, None, 280, 32),  # lucky, and no better
        # solved: 400 and 350 are not confirmed and do not count, the last is
        ((301, 302, 400, 350, 340, 330), False, 128, 32, 330, 128),
        ((301, 302, 300, 303, 304, 299), False, 128, 32, 302, 32),
        ((301, 302), True, 32, 32, 302, 32),
    ],
)
def test_a_lucky_evaluation_neither_solves_nor_displaces_a_better_policy(
    returns, stops, step, solved_step, best_return, best_step, tmp_path, judge
):
    judge(*returns)
    counters = core.train(tiny(tmp_path, eval_every=BATCH, stop_when_solved=stops, **WALKER))
    assert (counters.step, counters.solved_step) == (step, solved_step)
    assert counters.best_return == best_return
    assert counters_of(tmp_path, core.BEST)["step"] == best_step


def test_an_environment_without_a_threshold_is_never_solved(tmp_path, judge):
    all_seeds = judge(*[1e9] * 4)
    counters = core.train(tiny(tmp_path, eval_every=BATCH))
    assert (counters.step, counters.solved_step) == (4 * BATCH, None)
    assert [len(seeds) for seeds in all_seeds] == [2] * 4


# ---- resume --------------------------------------------------------------------------------------


def stop_after(iteration: int, out: Path, monkeypatch, number=signal.SIGTERM, **changes):
    """A run that gets a signal after that iteration, as from a cluster's scheduler."""
    with monkeypatch.context() as patch:
        before(patch, "collect_rollout", iteration + 1, lambda: signal.raise_signal(number))
        assert walker.main(flags(out, **changes)) == 128 + number


def resume(out: Path, *typed: str) -> list[dict[str, str]]:
    assert walker.main(["--resume", "--out", str(out), *typed]) == 0
    return rows(out)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_stopped_and_resumed_run_has_every_iteration_once(number, tmp_path, monkeypatch):
    settings = {"total_timesteps": 7 * BATCH + 1, "eval_every": 5 * BATCH}
    stop_after(3, tmp_path, monkeypatch, number, **settings)
    first, last = rows(tmp_path), core.load_checkpoint(tmp_path / core.LAST)
    assert [row["iteration"] for row in first] == ["1", "2", "3"]
    assert last["counters"]["iteration"] == 3
    last["counters"]["wall_s"] = 5000.0
    torch.save(last, tmp_path / core.LAST)

    both = resume(tmp_path)
    assert both[:3] == first
    assert column(tmp_path, "step") == [BATCH * i for i in range(1, 9)]
    assert column(tmp_path, "iteration") == list(range(1, 9))
    evaluated = [int(row["step"]) for row in both if row["eval_return_mean"]]
    assert evaluated == [BATCH * i for i in (5, 8)]
    wall = column(tmp_path, "wall_s")
    assert wall[2] < 100 < 5000 < wall[3] < wall[-1] < 5100  # the clock goes on
    assert counters_of(tmp_path)["wall_s"] == pytest.approx(wall[-1], rel=1e-4)


def test_an_evaluation_that_a_signal_ended_is_repeated_by_a_resume(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        before(patch, "evaluate_policy", 1, lambda: signal.raise_signal(signal.SIGTERM))
        assert walker.main(flags(tmp_path, eval_every=2 * BATCH)) == 128 + signal.SIGTERM
    assert [row["eval_episodes"] for row in rows(tmp_path)] == [""]
    assert not (tmp_path / core.BEST).exists()
    assert [row["eval_episodes"] for row in resume(tmp_path)] == ["", "2", "", "2"]


@pytest.mark.parametrize("name", ["update", "average_return", "episode_columns"])
def test_what_a_signal_cut_off_half_way_is_not_saved(name, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        before(patch, name, 2, lambda: signal.raise_signal(signal.SIGTERM))
        assert walker.main(flags(tmp_path)) == 128 + signal.SIGTERM
    assert len(rows(tmp_path)) == 1
    assert counters_of(tmp_path)["iteration"] == 1
    assert [row["iteration"] for row in resume(tmp_path)] == ["1", "2", "3", "4"]


def test_the_learning_rate_is_that_of_the_absolute_step_over_the_new_total(tmp_path, monkeypatch):
    stop_after(2, tmp_path, monkeypatch, learning_rate=2e-3)
    resume(tmp_path)
    resume(tmp_path, "--total-timesteps", str(8 * BATCH))
    shares = [1 - i / 4 for i in range(4)] + [1 - i / 8 for i in range(4, 8)]
    assert column(tmp_path, "learning_rate") == pytest.approx([2e-3 * x for x in shares], rel=1e-5)


def test_the_adaptive_rate_goes_on_where_it_stood(tmp_path):
    config = tiny(tmp_path, lr_schedule="adaptive", learning_rate=1e-3, desired_kl=1e-9)
    core.train(config)
    reached = column(tmp_path, "learning_rate")[-1]
    assert reached < 5e-4
    rate = core.prepare_learner(config, tmp_path / core.LAST).optimizer.param_groups[0]["lr"]
    assert float(rate) == pytest.approx(reached, rel=1e-5)


@pytest.mark.parametrize(
    "torn",
    [
        "160,5,0.1",
        "12",  # of 128: within the checkpoint, and a number too
    ],
)
def test_a_resume_drops_a_torn_last_line_and_rows_past_its_checkpoint(torn, tmp_path):
    core.train(tiny(tmp_path, checkpoint_every=BATCH))
    last, csv = tmp_path / core.LAST, tmp_path / core.METRICS_CSV
    before = rows(tmp_path)
    shutil.copy(last.with_name("step_64.pt"), last)  # killed before a later one was written
    with open(csv, "a") as file:
        file.write(torn)
    after = resume(tmp_path)
    assert after[:2] == before[:2]
    assert column(tmp_path, "step") == [32, 64, 96, 128]
    assert csv.read_text().startswith(HEADER + "\n")
    assert csv.read_text().count("\n") == 5


def test_a_resume_from_an_earlier_checkpoint_goes_back_to_it_in_worlds_of_its_own(
    tmp_path, monkeypatch
):
    given, make = [], core.make_vector_env

    def note(config, env, seeds):
        given.append(tuple(seeds))
        return make(config, env, seeds)

    monkeypatch.setattr(core, "make_vector_env", note)
    core.train(tiny(tmp_path, checkpoint_every=BATCH))
    folder = tmp_path / "checkpoints_walker"
    for name in ("step_64.pt", "step_32.pt", "step_32.pt"):
        assert walker.main(["--resume", str(folder / name), "--total-timesteps", "96"]) == 0
        assert column(tmp_path, "step") == [32, 64, 96]
        assert counters_of(tmp_path)["step"] == 96
    fresh, at_64, at_32, again_at_32 = given
    assert at_32 == again_at_32
    assert len({*fresh, *at_32, *at_64}) == 6


def test_a_finished_run_resumed_does_nothing_more(tmp_path):
    core.train(tiny(tmp_path, eval_every=2 * BATCH))
    before = rows(tmp_path), learned(tmp_path / core.LAST)
    resume(tmp_path)
    assert rows(tmp_path) == before[0]
    assert same(learned(tmp_path / core.LAST), before[1])


def test_a_resume_keeps_a_best_that_is_newer_than_its_checkpoint_until_a_better_one(
    tmp_path, judge
):
    judge(1, 7, 3, 6, 5, 9)
    core.train(tiny(tmp_path, eval_every=BATCH, checkpoint_every=BATCH, total_timesteps=3 * BATCH))
    best, last = tmp_path / core.BEST, tmp_path / core.LAST
    before = best.read_bytes()
    shutil.copy(last.with_name("step_32.pt"), last)  # killed before the next was written
    assert counters_of(tmp_path)["best_return"] == 1
    counters = core.train(tiny(tmp_path, eval_every=BATCH, total_timesteps=3 * BATCH), last)
    assert (counters.step, counters.best_return) == (3 * BATCH, 7)
    assert best.read_bytes() == before
    core.train(tiny(tmp_path, eval_every=BATCH, total_timesteps=4 * BATCH), last)
    assert counters_of(tmp_path, core.BEST)["best_return"] == 9


def test_a_resume_into_a_new_folder_makes_a_best_of_its_own(tmp_path, judge):
    judge(1000, 990, 3, 2)
    old, new = tmp_path / "old", tmp_path / "new"
    core.train(tiny(old, eval_every=BATCH, total_timesteps=2 * BATCH))
    before = tree(old)
    counters = core.train(tiny(new, eval_every=BATCH), old / core.LAST)
    assert counters.best_return == 3
    assert counters_of(new, core.BEST)["step"] == 3 * BATCH
    assert tree(old) == before


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
    of_a_run = [
        *("best.pt", "last.pt", "step_64.pt", "step_1000000.pt", "metrics.csv", "config.json"),
        *(".step_64.tmp.pt", ".last.tmp.pt"),  # of a killed run
        *("../videos/walker_final.mp4", "../videos/walker_final.gif", "../videos/step_64.mp4"),
        "../plots/training_curves.png",
    ]
    others = [
        *("pretrained.pt", "pretrained_metrics.csv", "step_x.pt", "step_.pt", "step_64.pt.bak"),
        *("my_step_64.pt", "best.txt", "deeper/last.pt", "../last.pt", "../videos/pretrained.mp4"),
        *("../videos/best.mp4", "../plots/pretrained_curves.png", "../notes.md"),
    ]
    for name in of_a_run + others:
        path = tmp_path / "checkpoints_walker" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("old")
    foreign = {Path(os.path.normpath(f"checkpoints_walker/{name}")).as_posix() for name in others}
    assert walker.main([*flags(tmp_path, total_timesteps=BATCH), "--overwrite"]) == 0
    after = {name: data for name, data in tree(tmp_path).items() if data is not None}
    assert {name for name, data in after.items() if data == b"old"} == foreign
    assert set(after) - foreign == {LOCK, core.LAST, core.METRICS_CSV, core.CONFIG_JSON}
    assert len(rows(tmp_path)) == 1


@pytest.mark.parametrize("typed", ["--overwrite", "--resume"])
def test_a_folder_in_which_a_run_is_going_is_refused(typed, tmp_path, capsys):
    core.train(tiny(tmp_path, total_timesteps=BATCH))
    before, lock = tree(tmp_path), core.FileLock(tmp_path / LOCK)
    lock.acquire()
    capsys.readouterr()
    assert walker.main([*flags(tmp_path, total_timesteps=2 * BATCH), typed]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"--out {tmp_path} is in use" in error
    assert tree(tmp_path) == before
    lock.release()
    assert walker.main([*flags(tmp_path, total_timesteps=2 * BATCH), typed]) == 0


def test_a_run_that_diverges_is_one_line_and_code_1_and_leaves_good_weights(tmp_path, capsys):
    assert walker.main(flags(tmp_path, learning_rate=1e30, lr_schedule="constant")) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--learning-rate" in error
    agent = learned(tmp_path / core.LAST)["agent"]
    assert all(torch.isfinite(tensor).all() for tensor in agent.values())
    assert rows(tmp_path) == []


# ---- what is shown -------------------------------------------------------------------------------


def metrics_row(step: int) -> dict[str, float]:
    times = {"steps_per_s": 100.0, "wall_s": 90.0}
    return {"step": step, "training_return": -3.25, **times}


def test_without_a_terminal_the_log_is_plain_lines_and_not_one_an_iteration(tmp_path, capsys):
    log = core.RunLog(tmp_path / "metrics.csv", [], tiny(), core.Counters())
    log.row(metrics_row(BATCH))
    assert capsys.readouterr() == ("", "")
    log.last_line_at -= 60
    log.row(metrics_row(2 * BATCH))
    log.close()
    line = "step 64 of 128: return -3.2, 100 steps/s, 1.5 min\n"
    assert capsys.readouterr() == (line, "")


def test_on_a_terminal_a_bar_shows_return_rate_and_time_left(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    log = core.RunLog(tmp_path / "metrics.csv", [], tiny(), core.Counters())
    log.row(metrics_row(BATCH))
    time.sleep(0.15)  # tqdm draws at most every 0.1 s
    log.row(metrics_row(2 * BATCH))
    log.close()
    bar = terminal.getvalue().split("\r")[-1]
    for part in ("50%", "return -3.2", "steps/s", "<"):
        assert part in bar


# ---- the whole command ---------------------------------------------------------------------------


def test_the_command_trains_films_plots_and_runs_again_from_its_config(tmp_path):
    out, again = tmp_path / "out", tmp_path / "again"
    typed = "--total-timesteps 250 --num-envs 8 --rollout-steps 32 --minibatch-size 64 --seed 5"
    typed += " --eval-episodes 3 --env-kwargs max_episode_steps=20 --device cpu"
    process = start(out, *typed.split())
    assert process.wait(120) == 0, (out / "err.txt").read_text()
    written = {name for name, data in tree(out).items() if data is not None}
    assert written == {
        *("checkpoints_walker/best.pt", "checkpoints_walker/last.pt"),
        *("checkpoints_walker/config.json", "checkpoints_walker/metrics.csv", LOCK),
        *("videos/walker_final.mp4", "videos/walker_final.gif", "plots/training_curves.png"),
        *("out.txt", "err.txt"),
    }
    [row] = rows(out)
    assert (row["step"], row["eval_episodes"]) == ("256", "3")
    assert counters_of(out, core.BEST)["step"] == 256
    assert (out / "err.txt").read_text() == ""
    assert (out / "out.txt").read_bytes().decode().replace("\n", "").isprintable()

    frames = imageio_ffmpeg.read_frames(out / core.FILM)
    meta = next(frames)
    assert (meta["codec"], meta["size"], meta["fps"]) == ("h264", (600, 400), 50)
    assert meta["pix_fmt"].startswith("yuv420p")  # as browsers need it
    pictures = [np.frombuffer(frame, np.uint8).reshape(400, 600, 3) for frame in frames]
    assert 2 <= len(pictures) <= 20
    moved = [np.abs(a.astype(int) - b).max() > 50 for a, b in itertools.pairwise(pictures)]
    assert np.mean(moved) > 0.5
    with Image.open((out / core.FILM).with_suffix(".gif")) as gif:
        assert gif.size == (300, 200)
        assert gif.info["duration"] == 60  # milliseconds: every third frame of 50 a second
        assert gif.n_frames == -(-len(pictures) // 3)
    with Image.open(out / core.CURVES) as png:
        drawn = np.asarray(png.convert("L")) < 200
    assert 0.005 < drawn.mean() < 0.5  # drawn on, most of it left white

    assert walker.main(["--config", str(out / core.CONFIG_JSON), "--out", str(again)]) == 0
    assert without_clock(rows(again)) == without_clock(rows(out))
    one, other = (json.loads((run / core.CONFIG_JSON).read_text()) for run in (again, out))
    for name in ("_about", "out"):
        assert one.pop(name) != other.pop(name)
    assert one == other
    assert same(learned(again / core.LAST), learned(out / core.LAST))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_saves_all_and_plots(number, tmp_path):
    process = start(tmp_path, *flags(tmp_path, total_timesteps=10**9, eval_every=64))
    try:
        csv = tmp_path / core.METRICS_CSV
        wait_for(process, lambda: csv.exists() and csv.read_text().count("\n") > 3)
        process.send_signal(number)
        assert process.wait(60) == 128 + number
    finally:
        process.kill()
    assert (tmp_path / core.CURVES).exists()
    steps = column(tmp_path, "step")
    assert steps == [BATCH * i for i in range(1, len(steps) + 1)]
    assert steps[-1] - 10_000 < counters_of(tmp_path)["step"] <= steps[-1] < 10**9
    assert list(tmp_path.rglob(".*")) == [tmp_path / LOCK]  # no temporary file
    errors = (tmp_path / "err.txt").read_text()
    assert "stopped: --resume goes on" in (tmp_path / "out.txt").read_text()
    assert "Traceback" not in errors


SIGNAL_IN_A_FORK = """
import os, signal, sys
import walker
numbers = [signal.SIGTERM]
os.register_at_fork(after_in_parent=lambda: numbers and signal.raise_signal(numbers.pop()))
sys.exit(walker.main())
"""


def test_a_signal_while_workers_are_forked_is_not_lost(tmp_path):
    argv = flags(tmp_path, total_timesteps=10 * BATCH, eval_every=BATCH)
    run = subprocess.run(
        [sys.executable, "-c", SIGNAL_IN_A_FORK, *argv],
        cwd=Path(walker.__file__).parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 128 + signal.SIGTERM
    assert run.stderr == ""
    assert "stopped: --resume goes on" in run.stdout


# ---- pictures ------------------------------------------------------------------------------------


def test_a_gif_that_would_be_too_large_is_cut_and_still_whole_and_at_the_true_speed(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (48, 80, 120, 3), np.uint8)
    frames = []
    for limit in (10**9, 20_000):
        episode = [(SimpleNamespace(render=lambda frame=frame: frame), {}) for frame in noise]
        viz.film(episode, 50, tmp_path / "a.mp4", tmp_path / "a.gif", max_bytes=limit)
        assert (tmp_path / "a.gif").stat().st_size <= limit + 5000  # it notices a frame too late
        frames.append(imageio.mimread(tmp_path / "a.gif"))
        with Image.open(tmp_path / "a.gif") as gif:
            assert gif.info["duration"] == 60
    whole, cut = frames
    assert len(whole) == 16 > len(cut) >= 4
    assert all(np.array_equal(a, b) for a, b in zip(cut, whole, strict=False))


class Blind(gym.Env):
    """Cannot render: it takes no render_mode, as an environment of a user's own may."""

    observation_space = gym.spaces.Box(-1, 1, (3,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(3, np.float32), {}

    def step(self, action):
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), 1.0, False, False, {}


class Unfinished(Blind):
    """Takes a render_mode and has no render method: Gymnasium's own raises NotImplementedError."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012

    def __init__(self, render_mode=None):
        self.render_mode = render_mode


class Mute(Unfinished):
    """Its pictures are no pictures."""

    def render(self):
        return None


@pytest.mark.slow
@pytest.mark.parametrize("env_class", [Blind, Unfinished, Mute])
def test_an_environment_that_cannot_render_is_skipped_with_one_line(
    env_class, tmp_path, monkeypatch, capsys, recwarn
):
    with_pictures(monkeypatch)
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


def test_the_film_shows_the_best_policy_and_not_the_last(tmp_path, monkeypatch, judge):
    obs, filmed = np.ones((1, 3), np.float32), []
    with_pictures(monkeypatch)
    monkeypatch.setattr(viz, "plot_training_curves", lambda *args: None)
    monkeypatch.setattr(
        core, "record_episode", lambda learner, *_, **__: filmed.append(learner.act(obs))
    )
    judge(1, 5, 3, 4)
    core.train(tiny(tmp_path, eval_every=BATCH, learning_rate=0.01))
    best, last = (core.load_learner(tmp_path / name).act(obs) for name in (core.BEST, core.LAST))
    assert np.array_equal(filmed[0], best)
    assert not np.array_equal(best, last)


def test_a_metrics_file_that_another_program_spoiled_is_one_line(tmp_path, monkeypatch, capsys):
    def spoil():
        with open(tmp_path / core.METRICS_CSV, "a") as file:
            file.write("32,1\n")

    with_pictures(monkeypatch)
    monkeypatch.setattr(core, "film_policy", lambda *args: None)
    before(monkeypatch, "update", 3, spoil)
    assert walker.main(flags(tmp_path)) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert core.CURVES in error
    assert core.METRICS_CSV in error
    assert counters_of(tmp_path)["step"] == 4 * BATCH
