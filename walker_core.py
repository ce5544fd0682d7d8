"""PPO for BipedalWalker-v3 and its relatives, top to bottom in one file.

Data flows down the page: Config -> environments -> networks -> rollout -> advantages -> update ->
evaluate -> checkpoint -> log and export -> train. A section uses only what stands above it. To
read only the trainer, read sections 1 to 6, then 10; sections 0 and 7 to 9 surround it.

BipedalWalker-v3, default settings with EnvPool, seeds 11 to 15: solved after 0.75M to 2.25M steps,
median 1.25M; the best policies of 3M steps return 333 to 338 over 100 new episodes, median 337. Two
cores of a virtual AMD EPYC, PyTorch 2.13.0, Gymnasium 1.4.0.

Shapes: T rollout steps, N environments, B rows of a minibatch, O observation, A action.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import dataclasses
import functools
import gc
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import pydantic
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from torch import Tensor, nn, optim

__version__ = "0.1.0"
# raised when the contents of a checkpoint change their meaning
CHECKPOINT_FORMAT = 2


class UserError(Exception):
    """The user asked for something impossible: shown as one line, exit code 2."""


class TrainingError(RuntimeError):
    """A training that was asked for correctly cannot go on: shown as one line, exit code 1."""


@contextlib.contextmanager
def reraise_as(kind: type[Exception], message: str, *caught: type[Exception]):
    """Turn any of `caught` into `kind` with one line: the message, then the reason."""
    try:
        yield
    except caught as error:
        reason = str(getattr(error, "strerror", None) or error)
        raise kind(f"{message}: {' '.join(reason.split())}") from error


# ==== 0. Processes: several under torchrun, or one ================================================


def join_processes():
    """Meet the other processes that torchrun has started: by gloo on CPUs, by NCCL on GPUs.

    A restart has a part of the store to itself: elsewhere PyTorch 2.13 may find the address of a
    process that is gone.
    """
    store, rank, world_size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(store=store, rank=rank, world_size=world_size)


def rank_and_world_size() -> tuple[int, int]:
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

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU, "silu": nn.SiLU}
VALIDATION = pydantic.ConfigDict(allow_inf_nan=False, extra="forbid")
Device = Literal["auto", "cpu", "cuda", "mps"]
Schedule = Literal["constant", "linear", "cosine", "adaptive"]
Layers = tuple[Annotated[int, pydantic.Field(ge=1, le=4096)], ...]
# the names of the groups make pydantic's message readable
KeyValue = Annotated[str, pydantic.Field(pattern="(?P<KEY>.+)=(?P<VALUE>.*)")]


def setting(default: Any, meaning: str, **limits: Any) -> Any:
    """A field: its default, its line in `--help`, and its limits in pydantic's terms."""
    return pydantic.Field(default, description=meaning, **limits)


def course(value: Any, least: float = 0.0) -> Any:
    """VALUE, or the tuple START END or START END FROM TO. ValueError if it is none of them."""
    numbers = np.array(value, dtype=float, ndmin=1).tolist()
    window = numbers[2:]
    shaped = len(numbers) in (1, 2, 4) and window == sorted(set(window))
    if not (shaped and np.isfinite(numbers).all() and min(numbers[:2]) >= least):
        raise ValueError(f"it must be VALUE, START END, or START END FROM TO, at least {least}")
    return tuple(numbers) if len(numbers) > 1 else numbers[0]


# A setting that may move: from START to END over the run, or while the training return goes from
# FROM to TO.
Course = Annotated[Any, pydantic.PlainValidator(course)]
AnySign = Annotated[Any, pydantic.PlainValidator(functools.partial(course, least=-math.inf))]


class Validated:
    """Base of dataclasses that are checked on creation. UserError names the first wrong field."""

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def _raise_user_error(cls, values: Any, validate: Callable) -> Any:
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
    total_timesteps: int = setting(1_000_000, "environment steps of the run", ge=1)
    seed: int = setting(1, "seed of the whole run", ge=0, lt=2**32)
    device: Device = setting("auto", "auto: cuda if present, or cpu")
    out: str = setting(".", "folder for checkpoints_walker/, videos/ and plots/", min_length=1)
    init_from: str | None = setting(None, "checkpoint to start from")

    vector_env: Literal["sync", "async", "envpool"] = setting("sync", "how to step environments")
    num_envs: int = setting(8, "environments per process (N)", ge=1, le=100_000)
    rollout_steps: int = setting(256, "steps per environment and update (T)", ge=2, le=10**6)
    step_timeout: float = setting(60.0, "seconds until an async worker counts as hung", gt=0)
    norm_obs: bool = setting(True, "normalize observations")
    norm_reward: bool = setting(True, "scale rewards by the std of returns")
    clip_obs: float = setting(10.0, "clip normalized observations to ± this", gt=0)
    clip_reward: tuple[float, float] = setting((-10.0, 10.0), "clip normalized rewards to LOW HIGH")

    actor_hidden: Layers = setting((64, 64), "layers of the policy", min_length=1)
    critic_hidden: Layers = setting((64, 64), "layers of the critic", min_length=1)
    activation: Literal["tanh", "relu", "elu", "silu"] = setting("silu", "activation function")
    layer_norm: bool = setting(False, "put a LayerNorm before each activation")
    mean_activation: Literal["none", "tanh"] = setting("none", "tanh keeps mean actions within ±1")
    init_std: float = setting(1.0, "initial std of the actions", ge=0.001, le=10)
    state_dependent_std: bool = setting(False, "let the policy network output the std too")

    learning_rate: float = setting(3e-4, "learning rate of Adam", gt=0)
    value_learning_rate: float | None = setting(None, "learning rate of the critic", gt=0)
    lr_schedule: Schedule = setting("linear", "learning rate over time; adaptive: by KL")
    desired_kl: Course = setting(0.01, "KL the adaptive schedule aims at")
    gamma: float = setting(0.99, "discount factor", ge=0, le=1)
    gae_lambda: float = setting(0.95, "λ of advantage estimation", ge=0, le=1)
    clip_eps: float = setting(0.2, "clip the probability ratio to 1 ± this", gt=0)
    clip_value_eps: float | None = setting(None, "clip the change of a value to ± this", gt=0)
    failure_reward: float = setting(1e9, "a termination paid at most this is a failure")
    failure_cost: Course = setting(1.0, "multiply a failure's reward by this")
    action_cost: Course = setting(0.0, "charge this × the sum of |actions|")
    entropy_coef: AnySign = setting(0.0, "weight of the entropy bonus")
    value_coef: float = setting(0.5, "weight of the value loss", ge=0)
    max_grad_norm: float = setting(0.5, "clip the norm of the gradient to this", gt=0)
    update_epochs: int = setting(5, "passes over each rollout", ge=1)
    minibatch_size: int = setting(256, "rows per gradient step (B)", ge=2)
    target_kl: float | None = setting(None, "end an update whose KL exceeds 1.5 × this", gt=0)

    eval_every: int = setting(100_000, "steps between evaluations; 0: never", ge=0)
    eval_episodes: int = setting(10, "episodes per evaluation", ge=1)
    checkpoint_every: int = setting(0, "steps between kept step_N.pt; 0: keep none", ge=0)
    record_every: int = setting(0, "steps between videos; 0: only at the end", ge=0)
    tensorboard: bool = setting(False, "write metrics for TensorBoard too")
    stop_when_solved: bool = setting(False, "stop as soon as the run is solved")

    def __post_init__(self):
        if not self.clip_reward[0] < self.clip_reward[1]:
            raise UserError(f"--clip-reward is {self.clip_reward}: it must be LOW < HIGH")
        if self.minibatch_size > self.batch_size:
            rule = f"at most num_envs × rollout_steps = {self.batch_size}"
            raise UserError(f"--minibatch-size is {self.minibatch_size}: it must be {rule}")

    @classmethod
    def for_env(cls, env: str = "BipedalWalker-v3", **settings: Any) -> Config:
        """Defaults, then the environment's preset, then `settings`."""
        return cls(**{"env": env, **PRESETS.get(str(env), {}), **settings})

    def at(self, step: int, training_return: float) -> Config:
        """The settings of one iteration: those that move are plain numbers in it.

        Between two positive numbers they move by equal factors, else by equal differences.
        """
        now = {}
        for name in COURSES:
            values = getattr(self, name)
            if isinstance(values, tuple):
                clock = step if len(values) == 2 else training_return
                ends, window = values[:2], values[2:] or (0, self.total_timesteps)
                if min(ends) > 0:
                    now[name] = math.exp(np.interp(clock, window, np.log(ends)))
                else:
                    now[name] = float(np.interp(clock, window, ends))
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
    def learning_rates(self) -> tuple[float, float]:
        """Those of policy and value function at the start."""
        return self.learning_rate, self.value_learning_rate or self.learning_rate

    @property
    def env_options(self) -> dict:
        """`env_kwargs` as keyword arguments: Python literals where they parse, else strings."""
        options = dict(pair.split("=", 1) for pair in self.env_kwargs)
        for key, value in options.items():
            with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
                options[key] = ast.literal_eval(value)
        return options


