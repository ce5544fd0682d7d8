"""Tiny environments whose rewards, lengths and optima are known, registered for the tests."""

from __future__ import annotations

import copy
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box

import walker_core as core


class Script(gym.Env):
    """Episodes of known length, ending and rewards, each readable from its observations.

    Episode e after `reset(seed=s)` takes its length from `lengths[(s + e) % len(lengths)]`: n ends
    by termination, -n by truncation. Step k pays `pay(s, e, k)`. The observation is (s, e, k, and
    the two numbers of the action that the step received), with zeros for the action after a reset.
    """

    observation_space = Box(-np.inf, np.inf, (5,), np.float32)
    action_space = Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, lengths: tuple[int, ...] = (3,), render_mode: str | None = None) -> None:
        self.lengths, self.tag, self.episode = lengths, 0, -1

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.tag, self.episode = (self.tag, self.episode + 1) if seed is None else (seed, 0)
        self.k = 0
        return self._observe(np.zeros(2)), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        reward = pay(self.tag, self.episode, self.k)
        self.k += 1
        length = self.lengths[(self.tag + self.episode) % len(self.lengths)]
        ended = self.k == abs(length)
        return self._observe(action), reward, ended and length > 0, ended and length < 0, {}

    def _observe(self, action: np.ndarray) -> np.ndarray:
        return np.array([self.tag, self.episode, self.k, *action], np.float32)


