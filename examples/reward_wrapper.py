"""A reward of one's own: BipedalWalker-v3, that pays for an upright hull too.

    python walker.py --env examples.reward_wrapper:UprightWalker-v3 --out runs/upright
    python walker.py evaluate runs/upright/checkpoints_walker/best.pt --env BipedalWalker-v3

The log, the curves and the evaluations of the first are returns of the wrapped environment; the
second tells what the policy is worth by the plain environment's reward. A preset goes by the name:
`--config checkpoints_walker/pretrained_config.json` brings the plain environment's settings.
"""

import gymnasium as gym


class Upright(gym.Wrapper):
    weight = 0.1  # taken from a step's reward for each rad that the hull leans

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward - self.weight * abs(float(obs[0])), terminated, truncated, info


def make(**kwargs) -> gym.Env:
    return Upright(gym.make("BipedalWalker-v3", disable_env_checker=True, **kwargs))


gym.register("UprightWalker-v3", make)
