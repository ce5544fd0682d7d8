"""Evaluation: exactly the episodes that were asked for, and nothing of training touched."""

from __future__ import annotations

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


@pytest.mark.parametrize("together", [1, 2, 7, 16, 40, 100])
def test_every_episode_counts_once_and_is_that_of_its_own_seed_however_many_step_together(together):
    stepped = []

    def act(obs):
        stepped.append(len(obs))
        return lean(obs)

    returns, lengths = core.evaluate(act, FALLS, SEEDS, together)
    expected = [alone(FALLS.env, lean, seed) for seed in SEEDS]
    assert list(zip(returns, lengths, strict=True)) == expected
    assert sum(stepped) == sum(lengths)  # and none besides was begun
    assert max(stepped) == min(together, 40)
    assert len(set(lengths)) > 10  # so that the first to finish would be others


def test_an_episode_depends_on_its_own_seed_alone():
    returns, lengths = core.evaluate(lean, FALLS, SEEDS)
    for chosen in ([5], [9, 3, 3], list(reversed(range(40)))):
        again = core.evaluate(lean, FALLS, [SEEDS[k] for k in chosen], together=2)
        np.testing.assert_array_equal(again, (returns[chosen], lengths[chosen]))


def test_the_time_limit_ends_an_episode_and_the_return_is_raw():
    config = core.Config(env="Toy/Reach-v0", gamma=0.5, clip_reward=(-0.1, 0.1))
    returns, lengths = core.evaluate(lambda obs: 0 * obs, config, SEEDS)
    assert lengths.tolist() == [10] * 40
    assert returns.tolist() == [-10.0] * 40


def test_a_real_walkers_episode_is_that_of_its_seed_whoever_walked_before_it():
    def act(obs):
        return np.clip(4 * obs[:, 5:9] - 1, -1, 1)

    seeds = SEEDS[:12]
    expected = [alone("BipedalWalker-v3", act, seed) for seed in seeds]
    for together in (3, 16):
        found = core.evaluate(act, core.Config(), seeds, together)
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

    core.evaluate(act, learner.config, [7], together=1)
    stats, clipped = learner.obs_normalizer, 0
    for before, after in itertools.pairwise(seen):
        scaled = (before - stats.mean.numpy()) / np.sqrt(stats.var.numpy() + 1e-8)
        scaled = torch.from_numpy(np.clip(scaled, -10, 10)).float()
        mean = learner.agent.mean_action(scaled).detach().numpy()
        np.testing.assert_allclose(after[:, 3:], np.clip(mean, -1, 1), atol=1e-5)
        clipped += np.sum(np.abs(mean) > 1)
    assert len(seen) > 1
    assert clipped > 0


def everything(learner: core.Learner) -> dict:
    """A copy of all that training is made of."""
    parts = ("agent", "optimizer", "obs_normalizer", "reward_normalizer")
    state = {part: copy.deepcopy(getattr(learner, part).state_dict()) for part in parts}
    return state | {"counters": copy.deepcopy(learner.counters)}


def test_evaluation_changes_no_statistics_weights_or_counters():
    learner = trained().learner
    before = everything(learner)
    core.evaluate(learner.act, learner.config, SEEDS[:5])
    after = everything(learner)
    assert before["counters"] == after["counters"]
    for part in ("agent", "obs_normalizer", "reward_normalizer"):
        for name, tensor in before[part].items():
            assert torch.equal(tensor, after[part][name]), (part, name)


def test_evaluation_draws_from_no_global_generator():
    learners = trained().learner, core.Learner(core.Config())
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    python_state = random.getstate()
    for learner in learners:
        core.evaluate(learner.act, learner.config, SEEDS[:2])
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    for one, other in zip(np.random.get_state(), numpy_state, strict=True):
        np.testing.assert_array_equal(one, other)


def test_training_goes_on_to_the_bit_as_if_no_evaluation_had_been():
    rollouts = []
    for evaluates in (False, True):
        collection = trained()
        if evaluates:
            core.evaluate(collection.learner.act, collection.learner.config, SEEDS[:5])
        rollouts.append(vars(collection.rollout()))
    for name, values in rollouts[0].items():
        assert np.array_equal(values, rollouts[1][name]), name


def test_an_evaluation_leaves_no_worlds_behind():
    """Walkers hang in reference cycles, and would otherwise pile up between two collections."""

    def walkers() -> int:
        return sum(type(thing).__name__ == "BipedalWalker" for thing in gc.get_objects())

    config = core.Config(env_kwargs=("max_episode_steps=3",))
    before = walkers()
    gc.disable()
    core.evaluate(lambda obs: np.zeros((len(obs), 4), np.float32), config, SEEDS[:20])
    left = walkers()
    gc.enable()
    assert left <= before + 1  # the last one may still be in use


def test_play_shows_what_each_step_of_each_episode_led_to_in_turn():
    seeds = SEEDS[:3]
    steps = core.play(lean, FALLS, seeds, render="rgb_array")
    frames = [int(env.render()[0, 0, 0]) for env, _ in steps]
    expected = [range(alone(FALLS.env, lean, seed)[1])[::-1] for seed in seeds]
    assert frames == list(itertools.chain(*expected))


def test_a_row_of_play_holds_the_step_before_during_and_after():
    rows = [row for _, row in core.play(lean, FALLS, SEEDS[:3])]
    for row, then in itertools.pairwise(rows):
        assert row["terminated"] == (row["episode"] != then["episode"])
        if not row["terminated"]:
            assert np.array_equal(row["next_observations"], then["observations"])
    for row in rows:
        assert np.array_equal(row["actions"], lean(row["observations"][None])[0])
    returns = np.bincount([row["episode"] for row in rows], [row["rewards"] for row in rows])
    assert returns.tolist() == [alone(FALLS.env, lean, seed)[0] for seed in SEEDS[:3]]
