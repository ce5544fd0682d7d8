"""The command line: where settings come from, what is refused and how, and `evaluate`."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import gymnasium as gym
import imageio.v3 as imageio
import numpy as np
import pytest
import torch
import toy_envs  # noqa: F401
from helpers import (
    BATCH,
    PRETRAINED,
    evaluate_here,
    flags,
    rows,
    tiny,
    train_without_pictures,
    tree,
    warned,
)

import walker
import walker_core as core
from walker_core import Config

FIELDS = {name: field.annotation for name, field in Config.__pydantic_fields__.items()}
RESUMABLE = {  # what --resume may change: nothing that the learner sees
    "total_timesteps", "device", "vector_env", "out", "eval_every", "eval_episodes",
    "checkpoint_every", "record_every", "tensorboard", "stop_when_solved",
}  # fmt: skip
LAST = f"run/{core.LAST}"
RESULT = re.compile(
    r"return (-?\d+\.\d) ± (\d+\.\d) over (\d+) episodes \(min (-?\d+\.\d), max (-?\d+\.\d)\), "
    r"length (\d+)"
)

pytestmark = pytest.mark.usefixtures("no_pictures")


def another(name: str):
    """A right value of the field that differs from that of `tiny()`."""
    kind, value = FIELDS[name], getattr(tiny(), name)
    if typing.get_origin(kind) is typing.Literal:
        return next(choice for choice in reversed(typing.get_args(kind)) if choice != value)
    if kind is bool:
        return not value
    if kind is int:
        return value + 1
    if kind in (float, float | None):
        return value / 2 if value else 0.125
    if name in core.COURSES:
        return (0.25, 0.0, -50.0, 300.0)
    if name in ("actor_hidden", "critic_hidden"):
        return (16, 8)
    if name == "init_from":
        return PRETRAINED
    return {"clip_reward": (-1000.0, 3.0), "env_kwargs": ("g=9.81", "render_fps=9")}.get(name, "x")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a finished run in `run`, and files that are wrong."""
    folder = tmp_path_factory.mktemp("cli")
    train_without_pictures(tiny(folder / "run", eval_every=2 * BATCH))
    whole = (folder / LAST).read_bytes()
    (folder / "half.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"model": torch.zeros(3), "epoch": 7}, folder / "foreign.pt")
    (folder / "afile").write_text("not a folder\n")
    (folder / "broken.json").write_text('{"gamma": 0.9')
    (folder / "array.json").write_text("[1]")
    (folder / "typo.json").write_text('{"gama": 0.9}')
    return folder


# ---- where settings come from --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "defaults", "more"),
    [
        ("--help", Config.for_env(), ("--resume", "--config", "--overwrite", "walker.pyevaluate")),
        ("evaluate --help", walker.Evaluation(), ("checkpoint",)),
    ],
)
def test_every_field_is_in_the_help_with_its_meaning_and_default(command, defaults, more, capsys):
    with pytest.raises(SystemExit) as caught:
        walker.main(command.split())
    assert caught.value.code == 0
    text = "".join(capsys.readouterr().out.split())
    for name, field in defaults.__pydantic_fields__.items():
        flag, default = f"--{name.replace('_', '-')}", getattr(defaults, name)
        meaning = "".join(f"{field.description} (default: {default})".split())
        assert re.search(rf"{flag}\W?[^a-z]?.{{0,50}}?{re.escape(meaning)}", text), flag
    assert all(part in text for part in more)


@pytest.mark.parametrize("name", FIELDS)
def test_a_typed_flag_changes_its_field_and_no_other(name):
    base = {"eval_every": 32} if name == "stop_when_solved" else {}
    change = {name: another(name)}
    config, resume, overwrite = walker.parse_training(flags(**{**base, **change}))
    assert config == dataclasses.replace(tiny(**base), **change) != tiny(**base)
    assert (resume, overwrite) == (None, False)


