"""Numbers that go wrong, and environments that raise, hang or die: one line, and nothing is lost.

Whatever happens, the run ends with code 1, what is said tells where, last.pt is loadable and
finite, best.pt is as it was, and no process is left.
"""

from __future__ import annotations

import itertools
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_envs  # noqa: F401
from helpers import BATCH, flags, learned, rows, same, start, tiny, wait_for, warned

import walker
import walker_core as core

pytestmark = pytest.mark.usefixtures("no_pictures")

FAULTY = "Toy/Faulty-v0"
NOT_FINITE = "ValueError('an observation or reward is not finite')"
FELL = r"RuntimeError('the sky\nfell down')"
SEEDS = core.env_seeds(1, core.TRAIN, 4)  # of the four environments of the runs below


def faulty(fault: str, seed: int, at: int = 3) -> dict[str, Any]:
    """Settings of a run in which the environment that gets this seed has this fault."""
    kwargs = f"fault={fault!r}", f"seed={seed}", f"at={at}"
    return {"env": FAULTY, "env_kwargs": kwargs, "num_envs": 4, "rollout_steps": BATCH // 4}


def is_finite(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return bool(torch.isfinite(value).all())
    values = value.values() if isinstance(value, dict) else value
    if isinstance(value, dict | list | tuple):
        return all(map(is_finite, values))
    return not isinstance(value, float) or math.isfinite(value)


def last_iteration(out: Path) -> int:
    """The iteration of last.pt, which is whole and finite."""
    state = core.load_checkpoint(out / core.LAST, env=FAULTY)
    assert is_finite(state)
    return state["counters"]["iteration"]


def failed(out: Path, capsys, **settings: Any) -> str:
    """What is said of a run that fails, once everything else about it is right."""
    assert walker.main(flags(out, **settings)) == 1
    said = capsys.readouterr().err
    if settings.get("vector_env") == "async":  # Gymnasium's own log is before it
        said = said[said.rindex("walker.py: ") :]
    assert said.count("\n") == 1, said
    assert said.startswith("walker.py: ")
    return said.removeprefix("walker.py: ").rstrip("\n")


# ---- numbers -------------------------------------------------------------------------------------

BACKENDS = pytest.mark.parametrize("backend", ["sync", "async"])


@BACKENDS
@pytest.mark.parametrize("fault", ["obs nan", "obs inf", "obs -inf", "reward nan", "reward -inf"])
def test_a_number_of_an_environment_that_is_not_finite_is_named_with_its_place(
    fault, backend, tmp_path, capsys, monkeypatch
):
    def save_now(learner, *args, save=core.save):
        learner.saved_at = -np.inf  # last.pt is due after every iteration, however short
        save(learner, *args)

    monkeypatch.setattr(core, "save", save_now)
    settings = faulty(fault, SEEDS[2], at=20) | {"vector_env": backend, "eval_every": BATCH}
    said = failed(tmp_path, capsys, **settings)
    assert said == f"environment 2, first reset with seed {SEEDS[2]}: {NOT_FINITE}"
    assert last_iteration(tmp_path) == 2  # rollouts of 8, with reset rows: the third has step 20
    assert [row["step"] for row in rows(tmp_path)] == ["32", "64"]
    assert core.load_checkpoint(tmp_path / core.BEST)["counters"]["step"] in (32, 64)


@pytest.mark.parametrize("at", [0, 1], ids=["first reset", "a reset later"])
def test_an_observation_of_a_reset_that_is_not_finite_is_named_with_its_place(at, tmp_path, capsys):
    said = failed(tmp_path, capsys, **faulty("obs nan in reset", SEEDS[3], at))
    where = f"environment 3, first reset with seed {SEEDS[3]}"
    assert said == f"{where}: {NOT_FINITE}"
    if at:
        assert last_iteration(tmp_path) == at
    else:
        assert not any(tmp_path.iterdir())  # nothing had begun


def poisoned(what: str, monkeypatch) -> None:
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


@pytest.mark.parametrize("what", ["loss nan", "loss inf", "gradient nan", "gradient inf"])
def test_a_loss_or_gradient_that_is_not_finite_is_named_and_leaves_the_checkpoints_of_before(
    what, tmp_path, capsys, monkeypatch
):
    poisoned(what, monkeypatch)
    said = failed(tmp_path, capsys, eval_every=BATCH)
    assert "grad_norm is " in said or "_loss is nan" in said or "entropy is nan" in said
    assert "in the iteration after step 32" in said
    assert last_iteration(tmp_path) <= 1
    assert [row["step"] for row in rows(tmp_path)] == ["32"]
    best = core.load_checkpoint(tmp_path / core.BEST)
    assert is_finite(best)
    assert best["counters"]["step"] == 32


# ---- environments that raise ---------------------------------------------------------------------


@BACKENDS
@pytest.mark.parametrize("k", [0, 1, 3])
def test_an_environment_that_raises_in_a_step_is_named_with_its_seed(k, backend, tmp_path, capsys):
    settings = faulty("raise -", SEEDS[k], at=12) | {"vector_env": backend}
    said = failed(tmp_path, capsys, **settings)
    where = f"environment {k}, first reset with seed {SEEDS[k]}"
    assert said == f"{where}: {FELL}"
    assert last_iteration(tmp_path) == 1
    assert len(rows(tmp_path)) == 1


@BACKENDS
def test_an_environment_that_raises_in_a_later_reset_is_named_with_its_seed(
    backend, tmp_path, capsys
):
    settings = faulty("raise - in reset", SEEDS[1]) | {"vector_env": backend}
    said = failed(tmp_path, capsys, **settings)
    assert said == f"environment 1, first reset with seed {SEEDS[1]}: {FELL}"
    assert last_iteration(tmp_path) == 1


@BACKENDS
def test_an_environment_that_raises_in_its_first_reset_is_named_with_its_seed(
    backend, tmp_path, capsys
):
    settings = faulty("raise - in reset", SEEDS[1], at=0) | {"vector_env": backend}
    said = failed(tmp_path, capsys, **settings)
    assert said == f"environment 1, first reset with seed {SEEDS[1]}: {FELL}"


@pytest.mark.parametrize("fault", ["raise -", "reward nan", "obs nan"])
def test_an_environment_that_fails_in_an_evaluation_is_named_with_its_seed(fault, tmp_path, capsys):
    seed = core.env_seeds(1, core.EVALUATE, 2)[1]
    said = failed(tmp_path, capsys, **faulty(fault, seed, at=4), eval_every=2 * BATCH)
    why = FELL if fault == "raise -" else NOT_FINITE
    assert said == f"environment, first reset with seed {seed}: {why}"
    assert last_iteration(tmp_path) in (1, 2)
    assert not (tmp_path / core.BEST).exists()


def test_a_run_that_failed_can_be_resumed(tmp_path, capsys):
    failed(tmp_path, capsys, **faulty("raise -", SEEDS[0], at=12))
    assert walker.main(["--resume", "--out", str(tmp_path)]) == 0  # its worlds are others
    assert [row["step"] for row in rows(tmp_path)] == ["32", "64", "96", "128"]


# ---- environments that hang or die ---------------------------------------------------------------

PROC = Path("/proc")
NEEDS_PROC = pytest.mark.skipif(not PROC.exists(), reason="tells processes by /proc")


def session_of(pid: int) -> list[int]:
    """The processes of a session, but for those that have ended and only wait to be noticed."""
    found = []
    for path in PROC.glob("[0-9]*/stat"):
        try:
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(session) == pid and state not in "ZX":
            found.append(int(path.parent.name))
    return found


def nothing_is_left(pid: int, seconds: float = 5) -> bool:
    until = time.monotonic() + seconds
    while left := session_of(pid):
        if time.monotonic() > until:
            for worker in left:
                os.kill(worker, signal.SIGKILL)
            return False
        time.sleep(0.05)
    return True


def typed(out: Path, **settings: Any) -> list[str]:
    return flags(out, vector_env="async", **settings | {"env": "toy_envs:" + settings["env"]})


@NEEDS_PROC
@pytest.mark.parametrize(
    ("fault", "at"),
    [("hang -", 12), ("hang - in reset", 0), ("die -", 12), ("die - in reset", 0)],
    ids=["hangs in a step", "hangs in its first reset", "dies", "dies in its first reset"],
)
def test_an_environment_that_hangs_or_dies_ends_the_run_soon_and_leaves_no_process(
    fault, at, tmp_path
):
    settings = faulty(fault, SEEDS[1], at) | {"step_timeout": 1.0}
    process = start(tmp_path, *typed(tmp_path, **settings), start_new_session=True)
    try:
        if at:
            csv = tmp_path / core.METRICS
            wait_for(process, lambda: csv.exists() and csv.read_text().count("\n") == 2)
            assert process.wait(10) == 1
        else:
            assert process.wait(30) == 1
    finally:
        process.kill()
        alone = nothing_is_left(process.pid)
    assert alone
    said = (tmp_path / "err.txt").read_text()
    assert "Traceback" not in said
    what = "hangs" if "hang" in fault else "has died"
    where = f"environment 1, first reset with seed {SEEDS[1]}"
    assert said.splitlines()[-1] == f"walker.py: {where}: its process {what}"
    if at:
        assert last_iteration(tmp_path) == 1


def run_and_send(send, number: int, out: Path, **settings: Any) -> int | None:
    """Start, signal after the first row, wait; the exit code, or None where a process is left."""
    process = start(out, *typed(out, **settings), start_new_session=True)
    try:
        csv = out / core.METRICS
        wait_for(process, lambda: csv.exists() and csv.read_text().count("\n") > 1)
        time.sleep(0.2)  # into the next iteration
        assert len(session_of(process.pid)) >= 5  # four workers
        send(process.pid, number)
        code = process.wait(30)
    finally:
        process.kill()
        alone = nothing_is_left(process.pid)
    return code if alone else None


@NEEDS_PROC
def test_no_worker_is_left_when_the_main_process_is_killed_not_even_one_that_hangs(tmp_path):
    assert run_and_send(os.kill, signal.SIGKILL, tmp_path, **faulty("hang -", SEEDS[1], 12)) == -9
    assert last_iteration(tmp_path) <= 1


@NEEDS_PROC
def test_a_signal_to_the_workers_too_as_from_a_scheduler_ends_the_run_as_any_signal(tmp_path):
    long = {"env": "Toy/Reach-v0", "env_kwargs": (), "total_timesteps": 10**9, "num_envs": 4}
    assert run_and_send(os.killpg, signal.SIGTERM, tmp_path, **long) == 143
    assert "Traceback" not in (tmp_path / "err.txt").read_text()
    assert is_finite(core.load_checkpoint(tmp_path / core.LAST, "toy_envs:Toy/Reach-v0"))
    assert (tmp_path / core.CURVES).exists()


# ---- unusual, but right --------------------------------------------------------------------------


def test_actions_without_bounds_reach_the_environment_as_they_are(tmp_path, recwarn):
    config = tiny(tmp_path, env="Toy/Wide-v0", env_kwargs=(), init_std=5.0, eval_every=2 * BATCH)
    made, make = [], core.make_env

    def noted(*args, **kwargs):
        made.append(make(*args, **kwargs))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "make_env", noted)
        core.train(config)
    assert max(env.unwrapped.largest for env in made) > 5
    assert len(rows(tmp_path)) == 4
    assert is_finite(core.load_checkpoint(tmp_path / core.LAST))
    assert warned(recwarn) == []


@BACKENDS
@pytest.mark.parametrize("norm_obs", [True, False], ids=["normalised", "raw"])
def test_observations_in_double_precision_learn_the_same(norm_obs, backend, tmp_path):
    for bits in ("32", "64"):
        env = {"env": "Toy/Wide-v0", "env_kwargs": (f"bits={bits}",), "vector_env": backend}
        core.train(tiny(tmp_path / bits, norm_obs=norm_obs, eval_every=BATCH, **env))
    one, other = (learned(tmp_path / bits / core.LAST) for bits in ("32", "64"))
    assert same(one, other)
