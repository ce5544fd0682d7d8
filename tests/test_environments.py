"""Seeds, vector environments and the two normalizers."""

import itertools
import random

import gymnasium as gym
import numpy as np
import pytest
import torch
import toy_envs
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode

import walker_core as core

STREAMS = (core.TRAIN, core.EVALUATE, core.CONFIRM, core.VIDEO, core.TEST, core.LEARN)
PAIR = Box(-np.inf, np.inf, (2,), np.float32)


def walker(**settings) -> core.Config:
    return core.Config(env="BipedalWalker-v3", **{"num_envs": 3, **settings})


def make_vector_env(config, seeds):
    return core.make_vector_env(config, core.make_env(config), seeds)


# ---- seeds ---------------------------------------------------------------------------------------


def test_seeds_are_the_words_of_numpys_seed_sequence_without_their_last_bit():
    for seed, stream, rank in [(0, 0, 0), (11, core.TEST, 3), (2**32 - 1, core.VIDEO, 1)]:
        words = np.random.SeedSequence([seed, stream, rank]).generate_state(100)
        seeds = [int(word) // 2 for word in words]
        for count in (1, 7, 100):  # the first ones are the same whatever the count
            assert core.env_seeds(seed, stream, count, rank) == seeds[:count]
        assert {type(seed) for seed in core.env_seeds(seed, stream, 9, rank)} == {int}


def test_runs_share_no_world_between_seeds_streams_ranks_or_steps():
    keys = itertools.product((1, 2, 3), STREAMS, (0, 1), (0, 4096))
    seeds = [s for seed, stream, *at in keys for s in core.env_seeds(seed, stream, 100, *at)]
    assert len(set(seeds)) == len(seeds) == 3 * 6 * 2 * 2 * 100


def test_a_step_of_a_run_seeds_all_three_generators_the_same_each_time_and_no_two_steps_alike():
    def draw(*key: int) -> tuple[float, float, float]:
        core.seed_generators(core.env_seeds(key[0], core.LEARN, 1, *key[1:])[0])
        return random.random(), np.random.rand(), float(torch.rand(()))

    keys = list(itertools.product((0, 1, 2**32 - 1), (0, 1), (0, 32, 10**9)))  # seed, rank, step
    draws = {key: draw(*key) for key in keys}
    for key in reversed(keys):
        random.random(), np.random.rand(3), torch.rand(5)
        assert draw(*key) == draws[key]
    for of_one_generator in zip(*draws.values(), strict=True):
        assert len(set(of_one_generator)) == len(keys)


# ---- vector environments -------------------------------------------------------------------------


def test_each_environment_starts_as_if_reset_alone_with_its_own_seed():
    seeds = core.env_seeds(7, core.TRAIN, 3)
    _, obs = make_vector_env(walker(), seeds)
    alone = [gym.make("BipedalWalker-v3").reset(seed=seed)[0] for seed in seeds]
    np.testing.assert_array_equal(obs, alone)
    assert len(np.unique(obs, axis=0)) == 3


def test_the_row_after_an_episodes_end_is_the_reset():
    config = toy_envs.script_config((2, -1), num_envs=2)
    envs, _ = make_vector_env(config, [0, 1])
    assert envs.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    scripts = [toy_envs.script_rows(tag, (2, -1)) for tag in range(2)]
    for _ in range(9):
        obs, rewards, terminated, truncated, _ = envs.step(np.ones((2, 2), np.float32))
        for i, row in enumerate(map(next, scripts)):
            assert tuple(obs[i, :3]) == row.obs
            assert tuple(obs[i, 3:]) == ((1, 1) if row.valid else (0, 0))
            found = rewards[i], terminated[i], truncated[i]
            assert found == (row.reward, row.terminated, row.truncated)


def test_env_kwargs_reach_every_environment():
    config = walker(env_kwargs=("hardcore=True",), num_envs=2)
    envs, _ = make_vector_env(config, [1, 2])
    assert [env.unwrapped.hardcore for env in envs.envs] == [True, True]
    assert core.make_env(walker()).unwrapped.hardcore is False


@pytest.mark.parametrize("name", toy_envs.UNSUPPORTED)
def test_a_space_that_ppo_cannot_use_is_refused(name):
    which = toy_envs.UNSUPPORTED[name][1]
    with pytest.raises(core.UserError, match=f"{name}: its spaces are not supported: .*{which}"):
        core.make_env(core.Config(env=name))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"env": "NoSuch-v9"}, "NoSuch-v9"),
        ({"env": "no_such_module:X-v0"}, "no_such_module"),
        ({"env_kwargs": ("no_such=1",)}, "no_such"),
        ({"env": "CartPole-v1", "action_cost": (0.0, 0.3)}, "--action-cost"),
    ],
)
def test_an_environment_that_cannot_be_made_is_one_line_that_names_it(settings, named):
    with pytest.raises(core.UserError) as caught:
        core.make_env(core.Config(**settings))
    assert "\n" not in str(caught.value)
    assert settings.get("env", "BipedalWalker-v3") in str(caught.value)
    assert named in str(caught.value)


