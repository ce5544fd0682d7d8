"""Claims about `viz.py`: what it reads, which numbers it draws, what it writes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest

import viz

HEADER = (
    "step,iteration,wall_s,steps_per_s,collect_s,update_s,eval_s,episodes,return_mean,return_min,"
    "return_max,length_mean,length_min,length_max,eval_return_mean,eval_return_std,eval_episodes,"
    "policy_loss,value_loss,entropy,approx_kl,clip_fraction,explained_variance,action_std,"
    "grad_norm,learning_rate"
).split(",")
CURVES_SHAPE, COMPARISON_SHAPE = (1376, 1760), (832, 1760)  # height, width in pixels


def row(i, **cells):
    """One iteration of a run that improves; `cells` replaces values, None makes a cell empty."""
    values = dict.fromkeys(HEADER, 0.1) | {
        "step": 4096 * i, "iteration": i, "wall_s": 60.0 * i, "steps_per_s": 4000,
        "collect_s": 30, "update_s": 15, "eval_s": None, "episodes": 2,
        "return_mean": i - 100, "return_min": i - 150, "return_max": i - 50,
        "length_mean": 500, "length_min": 90, "length_max": 1600,
        "eval_return_mean": None, "eval_return_std": None, "eval_episodes": None,
    }  # fmt: skip
    if i % 5 == 0:  # an evaluation is due
        values |= {"eval_return_mean": 8 * i, "eval_return_std": 3, "eval_s": 10}
    return values | cells


def write_run(path, rows, config=None):
    """Write a metrics file and, if given, the config beside it; returns the metrics file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [["" if one[name] is None else str(one[name]) for name in HEADER] for one in rows]
    path.write_text("".join(",".join(line) + "\n" for line in [HEADER, *cells]))
    if config is not None:
        name = path.name.removesuffix("metrics.csv") + "config.json"
        path.with_name(name).write_text(json.dumps(config))
    return path


@pytest.fixture
def figures(monkeypatch):
    """The figures that would be saved, so that a test can ask what they show."""
    kept = []
    monkeypatch.setattr(viz, "_save", lambda figure, axes, title, png: kept.append(figure))
    return kept


def line(axes, label):
    return next(one for one in axes.get_lines() if str(one.get_label()).startswith(label))


def labels(axes):
    return [one.get_label() for one in axes.get_lines() if one.get_label()[0] != "_"]


# ----------------------------------------------------------------------------------------- reading


def test_cells_are_float64_and_an_empty_cell_is_nan(tmp_path):
    path = write_run(tmp_path / "metrics.csv", [row(4), row(5)])
    metrics = viz.read_metrics(path)
    assert list(metrics) == HEADER
    assert all(column.dtype == np.float64 for column in metrics.values())
    np.testing.assert_array_equal(metrics["step"], [4 * 4096, 5 * 4096])
    np.testing.assert_array_equal(metrics["eval_return_mean"], [np.nan, 40])


def test_a_torn_last_line_is_skipped_wherever_it_is_cut(tmp_path):
    path = write_run(tmp_path / "metrics.csv", [row(1), row(2), row(3)])
    text = path.read_text()
    whole = text.rindex("\n", 0, -1) + 1  # where the last line begins
    for end in range(whole, len(text)):
        path.write_text(text[:end])
        assert viz.read_metrics(path)["iteration"].tolist() == [1, 2], text[whole:end]
    path.write_text(text[: whole + 9] + "\n")  # cut, and a resumed run has begun a new line
    assert viz.read_metrics(path)["iteration"].tolist() == [1, 2]


def test_lines_may_end_as_on_windows_and_a_new_column_may_stand_on_the_right(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"step,wall_s,new\r\n1,2,\r\n3,4,5\r\n")
    metrics = viz.read_metrics(path)
    np.testing.assert_array_equal(metrics["new"], [np.nan, 5])


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "No such file"),
        (b"", "no column 'step'"),
        (b"wall_s,loss\n1,2\n", "no column 'step'"),
        (b"\x89PNG\r\n\x1a\n\x00\xff\xfe", "no column 'step'"),
        (b"step,loss\n1,2\n2,much\n", "line 3: could not convert string to float: 'much'"),
        (b"step,loss\n1\n2,3\n", "line 2: 1 cells under 2 names"),
        (b"step,loss\n1,2,3\n", "line 2: 3 cells under 2 names"),
        (b"step,loss\n2,0\n2,0\n", "'step' must be a number that grows"),
        (b"step,loss\n,0\n2,0\n", "'step' must be a number that grows"),
    ],
)
def test_what_is_no_metrics_file_is_refused_in_one_line_that_names_it(tmp_path, content, what):
    path = tmp_path / "metrics.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"metrics\.csv") as error:
        viz.read_metrics(path)
    assert what in str(error.value)
    assert "\n" not in str(error.value)


