"""The examples: a passive walker in MuJoCo, a reward wrapper, a policy as ONNX."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import imageio.v3 as imageio
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from helpers import BATCH, PRETRAINED, flags, rows, warned

import walker
import walker_core as core

ROOT = Path(__file__).resolve().parents[1]
PASSIVE = "examples.passive_walker:PassiveWalker-v0"
FAST = "examples.reward_wrapper:FastWalker-v3"
ZERO = np.zeros(3, np.float32)


@pytest.fixture
def passive():
    pytest.importorskip("mujoco")
    return importlib.import_module("examples.passive_walker")


# ---- The passive walker --------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"hz": 60, "slope": -2}])
def test_the_passive_walker_passes_gymnasiums_checks_without_a_warning(passive, recwarn, settings):
    env = gym.make(PASSIVE, render_mode="rgb_array", **settings)
    check_env(env.unwrapped)
    assert warned(recwarn) == []


@pytest.mark.slow
def test_without_motors_it_falls_and_on_a_gentler_slope_some_starts_walk_on(passive):
    """McGeer's discovery; `steps` counts what can be counted otherwise: legs that pass."""
    count_steps = importlib.import_module("examples.count_steps")

    def walks(*env_kwargs: str, seeds: range) -> list[tuple]:
        config = core.Config(env=PASSIVE, env_kwargs=env_kwargs)
        stand = lambda obs: np.zeros((len(obs), 3))  # noqa: E731
        return [count_steps.walk(stand, config, seed) for seed in seeds]

    steps, _, fell = zip(*walks(seeds=range(20)), strict=True)
    assert all(fell)
    assert 1 <= np.mean(steps) <= 4
    steps, metres, fell = zip(*walks("slope=2", seeds=range(6)), strict=True)
    longest = int(np.argmax(metres))
    assert not fell[longest]
    assert steps[longest] >= 15
    assert metres[longest] > 7


def test_an_episode_is_that_of_its_seed_whatever_was_before(passive):
    actions = np.random.default_rng(0).uniform(-1, 1, (60, 3)).astype(np.float32)

    def episode(env, seed):
        obs, _ = env.reset(seed=seed)
        return np.array([obs, *(env.step(action)[0] for action in actions)])

    env, other = passive.PassiveWalker(), passive.PassiveWalker()
    first = episode(env, 7)
    np.testing.assert_array_equal(episode(env, 7), first)
    assert not np.array_equal(episode(other, 8), first)
    np.testing.assert_array_equal(episode(other, 7), first)


@pytest.mark.parametrize("hz", [10, 60, 500])
def test_hz_is_the_rate_of_control_and_of_the_film_and_leaves_the_motion_alone(passive, hz):
    env, fine = passive.PassiveWalker(hz=hz), passive.PassiveWalker(hz=500)
    assert env.metadata["render_fps"] == hz
    assert env.model.opt.timestep <= 1 / 500 + 1e-12
    env.reset(seed=1), fine.reset(seed=1)
    count = math.ceil(0.2 * hz)
    for _ in range(count):
        env.step(ZERO)
    assert env.data.time == pytest.approx(count / hz)
    while fine.data.time < env.data.time - 1e-9:
        fine.step(ZERO)
    np.testing.assert_allclose(env.data.qpos, fine.data.qpos, atol=0.02)


def test_a_positive_slope_leads_down_by_so_many_degrees(passive):
    gravity = passive.PassiveWalker(slope=10).model.opt.gravity
    assert math.degrees(math.atan2(gravity[0], -gravity[2])) == pytest.approx(10)
    assert np.linalg.norm(gravity) == pytest.approx(9.81)


def test_the_reward_is_the_way_less_what_the_motors_cost(passive):
    env = passive.PassiveWalker()
    env.reset(seed=1)
    way = 0.0
    for action in ([0, 0, 0], [1, -1, 0.5], [3, 0, 0]):  # the last is clipped to 1, 0, 0
        effort = np.square(np.clip(action, -1, 1)).mean()
        _, reward, _, _, info = env.step(np.array(action, np.float32))
        expected = min(info["distance"] - way, passive.FAST / 50) - passive.EFFORT * effort / 50
        assert reward == pytest.approx(expected, abs=1e-9)
        way = info["distance"]


def test_who_gallops_on_one_leg_is_not_paid(passive):
    env = passive.PassiveWalker()
    env.reset(seed=1)
    env.stepped_at = -1.1
    _, reward, _, _, info = env.step(ZERO)
    assert info["distance"] > 0
    assert reward == 0
    env.data.qvel[0] = -1
    _, reward, _, _, _ = env.step(ZERO)
    assert reward < 0


def test_the_observation_is_what_the_docstring_says(passive):
    env = passive.PassiveWalker()
    for seed in range(10):
        obs, _ = env.reset(seed=seed)
        right = int(obs[13])  # the leg in front
        assert obs[1 + 2 * right] > 0 > obs[3 - 2 * right]
        assert obs[11 + right] == 1  # it stands on the ground
        assert obs[5] == pytest.approx(-obs[7 + 2 * right])  # the hip turns over the foot
        assert obs[14] == 0
        obs, *_, info = env.step(ZERO)
        assert obs[0] == np.float32(env.data.qpos[1])
        assert obs[14] == np.float32(info["distance"])


