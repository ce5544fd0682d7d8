"""Config, presets and the settings of files: right values pass, wrong ones are named."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from helpers import tiny

import walker_core as core
from walker_core import Config, UserError

FIELDS = [field.name for field in dataclasses.fields(Config)]
NAN, INF = math.nan, math.inf

SIZES = (), (0,), (64, -1), (4097,), (64, 2**40), (64.0,), ("64",), (True,), 64, "64", None
WRONG = {  # what each setting must be, and values that are not
    "env": ("str", [None, 3, "", "  "]),
    "env_kwargs": ("tuple[str, ...]", [(3,), 3, "hardcore=True", ("",)]),
    "total_timesteps": ("int in [1, inf)", [0, -1, 1.5, NAN, INF, "100", True, None]),
    "seed": ("int in [0, 4294967295]", [-1, 2**32, 1.0, "1", True, None]),
    "device": ("Literal['auto', 'cpu', 'cuda', 'mps']", ["gpu", "", None, 0]),
    "out": ("str", [None, "", " ", 3]),
    "init_from": ("str | None", ["", " ", 3]),
    "vector_env": ("Literal['sync', 'async', 'envpool']", ["synch", None, True]),
    "num_envs": ("int in [1, 100000]", [0, -4, 100_001, 2.0, NAN, "8", True, None]),
    "rollout_steps": ("int in [2, 1000000]", [0, 1, -4, 1_000_001, 2.0, "8", True]),
    "step_timeout": ("float in (0, inf)", [0, 0.0, -1.0, NAN, INF, "60", None]),
    "norm_obs": ("bool", [1, 0, "true", None]),
    "norm_reward": ("bool", [1, "false", None]),
    "clip_obs": ("float in (0, inf)", [0, 0.0, -1.0, NAN, INF, "10", None]),
    "clip_reward": (
        "tuple[float, float] in (-inf, inf)",
        [(NAN, 1.0), (-1.0, NAN), (-INF, INF), 10.0, ("a", "b"), (), (1.0,), (-1.0, 0.0, 1.0)],
    ),
    "actor_hidden": ("tuple[int, ...] in [1, 4096]", SIZES),
    "critic_hidden": ("tuple[int, ...] in [1, 4096]", SIZES),
    "activation": ("Literal['tanh', 'relu', 'elu', 'silu']", ["gelu", "", None, []]),
    "layer_norm": ("bool", [1, "true", None]),
    "init_std": ("float in [0.001, 10]", [0.0, -1.0, 11, NAN, INF, "1", None]),
    "learning_rate": ("float in (0, inf)", [0.0, -3e-4, NAN, INF, "3e-4", None]),
    "lr_schedule": ("Literal['constant', 'linear', 'cosine', 'adaptive']", ["quadratic", "", None]),
    "desired_kl": ("float in (0, inf)", [0.0, -0.1, NAN, INF, "0.01", None]),
    "gamma": ("float in [0, 1]", [-0.1, 1.1, NAN, INF, "0.99", None]),
    "gae_lambda": ("float in [0, 1]", [-0.1, 1.1, NAN, -INF, "0.95", None]),
    "clip_eps": ("float in (0, inf)", [0.0, -0.2, NAN, INF, "0.2", None]),
    "entropy_coef": ("float in [0, inf)", [-0.1, NAN, INF, "0", None]),
    "value_coef": ("float in [0, inf)", [-0.5, NAN, INF, "0.5", None]),
    "max_grad_norm": ("float in (0, inf)", [0.0, -0.5, NAN, INF, "0.5", None]),
    "update_epochs": ("int in [1, inf)", [0, -1, 2.0, NAN, "5", True, None]),
    "minibatch_size": ("int in [2, inf)", [0, 1, -16, 16.0, NAN, "16", True, None]),
    "target_kl": ("float | None in (0, inf)", [0.0, -0.1, NAN, INF, "0.1"]),
    "eval_every": ("int in [0, inf)", [-1, 0.5, NAN, "100", True, None]),
    "eval_episodes": ("int in [1, inf)", [0, -1, 2.0, NAN, "20", True, None]),
    "checkpoint_every": ("int in [0, inf)", [-1, 0.5, NAN, "100", True, None]),
    "stop_when_solved": ("bool", [1, "true", None]),
}
WRONG_CASES = [(name, value, right) for name, (right, all_) in WRONG.items() for value in all_]
WRONG_CASES += [  # of the right type and within bounds
    ("env_kwargs", ("hardcore",), "KEY=VALUE, each"),
    ("clip_reward", (1.0, -1.0), "LOW < HIGH"),
    ("clip_reward", (0.0, 0.0), "LOW < HIGH"),
]


def test_every_setting_has_wrong_values_above():
    assert list(WRONG) == FIELDS
    assert all(values for _, values in WRONG.values())


@pytest.mark.parametrize(("name", "value", "right"), WRONG_CASES, ids=repr)
def test_a_wrong_value_is_refused_with_its_flag_its_value_and_what_is_right(name, value, right):
    flag = name.replace("_", "-")
    with pytest.raises(UserError) as caught:
        Config(**{name: value})
    assert str(caught.value) == f"--{flag} is {value!r}: it must be {right}"


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
        ({"gama": 0.9}, "a.json: got an unexpected keyword argument 'gama'"),
        ({"gamma": 2.0}, "a.json: --gamma is 2.0: it must be float in [0, 1]"),
        ({"gamma": None}, "a.json: --gamma is None: it must be float in [0, 1]"),
        ({"env": None}, "a.json: --env is None: it must be str"),
        ({"env": {"id": 1}}, "a.json: --env is {'id': 1}: it must be str"),
        ({"env": ["Pendulum-v1"]}, "a.json: --env is ('Pendulum-v1',): it must be str"),
    ],
    ids=repr,
)
def test_a_wrong_setting_in_a_file_is_refused_with_the_files_name(settings, said):
    with pytest.raises(UserError) as caught:
        core.config_from_dict(settings, "a.json")
    assert str(caught.value).startswith(said)
