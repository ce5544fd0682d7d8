"""Draw training curves, comparisons of runs and gaits, from the files that a run leaves on disk.

    python viz.py checkpoints_walker/metrics.csv    # one run: its training curves
    python viz.py */checkpoints_walker/metrics.csv  # several runs: settings and seeds compared
    python viz.py videos/best.npz                   # an episode of `evaluate --record`: its gait

It also works while a training is still writing its files. The numbers come from `metrics.csv`; the
environment's name, the seed and the solved threshold from the `config.json` beside it, if present.
The only function that looks inside an environment is `gait_state`, which measures a walker's pose.
"""

import argparse
import contextlib
import itertools
import json
import re
import subprocess
import sys
import zlib
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np

# The colors of Okabe and Ito, which people with any kind of color vision can tell apart.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PALETTE = (BLUE, RED, GREEN, "#CC79A7", ORANGE, "#56B4E9")
COLORS = {"hind": BLUE, "front": "#333333", "hull": "#888888"}

# The panels of a run's training curves, row by row: below the returns, columns of the metrics.
PANELS = (
    ("returns", "returns", "returns", "returns"),
    ("length_mean", "explained_variance", "value_loss", "policy_loss"),
    ("entropy", "action_std", "approx_kl", "clip_fraction"),
    ("learning_rate", "steps_per_s", "collect_s", "update_s"),
)
# A last row: the settings of the run that moved.
MOVING = ("action_cost", "failure_cost", "entropy_coef", "desired_kl")
X_AXES = {"step": ("environment steps", 1), "wall_s": ("wall-clock minutes", 60)}

# What the .npz of an episode holds that is read here: for each step, or one number for all.
GAIT_ARRAYS = ("rewards", "terminated", "hull", "joints", "knees", "contacts")
VALUE_ARRAYS = ("values", "next_values", "episode", "learned_rewards", "failed")

# A BipedalWalker, in metres: a shin's length; the hull's corners and the hip, from its center.
SHIN = 34 / 30
HULL = np.array([(-30, 9), (6, 9), (34, 1), (34, -8), (-30, -8)]) / 30
HIP = np.array([0, -8]) / 30
# The thighs' angles to the hull, in radians, where those of the hips are 0.
THIGHS = np.array([-0.05, 0.05])
FOOT = 0.2  # this share of a shin, from its lower end up, is the foot


class InputError(ValueError):
    """A user's mistake; the message is one line: what is wrong, where, and what would be right."""


# ---------------------------------------------------------------------------------------- files


def read_metrics(path):
    """Read a metrics file, which may belong to a run that is still training.

    Returns a dict of column name -> (rows,) float64 array, with NaN for an empty cell. A torn last
    line, without its newline, is left out.
    Raises InputError, naming the file, if it cannot be read, has no column `step`, has a cell that
    is not a number or a line with too many or too few cells, or if `step` does not always increase.
    """
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    header, *lines = text.split("\n")
    names = header.split(",")
    if "step" not in names:
        raise InputError(f"{path}: no column 'step' in its first line, {header[:60]!r}")
    # a line without its newline is torn
    rows = [line.split(",") for line in lines[:-1]]
    table = np.empty((len(rows), len(names)))
    for i, cells in enumerate(rows):
        where = f"{path}, line {i + 2}"
        if len(cells) != len(names):
            raise InputError(f"{where}: {len(cells)} cells under {len(names)} names")
        try:
            table[i] = [float(cell or "nan") for cell in cells]
        except ValueError as error:
            raise InputError(f"{where}: {error}") from error
    metrics = dict(zip(names, table.T, strict=True))
    if not np.isfinite(metrics["step"]).all() or (np.diff(metrics["step"]) <= 0).any():
        raise InputError(f"{path}: 'step' must be a number that increases from row to row")
    return metrics


def read_config(metrics_path):
    """Read the settings beside a metrics file: config.json, or X_config.json of X_metrics.csv.

    Returns {} if there is no such file. Raises InputError if it is not a JSON object.
    """
    path = Path(str(metrics_path).removesuffix("metrics.csv") + "config.json")
    try:
        config = dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not a JSON object: {error}") from error
    return config


