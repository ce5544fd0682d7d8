"""Time to solved, side by side: this trainer and those that one could install instead.

    python tests/benchmarks/time_to_solved.py envpool sync --seeds 11 12 13 14 15
    python tests/benchmarks/time_to_solved.py sb3-ppo sbx-ppo sb3-tqc --seeds 1 2 --limit 14.6
    python tests/benchmarks/time_to_solved.py cleanrl --cleanrl FILE --seeds 1 --limit 14.6
    python tests/benchmarks/time_to_solved.py --report

Every trainer is judged by the same evaluator and rule: BipedalWalker-v3 of Gymnasium, a
deterministic policy, 10 episodes at every look; where their mean reaches 300, the same weights run
100 fresh ones, and it is solved if their mean reaches 300 too. Time is wall-clock from the start of
training; what the looks cost is counted apart. One run after another, each in a process of its own.
A run that has not solved it after --limit minutes of training is ended there, with its return.

Needs, besides requirements.txt: envpool (for that one), stable-baselines3, sb3-contrib, sbx-rl; and
CleanRL's cleanrl/ppo_continuous_action.py (github.com/vwxyzjn/cleanrl), whose path is --cleanrl.
Stable-Baselines3, SBX and TQC have rl-zoo's settings (hyperparams/ppo.yml and tqc.yml), CleanRL its
defaults.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import math
import os
import platform
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))

import walker_core as core

ENV, THRESHOLD = "BipedalWalker-v3", 300
LOOK_EVERY = 100_000  # steps; a quarter for TQC, which needs fewer
TABLE = Path(__file__).with_suffix(".csv")
PICTURE = Path(__file__).parents[2] / "plots/pretrained_time_to_solved.png"
COLUMNS = "trainer,seed,step,train_s,eval_s,return_mean,confirmed_mean,rss_mb".split(",")
OURS = {"envpool": ["--vector-env", "envpool"], "sync": []}
OURS["sync-2"] = "--num-envs 32 --minibatch-size 1024".split()  # each; together as many as one has
OURS["envpool-2"] = [*OURS["envpool"], *OURS["sync-2"]]
PACKAGES = {"sb3-ppo": "stable-baselines3", "sbx-ppo": "sbx-rl", "sb3-tqc": "sb3-contrib"}


class Over(Exception):
    """The run is solved, or has used its time."""


class Judge:
    """Looks at a policy in training, and writes down what it saw."""

    def __init__(self, trainer: str, seed: int, limit_s: float, look_every: int) -> None:
        self.trainer, self.seed, self.limit_s, self.look_every = trainer, seed, limit_s, look_every
        self.train_s = self.eval_s = 0.0
        self.mark, self.next_look = time.perf_counter(), look_every
        self.config = core.Config(env=ENV)

    def look(self, step: int, act) -> None:
        """Evaluate, if it is time to; the clock of the training stands still. Raises Over."""
        if step < self.next_look:
            return
        self.next_look = step - step % self.look_every + self.look_every
        now = time.perf_counter()
        self.train_s += now - self.mark
        seeds = core.env_seeds(self.seed, core.EVALUATE, 10)
        returns, confirmed = self.play(act, seeds), None
        if returns.mean() >= THRESHOLD:
            fresh = core.env_seeds(self.seed, core.CONFIRM, 100, step=step)
            confirmed = self.play(act, fresh).mean()
        self.mark = time.perf_counter()
        self.eval_s += self.mark - now
        mean, rss = returns.mean(), resident_mb(os.getpid())
        write_row(self.trainer, self.seed, step, self.train_s, self.eval_s, mean, confirmed, rss)
        if (confirmed or -math.inf) >= THRESHOLD or self.train_s > self.limit_s:
            raise Over

    def play(self, act, seeds: list[int]) -> np.ndarray:
        """Returns of one episode for each seed, in this process."""
        returns = np.zeros(len(seeds))
        for _, step in core.play(act, self.config, seeds):
            returns[step["episode"]] += step["rewards"]
        return returns


def resident_mb(pid: int) -> float:
    """Of a process and those that it has started."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
        return sum(member.memory_info().rss for member in family) / 1e6
    except psutil.NoSuchProcess:  # it has just ended
        return math.nan


