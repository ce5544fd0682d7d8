"""What a GPU does for this program: is it right there, and where is it faster than the CPU?

    python tests/benchmarks/gpu.py                     # on a machine with CUDA, some eight minutes
    python tests/benchmarks/gpu.py --device cpu --small  # a rehearsal without one

Prints, one after the other: how far two iterations on the device are from the same two on the CPU;
whether a resumed run goes on as one in one piece; how often an update makes the CPU wait; the rates
of update and policy by size of network and minibatch, beside the CPU's; and, with EnvPool, how long
a training takes to be solved with its networks on either.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import walker_core as core

ENV = "BipedalWalker-v3"
TINY = {"num_envs": 8, "rollout_steps": 64, "minibatch_size": 128, "eval_every": 0}
# a linear one would be another with another total
TINY["lr_schedule"] = "constant"
COMPARED = ("return_mean", "policy_loss", "value_loss", "entropy", "approx_kl", "grad_norm")


def train(out: Path, device: str, iterations: int, resume: Path | None = None) -> list[dict]:
    """The rows of a small run, without its film and curves."""
    steps = iterations * TINY["num_envs"] * TINY["rollout_steps"]
    config = core.Config(env=ENV, device=device, out=str(out), total_timesteps=steps, **TINY)
    core.train(config, resume)
    with open(out / core.METRICS_CSV, newline="") as file:
        return list(csv.DictReader(file))


def largest_difference(some: list[dict], others: list[dict]) -> str:
    """Of the columns that are compared, relative, and where it is."""
    found = []
    for i, (one, other) in enumerate(zip(some, others, strict=True)):
        for name in COMPARED:
            if one[name] and other[name]:
                a, b = float(one[name]), float(other[name])
                found.append((abs(a - b) / max(abs(a), abs(b), 1e-6), name, i + 1))
    size, name, iteration = max(found)
    return f"{size:.1e} ({name}, iteration {iteration})"


def check(device: str) -> None:
    """Compare with the CPU, and a resumed run with one in one piece."""
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: Path(folder, name) for name in ("cpu", "device", "again", "resumed")}
        first = train(runs["cpu"], "cpu", 1), train(runs["device"], device, 1)
        print(f"first iteration, CPU against {device}: differs by {largest_difference(*first)}")
        again = train(runs["again"], device, 1)
        print(f"the same again on {device}: differs by {largest_difference(first[1], again)}")
        train(runs["resumed"], device, 1)
        resumed = train(runs["resumed"], device, 2, runs["resumed"] / core.LAST)
        steps = [int(row["step"]) for row in resumed]
        print(f"resumed on {device}: steps {steps}, {largest_difference(again, resumed[:1])} off")


def random_batch(config: core.Config, rows: int, device: str) -> tuple[core.ActorCritic, Any]:
    """An agent for the walker and a batch of noise for it."""
    env = gym.make(ENV)
    space = core.network_space(env.observation_space)
    agent = core.ActorCritic(space, env.action_space, config).to(device)
    obs = torch.randn(rows, 24, device=device)
    with torch.no_grad():
        actions, logprobs = agent.act(obs)
    noise = torch.randn(3, rows, device=device)
    return agent, core.Batch(obs, actions, logprobs, *noise)


def wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(task: Any, device: str, repeats: int) -> float:
    """Of one call, median."""
    times = []
    for _ in range(repeats + 1):
        wait_for(device)
        began = time.perf_counter()
        task()
        wait_for(device)
        times.append(time.perf_counter() - began)
    # the first warms up
    return statistics.median(times[1:])


def rates(devices: list[str], sizes: list[int], minibatches: list[int], repeats: int) -> None:
    """Steps per second of update and policy."""
    print("\nnets       minibatch  device  update steps/s  policy steps/s, 64 environments")
    for size in sizes:
        for minibatch in minibatches:
            for device in devices:
                config = core.Config(
                    env=ENV, actor_hidden=(size, size), critic_hidden=(size, size), num_envs=64,
                    rollout_steps=4 * minibatch // 64, minibatch_size=minibatch, update_epochs=2,
                )  # fmt: skip
                agent, batch = random_batch(config, config.batch_size, device)
                optimizer = torch.optim.Adam(agent.parameters(), 1e-5, fused=True)
                update_s = seconds(
                    lambda a=agent, o=optimizer, b=batch, c=config: core.update(a, o, b, c),
                    device,
                    repeats,
                )
                obs = batch.obs[:64]
                act_s = seconds(lambda a=agent, o=obs: act(a, o), device, 20 * repeats)
                updated = config.batch_size * config.update_epochs / update_s
                line = f"{size:4} × 2   {minibatch:9,}  {device:6}  {updated:14,.0f}  "
                print(f"{line}{64 / act_s:14,.0f}")


@torch.no_grad()
def act(agent: core.ActorCritic, obs: core.Tensor) -> np.ndarray:
    """As in a rollout: on the CPU in the end."""
    return agent.act(obs)[0].cpu().numpy()


def count_waits(device: str) -> None:
    """How often an update of 40 minibatches waits for the device, by the profiler."""
    config = core.Config(env=ENV, num_envs=64, rollout_steps=128, minibatch_size=1024)
    agent, batch = random_batch(config, config.batch_size, device)
    optimizer = torch.optim.Adam(agent.parameters(), 1e-5, fused=True)
    core.update(agent, optimizer, batch, config)
    with torch.profiler.profile() as profile:
        core.update(agent, optimizer, batch, config)
    names = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "aten::_local_scalar_dense"}
    counts = {event.key: event.count for event in profile.key_averages() if event.key in names}
    print(f"waits in an update of {config.update_epochs} epochs on {device}: {counts}")


def solve(device: str, steps: int) -> None:
    """Time until solved, by EnvPool on all cores."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"vector_env": "envpool", "stop_when_solved": True, "total_timesteps": steps}
        began = time.perf_counter()
        counters = core.train(core.Config.for_env(ENV, device=device, out=folder, **options))
        took = time.perf_counter() - began
        with open(Path(folder, core.METRICS_CSV), newline="") as file:
            speed = statistics.median(float(row["steps_per_s"]) for row in csv.DictReader(file))
    found = f"{counters.step:,} steps, {took:.0f} s with evaluations, {speed:,.0f} steps/s"
    print(f"EnvPool, networks on {device}: solved after {counters.solved_step}; {found}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a rehearsal: tiny sizes")
    args = parser.parse_args()
    # without films and curves
    core.export = core.draw_curves = lambda *args: None
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads", end="")
    print(f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no CUDA")
    check(args.device)
    count_waits(args.device)
    devices = list(dict.fromkeys(["cpu", args.device]))
    if args.small:
        rates(devices, [64], [2048], 1)
        steps = 10_000
    else:
        rates(devices, [64, 256, 1024], [2048, 16_384, 65_536], 3)
        steps = 1_500_000
    for device in devices:
        solve(device, steps)


if __name__ == "__main__":
    main()
