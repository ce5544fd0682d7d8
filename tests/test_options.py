"""What is off by default: each option does what its help says, and nothing where it is off."""

from __future__ import annotations

import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import BATCH, column, flags, rows, tiny, train_without_pictures

import walker
import walker_core as core

SIX = gym.spaces.Box(-np.inf, np.inf, (6,), np.float32)
TWO = gym.spaces.Box(-1, 1, (2,), np.float32)

pytestmark = pytest.mark.usefixtures("no_pictures")


def agent(gain: float = 300, **settings) -> core.ActorCritic:
    torch.manual_seed(0)
    made = core.ActorCritic(SIX, TWO, core.Config(**settings))
    with torch.no_grad():
        made.actor[-1].weight.mul_(gain)
    return made


# ---- the policy ----------------------------------------------------------------------------------


def test_tanh_keeps_mean_actions_within_one_and_samples_may_leave():
    obs = torch.randn(200, 6)
    free, bounded = agent(), agent(mean_activation="tanh")
    assert free.mean_action(obs).abs().max() > 1.5
    torch.testing.assert_close(bounded.mean_action(obs), free.mean_action(obs).tanh())
    assert bounded.act(obs)[0].abs().max() > 1.5


def test_a_state_dependent_std_starts_near_the_initial_one_and_follows_the_observation():
    obs, settings = torch.randn(100, 6), {"state_dependent_std": True, "init_std": 0.6}
    fresh = agent(gain=1, **settings)
    np.testing.assert_allclose(fresh.distribution(obs).stddev.detach(), 0.6, atol=0.03)
    moved = agent(**settings)
    std, outputs = moved.distribution(obs).stddev, moved.actor(obs)
    assert std.std(0).min() > 0.05
    torch.testing.assert_close(moved.mean_action(obs), outputs[:, :2])
    torch.testing.assert_close(std, torch.nn.functional.softplus(moved.raw_std + outputs[:, 2:]))
    independent = agent(init_std=0.6).distribution(obs).stddev
    torch.testing.assert_close(independent, torch.full((100, 2), 0.6))


# ---- the update ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value_rate", [None, 2e-3])
def test_the_critic_learns_at_a_rate_of_its_own_where_one_is_given(value_rate):
    config = tiny(learning_rate=1e-3, value_learning_rate=value_rate)
    learner = core.Learner(config)
    core.schedule_learning_rates(learner.optimizer, config, config.total_timesteps // 2)
    before = {name: p.detach().clone() for name, p in learner.agent.named_parameters()}
    for parameter in learner.agent.parameters():
        parameter.grad = torch.ones_like(parameter)
    learner.optimizer.step()  # Adam's first step is its rate, whatever the gradient
    for name, parameter in learner.agent.named_parameters():
        rate = value_rate if value_rate and name.startswith("critic") else 1e-3
        moved = (before[name] - parameter.detach()).numpy()
        np.testing.assert_allclose(moved, rate / 2, rtol=1e-3)


def test_adapted_rates_of_policy_and_values_go_on_after_a_resume(tmp_path):
    settings = {"value_learning_rate": 1e-3, "lr_schedule": "adaptive", "desired_kl": 1e-12}
    settings["minibatch_size"] = BATCH
    train_without_pictures(tiny(tmp_path, **settings))
    config = tiny(tmp_path, **settings, total_timesteps=8 * BATCH)
    learner = core.prepare_learner(config, tmp_path / core.LAST)
    policy, values = (float(group["lr"]) for group in learner.optimizer.param_groups)
    assert policy == pytest.approx(column(tmp_path, "learning_rate")[-1], rel=1e-5)
    assert policy < 1e-4
    assert values == pytest.approx(policy * 10 / 3, rel=1e-3)


def test_clipped_values_pay_for_the_worse_of_where_they_are_and_where_they_may_go():
    returns, now = torch.tensor([1.0, 1.0, -1.0, 0.1]), torch.tensor([0.5, 0.1, 0.5, 0.15])
    zeros = torch.zeros(4)
    batch = core.Batch(torch.zeros(4, 6), torch.zeros(4, 2), zeros, zeros, zeros, returns)

    def value_loss(**settings):
        metrics = core.ppo_loss(batch, zeros, zeros, now, core.Config(**settings))[1]
        return float(metrics["value_loss"])

    free = [0.5**2, 0.9**2, 1.5**2, 0.05**2]
    clipped = [max(free[0], 0.8**2), free[1], max(free[2], 1.2**2), free[3]]
    assert value_loss() == pytest.approx(np.mean(free) / 2)
    assert value_loss(clip_value_eps=0.2) == pytest.approx(np.mean(clipped) / 2)


# ---- what is written -----------------------------------------------------------------------------


@pytest.mark.slow
def test_tensorboard_has_the_numbers_of_the_csv_and_a_resume_goes_on(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    kwargs = ("max_episode_steps=40",)  # at first, no episode has ended
    typed = flags(tmp_path, env_kwargs=kwargs, eval_every=2 * BATCH, tensorboard=True)
    assert walker.main(typed) == 0
    argv = ["--resume", "--out", str(tmp_path), "--total-timesteps", str(6 * BATCH)]
    assert walker.main(argv) == 0
    events = accumulator.EventAccumulator(str(tmp_path / core.TENSORBOARD)).Reload()
    found = {
        name: {event.step: event.value for event in events.Scalars(name)}
        for name in events.Tags()["scalars"]
    }
    expected = {}
    for row in rows(tmp_path):
        for name, cell in row.items():
            if cell:
                expected.setdefault(name, {})[int(row["step"])] = float(cell)
    assert set(found) == set(expected)
    assert {"return_mean", "steps_per_s", "approx_kl", "eval_return_mean"} <= set(found)
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-4), name
    assert walker.main([*flags(tmp_path, total_timesteps=BATCH), "--overwrite"]) == 0
    assert not list((tmp_path / core.TENSORBOARD).glob("*"))


def test_without_tensorboard_its_flag_is_one_line_and_nothing_is_written(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert walker.main(flags(tmp_path / "new", tensorboard=True)) == 2
    error = capsys.readouterr().err
    assert "--tensorboard" in error
    assert "pip install tensorboard" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_film_is_made_at_the_first_iteration_at_or_past_each_multiple(tmp_path, monkeypatch):
    films = []
    monkeypatch.setattr(core, "record_episode", lambda *args, **_: films.append(args[1:3]))
    assert walker.main(flags(tmp_path, record_every=3 * BATCH // 2)) == 0
    steps = [2 * BATCH, 3 * BATCH]
    assert [mp4 for _, mp4 in films] == [tmp_path / f"videos/step_{step}.mp4" for step in steps]
    assert len({seed for seed, _ in films}) == 1  # the same world, so that they can be compared


def test_films_of_a_run_are_removed_by_overwrite_and_nothing_else(tmp_path):
    films = tmp_path / "videos"
    films.mkdir()
    for name in ("step_64.mp4", "step_64.gif", "walker_final.mp4", "mine.mp4", "step_one.mp4"):
        (films / name).touch()
    assert walker.main([*flags(tmp_path, total_timesteps=BATCH), "--overwrite"]) == 0
    assert {path.name for path in films.iterdir()} == {"mine.mp4", "step_one.mp4"}