class Run(NamedTuple):
    """One training run, as its files describe it."""

    name: str  # of its folder, without a seed at the end
    env: str  # without the module that it comes from
    settings: dict  # the part of the config that distinguishes experiments
    config: dict  # config.json; empty if there is none
    metrics: dict  # column name -> (rows,) float64, as returned by `read_metrics`

    def column(self, name):
        """Values of a column, (rows,); all NaN if the file has no such column."""
        return self.metrics.get(name, np.full_like(self.metrics["step"], np.nan))

    def evaluations(self):
        """Return's mean and std, step and seconds of every evaluation, each (evaluations,)."""
        evaluated = np.isfinite(self.column("eval_return_mean"))
        names = ("eval_return_mean", "eval_return_std", "step", "wall_s")
        return [self.column(name)[evaluated] for name in names]


def load_run(metrics_path):
    """Read a metrics file and the config beside it. Raises InputError as the two readers do."""
    path, config = Path(metrics_path).resolve(), read_config(metrics_path)
    folder = path.parent.parent if path.parent.name == "checkpoints_walker" else path.parent
    # "pretrained" of pretrained_metrics.csv
    prefix = path.stem.removesuffix("metrics").rstrip("_")
    seed = rf"[-_. ]?seed[-_ ]?\d+$|[-_]{config.get('seed')}$"
    name = re.sub(seed, "", prefix or folder.name) or folder.parent.name
    env = str(config.get("env", name)).split(":")[-1]
    own = {"seed", "out", *(key for key in config if key.startswith("_"))}
    settings = {key: config[key] for key in sorted(config) if key not in own}
    return Run(name, env, settings, config, read_metrics(metrics_path))


def read_arrays(npz_path, names):
    """Read arrays, as float64, of an .npz that `walker.py evaluate` wrote.

    Raises InputError if it is another kind of file, damaged, or lacks one of the names; OSError if
    it cannot be opened.
    """
    try:
        with open(npz_path, "rb") as opened, np.load(opened) as file:
            return {name: np.asarray(file[name], np.float64) for name in names}
    except (KeyError, ValueError, TypeError, EOFError, RuntimeError, BadZipFile, zlib.error) as e:
        raise InputError(f"{npz_path}: no data of `walker.py evaluate`: {e}") from e


# -------------------------------------------------------------------------------------- numbers


def smooth(values, weights=1.0):
    """Weighted mean over a window of rows around each row: (rows,) in, (rows,) out.

    NaN is ignored; the result is NaN only where the window holds no value.
    """
    known = np.isfinite(values)
    weights = np.where(known, weights, 0.0)
    totals = _reduce_windows(np.sum, weights)
    sums = _reduce_windows(np.sum, weights * np.where(known, values, 0.0))
    # 0 / 0 is NaN
    with np.errstate(invalid="ignore"):
        return sums / totals


def _reduce_windows(reduce, values):
    """Apply `reduce` to a window around each row, cut short at both ends: (rows,).

    The window spans a fiftieth of all rows, which removes noise but keeps the shape.
    """
    half = len(values) // 100
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return np.array([reduce(window) for window in windows])


def episode_band(run):
    """Mean, lowest and highest return of training episodes, each (rows,).

    A row covers the episodes that ended in a window of iterations around it, and all of them count
    the same. NaN where none ended.
    """
    episodes = np.nan_to_num(run.column("episodes"), nan=1)
    mean = smooth(run.column("return_mean"), weights=episodes)
    # Unlike nanmin and nanmax, fmin and fmax do not warn about a window of NaN.
    low = _reduce_windows(np.fmin.reduce, run.column("return_min"))
    high = _reduce_windows(np.fmax.reduce, run.column("return_max"))
    return mean, low, high


def headline(run):
    """Title of a run's curves: environment, seed and best evaluation so far."""
    name = f"{run.env} · seed {run.config['seed']}" if "seed" in run.config else run.env
    mean, std, step, wall = run.evaluations()
    if len(mean) == 0:
        return f"{name} · no evaluation yet"
    i = mean.argmax()
    return f"{name} · best evaluation {mean[i]:.0f} ± {std[i]:.0f} at {when(step[i], wall[i])}"


def when(step, seconds):
    """A moment of a run as text, e.g. "1.2M steps, 6.5 min"."""
    return f"{short(step)} steps, {seconds / 60:.1f} min"


def short(number, _position=None):
    """A number as short text: 950, 20k, 0.5M, −0.01. Matplotlib passes a tick's position too."""
    if abs(number) >= 1e5:
        text = f"{number / 1e6:.3g}M"
    elif abs(number) >= 1e3:
        text = f"{number / 1e3:.3g}k"
    else:
        text = f"{number:.3g}"
    return text.replace("-", "−")


