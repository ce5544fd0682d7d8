"""A reward of one's own: BipedalWalker-v3, where torque costs ten times as much, and a fall five.

Or as many times as said: `--env-kwargs torque=3 fall=20 hardcore=True`.

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


def price(rewards, actions, torque, fall):
    """Of steps, from the plain rewards (...) and the actions (..., 4)."""
    spent = 0.028 * np.abs(actions).sum(-1)  # what the environment itself takes for torque
    return rewards + (fall - 1) * np.where(rewards <= -100, rewards, 0) - (torque - 1) * spent


class Efficient(gym.Wrapper):
    def __init__(self, env, *prices):
        super().__init__(env)
        self.prices = prices

    def step(self, action):
        obs, reward, *rest = self.env.step(action)
        return obs, float(price(reward, action, *self.prices)), *rest


class EfficientVector(gym.vector.VectorWrapper):
    """Many of EnvPool's, where a step without an action begins the next episode."""

    def __init__(self, envs, *prices):
        super().__init__(envs)
        self.prices = prices

    def step(self, actions):
        obs, rewards, *rest, info = self.env.step(actions)
        priced = price(rewards, actions, *self.prices)
        return obs, np.where(info["elapsed_step"] > 0, priced, 0), *rest, info


def make(torque=10, fall=5, **kwargs):
    env = gym.make("BipedalWalker-v3", disable_env_checker=True, **kwargs)
    return Efficient(env, torque, fall)


def make_vector(_name, torque=10, fall=5, **kwargs):
    import envpool

    return EfficientVector(envpool.make_gymnasium("BipedalWalker-v3", **kwargs), torque, fall)


gym.register("EfficientWalker-v3", make, vector_entry_point=make_vector, max_episode_steps=1600)