# Settings that may move, and columns of metrics.csv.
COURSES = ("desired_kl", "failure_cost", "action_cost", "entropy_coef")

# Only what differs from the defaults above. tests/benchmarks/TUNING.md tells what was tried.
BIPEDAL: dict = {
    "num_envs": 64, "rollout_steps": 128, "minibatch_size": 2048, "lr_schedule": "adaptive",
    "learning_rate": 1e-3, "desired_kl": (0.02, 0.0), "max_grad_norm": 5.0,
    "failure_reward": -100.0, "clip_reward": (-200.0, 200.0), "eval_every": 250_000,
}  # fmt: skip
MUJOCO: dict = {"update_epochs": 10, "max_grad_norm": 1.0}
PRESETS: dict = {
    "BipedalWalker-v3": {
        **BIPEDAL, "total_timesteps": 3_000_000, "gamma": 0.98,
        "entropy_coef": (0.006, 0.0, 100.0, 230.0), "failure_cost": (0.2, 20.0, 100.0, 335.0),
        "action_cost": (0.0, 0.3, 150.0, 280.0),
    },
    "BipedalWalkerHardcore-v3": {
        **BIPEDAL, "total_timesteps": 30_000_000, "desired_kl": (0.015, 0.0),
        "actor_hidden": (128, 128), "critic_hidden": (128, 128),
        "entropy_coef": (0.006, 0.0, 100.0, 220.0), "failure_cost": (0.08, 20.0, 60.0, 285.0),
        "action_cost": (0.0, 0.28, 230.0, 290.0),
    },
    "HalfCheetah-v5": {
        **MUJOCO, "minibatch_size": 64, "init_std": 0.4, "gamma": 0.98, "gae_lambda": 0.92,
    },
    "Walker2d-v5": {**MUJOCO, "minibatch_size": 64, "init_std": 0.5},
    "Humanoid-v5": {
        **MUJOCO, "total_timesteps": 10_000_000, "lr_schedule": "adaptive", "desired_kl": 0.03,
        "gamma": 0.97, "init_std": 0.2,
    },
    "LunarLander-v3": {"num_envs": 16, "learning_rate": 1e-3, "gamma": 0.999, "gae_lambda": 0.98},
    "CarRacing-v3": {
        "total_timesteps": 300_000, "update_epochs": 10, "init_std": 0.2,
        "actor_hidden": (256,), "critic_hidden": (256,),
    },
}  # fmt: skip


def saved_settings(config: Config) -> dict:
    """What config.json and checkpoints hold: all settings but `out`, which is where they lie."""
    return {name: value for name, value in vars(config).items() if name != "out"}


# ==== 2. Environments =============================================================================

# streams of seeds
TRAIN, EVALUATE, CONFIRM, VIDEO, TEST, LEARN = range(6)


def env_seeds(seed: int, stream: int, count: int, rank: int = 0, step: int = 0) -> list[int]:
    """`count` seeds of one stream; the first k are the same for every `count`.

    Consecutive integers would make runs with seeds 1 and 2 share all worlds but one.
    """
    words = np.random.SeedSequence([seed, stream, rank, step]).generate_state(count)
    # 31 bits: EnvPool's limit
    return [int(word) >> 1 for word in words]


def seed_everything(seed: int, rank: int, step: int):
    """Seed Python, NumPy and torch from the run's seed, the rank and the absolute step.

    Called before every iteration, so that a resumed run draws what it would have drawn.
    """
    [word] = env_seeds(seed, LEARN, 1, rank, step)
    random.seed(word)
    np.random.seed(word)
    torch.manual_seed(word)


def is_vector(space: gym.Space) -> bool:
    return isinstance(space, Box) and len(space.shape) == 1 and space.dtype.kind == "f"


def is_image(space: gym.Space) -> bool:
    """Whether it is (height, width, colors); halved, the convolutions need at least 20 pixels."""
    fits = isinstance(space, Box) and len(space.shape) == 3 and space.dtype == np.uint8
    return fits and min(space.shape[:2]) >= 40


