"""A reward of one's own: BipedalWalker-v3, where torque costs ten times as much, and a fall five.

    python walker.py --env examples.reward_wrapper:EfficientWalker-v3 --out runs/efficient
    python walker.py evaluate runs/efficient/checkpoints_walker/best.pt --env BipedalWalker-v3

Why: a walk to the end pays about 364, less the torque that it cost, so torque per metre is what
counts; but what learns sees no end, is paid by the step, and would spend any torque on speed. The
log, the curves and the evaluations of the first are returns of the wrapped environment; the second
tells the plain one's. A preset goes by the name: README's "Record" has settings for this one.
With `--vector-env envpool` the same around EnvPool's: `vector_entry_point` says how it is made.
"""

import gymnasium as gym
import numpy as np


def price(rewards, actions):
    """Of steps, from the plain rewards (...) and the actions (..., 4)."""
    torque = np.abs(actions).sum(-1)  # of which the environment itself takes 0.028
    return rewards + 4 * np.where(rewards <= -100, rewards, 0) - 0.252 * torque


class Efficient(gym.Wrapper):
    def step(self, action):
        obs, reward, *rest = self.env.step(action)
        return obs, float(price(reward, action)), *rest


class EfficientVector(gym.vector.VectorWrapper):
    """Many of EnvPool's, where a step without an action begins the next episode."""

    def step(self, actions):
        obs, rewards, *rest, info = self.env.step(actions)
        return obs, np.where(info["elapsed_step"] > 0, price(rewards, actions), 0), *rest, info


def make(**kwargs):
    return Efficient(gym.make("BipedalWalker-v3", disable_env_checker=True, **kwargs))


def make_vector(_name, **kwargs):
    import envpool

    return EfficientVector(envpool.make_gymnasium("BipedalWalker-v3", **kwargs))


gym.register("EfficientWalker-v3", make, vector_entry_point=make_vector, max_episode_steps=1600)
