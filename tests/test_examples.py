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
import torch
from gymnasium.utils.env_checker import check_env
from helpers import BATCH, flags, rows, warned

import walker
import walker_core as core
from examples import widen

ROOT = Path(__file__).resolve().parents[1]
PRETRAINED = str(ROOT / "checkpoints_walker/pretrained_default.pt")
PASSIVE = "examples.passive_walker:PassiveWalker-v0"
EFFICIENT = "examples.reward_wrapper:EfficientWalker-v3"
ZERO = np.zeros(3, np.float32)


@pytest.fixture
def passive():
    pytest.importorskip("mujoco")
    return importlib.import_module("examples.passive_walker")


def unpowered(env: gym.Env, seed: int) -> tuple[bool, int, list[int], list[float]]:
    """An episode without motors: whether it fell, its info's steps, and both feet's order."""
    env.reset(seed=seed)
    ended, order = False, []
    while not ended:
        _, _, terminated, truncated, info = env.step(ZERO)
        inner = env.unwrapped
        left, right = inner.data.geom_xpos[inner.feet, 0]
        order.append(left > right)
        ended = terminated or truncated
    return terminated, info["steps"], order, info["distance"]


# ---- The passive walker --------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"hz": 60, "slope": -2}])
def test_the_passive_walker_passes_gymnasiums_checks_without_a_warning(passive, recwarn, settings):
    env = gym.make(PASSIVE, render_mode="rgb_array", **settings)
    check_env(env.unwrapped)
    assert warned(recwarn) == []


def test_without_motors_it_falls_from_every_start(passive):
    env = gym.make(PASSIVE)
    fell, steps, _, _ = zip(*(unpowered(env, seed) for seed in range(50)), strict=True)
    assert all(fell)
    assert 1 <= np.mean(steps) <= 4


def test_on_a_gentler_slope_some_starts_walk_on_without_motors(passive):
    """McGeer's discovery; and `steps` counts what can be counted otherwise: legs that pass."""
    env = gym.make(PASSIVE, slope=2)
    for seed in range(50):
        fell, steps, order, distance = unpowered(env, seed)
        if not fell:
            break
    assert not fell
    assert len(order) == 1000  # 20 s
    assert steps >= 15
    assert abs(steps - np.abs(np.diff(order)).sum()) <= 1
    assert distance > 7


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


@pytest.mark.parametrize("hz", [10, 30, 50, 60, 144, 500])
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
    distances = []
    for slope in (-3, 0, 3, 6):
        env = passive.PassiveWalker(slope=slope)
        env.reset(seed=1)
        distances.append([env.step(ZERO)[4]["distance"] for _ in range(20)][-1])
    assert distances == sorted(distances)


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