def gray_half(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) to (H / 2, W / 2): every second pixel, without its color."""
    return image[::2, ::2].mean(axis=-1).astype(np.uint8)


def check_finite(name: str, obs: np.ndarray, reward: float = 0.0):
    """TrainingError if an environment returned a number that is not finite."""
    for what, value in (("observation", obs), ("reward", reward)):
        if not np.isfinite(value).all():
            raise TrainingError(f"{name}: its {what} is not finite")


class NamedEnv(gym.Wrapper):
    """Turns what goes wrong in an environment into a TrainingError that says in which."""

    def __init__(self, env: gym.Env, name: str):
        super().__init__(env)
        self.name = name

    def reset(self, **kwargs):
        obs, info = self._call(self.env.reset, **kwargs)
        check_finite(self.name, obs)
        return obs, info

    def step(self, action):
        obs, reward, *others = self._call(self.env.step, action)
        check_finite(self.name, obs, reward)
        return obs, reward, *others

    def render(self):
        return self._call(self.env.render)

    def _call(self, function, *args, **kwargs):
        try:
            return function(*args, **kwargs)
        # any Exception: the environment is not our code
        except Exception as error:
            raise TrainingError(f"{self.name}: {error!r}") from error


def make_env(config: Config, render_mode=None, name="environment") -> gym.Env:
    """One environment of the run. UserError if Gymnasium cannot make it or PPO cannot use it."""
    options = config.env_options | ({} if render_mode is None else {"render_mode": render_mode})
    # any Exception: it comes from the environment's code
    with reraise_as(UserError, f"--env {config.env} cannot be made", Exception):
        # the exception alone says it, in one line
        with warnings.catch_warnings(action="ignore"):
            env = gym.make(config.env, disable_env_checker=True, **options)
    # four images in a row show speed
    if is_image(env.observation_space):
        small = Box(0, 255, gray_half(env.observation_space.low).shape, np.uint8)
        env = gym.wrappers.TransformObservation(env, gray_half, small)
        env = gym.wrappers.FrameStackObservation(env, 4)
    elif not is_vector(env.observation_space):
        raise UserError(f"--env {config.env}: observations must be a float vector or an image")
    if not (is_vector(env.action_space) or isinstance(env.action_space, Discrete)):
        raise UserError(f"--env {config.env}: actions must be a float vector or Discrete")
    if config.action_cost and not is_vector(env.action_space):
        raise UserError(f"--action-cost: the actions of {config.env} are no float vector")
    return NamedEnv(env, name)


class WorkerVectorEnv(AsyncVectorEnv):
    """AsyncVectorEnv with a timeout on reset and step, which kills its workers on close."""

    def __init__(self, makers, timeout: float):
        super().__init__(makers, autoreset_mode=AutoresetMode.NEXT_STEP)
        self.timeout = timeout

    def reset(self, **kwargs):
        with self._report_failure():
            self.reset_async(**kwargs)
            return self.reset_wait(self.timeout)

    def step(self, actions):
        with self._report_failure():
            self.step_async(actions)
            return self.step_wait(self.timeout)

    def _report_failure(self):
        hung_or_died = (multiprocessing.TimeoutError, EOFError, ConnectionError)
        return reraise_as(TrainingError, "a worker process failed", *hung_or_died)

    def close_extras(self, **_kwargs):
        for process in self.processes:
            process.kill()
            process.join()


def make_in_worker(make: Callable) -> gym.Env:
    """What `make` makes, for AsyncVectorEnv."""
    # None: it makes one in the main process too, for its spaces
    if multiprocessing.parent_process() is not None:
        prepare_worker()
    return make()


def prepare_worker():
    """Let a worker process live exactly as long as the main process.

    Workers ignore Ctrl-C: the main process ends them, or they exit when it dies.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(os, "setpgid"):  # not on Windows
        os.setpgid(0, 0)
    threading.Thread(target=exit_with_main_process, daemon=True).start()
    torch.set_num_threads(1)
    # what exists now is no garbage: collecting that of an episode takes 5 ms, not 300
    gc.freeze()


def exit_with_main_process():
    multiprocessing.parent_process().join()
    os._exit(1)


def make_envpool(config: Config, env: gym.Env, seeds) -> VectorEnv:
    """EnvPool's N environments."""
    with reraise_as(UserError, "--vector-env envpool needs `pip install envpool`", ImportError):
        import envpool
    if config.env not in envpool.list_all_envs() or not is_vector(env.observation_space):
        raise UserError(f"--vector-env envpool has no {config.env} of vectors: use sync")
    threads = max(os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)
    options = {"num_envs": config.num_envs, "seed": list(seeds), "num_threads": threads}
    return envpool.make_gymnasium(config.env, **options, **config.env_options)


def make_vector_env(config: Config, env: gym.Env, seeds) -> tuple:
    """N environments like `env` with NEXT_STEP autoreset; their first observations (N, *O).

    The row after an episode's end ignores its action, has reward 0 and is no transition.
    """
    if config.vector_env == "envpool":
        envs = make_envpool(config, env, seeds)
        return envs, envs.reset()[0]
    makers = [
        functools.partial(make_env, config, name=f"environment {i}, first reset with seed {seed}")
        for i, seed in enumerate(seeds)
    ]
    if config.vector_env == "sync":
        envs = SyncVectorEnv(makers, autoreset_mode=AutoresetMode.NEXT_STEP)
    else:
        makers = [functools.partial(make_in_worker, make) for make in makers]
        envs = WorkerVectorEnv(makers, config.step_timeout)
    return envs, envs.reset(seed=list(seeds))[0]


class RunningMeanStd(nn.Module):
    """Mean and variance of all rows so far, of every process, in float64; 0 and 1 before any."""

    def __init__(self, shape: tuple[int, ...] = ()):
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

    def __init__(self, config: Config, space: Box):
        super().__init__(space.shape if is_vector(space) else ())
        self.enabled = is_vector(space) and config.norm_obs
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

    def __init__(self, config: Config):
        super().__init__()
        self.config = config

    def normalize(self, rewards: Tensor, valid: Tensor, discounted_return: Tensor) -> Tensor:
        """Scale the rewards (T, N) of a rollout.

        `discounted_return` (N,), each running episode's so far, is updated in place. A reset row
        sets it to zero, so every episode starts from there.
        """
        if not self.config.norm_reward:
            return rewards
        # sync point
        device, rewards, valid = rewards.device, rewards.cpu(), valid.cpu()
        history = torch.empty_like(rewards)
        for t in range(len(rewards)):
            discounted_return.mul_(self.config.gamma).add_(rewards[t]).mul_(valid[t])
            history[t] = discounted_return
        self.update(history[valid])
        scaled = rewards / self.scale().to(rewards.dtype)
        return scaled.clamp_(*self.config.clip_reward).to(device)

    def scale(self) -> Tensor:
        """What rewards are divided by, ()."""
        return torch.sqrt(self.var + 1e-16) if self.config.norm_reward else torch.ones(())


# ==== 3. Networks =================================================================================


def orthogonal(layer: nn.Module, gain: float = math.sqrt(2)) -> nn.Module:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def make_network(space: Box, hidden, outputs: int, config: Config, out_gain) -> nn.Sequential:
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
        layers.append(ACTIVATIONS[config.activation]())
        inputs = size
    layers.append(orthogonal(nn.Linear(inputs, outputs), out_gain))
    return nn.Sequential(*layers)


