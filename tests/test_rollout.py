"""What a rollout records, on environments whose every step is known beforehand."""

import itertools

import numpy as np
import pytest
import torch
import toy_envs

import walker_core as core

SCRIPTS = {
    "terminating": (3, 5),
    "mixed": (2, -3, 5, -1),
    "of length one": (1, -1),
    "longer than a rollout": (17, -9, 25),
    "as long as a rollout": (7, -7),
}
every_script = pytest.mark.parametrize("lengths", SCRIPTS.values(), ids=SCRIPTS)


def expected_rows(lengths, rollouts) -> list[list[toy_envs.Row]]:
    """For each of the four environments, the rows of so many rollouts of seven steps."""
    scripts = [toy_envs.script_rows(tag, lengths) for tag in range(4)]
    return [list(itertools.islice(script, 7 * rollouts)) for script in scripts]


def collect(config, rollouts):
    """The rollouts after one another: the buffers, and the episodes of each."""
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
def test_validity_rewards_and_both_endings_are_those_of_the_environment(lengths):
    """Across rollouts: the row after an episode's end, and no other, is no transition."""
    _, buffers, _ = collect(toy_envs.script_config(lengths), 5)
    rows = expected_rows(lengths, 5)
    for name in ("valid", "rewards", "terminated", "truncated"):
        expected = [[getattr(row, name.removesuffix("s")) for row in env] for env in rows]
        np.testing.assert_array_equal(joined(buffers, name).T, expected)


@every_script
def test_returns_and_lengths_of_episodes_are_raw_and_go_on_across_rollouts(lengths):
    costs = {"action_cost": 1.0, "failure_cost": 5.0}  # only what is learned from counts them
    config = toy_envs.script_config(lengths, norm_obs=True, gamma=0.9, **costs)
    _, _, episodes = collect(config, 8)
    rows = expected_rows(lengths, 8)
    for rollout, found in enumerate(episodes):
        expected = []
        for t, tag in itertools.product(range(7 * rollout, 7 * rollout + 7), range(4)):
            row = rows[tag][t]
            if row.terminated or row.truncated:
                _, episode, length = row.obs
                paid = [toy_envs.pay(tag, episode, k) for k in range(length)]
                expected.append((sum(paid), length))
        assert found == expected
    assert sum(map(len, episodes)) >= 4


@every_script
def test_the_next_observation_is_what_the_step_returned_the_terminal_one_too(lengths):
    collection, buffers, _ = collect(toy_envs.script_config(lengths), 4)
    np.testing.assert_array_equal(buffers[0].obs[0], collection.first_obs)
    returned = np.concatenate([buffer.obs[1:].numpy() for buffer in buffers])
    expected = np.array([[row.obs for row in env] for env in expected_rows(lengths, 4)])
    np.testing.assert_array_equal(returned[:, :, :3].swapaxes(0, 1), expected)
    for before, after in itertools.pairwise(buffers):
        assert torch.equal(before.obs[-1], after.obs[0])


def test_a_rollouts_observations_are_normalized_by_what_was_seen_before_it():
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


def test_the_sample_and_its_logprob_are_stored_and_the_environment_gets_it_clipped():
    config = toy_envs.script_config((4, -3), init_std=2.0)
    collection, buffers, _ = collect(config, 3)
    for buffer in buffers:
        received, actions = buffer.obs[1:, :, 3:], buffer.actions
        assert torch.equal(received[buffer.valid], actions.clamp(-1, 1)[buffer.valid])
        assert (actions.abs() > 1).float().mean() > 0.3
        assert not received[~buffer.valid].any()  # a reset row ignores its action
        mean = collection.learner.agent.mean_action(buffer.obs[:-1]).detach().double().numpy()
        z = (actions.numpy() - mean) / 2
        expected = (-0.5 * z**2 - np.log(2 * np.sqrt(2 * np.pi))).sum(-1)
        np.testing.assert_allclose(buffer.logprobs, expected, rtol=1e-5)
        assert not any(x.requires_grad for x in vars(buffer).values() if torch.is_tensor(x))


# ---- staggered starts ----------------------------------------------------------------------------


def test_each_environment_restarts_once_where_its_episode_reaches_its_own_length():
    config = toy_envs.script_config((100,), gamma=0.9)
    collection = toy_envs.Collection(config, restart_at=[0, 7, 10, 10**9])
    buffers = []
    for _ in range(5):
        buffers.append(collection.rollout())
        collection.rewards(buffers[-1])
        assert buffers[-1].valid.all()  # a restart is no row
        assert not collection.episodes  # and what was cut no episode
    buffer = collection.buffer
    # rows of the second episodes: the first border past each length
    for tag, begin in enumerate([0, 7, 14, 35]):
        rows = [(0, t) for t in range(begin)] + [(1, t) for t in range(35 - begin)]
        found = torch.cat([buffer.obs[:-1, tag, 1:3] for buffer in buffers])  # (episode, its step)
        np.testing.assert_array_equal(found, rows)
        paid = [toy_envs.pay(tag, *row) for row in rows]
        np.testing.assert_array_equal(joined(buffers, "rewards")[:, tag], paid)
        paid = paid[begin:] or paid
        assert (buffer.episode_length[tag], buffer.episode_return[tag]) == (len(paid), sum(paid))
        running = sum(0.9**j * reward for j, reward in enumerate(reversed(paid)))
        np.testing.assert_allclose(buffer.discounted_return[tag], running, rtol=1e-6)
    assert buffers[0].obs[-1, 1, 1:3].tolist() == [0, 7]  # what the cut is bootstrapped from


def test_a_restart_leaves_alone_what_is_about_to_be_reset():
    collection = toy_envs.Collection(toy_envs.script_config((7, 7)), restart_at=10**9)
    collection.rollout()
    assert collection.buffer.ended.all()
    collection.buffer.restart_at[:] = 0
    buffer = collection.rollout()
    assert buffer.valid.tolist() == [[False] * 4] + [[True] * 4] * 6
    assert buffer.obs[:, 0, 1:3].tolist() == [[0, 7], [1, 0], *([1, k] for k in range(1, 7))]


@pytest.mark.parametrize("backend", ["sync", "envpool"])
def test_a_restarted_walker_stands_at_the_start_and_no_other_moves(backend):
    if backend == "envpool":
        pytest.importorskip("envpool")
    settings = {"num_envs": 3, "rollout_steps": 12, "minibatch_size": 4, "norm_obs": False}
    config = core.Config(vector_env=backend, **settings)
    collection = toy_envs.Collection(config, restart_at=[10**9, 5, 10**9])
    before, after = collection.rollout(), collection.rollout()
    collection.envs.close()
    assert torch.equal(after.obs[0, ::2], before.obs[-1, ::2])
    at_start = (before.obs[0, :, 4:14] - after.obs[0, :, 4:14]).abs().amax(1) < 0.05  # legs
    assert at_start.tolist() == [False, True, False]
    assert collection.buffer.episode_length[1] == 12


def test_the_lengths_at_restarts_differ_and_are_below_the_time_limit():
    def restart_at(config):
        env, seeds = core.Learner(config).env, core.env_seeds(1, core.TRAIN, config.num_envs)
        first_obs = torch.zeros(config.num_envs, *env.observation_space.shape)
        return core.Rollout(config, env, seeds, first_obs).restart_at

    lengths = restart_at(core.Config(num_envs=64))
    assert len(set(lengths)) > 55
    assert 0 <= lengths.min() < 200 < 1400 < lengths.max() < 1600
    without_limit = toy_envs.script_config((3,), max_episode_steps=50)
    assert restart_at(without_limit).max() < 50  # it gets one


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
