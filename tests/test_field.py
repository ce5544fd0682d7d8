"""Environments of other people: spaces of any kind, and ones that misbehave. All are trained, or
are one line.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import re
from pathlib import Path
from typing import Any

import field_envs
import numpy as np
import pytest
from helpers import BATCH, evaluate_here, flags, rows, tiny, train_without_pictures, without_clock

import viz
import walker
import walker_core as core

slow = pytest.mark.slow
no_pictures = pytest.mark.usefixtures("no_pictures")

SEEDS = core.env_seeds(1, core.TRAIN, 2)  # of the two environments of the runs below
POINT = "Field/Point-v0"
FILM = Path(core.FILM)


def typed(out: Path | str, env: str, *kwargs: str, **changes: Any) -> list[str]:
    """A run of four iterations of two environments and 16 steps each."""
    return flags(out, env=f"Field/{env}-v0", env_kwargs=kwargs, **changes)


def evaluate(out: Path | str, *more: str) -> int:
    return walker.main(["evaluate", str(Path(out, core.LAST)), *more])


def one_line(capfd) -> str:
    """All that is on standard error: one line of this program."""
    error = capfd.readouterr().err
    assert error.startswith("walker.py: "), error
    assert error.count("\n") == 1, error
    return error.removeprefix("walker.py: ")


def steps_of(out: Path) -> list[int]:
    return [int(row["step"]) for row in rows(out)]


def returns_of(out: Path, seeds: list[int]) -> list[float]:
    """Of the last policy of a run, in this process."""
    learner = core.load_learner(out / core.LAST, device="cpu")
    return evaluate_here(learner.act, learner.config, seeds)[0].tolist()


@pytest.fixture
def quick_curves(monkeypatch):
    """Curves take half a second: here only an empty file."""

    def plot(_, png):
        png.parent.mkdir()
        png.touch()

    monkeypatch.setattr(viz, "plot_training_curves", plot)


@pytest.fixture(scope="module")
def point(tmp_path_factory) -> Path:
    """A run of `Point`."""
    out = tmp_path_factory.mktemp("point")
    train_without_pictures(tiny(out, env=POINT, env_kwargs=()))
    return out


# ---- spaces --------------------------------------------------------------------------------------

TOO_LARGE = {"20001": 20_001, "DictOf20200": 20_200}
OBSERVATIONS = [f"{name}Obs" for name in field_envs.OBSERVATIONS if name not in TOO_LARGE]
ACTIONS = [f"{name}Action" for name in field_envs.ACTIONS]


@no_pictures
@pytest.mark.parametrize("env", OBSERVATIONS + ACTIONS)
def test_spaces_of_any_kind_train_evaluate_and_resume(env, tmp_path, capsys):
    """The environment asserts that actions are of its space; a large std gets them to its ends."""
    std = {"init_std": 3.0} if env.endswith("Action") else {}
    assert walker.main(typed(tmp_path, env, **std)) == 0
    more = ["--total-timesteps", str(5 * BATCH)]
    assert walker.main(["--resume", "--out", str(tmp_path), *more]) == 0
    assert steps_of(tmp_path) == [BATCH, 2 * BATCH, 3 * BATCH, 4 * BATCH, 5 * BATCH]
    assert evaluate(tmp_path, "--episodes", "2") == 0
    assert "over 2 episodes" in capsys.readouterr().out.splitlines()[-1]


@no_pictures
@pytest.mark.parametrize(("name", "size"), TOO_LARGE.items())
def test_more_than_20000_numbers_are_refused_with_their_number(name, size, tmp_path, capfd):
    assert walker.main(typed(tmp_path / "new", f"{name}Obs")) == 2
    assert str(size) in re.sub(r"(?<=\d)[,_](?=\d)", "", one_line(capfd).replace(name, ""))
    assert not (tmp_path / "new").exists()


def noted_pushes(kind: type, monkeypatch) -> list[np.ndarray]:
    """All actions that environments of this kind are given from now on."""
    actions, push = [], kind.push

    def noted(env, action):
        actions.append(np.array(action))
        return push(env, action)

    monkeypatch.setattr(kind, "push", noted)
    return actions


@pytest.mark.parametrize(
    ("env", "kind", "middle", "tolerance"),
    [
        ("Pixels", field_envs.Pixels, 256, 20),
        ("PixelsAction", field_envs.Takes, 256, 20),
        ("FarAction", field_envs.Takes, 150, 4),
        ("DoubleAction", field_envs.Takes, 0.4, 0.03),
    ],
)
def test_a_fresh_policy_acts_around_the_middle_of_the_bounds(
    env, kind, middle, tolerance, monkeypatch
):
    config = core.Config(env=f"Field/{env}-v0", device="cpu")
    actions = noted_pushes(kind, monkeypatch)
    steps = list(core.play(core.Learner(config).act, config, [1, 2, 3]))
    assert len(actions) == len(steps) >= 15
    np.testing.assert_allclose(actions, np.full_like(actions, middle), rtol=0, atol=tolerance)


@no_pictures
def test_the_actions_of_a_fresh_policy_spread_over_the_bounds(tmp_path, monkeypatch):
    pixels = noted_pushes(field_envs.Pixels, monkeypatch)
    settings = {"total_timesteps": 200, "rollout_steps": 100, "init_std": 1.0}
    assert walker.main(typed(tmp_path, "Pixels", **settings)) == 0
    assert len(pixels) > 150
    assert np.min(pixels) == 0  # a third of the normal distribution lies beyond ±1
    assert np.max(pixels) == 512
    assert 150 < np.std(pixels) < 230  # 184 where N(0, 1) is clipped to ±1 and mapped


def learn(
    env: str, out: Path, timesteps: int, init_std: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Returns and lengths of 20 episodes of a policy that was trained for a while."""
    settings = {"num_envs": 8, "rollout_steps": 32, "minibatch_size": 64, "learning_rate": 3e-3}
    settings |= {
        "eval_every": 0,
        "device": "cpu",
        "total_timesteps": timesteps,
        "init_std": init_std,
    }
    train_without_pictures(core.Config(env=f"Field/{env}-v0", out=str(out), **settings))
    learner = core.load_learner(out / core.LAST, device="cpu")
    seeds = core.env_seeds(1, core.TEST, 20)
    return evaluate_here(learner.act, learner.config, seeds)