class ActorCritic(nn.Module):
    """A policy, Gaussian or for Discrete actions categorical, and a value function: two networks.

    Observations (B, *O) are normalized; actions are unclipped (B, A), or numbers (B,).
    """

    def __init__(self, obs_space: Box, action_space: Box | Discrete, config: Config):
        super().__init__()
        self.config = config
        self.discrete = isinstance(action_space, Discrete)
        outputs = int(action_space.n) if self.discrete else action_space.shape[0]
        self.state_dependent_std = config.state_dependent_std and not self.discrete
        actor_outputs = 2 * outputs if self.state_dependent_std else outputs
        self.actor = make_network(obs_space, config.actor_hidden, actor_outputs, config, 0.01)
        self.critic = make_network(obs_space, config.critic_hidden, 1, config, 1.0)
        if not self.discrete:
            # the inverse of softplus
            raw_std = math.log(math.expm1(config.init_std))
            self.raw_std = nn.Parameter(torch.full((outputs,), raw_std))

    def distribution(self, obs: Tensor):
        """The policy at normalized observations, a torch.distributions object."""
        outputs = self.actor(obs)
        if self.discrete:
            return torch.distributions.Categorical(logits=outputs, validate_args=False)
        mean, raw_std = outputs, self.raw_std
        if self.state_dependent_std:
            mean, change = outputs.chunk(2, dim=-1)
            raw_std = raw_std + change
        if self.config.mean_activation == "tanh":
            mean = mean.tanh()
        std = nn.functional.softplus(raw_std).clamp(min=1e-3).expand_as(mean)
        normal = torch.distributions.Normal(mean, std, validate_args=False)
        return torch.distributions.Independent(normal, 1, validate_args=False)

    def act(self, obs: Tensor) -> tuple:
        """Sampled actions and their log-probabilities (B,)."""
        distribution = self.distribution(obs)
        actions = distribution.sample()
        return actions, distribution.log_prob(actions)

    def evaluate_actions(self, obs: Tensor, actions: Tensor) -> tuple:
        """Log-probabilities (B,) of given actions under the current policy; its entropies (B,)."""
        distribution = self.distribution(obs)
        return distribution.log_prob(actions), distribution.entropy()

    def value(self, obs: Tensor) -> Tensor:
        """Expected discounted return of normalized rewards, (B, *O) -> (B,)."""
        return self.critic(obs).squeeze(-1)

    def mean_action(self, obs: Tensor) -> Tensor:
        """Actions of the deterministic policy: the mean, or the likeliest."""
        return self.distribution(obs).mode


def env_actions(actions: Tensor, space: Box | Discrete) -> np.ndarray:
    """Actions as environments take them: clipped to a Box, or a Discrete's own numbers."""
    # sync point: the environments are on the CPU
    array = actions.cpu().numpy()
    if isinstance(space, Discrete):
        return array.astype(np.int64) + space.start
    return np.clip(array, space.low, space.high)


# ==== 4. Rollout ==================================================================================


class Rollout:
    """T steps of N environments, preallocated on the device, and the unfinished episodes."""

    def __init__(self, config: Config, env: gym.Env, seeds, first_obs: Tensor):
        T, N = config.rollout_steps, config.num_envs
        # row t + 1 is what step t returned; (T + 1, N, *O)
        self.obs = first_obs.new_zeros(T + 1, *first_obs.shape)
        self.obs[-1] = first_obs
        # unclipped
        self.actions = first_obs.new_zeros(T, N, *env.action_space.shape)
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
        self.restart_at = np.array(seeds) % (env.spec.max_episode_steps or sys.maxsize)


