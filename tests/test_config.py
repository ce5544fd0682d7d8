"""Config, presets and the settings of files: right values pass, wrong ones are named."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from helpers import tiny

import walker_core as core
from walker_core import Config, UserError

FIELDS = [field.name for field in dataclasses.fields(Config)]
NAN, INF = math.nan, math.inf

WRONG = {
    "env": [None, 3, "", "  "],
    "env_kwargs": [("hardcore",), (3,), 3, "hardcore=True"],
    "total_timesteps": [0, -1, 1.5, NAN, INF, "100", True, None],
    "seed": [-1, 2**32, 1.0, "1", True, None],
    "device": ["gpu", "", None, 0],
    "out": [None, "", " ", 3],
    "init_from": ["", " ", 3],
    "vector_env": ["synch", None, True],
    "num_envs": [0, -4, 2.0, NAN, "8", True, None],
    "rollout_steps": [0, 1, -4, 2.0, "8", True],
    "norm_obs": [1, 0, "true", None],
    "norm_reward": [1, "false", None],
    "clip_obs": [0, 0.0, -1.0, NAN, INF, "10", None],
    "clip_reward": [
        (1.0, -1.0),
        (0.0, 0.0),
        (NAN, 1.0),
        (-1.0, NAN),
        (-INF, INF),
        10.0,
        ("a", "b"),
    ],
    "actor_hidden": [(), (0,), (64, -1), (64.0,), ("64",), (True,), 64, "64", None],
    "critic_hidden": [(), (0,), (64, -1), (64.0,), ("64",), (True,), 64, "64", None],
    "activation": ["gelu", "", None, []],
    "layer_norm": [1, "true", None],
    "init_std": [0.0, -1.0, NAN, INF, "1", None],
    "learning_rate": [0.0, -3e-4, NAN, INF, "3e-4", None],
    "lr_schedule": ["quadratic", "", None],
    "desired_kl": [0.0, -0.1, NAN, INF, "0.01", None],
    "gamma": [-0.1, 1.1, NAN, INF, "0.99", None],
    "gae_lambda": [-0.1, 1.1, NAN, -INF, "0.95", None],
    "clip_eps": [0.0, -0.2, NAN, INF, "0.2", None],
    "entropy_coef": [-0.1, NAN, INF, "0", None],
    "value_coef": [-0.5, NAN, INF, "0.5", None],
    "max_grad_norm": [0.0, -0.5, NAN, INF, "0.5", None],
    "update_epochs": [0, -1, 2.0, NAN, "5", True, None],
    "minibatch_size": [0, 1, -16, 16.0, NAN, "16", True, None],
    "target_kl": [0.0, -0.1, NAN, INF, "0.1"],
    "eval_every": [-1, 0.5, NAN, "100", True, None],
    "eval_episodes": [0, -1, 2.0, NAN, "20", True, None],
    "checkpoint_every": [-1, 0.5, NAN, "100", True, None],
    "stop_when_solved": [1, "true", None],
}


def test_every_setting_has_exactly_one_rule():
    ruled = [name for names, _, _ in core.RULES for name in names.split()]
    assert sorted(ruled) == sorted(FIELDS)


def test_every_setting_has_wrong_values_below():
    assert sorted(WRONG) == sorted(FIELDS)


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in WRONG for value in WRONG[name]], ids=repr
)
def test_a_wrong_value_is_refused_with_its_flag_its_value_and_what_is_right(name, value):
    flag = name.replace("_", "-")
    [right] = [right for names, _, right in core.RULES if name in names.split()]
    with pytest.raises(UserError) as caught:
        Config(**{name: value})
    assert str(caught.value) == f"--{flag} is {value!r}: it must be {right}"


@pytest.mark.parametrize("value", [(), (1.0,), (-1.0, 0.0, 1.0)], ids=repr)
def test_clipping_of_rewards_takes_exactly_two_bounds(value):
    with pytest.raises(UserError, match=r"^--clip-reward is .*LOW HIGH"):
        Config(clip_reward=value)


@pytest.mark.parametrize("name", ["gamma", "gae_lambda", "learning_rate", "value_coef", "init_std"])
def test_true_is_no_number(name):
    with pytest.raises(UserError, match="is True: it must be"):
        Config(**{name: True})


def test_a_minibatch_larger_than_the_batch_is_refused():
    with pytest.raises(
        UserError, match=r"^--minibatch-size is 33: .* num_envs × rollout_steps = 32$"
    ):
        Config(num_envs=2, rollout_steps=16, minibatch_size=33)
    assert Config(num_envs=2, rollout_steps=16, minibatch_size=32).num_minibatches == 1


def test_the_edges_of_what_is_right_pass():
    Config(gamma=0.0, gae_lambda=0.0, entropy_coef=0.0, value_coef=0.0, eval_every=0, seed=0)
    Config(gamma=1.0, gae_lambda=1.0, seed=2**32 - 1, target_kl=None, init_from=None)
    Config(total_timesteps=1, num_envs=1, rollout_steps=2, minibatch_size=2, eval_episodes=1)


def test_settings_cannot_be_changed_after_the_check():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().gamma = 2.0


@pytest.mark.parametrize("env", core.PRESETS)
def test_a_preset_is_valid_and_holds_only_what_differs_from_the_defaults(env):
    defaults, preset = Config(), core.PRESETS[env]
    assert preset
    for name, value in preset.items():
        assert type(value) is type(getattr(defaults, name))
        assert value != getattr(defaults, name), f"{name} is the default: leave it out"
    config = Config.for_env(env)
    assert config.env == env
    changed = {name for name in FIELDS if getattr(config, name) != getattr(defaults, name)}
    assert changed - {"env"} == set(preset)


def test_settings_given_with_an_environment_beat_its_preset():
    name, *others = core.PRESETS["BipedalWalker-v3"]
    assert name == "total_timesteps"
    config, preset = (
        Config.for_env("BipedalWalker-v3", **{name: 7}),
        Config.for_env("BipedalWalker-v3"),
    )
    assert config.total_timesteps == 7 != preset.total_timesteps
    assert all(getattr(config, other) == getattr(preset, other) for other in others)


def test_an_environment_without_a_preset_gets_the_defaults():
    assert Config.for_env("Pendulum-v1") == Config(env="Pendulum-v1")


def test_a_run_has_as_many_iterations_as_the_total_needs():
    def iterations(total):
        return Config(num_envs=4, rollout_steps=25, minibatch_size=7, total_timesteps=total)

    assert [iterations(n).num_iterations for n in (1, 99, 100, 101, 200, 1001)] == [
        *(1, 1, 1, 2, 2, 11)
    ]
    assert iterations(1).batch_size == 100
    assert iterations(1).num_minibatches == 14  # 100 // 7: near-equal parts, none tiny


def test_env_kwargs_are_literals_where_they_parse_else_strings():
    options = (
        *("a=True", "b=0.5", "c=-3", "d=None", "e=[1, 2]", "f='x y'"),  # literals
        *("g=rgb", "h=", "i=true", "j=k=v", "l=__import__('os')"),  # strings
    )
    assert Config(env_kwargs=options).env_options == {
        **{"a": True, "b": 0.5, "c": -3, "d": None, "e": [1, 2], "f": "x y"},
        **{"g": "rgb", "h": "", "i": "true", "j": "k=v", "l": "__import__('os')"},
    }


def test_settings_come_back_equal_through_json_but_for_the_folder_they_lie_in():
    config = tiny("somewhere", clip_reward=(-5.0, 2.5), target_kl=0.02, layer_norm=True)
    plain = core.plain_settings(config)
    assert set(plain) == set(FIELDS) - {"out"}
    back = core.config_from_dict(json.loads(json.dumps(plain)), "a.json")
    assert back == dataclasses.replace(config, out=Config.out)
    assert hash(back)  # lists have become tuples


def test_remarks_in_a_file_of_settings_are_no_settings():
    settings = core.plain_settings(tiny()) | {"_about": {"reward_threshold": 300}}
    assert core.config_from_dict(settings, "a.json") == tiny()


def test_a_file_of_settings_starts_from_the_preset_of_its_environment():
    config = core.config_from_dict({"env": "BipedalWalker-v3", "gamma": 0.5}, "a.json")
    assert config == Config.for_env("BipedalWalker-v3", gamma=0.5)
    assert core.config_from_dict({}, "a.json") == Config.for_env("BipedalWalker-v3")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gama": 0.9}, "a.json: unknown setting 'gama'"),
        ({"gamma": 2.0}, "a.json: --gamma is 2.0: it must be from 0 to 1"),
        ({"gamma": None}, "a.json: --gamma is None: it must be from 0 to 1"),
        ({"env": None}, "a.json: --env is None: it must be a name, not empty"),
        ({"env": {"id": 1}}, "a.json: --env is {'id': 1}: it must be a name, not empty"),
        ({"env": ["Pendulum-v1"]}, "a.json: --env is ('Pendulum-v1',): it must be a name, not emp"),
    ],
    ids=repr,
)
def test_a_wrong_setting_in_a_file_is_refused_with_the_files_name(settings, said):
    with pytest.raises(UserError) as caught:
        core.config_from_dict(settings, "a.json")
    assert str(caught.value).startswith(said)