def limits(values):
    """Limits (low, high) of a y axis that shows 98 % of the values, so that no spike flattens it.

    The axis starts at zero if no value is negative. (0, 1) if there is no value.
    """
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return 0.0, 1.0
    low, high = np.percentile(values, [1, 99])
    if values.min() >= 0:
        return 0.0, 1.1 * high or 1.0
    margin = 0.1 * (high - low) or 1.0
    return low - margin, high + margin


def group_runs(runs):
    """Group runs by experiment: a list of (label, runs), in the order given.

    Runs belong to the same experiment if their configs differ only in seed and folder or, without
    configs, if their folders have the same name. The label lists the settings that differ between
    experiments; it is the folder's name if those are many, the environment if there are none.
    """
    groups = {}
    for run in runs:
        experiment = json.dumps(run.settings) if run.config else run.name
        groups.setdefault(experiment, []).append(run)
    settings = [group[0].settings for group in groups.values() if group[0].config]
    differing = []
    for key in sorted(set().union(*settings)):
        if any(one.get(key) != settings[0].get(key) for one in settings):
            differing.append(key)
    return [(_label(group[0], differing), group) for group in groups.values()]


def _label(run, differing):
    """Label of the experiment that a run belongs to, given the settings that differ."""
    if not run.config or len(differing) > 3:
        return run.name
    parts = [f"{key.replace('_', ' ')} {run.settings.get(key, '–')}" for key in differing]
    return ", ".join(parts) or run.env


def return_curve(run, x_column, unit, evaluated):
    """Points x / unit and y, each (points,), of a run's evaluation or training returns."""
    y = run.column("eval_return_mean") if evaluated else episode_band(run)[0]
    x = run.column(x_column)
    known = np.isfinite(x) & np.isfinite(y)
    return x[known] / unit, y[known]


def mean_curve(curves, points=200):
    """Mean of curves over the range of x that all of them cover, interpolated on a common grid.

    `curves` is a list of (x, y), each (n,) with n ≥ 1 and increasing x. Returns the grid, the mean
    and the sample standard deviation (zero for a single curve), each (points,), or (0,) if there is
    no common range or no curve.
    """
    if not curves:
        return np.empty((3, 0))
    start, end = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    grid = np.linspace(start, end, points if start <= end else 0)
    values = np.array([np.interp(grid, x, y) for x, y in curves])  # (curves, points)
    std = values.std(axis=0, ddof=1) if len(curves) > 1 else np.zeros_like(grid)
    return grid, values.mean(axis=0), std


def solved_threshold(runs):
    """The return that counts as solved, if all configs agree on one; else None."""
    thresholds = {(run.config.get("_about") or {}).get("reward_threshold") for run in runs}
    return thresholds.pop() if len(thresholds) == 1 else None


def realized_returns(data):
    """Discounted return from each step to the end of its episode: (steps,).

    `data` is what `plot_value` reads from an .npz, its rewards as they were learned from.
    If an episode did not fail, the value of its last observation stands for what would follow.
    """
    rewards = data["learned_rewards"]
    # right at an episode's end
    following = np.where(data["failed"], 0, data["next_values"])
    returns = rewards + data["gamma"] * following
    for t in reversed(range(len(rewards) - 1)):
        if data["episode"][t] == data["episode"][t + 1]:
            returns[t] = rewards[t] + data["gamma"] * returns[t + 1]
    return returns


# ----------------------------------------------------------------------------------------- gait


def gait_state(env):
    """Pose of a BipedalWalker, which its observation does not tell; {} for another environment.

    Units are metres, radians, seconds and N m. Returns float64 arrays:
    - hull (6,): x, y, angle, and the rates of these three;
    - joints (4, 3): angle, rate and motor torque of hip, knee, hip, knee;
    - knees (2, 3): x, y, and the height of the ground below;
    - contacts (2, 2): the lowest and the highest point at which each leg is touched, in lengths of
      a shin above its lower end (above 1, on the thigh); NaN while the leg is in the air.
    """
    with contextlib.suppress(AttributeError, TypeError, ValueError, IndexError):
        return _pose(env.unwrapped)
    return {}


