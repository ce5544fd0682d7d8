"""Pictures of training and of gaits: from the files a run leaves on disk to PNGs.

    python viz.py checkpoints_walker/metrics.csv    # one run: its training curves
    python viz.py */checkpoints_walker/metrics.csv  # several: settings and seeds compared
    python viz.py videos/best.npz                   # an episode of `evaluate --record`: its gait
    python viz.py videos/{step_200704,best}.npz     # several, side by side: the story of learning

Works while training still writes, and knows nothing of networks or environments: `metrics.csv` has
the numbers; `config.json` beside it, where there is one, the names, the seed and the threshold.
"""

import argparse
import itertools
import json
import re
import sys
import zlib
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np

# Okabe and Ito's palette: told apart with any kind of colour vision.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PALETTE = (BLUE, RED, GREEN, "#CC79A7", ORANGE, "#56B4E9")

# The small panels: what is drawn on the left axes, and on the right axes of the first of them.
LEFT = "policy_loss", "approx_kl", "entropy", "explained_variance", "learning_rate", "steps_per_s"
RIGHT = "value_loss", "clip_fraction", "action_std"
STAGES = {"collect": "collect_s", "update": "update_s", "evaluate": "eval_s"}
X_AXES = (("step", "environment steps", 1), ("wall_s", "wall-clock minutes", 60))

# What an episode's .npz holds: what it is of a BipedalWalker, the last four.
VALUE = "dt gamma reward_scale reward_clip episode rewards terminated values next_values".split()
GAIT = [*VALUE, "hull", "joints", "knees", "contacts"]
LEGS = {"hind": BLUE, "front": "#333333"}
FOOT = 0.2  # this share of a shin, from its end up, is the foot
# BipedalWalker in metres; in the plane of complex numbers, where to multiply is to turn.
HULL, HIP = np.array([-30 + 9j, 6 + 9j, 34 + 1j, 34 - 8j, -30 - 8j]) / 30, -8j / 30


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
    # behind the last newline: nothing, or torn
    names, *rows = [line.split(",") for line in text.split("\n")[:-1] or [text]]
    if "step" not in names:
        raise InputError(f"{path}: no column 'step' in its first line, {text[:60]!r}")
    if rows and len(rows[-1]) < len(names):
        rows.pop()
    for number, row in enumerate(rows, start=2):
        if len(row) != len(names):
            raise InputError(f"{path}, line {number}: {len(row)} cells under {len(names)} names")
        try:
            row[:] = [float(cell or "nan") for cell in row]
        except ValueError as error:  # its message quotes the cell
            raise InputError(f"{path}, line {number}: {error}") from error
    metrics = dict(zip(names, np.array(rows, float).reshape(-1, len(names)).T, strict=True))
    if not np.isfinite(metrics["step"]).all() or (np.diff(metrics["step"]) <= 0).any():
        raise InputError(f"{path}: 'step' must be a number that grows from row to row")
    return metrics


def read_config(metrics_path):
    """The settings beside a metrics file: `config.json`, or `X_config.json` of `X_metrics.csv`.

    Returns {} where there is no such file; raises ValueError where it is not a JSON object.
    """
    path = Path(str(metrics_path).removesuffix("metrics.csv") + "config.json")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not a JSON object: {error}") from error


class Run(NamedTuple):
    """One training run as its files tell it."""

    name: str  # its folder's, without a seed at the end
    env: str  # without the module it is from
    settings: dict  # what makes two runs one experiment: without seed, folder and remarks
    config: dict  # config.json; empty where there is none
    metrics: dict  # column name -> (rows,) float64, as `read_metrics` gives it

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
    folder = path.parents[path.parent.name == "checkpoints_walker"]
    own = path.stem.removesuffix("metrics").rstrip("_")  # "pretrained" of pretrained_metrics.csv
    seed = rf"[-_. ]?seed[-_ ]?\d+$|[-_]{config.get('seed')}$"
    name = re.sub(seed, "", own or folder.name) or folder.parent.name
    env = str(config.get("env", name)).rpartition(":")[2]
    settings = {k: config[k] for k in sorted(config) if k not in ("seed", "out") and k[:1] != "_"}
    return Run(name, env, settings, config, read_metrics(metrics_path))


