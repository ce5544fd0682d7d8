"""Seeds, vector environments and the two normalisers."""

from __future__ import annotations

import itertools
import random

import gymnasium as gym
import numpy as np
import pytest
import torch
import toy_envs
from gymnasium.vector import AutoresetMode

import walker_core as core

STREAMS = (core.TRAIN, core.EVALUATE, core.CONFIRM, core.VIDEO, core.TEST, core.LEARN)


def walker(**settings) -> core.Config:
    return core.Config(env="BipedalWalker-v3", **{"num_envs": 3, **settings})


# ---- seeds ---------------------------------------------------------------------------------------


def test_the_first_seeds_are_the_same_whatever_the_count():
    seeds = core.env_seeds(11, core.TEST, 100)
    assert len(set(seeds)) == 100
    for count in (1, 7, 99):
        assert core.env_seeds(11, core.TEST, count) == seeds[:count]


def test_seeds_are_the_words_of_numpys_seed_sequence_without_their_last_bit():
    for seed, stream, rank in [(0, 0, 0), (11, core.TEST, 3), (2**32 - 1, core.VIDEO, 1)]:
        words = np.random.SeedSequence([seed, stream, rank]).generate_state(5)
        assert core.env_seeds(seed, stream, 5, rank) == [int(word) // 2 for word in words]


def test_runs_share_no_world_between_seeds_streams_ranks_or_steps():
    keys = itertools.product((1, 2, 3), STREAMS, (0, 1), (0, 4096))
    seeds = [s for seed, stream, *at in keys for s in core.env_seeds(seed, stream, 100, *at)]
    assert len(set(seeds)) == len(seeds) == 3 * 6 * 2 * 2 * 100


def test_seeds_are_plain_integers_of_31_bits():
    seeds = core.env_seeds(1, core.TRAIN, 5000)
    assert all(type(seed) is int and 0 <= seed < 2**31 for seed in seeds)
    assert max(seeds) >= 2**30  # and use them all


def test_a_step_of_a_run_seeds_all_three_generators_alike_each_time_and_no_two_steps_alike():
    def drawn(seed: int, step: int) -> tuple[float, float, float]:
        core.seed_everything(seed, 0, step)
        return random.random(), np.random.rand(), float(torch.rand(()))

    keys = list(itertools.product((0, 1, 2, 2**32 - 1), (0, 32, 64, 10**9)))
    draws = {key: drawn(*key) for key in keys}
    for key in reversed(keys):
        random.random(), np.random.rand(3), torch.rand(5)
        assert drawn(*key) == draws[key]
    for of_one_generator in zip(*draws.values(), strict=True):
        assert len(set(of_one_generator)) == len(keys)


# ---- vector environments -------------------------------------------------------------------------


def test_sync_and_async_environments_walk_the_same_for_one_seed():
    actions = np.random.default_rng(0).uniform(-1, 1, (15, 3, 4)).astype(np.float32)
    walks = []
    for backend in ("sync", "async"):
        envs, obs = core.make_vector_env(walker(vector_env=backend), core.env_seeds(1, 0, 3))
        steps = [envs.step(a) for a in actions]
        walks.append((obs, np.stack([s[0] for s in steps]), np.stack([s[1] for s in steps])))
        envs.close()
    for one, other in zip(*walks, strict=True):
        np.testing.assert_array_equal(one, other)


def test_each_environment_starts_as_if_reset_alone_with_its_own_seed():
    seeds = core.env_seeds(7, core.TRAIN, 3)
    _, obs = core.make_vector_env(walker(), seeds)
    alone = [gym.make("BipedalWalker-v3").reset(seed=seed)[0] for seed in seeds]
    np.testing.assert_array_equal(obs, alone)
    assert len(np.unique(obs, axis=0)) == 3


@pytest.mark.parametrize("backend", ["sync", "async"])
def test_the_row_after_an_episodes_end_is_a_reset_of_the_next_step_kind(backend):
    config = toy_envs.script_config((2, -1), vector_env=backend, num_envs=2)
    envs, _ = core.make_vector_env(config, [0, 1])
    assert envs.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    expected = [toy_envs.script_rows(tag, (2, -1)) for tag in range(2)]
    for _ in range(9):
        obs, rewards, terminated, truncated, _ = envs.step(np.ones((2, 2), np.float32))
        for i, row in enumerate(next(rows) for rows in expected):
            assert tuple(obs[i, :3]) == row.obs
            assert tuple(obs[i, 3:]) == ((1, 1) if row.valid else (0, 0))
            assert (rewards[i], terminated[i], truncated[i]) == row[1:4]
    envs.close()


def test_env_kwargs_reach_every_environment():
    config = core.Config(env="BipedalWalker-v3", env_kwargs=("hardcore=True",), num_envs=2)
    assert core.make_env(config).unwrapped.hardcore is True
    envs, _ = core.make_vector_env(config, [1, 2])
    assert [env.unwrapped.hardcore for env in envs.envs] == [True, True]
    assert core.make_env(walker()).unwrapped.hardcore is False


@pytest.mark.parametrize("name", toy_envs.UNSUPPORTED)
def test_a_space_that_ppo_cannot_use_is_one_clear_line(name):
    which = toy_envs.UNSUPPORTED[name][1]
    with pytest.raises(core.UserError) as caught:
        core.make_env(core.Config(env=name))
    text = str(caught.value)
    assert "\n" not in text
    assert name in text
    assert f"its {which}s are no" in text


@pytest.mark.parametrize(
    "settings",
    [{"env": "NoSuch-v9"}, {"env": "no_such_module:X-v0"}, {"env_kwargs": ("no_such=1",)}],
)
def test_an_environment_that_cannot_be_made_is_one_line_that_names_it(settings):
    with pytest.raises(core.UserError) as caught:
        core.make_env(core.Config(**settings))
    assert "\n" not in str(caught.value)
    assert settings.get("env", "BipedalWalker-v3") in str(caught.value)


def test_an_environment_that_knows_nothing_of_rendering_can_be_made():
    config = core.Config(env="Toy/Reach-v0", num_envs=2)
    assert core.make_env(config).spec.max_episode_steps == 10
    assert core.make_vector_env(config, [1, 2])[1].shape == (2, 1)


def test_envpool_resets_on_the_next_step_and_gives_each_environment_its_seed():
    pytest.importorskip("envpool")
    config, actions = walker(vector_env="envpool"), np.ones((3, 4), np.float32)
    envs, first = core.make_vector_env(config, [5, 6, 7])
    assert first.shape == (3, 24)
    assert len(np.unique(first, axis=0)) == 3
    other, shifted = core.make_vector_env(config, [6, 5, 7])
    np.testing.assert_array_equal(shifted, first[[1, 0, 2]])
    assert envs.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP

    ended, resets = np.zeros(3, bool), 0
    for t in range(300):
        obs, rewards, terminated, truncated, _ = envs.step(actions * np.float32(np.sin(t)))
        assert np.all(rewards[ended] == 0)
        assert not np.any((terminated | truncated)[ended])
        assert np.all(np.abs(obs[ended, 8]) <= 1)  # a walker at rest, its legs within their joints
        assert np.all(rewards[terminated] == -100)  # the last reward comes with the ending
        resets += ended.sum()
        ended = terminated | truncated
    assert resets >= 3
    envs.close()
    other.close()


def test_env_kwargs_reach_envpool_and_its_time_limit_is_a_truncation():
    pytest.importorskip("envpool")
    config = walker(vector_env="envpool", env_kwargs=("max_episode_steps=4",))
    envs, _ = core.make_vector_env(config, [5, 6, 7])
    steps = [envs.step(np.zeros((3, 4), np.float32)) for _ in range(10)]
    envs.close()
    for t, (_, _, terminated, truncated, _) in enumerate(steps):
        assert not terminated.any()
        assert truncated.tolist() == [t % 5 == 3] * 3  # four steps, and a reset row


def test_envpool_refuses_an_environment_that_it_does_not_have():
    pytest.importorskip("envpool")
    config = toy_envs.script_config((3,), vector_env="envpool")
    with pytest.raises(core.UserError, match=r"envpool has no Toy/Script-v0"):
        core.make_vector_env(config, range(4))


# ---- normalisers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (3,)])
def test_running_statistics_are_numpys_over_the_raw_stream(shape):
    rng = np.random.default_rng(0)
    stats, stream = core.RunningMeanStd(core.Config(), shape), []
    for rows in (1, 7, 64, 1, 300, 2, 5):
        batch = 1000 + rng.normal(size=(rows, *shape)) * (1 + rows)
        stats.update(torch.from_numpy(batch))
        stream.append(batch)
        seen = np.concatenate(stream)
        assert stats.count == len(seen)
        np.testing.assert_allclose(stats.mean.numpy(), seen.mean(0), rtol=1e-12)
        np.testing.assert_allclose(stats.var.numpy(), seen.var(0), rtol=1e-9, atol=1e-12)


def test_observations_are_scaled_by_hand_arithmetic_and_clipped_at_both_sides():
    normalizer = core.ObservationNormalizer(core.Config(clip_obs=3.0), (2,))
    normalizer.update(torch.tensor([[0.0, 5.0], [4.0, 15.0]]))  # means 2 and 10, stds 2 and 5
    scaled = normalizer.normalize(np.array([[3.0, 7.5], [100.0, -100.0]], np.float32))
    assert scaled.dtype == torch.float32
    np.testing.assert_allclose(scaled.numpy(), [[0.5, -0.5], [3.0, -3.0]], rtol=1e-6)


def test_normalising_changes_no_statistics_and_before_the_first_rollout_it_only_clips():
    normalizer = core.ObservationNormalizer(core.Config(clip_obs=3.0), (2,))
    scaled = normalizer.normalize(np.array([[0.5, -50.0]], np.float32))
    np.testing.assert_allclose(scaled.numpy(), [[0.5, -3.0]], rtol=1e-6)
    assert (normalizer.count, normalizer.mean.tolist()) == (0, [0, 0])
    assert normalizer.var.tolist() == [1, 1]


def test_no_rows_leave_the_statistics_as_they_were():
    normalizer, none = core.ObservationNormalizer(core.Config(), (2,)), torch.zeros(0, 2)
    normalizer.update(none)
    assert normalizer.count == 0
    assert torch.isfinite(normalizer.normalize(np.ones((3, 2), np.float32))).all()
    normalizer.update(torch.tensor([[0.0, 5.0], [4.0, 15.0]]))
    normalizer.update(none)
    assert (normalizer.mean.tolist(), normalizer.var.tolist()) == ([2, 10], [4, 25])
    assert normalizer.count == 2


def test_disabled_observation_normalisation_passes_raw_values():
    normalizer = core.ObservationNormalizer(core.Config(norm_obs=False, clip_obs=0.1), (2,))
    obs = np.array([[1e4, -1e4]], np.float32)
    normalizer.update(torch.from_numpy(obs))
    assert torch.equal(normalizer.normalize(obs), torch.from_numpy(obs))


def test_after_each_rollout_the_statistics_are_numpys_over_all_rows_that_steps_returned():
    """Of all environments; the first observations of a run are none, so a restart adds nothing."""
    lengths, stream = (3, -2), []
    collection = toy_envs.Collection(toy_envs.script_config(lengths, norm_obs=True))
    scripts = [toy_envs.script_rows(tag, lengths) for tag in range(4)]
    for k in range(1, 4):
        collection.rollout()
        stream += [row.obs for script in scripts for row in itertools.islice(script, 7)]
        stats = collection.normalizer
        assert stats.mean.shape == (5,)
        assert stats.count == len(stream) == k * 7 * 4
        np.testing.assert_allclose(stats.mean[:3].numpy(), np.mean(stream, 0), rtol=1e-12)
        np.testing.assert_allclose(stats.var[:3].numpy(), np.var(stream, 0), rtol=1e-12)


def discounted_returns(rewards: np.ndarray, valid: np.ndarray, gamma: float) -> list[float]:
    """Σ_j γ^j r_{t-j} over the episode so far, for each valid row of one environment."""
    found, episode = [], []
    for reward, is_valid in zip(rewards, valid, strict=True):
        if not is_valid:
            episode = []
            continue
        episode.append(float(reward))
        found.append(sum(gamma**j * r for j, r in enumerate(reversed(episode))))
    return found


@pytest.mark.parametrize("gamma", [0.99, 0.5, 0.0, 1.0])
def test_rewards_are_scaled_as_a_slow_loop_over_whole_episodes_says(gamma):
    lengths, settings = (5, -3, 1, 9, -1, -12), {"gamma": gamma, "clip_reward": (-2.0, 3.0)}
    collection = toy_envs.Collection(toy_envs.script_config(lengths, **settings))
    raw, valid = np.zeros((0, 4)), np.zeros((0, 4), bool)
    for _ in range(5):
        buffer = collection.rollout()
        scaled = collection.rewards(buffer).numpy()
        raw = np.concatenate([raw, buffer.rewards.numpy()])
        valid = np.concatenate([valid, buffer.valid.numpy()])
        streams = [discounted_returns(raw[:, i], valid[:, i], gamma) for i in range(4)]
        std = np.std(np.concatenate(streams))
        expected = np.clip(raw[-7:] / std, -2, 3)
        np.testing.assert_allclose(scaled, expected, rtol=1e-5)
        assert collection.learner.reward_normalizer.count == valid.sum()
    assert not valid.all()


def test_the_last_return_never_enters_the_next_episode():
    normalizer = core.RewardNormalizer(core.Config(gamma=0.5))
    running = torch.zeros(2)
    valid = torch.tensor([[True, True], [True, True], [False, True], [True, True]])
    rewards = torch.tensor([[8.0, 8.0], [4.0, 4.0], [0.0, 2.0], [1.0, 1.0]])
    normalizer(rewards, valid, running)
    assert running.tolist() == [1.0, 1 + 1 + 1 + 1]  # the second is one long episode
    normalizer(rewards[2:], valid[2:], running)  # goes over to the next rollout
    assert running.tolist() == [1.0, 1 + 0.5 * (2 + 0.5 * 4)]


def test_what_stands_on_a_reset_row_never_enters_the_reward_statistics():
    valid = torch.tensor([[True], [True], [False], [True]])
    rewards, results = torch.tensor([[1.0], [2.0], [0.0], [4.0]]), []
    for poison in (0.0, 1e6):
        normalizer, running = core.RewardNormalizer(core.Config(gamma=0.9)), torch.zeros(1)
        rewards[2] = poison
        results.append(normalizer(rewards, valid, running)[valid].tolist())
        assert normalizer.count == 3
        np.testing.assert_allclose(normalizer.mean, np.mean([1, 2.9, 4]), rtol=1e-6)
        np.testing.assert_allclose(running, [4.0])
    assert results[0] == results[1]


def test_disabled_reward_normalisation_passes_raw_rewards():
    normalizer = core.RewardNormalizer(core.Config(norm_reward=False, clip_reward=(-0.1, 0.1)))
    rewards, running = torch.tensor([[100.0], [-100.0]]), torch.zeros(1)
    assert torch.equal(normalizer(rewards, torch.ones(2, 1, dtype=torch.bool), running), rewards)
    assert normalizer.count == 0
