"""Small environments, each of which does one thing that those of other people do."""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple

METADATA = {"render_modes": ["rgb_array"], "render_fps": 30}


class Point(gym.Env):
    """A point that should go to 0, for 5 to 20 steps. Nothing is wrong with this one."""

    metadata = METADATA
    observation_space = Box(-9, 9, (1,), np.float32)
    action_space = Box(-1, 1, (1,), np.float32)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, Any]:
        super().reset(seed=seed)
        self.k, self.x = 0, float(self.np_random.normal())
        self.end = int(self.np_random.integers(5, 21))
        return self.observe(), self.tell()

    def step(self, action: Any) -> tuple:
        self.k += 1
        self.x = float(np.clip(self.x + self.push(action), -9, 9))
        return self.observe(), self.pay(), self.k >= self.end, False, self.tell()

    def push(self, action: Any) -> float:
        return float(action[0]) / 2

    def observe(self) -> Any:
        return np.array([self.x], np.float32)

    def pay(self) -> Any:
        return -(self.x**2)

    def tell(self) -> Any:
        return {}

    def render(self) -> Any:
        return np.full((64, 64, 3), 5 * self.k, np.uint8)


# ---- spaces --------------------------------------------------------------------------------------


class Observes(Point):
    """Observes random elements of any space."""

    def __init__(self, space: gym.Space, render_mode: str | None = None) -> None:
        super().__init__(render_mode)
        self.observation_space = space

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, Any]:
        if seed is not None:
            self.observation_space.seed(seed)
        return super().reset(seed=seed)

    def observe(self) -> Any:
        return self.observation_space.sample()


class Takes(Point):
    """Takes only elements of its action space, of the right type and shape."""

    def __init__(self, space: gym.Space, render_mode: str | None = None) -> None:
        super().__init__(render_mode)
        self.action_space = space

    def push(self, action: Any) -> float:
        assert isinstance(action, np.ndarray), repr(action)
        assert action.shape == self.action_space.shape, action.shape
        assert action.dtype == self.action_space.dtype, action.dtype
        assert self.action_space.contains(action), repr(action)
        return 0.0


class Pixels(Point):
    """Actions are pixels of a screen of 512: pays -((a - 384) / 512)²."""

    action_space = Box(0, 512, (1,), np.float32)

    def push(self, action: np.ndarray) -> float:
        self.pixel = float(action[0])
        return 0.0

    def pay(self) -> float:
        return -(((self.pixel - 384) / 512) ** 2)


class Levers(Point):
    """Shows which of two and which of three levers to pull, and pays a half for each; 12 steps."""

    observation_space = Dict({"two": Discrete(2), "three": MultiDiscrete([3])})
    action_space = MultiDiscrete([2, 3])

    def observe(self) -> dict:
        self.end = 12
        self.shown = self.np_random.integers([2, 3])
        return {"two": self.shown[0], "three": self.shown[1:]}

    def push(self, action: np.ndarray) -> float:
        self.right = float((action == self.shown).mean())
        return 0.0

    def pay(self) -> float:
        return self.right


class Layers(Point):
    """Which of two layers of a map is lit tells which action pays; 20 steps."""

    observation_space = Box(0, 255, (40, 40, 2), np.uint8)
    action_space = Discrete(2)

    def observe(self) -> np.ndarray:
        self.end = 20
        self.lit = int(self.np_random.integers(2))
        layers = np.zeros((40, 40, 2), np.uint8)
        layers[:, :, self.lit] = 255
        return layers

    def push(self, action: int) -> float:
        self.right = float(action == self.lit)
        return 0.0

    def pay(self) -> float:
        return self.right


class Picture(Point):
    """Observes a picture of noise, and keeps it."""

    action_space = Discrete(2)

    def __init__(self, shape: tuple[int, ...], render_mode: str | None = None) -> None:
        super().__init__(render_mode)
        self.observation_space = Box(0, 255, shape, np.uint8)

    def observe(self) -> np.ndarray:
        shape = self.observation_space.shape
        self.seen = self.np_random.integers(0, 256, shape, np.uint8)
        return self.seen.copy()

    def push(self, action: int) -> float:
        return action - 0.5


# ---- steps and resets ----------------------------------------------------------------------------


class Reward1(Point):
    """Its reward is an array of one number."""

    def pay(self) -> np.ndarray:
        return np.array([super().pay()])


class InfoWord(Point):
    """Its info is a number, and at the end a word."""

    def tell(self) -> dict:
        return {"ended": "goal" if self.k >= self.end else 0}


class InfoRagged(Point):
    """Its info holds all cells visited so far."""

    def tell(self) -> dict:
        return {"path": np.zeros((self.k, 2)), "cells": [[0] * k for k in range(self.k)]}


class InfoNone(Point):
    """Its info is None."""

    def tell(self) -> None:
        return None


class Close(Point):
    """Closes a window that it has not."""

    def close(self) -> None:
        self.window.close()