def stagger_episode_starts(envs: VectorEnv, normalizer, rollout: Rollout):
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
def collect_rollout(envs: VectorEnv, agent, normalizer, rollout) -> list:
    """Fill `rollout` with the next T steps; returns (return, length) of episodes that ended, raw.

    The normalizer learns from the observations only at the end.
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
        check_finite("environments", obs, rewards)

        raw_obs.append(torch.from_numpy(obs))
        rollout.obs[t + 1] = normalizer.normalize(obs)
        rollout.rewards[t] = torch.from_numpy(rewards)
        rollout.terminated[t] = torch.from_numpy(terminated)
        rollout.truncated[t] = torch.from_numpy(truncated)

        rollout.ended = terminated | truncated
        for i in np.flatnonzero(rollout.ended):
            episodes.append((float(rollout.episode_return[i]), int(rollout.episode_length[i])))
            rollout.episode_return[i] = rollout.episode_length[i] = 0
    if normalizer.enabled:
        normalizer.update(torch.cat(raw_obs))
    return episodes


# ==== 5. Advantages ===============================================================================


def compute_gae(rewards, values, terminated, truncated, gamma, gae_lambda) -> tuple:
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


def learned_rewards(rewards, actions, terminated, space, config: Config) -> tuple:
    """What is learned from: rewards less the cost of actions, failures at their own cost.

    Tensors rewards, terminated: (...,); actions: (..., A), unclipped. A failure is a termination
    that pays at most `failure_reward`. Returns rewards and which are failures; what stands on
    reset rows is unspecified.
    """
    failed = terminated & (rewards <= config.failure_reward)
    learned = torch.where(failed, rewards * config.failure_cost, rewards)
    if config.action_cost > 0:
        low, high = torch.from_numpy(np.stack([space.low, space.high])).to(actions.device)
        learned = learned - config.action_cost * actions.clamp(low, high).abs().sum(-1)
    return learned, failed


class Batch(NamedTuple):
    """The transitions of a rollout, or of a minibatch, without reset rows. B rows."""

    obs: Tensor  # (B, *O) normalized
    actions: Tensor  # (B, A) unclipped, or (B,) numbers
    logprobs: Tensor  # (B,) when collected
    values: Tensor  # (B,) when collected
    advantages: Tensor  # (B,) with mean 0 and std 1 over the rollout
    returns: Tensor  # (B,)

    def select(self, rows: Tensor) -> Batch:
        return Batch._make(tensor[rows] for tensor in self)


@torch.no_grad()
def make_batch(rollout: Rollout, agent: ActorCritic, reward_normalizer, config: Config) -> Batch:
    """Advantages and returns of the normalized rewards; reset rows are dropped."""
    rewards, failed = learned_rewards(
        rollout.rewards, rollout.actions, rollout.terminated, rollout.action_space, config
    )
    rewards = reward_normalizer.normalize(rewards, rollout.valid, rollout.discounted_return)
    values = agent.value(rollout.obs.flatten(0, 1)).view(len(rollout.obs), -1)  # (T + 1, N)
    # only failures stop the bootstrap, any ending the λ-trace
    cut = rollout.truncated | rollout.terminated
    advantages, returns = compute_gae(rewards, values, failed, cut, config.gamma, config.gae_lambda)

    # over all processes; sync point
    statistics = RunningMeanStd()
    statistics.update(advantages[rollout.valid].cpu())
    advantages = ((advantages - statistics.mean) / (statistics.var.sqrt() + 1e-8)).float()
    obs, actions, logprobs = rollout.obs[:-1], rollout.actions, rollout.logprobs
    batch = Batch(obs, actions, logprobs, values[:-1], advantages, returns)
    return batch.select(rollout.valid)


# ==== 6. Update ===================================================================================


def ppo_loss(batch: Batch, logprobs, entropy, values, config: Config) -> tuple[Tensor, dict]:
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


def adapt_learning_rates(optimizer: optim.Optimizer, kl: float, desired_kl: float):
    """Multiply the learning rates by one factor, after an update whose KL was `kl`.

    The KL grows with the square of the rate. The policy's rate stays within 1e-6 and 1e-2.
    """
    rate = optimizer.param_groups[0]["lr"]
    factor = np.clip(math.sqrt(desired_kl / max(kl, 1e-9)), 1 / 1.5, 1.5)
    factor = np.clip(factor, 1e-6 / rate, 1e-2 / rate)
    for group in optimizer.param_groups:
        group["lr"] *= float(factor)


def average_over_processes(agent: ActorCritic, metrics: dict, rows: int) -> dict:
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


def mean_of(history: list[dict], name: str) -> Tensor:
    return torch.stack([metrics[name] for metrics in history]).mean()


def update(agent: ActorCritic, optimizer, batch: Batch, config: Config) -> dict:
    """Epochs of freshly shuffled minibatches; returns metrics averaged over all of them.

    The rows are split into `num_minibatches` near-equal parts, so that none is tiny and every
    process has the same number. An epoch whose KL is too large is the last one.
    """
    # metrics of each minibatch
    history = []
    kl_limit = 1.5 * (config.target_kl or math.inf)
    if config.lr_schedule == "adaptive":
        kl_limit = min(kl_limit, 2 * config.desired_kl)
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
    unexplained = residual / (batch.returns.var(correction=0) + 1e-8)
    columns["explained_variance"] = (1 - unexplained).item()
    if not agent.discrete:
        columns["action_std"] = agent.distribution(batch.obs).stddev.mean().item()
    return columns


def schedule_learning_rates(optimizer: optim.Optimizer, config: Config, step: int):
    """Set the rates of policy and value function for an absolute step of the whole run."""
    progress = min(step / config.total_timesteps, 1.0)
    factors = {"constant": 1.0, "linear": 1 - progress}
    factors["cosine"] = 0.5 * (1 + math.cos(math.pi * progress))
    if config.lr_schedule in factors:
        for group, rate in zip(optimizer.param_groups, config.learning_rates, strict=True):
            group["lr"] = rate * factors[config.lr_schedule]


# ==== 7. Evaluate =================================================================================


class Policy(NamedTuple):
    """The deterministic policy: what plays in evaluation and film, its statistics frozen."""

    agent: ActorCritic
    normalizer: ObservationNormalizer
    action_space: gym.Space

    @torch.inference_mode()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """Raw observations (B, *O) to actions (B, A), clipped to their space."""
        device = next(self.agent.parameters()).device
        actions = self.agent.mean_action(self.normalizer.normalize(obs).to(device))
        return env_actions(actions, self.action_space)


def play(act: Callable, config: Config, seeds, render=None) -> Iterator[tuple]:
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
                next_obs, reward, terminated, truncated, _ = env.step(action)
                step = {"episode": episode, "observations": obs, "actions": action}
                step.update(rewards=reward, terminated=terminated, next_observations=next_obs)
                yield env, step
                obs, ended = next_obs, terminated or truncated


def play_one(saved_act: bytes, config: Config, seed: int) -> tuple[float, int]:
    """The raw return and the length of one episode, in a worker process, on the CPU."""
    act = torch.load(io.BytesIO(saved_act), "cpu", weights_only=False)
    rewards = [float(step["rewards"]) for _, step in play(act, config, [seed])]
    # Box2D worlds are in reference cycles, 300 KB each
    gc.collect()
    return sum(rewards), len(rewards)


def evaluate_policy(act: Callable, config: Config, seeds, pool, stop=None) -> tuple:
    """Raw returns and lengths, (episodes,) each, of one deterministic episode for each seed.

    They are played in the processes of `pool`; every one counts, in the order of the seeds: to
    count the first to finish would favor falls. Touches no training state. CancelledError if
    `stop`, a StopSignals, receives one on the way.
    """
    saved_act = io.BytesIO()
    torch.save(act, saved_act)
    task = functools.partial(play_one, saved_act.getvalue(), config)
    results = []
    with (
        reraise_as(TrainingError, "a worker process failed", BrokenExecutor),
        # closing cancels those that have not begun
        contextlib.closing(pool.map(task, seeds)) as episodes,
    ):
        for episode in episodes:
            results.append(episode)
            if stop is not None and stop.received is not None:
                raise CancelledError
    returns, lengths = np.transpose(results)
    return returns, lengths


# ==== 8. Checkpoint ===============================================================================

LAST = "checkpoints_walker/last.pt"
BEST = "checkpoints_walker/best.pt"

# parts of a Learner: those that act, and all that training changes
POLICY = ("agent", "obs_normalizer")
LEARNED = (*POLICY, "optimizer", "reward_normalizer")


@contextlib.contextmanager
def atomic_path(path: Path):
    """A temporary path beside `path` to write to, moved into place once it is whole on the disk.

    TrainingError if that fails; what was there before stays.
    """
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    with reraise_as(TrainingError, f"{path} cannot be written", OSError):
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def resolve_device(name: str) -> torch.device:
    """The device of that name. UserError if this machine has none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not getattr(torch, name).is_available():
        raise UserError(f"--device {name}: there is none here, use --device cpu")
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


class Learner:
    """Everything that a checkpoint holds: networks, optimizer, normalizers and counters."""

    def __init__(self, config: Config):
        self.config = config
        self.device = resolve_device(config.device)
        # never stepped: for its spaces, its spec and its metadata
        self.env = make_env(config)
        self.env.close()
        # the return that counts as solved, or None
        self.threshold = self.env.spec.reward_threshold
        # of films and of simulated time
        self.fps = self.env.metadata.get("render_fps", 30)
        obs_space, action_space = self.env.observation_space, self.env.action_space
        self.agent = ActorCritic(obs_space, action_space, config).to(self.device)
        self.optimizer = self._make_optimizer()
        self.obs_normalizer = ObservationNormalizer(config, obs_space)
        self.reward_normalizer = RewardNormalizer(config)
        self.act = Policy(self.agent, self.obs_normalizer, action_space).act
        self.counters = Counters()
        # when last.pt was written
        self.saved_at = -math.inf
        # how long the latest checkpoint took to write
        self.save_s = 0.0

    def _make_optimizer(self) -> optim.Optimizer:
        policy = [p for name, p in self.agent.named_parameters() if not name.startswith("critic.")]
        parts = policy, self.agent.critic.parameters()
        rates = zip(parts, self.config.learning_rates, strict=True)
        groups = [{"params": part, "lr": rate} for part, rate in rates]
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
        began = time.perf_counter()
        state = {part: getattr(self, part).state_dict() for part in LEARNED}
        state.update(format=CHECKPOINT_FORMAT, version=__version__)
        state.update(config=saved_settings(self.config), counters=vars(self.counters))
        data = io.BytesIO()
        # not into the file: it makes a RuntimeError of a full disk
        torch.save(state, data)
        with atomic_path(Path(self.config.out, name)) as temporary:
            temporary.write_bytes(data.getvalue())
        self.save_s = time.perf_counter() - began

    def load(self, state: dict, source, parts: Sequence[str]):
        """Load these parts of a checkpoint's state. UserError if they do not fit."""
        # any Exception: the file may hold anything
        with reraise_as(UserError, f"{source} does not fit this run", Exception):
            self.counters = Counters(**state["counters"])
            for part in parts:
                getattr(self, part).load_state_dict(state[part])