@slow
def test_actions_with_wide_bounds_are_learned(tmp_path):
    # with a std of 1 the best mean is far beyond the bound: what is clipped there varies least
    returns, lengths = learn("Pixels", tmp_path, 8192, init_std=0.5)
    middle = -lengths.mean() * (128 / 512) ** 2  # always 256
    assert returns.mean() > middle / 4


@slow
def test_several_discrete_actions_are_learned_from_several_observations(tmp_path):
    returns, _ = learn("Levers", tmp_path, 6144)
    assert returns.mean() > 11  # of 12; 5 by chance


@slow
def test_which_layer_of_a_map_is_lit_is_learned(tmp_path):
    returns, _ = learn("Layers", tmp_path, 3072)
    assert returns.mean() > 18  # of 20; 10 by chance


# ---- images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 40, 2), (84, 84, 4), (50, 60, 1)])
def test_layers_that_are_no_colors_stay_as_they_are(shape):
    env = core.make_env(core.Config(env="Field/Picture-v0", env_kwargs=(f"shape={shape}",)))
    height, width, layers = shape
    assert env.observation_space.shape == (layers, height, width)
    assert env.observation_space.dtype == np.uint8
    observations = [env.reset(seed=1)[0]]
    pictures = [env.unwrapped.seen]
    for _ in range(3):
        observations.append(env.step(1)[0])
        pictures.append(env.unwrapped.seen)
    for obs, picture in zip(observations, pictures, strict=True):
        assert obs.dtype == np.uint8
        np.testing.assert_array_equal(obs, np.moveaxis(picture, -1, 0))


def test_colors_are_gray_at_half_their_size_four_in_a_row():
    env = core.make_env(core.Config(env="Field/Picture-v0", env_kwargs=("shape=(60, 50, 3)",)))
    assert env.observation_space.shape == env.reset(seed=1)[0].shape == (4, 30, 25)


@no_pictures
@pytest.mark.parametrize(
    "shape",
    [(40, 40, 2), pytest.param((84, 84, 4), marks=slow), pytest.param((60, 50, 3), marks=slow)],
)
def test_pictures_train_evaluate_and_resume(shape, tmp_path, capsys):
    assert walker.main(typed(tmp_path, "Picture", f"shape={shape}")) == 0
    more = ["--total-timesteps", str(5 * BATCH)]
    assert walker.main(["--resume", "--out", str(tmp_path), *more]) == 0
    assert len(rows(tmp_path)) == 5
    assert evaluate(tmp_path, "--episodes", "2") == 0
    assert "over 2 episodes" in capsys.readouterr().out.splitlines()[-1]