class OneArray(Point):
    """Returns the same array at each step, with new numbers in it."""

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(render_mode)
        self.array = np.zeros(1, np.float32)

    def observe(self) -> np.ndarray:
        self.array[:] = self.x
        return self.array


class InPlace(Point):
    """Clips and scales the action that it is given in place."""

    def push(self, action: np.ndarray) -> float:
        push = super().push(action)
        action *= 0
        action += 77
        return push


class Options(Point):
    """Wants to know where to begin as soon as there are `options`; ends never by itself."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, Any]:
        if options is not None:
            self.x = options["start"]
        found = super().reset(seed=seed)
        self.end = sys.maxsize
        return found


class Late(Point):
    """Nothing is wrong, but from the `at`-th step on with the copy that was reset with `of`."""

    def __init__(self, of: int = -1, at: int = 1, render_mode: str | None = None) -> None:
        super().__init__(render_mode)
        self.of, self.at, self.steps, self.mine = of, at, 0, of == -1

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, Any]:
        if seed is not None:
            self.mine = self.of in (-1, seed)
        return super().reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple:
        self.steps += 1
        return super().step(action)

    def is_wrong(self) -> bool:
        return self.mine and self.steps >= self.at


class Reward2(Late):
    """A reward for each of two players."""

    def pay(self) -> Any:
        return np.ones(2) if self.is_wrong() else super().pay()


class FourValues(Late):
    """Steps as gym 0.21 did."""

    def step(self, action: Any) -> tuple:
        obs, reward, done, _, info = super().step(action)
        return (obs, reward, done, info) if self.is_wrong() else (obs, reward, done, False, info)


class ShapeRow(Late):
    """Observes (1, 1) where (1,) is declared."""

    def observe(self) -> np.ndarray:
        return super().observe()[None] if self.is_wrong() else super().observe()


class ShapeLonger(Late):
    """Observes (2,) where (1,) is declared."""

    def observe(self) -> np.ndarray:
        return super().observe().repeat(2) if self.is_wrong() else super().observe()


class ExitStep(Late):
    """Its window was closed: a program of pygame ends like this."""

    def step(self, action: Any) -> tuple:
        found = super().step(action)
        if self.is_wrong():
            sys.exit()
        return found


class ExitReset(Late):
    """Ends the program in a reset."""

    def reset(self, **kwargs: Any) -> tuple[Any, Any]:
        found = super().reset(**kwargs)
        if self.is_wrong():
            sys.exit()
        return found


class Chdir(Point):
    """A simulator that works in a folder of its own."""

    def __init__(self, folder: str, render_mode: str | None = None) -> None:
        super().__init__(render_mode)
        self.folder = folder

    def reset(self, **kwargs: Any) -> tuple[Any, Any]:
        os.chdir(self.folder)
        return super().reset(**kwargs)


class Endless(Point):
    """Ends never."""

    def reset(self, **kwargs: Any) -> tuple[Any, Any]:
        found = super().reset(**kwargs)
        self.end = sys.maxsize
        return found


# ---- random numbers ------------------------------------------------------------------------------


class Drawn(Point):
    """Keeps the place where it began in a file of `folder`, if there is one."""

    def __init__(self, folder: str = "", render_mode: str | None = None) -> None:
        super().__init__(render_mode)
        self.folder = folder

    def reset(self, **kwargs: Any) -> tuple[Any, Any]:
        super().reset(**kwargs)
        self.x = self.draw()
        if self.folder:
            Path(self.folder, f"{time.time_ns()}-{os.getpid()}").write_text(repr(self.x))
        return self.observe(), {}

    def draw(self) -> float:
        raise NotImplementedError


class Legacy(Drawn):
    """Draws from NumPy's global generator."""

    def draw(self) -> float:
        return float(np.random.normal())


class Dice(Drawn):
    """Draws from Python's global generator."""

    def draw(self) -> float:
        return random.gauss()


class Samples(Drawn):
    """Begins at a sample of its observation space."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.observation_space = Box(-1, 1, (1,), np.float32)

    def draw(self) -> float:
        return float(self.observation_space.sample()[0])


class SamplesActions(Drawn):
    """Begins with a sample of its action space."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.action_space = Box(-1, 1, (1,), np.float32)

    def draw(self) -> float:
        return float(self.action_space.sample()[0])


# ---- processes -----------------------------------------------------------------------------------


class NoLicence(Point):
    """Cannot be made in a worker process."""

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(render_mode)
        if multiprocessing.parent_process() is not None:
            raise RuntimeError("no licence\nfor another process")


class Children(Point):
    """Asks a process of its own where to begin."""

    def reset(self, **kwargs: Any) -> tuple[Any, Any]:
        super().reset(**kwargs)
        mine, yours = multiprocessing.Pipe()
        child = multiprocessing.Process(target=yours.send, args=(0.5,))
        child.start()
        self.x = mine.recv()
        child.join()
        return self.observe(), {}


