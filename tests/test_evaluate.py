"""Evaluation: exactly the episodes of the given seeds, and nothing of training touched."""

import copy
import gc
import itertools
import random

import gymnasium as gym
import numpy as np
import pytest
import torch
import toy_envs

import walker_core as core

FALLS = core.Config(env="Toy/Falls-v0")
SEEDS = core.env_seeds(3, core.TEST, 40)


def lean(obs: np.ndarray) -> np.ndarray:
    """A policy whose answer to an observation does not depend, to the bit, on its neighbours."""
    return np.clip(obs[:, 1:2] / 8, -0.25, 0.25)


def alone(env_id: str, act, seed: int) -> tuple[float, int]:
    """Return and length of one episode in an environment of its own."""
    env = gym.make(env_id)
    obs, _ = env.reset(seed=seed)
    total, length, ended = 0.0, 0, False
    while not ended:
        obs, reward, terminated, truncated, _ = env.step(act(obs[None])[0])
        total, length, ended = total + float(reward), length + 1, terminated or truncated
    return total, length


@pytest.mark.parametrize("together", [1, 7, 100])
def test_every_episode_counts_once_and_is_that_of_its_own_seed_however_many_step_together(together):
    stepped = []

    def act(obs):
        stepped.append(len(obs))
        return lean(obs)

    found = core.evaluate_policy(act, FALLS, SEEDS, together)
    assert list(zip(*found, strict=True)) == [alone(FALLS.env, lean, seed) for seed in SEEDS]
    assert sum(stepped) == found[1].sum()  # no other episode was begun
    assert max(stepped) == min(together, 40)
    assert len(set(found[1])) > 10  # so that the first to finish would be others


def test_the_time_limit_ends_an_episode_and_the_return_is_raw():
    config = core.Config(env="Toy/Reach-v0", gamma=0.5, clip_reward=(-0.1, 0.1))
    returns, lengths = core.evaluate_policy(lambda obs: 0 * obs, config, SEEDS)
    assert (returns.tolist(), lengths.tolist()) == ([-10.0] * 40, [10] * 40)


def test_a_real_walkers_episode_is_that_of_its_seed_whoever_walked_before_it():
    def act(obs):
        return np.clip(4 * obs[:, 5:9] - 1, -1, 1)

    found = core.evaluate_policy(act, core.Config(), SEEDS[:5], together=3)
    expected = [alone("BipedalWalker-v3", act, seed) for seed in SEEDS[:5]]
    assert list(zip(*found, strict=True)) == expected


def trained(**settings) -> toy_envs.Collection:
    """One rollout done, so that the statistics are not the initial ones; actions leave ±1."""
    torch.manual_seed(0)
    collection = toy_envs.Collection(toy_envs.script_config((3, -5), norm_obs=True, **settings))
    with torch.no_grad():
        collection.learner.agent.actor[-1].weight.mul_(200)
    collection.rewards(collection.rollout())
    return collection


def test_the_policy_is_its_mean_action_by_frozen_statistics_clipped_to_the_space():
    learner, seen = trained().learner, []

    def act(obs):
        seen.append(obs)
        return learner.act(obs)

    core.evaluate_policy(act, learner.config, [7], together=1)
    stats, clipped = learner.obs_normalizer, 0
    for before, after in itertools.pairwise(seen):
        scaled = (before - stats.mean.numpy()) / np.sqrt(stats.var.numpy() + 1e-8)
        scaled = torch.from_numpy(np.clip(scaled, -10, 10)).float()
        mean = learner.agent.mean_action(scaled).detach().numpy()
        np.testing.assert_allclose(after[:, 3:], np.clip(mean, -1, 1), atol=1e-5)
        clipped += np.sum(np.abs(mean) > 1)
    assert clipped > 0


def test_evaluation_touches_neither_the_learner_nor_a_generator_nor_the_next_rollout():
    rollouts = []
    for evaluates in (False, True):
        collection = trained()
        learner = collection.learner
        before = copy.deepcopy([getattr(learner, name).state_dict() for name in core.LEARNED])
        generators = torch.get_rng_state(), np.random.get_state(), random.getstate()
        if evaluates:
            core.evaluate_policy(learner.act, learner.config, SEEDS[:5])
        after = [getattr(learner, name).state_dict() for name in core.LEARNED]
        assert repr(before) == repr(after)
        assert repr((torch.get_rng_state(), np.random.get_state(), random.getstate())) == repr(
            generators
        )
        rollouts.append(vars(collection.rollout()))
    for name, values in rollouts[0].items():
        assert np.array_equal(values, rollouts[1][name]), name


def test_an_evaluation_leaves_no_worlds_behind():
    """Walkers are in reference cycles, and would otherwise pile up between two collections."""

    def walkers() -> int:
        return sum(type(thing).__name__ == "BipedalWalker" for thing in gc.get_objects())

    config = core.Config(env_kwargs=("max_episode_steps=3",))
    before = walkers()
    gc.disable()
    core.evaluate_policy(lambda obs: np.zeros((len(obs), 4), np.float32), config, SEEDS[:20])
    left = walkers()
    gc.enable()
    assert left <= before + 1  # the last one may still be in use


def test_play_yields_each_step_of_each_episode_and_the_environment_after_it():
    seeds, frames, steps = SEEDS[:3], [], []
    for env, step in core.play(lean, FALLS, seeds, render="rgb_array"):
        frames.append(int(env.render()[0, 0, 0]))
        steps.append(step)
    expected = [alone(FALLS.env, lean, seed) for seed in seeds]
    assert frames == [left for _, length in expected for left in reversed(range(length))]
    for step, then in itertools.pairwise(steps):
        assert step["terminated"] == (step["episode"] != then["episode"])
        if not step["terminated"]:
            assert np.array_equal(step["next_observations"], then["observations"])
        assert np.array_equal(step["actions"], lean(step["observations"][None])[0])
    returns = np.bincount([step["episode"] for step in steps], [step["rewards"] for step in steps])
    assert returns.tolist() == [total for total, _ in expected]
