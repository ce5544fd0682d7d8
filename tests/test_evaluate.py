"""Evaluation: exactly the episodes of the given seeds, and nothing of training touched."""

import copy
import itertools
import multiprocessing
import os
import random
import signal
import threading
import time

import gymnasium as gym
import numpy as np
import pytest
import torch
import toy_envs
from helpers import evaluate_here

import walker_core as core

FALLS = core.Config(env="Toy/Falls-v0")
SEEDS = core.env_seeds(3, core.TEST, 40)


def still(obs: np.ndarray) -> np.ndarray:
    return np.zeros((len(obs), 4), np.float32)


def stroll(obs: np.ndarray) -> np.ndarray:
    return np.clip(4 * obs[:, 5:9] - 1, -1, 1)


def lean(obs: np.ndarray) -> np.ndarray:
    """Actions that tell how many observations were given at once."""
    return np.clip(obs[:, 1:2] / 8, -0.25, 0.25) / len(obs)


def alone(env_id: str, act, seed: int) -> tuple[float, int]:
    """Return and length of one episode in an environment of its own."""
    env = gym.make(env_id)
    obs, _ = env.reset(seed=seed)
    total, length, ended = 0.0, 0, False
    while not ended:
        obs, reward, terminated, truncated, _ = env.step(act(obs[None])[0])
        total, length, ended = total + float(reward), length + 1, terminated or truncated
    return total, length


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_episode_counts_once_and_is_that_of_its_own_seed_however_many_processes_play(
    processes, monkeypatch
):
    """To the bit, and in the order of the seeds: each observation is the only one of its batch."""
    torch.manual_seed(0)
    monkeypatch.setattr(os, "cpu_count", lambda: processes)
    learner = core.Learner(FALLS)
    learner.obs_normalizer.update(torch.randn(9, 3))
    with torch.no_grad():
        learner.agent.actor[-1].weight.mul_(20)
    for act in (lean, learner.act):
        found = core.evaluate_policy(act, FALLS, SEEDS[:20])
        assert list(zip(*found, strict=True)) == [alone(FALLS.env, act, s) for s in SEEDS[:20]]
    assert len(set(found[1])) > 10  # so that the first to finish would be others


def faulty(fault: str) -> core.Config:
    """An environment that has this fault with the second of the seeds."""
    kwargs = f"fault={fault!r}", f"seed={SEEDS[1]}", "at=0" if "reset" in fault else "at=3"
    return core.Config(env="Toy/Faulty-v0", env_kwargs=kwargs)


@pytest.mark.parametrize("fault", ["die -", "die - in reset"])
def test_a_worker_that_dies_is_one_line(fault):
    with pytest.raises(core.TrainingError) as caught:
        core.evaluate_policy(still, faulty(fault), SEEDS[:4])
    assert str(caught.value).startswith("a worker process died: ")
    assert "\n" not in str(caught.value)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("fault", ["hang -", "hang - in reset"])
def test_a_signal_ends_an_evaluation_within_a_second_even_one_that_hangs(fault):
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        core.evaluate_policy(still, faulty(fault), SEEDS[:4])
    assert time.monotonic() - began < 1.5
    assert multiprocessing.active_children() == []


def test_the_time_limit_ends_an_episode_and_the_return_is_raw():
    config = core.Config(env="Toy/Reach-v0", gamma=0.5, clip_reward=(-0.1, 0.1), action_cost=9)
    returns, lengths = evaluate_here(still, config, SEEDS[:3])
    assert (returns.tolist(), lengths.tolist()) == ([-10.0] * 3, [10] * 3)


def test_a_real_walkers_episode_is_that_of_its_seed_whoever_walked_before_it():
    found = evaluate_here(stroll, core.Config(), SEEDS[:4])
    expected = [alone("BipedalWalker-v3", stroll, seed) for seed in SEEDS[:4]]
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
    learner = trained().learner
    stats, clipped = learner.obs_normalizer, 0
    for _, step in core.play(learner.act, learner.config, [7]):
        before, after = (step[name][None] for name in ("observations", "next_observations"))
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
            core.evaluate_policy(learner.act, learner.config, SEEDS[:4])
        after = [getattr(learner, name).state_dict() for name in core.LEARNED]
        assert repr(before) == repr(after)
        assert repr((torch.get_rng_state(), np.random.get_state(), random.getstate())) == repr(
            generators
        )
        rollouts.append(vars(collection.rollout()))
    for name, values in rollouts[0].items():
        assert np.array_equal(values, rollouts[1][name]), name


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