@pytest.mark.parametrize("wrong", ["hz=5", "hz=nan", "hz=fast", "slope=90", "colour=1"])
def test_a_wrong_argument_of_the_environment_is_one_line(passive, wrong, tmp_path, capsys):
    assert walker.main(["--env", PASSIVE, "--env-kwargs", wrong, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert wrong.split("=")[0] in said or "'<='" in said
    assert said.count("\n") == 1


def test_where_mujoco_is_missing_one_line_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.delitem(sys.modules, "examples.passive_walker", raising=False)
    monkeypatch.setitem(sys.modules, "mujoco", None)
    assert walker.main(["--env", PASSIVE, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "pip install mujoco" in said
    assert said.count("\n") == 1


def test_its_film_needs_no_opengl_and_no_display(passive, monkeypatch, tmp_path):
    monkeypatch.setenv("MUJOCO_GL", "none")
    config = core.Config(env=PASSIVE, env_kwargs=("hz=30",))
    core.record_episode(lambda obs: np.zeros((len(obs), 3)), config, 1, tmp_path / "a.mp4", 0.5)
    assert imageio.immeta(tmp_path / "a.mp4")["fps"] == 30
    frames = imageio.imread(tmp_path / "a.mp4")
    assert frames.shape == (15, passive.HEIGHT, passive.WIDTH, 3)
    hip = frames[0].sum(axis=2).argmin() % passive.WIDTH  # the darkest pixel
    assert abs(hip - passive.WIDTH / 2) < 20
    assert (tmp_path / "a.gif").exists()


def test_it_can_be_watched_in_a_window(passive, monkeypatch, recwarn):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    config = core.Config(env=PASSIVE, env_kwargs=("hz=500",))
    core.show(lambda obs: np.zeros((len(obs), 3)), config, [1], seconds=0.02)
    assert warned(recwarn) == []


@pytest.mark.parametrize("vector", ["sync", "async"])
def test_it_trains_and_is_evaluated_by_the_ordinary_commands(
    passive, no_pictures, vector, tmp_path, capsys
):
    changes = {"env": PASSIVE, "env_kwargs": ("hz=60", "slope=2.5"), "vector_env": vector}
    assert walker.main(flags(tmp_path, **changes, total_timesteps=2 * BATCH)) == 0
    assert len(rows(tmp_path)) == 2
    test = ["evaluate", str(tmp_path / core.LAST), "--env", PASSIVE, "--episodes", "2"]
    assert walker.main(test) == 0
    assert "over 2 episodes" in capsys.readouterr().out


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


@pytest.mark.parametrize(("torque", "fall"), [(10, 5), (1, 1), (3, 20)])
def test_the_wrapper_changes_the_reward_and_nothing_else(torque, fall):
    prices = {} if (torque, fall) == (10, 5) else {"torque": torque, "fall": fall}
    wrapped, plain = gym.make(EFFICIENT, **prices), gym.make("BipedalWalker-v3")
    np.testing.assert_array_equal(wrapped.reset(seed=3)[0], plain.reset(seed=3)[0])
    assert wrapped.spec.reward_threshold is None  # the plain one's 300 is of the plain reward
    action, ended = np.array([0.3, -0.2, 0.4, 0.1], np.float32), False
    while not ended:
        obs, reward, terminated, truncated, _ = wrapped.step(action)
        plain_obs, plain_reward, *ends, _ = plain.step(action)
        np.testing.assert_array_equal(obs, plain_obs)
        assert [terminated, truncated] == ends
        less = (fall - 1) * 100 * terminated + (torque - 1) * 0.028  # |action|'s sum is 1
        assert plain_reward - reward == pytest.approx(less, abs=1e-6)
        ended = terminated or truncated
    assert plain_reward == -100


def test_the_wrapper_around_envpool_has_the_same_prices_and_reset_rows_are_free():
    pytest.importorskip("envpool")
    settings = {"num_envs": 4, "vector_env": "envpool", "minibatch_size": 8}
    prices = {EFFICIENT: ("hardcore=True", "fall=3"), "BipedalWalker-v3": ("hardcore=True",)}
    configs = [core.Config.for_env(e, env_kwargs=kw, **settings) for e, kw in prices.items()]
    wrapped, plain = (core.make_vector_env(config, [5, 6, 7, 8])[0] for config in configs)
    actions, ended, falls = np.full((4, 4), 0.25, np.float32), np.zeros(4, bool), 0
    for t in range(200):
        obs, rewards, terminated, truncated, _ = core.ask(wrapped, wrapped.step, actions)
        plain_obs, plain_rewards, *ends, _ = core.ask(plain, plain.step, actions)
        np.testing.assert_array_equal(obs, plain_obs)
        np.testing.assert_array_equal([terminated, truncated], ends)
        expected = np.where(ended, 0, 200 * terminated + 0.252)  # |actions|' sum is 1
        np.testing.assert_allclose(plain_rewards - rewards, expected, atol=1e-4)
        ended, falls = terminated | truncated, falls + terminated.sum()
        if t == 100:  # as the core begins some anew
            again = {"options": {"reset_mask": np.array([True, False, False, True])}}
            assert [len(core.ask(e, e.reset, **again)[0]) for e in (wrapped, plain)] == [2, 2]
            ended[[0, 3]] = False
    assert falls > 4


def test_a_policy_of_the_wrapped_environment_is_tested_on_either(no_pictures, tmp_path, capsys):
    changes = {"env": EFFICIENT, "env_kwargs": (), "total_timesteps": 2 * BATCH}
    assert walker.main(flags(tmp_path, **changes)) == 0
    means = []
    for env in (EFFICIENT, "BipedalWalker-v3"):
        capsys.readouterr()
        test = ["evaluate", str(tmp_path / core.LAST), "--env", env, "--episodes", "1"]
        assert walker.main(test) == 0
        means.append(float(capsys.readouterr().out.split()[1]))
    assert means[0] < means[1]


# ---- a wider network -----------------------------------------------------------------------------


def test_a_widened_policy_does_the_same_and_its_twins_learn_apart(no_pictures, tmp_path, capsys):
    wide = tmp_path / "wide.pt"
    assert widen.main([PRETRAINED, str(wide)]) == 0
    assert capsys.readouterr().out == f"wide: {wide}\n"
    old, new = (core.load_learner(path, None, 0, "cpu", ".") for path in (PRETRAINED, str(wide)))
    obs = torch.as_tensor(np.random.default_rng(0).normal(size=(50, 24)), dtype=torch.float32)
    for net in ("actor", "critic"):
        same = getattr(new.agent, net)(obs)
        assert torch.allclose(same, getattr(old.agent, net)(obs), atol=1e-4)
        same.square().sum().backward()
        for layer in list(getattr(new.agent, net))[:-1:2]:
            twins = layer.weight.grad.chunk(2)
            assert not torch.allclose(*twins, rtol=0.01)
    assert new.config.actor_hidden == tuple(2 * n for n in old.config.actor_hidden)
    sizes = ["--actor-hidden", "128", "128", "--critic-hidden", "128", "128"]
    typed = [*flags(tmp_path / "run", env="BipedalWalker-v3", env_kwargs=()), *sizes]
    assert walker.main([*typed, "--init-from", str(wide)]) == 0


def test_a_network_with_layer_norm_is_not_widened(no_pictures, tmp_path, capsys):
    assert walker.main(flags(tmp_path, layer_norm=True)) == 0
    assert widen.main([str(tmp_path / core.LAST), str(tmp_path / "wide.pt")]) == 2
    assert "has layer norm" in capsys.readouterr().err
    assert not (tmp_path / "wide.pt").exists()


BLOCKED = [PRETRAINED, "no/folder/wide.pt"]


@pytest.mark.parametrize("typed", [[], ["none.pt", "wide.pt"], [__file__, "wide.pt"], BLOCKED])
def test_what_cannot_be_widened_is_one_line(typed, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert widen.main(typed) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


# ---- ONNX ----------------------------------------------------------------------------------------


def export(*words: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "examples/export_onnx.py", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    runtime, folder = pytest.importorskip("onnxruntime"), tmp_path_factory.mktemp("onnx")
    ended = export(PRETRAINED, "policy.onnx", folder=folder)
    assert (ended.returncode, ended.stderr, ended.stdout) == (0, "", "policy: policy.onnx\n")
    assert [path.name for path in folder.iterdir()] == ["policy.onnx"]  # all is in one file
    return runtime.InferenceSession(folder / "policy.onnx")


def test_the_onnx_policy_takes_raw_observations_of_any_batch(session):
    [obs], [actions] = session.get_inputs(), session.get_outputs()
    assert (obs.name, obs.shape, obs.type) == ("obs", ["batch", 24], "tensor(float)")
    assert (actions.name, actions.shape) == ("actions", ["batch", 4])


@pytest.mark.parametrize("rows", [1, 2, 7, 1000])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3, 1e30])
def test_the_onnx_policy_gives_the_actions_that_evaluation_plays(session, rows, scale):
    learner = core.load_learner(PRETRAINED, None, seed=0, device="cpu", out=".")
    obs = np.random.default_rng(rows).normal(scale=scale, size=(rows, 24)).astype(np.float32)
    [actions] = session.run(None, {"obs": obs})
    np.testing.assert_allclose(actions, learner.act(obs), atol=1e-5)
    assert np.abs(actions).max() <= 1


def test_the_onnx_policy_stands_infinite_observations(session):
    learner = core.load_learner(PRETRAINED, None, seed=0, device="cpu", out=".")
    obs = np.array([[np.inf] * 24, [-np.inf] * 24, [3.4e38, -3.4e38] * 12, [0.0] * 24], np.float32)
    np.testing.assert_allclose(session.run(None, {"obs": obs})[0], learner.act(obs), atol=1e-5)


def test_an_export_that_cannot_be_is_one_line(monkeypatch, tmp_path, capsys):
    from examples import export_onnx

    onnx = str(tmp_path / "policy.onnx")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert export_onnx.main([PRETRAINED, onnx]) == 2
    assert "pip install onnx onnxscript" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    for checkpoint in (tmp_path / "none.pt", ROOT / "README.md"):
        assert export_onnx.main([str(checkpoint), onnx]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr(core.Learner, "act", lambda self, obs: np.ones((len(obs), 4)))
    assert export_onnx.main([PRETRAINED, onnx]) == 2
    assert "Learner.act" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
