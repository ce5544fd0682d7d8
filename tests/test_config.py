"""Config, presets and the settings of files: right values pass, wrong ones are named."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import numpy as np
import pytest
from helpers import tiny

import walker_core as core
from walker_core import Config, UserError

FIELDS = [field.name for field in dataclasses.fields(Config)]
NAN, INF = math.nan, math.inf

SIZES = (), (0,), (64, -1), (4097,), (64, 2**40), (64.0,), ("64",), (True,), 64, "64", None
WRONG = {  # values that each setting must not have
    "env": [None, 3, "", "  "],
    "env_kwargs": [(3,), 3, "hardcore=True", ("",)],
    "total_timesteps": [0, -1, 1.5, NAN, INF, "100", True, None],
    "seed": [-1, 2**32, 1.0, "1", True, None],
    "device": ["gpu", "", None, 0],
    "compile": [1, "true", None],
    "out": [None, "", " ", 3],
    "init_from": ["", " ", 3],
    "vector_env": ["synch", None, True],
    "num_envs": [0, -4, 100_001, 2.0, NAN, "8", True, None],
    "rollout_steps": [0, 1, -4, 1_000_001, 2.0, "8", True],
    "step_timeout": [0, 0.0, -1.0, NAN, INF, "60", None],
    "norm_obs": [1, 0, "true", None],
    "norm_reward": [1, "false", None],
    "clip_obs": [0, 0.0, -1.0, NAN, INF, "10", None],
    "clip_reward": [
        (NAN, 1.0),
        (-1.0, NAN),
        (-INF, INF),
        10.0,
        ("a", "b"),
        (1.0,),
        (-1.0, 0.0, 1.0),
    ],
    "actor_hidden": SIZES,
    "critic_hidden": SIZES,
    "activation": ["gelu", "", None, []],
    "layer_norm": [1, "true", None],
    "mean_activation": ["relu", "", None, True],
    "init_std": [0.0, -1.0, 11, NAN, INF, "1", None],
    "state_dependent_std": [1, "true", None],
    "learning_rate": [0.0, -3e-4, NAN, INF, "3e-4", None],
    "value_learning_rate": [0.0, -3e-4, NAN, INF, "3e-4"],
    "lr_schedule": ["quadratic", "", None],
    "desired_kl": [0.0, -0.1, NAN, INF, "0.01", None],
    "gamma": [-0.1, 1.1, NAN, INF, "0.99", None],
    "gae_lambda": [-0.1, 1.1, NAN, -INF, "0.95", None],
    "clip_eps": [0.0, -0.2, NAN, INF, "0.2", None],
    "clip_value_eps": [0.0, -0.2, NAN, INF, "0.2"],
    "failure_reward": [NAN, INF, "-100", None],
    "entropy_coef": [-0.1, NAN, INF, "0", None],
    "value_coef": [-0.5, NAN, INF, "0.5", None],
    "max_grad_norm": [0.0, -0.5, NAN, INF, "0.5", None],
    "update_epochs": [0, -1, 2.0, NAN, "5", True, None],
    "minibatch_size": [0, 1, -16, 16.0, NAN, "16", True, None],
    "target_kl": [0.0, -0.1, NAN, INF, "0.1"],
    "eval_every": [-1, 0.5, NAN, "100", True, None],
    "eval_episodes": [0, -1, 2.0, NAN, "20", True, None],
    "checkpoint_every": [-1, 0.5, NAN, "100", True, None],
    "record_every": [-1, 0.5, NAN, "100", True, None],
    "tensorboard": [1, "true", None],
    "stop_when_solved": [1, "true", None],
}
WRONG_CASES = [(name, value) for name, values in WRONG.items() for value in values]
TOGETHER = [  # of the right type and within bounds
    ("clip_reward", (1.0, -1.0), "LOW < HIGH"),
    ("clip_reward", (0.0, 0.0), "LOW < HIGH"),
]


def test_every_setting_has_wrong_values_above():
    assert list(WRONG) == FIELDS
    assert all(WRONG.values())


def refused(name, value) -> str:
    """What is said of the value, behind its flag and itself."""
    with pytest.raises(UserError) as caught:
        Config(**{name: value})
    said = str(caught.value)
    begin = f"--{name.replace('_', '-')} is {value!r}: "
    assert said.startswith(begin)
    assert "\n" not in said
    return said.removeprefix(begin)


@pytest.mark.parametrize(("name", "value"), WRONG_CASES, ids=repr)
def test_a_wrong_value_is_refused_with_its_flag_its_value_and_what_is_right(name, value):
    assert re.search(r"must (be|have)|should (match|have)|Field required", refused(name, value))


def test_an_argument_of_the_environment_without_its_value_is_refused_with_the_pattern_of_one():
    said = refused("env_kwargs", ("hardcore",))
    assert said == "String should match pattern '(?P<KEY>.+)=(?P<VALUE>.*)'"


@pytest.mark.parametrize(("name", "value", "right"), TOGETHER, ids=repr)
def test_what_pydantic_cannot_know_is_refused_just_so(name, value, right):
    assert refused(name, value) == f"it must be {right}"


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("gamma", 1.1, "less than or equal to 1"),
        ("learning_rate", 0.0, "greater than 0"),
        ("learning_rate", NAN, "a finite number"),
        ("num_envs", 0, "greater than or equal to 1"),
        ("actor_hidden", (64, 2**40), "less than or equal to 4096"),
        ("activation", "gelu", "'tanh', 'relu', 'elu' or 'silu'"),
        ("norm_obs", 1, "a valid boolean"),
    ],
)
def test_what_is_right_is_said_in_words(name, value, right):
    assert refused(name, value) == f"it must be {right}"


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
    Config(num_envs=100_000, rollout_steps=1_000_000, critic_hidden=(4096, 1))
    Config(init_std=0.001, clip_reward=(-1e300, 1), step_timeout=1, gamma=np.float64(1))
    Config(init_std=10, actor_hidden=(1,), update_epochs=1, checkpoint_every=0, env_kwargs=())


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
    back = core.checked(Config.for_env, json.loads(json.dumps(plain)), "a.json")
    assert back == dataclasses.replace(config, out=Config.out)
    assert hash(back)  # lists have become tuples


def test_remarks_in_a_file_of_settings_are_no_settings():
    settings = core.plain_settings(tiny()) | {"_about": {"reward_threshold": 300}}
    assert core.checked(Config.for_env, settings, "a.json") == tiny()


def test_a_file_of_settings_starts_from_the_preset_of_its_environment():
    config = core.checked(Config.for_env, {"env": "BipedalWalker-v3", "gamma": 0.5}, "a.json")
    assert config == Config.for_env("BipedalWalker-v3", gamma=0.5)
    assert core.checked(Config.for_env, {}, "a.json") == Config.for_env("BipedalWalker-v3")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gama": 0.9}, "a.json: --gama is 0.9: Unexpected keyword argument"),
        ({"gamma": 2.0}, "a.json: --gamma is 2.0: it must be less than or equal to 1"),
        ({"gamma": None}, "a.json: --gamma is None: it must be a valid number"),
        ({"env": None}, "a.json: --env is None: it must be a valid string"),
        ({"env": {"id": 1}}, "a.json: --env is {'id': 1}: it must be a valid string"),
        ({"env": ["Pendulum-v1"]}, "a.json: --env is ('Pendulum-v1',): it must be a valid string"),
    ],
    ids=repr,
)
def test_a_wrong_setting_in_a_file_is_refused_with_the_files_name(settings, said):
    with pytest.raises(UserError) as caught:
        core.checked(Config.for_env, settings, "a.json")
    assert str(caught.value).startswith(said)
