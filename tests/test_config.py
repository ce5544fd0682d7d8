"""Config, presets and the settings of files: right values pass, wrong ones are named."""

from __future__ import annotations

import dataclasses
import json
import math
import typing

import pytest
from helpers import tiny

import walker_core as core
from walker_core import Config, UserError

FIELDS = {name: field.annotation for name, field in Config.__pydantic_fields__.items()}
FLOATS = [name for name, kind in FIELDS.items() if kind in (float, float | None)]
WRONG = {  # field: a value just outside its limits, and what would be right
    "env": (" ", "pattern"), "env_kwargs": (("hardcore",), "KEY"), "total_timesteps": (0, "1"),
    "max_episode_steps": (0, "1"),
    "seed": (2**32, "4294967296"), "out": ("", "1"), "init_from": (3, "string"),
    "num_envs": (100_001, "100000"), "rollout_steps": (1, "2"),
    "clip_obs": (0.0, "0"), "clip_reward": ((1.0, -1.0), "LOW < HIGH"),
    "actor_hidden": ((64, 2**40), "4096"), "critic_hidden": ((), "1"), "init_std": (11.0, "10"),
    "learning_rate": (0.0, "0"), "value_learning_rate": (0.0, "0"),
    "desired_kl": (-0.1, "VALUE, START END, or START END FROM TO, at least 0"),
    "failure_cost": ((1.0, 5.0, 250.0, 250.0), "FROM TO"), "action_cost": ((1, 2, 3), "START END"),
    "gamma": (1.1, "1"), "gae_lambda": (-0.1, "0"), "clip_eps": (0.0, "0"),
    "clip_value_eps": (0.0, "0"), "failure_reward": (math.inf, "finite"),
    "entropy_coef": ((0.1, -0.1, 0.3), "START END"), "value_coef": (-0.5, "0"),
    "max_grad_norm": (0.0, "0"), "update_epochs": (0, "1"), "minibatch_size": (1, "2"),
    "target_kl": (0.0, "0"), "eval_every": (-1, "0"), "eval_episodes": (0, "1"),
    "checkpoint_every": (-1, "0"), "record_every": (-1, "0"),
}  # fmt: skip
WRONG |= {name: ("maybe", "boolean") for name, kind in FIELDS.items() if kind is bool}
WRONG |= {
    name: ("best", repr(typing.get_args(kind)[0]))
    for name, kind in FIELDS.items()
    if typing.get_origin(kind) is typing.Literal
}


