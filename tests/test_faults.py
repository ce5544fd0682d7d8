"""Numbers that go wrong, and environments that raise, hang or die: one line, and nothing is lost.

Whatever happens, the run ends with code 1, the message says where it happened, last.pt is loadable
and finite, best.pt is as it was, and no process is left.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
import toy_envs
from helpers import BATCH, flags, learned, rows, same, start, tiny, wait_for, warned

import walker
import walker_core as core

pytestmark = pytest.mark.usefixtures("no_pictures")
slow = pytest.mark.slow

FAULTY, DISCRETE = "Toy/Faulty-v0", "Toy/FaultyDiscrete-v0"
SEEDS = core.env_seeds(1, core.TRAIN, 4)  # of the four environments of the runs below


class FaultyDiscrete(toy_envs.Faulty):
    """`Faulty` with three actions: left, nothing, right."""

    action_space = gym.spaces.Discrete(3)

    def step(self, action):
        return super().step(np.array([action - 1.0]))


gym.register(DISCRETE, FaultyDiscrete, max_episode_steps=10)


def faulty(fault: str, seed: int, at: int = 3) -> dict[str, Any]:
    """Settings of a run in which the environment that gets this seed has this fault."""
    kwargs = f"fault={fault!r}", f"seed={seed}", f"at={at}"
    return {"env": FAULTY, "env_kwargs": kwargs, "num_envs": 4, "rollout_steps": BATCH // 4}


def is_finite(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return bool(torch.isfinite(value).all())
    if isinstance(value, dict):
        return all(map(is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(is_finite, value))
    # -inf: a return that there is not yet
    return not isinstance(value, float) or math.isfinite(value) or value == -math.inf


def last_iteration(out: Path) -> int:
    """The iteration of last.pt, which is whole and finite."""
    state = core.load_checkpoint(out / core.LAST, env=FAULTY)
    assert is_finite(state)
    return state["counters"]["iteration"]


def failure(out: Path, capfd, **settings: Any) -> str:
    """The message of a run that fails with code 1, one line, and no worker left."""
    capfd.readouterr()
    assert walker.main(flags(out, **settings)) == 1
    error = capfd.readouterr().err
    assert error.startswith("walker.py: ")
    assert error.count("\n") == 1, error
    assert multiprocessing.active_children() == []
    return error.removeprefix("walker.py: ")


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("env", [FAULTY, DISCRETE])
@pytest.mark.parametrize(
    "fault",
    ["obs nan", "reward inf", *(pytest.param(f, marks=slow) for f in ("obs -inf", "reward nan"))],
)
def test_a_number_that_is_not_finite_is_named_with_its_environment_and_seed(
    fault, env, tmp_path, capfd
):
    settings = {**faulty(fault, SEEDS[2], at=20), "env": env}
    message = failure(tmp_path, capfd, **settings, eval_every=BATCH)
    # its first episode is cut after 8 steps, the second has 10: the 20th is in the third rollout
    assert f"environment 2, first reset with seed {SEEDS[2]}: " in message
    assert fault.split()[0] in message
    assert "not finite" in message
    assert [row["step"] for row in rows(tmp_path)] == ["32", "64"]
    assert last_iteration(tmp_path) <= 2
    assert core.load_checkpoint(tmp_path / core.BEST)["counters"]["step"] in (32, 64)


@pytest.mark.parametrize("at", [0, 1], ids=["first reset", "a later reset"])
@pytest.mark.parametrize("env", [FAULTY, DISCRETE])
def test_an_observation_of_a_reset_that_is_not_finite_is_named(env, at, tmp_path, capfd):
    settings = {**faulty("obs nan in reset", SEEDS[3], at), "env": env}
    message = failure(tmp_path, capfd, **settings)
    assert f"environment 3, first reset with seed {SEEDS[3]}" in message
    assert "observation is not finite" in message
    if at:
        assert last_iteration(tmp_path) <= 1


@pytest.mark.parametrize("what", ["observation", "reward"])
def test_numbers_of_environments_that_nobody_looks_at_alone_are_looked_at_together(
    what, monkeypatch
):
    collection = toy_envs.Collection(toy_envs.script_config((3,)))
    step = collection.envs.step

    def spoiled(actions):
        obs, rewards, *rest = step(actions)
        (obs if what == "observation" else rewards)[2] = math.inf
        return obs, rewards, *rest

    monkeypatch.setattr(collection.envs, "step", spoiled)  # as EnvPool's may be
    with pytest.raises(core.TrainingError, match=f"the {what} is not finite"):
        collection.rollout()


def poison(what: str, monkeypatch):
    """Have one number of the fourth minibatch of the second iteration go wrong."""
    loss_of, update, count = core.ppo_loss, core.update, itertools.count(1)
    value = float(what.split()[1])

    def bad_loss(*args):
        loss, metrics = loss_of(*args)
        return (loss * value if next(count) == 8 else loss), metrics

    def bad_gradient(agent, *args):
        if next(count) == 2:
            agent.critic[0].weight.register_hook(lambda gradient: gradient * value)
        return update(agent, *args)

    if "loss" in what:
        monkeypatch.setattr(core, "ppo_loss", bad_loss)
    else:
        monkeypatch.setattr(core, "update", bad_gradient)


@pytest.mark.parametrize("what", ["loss nan", "gradient inf"])
def test_a_loss_or_gradient_that_is_not_finite_leaves_the_checkpoints_of_before(
    what, tmp_path, capfd, monkeypatch
):
    poison(what, monkeypatch)
    message = failure(tmp_path, capfd, eval_every=BATCH)
    assert "lower --learning-rate" in message
    assert "nan" in message
    assert last_iteration(tmp_path) <= 1
    assert [row["step"] for row in rows(tmp_path)] == ["32"]
    assert is_finite(core.load_checkpoint(tmp_path / core.BEST))


# ---- environments that raise, hang or die --------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "at"),
    [("raise -", 12), ("raise - in reset", 3), ("raise - in reset", 0)],
    ids=["in a step", "in a later reset", "in the first reset"],
)
def test_an_environment_that_raises_is_named_with_its_seed_and_error(fault, at, tmp_path, capfd):
    message = failure(tmp_path, capfd, **faulty(fault, SEEDS[1], at))
    assert f"environment 1, first reset with seed {SEEDS[1]}: " in message
    assert "RuntimeError: the sky fell down" in message
    if at:
        assert last_iteration(tmp_path) <= 1
        resume = ["--resume", "--out", str(tmp_path)]
        assert walker.main(resume) == 0  # in other worlds
        assert [row["step"] for row in rows(tmp_path)] == ["32", "64", "96", "128"]


@pytest.mark.parametrize("fault", ["raise -", "reward nan", "obs nan", "die -"])
def test_an_environment_that_fails_in_an_evaluation_is_named_with_its_seed(fault, tmp_path, capfd):
    """Unless it takes the process that plays along: then nobody knows which it was."""
    seed = core.env_seeds(1, core.EVALUATE, 2)[1]
    message = failure(tmp_path, capfd, **faulty(fault, seed, at=4), eval_every=2 * BATCH)
    named = f"environment, first reset with seed {seed}: "
    assert ("a worker process died" if fault == "die -" else named) in message
    assert fault.split()[0].replace("raise", "RuntimeError").replace("die", "process") in message
    assert last_iteration(tmp_path) <= 2
    assert not (tmp_path / core.BEST).exists()


# ---- processes -----------------------------------------------------------------------------------


def processes_of(session: int) -> list[int]:
    """Those of a session, but for those that have ended and only wait to be noticed."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, number = path.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(number) == session and state not in "ZX":
            found.append(int(path.parent.name))
    return found


