"""What is off by default: each option does what it says, and nothing where it is not asked for."""

from __future__ import annotations

import importlib.util
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import BATCH, column, flags, rows, tiny, train_without_pictures

import walker
import walker_core as core

SIX = gym.spaces.Box(-np.inf, np.inf, (6,), np.float32)
TWO = gym.spaces.Box(-1, 1, (2,), np.float32)


def agent(**settings) -> core.ActorCritic:
    torch.manual_seed(0)
    made = core.ActorCritic(SIX, TWO, core.Config(**settings))
    with torch.no_grad():
        made.actor[-1].weight.mul_(300)
    return made


def test_all_of_them_are_off_by_default():
    config = core.Config()
    assert (config.mean_activation, config.state_dependent_std) == ("none", False)
    assert config.value_learning_rate is config.clip_value_eps is None
    assert (config.record_every, config.tensorboard) == (0, False)


# ---- the policy ----------------------------------------------------------------------------------


def test_tanh_keeps_mean_actions_within_one_and_samples_may_leave():
    obs = torch.randn(200, 6)
    free, bounded = agent(), agent(mean_activation="tanh")
    assert free.mean_action(obs).abs().max() > 1.5
    torch.testing.assert_close(bounded.mean_action(obs), free.mean_action(obs).tanh())
    assert bounded.act(obs)[0].abs().max() > 1.5


def test_a_state_dependent_std_starts_near_the_one_asked_for_and_follows_the_observation():
    torch.manual_seed(0)
    obs = torch.randn(100, 6)
    fresh = core.ActorCritic(SIX, TWO, core.Config(state_dependent_std=True, init_std=0.6))
    np.testing.assert_allclose(fresh.distribution(obs).stddev.detach(), 0.6, atol=0.03)
    moved = agent(state_dependent_std=True, init_std=0.6)
    std = moved.distribution(obs).stddev
    assert std.std(0).min() > 0.05
    outputs = moved.actor(obs)
    torch.testing.assert_close(moved.mean_action(obs), outputs[:, :2])
    torch.testing.assert_close(std, torch.nn.functional.softplus(moved.raw_std + outputs[:, 2:]))
    same = agent(init_std=0.6).distribution(obs).stddev
    torch.testing.assert_close(same, torch.full((100, 2), 0.6))


# ---- the update ----------------------------------------------------------------------------------


def random_batch(rows: int = 64) -> core.Batch:
    torch.manual_seed(1)
    obs, actions, *rest = torch.randn(rows, 6), torch.randn(rows, 2), *torch.randn(4, rows)
    return core.Batch(obs, actions, rest[0] - 3, *rest[1:])