def test_envpool_resets_on_the_next_step_and_gives_each_environment_its_seed():
    pytest.importorskip("envpool")
    config, actions = walker(vector_env="envpool"), np.ones((3, 4), np.float32)
    envs, first = make_vector_env(config, [5, 6, 7])
    assert first.shape == (3, 24)
    assert len(np.unique(first, axis=0)) == 3
    _, shifted = make_vector_env(config, [6, 5, 7])
    np.testing.assert_array_equal(shifted, first[[1, 0, 2]])

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


def test_env_kwargs_reach_envpool_and_its_time_limit_is_a_truncation():
    pytest.importorskip("envpool")
    config = walker(vector_env="envpool", env_kwargs=("max_episode_steps=4",))
    envs, _ = make_vector_env(config, [5, 6, 7])
    steps = [envs.step(np.zeros((3, 4), np.float32)) for _ in range(10)]
    for t, (_, _, terminated, truncated, _) in enumerate(steps):
        assert not terminated.any()
        assert truncated.tolist() == [t % 5 == 3] * 3  # four steps, and a reset row


def test_envpool_refuses_an_environment_that_it_does_not_have():
    pytest.importorskip("envpool")
    config = toy_envs.script_config((3,), vector_env="envpool")
    with pytest.raises(core.UserError, match=r"envpool has no Toy/Script-v0.* use sync"):
        make_vector_env(config, range(4))


# ---- normalizers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "scale"), [(1.7e12, 1.0), (-1e9, 1.0), (0.0, 1e-6), (5.0, 1e-6)]
)
def test_neither_a_large_offset_nor_a_small_scale_is_lost(offset, scale):
    statistics = core.ObservationNormalizer(core.Config(), PAIR)
    stream = np.random.default_rng(3).normal(0, scale, (900, 2))
    for batch in np.split(offset + stream, 9):
        statistics.update(torch.from_numpy(batch))
    np.testing.assert_allclose(statistics.var.sqrt(), stream.std(0), rtol=1e-3)
    normalized = statistics.normalize(offset + stream).numpy()
    np.testing.assert_allclose(normalized.std(0), 1, rtol=1e-2)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_running_statistics_are_numpys_over_the_whole_stream(shape):
    rng = np.random.default_rng(0)
    stats, stream = core.RunningMeanStd(shape), []
    stats.update(torch.zeros(0, *shape))
    assert torch.isfinite(torch.cat([stats.mean.flatten(), stats.var.flatten()])).all()
    for rows in (1, 7, 64, 0, 1, 300, 2, 5):
        batch = 1000 + rng.normal(size=(rows, *shape)) * (1 + rows)
        stats.update(torch.from_numpy(batch))
        stream.append(batch)
        seen = np.concatenate(stream)
        assert stats.count == len(seen)
        np.testing.assert_allclose(stats.mean.numpy(), seen.mean(0), rtol=1e-12)
        np.testing.assert_allclose(stats.var.numpy(), seen.var(0), rtol=1e-9, atol=1e-12)


def test_the_variance_of_a_constant_is_not_negative():
    stats = core.RunningMeanStd((1,))
    for count in (7, 8, 9):
        stats.update(torch.full((count, 1), 123456.789))
    assert stats.mean.item() == pytest.approx(123456.789)
    assert 0 <= stats.var.item() < 1e-4