# ---- steps and resets ----------------------------------------------------------------------------


@no_pictures
@pytest.mark.parametrize(
    "env", ["Reward1", "InfoWord", "InfoRagged", "InfoNone", "Close", "OneArray", "InPlace"]
)
def test_oddities_that_change_nothing_have_no_effect(env, point, tmp_path, capsys):
    assert walker.main(typed(tmp_path, env)) == 0
    assert without_clock(rows(tmp_path)) == without_clock(rows(point))
    seeds = core.env_seeds(1, core.TEST, 3)
    assert returns_of(tmp_path, seeds) == returns_of(point, seeds)
    capsys.readouterr()
    lines = set()
    for out in (point, tmp_path):
        assert evaluate(out, "--episodes", "3") == 0
        lines.add(capsys.readouterr().out.splitlines()[-1])
    assert len(lines) == 1


def half(obs: np.ndarray) -> np.ndarray:
    return np.full((len(obs), 1), 0.5, np.float32)


def test_what_is_recorded_of_a_step_stays_as_it_was():
    """With an array that is returned again, an action that is changed, and a reward of (1,)."""
    expected = [step for _, step in core.play(half, core.Config(env=POINT), [3])]
    assert len(expected) >= 5
    for name in ("OneArray", "InPlace", "Reward1"):
        steps = [step for _, step in core.play(half, core.Config(env=f"Field/{name}-v0"), [3])]
        for step in steps:
            assert float(step["next_observations"][0]) != float(step["observations"][0])
        for part in ("observations", "actions", "rewards", "next_observations"):
            found, right = ([np.asarray(s[part]) for s in each] for each in (steps, expected))
            np.testing.assert_array_equal(np.stack(found), np.stack(right), err_msg=name)


@no_pictures
def test_a_reset_gets_no_options(tmp_path, monkeypatch):
    """Not even that which restarts an environment at a random length, once."""
    lengths, reset = [], field_envs.Options.reset

    def noted(env, **kwargs):
        lengths.append(getattr(env, "k", None))
        return reset(env, **kwargs)

    monkeypatch.setattr(field_envs.Options, "reset", noted)
    assert walker.main(typed(tmp_path, "Options")) == 0
    assert len(rows(tmp_path)) == 4
    assert lengths[:2] == [None, None]
    assert any(length < 40 for length in lengths[2:])  # the limit is 40


WRONG = ["Reward2", "FourValues", "ShapeRow", "ShapeLonger"]
AT_20 = (f"of={SEEDS[1]}", "at=20")  # the second environment, in the second rollout


def check_failure(out: Path, error: str) -> None:
    """The environment is named, and what there was before the fault is there."""
    assert f"environment 1, first reset with seed {SEEDS[1]}: " in error
    assert steps_of(out) == [BATCH]
    assert core.load_checkpoint(out / core.LAST)["counters"]["step"] in (0, BATCH)
    assert multiprocessing.active_children() == []


@no_pictures
@pytest.mark.parametrize("env", [*WRONG, "ExitStep", "ExitReset"])
def test_what_goes_wrong_in_an_environment_is_one_line_that_names_it(env, tmp_path, capfd):
    assert walker.main(typed(tmp_path, env, *AT_20)) == 1
    check_failure(tmp_path, one_line(capfd))


def test_the_curves_are_drawn_when_an_environment_fails(tmp_path, capfd):
    assert walker.main(typed(tmp_path, "Reward2", *AT_20)) == 1
    check_failure(tmp_path, one_line(capfd))
    assert (tmp_path / core.CURVES).read_bytes().startswith(b"\x89PNG")


@no_pictures
@pytest.mark.parametrize("env", WRONG)
def test_what_is_wrong_from_the_first_step_on_is_one_line_too(env, tmp_path, capfd):
    assert walker.main(typed(tmp_path, env)) == 1
    assert f"environment 0, first reset with seed {SEEDS[0]}: " in one_line(capfd)
    assert core.load_checkpoint(tmp_path / core.LAST)["counters"]["step"] == 0


