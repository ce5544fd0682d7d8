"""Advantages under two endings and reset rows, and the batch made of them."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
import toy_envs

import walker_core as core


def row(*numbers: float) -> torch.Tensor:
    """A column over time for one environment, (T, 1)."""
    return torch.tensor(numbers, dtype=torch.float64)[:, None]


def flags(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.bool)[:, None]


def random_rollout(seed: int):
    """Episodes of random lengths and endings in random environments, with NEXT_STEP reset rows."""
    rng = np.random.default_rng(seed)
    T, N = rng.integers(1, 30), rng.integers(1, 5)
    terminated, truncated = np.zeros((2, T, N), bool)
    valid = np.zeros((T, N), bool)
    for i in range(N):
        ended, chance = rng.random() < 0.3, rng.choice([0.02, 0.2, 0.6])
        for t in range(T):
            valid[t, i] = not ended
            ended = valid[t, i] and rng.random() < chance
            if ended:
                kind = rng.integers(3)  # both at once is an ending too
                terminated[t, i], truncated[t, i] = kind != 1, kind != 0
    rewards, values = rng.normal(size=(T, N)) * valid, rng.normal(size=(T + 1, N))
    return rewards, values, terminated, truncated, valid


def slow_gae(rewards, values, terminated, truncated, valid, gamma, lam) -> np.ndarray:
    """Σ_l (γλ)^l δ_{t+l} over what is left of t's own episode; NaN on reset rows."""
    T, N = rewards.shape
    advantages = np.full((T, N), np.nan)
    for i in range(N):
        for t in np.flatnonzero(valid[:, i]):
            total, discount, u = 0.0, 1.0, t
            while u < T:
                next_value = 0.0 if terminated[u, i] else values[u + 1, i]
                total += discount * (rewards[u, i] + gamma * next_value - values[u, i])
                if terminated[u, i] or truncated[u, i]:
                    break
                discount, u = discount * gamma * lam, u + 1
            advantages[t, i] = total
    return advantages


@pytest.mark.parametrize(("gamma", "lam"), [(0.99, 0.95), (0.9, 0.0), (1.0, 1.0), (0.5, 0.3)])
def test_advantages_are_the_sum_of_the_definition_on_random_episodes(gamma, lam):
    rows = 0
    for seed in range(100):
        rewards, values, terminated, truncated, valid = random_rollout(seed)
        tensors = map(torch.from_numpy, (rewards, values, terminated, truncated))
        advantages, returns = core.compute_gae(*tensors, gamma, lam)
        expected = slow_gae(rewards, values, terminated, truncated, valid, gamma, lam)
        np.testing.assert_allclose(advantages.numpy()[valid], expected[valid], rtol=1e-10)
        np.testing.assert_allclose((returns - advantages)[valid], values[:-1][valid], atol=1e-12)
        rows += (~valid).sum()
    assert rows > 500  # there were many reset rows


def test_termination_stops_the_bootstrap():
    advantages, returns = core.compute_gae(
        row(1, 2), row(10, 20, 1e6), flags(0, 1), flags(0, 0), gamma=0.5, gae_lambda=0.5
    )
    last = 2 - 20
    assert advantages[:, 0].tolist() == [1 + 0.5 * 20 - 10 + 0.25 * last, last]
    assert returns[:, 0].tolist() == [1 + 0.5 * 20 + 0.25 * last, 2]


def test_truncation_bootstraps_from_the_last_observation():
    advantages, _ = core.compute_gae(
        row(1, 2), row(10, 20, 40), flags(0, 0), flags(0, 1), gamma=0.5, gae_lambda=0.5
    )
    last = 2 + 0.5 * 40 - 20
    assert advantages[:, 0].tolist() == [1 + 0.5 * 20 - 10 + 0.25 * last, last]


@pytest.mark.parametrize("ending", [(1, 0), (0, 1), (1, 1)])
def test_either_ending_stops_the_trace_of_the_next_episode(ending):
    endings, found = [flags(e, 0, 0) for e in ending], []
    for later in (0.0, 1e9):
        rewards, values = row(1, 0, later), row(3, 5, later, later)
        advantages, _ = core.compute_gae(rewards, values, *endings, 0.9, 1.0)
        found.append(advantages[0, 0].item())
    assert found[0] == found[1] == 1 + (0 if ending[0] else 0.9 * 5) - 3


def test_the_end_of_a_rollout_bootstraps_and_is_no_ending():
    advantages, _ = core.compute_gae(row(1), row(10, 20), flags(0), flags(0), 0.5, 0.95)
    assert advantages.item() == 1 + 0.5 * 20 - 10


def test_with_lambda_one_the_advantage_is_the_monte_carlo_return_minus_the_value():
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=9), rng.normal(size=10)
    terminated = flags(*[0] * 8, 1)
    advantages, returns = core.compute_gae(
        row(*rewards), row(*values), terminated, flags(*[0] * 9), 0.9, 1.0
    )
    monte_carlo = [sum(0.9**j * r for j, r in enumerate(rewards[t:])) for t in range(9)]
    np.testing.assert_allclose(returns[:, 0], monte_carlo, rtol=1e-12)
    np.testing.assert_allclose(advantages[:, 0], monte_carlo - values[:-1], rtol=1e-12)


