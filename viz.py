"""Pictures of training: from the files a run leaves on disk to PNGs.

    python viz.py checkpoints_walker/metrics.csv    # one run: its training curves
    python viz.py */checkpoints_walker/metrics.csv  # several: settings and seeds compared

Works while training still writes, and knows nothing of networks or environments: `metrics.csv` has
the numbers; `config.json` beside it, where there is one, the names, the seed and the threshold.
"""

import argparse
import itertools
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Okabe and Ito's palette: told apart with any kind of colour vision.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PALETTE = (BLUE, RED, GREEN, "#CC79A7", ORANGE, "#56B4E9")

# The small panels: what is drawn on the left axes, and on the right axes of the first of them.
LEFT = "policy_loss", "approx_kl", "entropy", "explained_variance", "learning_rate", "steps_per_s"
RIGHT = "value_loss", "clip_fraction", "action_std"
STAGES = {"collect": "collect_s", "update": "update_s", "evaluate": "eval_s"}
X_AXES = (("step", "environment steps", 1), ("wall_s", "wall-clock minutes", 60))
RUN_FOLDER = "checkpoints_walker"  # where a run keeps its metrics.csv
NOT_SETTINGS = ("seed", "out")  # what may differ between the runs of one experiment


class InputError(ValueError):
    """A user's mistake; the message is one line that says what, where and what would be right."""


# --------------------------------------------------------------------------------------- the files


def read_metrics(path):
    """Read a metrics file, also one that a training is writing at this moment.

    Returns one float64 array of shape (rows,) per column; an empty cell is NaN. A last line that is
    torn (cells missing, or no newline, so that its last cell may be cut) is left out.
    Raises ValueError, one line that names the file, if it cannot be read, is empty, has no `step`
    column, holds a cell that is not a number, or if `step` does not grow from row to row.
    """
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    header, *lines = text.split("\n")
    names = header.split(",")
    if "step" not in names:
        raise InputError(f"{path}: no column 'step' in its first line, {header[:60]!r}")
    rows = [line.split(",") for line in lines[:-1]]  # behind the last newline: nothing, or torn
    if rows and len(rows[-1]) < len(names):
        rows.pop()
    for number, row in enumerate(rows, start=2):
        if len(row) != len(names):
            raise InputError(f"{path}, line {number}: {len(row)} cells under {len(names)} names")
        try:
            row[:] = [float(cell or "nan") for cell in row]
        except ValueError as error:  # its message quotes the cell
            raise InputError(f"{path}, line {number}: {error}") from error
    table = np.array(rows, dtype=np.float64).reshape(-1, len(names))
    metrics = dict(zip(names, table.T, strict=True))
    if not np.isfinite(metrics["step"]).all() or (np.diff(metrics["step"]) <= 0).any():
        raise InputError(f"{path}: 'step' must be a number that grows from row to row")
    return metrics


def read_config(metrics_path):
    """The settings beside a metrics file: `config.json`, or `X_config.json` of `X_metrics.csv`.

    Returns {} where there is no such file; raises ValueError where it is not a JSON object.
    """
    path = Path(metrics_path)
    path = path.with_name(path.name.removesuffix("metrics.csv") + "config.json")
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not a JSON object: {error}") from error


class Run(NamedTuple):
    """One training run as its files tell it."""

    name: str  # its folder's, without a seed at the end
    config: dict  # config.json; empty where there is none
    metrics: dict  # column name -> (rows,) float64, as `read_metrics` gives it

    @property
    def settings(self):
        """What makes two runs one experiment: the config without seed, folder and remarks."""
        keys = sorted(key for key in self.config if key not in NOT_SETTINGS and key[:1] != "_")
        return {key: self.config[key] for key in keys}

    @property
    def env(self):
        return str(self.config.get("env", self.name)).rpartition(":")[2]

    def column(self, name):
        """(rows,) values of a column; NaN where the file has no such column."""
        return self.metrics.get(name, np.full_like(self.metrics["step"], np.nan))

    def evaluations(self):
        """Mean and std of the return, steps and seconds of each evaluation, each (evaluations,)."""
        names = "eval_return_mean", "eval_return_std", "step", "wall_s"
        rows = np.isfinite(self.column("eval_return_mean"))
        return [self.column(name)[rows] for name in names]