def test_numbers_may_be_negative_or_scientific_and_the_last_flag_counts():
    def typed(words):
        return walker.parse_training(words.split())[0]

    assert typed("--clip-reward -1000 1e3").clip_reward == (-1e3, 1e3)
    assert typed("--clip-reward -.5 2").clip_reward == (-0.5, 2)
    assert typed("--failure-reward=-1e9 --gamma=0.5 --gamma 5e-1").failure_reward == -1e9
    assert typed("--gamma=0.5 --gamma 6e-1").gamma == 0.6
    moving = typed("--entropy-coef 6e-3 0 -150 280 --failure-cost 1 5 --desired-kl .02")
    assert moving.entropy_coef == (0.006, 0, -150, 280)
    assert (moving.failure_cost, moving.desired_kl) == ((1, 5), 0.02)


def test_each_source_of_settings_beats_the_ones_below_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    env = "BipedalWalker-v3"
    default, preset = (
        (config.total_timesteps, config.learning_rate) for config in (Config(), Config.for_env(env))
    )
    assert default[0] != preset[0]
    assert default[1] != preset[1]

    def total_and_rate(*argv):
        config, _, _ = walker.parse_training(list(argv))
        return config.total_timesteps, config.learning_rate

    def file(**settings):
        Path("some.json").write_text(json.dumps(settings))
        return "--config", "some.json"

    assert total_and_rate("--env", "Pendulum-v1") == default
    assert total_and_rate() == total_and_rate("--env", env) == preset
    assert total_and_rate(*file(total_timesteps=5)) == (5, preset[1])
    assert total_and_rate(*file(env="Pendulum-v1", total_timesteps=7)) == (7, default[1])
    assert total_and_rate(*file(env=env, learning_rate=0.2), "--total-timesteps", "6") == (6, 0.2)
    # the preset of a typed environment stays below the file
    typed = total_and_rate(*file(env="Pendulum-v1", learning_rate=0.2), "--env", env)
    assert typed == (preset[0], 0.2)

    learner = core.Learner(tiny())
    learner.config = tiny(env=env, env_kwargs=(), total_timesteps=64, learning_rate=0.3)
    learner.save(core.LAST)
    assert total_and_rate("--resume") == (64, 0.3)
    assert total_and_rate("--resume", *file(total_timesteps=8, learning_rate=0.4)) == (64, 0.3)
    assert total_and_rate("--resume", "--total-timesteps", "96") == (96, 0.3)


# ---- what --resume may change --------------------------------------------------------------------


def test_a_resume_goes_on_in_the_folder_of_its_checkpoint(folder):
    config, resume, _ = walker.parse_training(["--out", "run", "--resume"])
    assert resume == folder / LAST
    assert config == tiny("run", eval_every=2 * BATCH)
    for place in ("run", LAST, f"run/{core.BEST}"):
        config, resume, _ = walker.parse_training(["--resume", place])
        assert config.out == str(folder / "run")
        assert resume.name == ("best.pt" if "best" in place else "last.pt")


@pytest.mark.parametrize("name", FIELDS)
def test_a_resume_may_change_only_what_the_learner_does_not_see(name, folder, monkeypatch):
    monkeypatch.setattr(core, "resolve_device", lambda name: torch.device("cpu"))
    config = dataclasses.replace(tiny("run", eval_every=2 * BATCH), **{name: another(name)})
    if name in RESUMABLE:
        assert core.resume_learner(config, LAST).counters.step == 4 * BATCH
        return
    with pytest.raises(core.UserError) as caught:
        core.resume_learner(config, LAST)
    assert str(caught.value).startswith(f"--{name.replace('_', '-')} is {another(name)!r}, ")
    for part in (LAST, repr(getattr(tiny(), name))):
        assert part in str(caught.value)


