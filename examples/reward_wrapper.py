"""A reward of one's own: BipedalWalker-v3, where torque costs ten times as much, and a fall five.

    python walker.py --env examples.reward_wrapper:EfficientWalker-v3 --out runs/efficient
    python walker.py evaluate runs/efficient/checkpoints_walker/best.pt --env BipedalWalker-v3

Why: a walk to the end pays about 364, less the torque that it cost, so torque per metre is what
counts; but what learns sees no end, is paid by the step, and would spend any torque on speed. The
log, the curves and the evaluations of the first are returns of the wrapped environment; the second
tells the plain one's. A preset goes by the name: README's "Record" has settings for this one.
"""

import gymnasium as gym
import numpy as np


class Efficient(gym.Wrapper):
    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        reward = 5 * reward if reward <= -100 else reward  # a fall
        torque = float(np.abs(action).sum())  # of which the environment itself takes 0.028
        return obs, reward - 0.252 * torque, terminated, truncated, info


def make(**kwargs) -> gym.Env:
    return Efficient(gym.make("BipedalWalker-v3", disable_env_checker=True, **kwargs))


gym.register("EfficientWalker-v3", make, max_episode_steps=1600)