def test_each_metrics_file_has_its_own_config_beside_it(tmp_path):
    plain = write_run(tmp_path / "metrics.csv", [], {"seed": 1})
    shipped = write_run(tmp_path / "pretrained_metrics.csv", [], {"seed": 2})
    lonely = write_run(tmp_path / "other_metrics.csv", [])
    assert [viz.read_config(path) for path in (plain, shipped, lonely)] == [
        {"seed": 1},
        {"seed": 2},
        {},
    ]


@pytest.mark.parametrize("content", ["{", "[1]", "null", "3"])
def test_a_config_that_is_no_json_object_is_refused(tmp_path, content):
    path = write_run(tmp_path / "metrics.csv", [])
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json: not a JSON object") as error:
        viz.read_config(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("walk/checkpoints_walker/metrics.csv", "walk"),
        ("walk/metrics.csv", "walk"),
        ("fast_seed11/checkpoints_walker/metrics.csv", "fast"),
        ("fast/seed_11/checkpoints_walker/metrics.csv", "fast"),
        ("walk/checkpoints_walker/pretrained_metrics.csv", "pretrained"),
    ],
)
def test_a_run_is_named_by_its_folder_without_the_seed(tmp_path, path, name):
    assert viz.load_run(write_run(tmp_path / path, [])).name == name


def test_a_bare_number_at_the_end_of_the_name_is_a_seed_only_if_the_config_has_it(tmp_path):
    paths = tmp_path / "lr-11" / "metrics.csv", tmp_path / "lr-12" / "metrics.csv"
    runs = [viz.load_run(write_run(path, [], {"seed": 11})) for path in paths]
    assert [run.name for run in runs] == ["lr", "lr-12"]


# ---------------------------------------------------------------------------------------- numbers


def test_smoothing_is_the_weighted_mean_of_a_centred_window_cut_at_both_ends():
    rng = np.random.default_rng(0)
    values, weights = rng.normal(size=260), rng.integers(0, 4, size=260).astype(float)
    values[rng.random(260) < 0.4] = np.nan
    values[100:110] = np.nan
    expected = []
    for i in range(260):  # 260 rows: two to either side
        pairs = [(values[j], weights[j]) for j in range(max(0, i - 2), min(260, i + 3))]
        pairs = [(value, weight) for value, weight in pairs if not math.isnan(value)]
        total = sum(weight for _, weight in pairs)
        expected.append(sum(v * w for v, w in pairs) / total if total else math.nan)
    np.testing.assert_allclose(viz.smooth(values, weights), expected, atol=1e-12)
    assert math.isnan(viz.smooth(values, weights)[105])


def test_a_short_run_is_not_smoothed():
    values = np.array([1.0, np.nan, -5.0] * 15)
    np.testing.assert_array_equal(viz.smooth(values), values)


def test_every_episode_counts_once_in_the_training_mean_and_the_range_holds_all(tmp_path):
    rows = [
        row(i, episodes=0, return_mean=None, return_min=None, return_max=None) for i in range(120)
    ]
    rows[60] |= {"episodes": 3, "return_mean": 10, "return_min": -40, "return_max": 50}
    rows[61] |= {"episodes": 1, "return_mean": 90, "return_min": 90, "return_max": 90}
    run = viz.load_run(write_run(tmp_path / "metrics.csv", rows))
    mean, low, high = viz.episode_band(run, "return")
    expected = [np.nan, 10, (3 * 10 + 90) / 4, (3 * 10 + 90) / 4, 90, np.nan]
    np.testing.assert_allclose(mean[58:64], expected)
    np.testing.assert_array_equal(low[58:64], [np.nan, -40, -40, -40, 90, np.nan])
    np.testing.assert_array_equal(high[58:64], [np.nan, 50, 90, 90, 90, np.nan])


