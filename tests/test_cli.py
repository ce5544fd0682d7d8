"""The command line: where settings come from, what is refused and how, and `evaluate`."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shutil
from pathlib import Path

import gymnasium as gym
import imageio.v3 as iio
import numpy as np
import pytest
import torch
from helpers import BATCH, TINY, flags, rows, tiny, train_without_pictures, tree, warned

import walker
import walker_core as core
from walker_core import Config

# Each setting as typed, and the value it then has, which is no default.
TYPED = {
    "env": ("MountainCarContinuous-v0", "MountainCarContinuous-v0"),
    "env_kwargs": ("g=9.81 max_episode_steps=9", ("g=9.81", "max_episode_steps=9")),
    "total_timesteps": ("4321", 4321),
    "seed": ("77", 77),
    "device": ("cpu", "cpu"),
    "compile": (None, True),
    "out": ("somewhere", "somewhere"),
    "init_from": ("other.pt", "other.pt"),
    "vector_env": ("async", "async"),
    "num_envs": ("50", 50),
    "rollout_steps": ("500", 500),
    "step_timeout": ("2.5", 2.5),
    "norm_obs": (None, False),
    "norm_reward": (None, False),
    "clip_obs": ("7.5", 7.5),
    "clip_reward": ("-2 3", (-2.0, 3.0)),
    "actor_hidden": ("16 8 4", (16, 8, 4)),
    "critic_hidden": ("32", (32,)),
    "activation": ("elu", "elu"),
    "layer_norm": (None, True),
    "mean_activation": ("tanh", "tanh"),
    "init_std": ("0.4", 0.4),
    "state_dependent_std": (None, True),
    "learning_rate": ("7e-4", 7e-4),
    "value_learning_rate": ("1e-3", 1e-3),
    "lr_schedule": ("cosine", "cosine"),
    "desired_kl": ("0.03", 0.03),
    "gamma": ("0.9", 0.9),
    "gae_lambda": ("0.8", 0.8),
    "clip_eps": ("0.15", 0.15),
    "clip_value_eps": ("0.3", 0.3),
    "failure_reward": ("-50", -50.0),
    "entropy_coef": ("0.001", 0.001),
    "value_coef": ("0.25", 0.25),
    "max_grad_norm": ("2", 2.0),
    "update_epochs": ("3", 3),
    "minibatch_size": ("8", 8),
    "target_kl": ("0.02", 0.02),
    "eval_every": ("640", 640),
    "eval_episodes": ("3", 3),
    "checkpoint_every": ("320", 320),
    "record_every": ("960", 960),
    "tensorboard": (None, True),
    "stop_when_solved": (None, True),
}
# What --resume may change: total timesteps, device, vector backend, cadences, logging.
RESUMABLE = {
    *("total_timesteps", "device", "compile", "vector_env", "eval_every", "eval_episodes"),
    *("checkpoint_every", "stop_when_solved", "out", "step_timeout", "record_every", "tensorboard"),
}
RESULT = re.compile(
    r"return (-?\d+\.\d) ± (\d+\.\d) over (\d+) episodes \(min (-?\d+\.\d), max (-?\d+\.\d)\), "
    r"length (\d+)"
)


def words(name: str) -> list[str]:
    """The flag of a setting, as typed, with its value in TYPED."""
    flag, (typed, value) = name.replace("_", "-"), TYPED[name]
    if typed is None:
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", *typed.split()]


pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a finished run in `run`, and files that are no checkpoints."""
    folder = tmp_path_factory.mktemp("cli")
    train_without_pictures(tiny(folder / "run", eval_every=2 * BATCH))
    whole = (folder / "run" / core.LAST).read_bytes()
    (folder / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.pt").write_bytes(b"")
    (folder / "text.pt").write_text("weights, honestly\n")
    torch.save({"model": torch.zeros(3), "epoch": 7}, folder / "foreign.pt")
    torch.save({"format": core.CHECKPOINT_FORMAT, "config": {}}, folder / "hollow.pt")
    torch.save([torch.zeros(3)], folder / "list.pt")
    (folder / "afile").write_text("not a folder\n")
    (folder / "half").mkdir()
    (folder / "half" / "plots").write_text("not a folder\n")
    (folder / "broken.json").write_text('{"gamma": 0.9')
    (folder / "array.json").write_text("[]")
    (folder / "string.json").write_text('""')
    (folder / "typo.json").write_text('{"gama": 0.9}')
    (folder / "nan.json").write_text('{"gamma": NaN}')
    return folder


@pytest.fixture
def folder(trained, tmp_path, monkeypatch) -> Path:
    """A fresh copy of the prepared folder, and the current one."""
    shutil.copytree(trained, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def refused(argv: list[str], folder: Path, capsys, recwarn) -> str:
    """The one line on standard error, once everything else about a wrong command is right."""
    before = tree(folder)
    code = walker.main(argv)
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1, printed.err
    assert printed.err.startswith("walker.py: ")
    assert printed.err[:-1].isprintable()  # no control characters
    assert warned(recwarn) == []  # more lines on standard error
    assert tree(folder) == before
    return printed.err.removeprefix("walker.py: ").rstrip("\n")


# ---- where settings come from --------------------------------------------------------------------


def test_every_setting_is_a_flag_with_its_meaning_in_the_help(capsys):
    with pytest.raises(SystemExit) as caught:
        walker.main(["--help"])
    assert caught.value.code == 0
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    source = inspect.getsource(Config)
    for field in dataclasses.fields(Config):
        [meaning] = re.findall(rf"^    {field.name}: .*  # (.+)$", source, re.MULTILINE)
        flag = field.name.replace("_", "-")
        assert re.search(rf" --{flag}[ ,].{{0,60}}?{re.escape(meaning)} \(default: ", text), flag
    for flag in ("--resume", "--config", "--overwrite", "evaluate"):
        assert flag in text


def test_every_setting_of_an_evaluation_is_in_its_help(capsys):
    with pytest.raises(SystemExit) as caught:
        walker.main(["evaluate", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name in (field.name for field in dataclasses.fields(walker.Evaluation)):
        flag = name.replace("_", "-")
        assert name == "checkpoint" or f"--{flag} " in text.replace(",", " ")


def test_the_flags_below_are_all_there_are():
    assert sorted(TYPED) == sorted(field.name for field in dataclasses.fields(Config))


@pytest.mark.parametrize("name", TYPED)
def test_a_typed_flag_changes_its_setting_and_no_other(name):
    config, resume, overwrite = walker.parse_training(["--env", "Pendulum-v1", *words(name)])
    assert config == dataclasses.replace(Config(env="Pendulum-v1"), **{name: TYPED[name][1]})
    assert TYPED[name][1] != getattr(Config(), name)
    assert (resume, overwrite) == (None, False)


def test_a_flag_may_be_typed_with_an_equals_sign_and_the_last_one_counts():
    config, _, _ = walker.parse_training(["--gamma=0.5", "--out=a", "--gamma", "0.6", "--out", "b"])
    assert (config.gamma, config.out) == (0.6, "b")


def test_each_source_of_settings_beats_the_ones_below_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    env = "BipedalWalker-v3"
    defaults = Config().total_timesteps, Config().learning_rate
    preset = Config.for_env(env).total_timesteps, Config.for_env(env).learning_rate
    assert defaults[0] != preset[0]

    def total_and_rate(*argv):
        config, _, _ = walker.parse_training(list(argv))
        return config.total_timesteps, config.learning_rate

    def write(**settings):
        Path("some.json").write_text(json.dumps(settings))
        return "--config", "some.json"

    assert total_and_rate("--env", "Pendulum-v1") == defaults
    assert total_and_rate() == total_and_rate("--env", env) == preset
    assert total_and_rate(*write(total_timesteps=5)) == (5, preset[1])
    assert total_and_rate(*write(env=env, learning_rate=0.2), "--total-timesteps", "6") == (6, 0.2)
    assert total_and_rate(*write(env="Pendulum-v1", total_timesteps=7)) == (7, defaults[1])

    Path("checkpoints_walker").mkdir()
    core.Learner(tiny(env=env, env_kwargs=(), total_timesteps=64, learning_rate=0.3)).save(
        "checkpoints_walker/last.pt"
    )
    assert total_and_rate("--resume") == (64, 0.3)
    assert total_and_rate("--resume", *write(total_timesteps=8, learning_rate=0.4)) == (64, 0.3)
    assert total_and_rate("--resume", "--total-timesteps", "96") == (96, 0.3)


def test_a_typed_environment_beats_a_files_and_its_preset_stays_below_the_file(tmp_path):
    file = tmp_path / "some.json"
    file.write_text('{"env": "Pendulum-v1", "gamma": 0.5}')
    config, _, _ = walker.parse_training(["--config", str(file), "--env", "BipedalWalker-v3"])
    assert config == Config.for_env("BipedalWalker-v3", gamma=0.5)


def test_a_resumed_run_goes_on_in_its_own_folder(folder):
    in_other = walker.parse_training(["--out", "run", "--resume"])
    assert in_other[1] == Path("run/checkpoints_walker/last.pt")
    assert walker.parse_training(["--resume", "run/checkpoints_walker/best.pt"])[0].out == "run"
    assert in_other[0] == tiny("run", eval_every=2 * BATCH)


# ---- what --resume may change --------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in TYPED if name not in RESUMABLE])
def test_a_resume_refuses_a_flag_that_would_change_the_learner(name, folder, capsys, recwarn):
    file, old = "run/checkpoints_walker/last.pt", getattr(tiny(), name)
    said = refused(["--resume", file, *words(name)], folder, capsys, recwarn)
    flag = name.replace("_", "-")
    assert said == f"--{flag} is {TYPED[name][1]!r}, but {file} was trained with {old!r}"


def test_a_resume_accepts_what_does_not_change_the_learner(folder):
    changes = {"total_timesteps": 6 * BATCH, "device": "auto"}
    free = sorted(RESUMABLE - {"out"} - set(changes))
    argv = [word for name in free for word in words(name)]
    argv += ["--total-timesteps", str(6 * BATCH), "--device", "auto"]
    assert walker.main(["--out", "run", "--resume", *argv]) == 0
    changes |= {name: TYPED[name][1] for name in free}
    written = json.loads((folder / "run" / core.CONFIG).read_text())
    assert {name: written[name] for name in changes} == changes
    assert not any(getattr(tiny(eval_every=2 * BATCH), name) == changes[name] for name in changes)
    assert [int(row["step"]) for row in rows(folder / "run")] == [BATCH * i for i in range(1, 7)]


def test_a_resume_accepts_a_typed_flag_that_changes_nothing(folder):
    config, resume, _ = walker.parse_training(["--resume", *flags("run", eval_every=2 * BATCH)])
    assert core.prepare_learner(config, resume).counters.step == 4 * BATCH


# ---- what is refused -----------------------------------------------------------------------------

NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
NO_MPS = pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is a GPU here")
LAST = "run/checkpoints_walker/last.pt"
FOREIGN = "was written by version None, in format None, not 1"

WRONG_TRAINING = [  # what is typed after the settings of `TINY`, and parts of what is said
    ("--env Nosuch-v0", "--env Nosuch-v0", "doesn't exist"),
    ("--env BipedalWalker-v2", "--env BipedalWalker-v2", "BipedalWalker-v3"),
    ("--env nosuchmodule:Thing-v0", "--env nosuchmodule:Thing-v0", "No module named"),
    (
        "--env Taxi-v4 --env-kwargs",
        "--env Taxi-v4",
        "observations are no float vector, nor an image",
    ),
    ("--env CliffWalking-v1 --env-kwargs", "--env CliffWalking-v1", "observations are no float"),
    ("--env-kwargs gravity=1", "--env Pendulum-v1", "unexpected keyword argument 'gravity'"),
    ("--env-kwargs hardcore", "--env-kwargs is ('hardcore',)", "KEY"),
    ("--env", "--env", "expected one argument"),
    ("--num-envs many", "--num-envs", "'many'"),
    ("--num-envs 1.5", "--num-envs", "'1.5'"),
    ("--gamma high", "--gamma", "'high'"),
    ("--gamma", "--gamma", "Missing value"),
    ("--gamma 0.9 0.8", "Unrecognized options: 0.8"),
    ("--gamma nan", "--gamma is nan", "a finite number"),
    ("--learning-rate nan", "--learning-rate is nan", "a finite number"),
    ("--learning-rate inf", "--learning-rate is inf", "a finite number"),
    ("--clip-reward -inf inf", "--clip-reward is (-inf, inf)", "a finite number"),
    ("--norm-obs maybe", "maybe"),
    ("--lr-schedule quadratic", "'quadratic'", "'constant', 'linear', 'cosine', 'adaptive'"),
    ("--total-timesteps 0", "--total-timesteps is 0", "greater than 0"),
    ("--total-timesteps 1e6", "--total-timesteps", "'1e6'"),
    ("--num-envs 0", "--num-envs is 0", "greater than or equal to 1"),
    ("--rollout-steps -16", "--rollout-steps is -16", "greater than or equal to 2"),
    ("--update-epochs 0", "--update-epochs is 0", "greater than 0"),
    ("--eval-episodes 0", "--eval-episodes is 0", "greater than 0"),
    ("--eval-every -1", "--eval-every is -1", "greater than or equal to 0"),
    ("--seed -1", "--seed is -1", "greater than or equal to 0"),
    ("--actor-hidden", "--actor-hidden is ()", "at least 1 item"),
    ("--actor-hidden 64 0", "--actor-hidden is (64, 0)", "greater than or equal to 1"),
    ("--minibatch-size 33", "--minibatch-size is 33", "at most the batch", "= 32"),
    pytest.param(("--device cuda", "--device cuda", "--device cpu"), marks=NO_CUDA),
    pytest.param(("--device mps", "--device mps", "--device cpu"), marks=NO_MPS),
    ("--device tpu", "--device", "'tpu'", "'auto', 'cpu', 'cuda', 'mps'"),
    ("--learning-rat 0.1", "--learning-rat", "perhaps --learning-rate?"),
    ("--resum", "--resum"),
    ("evalute x.pt", "evalute"),
    ("--out afile", "--out", "afile"),
    ("--out afile/below", "--out", "afile/below"),
    ("--out half", "--out", "half/plots"),
    ("--out run", "run/checkpoints_walker", "--resume", "--out", "--overwrite"),
    ("--out run --resume --overwrite", "--resume", "--overwrite"),
    ("--resume nosuch.pt", "nosuch.pt", "No such file"),
    ("--resume run", "run", "Is a directory"),
    ("--resume --out half", "half/checkpoints_walker/last.pt", "No such file"),
    ("--resume truncated.pt", "truncated.pt is no checkpoint"),
    ("--resume empty.pt", "empty.pt is no checkpoint"),
    ("--resume text.pt", "text.pt is no checkpoint"),
    ("--resume foreign.pt", f"foreign.pt {FOREIGN}"),
    ("--resume list.pt", "list.pt is no checkpoint"),
    ("--resume hollow.pt", "hollow.pt"),
    ("--out run --overwrite --init-from nosuch.pt", "nosuch.pt", "No such file"),
    ("--out run --overwrite --init-from truncated.pt", "truncated.pt is no checkpoint"),
    ("--out run --overwrite --init-from hollow.pt", "hollow.pt"),
    (
        f"--out run --overwrite --init-from {LAST} --actor-hidden 5",
        f"{LAST} does not fit this run",
        "agent.actor.0.weight is damaged, or of shape (4, 3), not (5, 3)",
    ),
    ("--config nosuch.json", "nosuch.json", "No such file"),
    ("--config broken.json", "broken.json: Expecting"),
    ("--config array.json", "array.json: 'list' object"),
    ("--config string.json", "string.json: 'str' object"),
    ("--config typo.json", "typo.json: --gama is 0.9: Unexpected keyword argument"),
    ("--config nan.json", "nan.json: --gamma is nan"),
]


@pytest.mark.parametrize("case", WRONG_TRAINING, ids=lambda case: case[0])
def test_a_wrong_command_is_one_line_and_code_2_and_touches_nothing(case, folder, capsys, recwarn):
    typed, *parts = case
    said = refused([*flags("new"), *typed.split()], folder, capsys, recwarn)
    for part in parts:
        assert part in said


WRONG_EVALUATIONS = [
    ("", "required"),
    ("nosuch.pt", "nosuch.pt", "No such file"),
    ("run", "run", "Is a directory"),
    ("truncated.pt", "truncated.pt is no checkpoint"),
    ("text.pt", "text.pt is no checkpoint"),
    ("foreign.pt", f"foreign.pt {FOREIGN}"),
    ("hollow.pt", "hollow.pt"),
    (f"{LAST} --episodes 0", "--episodes is 0", "greater than 0"),
    (f"{LAST} --episodes few", "--episodes", "'few'"),
    (f"{LAST} --seed -1", "--seed is -1"),
    (f"{LAST} --seconds 0", "--seconds is 0", "greater than 0"),
    (f"{LAST} --seconds nan", "--seconds is nan", "finite"),
    (f"{LAST} --episode 3", "--episode", "perhaps --episodes?"),
    (f"{LAST} --env Nosuch-v0", "--env Nosuch-v0", "doesn't exist"),
    (f"{LAST} --env Taxi-v4", "--env Taxi-v4", "no float vector"),
    (
        f"{LAST} --env MountainCarContinuous-v0",
        f"{LAST} does not fit this run",
        "agent.actor.0.weight is damaged, or of shape (4, 3), not (4, 2)",
    ),
    (f"{LAST} --record --out afile", "--out", "afile"),
    pytest.param((f"{LAST} --device cuda", "--device cuda"), marks=NO_CUDA),
]


@pytest.mark.parametrize("case", WRONG_EVALUATIONS, ids=lambda case: case[0])
def test_a_wrong_evaluation_is_one_line_and_code_2_and_touches_nothing(
    case, folder, capsys, recwarn
):
    typed, *parts = case
    said = refused(["evaluate", *typed.split()], folder, capsys, recwarn)
    for part in parts:
        assert part in said


def test_a_resume_into_the_folder_of_another_run_is_refused(folder, capsys, recwarn):
    shutil.copytree("run", "another")
    said = refused(["--resume", LAST, "--out", "another"], folder, capsys, recwarn)
    assert "another" in said


# ---- evaluate ------------------------------------------------------------------------------------


def test_evaluate_ends_with_a_line_of_the_numbers_of_its_episodes(folder, capsys):
    assert walker.main(["evaluate", LAST, "--episodes", "5", "--seed", "3"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    match = RESULT.fullmatch(last)
    assert match, last

    config = tiny(seed=3)
    learner = core.Learner(config)
    learner.load(core.load_checkpoint(LAST), LAST, core.POLICY)
    returns, lengths = core.evaluate(learner.act, config, core.env_seeds(3, core.TEST, 5))
    expected = (returns.mean(), returns.std(), 5, returns.min(), returns.max(), lengths.mean())
    assert [float(number) for number in match.groups()] == pytest.approx(expected, abs=0.051)
    assert returns.std() > 1


def test_evaluate_says_the_same_again_and_else_with_another_seed(folder, capsys):
    before, said = tree(folder), []
    for seed in ("3", "3", "4"):
        assert walker.main(["evaluate", LAST, "--episodes", "3", "--seed", seed]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]
    assert tree(folder) == before


def test_evaluate_plays_a_hundred_episodes_by_default(folder, capsys):
    assert walker.main(["evaluate", LAST]) == 0
    assert " over 100 episodes " in capsys.readouterr().out.splitlines()[-1]


def test_evaluate_goes_to_another_environment_without_the_first_ones_arguments(folder, capsys):
    gym.register(
        "ShortPendulum-v0", "gymnasium.envs.classic_control:PendulumEnv", max_episode_steps=7
    )
    try:
        argv = ["evaluate", LAST, "--episodes", "2", "--env", "ShortPendulum-v0"]
        assert walker.main(argv) == 0
    finally:
        del gym.registry["ShortPendulum-v0"]
    assert capsys.readouterr().out.splitlines()[-1].endswith(", length 7")
    assert walker.main(["evaluate", LAST, "--episodes", "2", "--env", TINY["env"]]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(", length 10")


@pytest.mark.parametrize(("seconds", "frames"), [(None, 10), ("0.1", 3), ("0.001", 1)])
def test_evaluate_films_an_episode_named_after_its_checkpoint(seconds, frames, folder, capsys):
    before = tree(folder)
    argv = ["evaluate", "run/checkpoints_walker/best.pt", "--episodes", "2", "--record"]
    argv += ["--out", "films"] + (["--seconds", seconds] if seconds else [])
    assert walker.main(argv) == 0
    new = set(tree(folder)) - set(before)
    files = {f"films/videos/best.{suffix}" for suffix in ("mp4", "gif", "npz")}
    assert new == {"films", "films/videos"} | files
    film = iio.imread("films/videos/best.mp4")
    assert film.shape == (frames, 500, 500, 3)  # what each step of an episode led to
    assert np.ptp(film) > 100
    assert RESULT.fullmatch(capsys.readouterr().out.splitlines()[-1])


def test_evaluate_shows_episodes_in_a_window_for_so_many_seconds(folder, capsys, monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    shown = []
    render = gym.make("Pendulum-v1").unwrapped.__class__.render

    def count(env):
        shown.append(env.render_mode)
        return render(env)

    monkeypatch.setattr("gymnasium.envs.classic_control.PendulumEnv.render", count)
    argv = ["evaluate", LAST, "--episodes", "2", "--render", "--seconds", "0.1"]
    assert walker.main(argv) == 0
    assert set(shown) == {"human"}
    assert len(shown) >= 3
    assert RESULT.fullmatch(capsys.readouterr().out.splitlines()[-1])


def test_evaluate_prints_the_same_numbers_as_json_where_asked(folder, capsys):
    argv = ["evaluate", LAST, "--episodes", "3"]
    said = []
    for asked in ([], ["--json"]):
        assert walker.main(argv + asked) == 0
        said.append(capsys.readouterr().out.splitlines()[-1])
    found = json.loads(said[1])
    assert list(found) == ["mean", "std", "episodes", "min", "max", "length"]
    rounded = [float(number) for number in RESULT.fullmatch(said[0]).groups()]
    assert list(found.values()) == pytest.approx(rounded, abs=0.051)


def test_evaluate_writes_the_data_of_the_episode_that_it_films(folder):
    assert walker.main(["evaluate", LAST, "--episodes", "2", "--record", "--out", "films"]) == 0
    learner = core.load_learner(LAST, None, 0, "cpu", "films")
    [seed, _] = core.env_seeds(0, core.TEST, 2)
    returns, _ = core.evaluate(learner.act, learner.config, [seed])
    with np.load("films/videos/last.npz") as data:
        obs = data["observations"]
        assert obs.shape == (10, 3)
        np.testing.assert_allclose(data["actions"], learner.act(obs), rtol=1e-5)
        np.testing.assert_allclose(data["values"], learner.value(obs), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(data["next_values"][:-1], data["values"][1:], atol=1e-5)
        np.testing.assert_allclose(data["rewards"].sum(), returns[0])
        scale = np.sqrt(learner.reward_normalizer.var + 1e-8)
        assert data["reward_scale"] == pytest.approx(float(scale)) != 1
        assert (data["dt"], data["gamma"]) == (1 / 30, 0.99)
        assert data["reward_clip"].tolist() == [-10, 10]
        assert "hull" not in data  # which is a BipedalWalker's


def test_evaluate_compares_values_with_returns_in_a_picture_and_three_numbers(folder, capsys):
    before = set(tree(folder))
    argv = ["evaluate", LAST, "--episodes", "12", "--analyze-value", "--out", "values"]
    assert walker.main(argv) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"explained variance -?\d\.\d{3}, bias [+-]\d+\.\d{3}, RMSE \d+\.\d{3}\n", said
    )
    files = {f"values/plots/last_value.{suffix}" for suffix in ("png", "npz")}
    assert set(tree(folder)) - before == {"values", "values/plots"} | files
    with np.load("values/plots/last_value.npz") as data:
        assert np.bincount(data["episode"]).tolist() == [10] * 10