def load_run(metrics_path):
    """Read a metrics file and the config beside it; raises ValueError as the two readers do."""
    path, config = Path(metrics_path).resolve(), read_config(metrics_path)
    folder = path.parent.parent if path.parent.name == RUN_FOLDER else path.parent
    own = path.stem.removesuffix("metrics").rstrip("_")  # "pretrained" of pretrained_metrics.csv
    seed = rf"[-_. ]?seed[-_ ]?\d+$|[-_]{config.get('seed')}$"
    name = re.sub(seed, "", own or folder.name) or folder.parent.name
    return Run(name, config, read_metrics(metrics_path))


# ------------------------------------------------------------------------------------- the numbers


def smooth(values, weights=1.0):
    """Weighted mean over a centred window of rows, cut at both ends: (rows,) in and out.

    NaN has no weight; NaN comes out where a window holds no value.
    """
    weights = np.isfinite(values) * weights
    sums = _windows(np.nan_to_num(values) * weights, 0.0).sum(axis=1)
    totals = _windows(weights, 0.0).sum(axis=1)
    return np.divide(sums, totals, out=np.full_like(sums, np.nan), where=totals > 0)


def _windows(values, fill):
    """(rows, window): the rows around each row, `fill` beyond both ends.

    The window is a fiftieth of all rows: it quiets the noise and keeps the shape.
    """
    window = len(values) // 50 | 1
    padded = np.pad(values, (window // 2, window // 2 + 1), constant_values=fill)
    return np.lib.stride_tricks.sliding_window_view(padded, window)[: len(values)]


def episode_band(run, kind):
    """Mean, lowest and highest `kind` ("return" or "length") of training episodes, each (rows,).

    A row tells of all episodes that ended in a window of iterations around it; in the mean, every
    episode counts once. NaN where none ended.
    """
    mean = smooth(run.column(f"{kind}_mean"), np.nan_to_num(run.column("episodes"), nan=1))
    # fmin and fmax leave NaN out, and without a warning where there is nothing else.
    low = np.fmin.reduce(_windows(run.column(f"{kind}_min"), np.nan), axis=1)
    high = np.fmax.reduce(_windows(run.column(f"{kind}_max"), np.nan), axis=1)
    return mean, low, high


def time_shares(run):
    """Where the wall-clock went: {"collect": share, …}, summing to 1; {} before the first row."""
    seconds = {name: np.nansum(run.column(column)) for name, column in STAGES.items()}
    wall = np.nanmax(run.column("wall_s"), initial=0.0)
    seconds["the rest"] = max(0.0, wall - sum(seconds.values()))
    total = sum(seconds.values())
    return {name: value / total for name, value in seconds.items()} if total else {}


def headline(run):
    """The title of a run's curves: environment, seed, and the best evaluation so far."""
    words = [run.env, f"seed {run.config['seed']}"] if "seed" in run.config else [run.env]
    mean, std, step, wall = run.evaluations()
    best = "no evaluation yet"
    if len(mean):
        i = mean.argmax()
        best = f"best evaluation {mean[i]:.0f} ± {std[i]:.0f} at {when(step[i], wall[i])}"
    return " · ".join([*words, best])


def when(step, seconds):
    """A moment of a run in words: "1.2M steps, 6.5 min"."""
    minutes = f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
    return f"{short(round(step, -4 if step >= 1e5 else 0))} steps, {minutes}"


def short(count):
    """A number in few letters: 950, 20k, 0.5M, 1.25M, −0.01."""
    large = f"{count / 1e6:.3g}M" if abs(count) >= 1e5 else f"{count / 1e3:.3g}k"
    return (large if abs(count) >= 1e3 else f"{count:.3g}").replace("-", "−")


def limits(values):
    """Limits of a y axis: what 98 % of the values span and a margin, so that no spike flattens it.

    From zero if no value is negative; the pair (0, 1) where there is none.
    """
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    bottom, top = np.percentile(values, [1, 99]) * (values.min() < 0, 1)
    margin = 0.1 * (top - bottom) or 0.1 * abs(top) or 1.0
    return bottom - margin * (values.min() < 0), top + margin


def spans_decades(values):
    """Whether the middle 60 % of the values span more than a factor of ten.

    The middle, because a linear or cosine schedule spans any factor on its last rows.
    """
    values = values[np.isfinite(values)]
    low, high = np.quantile(values, [0.2, 0.8]) if len(values) else (0.0, 0.0)
    return bool(0 < 10 * low < high)


def group_runs(runs):
    """Sort runs into experiments: a list of (label, runs) in the order of the first runs.

    The runs of one experiment have the same config but for the seed, or, where there is no config,
    a folder of the same name. The label is what differs between experiments; the folder's name if
    that is much, the environment if it is nothing.
    """
    groups = {}
    for run in runs:
        groups.setdefault(json.dumps(run.settings) if run.config else run.name, []).append(run)
    settings = [group[0].settings for group in groups.values() if group[0].config]
    keys = dict.fromkeys(key for one in settings for key in one)
    differing = [k for k in keys if any(one.get(k) != settings[0].get(k) for one in settings)]
    return [(_label(group[0], differing), group) for group in groups.values()]


def _label(run, differing):
    if not run.config or len(differing) > 3:
        return run.name
    values = [f"{key.replace('_', ' ')} {run.settings.get(key, '–')}" for key in differing]
    return ", ".join(values) or run.env


def return_curve(run, x_name, evaluated):
    """Points x, y, each (points,): evaluation return, or the training episodes' mean return."""
    y = run.column("eval_return_mean") if evaluated else episode_band(run, "return")[0]
    x = run.column(x_name)
    drawn = np.isfinite(x) & np.isfinite(y)
    return x[drawn], y[drawn]


def mean_curve(curves, points=200):
    """Mean of curves over the range of x that all of them cover, interpolated on a common grid.

    `curves` are pairs x, y of shape (n,), n ≥ 1, with growing x. Returns the grid, the mean and the
    sample standard deviation (zero for one curve), each (points,); (0,) without a common range.
    """
    start, end = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    grid = np.linspace(start, end, points if start <= end else 0)
    values = np.stack([np.interp(grid, x, y) for x, y in curves])  # (curves, points)
    spread = values.std(axis=0, ddof=1) if len(curves) > 1 else np.zeros_like(grid)
    return grid, values.mean(axis=0), spread


def solved_return(runs, threshold):
    """The given threshold, else the one on which all configs agree, else None."""
    found = {(run.config.get("_about") or {}).get("reward_threshold") for run in runs}
    return found.pop() if threshold is None and len(found) == 1 else threshold


# ------------------------------------------------------------------------------------ the pictures


def plot_training_curves(metrics_path, png_path, threshold=None):
    """Draw the training curves of one run to a PNG.

    `threshold` is the return that counts as solved; by default the one in the run's config, if any.
    Raises ValueError as `read_metrics` and `read_config` do, and for a `png_path` that does not end
    in .png; OSError where it cannot be written. A file already there is then left as it was.
    """
    run = load_run(metrics_path)
    figure, end = _new_figure(8.6), run.metrics["step"].max(initial=0)
    grid = figure.add_gridspec(3, 4, height_ratios=[2.4, 1, 1])
    large = _new_axes(figure, grid[0, :], end)
    _draw_returns(large, run, solved_return([run], threshold))
    length, *others, shares = [_new_axes(figure, grid[i], end, 10) for i in range(4, 12)]
    _draw_episodes(length, run, "length")
    length.set_title("episode length", loc="left", color=ORANGE, size=10)
    for axes, left, right in itertools.zip_longest(others, LEFT, RIGHT):
        _draw_panel(axes, run, left, BLUE, "left")
        if right:
            _draw_panel(axes.twinx(), run, right, RED, "right")
    _draw_shares(shares, time_shares(run))
    _save(figure, large, headline(run), png_path)


def plot_comparison(metrics_paths, png_path, threshold=None):
    """Draw the returns of several runs, seeds averaged, over steps and over minutes, to a PNG.

    Thin lines are runs; a thick line and its band are mean ± sample standard deviation of a group
    (see `group_runs`). Evaluation returns, or training returns unless every run has evaluations.
    `threshold` and errors as in `plot_training_curves`; ValueError too if no path is given.
    """
    runs = [load_run(path) for path in dict.fromkeys(map(str, metrics_paths))]
    if not runs:
        raise InputError("a comparison needs at least one metrics file, got none")
    evaluated = all(len(run.evaluations()[0]) for run in runs)
    kind = "evaluation return" if evaluated else "training return"
    figure = _new_figure(5.2)
    grid = figure.add_gridspec(1, 2)
    for i, (x_name, x_label, unit) in enumerate(X_AXES):
        ends = [np.nanmax(run.column(x_name), initial=0) / unit for run in runs]
        axes = _new_axes(figure, grid[i], max(ends))
        axes.set_xlabel(x_label, size=13)
        for (label, group), color in zip(group_runs(runs), itertools.cycle(PALETTE)):
            curves = [return_curve(run, x_name, evaluated) for run in group]
            _draw_group(axes, [(x / unit, y) for x, y in curves if len(x)], label, color)
        _draw_threshold(axes, solved_return(runs, threshold))
    axes.sharey(figure.axes[0])
    figure.axes[0].set_ylabel(kind, size=13)
    envs = {run.env for run in runs}
    title = f"{kind} of {len(runs)} runs"
    _save(figure, axes, f"{envs.pop()} · {title}" if len(envs) == 1 else title, png_path)


def _new_figure(height):
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    return Figure(figsize=(11, height), dpi=160, layout="constrained", facecolor="white")


def _new_axes(figure, cell, end, size=13):
    """Plain axes over x from 0 to `end`, with tick labels of `size` points."""
    axes = figure.add_subplot(cell)
    axes.spines[:].set_visible(False)
    axes.grid(color="#E6E6E6")
    axes.set_axisbelow(True)
    axes.set_xlim(0, 1.01 * end or 1)
    axes.locator_params(nbins=6 if size > 10 else 4)
    axes.xaxis.set_major_formatter(lambda x, _: short(x))
    axes.tick_params(labelsize=size, length=0, pad=6)
    if not end:
        axes.text(0.5, 0.6, "no rows yet", transform=axes.transAxes, ha="center", size=size)
    return axes


def _draw_line(axes, x, y, color, **style):
    """The finite points of a line; a lone point gets a marker, as a line would not show it."""
    drawn = np.isfinite(y)
    axes.plot(x[drawn], y[drawn], color=color, marker="o" if drawn.sum() == 1 else "", **style)


def _draw_episodes(axes, run, kind):
    step = run.metrics["step"]
    mean, low, high = episode_band(run, kind)
    drawn = np.isfinite(low) & np.isfinite(high)
    axes.fill_between(step[drawn], low[drawn], high[drawn], color=ORANGE, alpha=0.18, linewidth=0)
    _draw_line(axes, step, mean, ORANGE, linewidth=1.8, label="training: mean, range")


def _draw_returns(axes, run, threshold):
    """The large panel: training and evaluation return, and where the threshold was reached."""
    axes.set_xlabel("environment steps", size=13)
    axes.set_ylabel("return per episode", size=13)
    _draw_episodes(axes, run, "return")
    mean, std, step, wall = run.evaluations()
    axes.fill_between(step, mean - std, mean + std, color=BLUE, alpha=0.22, linewidth=0)
    line = "o-" if len(mean) < 50 else "-"  # more markers would hide the line
    label = "evaluation: mean ± std"
    axes.plot(step, mean, line, color=BLUE, linewidth=2.4, markersize=5, label=label)
    _draw_threshold(axes, threshold)
    reached = np.flatnonzero(mean >= threshold) if threshold is not None else []
    for i in reached[:1]:
        axes.axvline(step[i], color=GREEN, linestyle=":")
        axes.plot(step[i], mean[i], "*", color=GREEN, markersize=18, markeredgecolor="white")
        text = f" {threshold:g} reached \n {when(step[i], wall[i])} "
        side = "right" if step[i] > axes.get_xlim()[1] / 2 else "left"
        place = axes.get_xaxis_transform()
        axes.text(step[i], 0.05, text, transform=place, ha=side, color=GREEN, size=13)


def _draw_threshold(axes, threshold):
    if threshold is not None:
        label = f"solved ({threshold:g})"
        axes.axhline(threshold, color=GREEN, linewidth=1.8, linestyle="--", label=label)


def _draw_panel(axes, run, name, color, side):
    """One column in a small panel: every row thin, the smoothed line on top."""
    step, values = run.metrics["step"], run.column(name)
    axes.set_title(name.replace("_", " "), loc=side, color=color, size=10)
    axes.tick_params(axis="y", which="both", labelsize=10, length=0)
    axes.spines[:].set_visible(False)
    _draw_line(axes, step, values, color, linewidth=0.8, alpha=0.25)
    _draw_line(axes, step, smooth(values), color, linewidth=1.6)
    if name == "learning_rate" and spans_decades(values):
        axes.set_yscale("log")
        return
    axes.set_ylim(limits(values))
    axes.locator_params(axis="y", nbins=4)
    axes.yaxis.set_major_formatter(lambda y, _: short(y))


def _draw_shares(axes, shares):
    """Where the time goes: a bar for each stage with its percentage."""
    axes.set_title("share of time", loc="left", color=BLUE, size=10)
    axes.grid(visible=False)
    bars = axes.barh(list(shares), list(shares.values()), color=BLUE)
    axes.bar_label(bars, [f"{100 * share:.0f} %" for share in shares.values()], padding=3, size=10)
    axes.set_xlim(0, 1.3 * max(shares.values(), default=1))
    axes.set_xticks([])
    axes.set_yticks(range(len(shares)), list(shares))
    axes.invert_yaxis()


def _draw_group(axes, curves, label, color):
    """The runs of a group, thin, and on top of them their mean ± std where all of them are."""
    for x, y in curves:
        _draw_line(axes, x, y, color, linewidth=0.9, alpha=0.5)
    x, mean, spread = mean_curve(curves) if curves else np.empty((3, 0))
    axes.fill_between(x, mean - spread, mean + spread, color=color, alpha=0.2, linewidth=0)
    axes.plot(x, mean, color=color, linewidth=2.6, label=f"{label} (n = {len(curves)})")


def _save(figure, axes, title, png_path):
    """Put title and legend on top, and write the PNG whole or not at all."""
    handles, labels = axes.get_legend_handles_labels()
    columns = np.clip(108 // (7 + max(map(len, labels))), 1, 4)  # what fits the width
    bold = {"weight": "bold", "size": min(15, 1250 / len(title))}
    style = {"loc": "outside upper left", "alignment": "left", "frameon": False, "fontsize": 13}
    figure.legend(handles, labels, title=title, title_fontproperties=bold, ncols=columns, **style)
    path = Path(png_path)
    if path.suffix != ".png":
        raise InputError(f"{path}: the picture is a PNG, so its name must end in .png")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.tmp.png")
    try:
        figure.savefig(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# -------------------------------------------------------------------------------- the command line


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(message)


def main(argv=None):
    """`python viz.py METRICS.csv …`: the exit code; 2, and one line, for a user's mistake."""
    parser = _Parser(prog="viz.py", description="Draw a run's training curves, or compare runs.")
    parser.add_argument("metrics", nargs="+", type=Path, help="metrics.csv of a run, or of several")
    parser.add_argument("--out", type=Path, help="PNG to write (default: in the folder plots)")
    parser.add_argument("--threshold", type=float, help="return that is solved (default: config's)")
    try:
        args = parser.parse_args(argv)
        if args.threshold is not None and not math.isfinite(args.threshold):
            raise InputError(f"--threshold must be a finite number, got {args.threshold}")
        if len(args.metrics) > 1:
            out = args.out or Path("plots", "comparison.png")
            plot_comparison(args.metrics, out, args.threshold)
        else:
            out = args.out or _default_png(args.metrics[0])
            plot_training_curves(args.metrics[0], out, args.threshold)
    except (InputError, OSError) as error:
        print(f"viz.py: {error}", file=sys.stderr)
        return 2
    print(out)
    return 0


def _default_png(metrics):
    path = metrics if metrics.parent.name else metrics.absolute()
    if path.parent.name == RUN_FOLDER and path.name == "metrics.csv":
        return path.parent.parent / "plots" / "training_curves.png"
    return metrics.with_suffix(".png")


if __name__ == "__main__":
    raise SystemExit(main())