def test_the_shares_of_time_are_of_the_wall_clock_and_sum_to_one(tmp_path):
    run = viz.load_run(write_run(tmp_path / "metrics.csv", [row(i) for i in range(1, 11)]))
    shares = viz.time_shares(run)  # ten minutes: 300 s, 150 s, 2 × 10 s and what is left
    assert shares == pytest.approx(
        {"collect": 0.5, "update": 0.25, "evaluate": 20 / 600, "the rest": 130 / 600}
    )
    assert viz.time_shares(viz.load_run(write_run(tmp_path / "empty_metrics.csv", []))) == {}


def test_the_title_tells_environment_seed_and_the_best_evaluation(tmp_path):
    best = {"step": 1_204_224, "wall_s": 390, "eval_return_mean": 312.4, "eval_return_std": 1.6}
    rows = [row(5), row(10, **best), row(300, eval_return_mean=290)]
    config = {"env": "my.module:BipedalWalker-v3", "seed": 11}
    run = viz.load_run(write_run(tmp_path / "metrics.csv", rows, config))
    best = "best evaluation 312 ± 2 at 1.2M steps, 6.5 min"
    assert viz.headline(run) == f"BipedalWalker-v3 · seed 11 · {best}"


def test_the_title_of_a_run_without_config_or_evaluation_says_so(tmp_path):
    run = viz.load_run(write_run(tmp_path / "mine" / "metrics.csv", [row(1)]))
    assert viz.headline(run) == "mine · no evaluation yet"


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (950, "950"), (20_000, "20k"), (500_000, "0.5M"), (1_250_000, "1.25M"),
     (-0.01, "−0.01"), (0.0003, "0.0003")],
)  # fmt: skip
def test_numbers_on_the_axes_are_short(number, text):
    assert viz.short(number) == text


@pytest.mark.parametrize(
    ("step", "seconds", "text"),
    [(4096, 30, "4.1k steps, 0.5 min"), (102_400, 390, "0.1M steps, 6.5 min"),
     (1_204_224, 390, "1.2M steps, 6.5 min"), (10_300_000, 11_520, "10.3M steps, 3.2 h")],
)  # fmt: skip
def test_a_moment_is_told_in_steps_and_minutes(step, seconds, text):
    assert viz.when(step, seconds) == text


def test_one_spike_does_not_flatten_a_panel():
    values = np.concatenate([np.linspace(0.008, 0.012, 500), [7.0], [np.nan]])
    assert viz.limits(values) == pytest.approx((0, 0.0132), abs=1e-3)
    low, high = viz.limits(-values)
    assert -0.02 < low < -0.012
    assert -0.008 < high < 0


@pytest.mark.parametrize("values", [[], [np.nan], [0.0, 0.0], [-2.0], [5.0]])
def test_limits_are_a_range_whatever_there_is_to_draw(values):
    low, high = viz.limits(np.array(values))
    assert low < high
    assert all(low <= value <= high for value in values if not math.isnan(value))


def test_only_a_rate_that_spans_decades_is_drawn_logarithmically():
    t = np.linspace(0, 1, 500)
    assert viz.spans_decades(1e-3 * 10 ** (-3 * t))
    for schedule in (
        0 * t + 3e-4,
        3e-4 * (1 - t),
        1.5e-4 * (1 + np.cos(np.pi * t)),
        t[:0],
        t - 0.5,
    ):
        assert not viz.spans_decades(schedule)


# -------------------------------------------------------------------------------------- comparing


def load(tmp_path, folder, rows=(), **config):
    path = tmp_path / folder / "checkpoints_walker" / "metrics.csv"
    return viz.load_run(write_run(path, list(rows), config or None))


def groups_of(*runs):
    """Label -> the iteration that each run of that group consists of: a mark to know it by."""
    return {
        label: [int(run.metrics["iteration"][0]) for run in group]
        for label, group in viz.group_runs(runs)
    }


def test_runs_are_grouped_by_config_apart_from_seed_folder_and_remarks(tmp_path):
    one = load(tmp_path, "a", [row(1)], env="W", seed=1, out="a", lr=1, _about={"x": 1})
    two = load(tmp_path, "b", [row(2)], env="W", seed=1, out="b", lr=2, _about={"x": 1})
    three = load(tmp_path, "c", [row(3)], env="W", seed=2, out="c", lr=1, _about={"x": 2})
    assert groups_of(one, two, three) == {"lr 1": [1, 3], "lr 2": [2]}
    assert groups_of(one, three) == {"W": [1, 3]}