def _pose(walker):
    body, thighs, shins = walker.hull, walker.legs[0::2], walker.legs[1::2]
    hull = np.array([*body.position, body.angle, *body.linearVelocity, body.angularVelocity])
    inverse_dt = 50  # Box2D turns an impulse per step into a torque with it
    joints = np.array([(j.angle, j.speed, j.GetMotorTorque(inverse_dt)) for j in walker.joints])
    knees = np.array([shin.GetWorldPoint((0, SHIN / 2)) for shin in shins])
    ground = np.interp(knees[:, 0], walker.terrain_x, walker.terrain_y)
    knees = np.column_stack([knees, ground])
    contacts = np.full((2, 2), np.nan)
    for leg, (thigh, shin) in enumerate(zip(thighs, shins, strict=True)):
        points = _contact_points(thigh) + _contact_points(shin)
        heights = [shin.GetLocalPoint(point)[1] / SHIN + 0.5 for point in points]
        if heights:
            contacts[leg] = min(heights), max(heights)
    return {"hull": hull, "joints": joints, "knees": knees, "contacts": contacts}


def _contact_points(body):
    """World coordinates (x, y) of all points at which a Box2D body is touched."""
    points = []
    for edge in body.contacts:
        if edge.contact.touching:
            count = edge.contact.manifold.pointCount
            points += edge.contact.worldManifold.points[:count]
    return points


def load_gait(npz_path):
    """The first episode of an .npz, and what `name_gait` finds in it, in one dict."""
    data = read_arrays(npz_path, ("dt", "episode", *GAIT_ARRAYS))
    first = data["episode"] == 0
    gait = {"dt": data["dt"]} | {name: data[name][first] for name in GAIT_ARRAYS}
    return gait | name_gait(gait)


def name_gait(data):
    """Measure and name the gait of one episode, given as `GAIT_ARRAYS` and `dt`.

    `gait` is the first of these names that applies, and `why` the reason in words:
    - falling: the episode ended in a fall, which is rewarded with at most -50;
    - kneeling: in over 5 % of the steps, a leg touches the ground above its foot, which is the
      lowest fifth of the shin;
    - hopping: in over 5 % of the steps no leg is down, and either both are down in most of the
      others, or one leg is down in under 5 % of all steps;
    - shuffling: a leg is down in over 90 % of the steps, or both are in over 60 %, or strides are
      shorter than 0.5 m (a fifth of a leg's length, so no leg swings clear of the ground);
    - walking: the legs take turns, with or without a flight phase.

    Also returns `legs`, the names of the two legs in the order of the arrays; `down` and `knee`,
    (steps, 2) bool: the leg is on the ground, or on it above the foot; `height`, (steps,): of the
    hull above the ground, m; `work`, (steps,): of all motors, J; `starts`: the steps at which a
    stride begins; `speed`, m/s; `hull_height`, m; `energy_per_m`, J/m, NaN if it walked under 1 m;
    `stride_hz`, strides per second, NaN for fewer than four strides.
    """
    dt, x, y = data["dt"], data["hull"][:, 0], data["hull"][:, 1]
    lowest, highest = data["contacts"][:, :, 0], data["contacts"][:, :, 1]
    down, knee = _without_chatter(np.isfinite(lowest)), highest > FOOT
    # A stride begins whenever the leg that lands more often lands.
    starts = max((np.flatnonzero(leg[1:] & ~leg[:-1]) + 1 for leg in down.T), key=len)
    knee_x, other_knee_x = data["knees"][:, :, 0].mean(axis=0)
    legs = ["hind", "front"] if knee_x <= other_knee_x else ["front", "hind"]
    distance = x[-1] - x[0]
    gait, why = _classify(down, knee, legs, len(starts), distance)
    if data["terminated"][-1] and data["rewards"][-1] <= -50:
        gait, why = "falling", f"after {dt * len(x):.1f} s of {gait}"

    height = y - data["knees"][:, :, 2].mean(axis=1)
    rate, torque = data["joints"][:, :, 1], data["joints"][:, :, 2]
    work = dt * np.abs(rate * torque).sum(axis=1)
    speed = distance / (dt * max(1, len(x) - 1))
    energy = work.sum() / distance if distance > 1 else np.nan
    stride_hz = (len(starts) - 1) / (dt * np.ptp(starts)) if len(starts) > 3 else np.nan
    name = {"gait": gait, "why": why, "legs": legs}
    arrays = {"down": down, "knee": knee, "starts": starts, "height": height, "work": work}
    numbers = {"speed": speed, "energy_per_m": energy, "stride_hz": stride_hz}
    return name | arrays | numbers | {"hull_height": height.mean()}