def load_checkpoint(path, env: str | None = None) -> dict:
    """A checkpoint's state on the CPU. Runs no code from it; UserError if it cannot be used.

    torch.load does not look at checksums, and loads most flipped bits silently as other values, so
    they are tested first. Nothing may unpack to more than the file holds. An environment of the
    form MODULE:ID would be imported, so the user must give it as `env`.
    """
    data = Path(path).read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            unpacked = sum(record.file_size for record in archive.infolist())
            # a folder, say, whose contents torch would skip
            marked = any(record.external_attr for record in archive.infolist())
            if unpacked > len(data) or marked or archive.testzip() is not None:
                raise ValueError("a checksum or a header is wrong")
        state = torch.load(io.BytesIO(data), "cpu", weights_only=True)
        version, number, saved_env = state["version"], state["format"], str(state["config"]["env"])
    except Exception:
        # a damaged or forged file can raise anything
        raise UserError(f"{path} is no checkpoint of this program, or a damaged one") from None
    if number != CHECKPOINT_FORMAT:
        raise UserError(f"{path} is of version {version}, format {number}, not {CHECKPOINT_FORMAT}")
    if ":" in saved_env and env is None:
        raise UserError(f"{path} would import {saved_env}: allow it with --env {saved_env}")
    return state


def config_from(settings: dict, source) -> Config:
    """The Config of a config.json or a checkpoint. UserError names `source`."""
    settings = {name: value for name, value in settings.items() if name != "_about"}
    # a name may be no string
    with reraise_as(UserError, str(source), UserError, TypeError):
        return Config.for_env(**settings)


# What --resume may change: nothing that shapes the learner but the length of its schedule.
RESUMABLE = {
    "total_timesteps", "device", "vector_env", "step_timeout", "out", "eval_every",
    "eval_episodes", "checkpoint_every", "record_every", "tensorboard", "stop_when_solved",
}  # fmt: skip


def resume_learner(config: Config, source) -> Learner:
    """The learner of a checkpoint. UserError if `config` differs in what the learner sees."""
    state = load_checkpoint(source, config.env)
    saved = config_from(state["config"], source)
    for name, old in vars(saved).items():
        new = getattr(config, name)
        if new != old and name not in RESUMABLE:
            raise UserError(f"--{flag_name(name)} is {new!r}, but {source} has {old!r}")
    learner = Learner(config)
    learner.load(state, source, LEARNED)
    # best.pt may be newer than the checkpoint, or have stayed in another folder
    learner.counters.best_return, best = -math.inf, Path(config.out, BEST)
    if best.exists():
        learner.counters.best_return = load_checkpoint(best, config.env)["counters"]["best_return"]
    return learner


def load_learner(checkpoint, env: str | None = None, device: str = "auto") -> Learner:
    """A trained policy with its statistics: `load_learner(path).act(obs)`.

    `env` is another environment to play in. UserError if the file is no checkpoint or does not fit.
    """
    state = load_checkpoint(checkpoint, env)
    config = config_from(state["config"], checkpoint)
    changes = {"device": device}
    if env not in (None, config.env):
        changes.update(env=env, env_kwargs=())
    learner = Learner(dataclasses.replace(config, **changes))
    learner.load(state, checkpoint, (*POLICY, "reward_normalizer"))
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
    f"{TENSORBOARD}/events.*",
]  # fmt: skip


def make_folders(*folders: Path):
    """UserError if one cannot be made."""
    for folder in folders:
        with reraise_as(UserError, f"--out cannot be written to: {folder}", OSError):
            folder.mkdir(parents=True, exist_ok=True)


def claim_folder(out: Path, resume, overwrite: bool) -> FileLock:
    """Make the folders of a run and lock them; the caller releases the lock.

    UserError if they hold another run, one is running in them, or they cannot be written to.
    """
    checkpoints = out / "checkpoints_walker"
    resumes_own = resume is not None and Path(resume).resolve().parent == checkpoints.resolve()
    holds_run = any((out / name).exists() for name in (BEST, LAST, METRICS_CSV))
    if holds_run and not (resumes_own or overwrite):
        raise UserError(f"{checkpoints} holds a run: use --resume, another --out, or --overwrite")
    make_folders(checkpoints, out / "videos", out / "plots")
    lock = FileLock(checkpoints / ".lock")
    with reraise_as(UserError, f"{checkpoints} is in use by another run", Timeout):
        lock.acquire(timeout=0)
    if overwrite:
        for pattern in RUN_FILES:
            for path in out.glob(pattern):
                path.unlink()
    return lock


class RunLog(contextlib.ExitStack):
    """metrics.csv, the progress bar on a terminal, and plain lines everywhere."""

    def __init__(self, path: Path, config: Config, counters: Counters):
        from tqdm import tqdm

        super().__init__()
        self.path = path
        self.last_line_at = time.monotonic()
        self._drop_rows_after(counters.step)
        steps = config.steps_per_iteration
        total = math.ceil(config.total_timesteps / steps) * steps
        # None: only a terminal gets the bar
        bar = {"unit": " steps", "unit_scale": True, "disable": None}
        self.bar = self.enter_context(tqdm(total=total, initial=counters.step, **bar))
        self.board = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            folder = Path(config.out, TENSORBOARD)
            self.board = self.enter_context(SummaryWriter(folder, purge_step=counters.step + 1))

    def _drop_rows_after(self, step: int):
        """Rewrite metrics.csv without the rows after `step`, and without a torn last line."""
        with reraise_as(UserError, str(self.path), ValueError, TypeError, KeyError, csv.Error):
            text = self.path.read_text() if self.path.exists() else ""
            whole = text[: text.rfind("\n") + 1]
            rows = [row for row in csv.DictReader(io.StringIO(whole)) if int(row["step"]) <= step]
            with atomic_path(self.path) as temporary, open(temporary, "w", newline="") as file:
                writer = csv.DictWriter(file, CSV_COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)

    def row(self, values: dict, best_return):
        """Append a row; a column without a value stays empty. Show how far the run is."""
        values = {name: value for name, value in values.items() if value != -math.inf}
        cells = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()}
        with reraise_as(TrainingError, f"{self.path} cannot be written", OSError):
            with open(self.path, "a", newline="") as file:
                csv.DictWriter(file, CSV_COLUMNS, lineterminator="\n").writerow(cells)
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, values["step"])
        best = "–" if best_return == -math.inf else f"{best_return:.1f}"
        text = f"return {values.get('training_return', math.nan):.1f}, best {best}"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(values["step"] - self.bar.n)
        if self.bar.disable and time.monotonic() - self.last_line_at > 10:
            speed = f"{values['steps_per_s']:,.0f} steps/s, {values['wall_s'] / 60:.1f} min"
            self.line(f"step {values['step']:,} of {self.bar.total:,}: {text}, {speed}")

    def line(self, text: str):
        with self.bar.external_write_mode():
            print(text, flush=True)
        self.last_line_at = time.monotonic()