def test_runs_without_config_are_grouped_by_the_name_of_their_folder(tmp_path):
    folders = "slow_seed1", "fast/seed1", "slow_seed2", "fast/seed2"
    runs = [load(tmp_path, folder, [row(i)]) for i, folder in enumerate(folders)]
    assert groups_of(*runs) == {"slow": [0, 2], "fast": [1, 3]}


def test_groups_that_differ_in_much_are_labelled_by_their_folder(tmp_path):
    one = load(tmp_path, "small", [row(1)], env="W", a=1, b=1, c=1, d=1)
    two = load(tmp_path, "large", [row(2)], env="W", a=2, b=2, c=2, d=2)
    assert groups_of(one, two) == {"small": [1], "large": [2]}


def test_the_group_mean_covers_what_all_runs_cover_and_is_interpolated():
    one = np.array([0.0, 10.0, 20.0]), np.array([0.0, 100.0, 100.0])
    two = np.array([5.0, 15.0, 40.0]), np.array([20.0, 40.0, 90.0])
    grid, mean, spread = viz.mean_curve([one, two], points=4)
    np.testing.assert_allclose(grid, [5, 10, 15, 20])
    first, second = np.array([50.0, 100, 100, 100]), np.array([20.0, 30, 40, 50])
    np.testing.assert_allclose(mean, (first + second) / 2)
    np.testing.assert_allclose(spread, np.abs(first - second) / math.sqrt(2))


def test_the_mean_of_one_run_is_the_run_and_runs_apart_have_no_mean():
    x, y = np.array([0.0, 4.0]), np.array([1.0, 3.0])
    grid, mean, spread = viz.mean_curve([(x, y)], points=3)
    assert (grid.tolist(), mean.tolist(), spread.tolist()) == ([0, 2, 4], [1, 2, 3], [0, 0, 0])
    assert [len(part) for part in viz.mean_curve([(x, y), (x + 9, y)])] == [0, 0, 0]


def test_a_comparison_draws_each_group_over_steps_and_over_minutes(tmp_path, figures):
    for folder, seed, lr, gain in (("a1", 1, 1, 8), ("a2", 2, 1, 10), ("b1", 1, 2, 2)):
        rows = [row(i) for i in range(1, 21)]
        rows = [one | {"eval_return_mean": gain * one["iteration"]} for one in rows]
        load(tmp_path, folder, rows, env="W", seed=seed, lr=lr, _about={"reward_threshold": 150})
    viz.plot_comparison(sorted(tmp_path.glob("*/*/metrics.csv")), tmp_path / "c.png")
    steps, minutes = figures[0].axes
    assert labels(steps) == labels(minutes) == ["lr 1 (n = 2)", "lr 2 (n = 1)", "solved (150)"]
    for axes, unit in ((steps, 4096), (minutes, 1)):
        x, y = line(axes, "lr 1").get_data()
        assert (x[0], x[-1]) == (unit, 20 * unit)
        np.testing.assert_allclose(y, 9 * x / unit)
    assert line(steps, "solved").get_ydata()[0] == 150


def test_a_comparison_falls_back_on_training_returns_for_all(tmp_path, figures):
    load(tmp_path, "a", [row(i) for i in range(1, 21)])
    load(tmp_path, "b", [row(i) for i in range(1, 4)])  # no evaluation yet
    viz.plot_comparison(sorted(tmp_path.glob("*/*/metrics.csv")), tmp_path / "c.png")
    axes = figures[0].axes[0]
    assert axes.get_ylabel() == "training return"
    assert line(axes, "a").get_ydata()[-1] == 20 - 100
    assert line(axes, "b").get_ydata()[-1] == 3 - 100


def test_a_file_given_twice_counts_once(tmp_path, figures):
    path = write_run(tmp_path / "a" / "metrics.csv", [row(5)])
    viz.plot_comparison([path, str(path)], tmp_path / "c.png")
    assert labels(figures[0].axes[0]) == ["a (n = 1)"]


# --------------------------------------------------------------------------------------- pictures


def test_the_evaluations_and_the_training_mean_drawn_are_those_of_the_file(tmp_path, figures):
    path = write_run(tmp_path / "metrics.csv", [row(i) for i in range(1, 41)])
    viz.plot_training_curves(path, tmp_path / "x.png")
    axes = figures[0].axes[0]
    x, y = line(axes, "evaluation").get_data()
    np.testing.assert_array_equal(x, 4096 * np.arange(5, 41, 5))
    np.testing.assert_array_equal(y, 8 * np.arange(5, 41, 5))
    np.testing.assert_array_equal(line(axes, "training").get_ydata(), np.arange(1, 41) - 100)