class Falls(gym.Env):
    """Episodes of 1 to 40 steps, drawn from the seed, that pay 1 + the first action at each step.

    Who lives longer earns more, so the first episodes to finish are the worst.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012
    observation_space = Box(-np.inf, np.inf, (3,), np.float32)
    action_space = Box(-0.25, 0.25, (1,), np.float32)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(1, 41))
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.left -= 1
        noise = float(self.np_random.normal())
        return self._observe(), 1 + float(action[0]) + noise / 8, self.left == 0, False, {}

    def render(self) -> np.ndarray:
        return np.full((4, 4, 3), self.left, np.uint8)

    def _observe(self) -> np.ndarray:
        return np.array([self.left, *self.np_random.normal(size=2)], np.float32)


class Reach(gym.Env):
    """A point at +1 or -1 that should go to 0: x += a / 2, |a| ≤ 1, pays -x², for ten steps.

    The best return is -0.25 exactly: no action brings |x| below 0.5 in the first step, and the
    second can reach 0. Standing still pays -10. It knows nothing of rendering.
    """

    optimum = -0.25
    observation_space = Box(-np.inf, np.inf, (1,), np.float32)
    action_space = Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.x = float(self.np_random.choice([-1.0, 1.0]))
        return np.array([self.x], np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.x += float(np.clip(action[0], -1, 1)) / 2
        return np.array([self.x], np.float32), -(self.x**2), False, False, {}


class Faulty(Reach):
    """`Reach`, but `fault` befalls the copy that was reset with `seed`, in its `at`-th step.

    A fault "in reset" befalls that reset, or with `at` > 0 the first one after it.
    """

    observation_space = Box(-np.inf, np.inf, (1,), np.float64)

    def __init__(self, fault: str, seed: int, at: int = 3) -> None:
        self.fault, self.seed, self.at, self.steps, self.mine = fault, seed, at, 0, False

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        obs, info = super().reset(seed=seed)
        is_next = self.mine and self.at > 0 and seed is None
        self.mine = seed == self.seed if seed is not None else self.mine
        is_now = "in reset" in self.fault and (is_next or (self.mine and self.at == 0))
        return self._suffer(obs, 0.0)[0] if is_now else obs, info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, reward, *endings = super().step(action)
        self.steps += 1
        if self.mine and self.steps == self.at and "in reset" not in self.fault:
            obs, reward = self._suffer(obs, reward)
        return obs, reward, *endings

    def _suffer(self, obs: np.ndarray, reward: float) -> tuple[np.ndarray, float]:
        what, value = self.fault.split()[:2]
        if what == "raise":
            raise RuntimeError("the sky\nfell down")
        if what == "hang":
            time.sleep(3600)
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return (obs * 0 + float(value), reward) if what == "obs" else (obs, float(value))


class Wide(Reach):
    """`Reach` with actions of any size, which it clips itself; observations of a type of choice."""

    action_space = Box(-np.inf, np.inf, (1,), np.float32)

    def __init__(self, bits: int = 32) -> None:
        self.dtype = np.dtype(f"float{bits}")
        self.observation_space = Box(-np.inf, np.inf, (1,), self.dtype)
        self.largest = 0.0

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        obs, info = super().reset(**kwargs)
        return obs.astype(self.dtype), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.largest = max(self.largest, abs(float(action[0])))
        obs, *rest = super().step(action)
        return obs.astype(self.dtype), *rest


class Shapes(gym.Env):
    """Never stepped: only its spaces matter."""

    def __init__(self, observation: gym.Space, action: gym.Space) -> None:
        self.observation_space, self.action_space = observation, action


FLOATS, TEXT = Box(-1, 1, (3,), np.float32), gym.spaces.Text(5)
UNSUPPORTED = {  # name: spaces, and what the message says of them
    "Toy/LargeObs-v0": ((Box(-1, 1, (201, 100)), FLOATS), "20,100 numbers"),
    "Toy/SequenceObs-v0": ((gym.spaces.Sequence(FLOATS), FLOATS), "flattened"),
    "Toy/TextAction-v0": ((FLOATS, TEXT), "actions"),
    "Toy/DictAction-v0": ((FLOATS, gym.spaces.Dict({"a": FLOATS})), "actions"),
}

gym.register("Toy/Script-v0", Script)
gym.register("Toy/Falls-v0", Falls)
gym.register("Toy/Reach-v0", Reach, max_episode_steps=10)
gym.register("Toy/Faulty-v0", Faulty, max_episode_steps=10)
gym.register("Toy/Wide-v0", Wide, max_episode_steps=10)
for _name, ((_observation, _action), _) in UNSUPPORTED.items():
    gym.register(_name, Shapes, kwargs={"observation": _observation, "action": _action})


def pay(tag: int, episode: int, k: int) -> float:
    """The reward of `Script`: exact in float32, of both signs, another for each step and env."""
    return 1 + tag + episode / 4 - k / 2


class Row(NamedTuple):
    """What one step of a vector env with NEXT_STEP autoreset is, for one `Script` env."""

    valid: bool
    reward: float
    terminated: bool
    truncated: bool
    obs: tuple[int, int, int]  # (tag, episode, k) that the step returned


def script_rows(tag: int, lengths: tuple[int, ...]) -> Iterator[Row]:
    """All rows of a `Script` env from reset(seed=tag) on, by the definition of NEXT_STEP."""
    episode = 0
    while True:
        length = lengths[(tag + episode) % len(lengths)]
        for k in range(abs(length)):
            ended = k + 1 == abs(length)
            endings = ended and length > 0, ended and length < 0
            yield Row(True, pay(tag, episode, k), *endings, (tag, episode, k + 1))
        episode += 1
        yield Row(False, 0.0, False, False, (tag, episode, 0))


def script_config(lengths: tuple[int, ...], **settings: Any) -> core.Config:
    """Four `Script` envs, rollouts of seven steps, raw observations, unless `settings` differ."""
    defaults = {"num_envs": 4, "rollout_steps": 7, "minibatch_size": 8, "norm_obs": False}
    options = {"env": "Toy/Script-v0", "env_kwargs": (f"lengths={lengths}",)}
    return core.Config(**{**options, **defaults, **settings})


class Collection:
    """Everything `collect_rollout` needs, made from a config; env i is reset with seed i."""

    def __init__(self, config: core.Config, restart_at=None) -> None:
        self.learner = core.Learner(config)
        self.normalizer = self.learner.obs_normalizer
        seeds = range(config.num_envs)
        self.envs, self.first_obs = core.make_vector_env(config, self.learner.env, seeds)
        first_obs = self.normalizer.normalize(self.first_obs)
        self.buffer = core.Rollout(config, self.learner.env, seeds, first_obs)
        self.buffer.restart_at[:] = sys.maxsize if restart_at is None else restart_at
        self.episodes: list[tuple[float, int]] = []

    def rollout(self) -> core.Rollout:
        """Collect once more; a copy of the buffer, and its finished episodes in `episodes`."""
        agent = self.learner.agent
        collected = core.collect_rollout(self.envs, agent, self.normalizer, self.buffer)
        self.episodes, raw_obs = collected
        if self.normalizer.enabled:
            self.normalizer.update(core.torch.cat(raw_obs))
        return copy.deepcopy(self.buffer)

    def rewards(self, buffer: core.Rollout) -> core.Tensor:
        """The rewards that training would use, by the running statistics."""
        normalize = self.learner.reward_normalizer.normalize
        return normalize(buffer.rewards, buffer.valid, self.buffer.discounted_return)
