"""Where the time of one iteration goes, each part beside what it cannot be made smaller than.

    python tests/benchmarks/loop_profile.py            # SyncVectorEnv, with the inside of a step
    python tests/benchmarks/loop_profile.py envpool

The shipped policy goes on learning with the default settings, in copies of the same functions that
are timed from outside; what the timers themselves cost (0.2 µs a call) is in the figures. Prints
the median of five iterations, in µs per environment step and in % of the iteration.
"""

from __future__ import annotations

import collections
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import walker_core as core

POLICY = Path(__file__).parents[2] / "checkpoints_walker/pretrained.pt"
ITERATIONS = 5
spent: dict[str, float] = collections.defaultdict(float)


def time_calls(owner: Any, name: str, part: str) -> None:
    """Replace a function of an object, class or module by itself with a stopwatch."""
    function = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = function(*args, **kwargs)
        spent[part] += time.perf_counter() - began
        return result

    setattr(owner, name, timed)


class TimedWorld:
    """A b2World whose steps and ray casts are timed; it takes no new attributes itself."""

    def __init__(self, world: Any) -> None:
        self.__dict__["world"] = world
        for name, part in (("Step", "physics"), ("RayCast", "lidar")):
            self.__dict__[name] = getattr(world, name)
            time_calls(self, name, part)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.world, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__:
            self.__dict__[name] = value
        else:
            setattr(self.world, name, value)


def time_inside(env: Any) -> None:
    """Physics and lidar of a BipedalWalker; the world is a new one after every reset."""
    walker, reset = env.unwrapped, env.unwrapped.reset

    def reset_and_time(**kwargs: Any) -> Any:
        if isinstance(walker.world, TimedWorld):
            walker.world = walker.world.world
        result = reset(**kwargs)
        walker.world = TimedWorld(walker.world)
        return result

    walker.reset = reset_and_time
    time_calls(walker, "reset", "resets")
    time_calls(walker, "step", "bare steps")


def matmul_floor(batch: core.Batch, agent: core.ActorCritic, config: core.Config) -> float:
    """Seconds of an update's matrix products alone: one forward, two backward for each layer."""
    layers = [m for m in agent.modules() if isinstance(m, torch.nn.Linear)]
    rows = len(batch.obs) // config.num_minibatches
    pairs = [
        (torch.randn(rows, m.in_features), torch.randn(m.in_features, m.out_features))
        for m in layers
    ]
    began = time.perf_counter()
    for _ in range(config.update_epochs * config.num_minibatches):
        for x, weight in pairs:
            y = x @ weight
            y @ weight.T
            x.T @ y
    return time.perf_counter() - began


def floor_of_collecting(learner: core.Learner, actions: Any, seeds: list[int]) -> float:
    """Seconds in which a vector env of its own does as many steps, with actions made before."""
    envs, _ = core.make_vector_env(learner.config, learner.env, seeds)
    began = time.perf_counter()
    for action in actions:
        envs.step(action)
    seconds = time.perf_counter() - began
    envs.close()
    return seconds


def main() -> None:
    torch.set_num_threads(1)  # as in training
    vector_env = sys.argv[1] if len(sys.argv) > 1 else "sync"
    state = core.load_checkpoint(POLICY)
    config = core.Config.for_env("BipedalWalker-v3", vector_env=vector_env)
    learner = core.Learner(config)
    learner.load(state, POLICY, core.POLICY)
    agent, seeds = learner.agent, core.env_seeds(1, core.TRAIN, config.num_envs)
    envs, obs = core.make_vector_env(config, learner.env, seeds)
    rollout = core.Rollout(config, learner.env, seeds, learner.obs_normalizer.normalize(obs))

    time_calls(envs, "step", "vector steps")
    time_calls(agent, "act", "policy")
    time_calls(learner.obs_normalizer, "normalize", "observation normalizer")
    for env in getattr(envs, "envs", ()):
        time_inside(env)
        time_calls(env, "step", "wrapped steps")
        env.reset()  # in a timed world
    time_calls(agent, "evaluate_actions", "forward: policy")
    time_calls(core, "ppo_loss", "forward: loss")
    time_calls(torch.Tensor, "backward", "backward")
    time_calls(learner.optimizer, "step", "optimizer")
    time_calls(learner.optimizer, "zero_grad", "optimizer")
    time_calls(torch.nn.utils, "clip_grad_norm_", "gradient norm")

    samples = []
    for _ in range(ITERATIONS + 1):
        spent.clear()
        samples.append(iteration(learner, envs, rollout, seeds))
    middle = {part: statistics.median(s[part] for s in samples[1:]) for part in samples[0]}
    report(middle, config, "physics" in middle)


def iteration(learner: core.Learner, envs: Any, rollout: core.Rollout, seeds: list[int]) -> dict:
    """Seconds of each part of one iteration."""
    config, agent = learner.config.at(0, -math.inf), learner.agent
    part, began = dict.fromkeys(("collect",), 0.0), time.perf_counter()
    core.collect_rollout(envs, agent, learner.obs_normalizer, rollout)
    part["collect"] = time.perf_counter() - began
    collected = dict(spent)

    began = time.perf_counter()
    batch = core.make_batch(rollout, agent, learner.reward_normalizer, config)
    part["advantages"] = time.perf_counter() - began
    spent.clear()
    time_calls(agent, "value", "forward: value")
    began = time.perf_counter()
    core.update(agent, learner.optimizer, batch, config)
    part["update"] = time.perf_counter() - began
    del agent.value
    clipped = rollout.actions.clamp(-1, 1).numpy()
    part["floor: collect"] = floor_of_collecting(learner, clipped, seeds)
    part["floor: update"] = matmul_floor(batch, agent, config)
    return part | collected | dict(spent)


def report(part: dict[str, float], config: core.Config, inside: bool) -> None:
    whole = part["collect"] + part["advantages"] + part["update"]

    def line(name: str, seconds: float) -> None:
        print(
            f"{name:42s}{1e6 * seconds / config.batch_size:8.1f} µs {100 * seconds / whole:6.1f} %"
        )

    def rest(total: str, *names: str) -> float:
        return part[total] - sum(part.get(name, 0.0) for name in names)

    print(f"{config.vector_env}, {config.num_envs} envs × {config.rollout_steps} steps, ", end="")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s); per environment step:")
    line("an iteration", whole)
    line("collect", part["collect"])
    line("  floor: the same vector env alone", part["floor: collect"])
    line("  the vector env's steps", part["vector steps"])
    if inside:
        line("    physics, b2World.Step", part["physics"])
        line("    lidar, ten ray casts with callbacks", part["lidar"])
        line("    the environment's other Python", rest("bare steps", "physics", "lidar"))
        line("    resets", part.get("resets", 0.0))
        line("    wrappers of one environment", rest("wrapped steps", "bare steps"))
        line("    SyncVectorEnv", rest("vector steps", "wrapped steps", "resets"))
    for name in ("policy", "observation normalizer"):
        line(f"  {name}", part[name])
    inner = ("vector steps", "policy", "observation normalizer")
    line("  buffers, episodes, clipping", rest("collect", *inner))
    line("rewards, values, advantages", part["advantages"])
    line("update", part["update"])
    line("  floor: its matrix products alone", part["floor: update"])
    inner = ("forward: policy", "forward: value", "forward: loss", "backward", "gradient norm")
    inner = (*inner, "optimizer")
    for name in inner:
        line(f"  {name}", part[name])
    line("  minibatches", rest("update", *inner))


if __name__ == "__main__":
    main()