@pytest.mark.parametrize("env", [*WRONG, "ExitStep", "ExitFirstReset"])
def test_what_goes_wrong_in_an_evaluation_is_one_line(env, point, capfd):
    [seed] = core.env_seeds(0, core.TEST, 1)
    assert evaluate(point, "--env", f"Field/{env}-v0", "--episodes", "1") == 1
    output = capfd.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert output.err.startswith(f"walker.py: environment, first reset with seed {seed}: ")


@no_pictures
@pytest.mark.parametrize("env", ["ExitStep", "Reward2", "ShapeRow"])
def test_what_goes_wrong_in_an_evaluation_during_training_is_one_line(env, tmp_path, capfd):
    [seed] = core.env_seeds(1, core.EVALUATE, 1)
    kwargs = f"of={seed}", "at=3"
    settings = {"eval_every": 2 * BATCH, "eval_episodes": 1}
    assert walker.main(typed(tmp_path, env, *kwargs, **settings)) == 1
    assert f"environment, first reset with seed {seed}: " in one_line(capfd)
    assert core.load_checkpoint(tmp_path / core.LAST)["counters"]["step"] in (0, BATCH, 2 * BATCH)


@no_pictures
def test_closing_that_fails_has_no_effect_on_an_evaluation(point, capfd):
    for env in ("Point", "Close"):
        assert evaluate(point, "--env", f"Field/{env}-v0", "--episodes", "2") == 0
    output = capfd.readouterr()
    assert len(set(output.out.splitlines()[1::2])) == 1  # the last lines
    assert output.err == ""