def _classify(down, knee, legs, strides, distance):
    """Gait and the reason for it by the rules of `name_gait`, apart from falling."""
    kneeling = knee.mean(axis=0)
    if kneeling.max() > 0.05:
        share, leg = 100 * kneeling.max(), legs[kneeling.argmax()]
        return "kneeling", f"the {leg} shin is on the ground in {share:.0f} % of the steps"
    legs_down = down.sum(axis=1)
    air, one, both = np.mean(legs_down == 0), np.mean(legs_down == 1), np.mean(legs_down == 2)
    used = down.mean(axis=0)
    stride = distance / max(1, strides)
    why = f"{strides} strides of {stride:.1f} m, {100 * air:.0f} % of the steps in the air"
    if air > 0.05 and (both > one or used.min() < 0.05):
        return "hopping", why
    if used.max() > 0.9 or both > 0.6 or stride < 0.5:
        return "shuffling", why
    return "walking", why


def _without_chatter(down):
    """Contact flags (steps, 2), in which lifting a leg for one or two steps does not count."""
    steady = down.copy()
    for leg in (0, 1):
        for before, after in itertools.pairwise(np.flatnonzero(down[:, leg])):
            if after - before <= 3:
                steady[before:after, leg] = True
    return steady


# ------------------------------------------------------------------------------------- pictures


def plot_training_curves(metrics_path, png_path):
    """Draw the training curves of one run.

    Raises InputError as `read_metrics` and `read_config` do, or if `png_path` does not end in .png;
    OSError if the picture cannot be written. A picture already there is then left as it was.
    """
    run = load_run(metrics_path)
    end = run.metrics["step"].max(initial=0)
    moved = [name for name in MOVING if np.unique(run.column(name)).size > 1]
    rows = [*PANELS, [*moved, *"..."][:4]] if moved else PANELS
    figure, panels = _new_figure(2 + 2 * len(rows), rows, [2.4, 1, 1, 1, 1][: len(rows)])
    returns = panels.pop("returns")
    _set_axes(returns, end, 13, "environment steps", "return per episode")
    _draw_returns(returns, run, solved_threshold([run]))
    for name, axes in panels.items():
        _set_axes(axes, end, size=10)
        _draw_column(axes, run, name)
    _save(figure, returns, headline(run), png_path)


def plot_comparison(metrics_paths, png_path):
    """Draw the returns of several runs over steps and over minutes, averaged over seeds.

    Thin lines are runs. A thick line and its band are the mean ± sample standard deviation of the
    runs of one experiment, see `group_runs`. The returns are those of evaluations if every run has
    some, else of training episodes. Errors are as in `plot_training_curves`; ValueError too if
    there is no path.
    """
    # one given twice counts once
    paths = dict.fromkeys(str(path) for path in metrics_paths)
    runs = [load_run(path) for path in paths]
    evaluated = all(np.isfinite(run.column("eval_return_mean")).any() for run in runs)
    kind = "evaluation return" if evaluated else "training return"
    figure, panels = _new_figure(5.2, [["step", "wall_s"]])
    for column, axes in panels.items():
        x_label, unit = X_AXES[column]
        end = max(np.nanmax(run.column(column), initial=0) for run in runs)
        _set_axes(axes, end / unit, 13, x_label, kind if column == "step" else "")
        for (label, group), color in zip(group_runs(runs), itertools.cycle(PALETTE)):
            curves = [return_curve(run, column, unit, evaluated) for run in group]
            _draw_curves(axes, curves, color, label)
        _draw_threshold(axes, solved_threshold(runs))
    envs = {run.env for run in runs}
    env = envs.pop() if len(envs) == 1 else "different environments"
    _save(figure, axes, f"{env} · {kind} of {len(runs)} runs", png_path)


def plot_gait(npz_path, png_path):
    """Draw the gait of an episode, the first in its .npz, and print a two-line report of it.

    Returns what `load_gait` does and the report as `text`. Raises InputError if the file is not an
    episode of a BipedalWalker, and as `plot_training_curves` does.
    """
    gait = load_gait(npz_path)
    lines = _gait_lines(gait)
    rows = [["strip"] * 4, ["footfall"] * 4, [*lines][:4], [*lines][4:]]
    figure, panels = _new_figure(8.6, rows, [1.2, 0.7, 1.3, 1.3])
    _draw_footfall(panels["strip"], panels["footfall"], gait)
    for title in lines:
        panels[title].set_title(title, loc="left", size=10)
        _draw_strides(panels[title], gait, lines[title])
    text = (
        f"{gait['gait']}: {gait['why']}\n{gait['speed']:.1f} m/s · {gait['energy_per_m']:.0f} J/m"
        f" · hull {gait['hull_height']:.1f} m high · {gait['stride_hz']:.1f} strides/s"
    ).replace("nan", "–")
    _save(figure, panels["footfall"], f"{Path(npz_path).stem} · {text}", png_path)
    print(text)
    return gait | {"text": text}