@pytest.mark.parametrize(
    ("about", "argument", "drawn"),
    [({"reward_threshold": 250.0}, None, 250), ({"reward_threshold": 250.0}, 280, 280),
     ({"reward_threshold": None}, None, None), (None, None, None), (None, 300, 300)],
)  # fmt: skip
def test_the_threshold_is_the_configs_unless_one_is_given(
    tmp_path, figures, about, argument, drawn
):
    config = {"env": "W"} | ({"_about": about} if about else {})
    path = write_run(tmp_path / "metrics.csv", [row(i) for i in range(1, 51)], config)
    viz.plot_training_curves(path, tmp_path / "x.png", argument)
    axes = figures[0].axes[0]
    assert [label for label in labels(axes) if "solved" in label] == (
        [f"solved ({drawn})"] if drawn else []
    )
    marks = [text.get_text().split() for text in axes.texts]
    if drawn:  # evaluations rise by 40: the first at or past it
        first = -(-drawn // 40) * 5
        assert line(axes, "solved").get_ydata()[0] == drawn
        assert marks == [[str(drawn), "reached", *viz.when(4096 * first, 60 * first).split()]]
    else:
        assert marks == []


def test_a_threshold_that_no_evaluation_reaches_has_no_mark(tmp_path, figures):
    path = write_run(tmp_path / "metrics.csv", [row(i, return_mean=400) for i in range(1, 11)])
    viz.plot_training_curves(path, tmp_path / "x.png", threshold=300)
    assert not figures[0].axes[0].texts


def test_every_column_of_the_design_is_drawn(tmp_path, figures):
    rows = [row(i, **{name: k for k, name in enumerate(HEADER) if k > 16}) for i in range(1, 9)]
    viz.plot_training_curves(write_run(tmp_path / "metrics.csv", rows), tmp_path / "x.png")
    drawn = {axes.get_title(side): axes for axes in figures[0].axes for side in ("left", "right")}
    for name in ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction",
                 "explained_variance", "action_std", "learning_rate"):  # fmt: skip
        axes = drawn[name.replace("_", " ")]
        assert set(axes.get_lines()[0].get_ydata()) == {HEADER.index(name)}, name
    for left, right in (("policy loss", "value loss"), ("approx kl", "clip fraction"),
                        ("entropy", "action std")):  # fmt: skip
        assert drawn[left].get_subplotspec() == drawn[right].get_subplotspec()
    assert set(drawn["steps per s"].get_lines()[0].get_ydata()) == {4000}
    assert set(drawn["episode length"].get_lines()[0].get_ydata()) == {500}
    assert len(drawn["share of time"].patches) == 4