def write_config(config: Config, threshold, path: Path):
    """Every setting as JSON, for --config; `_about` is for readers and plots."""
    settings = saved_settings(config)
    settings["_about"] = {"reward_threshold": threshold, "version": __version__}
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n")


def record_episode(learner, seed: int, mp4: Path, seconds=None, measure=None) -> list:
    """Film one deterministic episode, headless: H.264 in yuv420p, and a GIF of at most 3 MB.

    At most `seconds` of it, if given. Returns the data of each step, and with it what `measure`
    finds in the environment after it. UserError if the environment cannot render.
    """
    import imageio

    steps = []
    limit = None if seconds is None else math.ceil(seconds * learner.fps)
    episode = play(learner.act, learner.config, [seed], render="rgb_array")
    with atomic_path(mp4) as temporary, contextlib.closing(episode):
        with imageio.get_writer(temporary, fps=learner.fps, macro_block_size=2) as video:
            for env, step in itertools.islice(episode, limit):
                frame = env.render()
                if frame is None:
                    raise UserError(f"--env {learner.config.env} renders nothing")
                video.append_data(frame)
                if measure is not None:
                    step.update(measure(env))
                steps.append(step)
        write_gif(temporary, mp4.with_suffix(".gif"))
    return steps


def write_gif(mp4: Path, gif: Path, max_bytes: int = 3_000_000):
    """Every third frame of a film at half its size, at the true speed; cut at `max_bytes`."""
    from imageio_ffmpeg import get_ffmpeg_exe

    palette = "split[a][b];[a]palettegen=64[p];[b][p]paletteuse=dither=none"
    filters = f"framestep=3,scale=iw/2:-1:flags=area,{palette}"
    with atomic_path(gif) as temporary:
        command = [get_ffmpeg_exe(), "-v", "quiet", "-y", "-i", mp4, "-vf", filters]
        command += ["-fs", str(max_bytes), temporary]
        if subprocess.run(command, stdin=subprocess.DEVNULL).returncode != 0:
            # it says nothing itself
            raise OSError("the encoder failed; is the disk full?")


def write_episode_data(learner: Learner, steps: list, path: Path):
    """Steps of `play` as an .npz for viz.py: arrays (steps, …), their values, and the units."""
    arrays = {name: np.stack([step[name] for step in steps]) for name in steps[0]}
    arrays["values"] = learner.value(arrays["observations"])
    arrays["next_values"] = learner.value(arrays.pop("next_observations"))
    config = learner.config.at(learner.counters.step, learner.counters.training_return)
    tensors = (torch.as_tensor(arrays[name]) for name in ("rewards", "actions", "terminated"))
    learned, failed = learned_rewards(*tensors, learner.env.action_space, config)
    arrays.update(learned_rewards=learned, failed=failed)
    clip = config.clip_reward if config.norm_reward else (-math.inf, math.inf)
    units = {"dt": 1 / learner.fps, "gamma": config.gamma, "reward_clip": clip}
    units["reward_scale"] = learner.reward_normalizer.scale()
    with atomic_path(path) as temporary:
        np.savez_compressed(temporary, **arrays, **units)


def show(learner: Learner, seeds, seconds: float):
    """Play episodes in a window for `seconds` of simulated time, one after another."""
    limit = math.ceil(seconds * learner.fps)
    for _ in itertools.islice(play(learner.act, learner.config, seeds, render="human"), limit):
        pass


class StopSignals(contextlib.ExitStack):
    """While entered, a first SIGINT or SIGTERM is noted in `received`; a second one exits.

    One keypress can arrive twice, from the terminal and from a launcher that passes it on, so a
    second one counts only a second later.
    """

    received: int | None = None

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            # None: a handler that was not set from Python
            previous = signal.signal(number, self._handle) or signal.SIG_DFL
            self.callback(signal.signal, number, previous)
        return self

    def _handle(self, number: int, _frame: Any):
        if self.received is None:
            self.received = number
            self.received_at = time.monotonic()
            # not print: the signal may interrupt one
            os.write(2, b"\nstopping after this iteration; once more to leave at once\n")
        elif time.monotonic() > self.received_at + 1:
            os._exit(128 + number)


def episode_columns(episodes: list) -> dict:
    """Raw returns and lengths of the episodes that ended in an iteration."""
    columns = {"episodes": len(episodes)}
    if episodes:
        for name, values in zip(("return", "length"), np.transpose(episodes), strict=True):
            columns[f"{name}_mean"] = values.mean()
            columns[f"{name}_min"] = values.min()
            columns[f"{name}_max"] = values.max()
    return columns


def film_policy(learner: Learner, log: RunLog, mp4: Path):
    """Film an episode with the run's own seed for films; one line if that cannot be."""
    [seed] = env_seeds(learner.config.seed, VIDEO, 1)
    try:
        record_episode(learner, seed, mp4)
        log.line(f"video: {mp4}, and a GIF beside it")
    except (UserError, TrainingError) as error:
        log.line(f"no video: {error}")


def export(learner: Learner, log: RunLog, with_film: bool):
    """Sum up the run, film the best policy there is, and plot the curves."""
    import viz

    counters, out = learner.counters, Path(learner.config.out)
    log.line(f"{counters.step:,} steps in {counters.wall_s / 60:.1f} min")
    if (out / BEST).exists():
        learner.load(load_checkpoint(out / BEST, learner.config.env), out / BEST, POLICY)
    if with_film:
        film_policy(learner, log, out / FILM)
    with reraise_as(TrainingError, f"{out / CURVES} cannot be drawn", OSError, viz.InputError):
        viz.plot_training_curves(out / METRICS_CSV, out / CURVES, learner.threshold)
    log.line(f"curves: {out / CURVES}")


def is_due(every: int, step: int, config: Config) -> bool:
    """Whether the iteration that ends at `step` is the first at or past a multiple of `every`."""
    return every > 0 and step // every > (step - config.steps_per_iteration) // every


def evaluate_if_due(learner: Learner, log: RunLog, started: float, evaluate: Callable) -> tuple:
    """If an evaluation is due: its columns, and whether this policy is the best so far.

    A mean at the threshold is confirmed on 100 new episodes, and the policy ranked by those: the
    highest of many means over a few episodes is high by luck. As that takes long, it is done
    until the run is solved, and at its end.
    """
    config, counters, threshold = learner.config, learner.counters, learner.threshold
    is_last = config.eval_every > 0 and counters.step >= config.total_timesteps
    if not (is_last or is_due(config.eval_every, counters.step, config)):
        return {}, False
    seeds = env_seeds(config.seed, EVALUATE, config.eval_episodes)
    returns, _ = evaluate(learner.act, config, seeds)
    columns = {"eval_return_mean": returns.mean(), "eval_return_std": returns.std()}
    columns["eval_episodes"] = len(returns)
    reached = threshold is not None and returns.mean() >= threshold
    is_unsolved = counters.solved_step is None
    confirms = reached and (is_unsolved or is_last)
    if confirms:
        seeds = env_seeds(config.seed, CONFIRM, 100, step=counters.step)
        returns, _ = evaluate(learner.act, config, seeds)
        if is_unsolved and returns.mean() >= threshold:
            counters.solved_step = counters.step
            log.line(f"solved after {(time.perf_counter() - started) / 60:.1f} min (100 episodes)")
    # few episodes do not outrank a hundred
    is_best = bool(returns.mean() > counters.best_return) and confirms == reached
    if is_best:
        counters.best_return = float(returns.mean())
    result = f"{returns.mean():.1f} ± {returns.std():.1f} over {len(returns)} episodes"
    result += ", the best so far" if is_best else ""
    log.line(f"step {counters.step:,}: evaluation {result}")
    return columns, is_best