def plot_value(npz_path, png_path):
    """Draw predicted values against realized returns.

    Returns one line of text with three numbers over all steps, in units of normalized reward:
    explained variance, bias (the mean of prediction - return) and RMSE. Errors as in `plot_gait`.
    """
    data = read_arrays(npz_path, (*VALUE_ARRAYS, "gamma"))
    predicted, realized = data["values"], realized_returns(data)
    error, variance = predicted - realized, realized.var()
    explained = 1 - error.var() / variance if variance > 0 else np.nan
    rmse = np.sqrt(np.mean(error**2))
    text = f"explained variance {explained:.3f}, bias {error.mean():+.3f}, RMSE {rmse:.3f}"
    figure, panels = _new_figure(5.2, [["value"]])
    axes = panels["value"]
    _set_axes(axes, None, 13, "predicted value", "realized return")
    axes.plot(predicted, realized, ".", color=BLUE, alpha=0.2, ms=3, label="one step")
    axes.set_xlim(predicted.min() - 0.1, predicted.max() + 0.1)
    axes.axline((0, 0), slope=1, color=GREEN, ls="--", label="perfect prediction")
    _save(figure, axes, f"{Path(npz_path).stem} · {text}", png_path)
    return f"value: {text}"


def film(episode, fps, mp4, gif, measure=None, max_bytes=3_000_000):
    """Film an episode, and make a GIF of the film.

    `episode` yields (environment, dict) after each step. Returns the dicts, each with what
    `measure(environment)` found. H.264 in yuv420p, of at most 20 MB; the GIF has every third frame
    at half its size, and at most `max_bytes`. ValueError if a frame is no picture, OSError if it
    cannot be encoded.
    """
    import imageio

    steps = []
    options = {"fps": fps, "macro_block_size": 2, "output_params": ["-fs", "20M"]}
    # closing: its own `with` leaves the encoder alive after an error
    with contextlib.closing(imageio.get_writer(mp4, **options)) as video:
        for env, step in episode:
            frame = env.render()
            if np.ndim(frame) != 3 or frame.shape[-1] not in (3, 4) or frame.dtype != np.uint8:
                raise ValueError(f"render() gave {np.shape(frame)}, not (height, width, 3) bytes")
            video.append_data(frame)
            steps.append({**step, **(measure(env) if measure else {})})
    filters = "framestep=3,scale=iw/2:-1:flags=area,"
    filters += "split[a][b];[a]palettegen=64[p];[b][p]paletteuse=dither=none"
    command = [imageio.plugins.ffmpeg.get_exe(), "-v", "quiet", "-y", "-i", mp4, "-vf", filters]
    command += ["-fs", str(max_bytes), gif]
    if subprocess.run(command, stdin=subprocess.DEVNULL).returncode != 0:
        # it says nothing itself
        raise OSError("the encoder failed; is the disk full?")
    return steps


def _new_figure(height, rows, heights=(1,)):
    """A figure `height` inches high, and a dict of axes: `rows` of their names, of these heights.

    A name that is repeated in a row stands for axes that span several columns.
    """
    # without pyplot: no display, no global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, height), dpi=160, layout="constrained", facecolor="white")
    style = {"frame_on": False, "axisbelow": True}
    return figure, figure.subplot_mosaic(rows, height_ratios=heights, subplot_kw=style)


def _set_axes(axes, end=None, size=13, x_label="", y_label=""):
    """A grid, short numbers, labels of `size` points, and x from 0 to `end`, if given."""
    axes.set_xlabel(x_label, size=size)
    axes.set_ylabel(y_label, size=size)
    axes.grid(color="#E6E6E6")
    axes.locator_params(nbins=6 if size > 10 else 4)
    axes.xaxis.set_major_formatter(short)
    axes.tick_params(labelsize=size, length=0, pad=6)
    if end is not None:
        axes.set_xlim(0, 1.01 * end or 1)


def _draw_line(axes, x, y, color, **style):
    """Draw the finite points of a line; a single one as a dot, or it would be invisible."""
    known = np.isfinite(y)
    axes.plot(x[known], y[known], "o-" if known.sum() == 1 else "-", color=color, **style)


def _draw_mean(axes, curves, color, label=None):
    """Draw mean ± std of curves over the range of x that all of them cover."""
    x, mean, std = mean_curve(curves)
    axes.fill_between(x, mean - std, mean + std, color=color, alpha=0.2, lw=0)
    axes.plot(x, mean, color=color, lw=2.6, label=label)