def test_with_lambda_zero_the_advantage_is_the_error_of_one_step():
    rewards, values, terminated, truncated, _ = random_rollout(3)
    tensors = map(torch.from_numpy, (rewards, values, terminated, truncated))
    advantages, _ = core.compute_gae(*tensors, 0.9, 0.0)
    expected = rewards + 0.9 * values[1:] * ~terminated - values[:-1]
    np.testing.assert_allclose(advantages, expected, rtol=1e-12)


# ---- batch ---------------------------------------------------------------------------------------


def collected(**settings):
    """The second rollout of a script with both endings: it begins with reset rows."""
    torch.manual_seed(0)
    config = toy_envs.script_config((3, -4, 7, -7), init_std=2.0, **settings)
    collection = toy_envs.Collection(config)
    collection.rollout()
    return collection, collection.rollout(), config


def test_a_batch_holds_the_valid_rows_and_their_advantages_by_the_slow_loop():
    collection, buffer, config = collected(gamma=0.9, gae_lambda=0.7)
    valid, agent = buffer.valid, collection.learner.agent
    batch = core.make_batch(buffer, agent, buffer.rewards, config)
    assert 0 < (~valid).sum() < valid.sum() == len(batch.obs)
    values = agent.value(buffer.obs).detach()
    tensors = (buffer.rewards, values, buffer.terminated, buffer.truncated, valid)
    raw = slow_gae(*(tensor.numpy() for tensor in tensors), 0.9, 0.7)[valid.numpy()]
    torch.testing.assert_close(batch.obs, buffer.obs[:-1][valid])
    torch.testing.assert_close(batch.actions, buffer.actions[valid])
    torch.testing.assert_close(batch.logprobs, buffer.logprobs[valid])
    torch.testing.assert_close(batch.values, values[:-1][valid])
    np.testing.assert_allclose(batch.returns, raw + batch.values.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(batch.advantages, (raw - raw.mean()) / raw.std(), atol=1e-5)


def test_a_termination_that_pays_more_than_a_failure_is_bootstrapped_like_a_truncation():
    """By the reward as the environment gave it, whatever it was scaled to."""
    collection, buffer, config = collected(gamma=0.9, gae_lambda=0.7)
    valid, agent = buffer.valid, collection.learner.agent
    paid = sorted(buffer.rewards[buffer.terminated].tolist())
    bound = paid[0]
    failed = buffer.terminated & (buffer.rewards <= bound)
    assert bound < paid[-1]
    config = dataclasses.replace(config, failure_reward=bound)
    batch = core.make_batch(buffer, agent, buffer.rewards - 50, config)
    cut = buffer.truncated | (buffer.terminated & ~failed)
    values = agent.value(buffer.obs).detach()
    tensors = (buffer.rewards - 50, values, failed, cut, valid)
    raw = slow_gae(*(tensor.numpy() for tensor in tensors), 0.9, 0.7)[valid.numpy()]
    np.testing.assert_allclose(batch.returns, raw + batch.values.numpy(), rtol=1e-5, atol=1e-5)


def test_a_fall_of_the_walker_is_the_failure_of_its_preset():
    config = core.Config.for_env("BipedalWalker-v3")
    seeds = core.env_seeds(1, core.TEST, 5)
    *_, (_, last) = core.play(lambda obs: np.ones((len(obs), 4), np.float32), config, seeds)
    assert last["terminated"]
    assert last["rewards"] == config.failure_reward == -100


def test_advantages_have_mean_zero_and_std_one_over_the_valid_rows():
    collection, buffer, config = collected()
    batch = core.make_batch(buffer, collection.learner.agent, 100 + buffer.rewards, config)
    np.testing.assert_allclose(batch.advantages.mean(), 0, atol=1e-5)
    np.testing.assert_allclose(batch.advantages.std(correction=0), 1, rtol=1e-5)


def test_what_stands_on_reset_rows_changes_nothing_in_the_batch():
    collection, buffer, config = collected()
    running, normalizer = collection.buffer.discounted, collection.learner.reward_normalizer
    batches = []
    for poison in (0.0, 1e30):
        poisoned, stats = copy.deepcopy(buffer), copy.deepcopy(normalizer)
        for tensor in (poisoned.actions, poisoned.logprobs, poisoned.rewards):
            tensor[~buffer.valid] = poison
        rewards = stats(poisoned.rewards, poisoned.valid, running.clone())
        batches.append(core.make_batch(poisoned, collection.learner.agent, rewards, config))
    for name, clean, poisoned in zip(core.Batch._fields, *batches, strict=True):
        assert torch.equal(clean, poisoned), name


def test_a_batch_needs_no_gradient():
    collection, buffer, config = collected()
    batch = core.make_batch(buffer, collection.learner.agent, buffer.rewards, config)
    assert not any(tensor.requires_grad for tensor in batch)


def test_a_rollout_of_equal_advantages_gives_zeros_and_not_nan():
    collection, buffer, config = collected(gamma=0.0)
    with torch.no_grad():
        for parameter in collection.learner.agent.critic.parameters():
            parameter.zero_()
    batch = core.make_batch(buffer, collection.learner.agent, torch.ones(7, 4), config)
    assert not batch.advantages.any()