def test_a_resume_uses_what_was_typed_and_keeps_it(folder):
    typed = ["--total-timesteps", str(6 * BATCH), "--eval-episodes", "3", "--eval-every", "0"]
    assert walker.main(["--out", "run", "--resume", "--gamma", "0.99", *typed]) == 0
    settings = json.loads((folder / "run" / core.CONFIG_JSON).read_text())
    assert (settings["total_timesteps"], settings["eval_episodes"]) == (6 * BATCH, 3)
    assert [int(row["step"]) for row in rows(folder / "run")] == [BATCH * i for i in range(1, 7)]
    assert [bool(row["eval_episodes"]) for row in rows(folder / "run")] == 2 * [False, True] + 2 * [
        False
    ]


# ---- what is refused: one case of each kind of mistake -------------------------------------------

NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
TRAINING = " ".join(flags("new"))
WRONG = [  # a command, and what its message names; TRAINING is cheap, if it is not refused
    (f"{TRAINING} --gama 0.9", "--gama", "--help"),
    (f"{TRAINING} --learning-rat=0.1", "--learning-rat", "--help"),
    (f"{TRAINING} --env", "--env"),
    (f"{TRAINING} --gamma 0.9 0.8", "0.8"),
    (f"{TRAINING} --no-norm-obs=1", "--no-norm-obs", "'1'"),
    ("evalute x.pt", "evalute"),
    (f"{TRAINING} --num-envs many", "--num-envs", "'many'", "'many'"),
    (f"{TRAINING} --gamma 1.1", "--gamma", "'1.1'", "1"),
    (f"{TRAINING} --minibatch-size 33", "--minibatch-size", "33", "= 32"),
    (f"{TRAINING} --entropy-coef 0.006 0 5", "--entropy-coef", "'5'", "START END FROM TO"),
    (f"{TRAINING} --action-cost 1 --env CartPole-v1 --env-kwargs", "--action-cost", "CartPole-v1"),
    (f"{TRAINING} --device tpu", "--device", "'tpu'", "'auto', 'cpu', 'cuda' or 'mps'"),
    pytest.param((f"{TRAINING} --device cuda", "--device cuda", "--device cpu"), marks=NO_CUDA),
    (f"{TRAINING} --env Nosuch-v0", "--env Nosuch-v0"),
    (f"{TRAINING} --env nosuchmodule:Thing-v0", "--env nosuchmodule:Thing-v0", "nosuchmodule"),
    (f"{TRAINING} --env Toy/TextAction-v0 --env-kwargs", "--env Toy/TextAction-v0", "actions"),
    (f"{TRAINING} --env-kwargs gravity=1", "--env Pendulum-v1", "'gravity'"),
    (f"{TRAINING} --config nosuch.json", "nosuch.json"),
    (f"{TRAINING} --config broken.json", "broken.json"),
    (f"{TRAINING} --config array.json", "array.json"),
    (f"{TRAINING} --config typo.json", "typo.json", "--gama"),
    (f"{TRAINING} --out afile/below", "--out"),
    (f"{TRAINING} --out run", "run/checkpoints_walker", "--resume", "--out", "--overwrite"),
    (f"{TRAINING} --out run --resume --overwrite", "--resume", "--overwrite"),
    ("--resume nosuch.pt", "nosuch.pt"),
    ("--resume half.pt", "half.pt", "no checkpoint"),
    (f"--resume {LAST} --gamma 0.5", "--gamma is 0.5", LAST, "0.99"),
    (f"--resume {LAST} --out other", "other/checkpoints_walker", "--out"),
    (f"{TRAINING} --out run --overwrite --init-from foreign.pt", "foreign.pt"),
    (f"{TRAINING} --out run --overwrite --init-from {LAST} --actor-hidden 5", LAST, "not fit"),
    ("evaluate", "FILE"),
    ("evaluate nosuch.pt", "nosuch.pt"),
    (f"evaluate {LAST} --episode 3", "--episode", "--help"),
    (f"evaluate {LAST} --episodes 0", "--episodes", "'0'", "1"),
    (f"evaluate {LAST} --seconds nan", "--seconds", "'nan'", "finite"),
    (f"evaluate {LAST} --env MountainCarContinuous-v0", LAST, "not fit"),
]


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case[0].removeprefix(TRAINING))
def test_a_wrong_command_is_one_line_and_code_2_and_touches_nothing(case, folder, capsys, recwarn):
    command, *parts = case
    shutil.copytree("run", "other")
    about = Path("other", core.CONFIG_JSON)
    about.write_text(about.read_text().replace('"run": "', '"run": "another'))
    before = tree(folder)
    assert walker.main(command.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("walker.py: ")
    assert printed.err.endswith("\n")
    assert printed.err[:-1].isprintable()  # one line, no control characters
    assert [part for part in parts if part not in printed.err] == [], printed.err
    assert warned(recwarn) == []  # more lines on standard error
    assert tree(folder) == before


@pytest.mark.parametrize("typed", ["", "--resume", "--overwrite"])
def test_a_second_run_in_a_folder_is_one_line_and_changes_nothing(typed, folder, capsys):
    lock = core.FileLock("run/checkpoints_walker/.lock")  # as a run that is going on
    lock.acquire()
    before = tree(folder)
    assert walker.main([*flags("run"), *typed.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "run/checkpoints_walker" in error
    assert ("is in use" in error) == (typed != "")
    assert tree(folder) == before
    lock.release()
    assert walker.main([*flags("run"), "--resume"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("typed", ["--gama 0.9", "--config afile", "--out b\udcff --device tpu"])
def test_a_wrong_command_is_one_line_of_a_process_too(typed, folder):
    command = [sys.executable, walker.__file__, *flags("new"), *typed.split()]
    done = subprocess.run(command, capture_output=True, timeout=100)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"walker.py: ")
    assert done.stderr.count(b"\n") == 1


# ---- evaluate ------------------------------------------------------------------------------------


def evaluate(capsys, *words: str) -> list[str]:
    """The lines that `evaluate` prints about the run's last.pt."""
    assert walker.main(["evaluate", LAST, *words]) == 0
    return capsys.readouterr().out.splitlines()


def test_evaluate_prints_the_numbers_of_its_episodes_and_writes_nothing(folder, capsys):
    before = tree(folder)
    five = ("--episodes", "5", "--seed", "3")
    line = evaluate(capsys, *five)[-1]
    assert evaluate(capsys, *five)[-1] == line
    assert evaluate(capsys, *five[:-1], "4")[-1] != line

    learner = core.load_learner(LAST, device="cpu")
    seeds = core.env_seeds(3, core.TEST, 5)
    returns, lengths = evaluate_here(learner.act, learner.config, seeds)
    expected = [returns.mean(), returns.std(), 5, returns.min(), returns.max(), lengths.mean()]
    assert np.array_equal(
        core.evaluate_policy(learner.act, learner.config, seeds), (returns, lengths)
    )
    text = "return {:.1f} ± {:.1f} over {} episodes (min {:.1f}, max {:.1f}), length {:.0f}"
    assert line == text.format(*expected)
    rounded = [float(number) for number in RESULT.fullmatch(line).groups()]
    assert rounded == pytest.approx(expected, abs=0.051)
    assert returns.std() > 1
    assert tree(folder) == before


def test_evaluate_goes_to_another_environment_without_the_first_ones_arguments(folder, capsys):
    pendulum = "gymnasium.envs.classic_control:PendulumEnv"
    gym.register("ShortPendulum-v0", pendulum, max_episode_steps=7)
    try:
        shorter = evaluate(capsys, "--episodes", "2", "--env", "ShortPendulum-v0")
    finally:
        del gym.registry["ShortPendulum-v0"]
    assert shorter[-1].endswith(", length 7")
    assert evaluate(capsys, "--episodes", "2", "--env", "Pendulum-v1")[-1].endswith("length 10")


def test_evaluate_films_an_episode_and_writes_its_data(folder, capsys):
    before = tree(folder)
    evaluate(capsys, "--episodes", "2", "--record", "--out", "films")
    new = {f"films/videos/last.{suffix}" for suffix in ("mp4", "gif", "npz")}
    assert set(tree(folder)) - set(before) == {"films", "films/videos"} | new
    film = imageio.imread("films/videos/last.mp4")
    assert film.shape == (10, 500, 500, 3)  # what each step led to
    assert np.ptp(film) > 100

    learner = core.load_learner(LAST, device="cpu")
    seeds = core.env_seeds(0, core.TEST, 1)
    returns, _ = evaluate_here(learner.act, learner.config, seeds)
    with np.load("films/videos/last.npz") as data:
        obs = data["observations"]
        assert obs.shape == (10, 3)
        np.testing.assert_allclose(data["actions"], learner.act(obs), rtol=1e-5)
        np.testing.assert_allclose(data["values"], learner.value(obs), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(data["next_values"][:-1], data["values"][1:], atol=1e-5)
        np.testing.assert_allclose(data["rewards"].sum(), returns[0])
        scale = math.sqrt(learner.reward_normalizer.var + 1e-8)
        assert scale != pytest.approx(1)
        np.testing.assert_allclose(data["learned_rewards"], data["rewards"] / scale, rtol=1e-5)
        assert (data["dt"], data["gamma"]) == (1 / 30, 0.99)
        assert "hull" not in data  # which is a BipedalWalker's


def test_the_data_of_episodes_tells_what_would_be_learned_from_them_at_this_point(tmp_path):
    moving = {"action_cost": (0.0, 1.0), "failure_cost": (1.0, 9.0, -100.0, 100.0)}
    moving["clip_reward"] = (-10.0, 1.25)
    learner = core.Learner(tiny(env="Toy/Falls-v0", env_kwargs=(), total_timesteps=1000, **moving))
    learner.counters.step, learner.counters.training_return = 500, 0.0
    learner.reward_normalizer.var.fill_(4)
    steps = [step for _, step in core.play(learner.act, learner.config, [1, 2])]
    core.write_episode_data(learner, steps, tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as data:
        paid = data["rewards"] * np.where(data["terminated"], 3, 1)
        expected = np.minimum((paid - 0.5 * np.abs(data["actions"][:, 0])) / 2, 1.25)
        np.testing.assert_allclose(data["learned_rewards"], expected, rtol=1e-6)
        assert expected.min() < 0.6 < expected.max() == 1.25
        assert np.array_equal(data["failed"], data["terminated"])
        assert data["failed"].sum() == 2


def test_a_film_that_cannot_be_written_is_one_line_that_names_it(folder, capsys):
    before = tree(folder)
    assert walker.main(["evaluate", LAST, "--episodes", "1", "--record", "--out", "afile"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "afile/videos/last.mp4" in printed.err
    assert tree(folder) == before


@pytest.mark.slow
def test_a_film_is_no_longer_than_its_seconds(folder, capsys):
    evaluate(capsys, "--episodes", "1", "--record", "--seconds", "0.1")
    assert len(imageio.imread("run/videos/last.mp4")) == 3  # in the folder of its run


def test_evaluate_shows_episodes_in_a_window_for_so_many_seconds(folder, capsys, monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    modes, classic = [], "gymnasium.envs.classic_control.PendulumEnv.render"
    monkeypatch.setattr(classic, lambda env: modes.append(env.render_mode))
    _, line = evaluate(capsys, "--episodes", "2", "--render", "--seconds", "0.1")
    assert set(modes) == {"human"}
    assert len(modes) >= 3
    assert RESULT.fullmatch(line)


def test_evaluate_compares_values_with_returns_in_a_picture_and_three_numbers(folder, capsys):
    before = set(tree(folder))
    lines = evaluate(capsys, "--episodes", "12", "--analyze-value", "--out", "values")
    numbers = r"explained variance -?\d\.\d{3}, bias [+-]\d+\.\d{3}, RMSE \d+\.\d{3}"
    assert re.search(numbers + "$", lines[-3])
    new = {f"values/plots/last_value.{suffix}" for suffix in ("png", "npz")}
    assert set(tree(folder)) - before == {"values", "values/plots"} | new
    with np.load("values/plots/last_value.npz") as data:
        assert np.bincount(data["episode"]).tolist() == [10] * 10
