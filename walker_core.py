"""PPO for BipedalWalker-v3 and its relatives, top to bottom in one file.

Data flows down the page: Config -> environments -> networks -> rollout -> advantages -> update ->
evaluate -> checkpoint -> log and export -> train. A section uses only what stands above it. To
read only the trainer, read sections 1 to 6, then 10; sections 0 and 7 to 9 surround it.

BipedalWalker-v3, default settings with EnvPool, seeds 11 to 15: solved after 39 to 88 s of
training, median 48 s, if evaluated every 100,000 steps; the best policies of 3M steps return 322 to
340 over 100 new episodes, median 333. Two cores of a virtual AMD EPYC, PyTorch 2.13.0, Gymnasium
1.4.0, EnvPool 1.2.5.

Shapes: T rollout steps, N environments, B rows of a minibatch, O observation, A action.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from datetime import timedelta
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import pydantic
import torch
import torch.distributed as dist
from filelock import FileLock
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from torch import Tensor, nn, optim

# raised when the contents of a checkpoint change their meaning
CHECKPOINT_FORMAT = 4


class UserError(Exception):
    """The user asked for something impossible: shown as one line, exit code 2."""


class TrainingError(RuntimeError):
    """A valid training run cannot continue: shown as one line, exit code 1."""


@contextlib.contextmanager
def reraise_as(kind, message, *caught):
    """Turn any of `caught` into `kind` with one line: the message, then the reason."""
    try:
        yield
    except caught as error:
        reason = str(getattr(error, "strerror", None) or error)
        if not isinstance(error, (kind, OSError)):
            reason = f"{type(error).__name__}: {reason}"
        raise kind(f"{message}: {' '.join(reason.split())[:300]}") from error


# ==== 0. Processes: several under torchrun, or one ================================================


def join_processes():
    """Meet the other processes that torchrun has started: by gloo on CPUs, by NCCL on GPUs.

    A restart has a part of the store to itself: elsewhere PyTorch 2.13 may find the address of a
    process that is gone.
    """
    with reraise_as(UserError, "WORLD_SIZE is set, but not by torchrun", ValueError):
        store, rank, size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    # imported later, as by an optimizer, its functions' defaults would keep the group alive
    import torch.distributed.nn  # noqa: F401

    # a day, as the others wait while process 0 evaluates
    dist.init_process_group(timeout=timedelta(days=1), store=store, rank=rank, world_size=size)


def rank_and_world_size():
    """This process's number, and how many there are; (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_processes(values: Tensor) -> Tensor:
    """Add up the `values` of all processes, in place. TrainingError if a process is gone."""
    if dist.is_initialized():
        with reraise_as(TrainingError, "another process is gone, use --resume", RuntimeError):
            dist.all_reduce(values)
    return values


def any_process(flag: bool) -> bool:
    """Whether `flag` is true in any process. All of them wait here for each other."""
    return bool(sum_over_processes(torch.tensor(float(flag))))


# ==== 1. Config ===================================================================================

VALIDATION = pydantic.ConfigDict(allow_inf_nan=False, extra="forbid")
Device = Literal["auto", "cpu", "cuda", "mps"]
Schedule = Literal["constant", "linear", "cosine", "adaptive"]
Layers = tuple[Annotated[int, pydantic.Field(ge=1, le=4096)], ...]
# the names of the groups make pydantic's message readable
KeyValue = Annotated[str, pydantic.Field(pattern="(?P<KEY>.+)=(?P<VALUE>.*)")]


# 3e6 is one, too
Int = Annotated[int, pydantic.BeforeValidator(float)]


def setting(default, meaning, **limits):
    """A field: its default, its line in `--help`, and its limits in pydantic's terms."""
    return pydantic.Field(default, description=meaning, **limits)


def course(value):
    """VALUE, or the tuple START END or START END FROM TO. ValueError if it is none of them."""
    numbers = np.array(value, float, ndmin=1).tolist()
    window = numbers[2:]
    shaped = len(numbers) in (1, 2, 4) and window == sorted(set(window))
    if not (shaped and np.isfinite(numbers).all() and min(numbers[:2]) >= 0):
        raise ValueError("it must be VALUE, START END, or START END FROM TO, at least 0")
    return tuple(numbers) if len(numbers) > 1 else numbers[0]


# A setting that may move: from START to END over the run, or while the training return goes from
# FROM to TO.
Course = Annotated[Any, pydantic.PlainValidator(course)]


class Validated:
    """Base of dataclasses that are checked on creation. UserError names the first wrong field."""

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def _raise_user_error(cls, values, validate):
        try:
            return validate(values)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            value = (values.kwargs or {}).get(name)
            rule = first["msg"].removeprefix("Value error, ").replace("Input should", "it must")
            raise UserError(f"--{flag_name(name)} is {value!r}: {rule}") from None


def flag_name(field: str) -> str:
    return field.replace("_", "-")