def write_row(*cells: Any) -> None:
    is_new = not TABLE.exists()
    with open(TABLE, "a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(COLUMNS)
        writer.writerow(
            ["" if c is None else f"{c:.6g}" if isinstance(c, float) else c for c in cells]
        )
    print(*(f"{k}={v}" for k, v in zip(COLUMNS, cells, strict=True)), flush=True)


# ---- the trainers --------------------------------------------------------------------------------


def run_ours(trainer: str, seed: int, limit_s: float) -> None:
    """`walker.py` as a user starts it, until it is solved; its metrics.csv tells the times."""
    with tempfile.TemporaryDirectory() as out:
        walker = [str(Path(core.__file__).with_name("walker.py")), *OURS[trainer]]
        how = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [sys.executable, *(how if trainer.endswith("-2") else []), *walker]
        command += ["--seed", str(seed), "--stop-when-solved", "--out", out]
        command += ["--eval-every", str(LOOK_EVERY)]
        began, memory = time.perf_counter(), []  # seconds, MB of all processes
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None:
                memory.append((time.perf_counter() - began, resident_mb(process.pid)))
                if memory[-1][0] > 2 * limit_s:
                    process.terminate()
                time.sleep(2)
        with open(Path(out, core.METRICS_CSV), newline="") as file:
            rows = list(csv.DictReader(file))
        counters = core.load_checkpoint(Path(out, core.LAST))["counters"]
        is_solved = counters["solved_step"] is not None
        best = core.load_checkpoint(Path(out, core.BEST))["counters"]["best_return"]
    eval_s = 0.0
    for row in rows:
        eval_s += float(row["eval_s"])
        if row["eval_return_mean"]:
            train_s, is_end = float(row["wall_s"]) - eval_s, row is rows[-1]
            confirmed = best if is_end and is_solved else None
            mean = float(row["eval_return_mean"])
            rss = [mb for when, mb in memory if when <= float(row["wall_s"])][-1]
            write_row(trainer, seed, int(row["step"]), train_s, eval_s, mean, confirmed, rss)


def sb3_act(model: Any, normalizer: Any) -> Callable[[np.ndarray], np.ndarray]:
    def act(obs: np.ndarray) -> np.ndarray:
        obs = obs if normalizer is None else normalizer.normalize_obs(obs)
        return model.predict(obs, deterministic=True)[0]

    return act


def run_sb3(trainer: str, judge: Judge) -> None:
    """Stable-Baselines3's PPO, SBX's PPO (the same in JAX) and sb3-contrib's TQC."""
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    class Look(BaseCallback):
        def _on_step(self) -> bool:
            judge.look(self.num_timesteps, sb3_act(self.model, normalizer))
            return True

    normalizer = None
    if trainer == "sb3-tqc":
        from sb3_contrib import TQC

        envs = make_vec_env(ENV, seed=judge.seed)
        net = {"log_std_init": -3, "net_arch": [400, 300]}
        settings = {"learning_rate": 7.3e-4, "buffer_size": 300_000, "gamma": 0.98, "tau": 0.02}
        settings |= {"train_freq": 64, "gradient_steps": 64, "learning_starts": 10_000}
        settings |= {"batch_size": 256, "use_sde": True, "policy_kwargs": net}
        model, steps = TQC("MlpPolicy", envs, seed=judge.seed, **settings), 5_000_000
    else:
        if trainer == "sb3-ppo":
            from stable_baselines3 import PPO
        else:
            from sbx import PPO
        envs = normalizer = VecNormalize(make_vec_env(ENV, 32, seed=judge.seed), gamma=0.999)
        settings = {"n_steps": 2048, "batch_size": 64, "gae_lambda": 0.95, "gamma": 0.999}
        settings |= {"n_epochs": 10, "ent_coef": 0.0, "learning_rate": 3e-4, "clip_range": 0.18}
        model, steps = PPO("MlpPolicy", envs, seed=judge.seed, **settings), 5_000_000
    judge.mark = time.perf_counter()
    model.learn(steps, callback=Look())


def run_cleanrl(path: str, judge: Judge) -> None:
    """The script as it is; only its log writer is ours, and looks in after every iteration.

    It was written for Gymnasium 0.29: an argument that is obligatory since 1.0 is filled in.
    """

    class TransformObservation(gym.wrappers.TransformObservation):
        def __init__(self, env: gym.Env, function: Callable) -> None:
            super().__init__(env, function, env.observation_space)

    class Writer:
        def __init__(self, *_: Any) -> None:
            judge.mark = time.perf_counter()

        def add_text(self, *_: Any) -> None:
            pass

        def add_scalar(self, name: str, _value: float, step: int) -> None:
            if name == "charts/SPS":
                script = sys._getframe(1).f_globals
                env = script["envs"].envs[0]
                while not isinstance(env, gym.wrappers.NormalizeObservation):
                    env = env.env
                judge.look(step, cleanrl_act(script["agent"], env.obs_rms))

    gym.wrappers.TransformObservation = TransformObservation
    sys.modules["torch.utils.tensorboard"] = types.SimpleNamespace(SummaryWriter=Writer)
    sys.argv = [path, "--env-id", ENV, "--seed", str(judge.seed), "--total-timesteps", "8000000"]
    runpy.run_path(path, run_name="__main__")


def cleanrl_act(agent: Any, statistics: Any) -> Callable[[np.ndarray], np.ndarray]:
    import torch

    @torch.no_grad()
    def act(obs: np.ndarray) -> np.ndarray:
        obs = (obs - statistics.mean) / np.sqrt(statistics.var + 1e-8)
        obs = torch.as_tensor(np.clip(obs, -10, 10), dtype=torch.float32)
        return np.clip(agent.actor_mean(obs).numpy(), -1, 1)

    return act


def run_one(trainer: str, seed: int, limit_s: float, cleanrl: str | None) -> None:
    if trainer in OURS:
        return run_ours(trainer, seed, limit_s)
    judge = Judge(trainer, seed, limit_s, LOOK_EVERY // (4 if trainer == "sb3-tqc" else 1))
    try:
        run_cleanrl(cleanrl, judge) if trainer == "cleanrl" else run_sb3(trainer, judge)
    except Over:
        pass


# ---- the report ----------------------------------------------------------------------------------


def read_runs() -> dict[str, dict[int, list[dict[str, float]]]]:
    runs: dict[str, dict[int, list[dict[str, float]]]] = {}
    with open(TABLE, newline="") as file:
        for row in csv.DictReader(file):
            seeds = runs.setdefault(row.pop("trainer"), {})
            numbers = {name: float(cell or "nan") for name, cell in row.items()}
            seeds.setdefault(int(numbers["seed"]), []).append(numbers)
    return runs


def report() -> None:
    """A line for each run, a line for each trainer, and the picture."""
    runs = read_runs()
    print(platform.processor() or platform.machine(), os.cpu_count(), "cores")
    for trainer, seeds in runs.items():
        times, steps, whole = [], [], []
        for seed, rows in seeds.items():
            last = rows[-1]
            is_solved = last["confirmed_mean"] >= THRESHOLD
            when = f"solved at step {last['step']:,.0f}" if is_solved else "not solved"
            best = max(row["return_mean"] for row in rows)
            both = last["train_s"] + last["eval_s"]
            spent = f"{last['train_s']:.0f} s, with evaluation {both:.0f} s"
            memory = f"{rows[0]['rss_mb']:.0f} to {last['rss_mb']:.0f} MB"
            print(f"  {trainer} seed {seed}: {when}, {spent}, {memory}; best of 10: {best:.1f}")
            times.append(last["train_s"] if is_solved else math.inf)
            whole.append(last["train_s"] + last["eval_s"] if is_solved else math.inf)
            steps.append(last["step"] if is_solved else math.inf)
        for what, values in (("seconds", times), ("with evaluation", whole), ("steps", steps)):
            spread = f"{min(values):,.0f} to {max(values):,.0f}"
            print(f"{trainer}: {what}: median {statistics.median(values):,.0f} ({spread})")
    draw(runs)


def draw(runs: dict[str, dict[int, list[dict[str, float]]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    names = {"envpool": "this trainer, EnvPool", "sync": "this trainer, SyncVectorEnv"}
    names |= {"sync-2": "this trainer, 2 processes", "cleanrl": "CleanRL PPO"}
    names |= {"envpool-2": "this trainer, EnvPool, 2 processes"}
    names |= {"sb3-ppo": "Stable-Baselines3 PPO", "sbx-ppo": "SBX PPO"}
    names |= {"sb3-tqc": "sb3-contrib TQC"}
    for color, (trainer, label) in zip(plt.color_sequences["tab10"], names.items(), strict=False):
        curves = []
        for rows in runs.get(trainer, {}).values():
            minutes = [row["train_s"] / 60 for row in rows]
            curves.append((minutes, [row["return_mean"] for row in rows]))
            if rows[-1]["confirmed_mean"] >= THRESHOLD:
                axes.plot(minutes[-1], rows[-1]["confirmed_mean"], "o", color=color)
        if curves:  # a run that is over keeps its last return, so that no seed drops out
            first, last = (max(x[i] for x, _ in curves) for i in (0, -1))
            grid = np.geomspace(first, last, 200)
            values = np.stack([np.interp(grid, x, y) for x, y in curves])
            axes.fill_between(grid, values.min(0), values.max(0), color=color, alpha=0.15, lw=0)
            label = f"{label} ({len(curves)})"
            axes.plot(grid, np.median(values, axis=0), color=color, lw=2, label=label)
    axes.axhline(THRESHOLD, color="0.5", lw=1, ls="--")
    axes.set(xscale="log", xlabel="minutes of training, evaluation excluded (log scale)")
    ticks = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50]
    inside = [tick for tick in ticks if axes.get_xlim()[0] < tick < axes.get_xlim()[1]]
    axes.set_xticks(inside, [f"{tick:g}" for tick in inside])
    axes.set_xticks([], minor=True)
    axes.set(ylabel="return, mean of 10 deterministic episodes")
    axes.set_title(
        "BipedalWalker-v3, two cores: median and range of seeds, a dot where one is solved"
    )
    axes.legend(frameon=False)
    figure.savefig(PICTURE, dpi=110)
    print(PICTURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    choices = [*OURS, *PACKAGES, "cleanrl"]
    parser.add_argument("trainers", nargs="*", choices=[*choices, []], metavar="TRAINER")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--limit", type=float, default=24, help="minutes of training, each")
    parser.add_argument("--cleanrl", help="path of CleanRL's ppo_continuous_action.py")
    parser.add_argument("--report", action="store_true", help="only read the table and draw")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for trainer in options.trainers if not options.report else ():
        for seed in options.seeds:
            if options.one:
                run_one(trainer, seed, 60 * options.limit, options.cleanrl)
                continue
            package = PACKAGES.get(trainer)
            version = f" {importlib.metadata.version(package)}" if package else ""
            print(f"{trainer}{version}, seed {seed}", flush=True)
            more = ["--cleanrl", options.cleanrl] if trainer == "cleanrl" else []
            command = [sys.executable, __file__, trainer, "--seeds", str(seed), "--one", *more]
            subprocess.run([*command, "--limit", str(options.limit)], check=True)
    report()


if __name__ == "__main__":
    main()