def save_if_due(learner: Learner, is_best: bool, iteration_s: float):
    """Write best.pt, step_N.pt and last.pt where due, after an iteration of `iteration_s` seconds.

    last.pt is written where that costs under 1 % of the iteration, else at most every 10 s.
    """
    step = learner.counters.step
    if is_best:
        learner.save(BEST)
    if is_due(learner.config.checkpoint_every, step, learner.config):
        learner.save(f"checkpoints_walker/step_{step}.pt")
    if learner.save_s < 0.01 * iteration_s or time.perf_counter() - learner.saved_at >= 10:
        learner.save(LAST)
        learner.saved_at = time.perf_counter()


# ==== 10. Train ===================================================================================


def configure_torch(agent: ActorCritic):
    """Set precision and threads for this whole process."""
    # TF32 on CUDA
    torch.set_float32_matmul_precision("high")
    if sum(p.numel() for p in agent.parameters()) < 100_000:
        # small networks lose more to threads than they gain
        torch.set_num_threads(1)


def prepare_learner(config: Config, resume) -> Learner:
    """A new learner, or one that goes on from `resume`. Writes nothing."""
    if config.tensorboard:
        with reraise_as(UserError, "--tensorboard needs `pip install tensorboard`", ImportError):
            import tensorboard  # noqa: F401
    # the same networks in every process
    seed_everything(config.seed, rank=0, step=0)
    if resume is not None:
        return resume_learner(config, resume)
    learner = Learner(config)
    if config.init_from is not None:
        learner.load(load_checkpoint(config.init_from, config.env), config.init_from, POLICY)
        learner.counters = Counters()
    return learner


def average_return(average: float, episodes: list) -> float:
    """The running mean of returns after the episodes of one more iteration, of all processes.

    Each episode has a weight of 0.02. -inf before the first has ended.
    """
    returns = [episode_return for episode_return, _ in episodes]
    count, total = sum_over_processes(torch.tensor([len(returns), sum(returns)]).double()).tolist()
    if count == 0:
        return average
    mean = total / count
    return mean if average == -math.inf else mean + 0.98**count * (average - mean)


def check_losses(losses: dict[str, float], step: int):
    """TrainingError that names the first metric that is not finite."""
    for name, value in losses.items():
        if not math.isfinite(value):
            raise TrainingError(f"{name} is {value} after step {step:,}: lower --learning-rate")


def train(config: Config, resume=None, overwrite=False) -> tuple[Counters, int | None]:
    """Train, evaluate, save, log, and at the end film the best policy and plot the curves.

    `resume` is the checkpoint to go on from; `overwrite` removes an earlier run's files first.
    Returns how far the run has come, and the number of the signal that stopped it, if one did.
    Raises UserError for what the user can mend, TrainingError if training cannot go on.
    """
    with contextlib.ExitStack() as stack:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            join_processes()
            stack.callback(dist.destroy_process_group)
        out = Path(config.out)
        rank, _ = rank_and_world_size()
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and (out / LAST).exists():
            # torchrun has started us again
            resume, overwrite = out / LAST, False
        learner = prepare_learner(config, resume)
        agent, counters = learner.agent, learner.counters
        configure_torch(agent)
        seeds = env_seeds(config.seed, TRAIN, config.num_envs, rank, counters.step)
        envs, raw_obs = make_vector_env(config, learner.env, seeds)
        stack.callback(envs.close)
        stop = stack.enter_context(StopSignals())
        pool = stack.enter_context(ProcessPoolExecutor(initializer=prepare_worker))
        evaluate = functools.partial(evaluate_policy, pool=pool, stop=stop)
        # barrier: every process has read what rank 0 may remove now
        any_process(False)
        if rank == 0:
            stack.callback(claim_folder(out, resume, overwrite).release)
            write_config(config, learner.threshold, out / CONFIG_JSON)
            # first: if killed before RunLog cuts metrics.csv, a resume still cuts it to this step
            learner.save(LAST)
            log = stack.enter_context(RunLog(out / METRICS_CSV, config, counters))
        first_obs = learner.obs_normalizer.normalize(raw_obs).to(learner.device)
        rollout = Rollout(config, learner.env, seeds, first_obs)
        # as if the run had been in one piece
        started = time.perf_counter() - counters.wall_s

        while not any_process(learner.is_done() or stop.received is not None):
            # set the random numbers, the learning rate and the settings that move
            began = time.perf_counter()
            seed_everything(config.seed, rank, counters.step)
            schedule_learning_rates(learner.optimizer, config, counters.step)
            now = config.at(counters.step, counters.training_return)

            # collect a rollout
            episodes = collect_rollout(envs, agent, learner.obs_normalizer, rollout)
            collected = time.perf_counter()

            # compute advantages of the normalized rewards; update
            batch = make_batch(rollout, agent, learner.reward_normalizer, now)
            losses = update(agent, learner.optimizer, batch, now)
            check_losses(losses, counters.step)
            counters.training_return = average_return(counters.training_return, episodes)
            counters.step += config.steps_per_iteration
            counters.iteration += 1
            updated = time.perf_counter()
            if rank > 0:
                # rank 0 evaluates, logs and saves
                continue

            # evaluate, if due
            evaluation, is_best = {}, False
            # a signal cancels an evaluation
            with contextlib.suppress(CancelledError):
                evaluation, is_best = evaluate_if_due(learner, log, started, evaluate)
            ended = time.perf_counter()
            counters.wall_s = ended - started

            # log a row
            row = dict(step=counters.step, iteration=counters.iteration, wall_s=counters.wall_s)
            row.update(steps_per_s=config.steps_per_iteration / (updated - began))
            row.update(collect_s=collected - began, update_s=updated - collected)
            row.update(eval_s=ended - updated, **episode_columns(episodes), **losses, **evaluation)
            row.update({name: getattr(now, name) for name in COURSES})
            row.update(training_return=counters.training_return)
            log.row(row, counters.best_return)

            # save
            save_if_due(learner, is_best, ended - began)
            if is_due(config.record_every, counters.step, config):
                film_policy(learner, log, out / f"videos/step_{counters.step}.mp4")

        if rank == 0:
            learner.save(LAST)
            export(learner, log, with_film=stop.received != signal.SIGTERM)
        # barrier: torchrun ends all processes when one ends, so wait for the film
        any_process(False)
    return counters, stop.received
