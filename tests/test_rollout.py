"""What a rollout records, on environments whose every step is known beforehand."""

from __future__ import annotations

import importlib.util
import itertools

import numpy as np
import pytest
import torch
import toy_envs

import walker_core as core

SCRIPTS = {
    "terminating": (3, 5),
    "truncating": (-4, -2),
    "mixed": (2, -3, 5, -1),
    "of length one": (1, -1),
    "longer than a rollout": (17, -9, 25),
    "as long as a rollout": (7, -7),
}


def every_script(test):
    return pytest.mark.parametrize("lengths", SCRIPTS.values(), ids=SCRIPTS)(test)


def expected_rows(lengths, config, rollouts) -> list[list[toy_envs.Row]]:
    """For each environment, the rows of so many rollouts."""
    count = rollouts * config.rollout_steps
    scripts = [toy_envs.script_rows(tag, lengths) for tag in range(config.num_envs)]
    return [list(itertools.islice(script, count)) for script in scripts]


def collect(config, rollouts):
    """The rollouts after one another: buffers joined along time, and the episodes of each."""
    collection = toy_envs.Collection(config)
    buffers, episodes = [], []
    for _ in range(rollouts):
        buffers.append(collection.rollout())
        episodes.append(collection.episodes)
    return collection, buffers, episodes


def joined(buffers, name) -> np.ndarray:
    """A tensor of all rollouts, (rollouts × T, N, ...)."""
    return np.concatenate([getattr(buffer, name).numpy() for buffer in buffers])


@every_script
def test_valid_is_false_exactly_on_the_row_after_an_episodes_end_across_rollouts(lengths):
    config = toy_envs.script_config(lengths)
    _, buffers, _ = collect(config, 5)
    expected = [[row.valid for row in rows] for rows in expected_rows(lengths, config, 5)]
    np.testing.assert_array_equal(joined(buffers, "valid").T, expected)


def test_the_flag_that_an_episode_ended_goes_over_to_the_next_rollout():
    collection = toy_envs.Collection(toy_envs.script_config((7,)))
    assert collection.rollout().valid.all()
    assert collection.buffer.ended.all()
    assert collection.rollout().valid.tolist() == [[False] * 4] + [[True] * 4] * 6
    assert not collection.buffer.ended.any()


@every_script
def test_rewards_and_both_endings_are_those_of_the_environment(lengths):
    config = toy_envs.script_config(lengths)
    _, buffers, _ = collect(config, 5)
    rows = expected_rows(lengths, config, 5)
    for name in ("rewards", "terminated", "truncated"):
        expected = [[getattr(row, name.removesuffix("s")) for row in env] for env in rows]
        np.testing.assert_array_equal(joined(buffers, name).T, expected)


@every_script
def test_raw_returns_and_lengths_of_episodes_are_known_also_across_rollouts(lengths):
    config = toy_envs.script_config(lengths, norm_obs=True, gamma=0.9)
    _, _, episodes = collect(config, 8)
    for rollout, found in enumerate(episodes):
        expected = []
        for t, tag in itertools.product(range(7 * rollout, 7 * rollout + 7), range(4)):
            row = expected_rows(lengths, config, 8)[tag][t]
            if row.terminated or row.truncated:
                _, episode, length = row.obs
                pays = [toy_envs.pay(tag, episode, k) for k in range(length)]
                expected.append((sum(pays), length))
        assert found == expected
    assert sum(map(len, episodes)) >= 4


@every_script
def test_the_next_observation_is_what_the_step_returned_also_the_terminal_one(lengths):
    config = toy_envs.script_config(lengths)
    collection, buffers, _ = collect(config, 4)
    rows = expected_rows(lengths, config, 4)
    np.testing.assert_array_equal(buffers[0].obs[0], collection.first_obs)
    returned = np.concatenate([buffer.obs[1:].numpy() for buffer in buffers])
    expected = np.array([[row.obs for row in env] for env in rows])
    np.testing.assert_array_equal(returned[:, :, :3].swapaxes(0, 1), expected)
    for before, after in itertools.pairwise(buffers):
        assert torch.equal(before.obs[-1], after.obs[0])