@pytest.mark.parametrize("wrong", ["hz=5", "slope=90"])
def test_a_wrong_argument_of_the_environment_is_one_line(passive, wrong, tmp_path, capsys):
    assert walker.main(["--env", PASSIVE, "--env-kwargs", wrong, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert wrong.replace("=", " is ") in error
    assert error.count("\n") == 1


def test_where_mujoco_is_missing_one_line_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.delitem(sys.modules, "examples.passive_walker", raising=False)
    monkeypatch.setitem(sys.modules, "mujoco", None)
    assert walker.main(["--env", PASSIVE, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "pip install mujoco" in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_it_is_filmed_without_opengl_and_watched_in_a_window(
    passive, monkeypatch, tmp_path, recwarn
):
    monkeypatch.setenv("MUJOCO_GL", "none")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    learner = core.Learner(core.Config(env=PASSIVE, env_kwargs=("hz=30",)))
    core.record_episode(learner, 1, tmp_path / "a.mp4", seconds=0.1)
    assert imageio.immeta(tmp_path / "a.mp4")["fps"] == 30
    frames = imageio.imread(tmp_path / "a.mp4")
    assert frames.shape == (3, passive.HEIGHT, passive.WIDTH, 3)
    hip = frames[0].sum(axis=2).argmin() % passive.WIDTH  # the darkest pixel
    assert abs(hip - passive.WIDTH / 2) < 20
    recwarn.clear()  # imageio's
    for _, step in core.play(learner.act, learner.config, [1], render="human"):
        if step["episode"] == 0:
            break
    assert warned(recwarn) == []


@pytest.mark.slow
def test_it_trains_and_is_evaluated_by_the_ordinary_commands(
    passive, no_pictures, tmp_path, capsys
):
    changes = {"env": PASSIVE, "env_kwargs": ("hz=60", "slope=2.5")}
    assert walker.main(flags(tmp_path, **changes, total_timesteps=2 * BATCH)) == 0
    assert len(rows(tmp_path)) == 2
    test = ["evaluate", str(tmp_path / core.LAST), "--env", PASSIVE, "--episodes", "2"]
    assert walker.main(test) == 0
    assert "over 2 episodes" in capsys.readouterr().out


@pytest.mark.slow
def test_steps_are_counted_without_motors_and_trained(passive, no_pictures, tmp_path, capsys):
    from examples import count_steps

    assert walker.main(flags(tmp_path, env=PASSIVE, total_timesteps=BATCH)) == 0
    capsys.readouterr()
    assert count_steps.main([str(tmp_path / core.LAST)]) == 0
    plain, trained = capsys.readouterr().out.splitlines()
    assert plain.startswith("without motors: ")
    assert trained.startswith("trained: ")
    assert plain.endswith("fell in 0 of 100")  # in a fifth of a second
    for wrong in ([], ["none.pt"]):
        assert count_steps.main(wrong) == 2
        assert capsys.readouterr().err.count("\n") == 1


# ---- The reward wrapper --------------------------------------------------------------------------


@pytest.mark.parametrize("bonus", [0.1, 2])
def test_the_wrapper_changes_the_reward_and_nothing_else(bonus):
    wrapped = gym.make(FAST) if bonus == 0.1 else gym.make(FAST, bonus=bonus)
    plain = gym.make("BipedalWalker-v3")
    np.testing.assert_array_equal(wrapped.reset(seed=3)[0], plain.reset(seed=3)[0])
    assert wrapped.spec.reward_threshold is None  # the plain one's 300 is of the plain reward
    action, ended = np.array([0.3, -0.2, 0.4, 0.1], np.float32), False
    while not ended:
        obs, reward, terminated, truncated, _ = wrapped.step(action)
        plain_obs, plain_reward, *ends, _ = plain.step(action)
        np.testing.assert_array_equal(obs, plain_obs)
        assert [terminated, truncated] == ends
        assert reward - plain_reward == pytest.approx(bonus * obs[2], abs=1e-6)
        ended = terminated or truncated


# ---- ONNX ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_onnx_policy_gives_the_actions_that_evaluation_plays(tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    runtime = pytest.importorskip("onnxruntime")
    command = [sys.executable, ROOT / "examples/export_onnx.py", PRETRAINED, "policy.onnx"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr, ended.stdout) == (0, "", "policy: policy.onnx\n")
    assert [path.name for path in tmp_path.iterdir()] == ["policy.onnx"]  # all is in one file

    session = runtime.InferenceSession(tmp_path / "policy.onnx")
    assert [(i.name, i.shape) for i in session.get_inputs()] == [("obs", ["batch", 24])]
    assert [(o.name, o.shape) for o in session.get_outputs()] == [("actions", ["batch", 4])]
    learner, random = core.load_learner(PRETRAINED, device="cpu"), np.random.default_rng(0)
    batches = [random.normal(scale=s, size=(n, 24)) for n, s in ((1, 1), (7, 1e3), (1000, 1e30))]
    batches.append(np.array([[np.inf] * 24, [-np.inf] * 24, [3.4e38, -3.4e38] * 12]))
    for obs in (batch.astype(np.float32) for batch in batches):
        [actions] = session.run(None, {"obs": obs})
        np.testing.assert_allclose(actions, learner.act(obs), atol=1e-5)
        assert np.abs(actions).max() <= 1


def test_an_export_that_cannot_be_is_one_line(monkeypatch, tmp_path, capsys):
    from examples import export_onnx

    onnx = str(tmp_path / "policy.onnx")
    core.load_learner(PRETRAINED)  # torch looks for modules of its own when it is first used
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert export_onnx.main([PRETRAINED, onnx]) == 2
    assert "pip install onnx onnxscript" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    for checkpoint in (tmp_path / "none.pt", ROOT / "README.md"):
        assert export_onnx.main([str(checkpoint), onnx]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr(core, "act", lambda *args: np.ones((len(args[-1]), 4)))
    assert export_onnx.main([PRETRAINED, onnx]) == 2
    assert "Learner.act" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
