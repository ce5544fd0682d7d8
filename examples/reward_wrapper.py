"""A custom reward: BipedalWalker-v3 with a bonus for speed.

    python walker.py --env examples.reward_wrapper:FastWalker-v3 --out runs/fast
    python walker.py evaluate runs/fast/checkpoints_walker/best.pt --env BipedalWalker-v3

The log, the curves and the evaluations of the first are returns of the wrapped environment; the
second prints the plain one's. FastWalker has no preset. For BipedalWalker's settings, add
`--config checkpoints_walker/pretrained_config.json --vector-env sync --seed 1`.
"""

import gymnasium as gym


class FastWalker(gym.Wrapper):
    """Adds `bonus` × the forward speed of the hull, observation 2, to each reward."""

    def __init__(self, env: gym.Env, bonus: float):
        super().__init__(env)
        self.bonus = bonus

    def step(self, action):
        obs, reward, *rest = self.env.step(action)
        return obs, reward + self.bonus * float(obs[2]), *rest


def make(bonus=0.1, **kwargs):
    return FastWalker(gym.make("BipedalWalker-v3", disable_env_checker=True, **kwargs), bonus)


gym.register("FastWalker-v3", make, max_episode_steps=1600)