def test_every_observation_of_a_rollout_is_normalised_by_what_was_seen_before_it():
    """The terminal one like any other. So what is stored is what the policy saw."""
    lengths = (3, -2)
    settings = {"norm_obs": True, "num_envs": 1, "minibatch_size": 4}
    collection = toy_envs.Collection(toy_envs.script_config(lengths, **settings))
    script, seen = toy_envs.script_rows(0, lengths), []
    for _ in range(3):
        mean, var = (np.mean(seen, 0), np.var(seen, 0)) if seen else (0, 1)
        buffer = collection.rollout()
        rows = [row.obs for row in itertools.islice(script, 7)]
        expected = (np.array(rows) - mean) / np.sqrt(var + 1e-8)
        np.testing.assert_allclose(buffer.obs[1:, 0, :3], expected, rtol=1e-5, atol=1e-6)
        seen += rows


def test_the_stored_action_is_the_sample_and_the_environment_received_it_clipped():
    _, buffers, _ = collect(toy_envs.script_config((4, -3), init_std=2.0), 3)
    for buffer in buffers:
        received, actions = buffer.obs[1:, :, 3:], buffer.actions
        assert torch.equal(received[buffer.valid], actions.clamp(-1, 1)[buffer.valid])
        assert (actions.abs() > 1).float().mean() > 0.3
        assert not received[~buffer.valid].any()  # a reset row ignores its action


def test_the_stored_logprob_is_of_the_unclipped_action():
    collection, (buffer,), _ = collect(toy_envs.script_config((9,), init_std=2.0), 1)
    mean = collection.learner.agent.mean_action(buffer.obs[:-1]).detach().double().numpy()
    z = (buffer.actions.numpy() - mean) / 2
    expected = (-0.5 * z**2 - np.log(2 * np.sqrt(2 * np.pi))).sum(-1)
    np.testing.assert_allclose(buffer.logprobs, expected, rtol=1e-5)


@every_script
def test_logprobs_recomputed_from_the_buffer_are_the_stored_ones(lengths):
    collection, buffers, _ = collect(toy_envs.script_config(lengths, norm_obs=True), 3)
    for buffer in buffers:
        again, _ = collection.learner.agent.evaluate_actions(buffer.obs[:-1], buffer.actions)
        torch.testing.assert_close(again, buffer.logprobs)


def test_collecting_needs_no_gradient():
    _, (buffer,), _ = collect(toy_envs.script_config((3,)), 1)
    tensors = [value for value in vars(buffer).values() if isinstance(value, torch.Tensor)]
    assert tensors
    assert not any(tensor.requires_grad for tensor in tensors)


def test_an_async_rollout_is_the_sync_one_to_the_bit():
    found = []
    for backend in ("sync", "async"):
        torch.manual_seed(3)
        config = toy_envs.script_config((3, -5), vector_env=backend, norm_obs=True)
        collection, buffers, episodes = collect(config, 3)
        collection.envs.close()
        found.append((buffers, episodes))
    (sync, sync_episodes), (other, other_episodes) = found
    assert sync_episodes == other_episodes
    for one, two in zip(sync, other, strict=True):
        for name, values in vars(one).items():
            assert np.array_equal(values, getattr(two, name)), name