def _draw_returns(axes, run, threshold):
    """Draw training and evaluation returns; a star marks the first evaluation at the threshold."""
    steps = run.metrics["step"]
    mean, low, high = episode_band(run)
    known = np.isfinite(low) & np.isfinite(high)
    axes.fill_between(steps[known], low[known], high[known], color=ORANGE, alpha=0.18, lw=0)
    _draw_line(axes, steps, mean, ORANGE, lw=1.8, label="training: mean, range")
    mean, std, step, wall = run.evaluations()
    axes.fill_between(step, mean - std, mean + std, color=BLUE, alpha=0.22, lw=0)
    label = "evaluation: mean ± std" if len(mean) > 0 else None
    axes.plot(step, mean, "o-", color=BLUE, lw=2.4, ms=5, label=label)
    _draw_threshold(axes, threshold)
    if threshold is not None and (mean >= threshold).any():
        first = np.argmax(mean >= threshold)
        label = f"{threshold:g} reached: {when(step[first], wall[first])}"
        axes.plot(step[first], mean[first], "*", color=GREEN, ms=18, label=label)


def _draw_threshold(axes, threshold):
    """Draw the return that counts as solved, if there is one."""
    if threshold is not None:
        axes.axhline(threshold, color=GREEN, lw=1.8, ls="--", label=f"solved ({threshold:g})")


def _draw_column(axes, run, name):
    """Draw one column of the metrics: its rows as a thin line, smoothed as a thick one."""
    step, values = run.metrics["step"], run.column(name)
    _draw_line(axes, step, values, BLUE, lw=0.8, alpha=0.25)
    _draw_line(axes, step, smooth(values), BLUE, lw=1.6)
    axes.set_title(name.replace("_", " "), loc="left", color=BLUE, size=10)
    axes.set_ylim(limits(values))
    axes.yaxis.set_major_formatter(short)


def _draw_curves(axes, curves, color, label):
    """Draw the curves of one experiment, and their mean."""
    curves = [(x, y) for x, y in curves if len(x) > 0]
    for x, y in curves:
        _draw_line(axes, x, y, color, lw=0.9, alpha=0.5)
    _draw_mean(axes, curves, color, f"{label} (n = {len(curves)})")


def _draw_footfall(strip, footfall, gait, moments=12):
    """Draw the walker at some moments on `strip`, and on `footfall` when each leg is down.

    Shows three seconds: the last ones before a fall, else those in the middle of the episode.
    """
    dt, steps, legs = gait["dt"], len(gait["hull"]), gait["legs"]
    shown = min(steps, round(3 / dt))
    start = steps - shown if gait["gait"] == "falling" else (steps - shown) // 2
    strip.set(xlim=(0, 2.4 * moments), ylim=(-0.2, 3.5), aspect="equal", xticks=[], yticks=[])
    strip.axhline(0, color=GREEN)
    for i in range(moments):
        t = start + int((i + 0.5) / moments * shown)
        _draw_walker(strip, gait, t, 2.4 * (i + 0.5))
    _set_axes(footfall, None, 10, "seconds")
    footfall.set(xlim=(dt * start, dt * (start + shown)), yticks=(0, 1), yticklabels=legs)
    for leg, name in enumerate(legs):
        label = "shin or knee down" if leg == 1 else None  # once, for both legs
        _draw_bars(footfall, gait, "down", leg, COLORS[name], f"{name} foot down")
        _draw_bars(footfall, gait, "knee", leg, RED, label)


def _draw_bars(axes, gait, flag, leg, color, label):
    """Draw a bar for every step at which a leg is "down", or its "knee" is."""
    bars = [(gait["dt"] * t, gait["dt"]) for t in np.flatnonzero(gait[flag][:, leg])]
    axes.broken_barh(bars, (leg - 0.4, 0.8), color=color, lw=0, label=label)


def _draw_walker(axes, gait, t, x):
    """Draw the walker at time step t, its hull's center at x and at its height above the ground."""
    position, angle = gait["hull"][t, :2], gait["hull"][t, 2]
    center = np.array([x, gait["height"][t]])
    hull, hip = center + HULL @ _rotation(angle).T, center + _rotation(angle) @ HIP
    axes.fill(hull[:, 0], hull[:, 1], color=COLORS["hull"], clip_on=False)
    # not from hip to knee: Box2D's joints give way when a foot hits the ground
    shin_angles = angle + THIGHS + gait["joints"][t, 0::2, 0] + gait["joints"][t, 1::2, 0]
    for leg, name in enumerate(gait["legs"]):
        knee = center + gait["knees"][t, leg, :2] - position
        foot = knee + _rotation(shin_angles[leg]) @ (0, -SHIN)
        xs, ys = np.transpose([hip, knee, foot])
        axes.plot(xs, ys, color=COLORS[name], lw=3, clip_on=False)
        if gait["knee"][t, leg]:
            axes.plot(xs[1:], ys[1:], color=RED, lw=3, clip_on=False)