def in_scratch(tmp_path: Path, monkeypatch) -> str:
    """Stand in tmp_path; an argument of `Chdir` for a folder elsewhere."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scratch").mkdir()
    return f"folder={str(tmp_path / 'scratch')!r}"


@no_pictures
def test_an_environment_that_changes_the_folder_leaves_files_in_theirs(tmp_path, monkeypatch):
    folder = in_scratch(tmp_path, monkeypatch)
    settings = {"eval_every": 2 * BATCH, "checkpoint_every": BATCH}
    assert walker.main(typed("run", "Chdir", folder, **settings)) == 0
    run = tmp_path / "run"
    names = {path.name for path in (run / "checkpoints_walker").iterdir()}
    assert {"best.pt", "last.pt", "step_128.pt", "metrics.csv", "config.json"} <= names
    assert core.load_checkpoint(run / core.LAST)["counters"]["step"] == 4 * BATCH
    assert len(rows(run)) == 4
    assert list((tmp_path / "scratch").iterdir()) == []


@slow
def test_an_environment_that_changes_the_folder_leaves_pictures_in_theirs(tmp_path, monkeypatch):
    folder = in_scratch(tmp_path, monkeypatch)
    assert walker.main(typed("run", "Chdir", folder, record_every=2 * BATCH)) == 0
    run = tmp_path / "run"
    assert (run / core.CURVES).stat().st_size > 10_000
    stems = "step_64", "step_128", "walker_final"
    assert {path.name for path in (run / "videos").iterdir()} == {
        f"{stem}.{kind}" for stem in stems for kind in ("mp4", "gif")
    }
    monkeypatch.chdir(tmp_path)  # the first run has left this folder
    assert evaluate("run", "--record", "--out", "film", "--episodes", "1") == 0
    assert {path.name for path in (tmp_path / "film/videos").iterdir()} >= {"last.mp4", "last.gif"}
    monkeypatch.chdir(tmp_path)
    assert evaluate("run", "--analyze-value", "--out", "film", "--episodes", "1") == 0
    assert (tmp_path / "film/plots/last_value.png").exists()
    assert list((tmp_path / "scratch").iterdir()) == []


# ---- endless episodes ----------------------------------------------------------------------------


@no_pictures
def test_episodes_that_do_not_end_are_cut_at_the_limit(tmp_path, capsys):
    settings = {"max_episode_steps": 50, "total_timesteps": 8 * BATCH, "eval_every": 8 * BATCH}
    assert walker.main(typed(tmp_path, "Endless", **settings)) == 0
    ended = [row for row in rows(tmp_path) if int(row["episodes"])]
    assert {row["length_max"] for row in ended} == {row["length_min"] for row in ended} == {"50"}
    assert evaluate(tmp_path, "--episodes", "2") == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("length 50")


@no_pictures
@pytest.mark.parametrize("limit", [5, 50])
def test_an_environment_keeps_its_own_limit(limit, tmp_path, capsys):
    assert walker.main(typed(tmp_path, "Limited", max_episode_steps=limit)) == 0
    lengths = [row["length_max"] for row in rows(tmp_path) if int(row["episodes"])]
    assert set(lengths) == {"10"}
    assert evaluate(tmp_path, "--episodes", "2") == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("length 10")


@no_pictures
def test_a_limit_among_the_arguments_of_an_environment_is_kept(tmp_path, capsys):
    kwargs = ("max_episode_steps=10",)
    assert walker.main(typed(tmp_path, "Endless", *kwargs, max_episode_steps=50)) == 0
    assert evaluate(tmp_path, "--episodes", "2") == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("length 10")


def test_without_a_limit_an_episode_has_at_most_10000_steps():
    endless = core.play(half, core.Config(env="Field/Endless-v0"), [1])
    length = sum(1 for _ in zip(range(20_000), endless, strict=False))
    assert length == 10_000


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many"])
def test_a_wrong_limit_is_refused(value, tmp_path, capfd):
    assert walker.main([*typed(tmp_path / "new", "Endless"), "--max-episode-steps", value]) == 2
    assert one_line(capfd).startswith("--max-episode-steps ")
    assert not (tmp_path / "new").exists()


# ---- random numbers ------------------------------------------------------------------------------

DRAWN = pytest.mark.parametrize("env", ["Legacy", "Dice", "Samples", "SamplesActions"])


def starts_of(env: str, tmp_path: Path, name: str, **settings: Any) -> list[str]:
    """Where the episodes of four environments began, in their order."""
    folder = tmp_path / name
    folder.mkdir()
    settings |= {"num_envs": 4, "total_timesteps": 2 * BATCH, "rollout_steps": BATCH // 4}
    assert (
        walker.main(typed(tmp_path / f"run of {name}", env, f"folder={str(folder)!r}", **settings))
        == 0
    )
    return [path.read_text() for path in sorted(folder.iterdir())]


@no_pictures
@DRAWN
def test_each_environment_begins_elsewhere_and_again_so_in_the_next_run(env, tmp_path):
    one, two = (starts_of(env, tmp_path, name) for name in ("one", "two"))
    assert len(one) >= 4
    assert len(set(one)) == len(one)
    assert one == two


@DRAWN
def test_an_evaluation_with_the_same_seed_is_the_same(env, point, capsys):
    more = "--env", f"Field/{env}-v0", "--episodes", "3", "--seed"
    for seed in ("0", "0", "1"):
        random.seed()  # as in a new process
        np.random.seed()
        assert evaluate(point, *more, seed) == 0
    first, second, other = capsys.readouterr().out.splitlines()[1::2]  # the last lines
    assert first == second != other


@DRAWN
def test_an_episode_does_not_depend_on_those_before_it(env):
    config, seeds = core.Config(env=f"Field/{env}-v0"), core.env_seeds(0, core.TEST, 3)
    returns, _ = evaluate_here(half, config, seeds)
    alone = [evaluate_here(half, config, [seed])[0][0] for seed in seeds]
    assert returns.tolist() == alone
    assert len(set(alone)) == 3


@slow
@DRAWN
def test_the_mean_of_an_evaluation_is_that_of_its_episodes(env, point, capsys):
    """However many processes play them."""
    seeds = core.env_seeds(0, core.TEST, 8)
    learner = core.load_learner(point / core.LAST, f"Field/{env}-v0", "cpu")
    expected, _ = evaluate_here(learner.act, learner.config, seeds)
    for episodes in (1, 2, 8):
        returns, _ = core.evaluate_policy(learner.act, learner.config, seeds[:episodes])
        assert returns.tolist() == expected[:episodes].tolist()
        assert evaluate(point, "--env", f"Field/{env}-v0", "--episodes", str(episodes)) == 0
        line = capsys.readouterr().out.splitlines()[-1]
        assert line.startswith(f"return {expected[:episodes].mean():.1f} ± ")


# ---- processes -----------------------------------------------------------------------------------


@no_pictures
def test_an_environment_that_cannot_be_made_for_an_evaluation_is_one_line(point, capfd):
    assert evaluate(point, "--env", "Field/NoLicence-v0", "--episodes", "2") in (1, 2)
    assert "no licence" in one_line(capfd)


@slow
@no_pictures
def test_an_environment_may_have_processes_of_its_own(tmp_path, capfd):
    assert walker.main(typed(tmp_path, "Children", eval_every=2 * BATCH)) == 0
    assert len(rows(tmp_path)) == 4
    assert "Traceback" not in capfd.readouterr().err
    assert multiprocessing.active_children() == []


# ---- films ---------------------------------------------------------------------------------------

NO_FILM = [f"Render{what}" for what in ("Grows", "List", "Channels", "Text", "None", "Raises")]
NO_FILM += ["RenderFloats", "RenderExits"]


@pytest.mark.usefixtures("quick_curves")
@pytest.mark.parametrize("env", NO_FILM)
def test_without_a_film_the_curves_are_drawn_and_the_reason_is_one_line(env, tmp_path, capsys):
    assert walker.main(typed(tmp_path, env)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("no video: ") for line in lines) == 1
    assert [line.split()[0] for line in lines[-3:]] == ["curves:", "filming", "no"]
    assert (tmp_path / core.CURVES).exists()
    assert list((tmp_path / "videos").iterdir()) == []


@pytest.mark.usefixtures("quick_curves")
@pytest.mark.parametrize("env", ["RenderGrows", "RenderRaises", "RenderExits"])
def test_a_film_that_fails_on_the_way_does_not_stop_the_run(env, tmp_path, capsys):
    assert walker.main(typed(tmp_path, env, record_every=BATCH)) == 0
    assert len(rows(tmp_path)) == 4
    assert capsys.readouterr().out.count("no video: ") == 5
    assert core.load_checkpoint(tmp_path / core.LAST)["counters"]["step"] == 4 * BATCH


@pytest.mark.parametrize("env", ["RenderGrows", "RenderNone", "RenderRaises", "RenderExits"])
def test_a_film_that_was_asked_for_and_fails_is_an_error_of_one_line(env, point, tmp_path, capfd):
    more = "--env", f"Field/{env}-v0", "--episodes", "1", "--record", "--out", str(tmp_path)
    assert evaluate(point, *more) in (1, 2)
    assert one_line(capfd)
    assert list((tmp_path / "videos").iterdir()) == []


@slow
@pytest.mark.usefixtures("quick_curves")
@pytest.mark.parametrize(
    "env", [f"Fps{what}" for what in ("Numpy", "Text", "None", "0", "Missing")]
)
def test_a_film_is_made_whatever_the_frame_rate_is_said_to_be(env, tmp_path, capsys):
    import imageio

    assert walker.main(typed(tmp_path, env)) == 0
    assert "no video" not in capsys.readouterr().out
    assert (tmp_path / FILM.with_suffix(".gif")).stat().st_size > 0
    with imageio.get_reader(tmp_path / FILM) as film:
        assert film.get_meta_data()["fps"] == 30
        assert 5 <= film.count_frames() <= 20


@slow
@pytest.mark.parametrize("env", ["Legged", "LeggedMore"])
def test_legs_alone_make_no_bipedal_walker(env, point, tmp_path, capfd):
    more = "--env", f"Field/{env}-v0", "--episodes", "1", "--record", "--out", str(tmp_path)
    assert evaluate(point, *more) == 0
    output = capfd.readouterr()
    assert output.err == ""
    assert output.out.splitlines()[-1].startswith("return ")
    assert {path.name for path in (tmp_path / "videos").iterdir()} >= {"last.mp4", "last.gif"}
    assert not list(tmp_path.glob("plots/*"))


@slow
def test_a_folder_may_have_a_colon_in_its_name(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert walker.main(typed("12:30", "Point", record_every=2 * BATCH)) == 0
    assert "no video" not in capfd.readouterr().out
    names = os.listdir("12:30/videos")
    assert {"step_64.mp4", "step_64.gif", "walker_final.mp4", "walker_final.gif"} <= {*names}
    assert Path("12:30", core.CURVES).exists()
    assert evaluate("12:30", "--episodes", "1", "--record", "--out", "1:2") == 0
    assert {"last.mp4", "last.gif"} <= {*os.listdir("1:2/videos")}