def test_the_picture_has_its_size_and_is_not_blank(tmp_path):
    path = write_run(tmp_path / "metrics.csv", [row(i) for i in range(1, 61)])
    viz.plot_training_curves(path, tmp_path / "new" / "folder" / "curves.png", threshold=300)
    picture = imageio.imread(tmp_path / "new" / "folder" / "curves.png")[..., :3]
    assert picture.shape == (*CURVES_SHAPE, 3)
    large = picture[: CURVES_SHAPE[0] // 2]
    for color in (viz.BLUE, viz.ORANGE, viz.GREEN):  # evaluation, training, threshold
        rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (large == rgb).all(axis=-1).sum() > 500, color
    assert (picture == 255).all(axis=-1).mean() > 0.5


POOR = {
    "no row": [],
    "one row": [row(1)],
    "no evaluation": [row(i, eval_return_mean=None) for i in range(1, 70)],
    "only steps": [dict.fromkeys(HEADER) | {"step": i} for i in range(3)],
    "diverged": [row(i, value_loss="inf", approx_kl="nan", return_max="inf") for i in range(70)],
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("what", POOR)
def test_whatever_is_missing_the_curves_are_drawn_without_a_warning(tmp_path, what):
    path = write_run(tmp_path / "metrics.csv", POOR[what])
    viz.plot_training_curves(path, tmp_path / "curves.png", threshold=300)
    assert imageio.imread(tmp_path / "curves.png").shape[:2] == CURVES_SHAPE


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("names", [["no row"], list(POOR)], ids=["nothing", "all"])
def test_whatever_is_missing_runs_are_compared_without_a_warning(tmp_path, names):
    paths = [write_run(tmp_path / name / "metrics.csv", POOR[name]) for name in names]
    viz.plot_comparison(paths, tmp_path / "comparison.png", threshold=300)
    assert imageio.imread(tmp_path / "comparison.png").shape[:2] == COMPARISON_SHAPE


def test_a_file_without_rows_gives_axes_that_say_so(tmp_path, figures):
    path = write_run(tmp_path / "metrics.csv", [])
    viz.plot_training_curves(path, tmp_path / "x.png")
    assert figures[0].axes[0].texts[0].get_text() == "no rows yet"


def test_a_picture_that_cannot_be_drawn_leaves_no_file_and_the_old_picture(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def break_off(figure, path, **kwargs):
        Path(path).write_bytes(b"half a picture")
        assert (path.parent, path.suffix) == (tmp_path, ".png")
        raise OSError("disk full")

    path = write_run(tmp_path / "metrics.csv", [row(1)])
    (tmp_path / "curves.png").write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", break_off)
    with pytest.raises(OSError, match="disk full"):
        viz.plot_training_curves(path, tmp_path / "curves.png")
    assert sorted(os.listdir(tmp_path)) == ["curves.png", "metrics.csv"]
    assert (tmp_path / "curves.png").read_bytes() == b"old"


# ----------------------------------------------------------------------------------- command line


def test_a_runs_curves_go_to_its_plots_folder_also_from_within_the_run(
    tmp_path, monkeypatch, capsys
):
    path = write_run(tmp_path / "checkpoints_walker" / "metrics.csv", [row(1)])
    png = tmp_path / "plots" / "training_curves.png"
    monkeypatch.chdir(path.parent)
    assert viz.main(["metrics.csv"]) == 0
    assert capsys.readouterr().out == f"{png}\n"
    assert imageio.imread(png).shape[:2] == CURVES_SHAPE


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        (["a/my_metrics.csv"], "a/my_metrics.png"),
        (["checkpoints_walker/metrics.csv"], "plots/training_curves.png"),
        (["a/my_metrics.csv", "b/metrics.csv"], "plots/comparison.png"),
        (["a/my_metrics.csv", "--out", "here/x.png", "--threshold", "300"], "here/x.png"),
    ],
)
def test_a_picture_goes_beside_the_file_to_plots_or_where_out_says(
    tmp_path, monkeypatch, capsys, arguments, written
):
    write_run(tmp_path / "a" / "my_metrics.csv", [row(1)])
    write_run(tmp_path / "b" / "metrics.csv", [row(1)])
    write_run(tmp_path / "checkpoints_walker" / "metrics.csv", [row(1)])
    monkeypatch.chdir(tmp_path)
    assert viz.main(arguments) == 0
    assert capsys.readouterr().out == f"{written}\n"
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")] == [written]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ([], "required: metrics"),
        (["missing.csv"], "missing.csv: No such file"),
        (["metrics.csv", "missing.csv"], "missing.csv: No such file"),
        (["metrics.csv", "--threshold", "high"], "invalid float value: 'high'"),
        (["metrics.csv", "--threshold", "nan"], "--threshold must be a finite number, got nan"),
        (["metrics.csv", "--out", "x.pdf"], "x.pdf: the picture is a PNG"),
        (["metrics.csv", "--out", "metrics.csv/x.png"], "metrics.csv"),
        (["metrics.csv", "--colour", "red"], "unrecognized arguments: --colour"),
    ],
)
def test_a_users_mistake_is_exit_code_2_and_one_line(
    tmp_path, monkeypatch, capsys, arguments, what
):
    write_run(tmp_path / "metrics.csv", [row(1)])
    monkeypatch.chdir(tmp_path)
    assert viz.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("viz.py: ")
    assert err.count("\n") == 1
    assert what in err
    assert os.listdir(tmp_path) == ["metrics.csv"]


def test_the_program_needs_no_display_and_importing_it_no_matplotlib(tmp_path):
    path = write_run(tmp_path / "metrics.csv", [row(1)])
    code = (
        "import sys, viz; assert 'matplotlib' not in sys.modules; code = viz.main(sys.argv[1:]); "
        "assert 'matplotlib.pyplot' not in sys.modules; raise SystemExit(code)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "DISPLAY"} | {"MPLBACKEND": "tkagg"}
    command = [sys.executable, "-c", code, str(path)]
    folder = Path(viz.__file__).parent
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert imageio.imread(tmp_path / "metrics.png").shape[:2] == CURVES_SHAPE