@pydantic.dataclasses.dataclass(frozen=True, config=VALIDATION)
class Config(Validated):
    """Settings of one run. Each is a flag of `walker.py` too."""

    env: str = setting("BipedalWalker-v3", "Gymnasium id, or MODULE:ID", pattern=r"\S")
    env_kwargs: tuple[KeyValue, ...] = setting((), "environment arguments, KEY=VALUE")
    total_timesteps: Int = setting(1_000_000, "environment steps of the run", ge=1)
    max_episode_steps: Int = setting(10_000, "time limit of environments without one", ge=1)
    seed: Int = setting(1, "seed of the whole run", ge=0, lt=2**32)
    device: Device = setting("auto", "auto: cuda if present, or cpu")
    out: str = setting(".", "folder for the run's files", min_length=1)
    init_from: str | None = setting(None, "checkpoint to start from")

    vector_env: Literal["sync", "envpool"] = setting("sync", "how to step environments")
    num_envs: Int = setting(8, "environments per process (N)", ge=1, le=100_000)
    rollout_steps: Int = setting(256, "steps per environment and update (T)", ge=2, le=10**6)
    norm_obs: bool = setting(True, "normalize observations")
    norm_reward: bool = setting(True, "scale rewards by the std of returns")
    clip_obs: float = setting(10.0, "clip normalized observations to ± this", gt=0)
    clip_reward: tuple[float, float] = setting((-10.0, 10.0), "clip normalized rewards to LOW HIGH")

    actor_hidden: Layers = setting((64, 64), "layers of the policy", min_length=1)
    critic_hidden: Layers = setting((64, 64), "layers of the critic", min_length=1)

    layer_norm: bool = setting(False, "a LayerNorm before each activation")
    mean_activation: Literal["none", "tanh"] = setting("none", "tanh keeps mean actions within ±1")
    init_std: float = setting(1.0, "initial std of the actions", ge=0.001, le=10)
    state_dependent_std: bool = setting(False, "let the policy output the std too")

    learning_rate: float = setting(3e-4, "learning rate of Adam", gt=0)
    value_learning_rate: float | None = setting(None, "critic's rate; None: the policy's", gt=0)
    lr_schedule: Schedule = setting("linear", "learning rate over time; adaptive: by KL")
    desired_kl: Course = setting(0.01, "KL the adaptive schedule aims at")
    gamma: float = setting(0.99, "discount factor", ge=0, le=1)
    gae_lambda: float = setting(0.95, "λ of advantage estimation", ge=0, le=1)
    clip_eps: float = setting(0.2, "clip the probability ratio to 1 ± this", gt=0)
    clip_value_eps: float | None = setting(None, "clip the change of a value to ± this", gt=0)
    failure_reward: float = setting(1e9, "terminations that pay at most this are failures")
    failure_cost: Course = setting(1.0, "multiply a failure's reward by this")
    action_cost: Course = setting(0.0, "charge this × the sum of |actions|")
    entropy_coef: Course = setting(0.0, "weight of the entropy bonus")
    value_coef: float = setting(0.5, "weight of the value loss", ge=0)
    max_grad_norm: float = setting(0.5, "clip the norm of the gradient to this", gt=0)
    update_epochs: Int = setting(5, "passes over each rollout", ge=1)
    minibatch_size: Int = setting(256, "rows per gradient step (B)", ge=2)
    target_kl: float | None = setting(None, "end an update whose KL exceeds 1.5 × this", gt=0)

    eval_every: Int = setting(100_000, "steps between evaluations; 0: never", ge=0)
    eval_episodes: Int = setting(10, "episodes per evaluation", ge=1)
    checkpoint_every: Int = setting(0, "steps between kept step_N.pt; 0: none", ge=0)
    record_every: Int = setting(0, "steps between videos; 0: at the end", ge=0)
    tensorboard: bool = setting(False, "log for TensorBoard")
    stop_when_solved: bool = setting(False, "stop as soon as the run is solved")

    def __post_init__(self):
        if not self.clip_reward[0] < self.clip_reward[1]:
            raise UserError(f"--clip-reward is {self.clip_reward}: it must be LOW < HIGH")
        if self.minibatch_size > self.batch_size:
            rule = f"it must be at most num_envs × rollout_steps = {self.batch_size}"
            raise UserError(f"--minibatch-size is {self.minibatch_size}: {rule}")

    @classmethod
    def for_env(cls, env: str = "BipedalWalker-v3", **settings) -> Config:
        """Defaults, then the environment's preset, then `settings`."""
        return cls(**{"env": env, **PRESETS.get(preset_name(str(env)), {}), **settings})

    def at(self, step, training_return) -> Config:
        """The settings of one iteration: those that move are plain numbers in it.

        Between two positive numbers they move by equal factors, else by equal differences.
        """
        now = {}
        for name in COURSES:
            values = getattr(self, name)
            if isinstance(values, tuple):
                clock = step if len(values) == 2 else training_return
                ends, window = values[:2], values[2:] or (0, self.total_timesteps)
                geometric = min(ends) > 0
                value = float(np.interp(clock, window, np.log(ends) if geometric else ends))
                now[name] = math.exp(value) if geometric else value
        return dataclasses.replace(self, **now)

    @property
    def batch_size(self) -> int:
        """Steps per iteration of one process, T × N."""
        return self.num_envs * self.rollout_steps

    @property
    def steps_per_iteration(self) -> int:
        """Steps per iteration of all processes, known once they have joined."""
        return self.batch_size * rank_and_world_size()[1]

    @property
    def num_minibatches(self) -> int:
        """Gradient steps per epoch; of at least 3 rows each, as every second may be a reset row."""
        return max(self.batch_size // max(self.minibatch_size, 3), 1)

    @property
    def env_options(self) -> dict:
        """`env_kwargs` as keyword arguments: Python literals where they parse, else strings."""
        options = dict(pair.split("=", 1) for pair in self.env_kwargs)
        for key, value in options.items():
            with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
                options[key] = ast.literal_eval(value)
        return options


# Settings of the networks, which come with the weights of --init-from.
NETWORKS = (
    "actor_hidden", "critic_hidden", "layer_norm", "mean_activation", "state_dependent_std",
)  # fmt: skip
# Settings that may move, and columns of metrics.csv.
COURSES = ("desired_kl", "failure_cost", "action_cost", "entropy_coef")

# Only what differs from the defaults above. tests/benchmarks/TUNING.md tells what was tried.
BIPEDAL: dict = {
    "num_envs": 64, "rollout_steps": 128, "minibatch_size": 2048, "lr_schedule": "adaptive",
    "learning_rate": 1e-3, "desired_kl": (0.02, 0.0), "max_grad_norm": 5.0,
    "failure_reward": -50.0, "clip_reward": (-200.0, 200.0), "eval_every": 250_000,
}  # fmt: skip
MUJOCO: dict = {"update_epochs": 10, "max_grad_norm": 1.0}
PRESETS: dict = {
    "BipedalWalker-v3": BIPEDAL | {
        "total_timesteps": 3_000_000, "gamma": 0.98, "action_cost": (0.0, 0.3, 150.0, 280.0),
        "entropy_coef": (0.006, 0.0, 100.0, 230.0), "failure_cost": (0.2, 20.0, 100.0, 335.0),
    },
    "BipedalWalkerHardcore-v3": BIPEDAL | {
        "total_timesteps": 40_000_000, "actor_hidden": (128, 128), "critic_hidden": (128, 128),
        "num_envs": 256, "rollout_steps": 32, "eval_every": 1_000_000, "eval_episodes": 40,
        "gae_lambda": 0.8, "desired_kl": (0.015, 0.0),
        "action_cost": (0.0, 0.14, 100.0, 220.0), "failure_cost": (0.05, 20.0, 50.0, 285.0),
        "entropy_coef": (0.012, 0.0, 100.0, 300.0),
    },
    "HalfCheetah-v5": MUJOCO | {
        "minibatch_size": 64, "init_std": 0.4, "gamma": 0.98, "gae_lambda": 0.92,
    },
    "Walker2d-v5": MUJOCO | {"minibatch_size": 64, "init_std": 0.5},
    "Humanoid-v5": MUJOCO | {
        "total_timesteps": 10_000_000, "lr_schedule": "adaptive", "desired_kl": 0.03,
        "gamma": 0.97, "init_std": 0.5,
    },
    "LunarLander-v3": {"num_envs": 16, "learning_rate": 1e-3, "gamma": 0.999, "gae_lambda": 0.98},
    "Acrobot-v1": {"norm_obs": False},
    "CarRacing-v3": {
        "total_timesteps": 300_000, "update_epochs": 10, "init_std": 0.2,
        "actor_hidden": (256,), "critic_hidden": (256,),
    },
}  # fmt: skip


def preset_name(env: str) -> str:
    """The name without MODULE:, and with the version of a preset if it has none."""
    name = env.rpartition(":")[2]
    return next((known for known in PRESETS if known.rpartition("-v")[0] == name), name)


# ==== 2. Environments =============================================================================

# streams of seeds
TRAIN, EVALUATE, CONFIRM, VIDEO, TEST, LEARN = range(6)


def env_seeds(seed, stream, count, rank=0, step=0) -> list[int]:
    """`count` seeds of one stream; the first k are the same for every `count`.

    Consecutive integers would make runs with seeds 1 and 2 share all worlds but one.
    """
    words = np.random.SeedSequence([seed, stream, rank, step]).generate_state(count)
    # 31 bits: EnvPool's limit
    return [int(word) >> 1 for word in words]


def seed_generators(seed: int):
    """Seed the global generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def is_image(space: gym.Space, channels=0) -> bool:
    """Whether it holds bytes, with that axis for channels; the convolutions need 20 pixels."""
    fits = isinstance(space, Box) and len(space.shape) == 3 and space.dtype == np.uint8
    return fits and min(np.delete(space.shape, channels)) >= 20


def gray_half(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) to (H / 2, W / 2): every second pixel, without its color."""
    return image[::2, ::2].mean(axis=-1).astype(np.uint8)


def arrange_images(env) -> gym.Env:
    """Put channels first. Of colored images, show the last four, in gray and halved.

    Other channels than three may be the layers of a map, or images that are stacked already.
    """
    space = env.observation_space
    if not is_image(space, channels=-1):
        return env
    is_colored = space.shape[-1] == 3 and min(space.shape[:2]) >= 40
    change = gray_half if is_colored else functools.partial(np.moveaxis, source=-1, destination=0)
    changed = Box(0, 255, change(space.low).shape, np.uint8)
    env = gym.wrappers.TransformObservation(env, change, changed)
    return gym.wrappers.FrameStackObservation(env, 4) if is_colored else env


def network_space(space: gym.Space) -> Box:
    """What the networks see of observations: (channels, height, width) of bytes, or a vector.

    ValueError, NotImplementedError if it cannot be flattened to at most 20,000 numbers.
    """
    if is_image(space):
        return space
    size = gym.spaces.flatdim(space)
    if size > 20_000:
        raise ValueError(f"{size:,} numbers are over 20,000, and no image")
    # float32 would round large whole numbers
    return Box(-np.inf, np.inf, (size,), np.float32 if space.dtype == np.float32 else float)


def choices_of(space: gym.Space) -> list[int]:
    """How many choices each number of a discrete action has; none for a Box."""
    if isinstance(space, Discrete | MultiDiscrete):
        return np.ravel(space.n if isinstance(space, Discrete) else space.nvec).tolist()
    if not isinstance(space, Box | MultiBinary):
        raise NotImplementedError(f"no policy for actions of {space}")
    return [2] * math.prod(space.shape) if isinstance(space, MultiBinary) else []


def check_finite(obs, reward=0.0):
    """TrainingError if an environment returned a number that is not finite in float32."""
    for what, value in (("observation", obs), ("reward", reward)):
        if not (np.abs(value) <= np.finfo(np.float32).max).all():
            raise TrainingError(f"the {what} is not finite")


class NamedEnv(gym.Wrapper):
    """An environment as the trainer wants it; what goes wrong is a TrainingError that names it.

    Observations are new arrays, as `network_space` says. Infos and options are left out, as
    nothing uses them.
    """

    def __init__(self, env, name: str):
        super().__init__(env)
        self.name = name
        self.observation_space = network_space(env.observation_space)

    def reset(self, *, seed=None, options=None):
        # anything, even SystemExit: the environment is not our code
        with reraise_as(TrainingError, self.name, Exception, SystemExit):
            if seed is not None:
                self.unwrapped.observation_space.seed(seed)
                self.unwrapped.action_space.seed(seed)
            obs, _ = self.env.reset(seed=seed)
            return self._convert(obs), {}

    def step(self, action):
        with reraise_as(TrainingError, self.name, Exception, SystemExit):
            obs, reward, terminated, truncated, _ = self.env.step(action)
            # an array of one number is one
            reward = np.asarray(reward, float).item()
            return self._convert(obs, reward), reward, bool(terminated), bool(truncated), {}

    def close(self):
        # what it cannot close is lost anyway
        with contextlib.suppress(Exception, SystemExit):
            self.env.close()

    def _convert(self, obs, reward: float = 0.0) -> np.ndarray:
        space = self.env.observation_space
        if isinstance(space, Box) and np.shape(obs) != space.shape:
            raise ValueError(f"its observation has shape {np.shape(obs)}, not {space.shape}")
        if not is_image(space):
            obs = gym.spaces.flatten(space, obs)
        obs = np.array(obs, self.observation_space.dtype)
        check_finite(obs, reward)
        return obs


def make_env(config, render_mode=None, name="environment") -> gym.Env:
    """One environment of the run. UserError if Gymnasium cannot make it or PPO cannot use it."""
    options = config.env_options | ({} if render_mode is None else {"render_mode": render_mode})
    # any Exception: it comes from the environment's code
    failed = reraise_as(UserError, f"--env {config.env} cannot be made", Exception, SystemExit)
    # without warnings: the exception alone says it, in one line
    with failed, warnings.catch_warnings(action="ignore"):
        env = gym.make(config.env, disable_env_checker=True, **options)
    if config.action_cost and not isinstance(env.action_space, Box):
        raise UserError(f"--action-cost: the actions of {config.env} are no Box")
    if env.spec.max_episode_steps is None:
        env = gym.wrappers.TimeLimit(env, config.max_episode_steps)
    unsupported = f"--env {config.env}: its spaces are not supported"
    with reraise_as(UserError, unsupported, ValueError, NotImplementedError):
        choices_of(env.action_space)
        return NamedEnv(arrange_images(env), name)


def make_envpool(config, env, seeds) -> VectorEnv:
    """EnvPool's N environments."""
    with reraise_as(UserError, "--vector-env envpool needs `pip install envpool`", ImportError):
        import envpool
    name, shape = env.spec.id, env.unwrapped.observation_space.shape
    if name not in envpool.list_all_envs() or shape != env.observation_space.shape:
        raise UserError(f"--vector-env envpool has no {config.env} of vectors: use sync")
    threads = max(os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)
    options = {"num_envs": config.num_envs, "seed": list(seeds), "num_threads": threads}
    # any Exception: its arguments are its own
    with reraise_as(UserError, f"--env-kwargs of EnvPool's {name}", Exception):
        if config.env_options.get("max_episode_steps", 1) < 1:
            raise ValueError("max_episode_steps must be at least 1")
        return envpool.make_gymnasium(name, **options, **config.env_options)


def make_vector_env(config, env, seeds):
    """N environments like `env` with NEXT_STEP autoreset; their first observations (N, *O).

    The row after an episode's end ignores its action, has reward 0 and is no transition.
    """
    if config.vector_env == "envpool":
        envs = make_envpool(config, env, seeds)
        return envs, envs.reset()[0]
    names = [f"environment {i}, first reset with seed {seed}" for i, seed in enumerate(seeds)]
    makers = [functools.partial(make_env, config, name=name) for name in names]
    envs = SyncVectorEnv(makers, autoreset_mode=AutoresetMode.NEXT_STEP)
    return envs, envs.reset(seed=list(seeds))[0]


class RunningMeanStd(nn.Module):
    """Mean and variance of all rows so far, of every process, in float64; 0 and 1 before any."""

    def __init__(self, shape=()):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def update(self, batch: Tensor):
        """Merge the rows of `batch` (B, *shape), and those of the other processes' batches.

        Sums are of distances to the mean so far, at first to a row, so that none is large (Chan et
        al. 1979).
        """
        if self.count == 0:
            first_rows = sum_over_processes(batch[:1].double().sum(0))
            self.mean.copy_(first_rows / rank_and_world_size()[1])
        delta = batch.double() - self.mean
        rows = sum_over_processes(self.count.new_tensor(len(batch)))
        sums, squares = sum_over_processes(torch.stack([delta.sum(0), delta.square().sum(0)]))
        # no division by zero before the first row
        total = (self.count + rows).clamp(min=1)
        shift = sums / total
        self.var.copy_((self.count * self.var + squares) / total - shift**2).clamp_(min=0)
        self.mean += shift
        self.count += rows


class ObservationNormalizer(RunningMeanStd):
    """Scales observations by their running mean and variance; images only to [0, 1].

    It lives on the CPU, as observations do. Its statistics change between rollouts only, so that
    what is stored is what the policy saw.
    """

    def __init__(self, config, space: Box):
        is_vector = len(space.shape) == 1
        super().__init__(space.shape if is_vector else ())
        self.enabled = is_vector and config.norm_obs
        self.clip = config.clip_obs

    def normalize(self, obs: np.ndarray) -> Tensor:
        """Raw observations (B, *O) to float32."""
        obs = torch.as_tensor(obs)
        if self.enabled:
            scaled = (obs - self.mean) / torch.sqrt(self.var + 1e-16)
            return scaled.clamp_(-self.clip, self.clip).float()
        return obs.float() / 255 if obs.dtype == torch.uint8 else obs.float()


class RewardNormalizer(RunningMeanStd):
    """Divides rewards by the running std of the discounted return, so that values are of order 1.

    The mean is not subtracted: only the scale changes, never the sign.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config

    def normalize(self, rewards, valid, discounted_return) -> Tensor:
        """Scale the rewards (T, N) of a rollout.

        `discounted_return` (N,), each running episode's so far, is updated in place. A reset row
        sets it to zero, so every episode starts from there.
        """
        # sync point
        device, rewards, valid = rewards.device, rewards.cpu(), valid.cpu()
        history = torch.empty_like(rewards)
        for t in range(len(rewards)):
            discounted_return.mul_(self.config.gamma).add_(rewards[t]).mul_(valid[t])
            history[t] = discounted_return
        self.update(history[valid])
        return self.scale(rewards).to(device)

    def scale(self, rewards: Tensor) -> Tensor:
        """Rewards on the CPU, divided and clipped."""
        if not self.config.norm_reward:
            return rewards
        scaled = rewards / torch.sqrt(self.var + 1e-16).to(rewards.dtype)
        return scaled.clamp_(*self.config.clip_reward)


# ==== 3. Networks =================================================================================


def orthogonal(layer: nn.Module, gain: float = math.sqrt(2)) -> nn.Module:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def make_network(space, hidden, outputs, config, out_gain):
    """Linear layers with activations between; for images (C, H, W), two convolutions before them.

    Gains √2 inside and `out_gain` last: Andrychowicz et al. 2021, "What Matters In On-Policy RL".
    """
    layers, inputs = [], space.shape[0]
    # the first two layers of Mnih et al. 2015, half as wide
    if len(space.shape) == 3:
        layers += [orthogonal(nn.Conv2d(inputs, 16, 8, stride=4)), nn.ReLU()]
        layers += [orthogonal(nn.Conv2d(16, 32, 4, stride=2)), nn.ReLU(), nn.Flatten()]
        inputs = nn.Sequential(*layers)(torch.zeros(1, *space.shape)).shape[1]
    for size in hidden:
        layers.append(orthogonal(nn.Linear(inputs, size)))
        if config.layer_norm:
            layers.append(nn.LayerNorm(size))
        layers.append(nn.SiLU())
        inputs = size
    layers.append(orthogonal(nn.Linear(inputs, outputs), out_gain))
    return nn.Sequential(*layers)


class ActorCritic(nn.Module):
    """A policy, Gaussian or of discrete choices, and a value function: two networks.

    Observations (B, *O) are normalized. Actions (B, A) are unclipped numbers, of which ±1 are the
    bounds of a Box that has some, or numbers of choices.
    """

    def __init__(self, obs_space: Box, action_space: gym.Space, config):
        super().__init__()
        self.config = config
        choices = torch.tensor(choices_of(action_space))
        self.discrete = len(choices) > 0
        outputs = math.prod(action_space.shape)
        if self.discrete:
            # (A, C): those with fewer than C choices lack the last ones
            self.lacking = torch.arange(choices.max()) >= choices[:, None]
            outputs = self.lacking.numel()
        self.state_dependent_std = config.state_dependent_std and not self.discrete
        actor_outputs = 2 * outputs if self.state_dependent_std else outputs
        self.actor = make_network(obs_space, config.actor_hidden, actor_outputs, config, 0.01)
        self.critic = make_network(obs_space, config.critic_hidden, 1, config, 1.0)
        if not self.discrete:
            # the inverse of softplus
            raw_std = math.log(math.expm1(config.init_std))
            self.raw_std = nn.Parameter(torch.full((outputs,), raw_std))

    def distribution(self, obs: Tensor):
        """The policy at normalized observations, one of torch.distributions."""
        outputs = self.actor(obs)
        if self.discrete:
            lacking = self.lacking.to(outputs.device)
            logits = outputs.unflatten(-1, lacking.shape).masked_fill(lacking, -1e9)
            choice = torch.distributions.Categorical(logits=logits, validate_args=False)
            return torch.distributions.Independent(choice, 1, validate_args=False)
        mean, raw_std = outputs, self.raw_std
        if self.state_dependent_std:
            mean, change = outputs.chunk(2, dim=-1)
            raw_std = raw_std + change
        if self.config.mean_activation == "tanh":
            mean = mean.tanh()
        std = nn.functional.softplus(raw_std).clamp(min=1e-3).expand_as(mean)
        normal = torch.distributions.Normal(mean, std, validate_args=False)
        return torch.distributions.Independent(normal, 1, validate_args=False)

    def act(self, obs: Tensor):
        """Sampled actions and their log-probabilities (B,)."""
        distribution = self.distribution(obs)
        actions = distribution.sample()
        return actions, distribution.log_prob(actions)

    def evaluate_actions(self, obs: Tensor, actions: Tensor):
        """Log-probabilities (B,) of given actions under the current policy; its entropies (B,)."""
        distribution = self.distribution(obs)
        return distribution.log_prob(actions), distribution.entropy()

    def value(self, obs: Tensor) -> Tensor:
        """Expected discounted return of normalized rewards, (B, *O) -> (B,)."""
        return self.critic(obs).squeeze(-1)

    def mean_action(self, obs: Tensor) -> Tensor:
        """Actions of the deterministic policy: the mean, or the likeliest."""
        return self.distribution(obs).mode


def action_scale(space: Box):
    """The center and the half range of a Box, *A each; 0 and 1 where it has no bounds."""
    low, high = space.low.astype(float), space.high.astype(float)
    bounded = high - low < 1e30
    low, high = np.where(bounded, low, -1), np.where(bounded, high, 1)
    return (low + high) / 2, (high - low) / 2


def env_actions(actions: Tensor, space: gym.Space) -> np.ndarray:
    """The policy's actions (..., A) as an environment takes them, (..., *space.shape).

    ±1 are mapped to the bounds of a Box; choices are counted from a space's own start.
    """
    # sync point: the environments are on the CPU
    array = actions.cpu().numpy().reshape(*actions.shape[:-1], *space.shape)
    if not isinstance(space, Box):
        return array.astype(space.dtype) + getattr(space, "start", 0)
    center, half = action_scale(space)
    array = np.clip(center + half * array, space.low, space.high)
    return (array if space.dtype.kind == "f" else array.round()).astype(space.dtype)


# ==== 4. Rollout ==================================================================================


class Rollout:
    """T steps of N environments, preallocated on the device, and the unfinished episodes."""

    def __init__(self, config, env, seeds, first_obs: Tensor):
        T, N = config.rollout_steps, config.num_envs
        # row t + 1 is what step t returned; (T + 1, N, *O)
        self.obs = first_obs.new_zeros(T + 1, *first_obs.shape)
        self.obs[-1] = first_obs
        # unclipped
        self.actions = first_obs.new_zeros(T, N, math.prod(env.action_space.shape))
        self.logprobs = first_obs.new_zeros(T, N)
        # raw
        self.rewards = first_obs.new_zeros(T, N)
        self.terminated = first_obs.new_zeros(T, N, dtype=torch.bool)
        self.truncated = first_obs.new_zeros(T, N, dtype=torch.bool)
        # False on reset rows
        self.valid = first_obs.new_zeros(T, N, dtype=torch.bool)

        # whether the last step ended an episode
        self.ended = np.zeros(N, dtype=bool)
        self.episode_return = np.zeros(N)
        self.episode_length = np.zeros(N, dtype=np.int64)
        self.action_space = env.action_space
        # for the reward normalizer
        self.discounted_return = torch.zeros(N)
        # the length at which each environment is restarted once, see stagger_episode_starts
        self.restart_at = np.array(seeds) % env.spec.max_episode_steps


def stagger_episode_starts(envs, normalizer, rollout):
    """Restart each environment once, when its episode reaches a random length of its own.

    Environments that learn to survive together would otherwise start, walk and end together ever
    after, and most batches would hold no start. The cut falls between two rollouts, where the
    return is bootstrapped anyway.
    """
    due = (rollout.episode_length >= rollout.restart_at) & ~rollout.ended
    if not due.any():
        return
    obs, _ = envs.reset(options={"reset_mask": due})
    # EnvPool returns only those that it reset
    if len(obs) == len(due):
        obs = obs[due]
    rollout.obs[-1, due] = normalizer.normalize(obs).to(rollout.obs.device)
    rollout.restart_at[due] = sys.maxsize
    rollout.episode_return[due] = rollout.episode_length[due] = 0
    rollout.discounted_return[due] = 0


@torch.no_grad()
def collect_rollout(envs, agent, normalizer, rollout, bar=None):
    """Fill `rollout` with the next T steps, and move the progress bar along.

    Returns (return, length) of the episodes that ended, raw, and T raw observations (N, *O).
    """
    episodes, raw_obs = [], []
    stagger_episode_starts(envs, normalizer, rollout)
    rollout.obs[0] = rollout.obs[-1]
    for t in range(len(rollout.rewards)):
        rollout.valid[t] = torch.from_numpy(~rollout.ended)
        rollout.actions[t], rollout.logprobs[t] = agent.act(rollout.obs[t])
        actions = env_actions(rollout.actions[t], envs.single_action_space)
        obs, rewards, terminated, truncated, _ = envs.step(actions)
        rollout.episode_return += rewards
        rollout.episode_length += ~rollout.ended
        check_finite(obs, rewards)

        raw_obs.append(torch.from_numpy(obs))
        rollout.obs[t + 1] = normalizer.normalize(obs)
        rollout.rewards[t] = torch.from_numpy(rewards)
        rollout.terminated[t] = torch.from_numpy(terminated)
        rollout.truncated[t] = torch.from_numpy(truncated)

        if bar is not None:
            bar.update(len(obs))
        rollout.ended = terminated | truncated
        for i in np.flatnonzero(rollout.ended):
            episodes.append((float(rollout.episode_return[i]), int(rollout.episode_length[i])))
            rollout.episode_return[i] = rollout.episode_length[i] = 0
    return episodes, raw_obs


# ==== 5. Advantages ===============================================================================


def compute_gae(rewards, values, terminated, truncated, gamma, gae_lambda):
    """Generalized advantage estimation (Schulman et al. 2016, equation 16) with two endings.

    Tensors rewards, terminated, truncated: (T, N); values: (T + 1, N), where values[t + 1] is the
    value of the observation that step t returned: the true last one where an episode ended.
    Termination stops the bootstrap; either ending stops the λ-trace. Returns advantages and
    returns, (T, N); on reset rows they are unspecified.
    """
    nonterminal = (~terminated).to(values.dtype)
    continues = (~(terminated | truncated)).to(values.dtype)
    advantages = rewards + gamma * values[1:] * nonterminal - values[:-1]  # δ_t
    for t in reversed(range(len(rewards) - 1)):  # A_t = δ_t + γλ A_{t+1}
        advantages[t] += gamma * gae_lambda * continues[t] * advantages[t + 1]
    return advantages, advantages + values[:-1]


def learned_rewards(rewards, actions, terminated, config):
    """What is learned from: rewards less the cost of actions, failures at their own cost.

    Tensors rewards, terminated: (T, N) or (T,); actions: those and the environment's own shape. A
    failure is a termination that pays at most `failure_reward`. Returns rewards and which are
    failures; what stands on reset rows is unspecified.
    """
    failed = terminated & (rewards <= config.failure_reward)
    learned = torch.where(failed, rewards * config.failure_cost, rewards)
    amounts = actions.abs().reshape(*rewards.shape, -1).sum(-1)
    return learned - config.action_cost * amounts.to(learned), failed


class Batch(NamedTuple):
    """The transitions of a rollout, or of a minibatch, without reset rows. B rows."""

    # (B, *O) normalized, and (B, A) as the policy gave them
    obs: Tensor
    actions: Tensor
    # (B,) when collected
    logprobs: Tensor
    values: Tensor
    # (B,) with mean 0 and std 1 over the rollout
    advantages: Tensor
    # (B,)
    returns: Tensor

    def select(self, rows: Tensor) -> Batch:
        return Batch._make(tensor[rows] for tensor in self)


@torch.no_grad()
def make_batch(rollout, agent, reward_normalizer, config) -> Batch:
    """Advantages and returns of the normalized rewards; reset rows are dropped."""
    taken = torch.from_numpy(env_actions(rollout.actions, rollout.action_space))
    rewards, failed = learned_rewards(rollout.rewards, taken, rollout.terminated, config)
    rewards = reward_normalizer.normalize(rewards, rollout.valid, rollout.discounted_return)
    values = agent.value(rollout.obs.flatten(0, 1)).view(len(rollout.obs), -1)
    # only failures stop the bootstrap, any ending the λ-trace
    cut = rollout.truncated | rollout.terminated
    advantages, returns = compute_gae(rewards, values, failed, cut, config.gamma, config.gae_lambda)

    # over all processes; sync point
    statistics = RunningMeanStd()
    statistics.update(advantages[rollout.valid].cpu())
    advantages = ((advantages - statistics.mean) / (statistics.var.sqrt() + 1e-8)).float()
    obs, logprobs = rollout.obs[:-1], rollout.logprobs
    batch = Batch(obs, rollout.actions, logprobs, values[:-1], advantages, returns)
    return batch.select(rollout.valid)


# ==== 6. Update ===================================================================================


def ppo_loss(batch, logprobs, entropy, values, config):
    """The clipped objective (Schulman et al. 2017, equations 7 and 9) of the rows of `batch`.

    Tensors logprobs, entropy, values: (B,), of the networks as they are now. Returns the loss and
    its metrics, detached.
    """
    log_ratio = logprobs - batch.logprobs
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - config.clip_eps, 1 + config.clip_eps)
    objective = torch.min(ratio * batch.advantages, clipped_ratio * batch.advantages)
    policy_loss = -objective.mean()

    errors = (values - batch.returns).square()
    # the worse of the two, as in OpenAI's baselines
    if config.clip_value_eps is not None:
        change = (values - batch.values).clamp(-config.clip_value_eps, config.clip_value_eps)
        errors = errors.maximum((batch.values + change - batch.returns).square())
    value_loss = 0.5 * errors.mean()

    loss = policy_loss + config.value_coef * value_loss - config.entropy_coef * entropy.mean()
    metrics = {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy.mean(),
        # k2 of Schulman 2020, "Approximating KL Divergence": outliers count less than in k3
        "approx_kl": 0.5 * log_ratio.square().mean(),
        "clip_fraction": ((ratio - 1).abs() > config.clip_eps).float().mean(),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


def adapt_learning_rates(optimizer, kl: float, desired_kl: float):
    """Multiply the learning rates by one factor, after an update whose KL was `kl`.

    The KL grows with the square of the rate. The policy's rate stays within 1e-6 and 1e-2.
    """
    rate = optimizer.param_groups[0]["lr"]
    factor = np.clip(math.sqrt(desired_kl / max(kl, 1e-9)), 1 / 1.5, 1.5)
    factor = np.clip(factor, 1e-6 / rate, 1e-2 / rate)
    for group in optimizer.param_groups:
        group["lr"] *= float(factor)


def average_over_processes(agent, metrics, rows):
    """Gradients and metrics as means over the rows of all processes, in one flat all-reduce."""
    if not dist.is_initialized():
        return metrics
    gradients = [p.grad for p in agent.parameters()]
    values = torch.stack(list(metrics.values()))
    flat = nn.utils.parameters_to_vector([*gradients, values, values.new_ones(1)])
    flat = sum_over_processes(flat * rows)
    flat = flat / flat[-1]
    nn.utils.vector_to_parameters(flat, gradients)
    return dict(zip(metrics, flat[-1 - len(values) : -1], strict=True))


def mean_of(history, name):
    return torch.stack([metrics[name] for metrics in history]).mean()


def update(agent, optimizer, batch, config) -> dict:
    """Epochs of freshly shuffled minibatches; returns metrics averaged over all of them.

    The rows are split into `num_minibatches` near-equal parts, so that none is tiny and every
    process has the same number. An epoch whose KL is too large is the last one.
    """
    # metrics of each minibatch
    history = []
    desired_kl = config.desired_kl if config.lr_schedule == "adaptive" else math.inf
    kl_limit = min(1.5 * (config.target_kl or math.inf), 2 * desired_kl)
    for _ in range(config.update_epochs):
        shuffled = torch.randperm(len(batch.obs), device=batch.obs.device)
        for rows in shuffled.tensor_split(config.num_minibatches):
            minibatch = batch.select(rows)
            logprobs, entropy = agent.evaluate_actions(minibatch.obs, minibatch.actions)
            values = agent.value(minibatch.obs)
            loss, metrics = ppo_loss(minibatch, logprobs, entropy, values, config)
            optimizer.zero_grad()
            loss.backward()
            metrics = average_over_processes(agent, metrics, len(rows))
            norm = nn.utils.clip_grad_norm_(agent.parameters(), config.max_grad_norm)
            optimizer.step()
            history.append({**metrics, "grad_norm": norm})
        # sync point, once an epoch
        if mean_of(history[-config.num_minibatches :], "approx_kl") > kl_limit:
            break

    # sync point, once an update
    columns = {name: mean_of(history, name).item() for name in history[0]}
    if config.lr_schedule == "adaptive":
        adapt_learning_rates(optimizer, columns["approx_kl"], config.desired_kl)
    columns["learning_rate"] = float(optimizer.param_groups[0]["lr"])
    residual = (batch.returns - batch.values).var(correction=0)
    total = batch.returns.var(correction=0) + 1e-8
    columns["explained_variance"] = (1 - residual / total).item()
    if not agent.discrete:
        columns["action_std"] = agent.distribution(batch.obs).stddev.mean().item()
    return columns


def schedule_learning_rates(optimizer, config, step):
    """Set the rates of policy and value function for an absolute step of the whole run."""
    progress = min(step / config.total_timesteps, 1.0)
    factors = {"constant": 1.0, "linear": 1 - progress}
    factors["cosine"] = 0.5 * (1 + math.cos(math.pi * progress))
    if config.lr_schedule in factors:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factors[config.lr_schedule]


# ==== 7. Evaluate =================================================================================


@torch.inference_mode()
def act(agent, normalizer, action_space, obs: np.ndarray) -> np.ndarray:
    """The deterministic policy: raw observations (B, *O) to actions (B, A) within their space."""
    device = next(agent.parameters()).device
    return env_actions(agent.mean_action(normalizer.normalize(obs).to(device)), action_space)


def play(act, config, seeds, render=None):
    """One deterministic episode for each seed; yields (environment, step) after each step.

    A step is a dict of what it began with, was given, and led to. `render` is a render mode.
    """
    for episode, seed in enumerate(seeds):
        # a new environment, as a Box2D world keeps traces of the last episode
        with make_env(config, render, f"environment, first reset with seed {seed}") as env:
            obs, _ = env.reset(seed=seed)
            ended = False
            while not ended:
                # a batch of one: a row's last digits depend on how many there are
                [action] = act(obs[None])
                next_obs, reward, terminated, truncated, _ = env.step(action.copy())
                step = {"episode": episode, "observations": obs, "actions": action}
                step.update(rewards=reward, terminated=terminated, next_observations=next_obs)
                yield env, step
                obs, ended = next_obs, terminated or truncated


# Windows has no SIGHUP
END_SIGNALS = {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}


def interrupt(number, _frame):
    """A handler that lets a signal end the program as Ctrl-C does."""
    raise KeyboardInterrupt(number)


def prepare_worker():
    """Let a worker process live exactly as long as the main process, which alone gets signals."""
    for number in (signal.SIGINT, *END_SIGNALS):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=exit_with_main_process, daemon=True).start()
    if sys.platform == "linux" and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")
    torch.set_num_threads(1)


def exit_with_main_process():
    multiprocessing.parent_process().join()
    os._exit(1)


def map_in_workers(task, arguments):
    """task(argument) for each argument, in their order, in worker processes on all cores.

    Raises what a task raises, and TrainingError if a worker dies. None of them is left in the end,
    whatever it is doing.
    """
    # a process that has run JAX cannot be forked
    context = multiprocessing.get_context("spawn" if "jax" in sys.modules else None)
    pool = ProcessPoolExecutor(min(os.cpu_count(), len(arguments)), context, prepare_worker)
    failed = reraise_as(TrainingError, "a worker process died", BrokenExecutor)
    try:
        # a thread forks them: Python loses what a signal raises while the main thread does
        with failed, ThreadPoolExecutor(1) as thread:
            return list(thread.submit(pool.map, task, arguments).result())
    finally:
        # Python 3.14 has kill_workers for it
        for process in list((pool._processes or {}).values()):
            process.kill()
        pool.shutdown()


def play_in_worker(saved_act, config, seed, render=None):
    """Like `play`, of one episode, on the CPU."""
    # for environments that draw from the global generators
    seed_generators(seed)
    act = torch.load(io.BytesIO(saved_act), "cpu", weights_only=False)
    return play(act, config, [seed], render)


def play_one(saved_act, config, seed):
    """The raw return and the length of one episode."""
    rewards = [float(step["rewards"]) for _, step in play_in_worker(saved_act, config, seed)]
    return sum(rewards), len(rewards)


def to_bytes(value) -> bytes:
    """What torch.save writes."""
    data = io.BytesIO()
    torch.save(value, data)
    return data.getvalue()


def evaluate_policy(act, config, seeds):
    """Raw returns and lengths, (episodes,) each, of one deterministic episode for each seed.

    Every one counts, in the order of the seeds: to count the first to finish would favor falls.
    Touches no training state. Raises what `map_in_workers` raises.
    """
    task = functools.partial(play_one, to_bytes(act), config)
    return np.transpose(map_in_workers(task, seeds))


# ==== 8. Checkpoint ===============================================================================

LAST = "checkpoints_walker/last.pt"
BEST = "checkpoints_walker/best.pt"

# parts of a Learner: those of a policy and its values, and all that training changes
POLICY = ("agent", "obs_normalizer", "reward_normalizer")
LEARNED = (*POLICY, "optimizer")


@contextlib.contextmanager
def atomic_path(path: Path):
    """A temporary path beside `path` to write to, moved into place once it is whole on the disk.

    TrainingError if that fails; what was there before stays.
    """
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    with reraise_as(TrainingError, f"{path} cannot be written", OSError):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def resolve_device(name: str) -> torch.device:
    """The device of that name. UserError if this machine has none."""
    # every process of torchrun needs a GPU of its own
    fits = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if name == "auto":
        name = "cuda" if fits else "cpu"
    if not (fits if name == "cuda" else getattr(torch, name).is_available()):
        raise UserError(f"--device {name}: none here, use --device cpu")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)


@pydantic.dataclasses.dataclass
class Counters(Validated):
    """How far a run has come; plain numbers, saved with it."""

    step: pydantic.NonNegativeInt = 0
    iteration: pydantic.NonNegativeInt = 0
    # as if the run had been in one piece
    wall_s: pydantic.NonNegativeFloat = 0.0
    # running mean of the raw returns of training episodes, for settings that move with it
    training_return: float = -math.inf
    best_return: float = -math.inf
    solved_step: pydantic.NonNegativeInt | None = None


def provenance():
    """The command, versions and machine of this process, for readers; a commit if there is one."""
    found = {"command": sys.argv, "python": sys.version, "platform": platform.platform()}
    found["packages"] = {p.name: p.version for p in metadata.distributions()}
    git = ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"]
    with contextlib.suppress(OSError):
        found["commit"] = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return found


class Learner:
    """Everything that a checkpoint holds: networks, optimizer, normalizers and counters."""

    def __init__(self, config):
        self.config = config
        self.device = resolve_device(config.device)
        # never stepped: for its spaces, its spec and its metadata
        self.env = make_env(config)
        self.env.close()
        # the return that counts as solved, or None
        self.threshold = self.env.spec.reward_threshold
        # of films and of simulated time
        fps = self.env.metadata.get("render_fps")
        self.fps = float(fps) if isinstance(fps, int | float | np.number) and fps > 0 else 30.0
        obs_space, action_space = self.env.observation_space, self.env.action_space
        self.agent = ActorCritic(obs_space, action_space, config).to(self.device)
        self.optimizer = self._make_optimizer()
        self.obs_normalizer = ObservationNormalizer(config, obs_space)
        self.reward_normalizer = RewardNormalizer(config)
        self.act = functools.partial(act, self.agent, self.obs_normalizer, action_space)
        self.counters = Counters()
        # False from an update until its row is logged
        self.is_whole = True
        # which run it is, and what made it
        self.about = {"run": os.urandom(8).hex(), "reward_threshold": self.threshold}
        # when last.pt was written, and how long that took
        self.saved_at, self.save_s = -math.inf, 0.0

    def _make_optimizer(self) -> optim.Optimizer:
        policy = [p for name, p in self.agent.named_parameters() if not name.startswith("critic.")]
        parts = policy, self.agent.critic.parameters()
        rate = self.config.learning_rate
        rates = zip(parts, (rate, self.config.value_learning_rate or rate), strict=True)
        groups = [{"params": part, "lr": rate, "initial_lr": rate} for part, rate in rates]
        return optim.Adam(groups, eps=1e-5, fused=True)

    @torch.no_grad()
    def value(self, obs: np.ndarray) -> np.ndarray:
        """Raw observations (B, *O) to expected discounted returns of normalized rewards (B,)."""
        return self.agent.value(self.obs_normalizer.normalize(obs).to(self.device)).cpu().numpy()

    def is_done(self) -> bool:
        solved = self.counters.solved_step is not None and self.config.stop_when_solved
        return solved or self.counters.step >= self.config.total_timesteps

    def save(self, name: str):
        """Write the checkpoint `name` below --out.

        Tensors and plain values only, so that loading it can run no code.
        """
        state = {part: getattr(self, part).state_dict() for part in LEARNED}
        state.update(format=CHECKPOINT_FORMAT, about=self.about)
        state.update(config=vars(self.config), counters=vars(self.counters))
        with atomic_path(Path(self.config.out, name)) as temporary:
            # torch.save into the file makes a RuntimeError of a full disk
            temporary.write_bytes(to_bytes(state))

    def load(self, state, source, parts):
        """Load these parts of a checkpoint's state. UserError if they do not fit."""
        # any Exception: the file may hold anything
        with reraise_as(UserError, f"{source} does not fit this run", Exception):
            self.counters = Counters(**state["counters"])
            for part in parts:
                getattr(self, part).load_state_dict(state[part])


def load_checkpoint(path, env=None) -> dict:
    """A checkpoint's state on the CPU. Runs no code from it; UserError if it cannot be used.

    torch.load does not look at checksums, and loads most flipped bits silently as other values, so
    they are tested first. An environment of the form MODULE:ID would be imported, so the user must
    give it as `env`.
    """
    data = Path(path).read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            # torch would skip what is marked as a folder
            if archive.testzip() or any(record.external_attr for record in archive.infolist()):
                raise ValueError("a checksum is wrong")
        state = torch.load(io.BytesIO(data), "cpu", weights_only=True)
        number, saved_env, _ = state["format"], str(state["config"]["env"]), state["about"]["run"]
    except Exception:
        # a damaged or forged file can raise anything
        raise UserError(f"{path} is no checkpoint, or a damaged one") from None
    if number != CHECKPOINT_FORMAT:
        raise UserError(f"{path} has format {number}, this reads {CHECKPOINT_FORMAT}")
    if ":" in saved_env and env is None:
        raise UserError(f"{path} would import {saved_env!r}: allow it with --env")
    return state


def config_from(settings, source) -> Config:
    """The Config of a config.json or a checkpoint. UserError names `source`."""
    # `out` is where it lies now
    settings = {name: v for name, v in settings.items() if name not in ("_about", "out")}
    # a name may be no string
    with reraise_as(UserError, str(source), UserError, TypeError):
        return Config.for_env(**settings)


# What --resume may change: nothing that shapes the learner but the length of its schedule.
RESUMABLE = {
    "total_timesteps", "device", "vector_env", "out", "eval_every", "eval_episodes",
    "checkpoint_every", "record_every", "tensorboard", "stop_when_solved",
}  # fmt: skip


def resume_learner(config, source) -> Learner:
    """The learner of a checkpoint. UserError if `config` differs in what the learner sees."""
    state = load_checkpoint(source, config.env)
    saved = config_from(state["config"], source)
    for name, old in vars(saved).items():
        new = getattr(config, name)
        if new != old and name not in RESUMABLE:
            raise UserError(f"--{flag_name(name)} is {new!r}, but {source} has {old!r}")
    learner = Learner(config)
    learner.load(state, source, LEARNED)
    learner.about["run"] = state["about"]["run"]
    # best.pt may be newer than the checkpoint, or have stayed in another folder
    learner.counters.best_return, best = -math.inf, Path(config.out, BEST)
    if best.exists():
        learner.counters.best_return = load_checkpoint(best, config.env)["counters"]["best_return"]
    return learner


def load_learner(checkpoint, env=None, device="auto", env_kwargs=()) -> Learner:
    """A trained policy with its statistics: `load_learner(path).act(obs)`.

    `env` is another environment to play in, `env_kwargs` are other arguments ("KEY=VALUE", …).
    UserError if the file is no checkpoint or does not fit.
    """
    state = load_checkpoint(checkpoint, env)
    config = config_from(state["config"], checkpoint)
    if env in (None, config.env):
        env, env_kwargs = config.env, env_kwargs or config.env_kwargs
    learner = Learner(dataclasses.replace(config, env=env, env_kwargs=env_kwargs, device=device))
    learner.load(state, checkpoint, POLICY)
    return learner


# ==== 9. Log and export ===========================================================================

CSV_COLUMNS = [
    "step", "iteration", "wall_s", "steps_per_s", "collect_s", "update_s", "eval_s", "episodes",
    "return_mean", "return_min", "return_max", "length_mean", "length_min", "length_max",
    "eval_return_mean", "eval_return_std", "eval_episodes", "policy_loss", "value_loss", "entropy",
    "approx_kl", "clip_fraction", "explained_variance", "action_std", "grad_norm", "learning_rate",
    "training_return", *COURSES,
]  # fmt: skip
METRICS_CSV = "checkpoints_walker/metrics.csv"
CONFIG_JSON = "checkpoints_walker/config.json"
TENSORBOARD = "checkpoints_walker/tensorboard"
FILM = "videos/walker_final.mp4"
CURVES = "plots/training_curves.png"
# All that a run writes below --out, as patterns.
RUN_FILES = [
    LAST, BEST, METRICS_CSV, CONFIG_JSON, CURVES, FILM, "videos/walker_final.gif",
    "checkpoints_walker/step_[0-9]*.pt", "videos/step_[0-9]*.mp4", "videos/step_[0-9]*.gif",
    f"{TENSORBOARD}/events.*", "checkpoints_walker/.*.tmp.*",
]  # fmt: skip


def run_in(out: Path):
    """Which run a folder holds, by its config.json or last.pt; None if neither says it."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        return json.loads((out / CONFIG_JSON).read_bytes())["_about"]["run"]
    with contextlib.suppress(OSError, UserError):
        return load_checkpoint(out / LAST, "")["about"]["run"]


@contextlib.contextmanager
def claim_folder(out, run, overwrite):
    """Make and lock the folder of the run with this id.

    UserError if it holds another run, one is running in it, or it cannot be written to.
    """
    checkpoints = out / "checkpoints_walker"
    holds_run = any((out / name).exists() for name in (BEST, LAST, METRICS_CSV))
    if holds_run and not overwrite and run_in(out) != run:
        advice = "--resume it, or use another --out or --overwrite"
        raise UserError(f"{checkpoints} holds a run: {advice}")
    with reraise_as(UserError, f"--out {out} is in use, or cannot be written to", OSError):
        checkpoints.mkdir(parents=True, exist_ok=True)
        lock = FileLock(checkpoints / ".lock").acquire(timeout=0)
    with lock:
        for pattern in RUN_FILES if overwrite else ():
            for path in out.glob(pattern):
                path.unlink()
        yield


def read_rows(path: Path, step: int):
    """The lines of metrics.csv up to `step`, without a torn last one. UserError if damaged."""
    header = ",".join(CSV_COLUMNS)
    with reraise_as(UserError, str(path), ValueError):
        # what follows the last line break is torn
        first, *rows = (path.read_text() if path.exists() else f"{header}\n").split("\n")[:-1]
        if first != header:
            raise ValueError(f"its columns are not {header[:40]} …")
        return [header, *(row for row in rows if int(row.split(",")[0]) <= step)]


class RunLog(contextlib.ExitStack):
    """metrics.csv, the progress bar on a terminal, and plain lines everywhere."""

    def __init__(self, path: Path, rows, config, counters):
        from tqdm import tqdm

        super().__init__()
        self.path = path
        self.last_line_at = time.monotonic()
        with atomic_path(path) as temporary:
            temporary.write_text("".join(f"{row}\n" for row in rows), newline="")
        bar = {"total": config.total_timesteps, "initial": counters.step, "unit": " steps"}
        # None: only a terminal gets the bar; a closed output does not
        off = None if sys.stderr else True
        self.bar = self.enter_context(tqdm(**bar, unit_scale=True, disable=off))
        self.board = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            folder = Path(config.out, TENSORBOARD)
            self.board = self.enter_context(SummaryWriter(folder, purge_step=counters.step + 1))

    def row(self, values: dict):
        """Append a row of those with a column, which is empty without one. Show the progress."""
        values = {k: v for k, v in values.items() if k in CSV_COLUMNS and v != -math.inf}
        cells = {k: f"{v:.6g}" if isinstance(v, float) else str(v) for k, v in values.items()}
        line = ",".join(cells.get(name, "") for name in CSV_COLUMNS)
        failed = reraise_as(TrainingError, f"{self.path} cannot be written", OSError)
        with failed, open(self.path, "a", newline="") as file:
            file.write(f"{line}\n")
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, values["step"])
        text = f"return {values.get('training_return', math.nan):.1f}"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(values["step"] - self.bar.n)
        if self.bar.disable and time.monotonic() - self.last_line_at > 10:
            speed = f"{values['steps_per_s']:,.0f} steps/s, {values['wall_s'] / 60:.1f} min"
            self.line(f"step {values['step']:,} of {self.bar.total:,}: {text}, {speed}")

    def line(self, text: str):
        # a closed output, or one that cannot show it, does not end a training
        with contextlib.suppress(OSError, ValueError), self.bar.external_write_mode():
            print(text, flush=True)
        self.last_line_at = time.monotonic()


def film_one(saved_act, config, measure, limit, files, seed):
    """Film an episode in a worker process, see `record_episode`."""
    import viz

    episode = play_in_worker(saved_act, config, seed, "rgb_array")
    return viz.film(itertools.islice(episode, limit), *files, measure)


def record_episode(learner, seed, mp4: Path, seconds=None, measure=None) -> list:
    """Film one deterministic episode, at most `seconds` (120 s), headless, as an MP4 and a GIF.

    Returns the data of each step, and with it what `measure` finds in the environment after it.
    TrainingError, whatever goes wrong.
    """
    limit, act = math.ceil((seconds or 120) * learner.fps), to_bytes(learner.act)
    # anything: it comes from the environment, its pictures or the encoder
    failed = reraise_as(TrainingError, "no video", Exception, SystemExit)
    with failed, atomic_path(mp4) as film, atomic_path(mp4.with_suffix(".gif")) as gif:
        files = learner.fps, film, gif
        task = functools.partial(film_one, act, learner.config, measure, limit, files)
        return map_in_workers(task, [seed])[0]


def write_episode_data(learner, steps, path):
    """Steps of `play` as an .npz for viz.py: arrays (steps, …), their values, and the units."""
    arrays = {name: np.stack([step[name] for step in steps]) for name in steps[0]}
    arrays["values"] = learner.value(arrays["observations"])
    arrays["next_values"] = learner.value(arrays.pop("next_observations"))
    config = learner.config.at(learner.counters.step, learner.counters.training_return)
    tensors = (torch.as_tensor(arrays[name]) for name in ("rewards", "actions", "terminated"))
    learned, failed = learned_rewards(*tensors, config)
    arrays.update(learned_rewards=learner.reward_normalizer.scale(learned), failed=failed)
    arrays.update(dt=1 / learner.fps, gamma=config.gamma)
    with atomic_path(path) as temporary:
        np.savez_compressed(temporary, **arrays)


def episode_columns(episodes):
    """Raw returns and lengths of this process's episodes that ended in an iteration."""
    columns = {"episodes": len(episodes)}
    # no episodes, no columns
    for name, values in zip(("return", "length"), zip(*episodes, strict=True), strict=False):
        columns.update({f"{name}_mean": np.mean(values), f"{name}_min": min(values)})
        columns[f"{name}_max"] = max(values)
    return columns


def film_policy(learner, log, mp4):
    """Film an episode with the run's own seed for films; one line if that cannot be."""
    log.line("filming an episode …")
    try:
        record_episode(learner, env_seeds(learner.config.seed, VIDEO, 1)[0], mp4)
        log.line(f"video: {mp4}, and a GIF beside it")
    # a film is not worth a training
    except TrainingError as error:
        log.line(str(error))


def draw_curves(learner, log):
    import viz

    csv, png = (Path(learner.config.out, name) for name in (METRICS_CSV, CURVES))
    with reraise_as(TrainingError, f"{png} cannot be drawn", OSError, viz.InputError):
        viz.plot_training_curves(csv, png)
    log.line(f"curves: {png}")


def export(learner, log):
    """Sum up the run, plot the curves, and film the best policy there is."""
    counters, out = learner.counters, Path(learner.config.out)
    log.line(f"{counters.step:,} steps in {counters.wall_s / 60:.1f} min")
    draw_curves(learner, log)
    # not into the learner: Ctrl-C would save it as the last state
    if (out / BEST).exists():
        learner = load_learner(out / BEST, learner.config.env, learner.config.device)
    film_policy(learner, log, out / FILM)


@contextlib.contextmanager
def open_run(learner, overwrite: bool) -> Iterator[RunLog]:
    """Claim the folder of a run and write its first files; if training fails, draw its curves."""
    config, counters, out = learner.config, learner.counters, Path(learner.config.out)
    with claim_folder(out, learner.about["run"], overwrite):
        rows = read_rows(out / METRICS_CSV, counters.step)
        with atomic_path(out / CONFIG_JSON) as temporary:
            # `_about` is for readers, plots and --resume
            temporary.write_text(json.dumps({**vars(config), "_about": learner.about}, indent=2))
        # before metrics.csv: if killed between, a resume still cuts it to this step
        learner.save(LAST)
        with RunLog(out / METRICS_CSV, rows, config, counters) as log:
            preset = "its preset" if preset_name(config.env) in PRESETS else "no preset"
            limit = learner.env.spec.max_episode_steps
            log.line(f"{config.env} ({preset}, at most {limit:,} steps), seed {config.seed}")
            log.line(f"{config.num_envs} {config.vector_env} environments, {learner.device}, {out}")
            try:
                yield log
            except (TrainingError, KeyboardInterrupt):
                # unless it is the disk that failed
                with contextlib.suppress(TrainingError):
                    if learner.is_whole:
                        learner.save(LAST)
                    draw_curves(learner, log)
                log.line("stopped: --resume goes on")
                raise


def is_due(every, step, config):
    """Whether the iteration that ends at `step` is the first at or past a multiple of `every`."""
    return every > 0 and step // every > (step - config.steps_per_iteration) // every


def evaluate_if_due(learner, log, started):
    """If an evaluation is due: its columns, and whether this policy is the best so far.

    A mean at the threshold is confirmed on 100 new episodes, and the policy ranked by those: the
    highest of many means over a few episodes is high by luck. As that is slow, it stops once the
    run is solved, except at its end.
    """
    config, counters, threshold = learner.config, learner.counters, learner.threshold
    is_last = config.eval_every > 0 and counters.step >= config.total_timesteps
    if not (is_last or is_due(config.eval_every, counters.step, config)):
        return {}, False
    log.bar.set_postfix_str("evaluating")
    seeds = env_seeds(config.seed, EVALUATE, config.eval_episodes)
    returns, _ = evaluate_policy(learner.act, config, seeds)
    columns = {"eval_return_mean": returns.mean(), "eval_return_std": returns.std()}
    columns["eval_episodes"] = len(returns)
    # few episodes do not outrank a hundred
    counts = threshold is None or returns.mean() < threshold
    if not counts and (counters.solved_step is None or is_last):
        counts, seeds = True, env_seeds(config.seed, CONFIRM, 100, step=counters.step)
        returns, _ = evaluate_policy(learner.act, config, seeds)
        if counters.solved_step is None and returns.mean() >= threshold:
            counters.solved_step = counters.step
            log.line(f"solved after {(time.perf_counter() - started) / 60:.1f} min (100 episodes)")
    is_best = counts and bool(returns.mean() > counters.best_return)
    if is_best:
        counters.best_return = float(returns.mean())
    praise = ", the best so far" if is_best else ""
    result = f"{returns.mean():.1f} ± {returns.std():.1f} over {len(returns)} episodes{praise}"
    log.line(f"step {counters.step:,}: evaluation {result}")
    return columns, is_best


def save_if_due(learner, is_best: bool):
    """Write best.pt, step_N.pt and last.pt where due.

    last.pt is due once writing it costs under 1 % of the time since the last one, or after 10 s.
    """
    step = learner.counters.step
    if is_best:
        learner.save(BEST)
    if is_due(learner.config.checkpoint_every, step, learner.config):
        learner.save(f"checkpoints_walker/step_{step}.pt")
    began = time.perf_counter()
    if began - learner.saved_at > min(100 * learner.save_s, 10):
        learner.save(LAST)
        learner.saved_at = time.perf_counter()
        learner.save_s = learner.saved_at - began


# ==== 10. Train ===================================================================================


def prepare_learner(config, resume) -> Learner:
    """A new learner, or one that goes on from `resume`. Writes nothing."""
    if config.tensorboard and not find_spec("tensorboard"):
        raise UserError("--tensorboard needs `pip install tensorboard`")
    # the same networks in every process
    seed_generators(env_seeds(config.seed, LEARN, 1)[0])
    if resume is not None:
        return resume_learner(config, resume)
    initial = config.init_from and load_checkpoint(config.init_from, config.env)
    learner = Learner(config)
    if initial:
        learner.load(initial, config.init_from, POLICY)
        learner.counters = Counters()
    if config.stop_when_solved and (learner.threshold is None or config.eval_every == 0):
        raise UserError("--stop-when-solved needs a reward threshold and --eval-every")
    return learner


def average_return(average, episodes) -> float:
    """The running mean of returns after the episodes of one more iteration, of all processes.

    Each episode has a weight of 0.02. -inf before the first has ended.
    """
    returns = [value for value, _ in episodes]
    count, total = sum_over_processes(torch.tensor([len(returns), sum(returns)]).double()).tolist()
    if count == 0:
        return average
    mean = total / count
    return mean if average == -math.inf else mean + 0.98**count * (average - mean)


def train(config, resume=None, overwrite=False) -> Counters:
    """Train, evaluate, save, log, and at the end plot the curves and film the best policy.

    `resume` is the checkpoint to go on from; `overwrite` removes an earlier run's files first.
    Returns how far it has come. Raises UserError for what the user can mend, TrainingError if
    training cannot go on. After that, or KeyboardInterrupt, the run can be resumed.
    """
    # an environment may change the current folder
    config = dataclasses.replace(config, out=os.path.abspath(config.out))
    with contextlib.ExitStack() as stack:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            join_processes()
            stack.callback(dist.destroy_process_group)
        rank, _ = rank_and_world_size()
        # what torchrun starts again must not remove what it has made
        overwrite = overwrite and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        # the same first networks on any number of cores
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        learner = prepare_learner(config, resume)
        agent, counters = learner.agent, learner.counters
        # small networks lose more to threads than they gain
        if sum(p.numel() for p in agent.parameters()) >= 100_000:
            torch.set_num_threads(threads)
        # TF32 on CUDA
        torch.set_float32_matmul_precision("high")
        seeds = env_seeds(config.seed, TRAIN, config.num_envs, rank, counters.step)
        envs, raw_obs = make_vector_env(config, learner.env, seeds)
        stack.callback(envs.close)
        first_obs = learner.obs_normalizer.normalize(raw_obs).to(learner.device)
        with reraise_as(UserError, "lower --num-envs or --rollout-steps", RuntimeError):
            rollout = Rollout(config, learner.env, seeds, first_obs)
        learner.about.update(provenance())
        # barrier: every process has read what rank 0 may remove now
        any_process(False)
        log = stack.enter_context(open_run(learner, overwrite)) if rank == 0 else None
        # as if the run had been in one piece
        started = time.perf_counter() - counters.wall_s

        while not any_process(learner.is_done()):
            # set the random numbers, the learning rate and the settings that move
            began = time.perf_counter()
            seed_generators(env_seeds(config.seed, LEARN, 1, rank, counters.step)[0])
            schedule_learning_rates(learner.optimizer, config, counters.step)
            now = config.at(counters.step, counters.training_return)

            # collect a rollout
            bar = log and log.bar
            episodes, raw_obs = collect_rollout(envs, agent, learner.obs_normalizer, rollout, bar)
            collected = time.perf_counter()

            # compute advantages of the normalized rewards; update
            learner.is_whole = False
            if learner.obs_normalizer.enabled:
                learner.obs_normalizer.update(torch.cat(raw_obs))
            batch = make_batch(rollout, agent, learner.reward_normalizer, now)
            losses = update(agent, learner.optimizer, batch, now)
            if not all(map(math.isfinite, losses.values())):
                raise TrainingError(f"lower --learning-rate, not finite: {losses}")
            counters.training_return = average_return(counters.training_return, episodes)
            counters.step += config.steps_per_iteration
            counters.iteration += 1
            updated = time.perf_counter()
            if rank > 0:
                # rank 0 evaluates, logs and saves
                continue

            # evaluate, if due
            evaluation, is_best = evaluate_if_due(learner, log, started)
            ended = time.perf_counter()
            counters.wall_s = ended - started

            # log a row
            times = {"collect_s": collected - began, "update_s": updated - collected}
            times["steps_per_s"] = config.steps_per_iteration / (updated - began)
            row = {**vars(counters), **times, "eval_s": ended - updated, **losses, **evaluation}
            row.update({name: getattr(now, name) for name in COURSES})
            log.row({**row, **episode_columns(episodes)})

            # save
            learner.is_whole = True
            save_if_due(learner, is_best)
            if is_due(config.record_every, counters.step, config):
                film_policy(learner, log, Path(config.out, f"videos/step_{counters.step}.mp4"))

        if rank == 0:
            learner.save(LAST)
            export(learner, log)
        # barrier: torchrun ends all processes when one ends, so wait for the film
        any_process(False)
    return counters
