"""Advantages under two endings and reset rows, and the batch made of them."""

import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy_envs

import walker_core as core


def column(*numbers: float) -> torch.Tensor:
    """Numbers over time for one environment, (T, 1)."""
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
    reset_rows = 0
    for seed in range(50):
        *rollout, valid = random_rollout(seed)
        advantages, returns = core.compute_gae(*map(torch.from_numpy, rollout), gamma, lam)
        expected = slow_gae(*rollout, valid, gamma, lam)
        values = rollout[1][:-1]
        np.testing.assert_allclose(advantages.numpy()[valid], expected[valid], rtol=1e-10)
        np.testing.assert_allclose((returns - advantages)[valid], values[valid], atol=1e-12)
        reset_rows += (~valid).sum()
    assert reset_rows > 200


def test_termination_stops_the_bootstrap():
    advantages, returns = core.compute_gae(
        column(1, 2), column(10, 20, 1e6), flags(0, 1), flags(0, 0), gamma=0.5, gae_lambda=0.5
    )
    last = 2 - 20
    assert advantages[:, 0].tolist() == [1 + 0.5 * 20 - 10 + 0.25 * last, last]
    assert returns[:, 0].tolist() == [1 + 0.5 * 20 + 0.25 * last, 2]


def test_truncation_bootstraps_from_the_last_observation():
    advantages, _ = core.compute_gae(
        column(1, 2), column(10, 20, 40), flags(0, 0), flags(0, 1), gamma=0.5, gae_lambda=0.5
    )
    last = 2 + 0.5 * 40 - 20
    assert advantages[:, 0].tolist() == [1 + 0.5 * 20 - 10 + 0.25 * last, last]


@pytest.mark.parametrize("ending", [(1, 0), (0, 1), (1, 1)])
def test_either_ending_stops_the_trace(ending):
    terminated, truncated = (flags(value, 0, 0) for value in ending)
    found = []
    for later in (0.0, 1e9):  # in the next episode
        rewards, values = column(1, 0, later), column(3, 5, later, later)
        advantages, _ = core.compute_gae(rewards, values, terminated, truncated, 0.9, 1.0)
        found.append(advantages[0, 0].item())
    assert found == [1 + (0 if ending[0] else 0.9 * 5) - 3] * 2


# ---- batch ---------------------------------------------------------------------------------------


def collected(**settings):
    """The second rollout of a script with both endings: it begins with reset rows."""
    torch.manual_seed(0)
    defaults = {"gamma": 0.9, "gae_lambda": 0.7, "init_std": 2.0, "norm_reward": False}
    config = toy_envs.script_config((3, -4, 7, -7), **{**defaults, **settings})
    collection = toy_envs.Collection(config)
    collection.rollout()
    return collection, collection.rollout(), config


def slow_advantages(buffer, rewards, values, terminated, truncated) -> np.ndarray:
    """Those of the valid rows, before normalization."""
    tensors = (rewards, values, terminated, truncated, buffer.valid)
    return slow_gae(*(tensor.numpy() for tensor in tensors), 0.9, 0.7)[buffer.valid.numpy()]


def test_a_batch_holds_the_valid_rows_and_their_advantages_with_mean_0_and_std_1():
    collection, buffer, config = collected()
    valid, agent, rewards = buffer.valid, collection.learner.agent, buffer.rewards
    batch = core.make_batch(buffer, agent, collection.learner.reward_normalizer, config)
    assert 0 < (~valid).sum() < valid.sum() == len(batch.obs)
    values = agent.value(buffer.obs).detach()
    raw = slow_advantages(buffer, rewards, values, buffer.terminated, buffer.truncated)
    torch.testing.assert_close(batch.obs, buffer.obs[:-1][valid])
    torch.testing.assert_close(batch.actions, buffer.actions[valid])
    torch.testing.assert_close(batch.logprobs, buffer.logprobs[valid])
    torch.testing.assert_close(batch.values, values[:-1][valid])
    np.testing.assert_allclose(batch.returns, raw + batch.values.numpy(), rtol=1e-5)
    np.testing.assert_allclose(batch.advantages, (raw - raw.mean()) / raw.std(), atol=1e-4)
    assert not any(tensor.requires_grad for tensor in batch)


