"""How far the passive walker walks in 100 episodes: without motors, and by a trained policy.

    python examples/count_steps.py runs/passive/checkpoints_walker/best.pt

The slope and the control rate are those of the training; the starts are the same for both.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder
import walker_core as core

ENV = "examples.passive_walker:PassiveWalker-v0"


def walk(act, config: core.Config, seed: int) -> tuple[int, float, bool]:
    """Steps, metres, and whether it fell."""
    with contextlib.closing(core.make_env(config)) as env:
        obs, _ = env.reset(seed=seed)
        terminated = truncated = False
        while not (terminated or truncated):
            obs, _, terminated, truncated, _ = env.step(act(obs[None])[0])
        walker = env.unwrapped
        return walker.steps, float(walker.data.qpos[0]), terminated


def main(argv: Sequence[str]) -> int:
    if len(argv) != 1:
        print("usage: count_steps.py CHECKPOINT", file=sys.stderr)
        return 2
    try:
        learner = core.load_learner(argv[0], ENV, device="cpu")
    except (core.UserError, OSError) as error:
        print(f"count_steps.py: {error}", file=sys.stderr)
        return 2
    policies = {"without motors": lambda obs: np.zeros((len(obs), 3)), "trained": learner.act}
    for name, act in policies.items():
        seeds = core.env_seeds(0, core.TEST, 100)
        walks = [walk(act, learner.config, seed) for seed in seeds]
        steps, metres, fell = map(np.array, zip(*walks, strict=True))
        print(f"{name}: {steps.mean():.1f} steps ({steps.min()} to {steps.max()}), ", end="")
        print(f"{metres.mean():.1f} m, fell in {fell.sum()} of {len(walks)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