def read_steps(path, names):
    """Arrays of an .npz that `walker.py evaluate` wrote, float64; their first axis are the steps.

    Raises InputError if it is another file, or lacks one of `names`; OSError if there is none.
    """
    try:
        with open(path, "rb") as opened, np.load(opened) as file:
            return {name: np.asarray(file[name], np.float64) for name in names}
    except (KeyError, ValueError, TypeError, EOFError, RuntimeError, BadZipFile, zlib.error) as e:
        raise InputError(f"{path}: no data of `walker.py evaluate`: {e.args[0]}") from e


def load_gait(path):
    """The first episode of an .npz, and what `name_gait` says of it."""
    data = read_steps(path, GAIT)
    data |= {name: data[name][data["episode"] == 0] for name in GAIT[4:]}
    return data | name_gait(data)


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
    seconds["the rest"] = max(0, np.nanmax(run.column("wall_s"), initial=0) - sum(seconds.values()))
    total = sum(seconds.values())
    return {name: value / total for name, value in seconds.items()} if total else {}


def headline(run):
    """The title of a run's curves: environment, seed, and the best evaluation so far."""
    name = f"{run.env} · seed {run.config['seed']}" if "seed" in run.config else run.env
    mean, std, step, wall = run.evaluations()
    if not len(mean):
        return f"{name} · no evaluation yet"
    i, at = mean.argmax(), when(step[mean.argmax()], wall[mean.argmax()])
    return f"{name} · best evaluation {mean[i]:.0f} ± {std[i]:.0f} at {at}"


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


def return_curve(run, x_name, unit, evaluated):
    """Points x, y, each (points,): evaluation return, or the training episodes' mean return."""
    y = run.column("eval_return_mean") if evaluated else episode_band(run, "return")[0]
    x = run.column(x_name)
    drawn = np.isfinite(x) & np.isfinite(y)
    return x[drawn] / unit, y[drawn]


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


def name_gait(data):
    """The gait of an episode in a word, `gait`, and what was measured of it: metres, seconds, J.

    The first of these that holds; `why` says it in words.
    - falling: it ended in a fall, which pays -100 (the end of the course terminates, too);
    - kneeling: a leg is down above its foot, the lowest fifth of a shin, in over 5 % of the steps;
    - hopping: no leg is down in over 5 % of the steps, and both are in most of the others, or one
      is in under 5 % of all;
    - shuffling: a leg is down in over 90 % of the steps, or both in over 60 %, or a stride is under
      0.5 m, a fifth of a leg: no leg swings clear;
    - walking: none of these: the legs take turns, with or without a flight between.

    Arrays: `down` and `knee`, (steps, 2), whether a leg is down, and above its foot; a lift of two
    steps is chatter. `height` of the hull above the ground, `work` of all motors: (steps,).
    `starts` of strides: when the leg with more of them came down. NaN: there is no such number.
    """
    dt, x, knees = data["dt"], data["hull"][:, 0], data["knees"]
    down, knee = np.isfinite(data["contacts"][..., 0]), data["contacts"][..., 1] > FOOT
    down[1:-2] |= down[:-3] & down[3:]  # a gap of two steps, now of one
    down[1:-1] |= down[:-2] & down[2:]
    starts = max((np.flatnonzero(np.diff(leg * 1) > 0) + 1 for leg in down.T), key=len)
    height = data["hull"][:, 1] - knees[..., 2].mean(axis=1)
    work = dt * np.abs(data["joints"][..., 1:].prod(axis=-1)).sum(axis=1)  # |rate × torque|
    legs = sorted(LEGS, reverse=bool(np.diff(knees[..., 0].mean(axis=0)) >= 0))
    distance, strides = x[-1] - x[0], max(1, len(starts))
    air, one, both = (np.mean(down.sum(axis=1) == count) for count in range(3))
    used, share, leg = down.mean(axis=0), knee.mean(axis=0).max(), legs[knee.mean(axis=0).argmax()]
    hops = air > 0.05 and (both > one or used.min() < 0.05)
    drags = used.max() > 0.9 or both > 0.6 or distance / strides < 0.5
    gait = "hopping" if hops else "shuffling" if drags else "walking"
    why = f"{len(starts)} strides of {distance / strides:.1f} m, {air:.0%} of the steps in the air"
    if share > 0.05:
        gait, why = "kneeling", f"the {leg} shin is on the ground in {share:.0%} of the steps"
    if data["terminated"][-1] and data["rewards"][-1] <= -100:
        gait, why = "falling", f"after {dt * len(x):.1f} s of {gait}"
    found = {"gait": gait, "why": why.replace("%", " %"), "legs": legs, "starts": starts}
    found |= {"down": down, "knee": knee, "height": height, "work": work}
    found |= {"speed": distance / (dt * max(1, len(x) - 1)), "hull_height": height.mean()}
    found["energy_per_m"] = work.sum() / distance if distance > 1 else np.nan
    return found | {"stride_hz": (strides - 1) / (dt * np.ptp(starts)) if strides > 3 else np.nan}