def test_a_termination_that_pays_more_than_a_failure_is_bootstrapped_like_a_truncation():
    """By the reward as the environment gave it, whatever it was scaled to."""
    collection, buffer, config = collected()
    agent, scaled = collection.learner.agent, buffer.rewards - 50
    normalizer = SimpleNamespace(normalize=lambda rewards, *_: rewards - 50)
    paid = buffer.rewards[buffer.terminated]
    failed = buffer.terminated & (buffer.rewards <= paid.min())
    assert paid.min() < paid.max()
    config = dataclasses.replace(config, failure_reward=float(paid.min()))
    batch = core.make_batch(buffer, agent, normalizer, config)
    cut = buffer.truncated | (buffer.terminated & ~failed)
    raw = slow_advantages(buffer, scaled, agent.value(buffer.obs).detach(), failed, cut)
    np.testing.assert_allclose(batch.returns, raw + batch.values.numpy(), rtol=1e-5, atol=1e-5)


def test_what_is_learned_is_the_reward_less_what_actions_and_failures_cost():
    actions = torch.tensor([[0.5, -0.25], [1, -2], [0, 0], [-1, 0.5], [1, 0.5]])
    rewards = torch.tensor([1.0, -100.0, -100.0, -99.5, -150.0])
    terminated = torch.tensor([False, True, False, True, True])  # of the second, not of the third
    given = rewards, actions, terminated
    costs = {"failure_reward": -100, "failure_cost": 5, "action_cost": 0.5}
    learned, failed = core.learned_rewards(*given, core.Config(**costs))
    spent = [0.375, 1.5, 0.0, 0.75, 0.75]
    assert learned.tolist() == [1 - 0.375, -500 - 1.5, -100, -99.5 - 0.75, -750 - 0.75]
    assert failed.tolist() == [False, True, False, False, True]
    learned, failed = core.learned_rewards(*given, core.Config(action_cost=0.5))
    assert learned.tolist() == (rewards - torch.tensor(spent)).tolist()
    assert failed.tolist() == terminated.tolist()  # without a limit, each is one
    numbers = torch.tensor([0.0, 2.0, 1.0, 1.0, 0.0])
    learned, _ = core.learned_rewards(rewards, numbers, terminated, core.Config())
    assert learned.tolist() == rewards.tolist()


def test_a_batch_is_made_of_what_is_learned():
    costs = {"action_cost": 0.25, "failure_cost": 3.0}
    collection, buffer, config = collected(**costs)
    agent, learned = collection.learner.agent, buffer.rewards.clone()
    for t, i in np.ndindex(7, 4):
        learned[t, i] *= 3 if buffer.terminated[t, i] else 1
        learned[t, i] -= 0.25 * sum(min(abs(float(a)), 1) for a in buffer.actions[t, i])
    batch = core.make_batch(buffer, agent, collection.learner.reward_normalizer, config)
    values = agent.value(buffer.obs).detach()
    raw = slow_advantages(buffer, learned, values, buffer.terminated, buffer.truncated)
    np.testing.assert_allclose(batch.returns, raw + batch.values.numpy(), rtol=1e-5, atol=1e-5)


def test_a_fall_of_the_walker_is_the_failure_of_its_preset():
    config = core.Config.for_env("BipedalWalker-v3")
    *_, (_, last) = core.play(lambda obs: np.ones((len(obs), 4), np.float32), config, [1])
    assert last["terminated"]
    assert last["rewards"] == -100
    # with a bonus for speed, as of examples/reward_wrapper.py, too
    assert last["rewards"] + 50 <= config.failure_reward


def test_what_stands_on_reset_rows_changes_nothing_in_the_batch_not_even_an_action_that_costs():
    collection, buffer, config = collected(norm_reward=True, action_cost=0.5)
    running, batches = collection.buffer.discounted_return, []
    for poison in (0.0, 1e30):
        poisoned = copy.deepcopy(buffer)
        poisoned.discounted_return = running.clone()
        normalizer = copy.deepcopy(collection.learner.reward_normalizer)
        for tensor in (poisoned.actions, poisoned.logprobs, poisoned.rewards):
            tensor[~buffer.valid] = poison
        batch = core.make_batch(poisoned, collection.learner.agent, normalizer, config)
        batches.append({**batch._asdict(), **normalizer.state_dict()})
        batches[-1]["running"] = poisoned.discounted_return
    for name, clean in batches[0].items():
        assert torch.equal(clean, batches[1][name]), name
    assert batches[0]["running"].any()


def test_a_rollout_of_equal_advantages_gives_zeros_and_not_nan():
    collection, buffer, config = collected(gamma=0.0)
    torch.nn.init.zeros_(collection.learner.agent.critic[-1].weight)
    ones = SimpleNamespace(normalize=lambda rewards, *_: torch.ones_like(rewards))
    batch = core.make_batch(buffer, collection.learner.agent, ones, config)
    assert not batch.advantages.any()