# ---- pictures ------------------------------------------------------------------------------------


class RenderGrows(Point):
    """Its picture grows."""

    def render(self) -> np.ndarray:
        return np.zeros((64 + 2 * self.k, 64, 3), np.uint8)


class RenderList(Point):
    """Renders a list of pictures, though it was asked for one."""

    def render(self) -> list:
        return [np.zeros((64, 64, 3), np.uint8)] * self.k


class RenderChannels(Point):
    """Its colors come first."""

    def render(self) -> np.ndarray:
        return np.zeros((3, 64, 64), np.uint8)


class RenderFloats(Point):
    """Renders numbers from 0 to 1."""

    def render(self) -> np.ndarray:
        return np.full((64, 64, 3), 0.5)


class RenderText(Point):
    """Renders a text."""

    def render(self) -> str:
        return f"x = {self.x}"


class RenderNone(Point):
    """Renders nothing."""

    def render(self) -> None:
        return None


class RenderRaises(Point):
    """Its screen is not there."""

    def render(self) -> None:
        raise RuntimeError("no screen\nat all")


class RenderExits(Point):
    """Its window is closed while it renders."""

    def render(self) -> None:
        sys.exit()


class FpsNumpy(Point):
    """Its frame rate is a number of NumPy."""

    metadata: ClassVar = {**METADATA, "render_fps": np.int64(30)}


class FpsText(Point):
    """Its frame rate is a text."""

    metadata: ClassVar = {**METADATA, "render_fps": "30"}


class FpsNone(Point):
    """Its frame rate is None."""

    metadata: ClassVar = {**METADATA, "render_fps": None}


class Fps0(Point):
    """Its frame rate is 0."""

    metadata: ClassVar = {**METADATA, "render_fps": 0}


class FpsMissing(Point):
    """It has no frame rate."""

    metadata: ClassVar = {"render_modes": ["rgb_array"]}


class Legged(Point):
    """Has a hull and legs, and is no BipedalWalker."""

    hull, legs = "carbon", 4


class LeggedMore(Legged):
    """Has all that a BipedalWalker has, and is none."""

    joints = terrain_x = terrain_y = ()


FLOATS = Box(-1, 1, (3,), np.float32)
OBSERVATIONS = {
    "Dict": Dict({"a": FLOATS, "b": Discrete(3), "c": Dict({"d": MultiBinary(2)})}),
    "Tuple": Tuple((FLOATS, MultiDiscrete([2, 3]), Box(0, 255, (4, 5), np.uint8))),
    "Discrete": Discrete(5, start=2),
    "MultiDiscrete": MultiDiscrete([2, 3, 4]),
    "MultiBinary": MultiBinary(4),
    "Whole": Box(-9, 9, (3,), np.int64),
    "Table": Box(-1, 1, (2, 3), np.float32),
    "Double": Box(-1, 1, (3,), np.float64),
    "Thumbnail": Box(0, 255, (10, 12, 3), np.uint8),
    "20000": Box(-1, 1, (100, 200), np.float32),
    "20001": Box(-1, 1, (20_001,), np.float32),
    "DictOf20200": Dict({"map": Box(-1, 1, (100, 200), np.float32), "tile": Discrete(200)}),
}
ACTIONS = {
    "MultiDiscrete": MultiDiscrete([2, 3, 4]),
    "MultiDiscreteStart": MultiDiscrete([2, 3], start=[5, -1]),
    "MultiBinary": MultiBinary(4),
    "Whole": Box(-2, 5, (2,), np.int64),
    "Whole32": Box(np.array([0, -1000], np.int32), np.array([1, 1000], np.int32), dtype=np.int32),
    "Table": Box(-1, 1, (2, 2), np.float32),
    "Pixels": Box(0, 512, (1,), np.float32),
    "Far": Box(100, 200, (3,), np.float32),
    "Double": Box(0.1, 0.7, (2,), np.float64),
    "HalfOpen": Box(0, np.inf, (2,), np.float32),
    "Mixed": Box(np.array([0, -np.inf, 3], np.float32), np.array([1, 2, 3.5], np.float32)),
}

for _name, _space in OBSERVATIONS.items():
    gym.register(f"Field/{_name}Obs-v0", Observes, kwargs={"space": _space})
for _name, _space in ACTIONS.items():
    gym.register(f"Field/{_name}Action-v0", Takes, kwargs={"space": _space})
LIMITS = {"Options": 40}
for _kind in list(globals().values()):
    if isinstance(_kind, type) and issubclass(_kind, Point):
        _name = _kind.__name__
        gym.register(f"Field/{_name}-v0", _kind, max_episode_steps=LIMITS.get(_name))
gym.register("Field/Limited-v0", Endless, max_episode_steps=10)
gym.register("Field/ExitFirstReset-v0", ExitReset, kwargs={"at": 0})
