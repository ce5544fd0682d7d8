"""Any environment by its name: images and Discrete actions, chosen from its spaces alone."""

from __future__ import annotations

import itertools
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
import toy_envs
from gymnasium.spaces import Box, Discrete
from helpers import evaluate_here, flags, rows
from torch import nn

import walker
import walker_core as core


class Match(gym.Env):
    """Pays 1 where the action is the number that is shown, for twelve steps; numbers from 5 on."""

    action_space = Discrete(3, start=5)
    observation_space = Box(-1, 1, (3,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.shown, self.taken = int(self.np_random.integers(3)), 0
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action), repr(action)
        self.taken += 1
        reward = float(action == self.shown + 5)
        self.shown = int(self.np_random.integers(3))
        return self.observe(), reward, False, self.taken == 12, {}

    def observe(self):
        return np.eye(3, dtype=np.float32)[self.shown]


class Screen(Match):
    """Shows the number as one of three rows of an image that is lit, in a random colour."""

    observation_space = Box(0, 255, (60, 50, 3), np.uint8)

    def observe(self):
        image = np.zeros((60, 50, 3), np.uint8)
        image[20 * self.shown : 20 * self.shown + 20] = self.np_random.integers(150, 255, 3)
        return image


gym.register("Toy/Match-v0", Match)
gym.register("Toy/Screen-v0", Screen)
MATCH, SCREEN = core.Config(env="Toy/Match-v0"), core.Config(env="Toy/Screen-v0")
SMALL = {"env_kwargs": (), "num_envs": 4, "rollout_steps": 32, "minibatch_size": 32}
BATCH = 4 * 32

pytestmark = pytest.mark.usefixtures("no_pictures")


# ---- images --------------------------------------------------------------------------------------


def test_an_image_is_seen_gray_at_half_its_size_four_in_a_row():
    env = core.make_env(SCREEN)
    first, _ = env.reset(seed=1)
    assert first.shape == env.observation_space.shape == (4, 30, 25)
    assert all(np.array_equal(first[0], image) for image in first)  # before it there was no other
    stacks = [first, *(env.step(5)[0] for _ in range(5))]
    for before, after in itertools.pairwise(stacks):
        np.testing.assert_array_equal(after[:3], before[1:])
    assert len({int(np.argmax(image[::10, 0])) for image in stacks[-1]}) > 1
    picture = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3)
    expected = [[int(picture[y, x].sum()) // 3 for x in (0, 2)] for y in (0, 2, 4)]
    assert core.gray_half(picture).tolist() == expected


def test_images_are_scaled_from_0_to_1_and_have_no_running_statistics():
    small = {"num_envs": 2, "rollout_steps": 4, "minibatch_size": 2}
    collection = toy_envs.Collection(core.Config(env="Toy/Screen-v0", **small))
    scaled = collection.normalizer.normalize(np.array([[51, 255]], np.uint8))
    assert scaled.dtype == torch.float32
    np.testing.assert_allclose(scaled, [[0.2, 1.0]], rtol=1e-6)
    collection.rollout()
    assert collection.normalizer.count == 0


def test_two_convolutions_stand_before_the_layers_and_are_orthogonal():
    agent = core.Learner(SCREEN).agent
    for net, outputs in ((agent.actor, 3), (agent.critic, 1)):
        kinds = [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU, nn.Flatten]
        kinds += [nn.Linear, nn.SiLU, nn.Linear, nn.SiLU, nn.Linear]
        assert [type(layer) for layer in net] == kinds
        assert net[-1].out_features == outputs
        for layer in (net[0], net[2]):
            filters = layer.weight.detach().flatten(1)
            expected = 2 * torch.eye(len(filters))
            torch.testing.assert_close(filters @ filters.T, expected, atol=1e-4, rtol=0)
    images = torch.rand(7, 4, 30, 25)
    assert agent.value(images).shape == agent.act(images)[1].shape == (7,)


@pytest.mark.parametrize("shape", [(40, 64, 3), (64, 40, 3)])
def test_an_image_of_forty_pixels_is_halved_and_a_smaller_one_keeps_its_colors(shape):
    env = gym.Env()
    env.observation_space = Box(0, 255, shape, np.uint8)
    gray = core.arrange_images(env).observation_space
    assert gray.shape == (4, shape[0] // 2, shape[1] // 2)
    agent = core.ActorCritic(gray, Discrete(2), core.Config())
    assert agent.value(torch.zeros(1, *gray.shape)).shape == (1,)
    smaller = tuple(39 if size == 40 else size for size in shape)
    env.observation_space = Box(0, 255, smaller, np.uint8)
    assert core.arrange_images(env).observation_space.shape == (3, *smaller[:2])


# ---- Discrete actions ----------------------------------------------------------------------------


def test_logprobs_and_entropies_are_those_of_the_softmax():
    torch.manual_seed(0)
    agent = core.ActorCritic(Box(-1, 1, (6,), np.float32), Discrete(4), core.Config())
    with torch.no_grad():
        agent.actor[-1].weight.mul_(300)
    obs = torch.randn(50, 6)
    actions, logprobs = agent.act(obs)
    logits = agent.actor(obs).detach().double().numpy()
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    again, entropies = agent.evaluate_actions(obs, actions.float())  # as a rollout stores them
    assert actions.shape == (50, 1)
    expected = np.log(shares[np.arange(50), actions[:, 0]])
    np.testing.assert_allclose(logprobs.detach(), expected, rtol=1e-4)
    np.testing.assert_allclose(again.detach(), expected, rtol=1e-4)
    np.testing.assert_allclose(entropies.detach(), -(shares * np.log(shares)).sum(1), rtol=1e-4)
    assert agent.mean_action(obs)[:, 0].tolist() == shares.argmax(1).tolist()
    many = agent.act(obs[:1].expand(20_000, 6))[0]
    np.testing.assert_allclose(np.bincount(many[:, 0], minlength=4) / 20_000, shares[0], atol=0.02)


def test_an_environment_gets_numbers_of_its_own_from_its_start_on():
    actions = torch.tensor([[0.0], [2.0], [1.0]])
    assert core.env_actions(actions, Discrete(3, start=5)).tolist() == [5, 7, 6]
    learner = core.Learner(MATCH)
    steps = list(core.play(learner.act, MATCH, [1, 2, 3]))  # Match asserts what it gets
    assert len(steps) == 3 * 12


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "env", ["Toy/Match-v0", pytest.param("Toy/Screen-v0", marks=pytest.mark.slow)]
)
def test_a_run_trains_saves_evaluates_and_resumes(env, tmp_path, capsys):
    settings = {"env": env, "eval_every": BATCH, **SMALL}
    assert walker.main(flags(tmp_path, **settings, total_timesteps=2 * BATCH)) == 0
    typed = ["--total-timesteps", str(3 * BATCH)]
    assert walker.main(["--resume", "--out", str(tmp_path), *typed]) == 0
    assert [int(row["step"]) for row in rows(tmp_path)] == [BATCH, 2 * BATCH, 3 * BATCH]
    for row in rows(tmp_path):
        assert row["action_std"] == ""  # there is none
        assert 0 < float(row["entropy"]) <= math.log(3) + 1e-6
        assert float(row["length_mean"]) == 12
    assert walker.main(["evaluate", str(tmp_path / core.LAST), "--episodes", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("length 12")


@pytest.mark.slow
def test_a_discrete_environment_of_envpool_takes_the_same_path(tmp_path):
    pytest.importorskip("envpool")
    settings = {"env": "CartPole-v1", "vector_env": "envpool", **SMALL}
    assert walker.main(flags(tmp_path, **settings, total_timesteps=2 * BATCH)) == 0
    assert len(rows(tmp_path)) == 2


@pytest.mark.slow
def test_images_of_envpool_are_refused_in_one_line(tmp_path, capsys):
    pytest.importorskip("envpool")
    settings = {"env": "CarRacing-v3", "vector_env": "envpool", **SMALL}
    assert walker.main(flags(tmp_path / "new", **settings)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--vector-env envpool" in error
    assert "CarRacing-v3" in error
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.parametrize("env", ["Toy/Match-v0", "Toy/Screen-v0"])
def test_what_is_shown_is_learned(env, tmp_path):
    settings = {"env": env, "total_timesteps": 3072, "num_envs": 8, "rollout_steps": 32}
    settings |= {"minibatch_size": 64, "eval_every": 0, "learning_rate": 3e-3, "device": "cpu"}
    core.train(core.Config(out=str(tmp_path), **settings))
    learner = core.load_learner(tmp_path / core.LAST, device="cpu")
    seeds = core.env_seeds(1, core.TEST, 10)
    returns, _ = evaluate_here(learner.act, learner.config, seeds)
    assert returns.mean() > 11  # of 12; 4 by chance