@pytest.mark.parametrize("value_rate", [None, 2e-3])
def test_the_critic_learns_at_a_rate_of_its_own_where_one_is_given(value_rate):
    config = tiny(learning_rate=1e-3, value_learning_rate=value_rate, minibatch_size=32)
    learner = core.Learner(config)
    core.schedule_learning_rates(learner.optimizer, config, config.total_timesteps // 2)
    before = {name: p.detach().clone() for name, p in learner.agent.named_parameters()}
    for parameter in learner.agent.parameters():
        parameter.grad = torch.ones_like(parameter)
    learner.optimizer.step()  # Adam's first step is its rate, whatever the gradient
    for name, parameter in learner.agent.named_parameters():
        rate = 1e-3 if value_rate is None or not name.startswith("critic") else value_rate
        moved = (before[name] - parameter.detach()).numpy()
        np.testing.assert_allclose(moved, rate / 2, rtol=1e-3)


def test_a_rate_of_its_own_goes_on_after_a_resume(no_pictures, tmp_path):
    settings = {"value_learning_rate": 1e-3, "lr_schedule": "adaptive", "desired_kl": 1e-12}
    settings |= {"update_epochs": 2, "minibatch_size": BATCH}
    train_without_pictures(tiny(tmp_path, **settings))
    config = tiny(tmp_path, **settings, total_timesteps=8 * BATCH)
    learner = core.prepare_learner(config, tmp_path / core.LAST)
    policy, values = (float(group["lr"]) for group in learner.optimizer.param_groups)
    assert policy == pytest.approx(column(tmp_path, "learning_rate")[-1], rel=1e-5)
    assert policy < 1e-4
    assert values == pytest.approx(policy * 10 / 3, rel=1e-3)


def test_clipped_values_pay_for_the_worse_of_where_they_are_and_where_they_may_go():
    batch = random_batch(4)._replace(
        values=torch.tensor([0.0, 0.0, 0.0, 0.0]), returns=torch.tensor([1.0, 1.0, -1.0, 0.1])
    )
    now = torch.tensor([0.5, 0.1, 0.5, 0.15])
    zeros = torch.zeros(4)

    def value_loss(**settings):
        return float(core.ppo_loss(batch, zeros, zeros, now, core.Config(**settings))[1][1])

    free = [0.5**2, 0.9**2, 1.5**2, 0.05**2]
    clipped = [max(free[0], 0.8**2), free[1], max(free[2], 1.2**2), free[3]]
    assert value_loss() == pytest.approx(np.mean(free) / 2)
    assert value_loss(clip_value_eps=0.2) == pytest.approx(np.mean(clipped) / 2)


# ---- what is written -----------------------------------------------------------------------------


def test_tensorboard_has_the_numbers_of_the_csv_and_a_resume_goes_on(no_pictures, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = {"eval_every": 2 * BATCH, "tensorboard": True}
    assert walker.main(flags(tmp_path, **settings)) == 0
    argv = ["--resume", "--out", str(tmp_path), "--total-timesteps", str(6 * BATCH)]
    assert walker.main(argv) == 0
    events = accumulator.EventAccumulator(str(tmp_path / core.BOARD)).Reload()
    assert set(events.Tags()["scalars"]) == {
        name for row in rows(tmp_path) for name, cell in row.items() if cell
    }
    for name in events.Tags()["scalars"]:
        cells = {int(row["step"]): row[name] for row in rows(tmp_path) if row[name]}
        shown = {event.step: event.value for event in events.Scalars(name)}
        assert list(shown) == list(cells)
        for step, value in shown.items():
            assert value == pytest.approx(float(cells[step]), rel=1e-4), name
    assert walker.main([*flags(tmp_path, total_timesteps=BATCH), "--overwrite"]) == 0
    assert not list((tmp_path / core.BOARD).glob("*"))


def test_without_tensorboard_its_flag_is_one_line_and_nothing_is_written(
    tmp_path, monkeypatch, capsys
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name)
    )
    assert walker.main(flags(tmp_path / "new", tensorboard=True)) == 2
    said = capsys.readouterr().err
    assert said == "walker.py: --tensorboard needs `pip install tensorboard`\n"
    assert not (tmp_path / "new").exists()


def test_a_film_is_made_at_the_first_iteration_at_or_past_each_multiple(
    no_pictures, tmp_path, monkeypatch
):
    films, every = [], 1.5 * BATCH
    monkeypatch.setattr(core, "record_episode", lambda *args: films.append(args[2:4]))
    assert walker.main(flags(tmp_path, record_every=int(every))) == 0
    steps = [2 * BATCH, 3 * BATCH]
    assert [mp4 for _, mp4 in films] == [tmp_path / f"videos/step_{step}.mp4" for step in steps]
    assert len({seed for seed, _ in films}) == 1  # the same world, so that they can be compared
    assert math.ceil(4 * BATCH / every) == 3


def test_films_of_a_run_are_removed_by_overwrite_and_nothing_else(no_pictures, tmp_path):
    assert walker.main(flags(tmp_path, record_every=2 * BATCH, total_timesteps=2 * BATCH)) == 0
    made = {path.name for path in (tmp_path / "videos").iterdir()}
    assert made == {"step_64.mp4", "step_64.gif"}
    (tmp_path / "videos/mine.mp4").touch()
    (tmp_path / "videos/step_one.mp4").touch()
    argv = [*flags(tmp_path, total_timesteps=BATCH), "--overwrite"]
    assert walker.main(argv) == 0
    left = {path.name for path in (tmp_path / "videos").iterdir()}
    assert left == {"mine.mp4", "step_one.mp4"}