HANGING = f"toy_envs:{FAULTY}"


def exit_code_after(send, number: int, out: Path) -> int:
    """Start a run, signal while an evaluation of it hangs; no process may be left."""
    settings = {**faulty("hang -", core.env_seeds(1, core.EVALUATE, 2)[1]), "env": HANGING}
    typed = flags(out, **settings, eval_every=BATCH)
    process = start(out, *typed, start_new_session=True)
    try:
        # only an evaluation has processes of its own after the first last.pt
        began = (out / core.LAST).exists
        wait_for(process, lambda: began() and len(processes_of(process.pid)) > 1)
        time.sleep(1)  # into the step that hangs
        assert len(processes_of(process.pid)) > 1
        send(process.pid, number)
        code = process.wait(60)
        wait_until = time.monotonic() + 10
        while (left := processes_of(process.pid)) and time.monotonic() < wait_until:
            time.sleep(0.05)
        assert left == []
    finally:
        process.kill()
        process.wait()
        for pid in processes_of(process.pid):
            os.kill(pid, signal.SIGKILL)
    return code


NEEDS_PROC = pytest.mark.skipif(not Path("/proc").exists(), reason="finds processes in /proc")


@slow
@NEEDS_PROC
def test_no_worker_is_left_when_the_main_process_is_killed_not_even_one_that_hangs(tmp_path):
    assert exit_code_after(os.kill, signal.SIGKILL, tmp_path) == -9


@slow
@NEEDS_PROC
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_workers_too_as_from_a_scheduler_ends_the_run_as_any_signal(
    number, tmp_path
):
    assert exit_code_after(os.killpg, number, tmp_path) == 128 + number
    assert "Traceback" not in (tmp_path / "err.txt").read_text()
    assert rows(tmp_path) == []  # the evaluation belongs to the first
    state = core.load_checkpoint(tmp_path / core.LAST, HANGING)
    assert is_finite(state)
    assert state["counters"]["iteration"] == 0


# ---- unusual, but right --------------------------------------------------------------------------


def test_actions_without_bounds_reach_the_environment_as_they_are(tmp_path, recwarn, monkeypatch):
    config = tiny(tmp_path, env="Toy/Wide-v0", env_kwargs=(), init_std=5.0, eval_every=2 * BATCH)
    made, make = [], core.make_env

    def noted(*args, **kwargs):
        made.append(make(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(core, "make_env", noted)
    core.train(config)
    assert max(env.unwrapped.largest for env in made) > 5
    assert is_finite(core.load_checkpoint(tmp_path / core.LAST))
    assert warned(recwarn) == []


@slow
@pytest.mark.parametrize("norm_obs", [True, False], ids=["normalized", "raw"])
def test_observations_in_double_precision_learn_the_same(norm_obs, tmp_path):
    for bits in ("32", "64"):
        env = {"env": "Toy/Wide-v0", "env_kwargs": (f"bits={bits}",)}
        core.train(tiny(tmp_path / bits, norm_obs=norm_obs, eval_every=BATCH, **env))
    one, other = (learned(tmp_path / bits / core.LAST) for bits in ("32", "64"))
    assert same(one, other)