def test_observations_are_scaled_and_clipped_at_both_sides_and_change_no_statistics():
    normalizer = core.ObservationNormalizer(core.Config(clip_obs=3.0), PAIR)
    raw = np.array([[0.5, -50.0]], np.float32)
    np.testing.assert_allclose(normalizer.normalize(raw), [[0.5, -3.0]], rtol=1e-6)
    assert (normalizer.count, normalizer.mean.tolist()) == (0, [0, 0])
    assert normalizer.var.tolist() == [1, 1]
    normalizer.update(torch.tensor([[0.0, 5.0], [4.0, 15.0]]))  # means 2 and 10, stds 2 and 5
    scaled = normalizer.normalize(np.array([[3.0, 7.5], [100.0, -100.0]], np.float32))
    assert scaled.dtype == torch.float32
    np.testing.assert_allclose(scaled.numpy(), [[0.5, -0.5], [3.0, -3.0]], rtol=1e-6)


def test_without_norm_obs_and_norm_reward_values_pass_raw():
    raw = dict(norm_obs=False, clip_obs=0.1, norm_reward=False, clip_reward=(-0.1, 0.1))
    config, obs = core.Config(**raw), np.array([[1e4, -1e4]], np.float32)
    normalizer = core.ObservationNormalizer(config, PAIR)
    normalizer.update(torch.from_numpy(obs))
    assert torch.equal(normalizer.normalize(obs), torch.from_numpy(obs))
    rewards, valid = torch.from_numpy(obs.T), torch.ones(2, 1, dtype=torch.bool)
    rewarder = core.RewardNormalizer(config)
    assert torch.equal(rewarder.normalize(rewards, valid, torch.zeros(1)), rewards)
    assert torch.equal(rewarder.scale(rewards), rewards)


def test_after_each_rollout_the_statistics_are_numpys_over_all_rows_that_steps_returned():
    """Of all environments; the first observations of a run are none, so a resume adds nothing."""
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


@pytest.mark.parametrize("gamma", [0.99, 0.5, 0.0])
def test_rewards_are_divided_by_the_std_of_discounted_returns_of_whole_episodes(gamma):
    """Of the run's own γ, from zero at the start of every episode, without the reset rows."""
    lengths, settings = (5, -3, 1, 9, -1, -12), {"gamma": gamma, "clip_reward": (-2.0, 3.0)}
    collection = toy_envs.Collection(toy_envs.script_config(lengths, **settings))
    raw, valid = np.zeros((0, 4)), np.zeros((0, 4), bool)
    for _ in range(5):
        buffer = collection.rollout()
        raw = np.concatenate([raw, buffer.rewards.numpy()])
        valid = np.concatenate([valid, buffer.valid.numpy()])
        buffer.rewards[~buffer.valid] = 1e6
        scaled = collection.rewards(buffer).numpy()
        streams = [discounted_returns(raw[:, i], valid[:, i], gamma) for i in range(4)]
        std = np.std(np.concatenate(streams))
        expected = np.clip(raw[-7:] / std, -2, 3)
        np.testing.assert_allclose(scaled[valid[-7:]], expected[valid[-7:]], rtol=1e-5)
        assert collection.learner.reward_normalizer.count == valid.sum()
    assert not valid.all()


def test_the_discounted_return_goes_on_into_the_next_rollout_and_not_into_the_next_episode():
    normalizer, running = core.RewardNormalizer(core.Config(gamma=0.5)), torch.zeros(2)
    valid = torch.tensor([[True, True], [True, True], [False, True], [True, True]])
    rewards = torch.tensor([[8.0, 8.0], [4.0, 4.0], [0.0, 2.0], [1.0, 1.0]])
    normalizer.normalize(rewards, valid, running)
    assert running.tolist() == [1.0, 1 + 1 + 1 + 1]  # the second is one long episode
    normalizer.normalize(rewards[2:], valid[2:], running)
    assert running.tolist() == [1.0, 1 + 0.5 * (2 + 0.5 * 4)]