def message(**settings) -> str:
    with pytest.raises(UserError) as caught:
        Config(**settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_field_has_limits():
    assert set(WRONG) == set(FIELDS)


@pytest.mark.parametrize("name", WRONG)
def test_a_value_outside_its_limits_is_refused_with_flag_value_and_limit(name):
    value, right = WRONG[name]
    start, rule = message(**{name: value}).split(": ", 1)
    assert start == f"--{name.replace('_', '-')} is {value!r}"
    assert right in rule


def test_no_number_may_be_infinite_or_nan():
    for name in [*FLOATS, *core.COURSES]:
        for value in (math.nan, math.inf, -math.inf):
            assert f"is {value!r}: " in message(**{name: value})
    assert "finite" in message(clip_reward=(-math.inf, 1.0))
    assert "FROM TO" in message(entropy_coef=(0.1, 0.0, -math.inf, 1.0))


def test_a_minibatch_larger_than_the_batch_is_refused():
    text = message(num_envs=2, rollout_steps=16, minibatch_size=33)
    assert "--minibatch-size is 33: " in text
    assert text.endswith("num_envs × rollout_steps = 32")
    assert Config(num_envs=2, rollout_steps=16, minibatch_size=32).num_minibatches == 1


def test_the_edges_of_what_is_right_pass():
    Config(gamma=0, gae_lambda=0, entropy_coef=0, value_coef=0, eval_every=0, seed=0, init_std=10)
    Config(gamma=1, gae_lambda=1, seed=2**32 - 1, init_std=0.001, clip_reward=(-1e300, 1))
    Config(total_timesteps=1, num_envs=1, rollout_steps=2, minibatch_size=2, eval_episodes=1)
    Config(num_envs=100_000, rollout_steps=1_000_000, critic_hidden=(4096, 1))


def test_settings_cannot_be_changed_after_the_check():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().gamma = 2.0


@pytest.mark.parametrize("env", core.PRESETS)
def test_a_preset_is_valid_and_holds_only_what_differs_from_the_defaults(env):
    config, defaults, preset = Config.for_env(env), Config(), core.PRESETS[env]
    assert preset
    assert vars(config) == {**vars(defaults), "env": env, **preset}
    for name, value in preset.items():
        assert value != getattr(defaults, name), f"{name} is the default: leave it out"


def test_an_epoch_has_as_many_minibatches_as_its_sizes_need():
    config = Config(num_envs=4, rollout_steps=25, minibatch_size=7)
    assert config.batch_size == 100
    assert config.num_minibatches == 14  # 100 // 7: near-equal parts, none tiny


# ---- settings that move --------------------------------------------------------------------------


def test_a_setting_that_may_move_is_a_value_or_two_ends_or_those_and_a_window_of_returns():
    right = {0.5: 0.5, "5e-1": 0.5, (3,): 3.0, ("1", 5): (1.0, 5.0), (5, 0): (5.0, 0.0)}
    right[0.3, 0, -100, 250] = (0.3, 0.0, -100.0, 250.0)
    for name in core.COURSES:
        for value, held in right.items():
            assert getattr(Config(**{name: value}), name) == held
        for wrong in ((), (1, 2, 3), (1, 2, 3, 4, 5), (1, 2, 5, 4), "fast", None, (1, -2)):
            assert message(**{name: wrong}).startswith(f"--{core.flag_name(name)} is {wrong!r}: ")


def test_over_the_run_a_setting_goes_from_start_to_end_with_the_step_and_stays_there():
    """By equal factors between positive numbers, by equal differences to or from zero."""
    config = Config(total_timesteps=1000, desired_kl=(0.01, 0.04), entropy_coef=(4.0, 0.0))
    expected = {0: (0.01, 4), 250: (0.01 * 2**0.5, 3), 500: (0.02, 2), 750: (0.02 * 2**0.5, 1)}
    expected |= {1000: (0.04, 0), 1100: (0.04, 0)}
    for step, values in expected.items():
        for training_return in (-math.inf, -1e9, 0.0, 1e9):
            now = config.at(step, training_return)
            assert (now.desired_kl, now.entropy_coef) == pytest.approx(values)
            same = {"desired_kl": config.desired_kl, "entropy_coef": config.entropy_coef}
            assert dataclasses.replace(now, **same) == config  # and no other has changed


def test_with_a_window_a_setting_goes_from_start_to_end_with_the_training_return():
    """It is at its start before any episode has ended, and goes back when the return does."""
    config = Config(failure_cost=(1.0, 16.0, -100.0, 300.0), action_cost=(0.3, 0.0, 0.0, 100.0))
    expected = {300: (16, 0), 1e4: (16, 0), 0: (2, 0.3), 50: (2**1.5, 0.15), 200: (8, 0)}
    expected |= {-100: (1, 0.3), -1e4: (1, 0.3), -math.inf: (1, 0.3)}
    for training_return, values in expected.items():
        for step in (0, 10**6, 10**9):
            now = config.at(step, training_return)
            assert (now.failure_cost, now.action_cost) == pytest.approx(values)


def test_what_does_not_move_is_as_it_was():
    config = Config(desired_kl=0.02, failure_cost=3.0, action_cost=0.3, entropy_coef=0.01)
    assert config.at(5000, -math.inf) == config.at(0, 1e3) == config


# ---- files ---------------------------------------------------------------------------------------


def test_env_kwargs_are_literals_where_they_parse_else_strings():
    literals = {"a": True, "b": 0.5, "c": -3, "d": None, "e": [1, 2], "f": "x y"}
    strings = {"g": "rgb", "h": "", "i": "true", "j": "k=v", "l": "__import__('os')"}
    pairs = [f"{key}={value!r}" for key, value in literals.items()]
    pairs += [f"{key}={value}" for key, value in strings.items()]
    assert Config(env_kwargs=pairs).env_options == literals | strings


def test_settings_come_back_equal_through_json_but_for_the_folder_they_lie_in():
    moving = {"failure_cost": (1.0, 5.0, -2.0, 9.0), "desired_kl": (0.1, 0.0)}
    config = tiny("somewhere", clip_reward=(-5.0, 2.5), target_kl=0.02, **moving)
    settings = dict(vars(config))
    assert set(settings) == set(FIELDS)
    settings["_about"] = {"reward_threshold": 300}  # for readers: no setting
    back = core.config_from(json.loads(json.dumps(settings)), "a.json")
    assert back == dataclasses.replace(config, out=".")
    assert hash(back)  # lists have become tuples


def test_a_file_of_settings_starts_from_the_preset_of_its_environment():
    config = core.config_from({"env": "LunarLander-v3", "gamma": 0.5}, "a.json")
    assert config == Config.for_env("LunarLander-v3", gamma=0.5)
    assert core.config_from({}, "a.json") == Config.for_env("BipedalWalker-v3")


@pytest.mark.parametrize(
    ("settings", "part"),
    [({"gama": 0.9}, "--gama is 0.9"), ({"env": ["a"]}, "--env is ['a']"), ({3: 4}, "strings")],
)
def test_a_wrong_setting_in_a_file_is_refused_with_the_name_of_the_file(settings, part):
    with pytest.raises(UserError) as caught:
        core.config_from(settings, "a.json")
    assert str(caught.value).startswith("a.json: ")
    assert part in str(caught.value)