def _rotation(angle):
    """The matrix (2, 2) that turns a vector (x, y) counterclockwise by an angle in radians."""
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _draw_strides(axes, gait, lines):
    """Draw lines, each (steps,), averaged over all strides; over time if there are too few."""
    starts, last = gait["starts"], len(gait["hull"]) - 1
    spans, end, x_label = [(0, last)], gait["dt"] * last, "seconds"
    if len(starts) > 3:
        spans, end, x_label = list(itertools.pairwise(starts)), 100, "% of a stride"
    _set_axes(axes, end, 10, x_label)
    parts = gait["legs"] if len(lines) == 2 else ["hull"]
    for line, part in zip(lines, parts, strict=True):
        strides = [line[first : last + 1] for first, last in spans]
        curves = [(np.linspace(0, end, len(stride)), stride) for stride in strides]
        _draw_mean(axes, curves, COLORS[part])


def _gait_lines(gait):
    """Title -> lines, each (steps,): one for each leg, or a single one for the walker."""
    _, _, hull_angle, speed, _, _ = gait["hull"].T
    angle, _, torque = gait["joints"].T  # each (4, steps): hip, knee, hip, knee
    angle, hull_angle = np.degrees(angle), np.degrees(hull_angle)
    angles = {"hip angle, °": angle[0::2], "knee angle, °": angle[1::2]}
    torques = {"hip torque, N m": torque[0::2], "knee torque, N m": torque[1::2]}
    hull = {"hull angle, °": [hull_angle], "hull height, m": [gait["height"]]}
    walker = {"speed, m/s": [speed], "motors' power, W": [gait["work"] / gait["dt"]]}
    return angles | torques | hull | walker


def _save(figure, axes, title, png_path):
    """Add the title and a legend of what `axes` shows; write the PNG completely or not at all."""
    path = Path(png_path)
    if path.suffix != ".png":
        raise InputError(f"{path}: the picture is a PNG, so its name must end in .png")
    handles, labels = axes.get_legend_handles_labels()
    # As many columns, and letters as large, as fit the width.
    columns = max(1, min(4, 108 // (7 + max(len(label) for label in labels))))
    size = min(15, 1250 / max(len(line) for line in title.splitlines()))
    font = {"weight": "bold", "size": size}
    style = {"loc": "outside upper left", "alignment": "left", "frameon": False, "fontsize": 13}
    figure.legend(handles, labels, title=title, title_fontproperties=font, ncols=columns, **style)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.tmp.png")
    try:
        figure.savefig(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


# --------------------------------------------------------------------------------- command line


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(message)


def main(argv=None):
    """Run `python viz.py FILE …`. Returns the exit code: 0, or 2 after a user's mistake."""
    parser = _Parser(prog="viz.py", description="Draw a training or a gait, or compare several.")
    parser.add_argument("files", nargs="+", type=Path, help="metrics.csv of runs, or .npz")
    parser.add_argument("--out", type=Path, help="PNG to write (default: in the plots folder)")
    try:
        args = parser.parse_args(argv)
        first, *others = args.files
        png = args.out or (Path("plots/comparison.png") if others else _default_png(first))
        if first.suffix == ".npz" and not others:
            plot_gait(first, png)
        elif others:
            plot_comparison(args.files, png)
        else:
            plot_training_curves(first, png)
    except (InputError, OSError) as error:
        print(f"viz.py: {error}", file=sys.stderr)
        return 2
    print(png)
    return 0


def _default_png(path):
    """Without --out: the run's plots folder, or beside the file."""
    is_episode = path.suffix == ".npz"
    path = path if path.parent.name else path.absolute()
    plots = path.parent.parent / "plots"
    if path.parts[-2:] == ("checkpoints_walker", "metrics.csv"):
        return plots / "training_curves.png"
    folder = plots if path.parent.name == "videos" else path.parent
    return folder / (f"{path.stem}_gait.png" if is_episode else f"{path.stem}.png")


if __name__ == "__main__":
    raise SystemExit(main())
