"""A resumed run learns, to the bit, as one in one piece that begins anew in its worlds there.

Not in a checkpoint are the worlds themselves: a resume starts fresh ones, seeded by its step. All
else must go on: so a run that was never stopped, whose worlds are replaced by the same rule at the
same step, must have the same numbers to its end.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_envs  # noqa: F401
from helpers import BATCH, learned, rows, same, tiny, train_and_interrupt, without_clock

import walker
import walker_core as core

pytestmark = pytest.mark.usefixtures("no_pictures")
EXPORT = core.export  # before a fixture takes it away

ITERATIONS = 5
ADAPTIVE = {"lr_schedule": "adaptive", "learning_rate": 1e-3, "desired_kl": 1e-4}
CASES = {
    "truncations": {},  # Pendulum's, every 10 steps: a rollout of 16 ends within an episode
    "terminations": {"env": "Toy/Falls-v0", "env_kwargs": ()},  # after 1 to 40 steps
    "adaptive rate": ADAPTIVE,
    "moving by the return": {
        **ADAPTIVE,
        "desired_kl": (1e-2, 0.0),
        "entropy_coef": (0.1, 0.0, -100.0, 0.0),
        "action_cost": (0.0, 1.0, -100.0, 0.0),
        "failure_cost": (1.0, 9.0, -80.0, -60.0),
    },
    "cosine, LayerNorm, two clips": {
        **{"lr_schedule": "cosine", "layer_norm": True, "clip_obs": 1.5, "clip_reward": (-1, 2)},
        **{"target_kl": 1e-3, "entropy_coef": 0.01},
    },
    "nothing normalized": {"norm_obs": False, "norm_reward": False, "lr_schedule": "constant"},
}
STOPS = [(case, ks) for case in CASES for ks in ((2,), (4,), (1, 4))]
FAST = [("truncations", (1, 4)), ("moving by the return", (2,))]
SLOW = [pytest.param(*stop, marks=pytest.mark.slow) for stop in STOPS if stop not in FAST]


def config_of(out: Path, case: dict[str, Any]) -> core.Config:
    settings = {"total_timesteps": ITERATIONS * BATCH, "eval_every": 3 * BATCH, "seed": 3}
    return tiny(out, **settings, **case)


def train_in_one_piece(config: core.Config, ks: tuple[int, ...], monkeypatch) -> list[np.ndarray]:
    """Train without a stop, in new worlds after k iterations, for each k.

    Returns for each how long the episodes under way were, and 1 for one that had just ended.
    """
    collect, cut_off, replaced, done = core.collect_rollout, [], [], 0

    def collect_in_new_worlds(envs, agent, normalizer, rollout, *rest):
        nonlocal done
        if done in ks:
            cut_off.append(rollout.episode_length + rollout.ended)
            step = done * config.batch_size
            seeds = core.env_seeds(config.seed, core.TRAIN, config.num_envs, step=step)
            env = core.make_env(config)
            envs, obs = core.make_vector_env(config, env, seeds)
            replaced.append(envs)
            fresh = core.Rollout(config, env, seeds, normalizer.normalize(obs))
            vars(rollout).update(vars(fresh))
        done += 1
        return collect(replaced[-1] if replaced else envs, agent, normalizer, rollout, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(core, "collect_rollout", collect_in_new_worlds)
        core.train(config)
    for envs in replaced:
        envs.close()
    return cut_off


def train_with_stops(config: core.Config, ks: tuple[int, ...]) -> None:
    """Train, interrupted after each iteration k and resumed from last.pt."""
    last, before = Path(config.out, core.LAST), 0
    for k in ks:
        train_and_interrupt(config, k - before, last if before else None)
        assert core.load_checkpoint(last)["counters"]["iteration"] == k
        random.random(), np.random.rand(3), torch.rand(7)  # a new process has other generators
        before = k
    assert core.train(config, last).iteration == ITERATIONS


def without_clocks(counters: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in counters.items() if name != "wall_s"}


@pytest.mark.parametrize(("case", "ks"), FAST + SLOW, ids=str)
def test_a_resumed_run_equals_one_in_one_piece_to_the_bit(case, ks, tmp_path, monkeypatch):
    whole, stopped = (config_of(tmp_path / name, CASES[case]) for name in ("whole", "stopped"))
    cut_off = train_in_one_piece(whole, ks, monkeypatch)
    assert len(cut_off) == len(ks)
    assert all(lengths.all() for lengths in cut_off)  # none was about to begin by itself
    train_with_stops(stopped, ks)
    assert len(rows(tmp_path / "whole")) == ITERATIONS
    assert without_clock(rows(tmp_path / "stopped")) == without_clock(rows(tmp_path / "whole"))
    for file in (core.LAST, core.BEST):
        one, other = (Path(config.out, file) for config in (stopped, whole))
        assert same(learned(one), learned(other))
        one, other = (core.load_checkpoint(path)["counters"] for path in (one, other))
        assert without_clocks(one) == without_clocks(other)


@pytest.mark.slow
def test_a_resume_with_other_cadences_learns_the_same(tmp_path, monkeypatch):
    config = config_of(tmp_path / "a", {})
    train_in_one_piece(config, (2,), monkeypatch)
    other = dataclasses.replace(config, out=str(tmp_path / "b"), eval_every=0)
    train_and_interrupt(other, 2)
    changed = {"eval_every": BATCH, "eval_episodes": 3, "checkpoint_every": BATCH}
    core.train(dataclasses.replace(other, **changed), tmp_path / "b" / core.LAST)
    assert same(learned(tmp_path / "a" / core.LAST), learned(tmp_path / "b" / core.LAST))


def test_what_a_resume_starts_from_is_all_that_the_stopped_run_had(tmp_path, monkeypatch):
    """To the bit, in memory: nothing is rounded on the way through the file."""
    config, held = config_of(tmp_path, ADAPTIVE), {}
    save = core.Learner.save

    def noted(learner, name):
        save(learner, name)
        held[name] = snapshot(learner)

    monkeypatch.setattr(core.Learner, "save", noted)
    core.train(config)
    learner = core.prepare_learner(config, tmp_path / core.LAST)
    assert same(snapshot(learner), held[core.LAST])


def snapshot(learner: core.Learner) -> dict[str, Any]:
    state = {part: dict(getattr(learner, part).state_dict()) for part in core.LEARNED}
    return copy.deepcopy({**state, "counters": vars(learner.counters)})


# ---- files ---------------------------------------------------------------------------------------


def test_a_resume_drops_the_rows_after_its_checkpoint_and_a_torn_last_line(tmp_path):
    core.train(tiny(tmp_path, total_timesteps=2 * BATCH))
    metrics = tmp_path / core.METRICS_CSV
    good = metrics.read_text()
    after = good.splitlines()[-1].replace(f"{2 * BATCH},2,", f"{3 * BATCH},3,", 1)
    metrics.write_text(f"{good}{after}\n{BATCH // 10}")  # torn: looks like an early step
    core.train(tiny(tmp_path, total_timesteps=2 * BATCH), tmp_path / core.LAST)  # nothing to do
    assert metrics.read_text() == good
    metrics.write_text(f"{good}{after}\n{BATCH // 10}")  # torn: looks like an early step
    core.train(tiny(tmp_path, total_timesteps=3 * BATCH), tmp_path / core.LAST)
    assert metrics.read_text().startswith(good)
    assert [row["iteration"] for row in rows(tmp_path)] == ["1", "2", "3"]
    assert rows(tmp_path)[-1] != dict(zip(core.CSV_COLUMNS, after.split(","), strict=True))


@pytest.mark.parametrize("damage", [b"\xff\xfe\n", b"one,two\n", b"x" * 200_000 + b"\n"])
def test_a_damaged_metrics_csv_is_named_and_left_alone(damage, tmp_path, capsys):
    core.train(tiny(tmp_path))
    metrics = tmp_path / core.METRICS_CSV
    damaged = metrics.read_bytes() + damage
    metrics.write_bytes(damaged)
    capsys.readouterr()
    assert walker.main(["--resume", "--out", str(tmp_path), "--total-timesteps", "256"]) == 2
    error = capsys.readouterr().err
    assert str(metrics) in error
    assert error.count("\n") == 1
    assert metrics.read_bytes() == damaged


def test_an_iteration_writes_its_row_then_best_then_last(tmp_path, monkeypatch):
    """So that a run killed in between has the row of every checkpoint, and a best of its last."""
    written, row, save = [], core.RunLog.row, core.Learner.save

    def noted_row(log, values):
        row(log, values)
        written.append(f"row {len(rows(tmp_path))}")  # flushed: another reader sees it

    def noted_save(learner, name):
        save(learner, name)
        written.append(name)
        learner.saved_at = -math.inf  # due after every iteration

    monkeypatch.setattr(core.RunLog, "row", noted_row)
    monkeypatch.setattr(core.Learner, "save", noted_save)
    scores = iter([1.0, 2.0])
    monkeypatch.setattr(
        core, "evaluate_policy", lambda act, config, seeds: (np.full(2, next(scores)), seeds)
    )
    core.train(tiny(tmp_path, total_timesteps=2 * BATCH, eval_every=BATCH))
    first = [core.LAST, "row 1", core.BEST, core.LAST]
    assert written == [*first, "row 2", core.BEST, core.LAST, core.LAST]


# ---- What could get lost after the last step, or in a copy ---------------------------------------


def test_ctrl_c_during_the_last_film_leaves_the_last_state_not_the_best(tmp_path, monkeypatch):
    returns = iter([5.0, 1.0, 1.0])
    monkeypatch.setattr(core, "evaluate_policy", lambda *_: (np.full(2, next(returns)), None))

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(core, "export", EXPORT)
    monkeypatch.setattr(core, "record_episode", stop)
    config = tiny(tmp_path, eval_every=BATCH, total_timesteps=3 * BATCH)
    with pytest.raises(KeyboardInterrupt):
        core.train(config)
    assert core.load_checkpoint(tmp_path / core.BEST)["counters"]["step"] == BATCH
    assert core.load_checkpoint(tmp_path / core.LAST)["counters"]["step"] == 3 * BATCH
    assert not same(learned(tmp_path / core.LAST), learned(tmp_path / core.BEST))


def test_a_copied_last_pt_is_enough_to_go_on(tmp_path):
    core.train(tiny(tmp_path / "first", total_timesteps=2 * BATCH))
    copied = tmp_path / "second" / core.LAST
    copied.parent.mkdir(parents=True)
    copied.write_bytes((tmp_path / "first" / core.LAST).read_bytes())
    with pytest.raises(core.UserError, match="holds a run"):
        core.train(tiny(tmp_path / "second"))
    more = tiny(tmp_path / "second", total_timesteps=3 * BATCH)
    assert core.train(more, copied).step == 3 * BATCH