def realised_returns(data):
    """Discounted normalised return from each step to its episode's end: (steps,).

    Rewards are as in training; after a cut episode comes the value of its last observation.
    """
    rewards = np.clip(data["rewards"] / data["reward_scale"], *data["reward_clip"])
    follows = np.where(data["terminated"], 0, data["next_values"])
    for t in reversed(np.flatnonzero(np.diff(data["episode"]) == 0)):
        follows[t] = rewards[t + 1] + data["gamma"] * follows[t + 1]
    return rewards + data["gamma"] * follows


# ------------------------------------------------------------------------------------ the pictures


def plot_training_curves(metrics_path, png_path, threshold=None):
    """Draw the training curves of one run to a PNG.

    `threshold` is the return that counts as solved; by default the one in the run's config, if any.
    Raises ValueError as `read_metrics` and `read_config` do, and for a `png_path` that does not end
    in .png; OSError where it cannot be written. A file already there is then left as it was.
    """
    run = load_run(metrics_path)
    (figure, grid), end = _new_figure(8.6, 4, [2.4, 1, 1]), run.metrics["step"].max(initial=0)
    large = _new_axes(figure, grid[0, :], end, 13, X_AXES[0][1], "return per episode")
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
    evaluated = all(len(run.evaluations()[0]) for run in runs)
    kind = "evaluation return" if evaluated else "training return"
    figure, grid = _new_figure(5.2, 2)
    for i, (x_name, x_label, unit) in enumerate(X_AXES):
        ends = [np.nanmax(run.column(x_name), initial=0) / unit for run in runs]
        axes = _new_axes(figure, grid[i], max(ends), 13, x_label, "" if i else kind)
        for (label, group), color in zip(group_runs(runs), itertools.cycle(PALETTE)):
            curves = [return_curve(run, x_name, unit, evaluated) for run in group]
            curves = [curve for curve in curves if len(curve[0])]
            for x, y in curves:
                _draw_line(axes, x, y, color, linewidth=0.9, alpha=0.5)
            _draw_mean(axes, curves, color, label=f"{label} (n = {len(curves)})")
        _draw_threshold(axes, solved_return(runs, threshold))
    axes.sharey(figure.axes[0])
    envs = {run.env for run in runs}
    title = f"{kind} of {len(runs)} runs"
    _save(figure, axes, f"{envs.pop()} · {title}" if len(envs) == 1 else title, png_path)


