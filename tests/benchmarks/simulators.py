"""The same policy on Gymnasium's BipedalWalker-v3 and on EnvPool's: two versions of Box2D.

    python tests/benchmarks/simulators.py checkpoints_walker/pretrained.pt --episodes 400

As many episodes on either, deterministic; all that were begun count. Needs envpool.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

import walker_core as core


def returns_on_envpool(learner: core.Learner, seeds: list[int]) -> np.ndarray:
    """One episode of each seed, all at once."""
    changes = {"vector_env": "envpool", "num_envs": len(seeds), "minibatch_size": 2}
    config = dataclasses.replace(learner.config, **changes)
    envs, obs = core.make_vector_env(config, learner.env, seeds)
    returns, running = np.zeros(len(seeds)), np.ones(len(seeds), bool)
    while running.any():
        obs, rewards, terminated, truncated, _ = envs.step(learner.act(obs))
        returns += running * rewards
        running &= ~(terminated | truncated)
    envs.close()
    return returns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--episodes", type=int, default=400)
    parser.add_argument("--env", help="on this environment, not the checkpoint's own")
    options = parser.parse_args()
    for checkpoint in options.checkpoints:
        learner = core.load_learner(checkpoint, options.env, "cpu")
        seeds = core.env_seeds(0, core.TEST, options.episodes)
        on_gymnasium, _ = core.evaluate_policy(learner.act, learner.config, seeds)
        for name, returns in (
            ("Gymnasium", on_gymnasium),
            ("EnvPool", returns_on_envpool(learner, seeds)),
        ):
            error = returns.std() / np.sqrt(len(returns))
            text = f"mean {returns.mean():.1f} ± {error:.1f} (standard error)"
            falls = (returns < np.median(returns) - 40).sum()
            text += f", median {np.median(returns):.2f}, {falls} falls of {len(returns)}"
            print(f"{checkpoint} on {name}: {text}", flush=True)


if __name__ == "__main__":
    main()
