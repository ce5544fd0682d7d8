"""Claims about the training curves of `viz.py`: what it reads, which numbers it draws."""

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

PANELS = [name for names in viz.PANELS[1:] for name in names]
HEADER = ["step", "wall_s", "episodes", "return_mean", "return_min", "return_max"]
HEADER += ["eval_return_mean", "eval_return_std", *PANELS, *viz.MOVING]


def row(i, **cells):
    """Iteration i of a run whose return rises by one, evaluated every fifth time; None is empty."""
    values = dict.fromkeys(HEADER, 0.1) | {"step": 4096 * i, "wall_s": 60.0 * i, "episodes": 2}
    values |= {"return_mean": i - 100, "return_min": i - 150, "return_max": i - 50}
    values["eval_return_mean"] = 8 * i if i % 5 == 0 else None
    values["eval_return_std"] = 3 if i % 5 == 0 else None
    return values | cells


def write_run(path, rows=(), config=None):
    """Write a metrics file and, if given, the config beside it; returns the metrics file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [[("" if cells[name] is None else cells[name]) for name in HEADER] for cells in rows]
    path.write_text("".join(",".join(map(str, line)) + "\n" for line in [HEADER, *lines]))
    if config is not None:
        name = path.name.replace("metrics.csv", "config.json")
        path.with_name(name).write_text(json.dumps(config))
    return path


@pytest.fixture
def saved(monkeypatch):
    """Figure, axes with the legend, title and path of every picture, instead of the files."""
    pictures = []
    monkeypatch.setattr(viz, "_save", lambda *picture: pictures.append(picture))
    return pictures


def line(axes, label):
    return next(one for one in axes.get_lines() if str(one.get_label()).startswith(label))


def labels(axes):
    return [one.get_label() for one in axes.get_lines() if one.get_label()[0] != "_"]


# ---------------------------------------------------------------------------------------- files


def test_metrics_are_float64_columns_and_an_empty_cell_is_nan(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"step,wall_s,a_new_column\r\n1,2,\r\n3,4,5\r\n")  # as on Windows
    metrics = viz.read_metrics(path)
    assert list(metrics) == ["step", "wall_s", "a_new_column"]
    assert all(column.dtype == np.float64 for column in metrics.values())
    np.testing.assert_array_equal(metrics["a_new_column"], [np.nan, 5])


def test_a_torn_last_line_is_left_out_wherever_it_is_cut(tmp_path):
    path = write_run(tmp_path / "metrics.csv", [row(1), row(2), row(3)])
    text = path.read_text()
    start = text.rindex("\n", 0, -1) + 1  # of the last line
    for end in range(start, len(text)):
        path.write_text(text[:end])
        assert viz.read_metrics(path)["step"].tolist() == [4096, 8192], text[start:end]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "'step'"),
        ("wall_s,loss\n1,2\n", "wall_s,loss"),
        ("step,loss\n1,2\n2,much\n", "line 3: 'much'"),
        ("step,loss\n1\n2,3\n", "line 2: 1 cells 2 names"),
        ("step,loss\n1,2,3\n", "line 2: 3 cells 2 names"),
        ("step,loss\n2,0\n2,0\n", "'step'"),
        ("step,loss\n,0\n2,0\n", "'step'"),
    ],
)
def test_a_broken_metrics_file_is_refused_naming_file_place_and_value(tmp_path, content, named):
    path = tmp_path / "metrics.csv"
    path.write_text(content)
    with pytest.raises(viz.InputError) as error:
        viz.read_metrics(path)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in [str(path), *named.split()])


def test_a_metrics_file_has_the_json_object_beside_it_as_its_config(tmp_path):
    for prefix in ("", "pretrained_"):
        path = write_run(tmp_path / f"{prefix}metrics.csv", config={"name": prefix})
        assert viz.read_config(path) == {"name": prefix}
    assert viz.read_config(tmp_path / "other_metrics.csv") == {}
    for content in ("{", "[1]", "null"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(viz.InputError, match=r"config\.json"):
            viz.read_config(tmp_path / "metrics.csv")


@pytest.mark.parametrize(
    ("path", "name"),
    [("walk/checkpoints_walker/metrics.csv", "walk"), ("fast_seed11/metrics.csv", "fast"),
     ("fast/seed_12/metrics.csv", "fast"), ("lr-11/metrics.csv", "lr"),
     ("lr-12/metrics.csv", "lr-12"), ("walk/pretrained_metrics.csv", "pretrained")],
)  # fmt: skip
def test_a_run_is_named_after_its_folder_without_the_seed(tmp_path, path, name):
    assert viz.load_run(write_run(tmp_path / path, config={"seed": 11})).name == name


# -------------------------------------------------------------------------------------- numbers


def test_smoothing_is_a_weighted_mean_over_a_centerd_window_that_ignores_nan():
    rng = np.random.default_rng(0)
    values, weights = rng.normal(size=260), rng.integers(0, 4, size=260).astype(float)
    values[rng.random(260) < 0.4] = np.nan
    values[100:110] = np.nan
    expected = []
    for i in range(260):  # of 260 rows, two to either side
        rows = [j for j in range(max(0, i - 2), min(260, i + 3)) if not math.isnan(values[j])]
        total = sum(weights[j] for j in rows)
        expected.append(sum(values[j] * weights[j] for j in rows) / total if total else math.nan)
    np.testing.assert_allclose(viz.smooth(values, weights), expected, atol=1e-12)
    np.testing.assert_array_equal(viz.smooth(values[:99]), values[:99])  # too short


def test_every_training_episode_counts_once_and_the_range_holds_all(tmp_path):
    nothing = {"episodes": 0, "return_mean": None, "return_min": None, "return_max": None}
    rows = [row(i, **nothing) for i in range(120)]
    rows[60] |= {"episodes": 3, "return_mean": 10, "return_min": -40, "return_max": 50}
    rows[61] |= {"episodes": 1, "return_mean": 90, "return_min": 90, "return_max": 90}
    run = viz.load_run(write_run(tmp_path / "metrics.csv", rows))
    mean, low, high = viz.episode_band(run)  # windows of three rows
    both = (3 * 10 + 90) / 4
    np.testing.assert_allclose(mean[58:64], [np.nan, 10, both, both, 90, np.nan])
    np.testing.assert_array_equal(low[58:64], [np.nan, -40, -40, -40, 90, np.nan])
    np.testing.assert_array_equal(high[58:64], [np.nan, 50, 90, 90, 90, np.nan])


def test_the_headline_tells_environment_seed_and_best_evaluation(tmp_path):
    path, config = tmp_path / "metrics.csv", {"env": "my.module:Walker-v3", "seed": 11}
    best = row(10, step=1_204_224, wall_s=390, eval_return_mean=312.4, eval_return_std=1.6)
    run = viz.load_run(write_run(path, [row(5), best, row(300, eval_return_mean=290)], config))
    expected = ("Walker-v3 · seed 11", "312 ± 2", "1.2M steps, 6.5 min")
    assert all(part in viz.headline(run) for part in expected)
    assert "no evaluation" in viz.headline(viz.load_run(write_run(path, [row(1)], config)))


def test_numbers_on_axes_are_short():
    numbers = 0, 950, 20_000, 500_000, 1_250_000, -0.01
    assert [viz.short(n) for n in numbers] == ["0", "950", "20k", "0.5M", "1.25M", "−0.01"]


def test_one_spike_does_not_flatten_a_panel():
    values = np.concatenate([np.linspace(0.008, 0.012, 500), [7.0], [np.nan]])
    assert viz.limits(values) == pytest.approx((0, 0.0132), abs=1e-3)
    assert viz.limits(-values) == pytest.approx((-0.012, -0.008), abs=1e-3)
    for few in ([], [np.nan], [0.0, 0.0], [-2.0]):
        low, high = viz.limits(np.array(few))
        assert low < high


def test_runs_are_grouped_by_settings_or_folder_and_labelled_by_what_differs(tmp_path):
    def sizes(configs):
        paths = [write_run(tmp_path / name / "metrics.csv", [], configs[name]) for name in configs]
        groups = viz.group_runs([viz.load_run(path) for path in paths])
        return {label: len(group) for label, group in groups}

    one = {"env": "W", "seed": 1, "out": "a", "lr": 1, "_about": {"x": 1}}
    same = {"env": "W", "seed": 2, "out": "c", "lr": 1, "_about": {"x": 2}}
    assert sizes({"a": one, "b": one | {"lr": 2}, "c": same}) == {"lr 1": 2, "lr 2": 1}
    assert sizes({"a": one, "c": same}) == {"W": 2}
    assert sizes({"a": one, "d": {"env": "V", "lr": 2, "batch": 3, "gamma": 4}}) == {"a": 1, "d": 1}
    assert sizes({"e_seed1": None, "f": None, "e_seed2": None}) == {"e": 2, "f": 1}


def test_the_mean_curve_covers_what_all_runs_cover_and_is_interpolated():
    one = np.array([0.0, 10.0, 20.0]), np.array([0.0, 100.0, 100.0])
    two = np.array([5.0, 15.0, 40.0]), np.array([20.0, 40.0, 90.0])
    grid, mean, std = viz.mean_curve([one, two], points=4)
    np.testing.assert_allclose(grid, [5, 10, 15, 20])
    first, second = np.array([50.0, 100, 100, 100]), np.array([20.0, 30, 40, 50])
    np.testing.assert_allclose(mean, (first + second) / 2)
    np.testing.assert_allclose(std, np.abs(first - second) / math.sqrt(2))
    assert viz.mean_curve([one], points=3)[2].tolist() == [0, 0, 0]
    x, y = one
    for curves in ([(x, y), (x + 21, y)], []):  # nothing in common, nothing at all
        assert [len(part) for part in viz.mean_curve(curves)] == [0, 0, 0]


# ------------------------------------------------------------------------------------- pictures


def test_the_curves_show_the_numbers_of_the_file(tmp_path, saved):
    values = {name: 10 + k for k, name in enumerate(PANELS)}
    path = write_run(tmp_path / "metrics.csv", [row(i, **values) for i in range(1, 41)])
    viz.plot_training_curves(path, "x.png")
    large, *small = saved[0][0].axes
    x, y = line(large, "evaluation").get_data()
    np.testing.assert_array_equal(x, 4096 * np.arange(5, 41, 5))
    np.testing.assert_array_equal(y, 8 * np.arange(5, 41, 5))
    np.testing.assert_array_equal(line(large, "training").get_ydata(), np.arange(1, 41) - 100)
    drawn = {axes.get_title("left"): set(axes.get_lines()[0].get_ydata()) for axes in small}
    assert drawn == {name.replace("_", " "): {value} for name, value in values.items()}


def test_the_settings_that_moved_have_panels_in_a_last_row_and_no_other_has(tmp_path, saved):
    costs = [{"failure_cost": i, "entropy_coef": 1 / i} for i in range(1, 41)]
    rows = [row(i, **moved, action_cost=None) for i, moved in enumerate(costs)]
    for file, written in (("moved", rows), ("still", [row(i) for i in range(9)])):
        viz.plot_training_curves(write_run(tmp_path / file / "metrics.csv", written), "x.png")
    figure, still = (picture[0] for picture in saved)
    drawn = {axes.get_title("left"): axes.get_lines()[0].get_ydata() for axes in figure.axes[1:]}
    assert list(drawn)[len(PANELS) :] == ["failure cost", "entropy coef"]
    np.testing.assert_array_equal(drawn["failure cost"], np.arange(1, 41))
    np.testing.assert_allclose(drawn["entropy coef"], 1 / np.arange(1, 41))
    assert len(still.axes) == 1 + len(PANELS)
    assert (figure.get_figheight(), still.get_figheight()) == (12, 10)


def test_without_evaluations_the_legend_names_none(tmp_path, saved):
    rows = [row(i, eval_return_mean=None, eval_return_std=None) for i in range(1, 9)]
    viz.plot_training_curves(write_run(tmp_path / "metrics.csv", rows), "x.png")
    [(figure, _, title, _)] = saved
    assert labels(figure.axes[0]) == ["training: mean, range"]
    assert "no evaluation yet" in title


def test_the_threshold_is_the_configs_and_a_star_marks_where_it_is_reached(tmp_path, saved):
    rows = [row(i) for i in range(1, 51)]  # evaluations rise by 40 every 5 iterations
    for folder, threshold in (("low", 250), ("high", 500), ("none", None)):
        about = {} if threshold is None else {"_about": {"reward_threshold": threshold}}
        path = write_run(tmp_path / folder / "metrics.csv", rows, about)
        viz.plot_training_curves(path, "x.png")
    assert [labels(figure.axes[0])[2:] for figure, *_ in saved] == [
        ["solved (250)", "250 reached: 0.143M steps, 35.0 min"],
        ["solved (500)"],
        [],
    ]
    large = saved[0][0].axes[0]
    assert line(large, "solved").get_ydata()[0] == 250
    assert line(large, "250 reached").get_xydata().tolist() == [[4096 * 35, 280]]


def test_a_comparison_draws_each_group_over_steps_and_over_minutes(tmp_path, saved):
    for folder, seed, lr, gain in (("a1", 1, 1, 8), ("a2", 2, 1, 10), ("b1", 1, 2, 2)):
        config = {"env": "W", "seed": seed, "lr": lr, "_about": {"reward_threshold": 150}}
        rows = [row(i, eval_return_mean=gain * i) for i in range(1, 21)]
        write_run(tmp_path / folder / "metrics.csv", rows, config)
    paths = sorted(tmp_path.glob("*/metrics.csv"))
    viz.plot_comparison([*paths, str(paths[0])], "c.png")  # one given twice counts once
    figure, _, title, _ = saved[0]
    steps, minutes = figure.axes
    assert "3 runs" in title
    assert labels(steps) == labels(minutes) == ["lr 1 (n = 2)", "lr 2 (n = 1)", "solved (150)"]
    for axes, unit in ((steps, 4096), (minutes, 1)):
        x, y = line(axes, "lr 1").get_data()
        assert (x[0], x[-1]) == (unit, 20 * unit)
        np.testing.assert_allclose(y, 9 * x / unit)
    assert line(steps, "solved").get_ydata()[0] == 150


def test_a_comparison_shows_training_returns_unless_every_run_has_evaluations(tmp_path, saved):
    write_run(tmp_path / "a" / "metrics.csv", [row(i) for i in range(1, 21)])
    write_run(tmp_path / "b" / "metrics.csv", [row(i) for i in range(1, 4)])
    viz.plot_comparison(sorted(tmp_path.glob("*/metrics.csv")), "c.png")
    axes = saved[0][0].axes[0]
    assert axes.get_ylabel() == "training return"
    assert line(axes, "a").get_ydata()[-1] == 20 - 100
    assert line(axes, "b").get_ydata()[-1] == 3 - 100


@pytest.mark.parametrize("second", ["A-v0", "B-v0"])
def test_a_comparison_says_which_environment_it_is_of_or_that_they_differ(second, tmp_path, saved):
    for folder, env in (("a", "A-v0"), ("b", second)):
        path = tmp_path / folder / "metrics.csv"
        write_run(path, [row(i) for i in range(1, 21)], {"env": env, "seed": 1})
    viz.plot_comparison(sorted(tmp_path.glob("*/metrics.csv")), "c.png")
    title = saved[0][2]
    assert title.startswith("A-v0 · " if second == "A-v0" else "different environments · ")


@pytest.mark.slow
def test_the_picture_has_its_size_and_its_colors(tmp_path):
    about = {"_about": {"reward_threshold": 300}}
    path = write_run(tmp_path / "metrics.csv", [row(i) for i in range(1, 61)], about)
    viz.plot_training_curves(path, tmp_path / "new" / "curves.png")
    picture = imageio.imread(tmp_path / "new" / "curves.png")[..., :3]
    assert picture.shape == (1600, 1760, 3)
    for color in (viz.BLUE, viz.ORANGE, viz.GREEN):  # evaluation, training, threshold
        rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (picture[:800] == rgb).all(axis=-1).sum() > 500, color
    assert (picture == 255).all(axis=-1).mean() > 0.5


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_whatever_is_missing_pictures_are_drawn_without_a_warning(tmp_path):
    runs = {
        "no_row": [],
        "one_row": [row(1)],
        "only_steps": [dict.fromkeys(HEADER) | {"step": i} for i in range(3)],
        "diverged": [row(i, value_loss="inf", approx_kl="nan", return_max="inf") for i in range(9)],
    }
    paths = [write_run(tmp_path / name / "metrics.csv", rows) for name, rows in runs.items()]
    for path in paths:
        viz.plot_training_curves(path, path.with_suffix(".png"))
    viz.plot_comparison(paths[:1], tmp_path / "empty.png")
    viz.plot_comparison(paths, tmp_path / "all.png")
    assert imageio.imread(tmp_path / "all.png").shape[:2] == (832, 1760)


def test_a_picture_that_cannot_be_drawn_leaves_the_old_one_and_no_other_file(tmp_path, monkeypatch):
    def break_off(figure, path):
        path.write_bytes(b"half a picture")
        raise OSError("disk full")

    path = write_run(tmp_path / "metrics.csv", [row(1)])
    (tmp_path / "curves.png").write_bytes(b"old")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", break_off)
    with pytest.raises(OSError, match="disk full"):
        viz.plot_training_curves(path, tmp_path / "curves.png")
    assert sorted(os.listdir(tmp_path)) == ["curves.png", "metrics.csv"]
    assert (tmp_path / "curves.png").read_bytes() == b"old"


# --------------------------------------------------------------------------------- command line


def test_a_picture_goes_to_its_runs_plots_or_beside_the_file_or_where_out_says(
    tmp_path, monkeypatch, capsys
):
    for plot in ("plot_training_curves", "plot_comparison"):
        monkeypatch.setattr(viz, plot, lambda *arguments: None)
    run = tmp_path / "checkpoints_walker"
    run.mkdir()
    monkeypatch.chdir(run)
    for arguments, png in (
        ("metrics.csv", tmp_path / "plots" / "training_curves.png"),
        ("../run/checkpoints_walker/metrics.csv", "../run/plots/training_curves.png"),
        ("a/my_metrics.csv", "a/my_metrics.png"),
        ("a/metrics.csv b/metrics.csv", "plots/comparison.png"),
        ("a/metrics.csv --out x.png", "x.png"),
    ):
        assert viz.main(arguments.split()) == 0
        assert capsys.readouterr().out == f"{png}\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [("", "files"), ("missing.csv", "missing.csv"), ("metrics.csv missing.csv", "missing.csv"),
     ("metrics.csv --out x.pdf", "x.pdf"), ("metrics.csv --out metrics.csv/x.png", "metrics.csv"),
     ("metrics.csv --color red", "--color")],
)  # fmt: skip
def test_a_users_mistake_is_exit_code_2_and_one_line_that_names_it(
    tmp_path, monkeypatch, capsys, arguments, named
):
    write_run(tmp_path / "metrics.csv", [row(1)])
    monkeypatch.chdir(tmp_path)
    assert viz.main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert named in err
    assert os.listdir(tmp_path) == ["metrics.csv"]


@pytest.mark.slow
def test_it_needs_no_display_and_imports_matplotlib_only_to_draw(tmp_path):
    path = write_run(tmp_path / "metrics.csv", [row(1)])
    code = """
import sys, viz
assert not {"matplotlib", "torch", "gymnasium"} & set(sys.modules)
code = viz.main(sys.argv[1:])
assert "matplotlib.pyplot" not in sys.modules
raise SystemExit(code)
"""
    command = [sys.executable, "-c", code, str(path)]
    environment = os.environ | {"MPLBACKEND": "tkagg", "DISPLAY": ""}
    folder = Path(viz.__file__).parent
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert imageio.imread(tmp_path / "metrics.png").shape[:2] == (1600, 1760)
