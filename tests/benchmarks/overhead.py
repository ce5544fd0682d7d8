"""What training costs above the simulator: `python tests/benchmarks/overhead.py`.

First the same environments twice, in one run and in alternating order: stepped bare with the very
actions of a rollout recorded beforehand, and by `collect_rollout`. Both start from the same seeds,
and it is verified that both walked the same. Then where the time of a short real run goes, from its
metrics.csv. Steps are T × N, reset rows included, in both.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import dataclasses
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import walker_core as core

ENV = "BipedalWalker-v3"
PARTS = ("collect", "update", "eval")
OTHER_WALK = "this walk is not the recorded one"


class Clock:
    """Seconds of the `with` blocks together: on the wall, and of this process's CPU time.

    Environments and networks run on one thread here, so that CPU time is what either costs, also
    on a machine that is busy with other work.
    """

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def __enter__(self) -> None:
        self.began = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.wall += time.perf_counter() - self.began[0]
        self.cpu += time.process_time() - self.began[1]


class Pair:
    """The same walk, collected and bare; the first collection is the recording."""

    def __init__(self, config: core.Config, rollouts: int) -> None:
        self.config, self.rollouts = config, rollouts
        self.learner = core.Learner(config)
        self.seeds = core.env_seeds(config.seed, core.TRAIN, config.num_envs)
        self.actions, self.rewards = [], []
        self.collect(record=True)

    def collect(self, record: bool = False) -> Clock:
        """The rollouts by `collect_rollout`, from the start every time.

        New environments each time: Box2D's worlds are not quite the same after another life.
        """
        envs, obs = core.make_vector_env(self.config, self.learner.env, self.seeds)
        torch.manual_seed(0)
        normalizer = copy.deepcopy(self.learner.obs_normalizer)
        first_obs = normalizer.normalize(obs)
        buffer = core.Rollout(self.config, self.learner.env, self.seeds, first_obs)
        buffer.restart_at[:] = sys.maxsize  # the bare ones cannot know of restarts
        agent, space = self.learner.agent, envs.single_action_space
        clock = Clock()
        for i in range(self.rollouts):
            with clock:
                core.collect_rollout(envs, agent, normalizer, buffer)
            actions = np.clip(buffer.actions.numpy(), space.low, space.high)
            if record:
                self.actions.append(actions)
                self.rewards.append(buffer.rewards.clone())
            assert np.array_equal(actions, self.actions[i]), "another walk than the recorded one"
            assert torch.equal(buffer.rewards, self.rewards[i]), (
                "another walk than the recorded one"
            )
        return clock

    def step_bare(self) -> Clock:
        """The environments alone, given the recorded actions."""
        envs, _ = core.make_vector_env(self.config, self.learner.env, self.seeds)
        clock = Clock()
        for actions, expected in zip(self.actions, self.rewards, strict=True):
            rewards = []
            with clock:
                for action in actions:
                    rewards.append(envs.step(action)[1])
            assert np.array_equal(np.array(rewards, np.float32), expected.numpy()), OTHER_WALK
        envs.close()
        return clock


def measure_collection(config: core.Config, rollouts: int, repeats: int) -> None:
    pair = Pair(config, rollouts)
    steps = rollouts * config.batch_size
    print(f"{config.num_envs} × {ENV} ({config.vector_env}), {steps:,} steps each time")
    print("repeat   bare steps/s   collect_rollout steps/s   ratio   of CPU time")
    line, rows = "{:6}   {:12,.0f}   {:23,.0f}   {:5.1%}   {:11.1%}", []
    for repeat in range(repeats):
        if repeat % 2 == 0:
            bare, collected = pair.step_bare(), pair.collect()
        else:
            collected, bare = pair.collect(), pair.step_bare()
        ratios = bare.wall / collected.wall, bare.cpu / collected.cpu
        rows.append((steps / bare.wall, steps / collected.wall, *ratios))
        print(line.format(repeat + 1, *rows[-1]), flush=True)
    medians = [statistics.median(column) for column in zip(*rows, strict=True)]
    print(line.format("median", *medians), "  (target: at least 75 %)")


def measure_shares(config: core.Config) -> None:
    """Train for real into a temporary folder, with the default evaluations."""
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(sys.stderr):  # the run's own lines
            core.train(dataclasses.replace(config, out=folder))
        with open(Path(folder, core.METRICS_CSV), newline="") as file:
            rows = list(csv.DictReader(file))
    wall, steps = float(rows[-1]["wall_s"]), int(rows[-1]["step"])
    shares = {name: sum(float(row[f"{name}_s"]) for row in rows) for name in PARTS}
    shares["rest"] = wall - sum(shares.values())
    print(f"a run of {steps:,} steps, {wall:.1f} s, without its video and plots:")
    for name, seconds in shares.items():
        print(f"  {name:8} {seconds:7.2f} s   {seconds / wall:6.1%}")


def main() -> None:
    preset = core.Config.for_env(ENV)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=7, help="pairs of timings")
    parser.add_argument("--envs", type=int, default=preset.num_envs, help="N")
    parser.add_argument("--steps", type=int, default=512, help="of each environment, each time")
    parser.add_argument(
        "--train-steps", type=int, default=preset.eval_every, help="of the real run"
    )
    args = parser.parse_args()
    batch = args.envs * preset.rollout_steps
    settings = {"num_envs": args.envs, "minibatch_size": min(preset.minibatch_size, batch)}
    settings |= {"total_timesteps": args.train_steps, "vector_env": "sync", "device": "cpu"}
    config = core.Config.for_env(ENV, **settings)

    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a learner of small networks does
    measure_collection(config, max(1, args.steps // config.rollout_steps), args.repeats)
    torch.set_num_threads(threads)
    measure_shares(config)


if __name__ == "__main__":
    main()