# ---- restarts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["sync", "async"])
def test_each_environment_begins_anew_once_where_its_episode_has_the_length_of_its_own(backend):
    config = toy_envs.script_config((100,), vector_env=backend, gamma=0.9)
    collection = toy_envs.Collection(config, restart_at=[0, 7, 10, 10**9])
    begins = [0, 7, 14, 35]  # rows of the second episodes: the first border past each length
    buffers = []
    for _ in range(5):
        buffers.append(collection.rollout())
        collection.rewards(buffers[-1])
        assert buffers[-1].valid.all()  # a restart is no row
        assert not collection.episodes  # and what was cut no episode
    collection.envs.close()
    for tag, begin in enumerate(begins):
        rows = [(0, t) for t in range(begin)] + [(1, t) for t in range(35 - begin)]
        found = torch.cat([buffer.obs[:-1, tag, 1:3] for buffer in buffers])  # (episode, its step)
        np.testing.assert_array_equal(found, rows)
        paid = [toy_envs.pay(tag, *row) for row in rows]
        np.testing.assert_array_equal(joined(buffers, "rewards")[:, tag], paid)
        paid = paid[begin:] or paid
        assert collection.buffer.episode_length[tag] == len(paid)
        assert collection.buffer.episode_return[tag] == sum(paid)
        running = sum(0.9**j * reward for j, reward in enumerate(reversed(paid)))
        np.testing.assert_allclose(collection.buffer.discounted[tag], running, rtol=1e-6)
    assert buffers[0].obs[-1, 1, 1:3].tolist() == [0, 7]  # what the cut is bootstrapped from


def test_a_restart_leaves_alone_what_is_about_to_be_reset():
    collection = toy_envs.Collection(toy_envs.script_config((7, 7)), restart_at=10**9)
    collection.rollout()
    assert collection.buffer.ended.all()
    collection.envs.restart_at[:] = 0
    buffer = collection.rollout()
    assert buffer.valid.tolist() == [[False] * 4] + [[True] * 4] * 6
    assert buffer.obs[:, 0, 1:3].tolist() == [[0, 7], [1, 0], *([1, k] for k in range(1, 7))]


@pytest.mark.parametrize("backend", ["sync", "async", "envpool"])
def test_a_restarted_walker_stands_at_the_start_and_no_other_moves(backend):
    if backend == "envpool":
        pytest.importorskip("envpool")
    settings = {"num_envs": 3, "rollout_steps": 12, "minibatch_size": 4, "norm_obs": False}
    config = core.Config(vector_env=backend, **settings)
    collection = toy_envs.Collection(config, restart_at=[10**9, 5, 10**9])
    before, after = collection.rollout(), collection.rollout()
    core.close_envs(collection.envs)
    assert torch.equal(after.obs[0, ::2], before.obs[-1, ::2])
    at_start = (before.obs[0, :, 4:14] - after.obs[0, :, 4:14]).abs().amax(1) < 0.05  # legs
    assert at_start.tolist() == [False, True, False]
    assert collection.buffer.episode_length[1] == 12


def test_the_lengths_of_restarts_differ_and_end_before_the_time_limit():
    for backend in ("sync", "envpool") if importlib.util.find_spec("envpool") else ("sync",):
        config = core.Config(num_envs=64, vector_env=backend)
        envs, _ = core.make_vector_env(config, core.env_seeds(1, core.TRAIN, 64))
        envs.close()
        assert len(set(envs.restart_at)) > 55
        assert 0 <= envs.restart_at.min() < 200 < 1400 < envs.restart_at.max() < 1600
    endless = core.Config(**vars(toy_envs.script_config((3,))) | {"num_envs": 4})
    envs, _ = core.make_vector_env(endless, core.env_seeds(1, core.TRAIN, 4))
    assert envs.restart_at.min() > 10**6


def test_a_reset_row_of_the_real_walker_is_no_transition():
    torch.manual_seed(0)
    config = core.Config(num_envs=2, rollout_steps=150, init_std=2.0)
    collection = toy_envs.Collection(config)
    buffer = collection.rollout()
    ended = (buffer.terminated | buffer.truncated)[:-1]
    assert ended.sum() >= 2
    assert torch.equal(buffer.valid[1:], ~ended)
    assert not buffer.rewards[1:][ended].any()
    assert len(collection.episodes) == (buffer.terminated | buffer.truncated).sum()
    assert sum(length for _, length in collection.episodes) <= buffer.valid.sum()