def plot_gait(npz_path, png_path):
    """Draw the gait of an .npz's first episode to a PNG; returns its name, numbers and `text`.

    Raises InputError where the file is not an episode of a BipedalWalker, or for the `png_path`.
    """
    gait, (figure, grid) = load_gait(npz_path), _new_figure(8.6, 4, [1.2, 0.7, 1.3, 1.3])
    dt, hull, starts, joints = (gait[name] for name in ("dt", "hull", "starts", "joints"))
    _, footfall = _draw_footfall(figure, grid[0, :], grid[1, :], gait, 12)
    spans = list(itertools.pairwise(starts if len(starts) > 3 else [0, len(hull) - 1]))
    end, unit = (100, "% of a stride") if len(spans) > 1 else (dt * (len(hull) - 1), "seconds")
    hips, knees, angle = joints[:, ::2].T, joints[:, 1::2].T, hull[:, 2]
    panels = {"hip angle, °": np.degrees(hips[0]), "knee angle, °": np.degrees(knees[0])}
    panels |= {"hip torque, N m": hips[2], "knee torque, N m": knees[2]}
    panels |= {"hull angle, °": [np.degrees(angle)], "hull height, m": [gait["height"]]}
    panels |= {"speed, m/s": [hull[:, 3]], "motors' power, W": [gait["work"] / dt]}
    for i, (name, values) in enumerate(panels.items()):
        axes = _new_axes(figure, grid[8 + i], end, 10, unit)
        axes.set_title(name, loc="left", size=10)
        for y, color in zip(values, map(LEGS.get, gait["legs"]), strict=False):
            curves = [(np.linspace(0, end, b + 1 - a), y[a : b + 1]) for a, b in spans]
            _draw_mean(axes, curves, color)
    text = "{gait}: {why}\n{speed:.1f} m/s · {energy_per_m:.0f} J/m · hull {hull_height:.1f} m high"
    text = (text + " · {stride_hz:.1f} strides/s").format(**gait).replace("nan", "–")
    _save(figure, footfall, f"{Path(npz_path).stem} · {text}", png_path)
    print(text)
    return {name: value for name, value in gait.items() if np.ndim(value) == 0} | {"text": text}


def plot_story(npz_paths, png_path):
    """Draw the gaits of several .npz side by side, in the order given; errors as in `plot_gait`."""
    gaits = {Path(path).stem: load_gait(path) for path in npz_paths}
    figure, grid = _new_figure(4, len(gaits), [1.5, 1])
    for i, (name, gait) in enumerate(gaits.items()):
        strip, axes = _draw_footfall(figure, grid[0, i], grid[1, i], gait, 12 // len(gaits) or 1)
        strip.set_title(f"{name}\n{gait['gait']}, {gait['speed']:.1f} m/s", weight="bold", size=13)
    _save(figure, axes, " → ".join(gait["gait"] for gait in gaits.values()), png_path)


def plot_value(npz_path, png_path):
    """Draw predicted against realised returns, and the error over the time to go, to a PNG.

    Returns a line with three numbers: explained variance, bias (the mean of prediction - return)
    and RMSE, over all steps, in normalised reward. Errors as in `plot_gait`.
    """
    data, (figure, grid) = read_steps(npz_path, VALUE), _new_figure(5.2, 2)
    predicted, realised = data["values"], realised_returns(data)
    error, steps, variance = predicted - realised, np.arange(len(realised)), realised.var()
    explained, rmse = 1 - error.var() / (variance or np.nan), np.sqrt(np.mean(error**2))
    text = f"explained variance {explained:.3f}, bias {error.mean():+.3f}, RMSE {rmse:.3f}"
    ends = np.flatnonzero(np.diff(data["episode"], append=np.nan))
    to_go = data["dt"] * (ends[np.searchsorted(ends, steps)] - steps)
    labels = ("predicted value", "realised return"), ("seconds to go", "predicted − realised")
    for i, (x, y) in enumerate(((predicted, realised), (to_go, error))):
        axes = _new_axes(figure, grid[i], x.max(), 13, *labels[i])
        axes.set_xlim(x.min(), x.max() + 1e-9)
        axes.plot(x, y, ".", color=BLUE, alpha=0.1, markersize=2)
        bins = np.array_split(np.argsort(x), min(30, len(x)))
        at, mean, std = zip(*((x[b].mean(), y[b].mean(), y[b].std()) for b in bins), strict=True)
        axes.errorbar(at, mean, std, color=ORANGE, label="mean ± std")
        axes.axline((0, 0), slope=1 - i, color=GREEN, linestyle="--", label="perfect")
    _save(figure, axes, f"{Path(npz_path).stem} · {text}", png_path)
    return f"value: {text}"


def _draw_footfall(figure, above, below, gait, moments):
    """Below, when each leg is down; above, the walker at some moments of it: returns both axes.

    Three seconds: in the middle of the episode, or before a fall the last. Red is what kneels.
    """
    dt, steps = gait["dt"], min(len(gait["hull"]), round(3 / gait["dt"]))
    start = (len(gait["hull"]) - steps) // (1 if gait["gait"] == "falling" else 2)
    axes = _new_axes(figure, below, dt * (start + steps), 10, "seconds")
    axes.set(xlim=(dt * start, dt * (start + steps)), yticks=(0, 1), yticklabels=gait["legs"])
    strip = figure.add_subplot(above, xlim=(0, 2.4 * moments), ylim=(-0.2, 3), aspect="equal")
    strip.set_axis_off()
    strip.axhline(0, color=GREEN)
    t = start + ((np.arange(moments) + 0.5) / moments * steps).astype(int)
    centre = 2.4 * np.arange(moments) + 1.2 + 1j * gait["height"][t]
    turn = np.exp(1j * gait["hull"][t, 2])
    hull, hip = centre + HULL[:, None] * turn, centre + HIP * turn
    strip.fill(hull.real, hull.imag, color="#999999")
    for leg, color in enumerate(map(LEGS.get, gait["legs"])):
        knee = centre + (gait["knees"][t, leg, :2] - gait["hull"][t, :2]) @ (1, 1j)
        foot = knee - (hip - knee) * np.exp(1j * gait["joints"][t, 2 * leg + 1, 0])
        thigh, shin = np.array([[hip, knee], [knee, foot]])
        for line, shade in ((thigh, color), (shin, color), (shin[:, gait["knee"][t, leg]], RED)):
            strip.plot(line.real, line.imag, color=shade, linewidth=3)
        labels = f"{gait['legs'][leg]} foot down", "shin or knee down" * leg  # that one once
        for name, shade, label in zip(("down", "knee"), (color, RED), labels, strict=True):
            bars = [(dt * t, dt) for t in np.flatnonzero(gait[name][:, leg])]
            axes.broken_barh(bars, (leg - 0.4, 0.8), color=shade, linewidth=0, label=label)
    return strip, axes


def _new_figure(height, columns, ratios=(1,)):
    """A figure and its grid, with rows in these ratios."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(11, height), dpi=160, layout="constrained", facecolor="white")
    return figure, figure.add_gridspec(len(ratios), columns, height_ratios=ratios)


def _new_axes(figure, cell, end, size=13, x_label="", y_label=""):
    """Plain axes over x from 0 to `end`, with labels of `size` points."""
    axes = figure.add_subplot(cell, frame_on=False, axisbelow=True, xlim=(0, 1.01 * end or 1))
    axes.set_xlabel(x_label, size=size)
    axes.set_ylabel(y_label, size=size)
    axes.grid(color="#E6E6E6")
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
    _draw_episodes(axes, run, "return")
    mean, std, step, wall = run.evaluations()
    axes.fill_between(step, mean - std, mean + std, color=BLUE, alpha=0.22, linewidth=0)
    line = "o-" if len(mean) < 50 else "-"  # more markers would hide the line
    axes.plot(step, mean, line, color=BLUE, lw=2.4, ms=5, label="evaluation: mean ± std")
    _draw_threshold(axes, threshold)
    for i in np.flatnonzero(mean >= (np.inf if threshold is None else threshold))[:1]:
        axes.axvline(step[i], color=GREEN, linestyle=":")
        axes.plot(step[i], mean[i], "*", color=GREEN, markersize=18, markeredgecolor="white")
        text = f" {threshold:g} reached \n {when(step[i], wall[i])} "
        side = "right" if step[i] > axes.get_xlim()[1] / 2 else "left"
        place = axes.get_xaxis_transform()
        axes.text(step[i], 0.05, text, transform=place, ha=side, color=GREEN, size=13)


def _draw_threshold(axes, threshold):
    if threshold is not None:
        axes.axhline(threshold, color=GREEN, lw=1.8, ls="--", label=f"solved ({threshold:g})")


def _draw_panel(axes, run, name, color, side):
    """One column in a small panel: every row thin, the smoothed line on top."""
    step, values = run.metrics["step"], run.column(name)
    axes.set_title(name.replace("_", " "), loc=side, color=color, size=10)
    axes.tick_params(axis="y", which="both", labelsize=10, length=0)
    _draw_line(axes, step, values, color, linewidth=0.8, alpha=0.25)
    _draw_line(axes, step, smooth(values), color, linewidth=1.6)
    if name == "learning_rate" and spans_decades(values):
        axes.set_yscale("log")
        return
    axes.set(ylim=limits(values), frame_on=False)
    axes.locator_params(axis="y", nbins=4)
    axes.yaxis.set_major_formatter(lambda y, _: short(y))


def _draw_shares(axes, shares):
    """Where the time goes: a bar for each stage with its percentage."""
    axes.set_title("share of time", loc="left", color=BLUE, size=10)
    axes.grid(visible=False)
    bars = axes.barh(list(shares), list(shares.values()), color=BLUE)
    axes.bar_label(bars, [f"{100 * share:.0f} %" for share in shares.values()], padding=3, size=10)
    axes.set(xlim=(0, 1.3 * max(shares.values(), default=1)), xticks=[], yticks=list(shares))
    axes.invert_yaxis()


def _draw_mean(axes, curves, color, label=None):
    """Mean ± std of curves, where all of them are."""
    x, mean, spread = mean_curve(curves) if curves else np.empty((3, 0))
    axes.fill_between(x, mean - spread, mean + spread, color=color, alpha=0.2, linewidth=0)
    axes.plot(x, mean, color=color, linewidth=2.6, label=label)


def _save(figure, axes, title, png_path):
    """Put title and legend on top, and write the PNG whole or not at all."""
    handles, labels = axes.get_legend_handles_labels()
    columns = np.clip(108 // (7 + max(map(len, labels))), 1, 4)  # what fits the width
    bold = {"weight": "bold", "size": min(15, 1250 / max(map(len, title.splitlines())))}
    style = {"loc": "outside upper left", "alignment": "left", "frameon": False, "fontsize": 13}
    figure.legend(handles, labels, title=title, title_fontproperties=bold, ncols=columns, **style)
    path = Path(png_path)
    if path.suffix != ".png":
        raise InputError(f"{path}: the picture is a PNG, so its name must end in .png")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.tmp.png")
    try:
        figure.savefig(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


# -------------------------------------------------------------------------------- the command line


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(message)


def main(argv=None):
    """`python viz.py FILE …`: the exit code; 2, and one line, for a user's mistake."""
    parser = _Parser(prog="viz.py", description="Draw a training or a gait, or compare several.")
    parser.add_argument("metrics", nargs="+", type=Path, help="metrics.csv of runs, or .npz")
    parser.add_argument("--out", type=Path, help="PNG to write (default: in the folder plots)")
    parser.add_argument("--threshold", type=float, help="return that is solved (default: config's)")
    try:
        args = parser.parse_args(argv)
        if args.threshold is not None and not np.isfinite(args.threshold):
            raise InputError(f"--threshold must be a finite number, got {args.threshold}")
        files, out = args.metrics, args.out or _default_png(args.metrics)
        if files[0].suffix == ".npz":
            plot_story(files, out) if len(files) > 1 else plot_gait(files[0], out)
        elif len(files) > 1:
            plot_comparison(files, out, args.threshold)
        else:
            plot_training_curves(files[0], out, args.threshold)
    except (InputError, OSError) as error:
        print(f"viz.py: {error}", file=sys.stderr)
        return 2
    print(out)
    return 0


def _default_png(files):
    path = files[0] if files[0].parent.name else files[0].absolute()
    if len(files) > 1:
        return Path("plots", "story.png" if path.suffix == ".npz" else "comparison.png")
    in_run = path.parts[-2:] == ("checkpoints_walker", "metrics.csv")
    name = "training_curves" if in_run else path.stem + "_gait" * (path.suffix == ".npz")
    plots = path.parents[1] / "plots" if in_run or path.parent.name == "videos" else path.parent
    return plots / f"{name}.png"


if __name__ == "__main__":
    raise SystemExit(main())
