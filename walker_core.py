"""PPO for BipedalWalker-v3 and its relatives, top to bottom in one file.

Data flows down the page: Config -> environments -> networks -> rollout -> advantages -> update ->
evaluate -> checkpoint -> log and export -> train. A section uses only what stands above it.

BipedalWalker-v3 with the default settings, seeds 11 to 15: solved after 3.1 to 4.0 minutes, median
3.7 (1.5M steps); with EnvPool 65 to 87 seconds, median 72; evaluation aside, on two cores of a
virtual AMD EPYC, PyTorch 2.13.0, Gymnasium 1.4.0.

Shapes: T rollout steps, N environments, B rows of a minibatch, O observation, A action.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import gc
import importlib.util
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
import tempfile
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
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
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn, optim

__version__ = "0.1.0"
CHECKPOINT_FORMAT = 1  # raised when a checkpoint's contents change their meaning


class UserError(Exception):
    """A mistake in what was asked for: shown as one line, exit code 2."""


class TrainingError(RuntimeError):
    """Training cannot go on, though it was asked for correctly: shown as one line, exit code 1."""


class EnvironmentFailure(TrainingError):
    """An environment raised, hung, or gave numbers that are not finite."""


@contextlib.contextmanager
def explained(kind: type[Exception], what: str, *caught: type[Exception]) -> Iterator[None]:
    """Any of `caught` becomes one line of this kind: what is wrong, and why."""
    try:
        yield
    except caught as error:
        why = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise kind(f"{what}: {why}") from error


# ==== 0. Processes ================================================================================


def join_processes() -> int:
    """Meet the others that torchrun has started, if it has; returns how often it did so before.

    Gloo for tensors on the CPU, NCCL for those on GPUs. Each time they meet in a store of its own:
    in the common one PyTorch 2.13 may find the address of a process that is gone.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        store, rank, count = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(restarts, store)
        dist.init_process_group(store=store, rank=rank, world_size=count)
    return int(restarts)


def process() -> tuple[int, int]:
    """This process's rank, and how many there are; (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of all processes' `values`, in place. TrainingError where a process is gone."""
    if dist.is_initialized():
        with explained(TrainingError, "another process is gone, use --resume", RuntimeError):
            dist.all_reduce(values)
    return values


def any_process(flag: bool) -> bool:
    return bool(sum_over_processes(torch.tensor(float(flag))))


def leave(code: int) -> None:
    """End this process; one of several at once, as gloo's threads sometimes abort a usual exit."""
    sys.stdout.flush()
    os._exit(code) if dist.is_initialized() else sys.exit(code)


# ==== 1. Config ===================================================================================

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU, "silu": nn.SiLU}

# What a setting may be. A bool is no number here, and NaN and infinity are none either.
Name = Annotated[str, Field(pattern=r"\S")]
Share = Annotated[float, Field(ge=0, le=1)]
Pair = Annotated[str, Field(pattern="(?P<KEY>.+)=(?P<VALUE>.*)")]
Sizes = Annotated[tuple[Annotated[int, Field(ge=1, le=4096)], ...], Field(min_length=1)]
STRICT = pydantic.ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")


class Checked:
    """Plain values, checked on creation. UserError names the first wrong one and what is right."""

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def _check(cls, values: Any, check: Callable) -> Any:
        try:
            return check(values)
        except pydantic.ValidationError as error:
            wrong = error.errors()[0]
            name, why = str(wrong["loc"][0]), wrong["msg"].replace("Input should", "it must")
            value = (values.kwargs or {}).get(name)
            raise UserError(f"--{name.replace('_', '-')} is {value!r}: {why}") from None


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Config(Checked):
    """Settings of one run; each is also a flag of `walker.py`. Validated once, on creation."""

    env: Name = "BipedalWalker-v3"  # Gymnasium id; `module:EnvId` imports the module first
    env_kwargs: tuple[Pair, ...] = ()  # arguments of the environment, each as KEY=VALUE
    total_timesteps: PositiveInt = 1_000_000  # environment steps of the whole run
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1  # of networks, sampling and every environment
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda where present, else cpu
    compile: bool = False  # the update by torch.compile; on CUDA, with its graphs
    out: Name = "."  # folder in which checkpoints_walker/, videos/ and plots/ are made
    init_from: Name | None = None  # start from this checkpoint's weights and observation statistics

    vector_env: Literal["sync", "async", "envpool"] = "sync"  # how the environments are stepped
    num_envs: Annotated[int, Field(ge=1, le=100_000)] = 8  # environments stepped together (N)
    rollout_steps: Annotated[int, Field(ge=2, le=1_000_000)] = 256  # steps of each per update (T)
    step_timeout: PositiveFloat = 60.0  # seconds until an async environment has hung
    norm_obs: bool = True  # normalise observations by their running mean and variance
    norm_reward: bool = True  # divide rewards by the running std of the discounted return
    clip_obs: PositiveFloat = 10.0  # clip normalised observations to ± this
    clip_reward: tuple[float, float] = (-10.0, 10.0)  # normalised: LOW HIGH

    actor_hidden: Sizes = (64, 64)  # layer sizes of the policy
    critic_hidden: Sizes = (64, 64)  # and of the value function
    activation: Literal["tanh", "relu", "elu", "silu"] = "silu"  # of the hidden layers
    layer_norm: bool = False  # LayerNorm before each activation
    mean_activation: Literal["none", "tanh"] = "none"  # tanh: mean actions stay within ±1
    init_std: Annotated[float, Field(ge=0.001, le=10)] = 1.0  # initial std of the actions
    state_dependent_std: bool = False  # the policy network gives the standard deviation too

    learning_rate: PositiveFloat = 3e-4  # of Adam; where the schedule starts
    value_learning_rate: PositiveFloat | None = None  # of the value function, if another
    lr_schedule: Literal["constant", "linear", "cosine", "adaptive"] = "linear"  # adaptive: by KL
    desired_kl: PositiveFloat = 0.01  # per update, that the adaptive schedule steers to
    gamma: Share = 0.99  # discount factor
    gae_lambda: Share = 0.95  # λ of generalised advantage estimation
    clip_eps: PositiveFloat = 0.2  # the probability ratio is clipped to 1 ± this
    clip_value_eps: PositiveFloat | None = None  # an update moves values at most so far
    failure_reward: float = 1e9  # a termination with more is bootstrapped like a truncation
    entropy_coef: NonNegativeFloat = 0.0  # weight of the entropy bonus
    value_coef: NonNegativeFloat = 0.5  # weight of the value loss
    max_grad_norm: PositiveFloat = 0.5  # the gradient's norm is clipped to this
    update_epochs: PositiveInt = 5  # passes over each rollout
    minibatch_size: Annotated[int, Field(ge=2)] = 256  # rows of one gradient step (B)
    target_kl: PositiveFloat | None = None  # end an update whose KL exceeds 1.5 × this

    eval_every: NonNegativeInt = 100_000  # steps between evaluations; 0: never
    eval_episodes: PositiveInt = 10  # episodes of each periodic evaluation
    checkpoint_every: NonNegativeInt = 0  # steps between kept step_N.pt; 0: none are kept
    record_every: NonNegativeInt = 0  # steps between films of the policy; 0: only one at the end
    tensorboard: bool = False  # write the columns of metrics.csv for TensorBoard too
    stop_when_solved: bool = False  # end the run once 100 fresh episodes confirm the threshold

    def __post_init__(self) -> None:
        if not self.clip_reward[0] < self.clip_reward[1]:
            raise UserError(f"--clip-reward is {self.clip_reward}: it must be LOW < HIGH")
        if self.minibatch_size > self.batch_size:
            most = f"at most the batch, num_envs × rollout_steps = {self.batch_size}"
            raise UserError(f"--minibatch-size is {self.minibatch_size}: it must be {most}")

    @classmethod
    def for_env(cls, env: str = "BipedalWalker-v3", **settings: Any) -> Config:
        """Defaults, then the environment's preset, then `settings`."""
        return cls(**{"env": env, **PRESETS.get(str(env), {}), **settings})

    @property
    def batch_size(self) -> int:
        """Steps of one iteration of one process, T × N."""
        return self.num_envs * self.rollout_steps

    @property
    def num_iterations(self) -> int:
        return math.ceil(self.total_timesteps / (self.batch_size * process()[1]))

    @property
    def num_minibatches(self) -> int:
        """Never more than there are transitions where every second row is a reset row."""
        return max(self.batch_size // max(self.minibatch_size, 3), 1)

    @property
    def env_options(self) -> dict[str, Any]:
        """`env_kwargs` as keyword arguments: Python literals where they parse, else strings."""
        options = dict(pair.split("=", 1) for pair in self.env_kwargs)
        for key, value in options.items():
            with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
                options[key] = ast.literal_eval(value)
        return options


# Only what differs from the defaults above; tests/benchmarks/TUNING.md has what was tried.
FLAT = dict(total_timesteps=3_000_000, num_envs=64, minibatch_size=2048, failure_reward=-100.0)
# what stands in FLAT so far is common to both
HARD = FLAT | dict(total_timesteps=20_000_000, rollout_steps=128, clip_reward=(-1.0, 10.0))
HARD |= dict(lr_schedule="adaptive", learning_rate=1e-3, entropy_coef=0.006, max_grad_norm=5.0)
FLAT |= dict(learning_rate=2e-3, gamma=0.995, gae_lambda=0.975, init_std=0.7, update_epochs=10)
MUJOCO = dict(update_epochs=10, minibatch_size=64, init_std=0.5, max_grad_norm=1.0)
PRESETS = {"BipedalWalker-v3": FLAT, "BipedalWalkerHardcore-v3": HARD, "Walker2d-v5": MUJOCO}
PRESETS["HalfCheetah-v5"] = MUJOCO | dict(gamma=0.98, gae_lambda=0.92, init_std=0.4)
PRESETS["Humanoid-v5"] = dict(total_timesteps=10_000_000, update_epochs=10, max_grad_norm=1.0)
PRESETS["Humanoid-v5"] |= dict(init_std=0.2, gamma=0.97, lr_schedule="adaptive", desired_kl=0.015)
PRESETS["LunarLander-v3"] = dict(num_envs=16, gamma=0.999, gae_lambda=0.98, learning_rate=1e-3)
PRESETS["CarRacing-v3"] = dict(total_timesteps=300_000, init_std=0.2, update_epochs=10)
PRESETS["CarRacing-v3"] |= dict(actor_hidden=(256,), critic_hidden=(256,))


def plain_settings(config: Config) -> dict[str, Any]:
    """What a config.json and a checkpoint hold: all settings but `out`, which is where they lie."""
    return {k: v for k, v in dataclasses.asdict(config).items() if k != "out"}


def checked(kind: Callable, values: dict[str, Any], source: str | Path) -> Any:
    """`kind`, of plain values as JSON or a checkpoint holds them. UserError names `source`."""
    plain = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k != "_about"}
    with explained(UserError, str(source), UserError, TypeError):  # a name may be no string
        return kind(**plain)


# ==== 2. Environments =============================================================================

TRAIN, EVALUATE, CONFIRM, VIDEO, TEST, LEARN = range(6)  # streams of seeds


def env_seeds(seed: int, stream: int, count: int, rank: int = 0, step: int = 0) -> list[int]:
    """`count` seeds of one stream; the first k are the same whatever `count` is.

    Consecutive integers would make runs with seeds 1 and 2 share all worlds but one.
    """
    entropy = np.random.SeedSequence([seed, stream, rank, step])
    return [int(word) >> 1 for word in entropy.generate_state(count)]  # 31 bits: EnvPool's limit


def seed_everything(seed: int, rank: int, step: int) -> None:
    """Python's, NumPy's and torch's generators, as a function of the run's seed, rank and step.

    Done before every iteration, so that a resumed run draws what it would have drawn.
    """
    word = env_seeds(seed, LEARN, 1, rank, step)[0]
    random.seed(word)
    np.random.seed(word)
    torch.manual_seed(word)


class Reporting(gym.Wrapper):
    """Says which environment it is that raises, or whose numbers are not finite."""

    def __init__(self, env: gym.Env, name: str) -> None:
        super().__init__(env)
        self.name = name

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        return self._run(self.env.reset, **kwargs)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self._run(self.env.step, action)

    def render(self) -> Any:
        return self._run(self.env.render)

    def _run(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        try:
            result = function(*args, **kwargs)
            numbers = result[: len(result) // 2] if isinstance(result, tuple) else ()
            if not all(np.isfinite(part).all() for part in numbers):  # obs; or obs, reward
                raise ValueError("an observation or reward is not finite")
            return result
        except Exception as error:  # whatever a stranger's code raises
            raise EnvironmentFailure(f"{self.name}: {error!r}") from error


def make_env(config: Config, render_mode: str | None = None, name: str = "environment") -> gym.Env:
    """One environment of the run. UserError where Gymnasium cannot make it or PPO cannot use it."""
    options = config.env_options | ({"render_mode": render_mode} if render_mode else {})
    with explained(UserError, f"--env {config.env} cannot be made", Exception):  # not our code
        with warnings.catch_warnings(action="ignore"):  # what is wrong is said in one line
            env = gym.make(config.env, disable_env_checker=True, **options)
    if is_image(env.observation_space):  # grey, half as large, four in a row: they show speed
        small = Box(0, 255, grey_half(env.observation_space.low).shape, np.uint8)
        env = gym.wrappers.TransformObservation(env, grey_half, small)
        env = gym.wrappers.FrameStackObservation(env, 4)
    elif not is_vector(env.observation_space):
        raise UserError(f"--env {config.env}: its observations are no float vector, nor an image")
    if not is_vector(env.action_space) and not isinstance(env.action_space, Discrete):
        raise UserError(f"--env {config.env}: its actions are no float vector, nor Discrete")
    return Reporting(env, name)


def is_vector(space: gym.Space) -> bool:
    return isinstance(space, Box) and len(space.shape) == 1 and space.dtype.kind == "f"


def is_image(space: gym.Space) -> bool:
    """Height, width and colours, large enough for the convolutions."""
    fits = isinstance(space, Box) and len(space.shape) == 3 and space.dtype == np.uint8
    return fits and min(space.shape[:2]) >= 40


def grey_half(image: np.ndarray) -> np.ndarray:
    """Every second pixel of (H, W, 3), without its colour."""
    return image[::2, ::2].mean(-1).astype(np.uint8)


def _worker_env(config: Config, name: str) -> gym.Env:
    """An environment of a vector; in a process of its own, it ends with the main one, not before.

    Signals are for the main process, which ends the others; a killed one must leave no orphans.
    """
    if (main := multiprocessing.parent_process()) is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if hasattr(os, "setpgid"):  # not on Windows
            os.setpgid(0, 0)
        threading.Thread(target=lambda: (main.join(), os._exit(1)), daemon=True).start()
    return make_env(config, name=name)


def make_vector_env(config: Config, seeds: Sequence[int]) -> tuple[VectorEnv, np.ndarray]:
    """N environments with NEXT_STEP autoreset, and their first observations (N, O).

    The row after an episode's end ignores its action, has reward 0 and is no transition.
    """
    single, first = make_env(config), {"seed": seeds}
    names = [f"environment {i}, first reset with seed {seed}" for i, seed in enumerate(seeds)]
    if config.vector_env == "envpool":
        with explained(UserError, "--vector-env envpool needs `pip install envpool`", ImportError):
            import envpool
        known = config.env in envpool.list_all_envs()  # a wrapper can make its own around one
        make = envpool.make_gymnasium if known else single.spec.vector_entry_point
        if not callable(make) or not is_vector(single.observation_space):
            raise UserError(f"--vector-env envpool has no {config.env}, or no vectors: use sync")
        threads = max(os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)
        how = {"num_envs": config.num_envs, "seed": list(seeds), "num_threads": threads}
        envs, first = make(config.env, **how, **config.env_options), {}
    else:
        make = [lambda name=name: _worker_env(config, name) for name in names]
        vector = SyncVectorEnv if config.vector_env == "sync" else AsyncVectorEnv
        envs = vector(make, autoreset_mode=AutoresetMode.NEXT_STEP)
    envs.names = names
    envs.restart_at = np.array(seeds) % (single.spec.max_episode_steps or sys.maxsize)
    if config.vector_env == "async":  # by themselves they would wait for ever
        envs.reset_wait = lambda limit=config.step_timeout, wait=envs.reset_wait: wait(limit)
        envs.step_wait = lambda limit=config.step_timeout, wait=envs.step_wait: wait(limit)
    return envs, ask(envs, envs.reset, **first)[0]


def ask(envs: VectorEnv, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """What the environments answer. EnvironmentFailure says whose process hangs or has died."""
    try:
        return function(*args, **kwargs)
    except (multiprocessing.TimeoutError, EOFError, ConnectionError):
        time.sleep(0.1)  # let one that is dying end
        dead = [not process.is_alive() for process in envs.processes]
        late = [not pipe.poll() for pipe in envs.parent_pipes]
        index, what = np.argmax(dead if any(dead) else late), "has died" if any(dead) else "hangs"
        close_envs(envs)
        raise EnvironmentFailure(f"{envs.names[index]}: its process {what}") from None


def close_envs(envs: VectorEnv) -> None:
    """Ends worker processes the hard way: one that hangs or has died answers no polite close."""
    for process in getattr(envs, "processes", ()):
        process.kill()
        process.join()
        envs.closed = True
    envs.close()


class RunningMeanStd(nn.Module):
    """Mean and variance of all that was seen, in every process, in float64; 0 and 1 before."""

    def __init__(self, config: Config, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def update(self, batch: Tensor) -> None:
        """Merge the rows of `batch` (B, *shape), and those of the other processes' batches.

        Sums of what is left of the mean so far, so that none is large (Chan et al. 1979).
        """
        delta = batch.double() - self.mean
        rows = sum_over_processes(self.count.new_tensor(len(batch)))
        shift, squares = sum_over_processes(torch.stack([delta.sum(0), delta.square().sum(0)]))
        total = (self.count + rows).clamp(min=1)  # where there are none yet: no 0 / 0
        step = shift / total
        self.var.copy_((self.count * self.var + squares) / total - step**2).clamp_(min=0)
        self.mean += step
        self.count += rows


class ObservationNormalizer(RunningMeanStd):
    """Observations by their running mean and variance, clipped; images from 0 to 1 just so.

    Lives on the CPU, as they do. The statistics change between rollouts only: what is stored is
    what the policy saw. In the first one they are 0 and 1, so observations are only clipped.
    """

    def normalize(self, obs: np.ndarray) -> Tensor:
        """Raw observations (B, *O) to float32."""
        obs = torch.as_tensor(obs)
        if not (self.config.norm_obs and self.mean.ndim):
            return obs.float() / 255 if obs.dtype == torch.uint8 else obs.float()
        scaled = (obs - self.mean) / torch.sqrt(self.var + 1e-8)
        return scaled.clamp_(-self.config.clip_obs, self.config.clip_obs).float()


class RewardNormalizer(RunningMeanStd):
    """Rewards by the running std of the discounted return, so that values are of order one.

    Only the scale is changed, never the sign: the mean is not subtracted.
    """

    def forward(self, rewards: Tensor, valid: Tensor, running: Tensor) -> Tensor:
        """Rewards (T, N) of a rollout, scaled; `running` (N,), each episode's return so far, moves.

        A reset row sets the running return to zero, so every episode starts from there.
        """
        if not self.config.norm_reward:
            return rewards
        device, rewards, valid = rewards.device, rewards.cpu(), valid.cpu()  # sync point
        discounted = torch.empty_like(rewards)
        for t in range(len(rewards)):
            running.mul_(self.config.gamma).add_(rewards[t]).mul_(valid[t])
            discounted[t] = running
        self.update(discounted[valid])
        scaled = rewards / self.scale().to(rewards.dtype)
        return scaled.clamp_(*self.config.clip_reward).to(device)

    def scale(self) -> Tensor:
        """What rewards are divided by, ()."""
        return torch.sqrt(self.var + 1e-8) if self.config.norm_reward else torch.ones(())


# ==== 3. Networks =================================================================================


def orthogonal(layer: nn.Linear | nn.Conv2d, gain: float = math.sqrt(2)) -> nn.Module:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def network(space: Box, sizes: Sequence[int], config: Config, out_gain: float) -> nn.Sequential:
    """Linear layers with activations between; before them, for images (C, H, W), two convolutions.

    Gains √2 inside and `out_gain` last: Andrychowicz et al. 2021, "What Matters In On-Policy RL".
    """
    shape, layers = space.shape, []
    if len(shape) == 3:  # the first two of Mnih et al. 2015, half as wide
        layers += [orthogonal(nn.Conv2d(shape[0], 16, 8, 4)), nn.ReLU()]
        layers += [orthogonal(nn.Conv2d(16, 32, 4, 2)), nn.ReLU(), nn.Flatten()]
        shape = nn.Sequential(*layers)(torch.zeros(1, *shape)).shape[1:]
    for inputs, size in itertools.pairwise([*shape, *sizes[:-1]]):
        norm = [nn.LayerNorm(size)] * config.layer_norm
        layers += [orthogonal(nn.Linear(inputs, size)), *norm, ACTIVATIONS[config.activation]()]
    return nn.Sequential(*layers, orthogonal(nn.Linear(*sizes[-2:]), out_gain))


class ActorCritic(nn.Module):
    """A policy, Gaussian or for Discrete actions categorical, and a value function: two networks.

    Observations are normalised already, (B, *O); actions are unclipped, (B, A), or numbers, (B,).
    """

    def __init__(self, obs: Box, actions: Box | Discrete, config: Config) -> None:
        super().__init__()
        self.discrete, self.config = isinstance(actions, Discrete), config
        outputs = int(actions.n) if self.discrete else actions.shape[0]
        wide = outputs * (1 + (config.state_dependent_std and not self.discrete))
        self.actor = network(obs, [*config.actor_hidden, wide], config, out_gain=0.01)
        self.critic = network(obs, [*config.critic_hidden, 1], config, out_gain=1.0)
        if not self.discrete:
            raw_std = math.log(math.expm1(config.init_std))  # softplus⁻¹
            self.raw_std = nn.Parameter(torch.full((outputs,), raw_std))

    def distribution(self, obs: Tensor) -> torch.distributions.Distribution:
        if self.discrete:
            return torch.distributions.Categorical(logits=self.actor(obs), validate_args=False)
        mean, *by_state = self.actor(obs).split(len(self.raw_std), dim=-1)
        mean = mean.tanh() if self.config.mean_activation == "tanh" else mean
        std = nn.functional.softplus(self.raw_std + sum(by_state)).expand_as(mean)
        normal = torch.distributions.Normal(mean, std, validate_args=False)
        return torch.distributions.Independent(normal, 1, validate_args=False)

    def act(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Sampled actions and their log-probabilities (B,)."""
        distribution = self.distribution(obs)
        actions = distribution.sample()
        return actions, distribution.log_prob(actions)

    def evaluate_actions(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (B,) of given actions under the policy now, and its entropies (B,)."""
        distribution = self.distribution(obs)
        return distribution.log_prob(actions), distribution.entropy()

    def value(self, obs: Tensor) -> Tensor:
        """Expected discounted return of normalised rewards, (B, *O) -> (B,)."""
        return self.critic(obs).squeeze(-1)

    def mean_action(self, obs: Tensor) -> Tensor:
        """The deterministic policy: the mean, or the likeliest."""
        return self.distribution(obs).mode


def env_actions(actions: Tensor, space: Box | Discrete) -> np.ndarray:
    """As environments take them: clipped to a Box, or a Discrete's own numbers."""
    array = actions.cpu().numpy()  # sync point: the environments are on the CPU
    if isinstance(space, Discrete):
        return array.astype(np.int64) + space.start
    return np.clip(array, space.low, space.high)


# ==== 4. Rollout ==================================================================================


class Rollout:
    """T steps of N environments, preallocated on the device, and what goes over to the next T."""

    def __init__(self, config: Config, obs: Tensor, actions: Box | Discrete) -> None:
        T, N = config.rollout_steps, config.num_envs
        self.obs = obs.new_zeros(T + 1, *obs.shape)  # row t + 1 is what step t returned
        self.obs[-1] = obs  # (N, *O) the first ones, normalised
        self.actions = obs.new_zeros(T, N, *actions.shape)  # unclipped
        self.logprobs, self.rewards = obs.new_zeros(2, T, N)  # rewards: raw
        # valid: False on reset rows
        self.terminated, self.truncated, self.valid = obs.new_zeros(3, T, N, dtype=torch.bool)

        self.ended = np.zeros(N, dtype=bool)  # whether the step before ended an episode
        self.episode_return, self.episode_length = np.zeros(N), np.zeros(N, dtype=np.int64)
        self.discounted = torch.zeros(N)  # the reward normaliser's running return


def restart_some(envs: VectorEnv, normalizer: ObservationNormalizer, rollout: Rollout) -> None:
    """Begin anew, once, each environment whose episode is as long as a random length of its own.

    What learns to survive together would otherwise start, walk and end together ever after, and
    most batches would hold no start. The cut is between rollouts, so it is bootstrapped already.
    """
    due = (rollout.episode_length >= envs.restart_at) & ~rollout.ended
    if due.any():
        obs, _ = ask(envs, envs.reset, options={"reset_mask": due})
        obs = obs[due] if len(obs) == len(due) else obs  # EnvPool returns only those
        rollout.obs[-1, due] = normalizer.normalize(obs).to(rollout.obs.device)
        envs.restart_at[due] = sys.maxsize
        rollout.episode_return[due] = rollout.episode_length[due] = rollout.discounted[due] = 0


@torch.no_grad()
def collect_rollout(envs: VectorEnv, agent, normalizer, rollout) -> list[tuple[float, int]]:
    """Fill `rollout` with its next T steps; raw (return, length) of the episodes that ended.

    The normaliser learns from what the steps returned only at the end.
    """
    episodes, raw_obs = [], []
    restart_some(envs, normalizer, rollout)
    rollout.obs[0] = rollout.obs[-1]
    for t in range(len(rollout.rewards)):
        rollout.valid[t] = torch.from_numpy(~rollout.ended)
        rollout.actions[t], rollout.logprobs[t] = agent.act(rollout.obs[t])
        actions = env_actions(rollout.actions[t], envs.single_action_space)
        obs, rewards, terminated, truncated, _ = ask(envs, envs.step, actions)
        raw_obs.append(torch.from_numpy(obs))
        rollout.obs[t + 1] = normalizer.normalize(obs)
        rollout.rewards[t] = torch.from_numpy(rewards)
        rollout.terminated[t], rollout.truncated[t] = map(torch.from_numpy, (terminated, truncated))

        rollout.episode_return += rewards
        rollout.episode_length += ~rollout.ended
        rollout.ended = terminated | truncated
        for i in np.flatnonzero(rollout.ended):
            episodes.append((float(rollout.episode_return[i]), int(rollout.episode_length[i])))
            rollout.episode_return[i] = rollout.episode_length[i] = 0
    if normalizer.mean.ndim:  # images have none
        normalizer.update(torch.cat(raw_obs))
    return episodes


# ==== 5. Advantages ===============================================================================


def compute_gae(rewards, values, terminated, truncated, gamma, gae_lambda) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, equation 16) under two endings.

    Tensors rewards, terminated, truncated: (T, N); values: (T + 1, N), where values[t + 1] is the
    value of the observation that step t returned: the true last one where an episode ended.
    Termination stops the bootstrap; either ending stops the λ-trace. Returns advantages and
    returns, (T, N); on reset rows they are unspecified.
    """
    alive = (~terminated).to(values.dtype)
    traced = (~(terminated | truncated)).to(values.dtype)
    advantages = rewards + gamma * values[1:] * alive - values[:-1]  # δ_t
    for t in reversed(range(len(rewards) - 1)):  # A_t = δ_t + γλ A_{t+1}
        advantages[t] += gamma * gae_lambda * traced[t] * advantages[t + 1]
    return advantages, advantages + values[:-1]


class Batch(NamedTuple):
    """The transitions of one rollout, or of a minibatch; reset rows are left out. B rows."""

    obs: Tensor  # (B, *O) normalised
    actions: Tensor  # (B, A) unclipped, or (B,) numbers
    logprobs: Tensor  # (B,) when collected
    values: Tensor  # (B,) when collected
    advantages: Tensor  # (B,) of mean 0 and std 1 over the rollout
    returns: Tensor  # (B,)


@torch.no_grad()
def make_batch(rollout: Rollout, agent: ActorCritic, rewards: Tensor, config: Config) -> Batch:
    """Values in one pass, advantages and returns of `rewards` (T, N); reset rows dropped last."""
    values = agent.value(rollout.obs.flatten(0, 1)).view(len(rollout.obs), -1)  # (T + 1, N)
    failed = rollout.terminated & (rollout.rewards <= config.failure_reward)
    cut = rollout.truncated | rollout.terminated  # what ends well goes on in the value
    advantages, returns = compute_gae(rewards, values, failed, cut, config.gamma, config.gae_lambda)
    rows = (rollout.obs[:-1], rollout.actions, rollout.logprobs, values[:-1], advantages, returns)
    batch = Batch(*(tensor[rollout.valid] for tensor in rows))
    seen = RunningMeanStd(config)
    seen.update(batch.advantages.cpu())  # sync point
    advantages = (batch.advantages - seen.mean) / (seen.var.sqrt() + 1e-8)
    return batch._replace(advantages=advantages)


# ==== 6. Update ===================================================================================

Metrics = dict[str, float]  # names of CSV columns to values
LOSS_METRICS = ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction")


def ppo_loss(batch: Batch, logprobs, entropy, values, config: Config) -> tuple[Tensor, Tensor]:
    """The clipped objective (Schulman et al. 2017, equations 7 and 9) of rows `batch`.

    Tensors logprobs, entropy, values: (B,), of the networks as they are now. Returns the loss and,
    detached, LOSS_METRICS stacked.
    """
    log_ratio = logprobs - batch.logprobs
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - config.clip_eps, 1 + config.clip_eps)
    policy_loss = -torch.min(ratio * batch.advantages, clipped * batch.advantages).mean()
    errors = (values - batch.returns).square()
    if config.clip_value_eps is not None:  # the worse of the two, as in OpenAI's baselines
        near = (values - batch.values).clamp(-config.clip_value_eps, config.clip_value_eps)
        errors = errors.maximum((batch.values + near - batch.returns).square())
    value_loss = 0.5 * errors.mean()
    loss = policy_loss + config.value_coef * value_loss - config.entropy_coef * entropy.mean()
    approx_kl = (ratio - 1 - log_ratio).mean()  # k3 of Schulman 2020, "Approximating KL"
    clip_fraction = ((ratio - 1).abs() > config.clip_eps).float().mean()
    metrics = torch.stack([policy_loss, value_loss, entropy.mean(), approx_kl, clip_fraction])
    return loss, metrics.detach()


def minibatch_loss(agent: ActorCritic, batch: Batch, config: Config) -> tuple[Tensor, Tensor]:
    """`ppo_loss` of the networks as they are now: the part of an update that can be compiled."""
    logprobs, entropy = agent.evaluate_actions(batch.obs, batch.actions)
    return ppo_loss(batch, logprobs, entropy, agent.value(batch.obs), config)


def adapt_learning_rates(optimizer: optim.Optimizer, kl: Tensor, desired_kl: float) -> None:
    """Steer the KL of an update, in place and without a sync point (rsl_rl's rule).

    A KL of exactly zero is the first minibatch, where the policy is still the old one.
    """
    slower, faster = kl > 2 * desired_kl, (kl < desired_kl / 2) & (kl > 0)
    for group in optimizer.param_groups:
        group["lr"].mul_(1.5 ** (faster.float() - slower.float())).clamp_(1e-5, 1e-2)


def average_gradients(agent: ActorCritic, metrics: Tensor, rows: int) -> Tensor:
    """Gradients and `metrics` as means over the rows of all processes, in one flat all-reduce."""
    if not dist.is_initialized():
        return metrics
    gradients = [p.grad for p in agent.parameters()]
    flat = nn.utils.parameters_to_vector([*gradients, metrics, metrics.new_ones(1)])
    flat = sum_over_processes(flat * rows)
    nn.utils.vector_to_parameters(flat := flat / flat[-1], gradients)
    return flat[-1 - len(metrics) : -1]


def update(agent: ActorCritic, optimizer: optim.Optimizer, batch: Batch, config: Config) -> Metrics:
    """Epochs of freshly shuffled minibatches; metrics averaged over all of them.

    The rows are split into `num_minibatches` near-equal parts, so that none is tiny and every
    process has as many.
    """
    history, loss_of = [], minibatch_loss
    if config.compile:  # rows differ in number: dynamic, or each would be compiled anew
        loss_of = torch.compile(minibatch_loss, mode="reduce-overhead", dynamic=True)
    for _ in range(config.update_epochs):
        shuffled = torch.randperm(len(batch.obs), device=batch.obs.device)
        for rows in shuffled.tensor_split(config.num_minibatches):
            loss, metrics = loss_of(agent, Batch(*(tensor[rows] for tensor in batch)), config)
            optimizer.zero_grad()
            loss.backward()
            metrics = average_gradients(agent, metrics, len(rows))
            grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), config.max_grad_norm)
            if config.lr_schedule == "adaptive":
                adapt_learning_rates(optimizer, metrics[3], config.desired_kl)
            optimizer.step()
            history.append(torch.cat([metrics, grad_norm.view(1)]))
        epoch = torch.stack(history[-config.num_minibatches :])
        if config.target_kl is not None and epoch[:, 3].mean() > 1.5 * config.target_kl:
            break  # the test is a sync point, once an epoch
    averages = torch.stack(history).mean(0).tolist()  # sync point, once an update
    columns = dict(zip((*LOSS_METRICS, "grad_norm"), averages, strict=True))
    columns["learning_rate"] = optimizer.param_groups[0]["lr"].item()
    residual = (batch.returns - batch.values).var(correction=0)
    columns["explained_variance"] = (1 - residual / (batch.returns.var(correction=0) + 1e-8)).item()
    if not agent.discrete:
        columns["action_std"] = agent.distribution(batch.obs).stddev.mean().item()
    return columns


def schedule_learning_rates(optimizer: optim.Optimizer, config: Config, step: int) -> None:
    """Those of the policy and of the value function at an absolute step of the whole run."""
    progress = min(step / config.total_timesteps, 1.0)
    shapes = {"linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    if config.lr_schedule != "adaptive":
        for group in optimizer.param_groups:
            group["lr"].fill_(group["initial_lr"] * shapes.get(config.lr_schedule, 1.0))


# ==== 7. Evaluate =================================================================================

Act = Callable[[np.ndarray], np.ndarray]  # raw observations (B, O) to actions (B, A)
Row = dict[str, Any]  # of a step: what it began with, was given, and led to


def play(act: Act, config: Config, seeds, together=1, render=None) -> Iterator[tuple[gym.Env, Row]]:
    """One deterministic episode for each seed; yields each step, and the environment after it.

    Episode k is reset with seeds[k]; `together` of them step at once, which is faster.
    """
    waiting, running = list(enumerate(seeds))[::-1], {}
    while waiting or running:
        while waiting and len(running) < together:
            k, seed = waiting.pop()
            # a new environment, as a Box2D world keeps traces of the last episode
            env = make_env(config, render, f"environment, first reset with seed {seed}")
            running[k] = env, env.reset(seed=seed)[0]
        actions = act(np.stack([obs for _, obs in running.values()]))
        for (k, (env, obs)), action in zip(list(running.items()), actions, strict=True):
            row = {"episode": k, "observations": obs, "actions": action}
            obs, reward, terminated, truncated, _ = env.step(action)
            running[k] = env, obs
            row |= {"rewards": reward, "terminated": terminated, "next_observations": obs}
            yield env, row
            if terminated or truncated:
                running.pop(k)[0].close()


def evaluate(act: Act, config: Config, seeds: Sequence[int], together: int = 16) -> np.ndarray:
    """Raw returns and lengths, (2, episodes), of one deterministic episode for each seed.

    Every episode that is started counts, however many step together: to count the first to finish
    would favour falls. Touches no training state.
    """
    totals = np.zeros((2, len(seeds)))  # returns, lengths
    for _, row in play(act, config, seeds, together):
        totals[:, row["episode"]] += row["rewards"], 1
    gc.collect()  # Box2D's worlds hang in cycles, 300 KB each
    return totals


# ==== 8. Checkpoint ===============================================================================


def resolve_device(name: str) -> torch.device:
    """The device of that name. UserError where this machine has none."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    if not getattr(torch, name).is_available():
        raise UserError(f"--device {name}: there is none here, use --device cpu")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)


@pydantic.dataclasses.dataclass(config=STRICT)
class Counters(Checked):
    """Where a run stands; plain numbers, saved with it."""

    step: NonNegativeInt
    iteration: NonNegativeInt
    wall_s: NonNegativeFloat
    best_return: float | None = None
    solved_step: NonNegativeInt | None = None
    solved_wall_s: NonNegativeFloat | None = None


class Learner:
    """Everything that a checkpoint holds: networks, optimiser, normalisers and counters."""

    def __init__(self, config: Config) -> None:
        self.config, self.device = config, resolve_device(config.device)
        self.env = make_env(config)  # for its spaces; never stepped
        self.threshold = self.env.spec.reward_threshold
        self.spaces = self.env.observation_space, self.env.action_space
        self.agent = ActorCritic(*self.spaces, config).to(self.device)
        if sum(p.numel() for p in self.agent.parameters()) < 100_000:
            torch.set_num_threads(1)  # small networks lose more to threads than they gain
        policy = [p for name, p in self.agent.named_parameters() if not name.startswith("critic.")]
        values, rate = self.agent.critic.parameters(), config.learning_rate
        groups = [  # a rate in a tensor can be changed without a sync point
            {"params": params, "initial_lr": rate, "lr": torch.tensor(rate, device=self.device)}
            for params, rate in ((policy, rate), (values, config.value_learning_rate or rate))
        ]
        self.optimizer = optim.Adam(groups, eps=1e-5, fused=True)
        vector = is_vector(self.spaces[0])
        self.obs_normalizer = ObservationNormalizer(config, self.spaces[0].shape if vector else ())
        self.reward_normalizer = RewardNormalizer(config)
        self.counters = Counters(step=0, iteration=0, wall_s=0.0)
        self.saved_at = self.save_s = 0.0  # when last.pt was written, and how long a save takes
        self.started = time.perf_counter()  # as if the run had been in one piece

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """Raw observations (B, O) to deterministic actions (B, A) for the environments.

        What plays in evaluation and video: statistics frozen, actions clipped to their space.
        """
        actions = self.agent.mean_action(self.obs_normalizer.normalize(obs).to(self.device))
        return env_actions(actions, self.env.action_space)

    @torch.no_grad()
    def value(self, obs: np.ndarray) -> np.ndarray:
        """Raw observations (B, *O) to expected discounted returns of normalised rewards (B,)."""
        return self.agent.value(self.obs_normalizer.normalize(obs).to(self.device)).cpu().numpy()

    def save(self, name: str) -> None:
        """Write the checkpoint `name` below --out.

        Tensors and plain values only, so that loading them can run no code.
        """
        state = {part: getattr(self, part).state_dict() for part in LEARNED}
        state |= {"format": CHECKPOINT_FORMAT, "version": __version__}
        state |= {"config": plain_settings(self.config), "counters": vars(self.counters)}
        began, data = time.perf_counter(), io.BytesIO()
        torch.save(state, data)  # by itself it makes a RuntimeError of a full disk
        with atomic_path(Path(self.config.out) / name) as temporary:
            temporary.write_bytes(data.getvalue())
        self.save_s = time.perf_counter() - began

    def is_done(self) -> bool:
        solved = self.config.stop_when_solved and self.counters.solved_step is not None
        return solved or self.counters.step >= self.config.total_timesteps

    def load(self, state: dict[str, Any], source: str | Path, parts: Sequence[str]) -> None:
        """Load these parts of a checkpoint's state. UserError where they do not fit."""
        like = {part: getattr(self, part).state_dict() for part in parts}
        if "optimizer" in parts:  # all of a run; Adam has moments after a first step
            self.counters = checked(Counters, state["counters"], source)
            step, params = torch.tensor(0.0), [p.detach() for p in self.agent.parameters()]
            filled = ({"step": step, "exp_avg": p, "exp_avg_sq": p} for p in params)
            like["optimizer"]["state"] = dict(enumerate(filled)) if self.counters.iteration else {}
        for part in parts:
            if wrong := misfit(state[part], like[part], part):
                raise UserError(f"{source} does not fit this run: {wrong}")
            getattr(self, part).load_state_dict(state[part])


def misfit(value: Any, like: Any, name: str) -> str | None:
    """What in a loaded value has not the keys, type or shape of `like`, or is not finite."""
    if not isinstance(value, dict if isinstance(like, dict) else type(like)):
        return f"{name} is a {type(value).__name__}"
    if isinstance(like, list):
        value, like = dict(enumerate(value)), dict(enumerate(like))
    if isinstance(like, dict):
        if value.keys() != like.keys():
            return f"{name} has other entries"
        return next(filter(None, (misfit(value[k], like[k], f"{name}.{k}") for k in like)), None)
    if not isinstance(like, Tensor):
        return None if repr(value) == repr(like) else f"{name} is {value}, not {like}"
    kinds = "dtype", "shape", "layout", "is_meta"
    same = all(getattr(value, kind) == getattr(like, kind) for kind in kinds)
    least = 0 if name.endswith(("var", "count", "sq", "step", "lr")) else -math.inf
    if same and value.isfinite().all() and (value >= least).all():
        return None
    return f"{name} is damaged, or of shape {tuple(value.shape)}, not {tuple(like.shape)}"


def writing(path: Path) -> contextlib.AbstractContextManager[None]:
    """TrainingError that names the file where it cannot be written."""
    return explained(TrainingError, f"{path} cannot be written", OSError)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to, moved into place once it is whole on the disk.

    TrainingError where that fails; what was there before stays.
    """
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    with writing(path), contextlib.ExitStack() as stack:
        stack.callback(temporary.unlink, missing_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)


POLICY = ("agent", "obs_normalizer")
LEARNED = (*POLICY, "optimizer", "reward_normalizer")


def load_checkpoint(path: str | Path, env: str | None = None) -> dict[str, Any]:
    """A checkpoint's state on the CPU. Runs no code from it; UserError where it cannot be used.

    torch.load sees only records whose checksum was right: by itself it does not look, and would
    load most flipped bits silently as other values. An environment of the form `module:EnvId` would
    be imported, so it must be given as `env`, by the user.
    """
    verified, data = io.BytesIO(), io.BytesIO(Path(path).read_bytes())
    try:
        with warnings.catch_warnings(action="ignore"):
            with zipfile.ZipFile(data) as archive, zipfile.ZipFile(verified, "w") as copy:
                records = archive.infolist()
                size = sum(record.file_size for record in records)
                if size > len(data.getvalue()) or any(record.compress_type for record in records):
                    raise ValueError("it would inflate: torch packs nothing")
                for record in records:
                    copy.writestr(record.filename, archive.read(record))  # checks the checksum
            state = {**torch.load(io.BytesIO(verified.getvalue()), "cpu", weights_only=True)}
    except Exception:  # whatever a forged pickle makes of it
        raise UserError(f"{path} is no checkpoint, or a damaged one") from None
    if repr(state.get("format")) != repr(CHECKPOINT_FORMAT):
        theirs = f"version {state.get('version')}, in format {state.get('format')}"
        raise UserError(f"{path} was written by {theirs}, not {CHECKPOINT_FORMAT}")
    if not all(isinstance(state.get(part), dict) for part in ("config", "counters", *LEARNED)):
        raise UserError(f"{path} is no checkpoint of this program, or a part of it is missing")
    state["config"].pop("out", None)  # where to write is the user's to say
    named = str(state["config"].get("env"))
    if ":" in named and env is None:
        raise UserError(f"{path} names the environment {named}: type --env {named} to import it")
    return state


# ==== 9. Log and export ===========================================================================

CSV_COLUMNS = """step iteration wall_s steps_per_s collect_s update_s eval_s episodes return_mean
return_min return_max length_mean length_min length_max eval_return_mean eval_return_std
eval_episodes policy_loss value_loss entropy approx_kl clip_fraction explained_variance action_std
grad_norm learning_rate""".split()

NAMES = "best.pt last.pt metrics.csv config.json tensorboard".split()
BEST, LAST, METRICS, CONFIG, BOARD = (f"checkpoints_walker/{name}" for name in NAMES)
FILM, CURVES = "videos/walker_final.mp4", "plots/training_curves.png"
# All that a run writes below --out, and what one that was killed leaves.
WRITTEN = f"""{BEST} {LAST} {METRICS} {CONFIG} {BOARD}/events.* {FILM} videos/*_final.gif {CURVES}
checkpoints_walker/step_[0-9]*.pt videos/step_[0-9]*.mp4 videos/step_[0-9]*.gif""".split()
HALF_WRITTEN = "checkpoints_walker/.*.tmp.*", "videos/.*.tmp.*", "plots/.*.tmp.*"


def make_folders(*folders: Path) -> None:
    """UserError, before any is made, where one cannot be made or written to."""
    blocked = [folder for folder in folders if folder.exists() and not folder.is_dir()]
    for folder in blocked or folders:
        with explained(UserError, f"--out cannot be written to: {folder}", OSError):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()


def claim_folder(out: Path, resume: str | Path | None, overwrite: bool) -> FileLock:
    """Make the folders of a run and lock them, as long as this process lives.

    UserError where they hold another run, one is running in them, or they cannot be written to.
    """
    folders = [(out / name).parent for name in (LAST, FILM, CURVES)]
    own = resume is not None and Path(resume).resolve().parent == folders[0].resolve()
    if not (own or overwrite) and any((out / name).exists() for name in (BEST, LAST, METRICS)):
        choices = "go on with --resume, choose another folder with --out, or --overwrite it"
        raise UserError(f"{folders[0]} holds a run: {choices}")
    make_folders(*folders)
    lock = FileLock(folders[0] / ".lock")
    with explained(UserError, f"{folders[0]} is in use by a run that is still going", Timeout):
        lock.acquire(timeout=0)
    for pattern in [*HALF_WRITTEN, *WRITTEN] if overwrite else HALF_WRITTEN:
        for path in out.glob(pattern):
            path.unlink()
    return lock


class RunLog(contextlib.ExitStack):
    """metrics.csv, the progress bar on a terminal, and plain lines everywhere."""

    def __init__(self, path: Path, config: Config, counters: Counters) -> None:
        from tqdm import tqdm

        super().__init__()
        # behind the last line's end: nothing, or a torn line
        rows = (path.read_text() if path.exists() else "").split("\n")[1:-1]
        with explained(UserError, f"{path} is damaged: mend it, or remove it", ValueError):
            rows = [row for row in rows if int(row.split(",")[0]) <= counters.step]
        with atomic_path(path) as temporary:
            temporary.write_text("\n".join([",".join(CSV_COLUMNS), *rows, ""]))
        self.path, self.board, self.said_at = path, None, time.monotonic()
        total = config.num_iterations * config.batch_size * process()[1]
        how = {"unit": " steps", "unit_scale": True, "disable": None}  # None: but on a terminal
        self.bar = self.enter_context(tqdm(total=total, initial=counters.step, **how))
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(path.parents[1] / BOARD, purge_step=counters.step + 1)
            self.board = self.enter_context(board)

    def row(self, row: dict[str, Any]) -> None:
        """Append a row; a column that is not given stays empty. Show where the run is."""
        given = {name: row[name] for name in CSV_COLUMNS if row.get(name) is not None}
        cells = {k: f"{x:.6g}" if isinstance(x, float) else str(x) for k, x in given.items()}
        with writing(self.path), open(self.path, "a") as file:
            file.write(",".join(cells.get(name, "") for name in CSV_COLUMNS) + "\n")
        for name, number in given.items() if self.board else ():
            self.board.add_scalar(name, number, row["step"])
        shown = {"return": row.get("return_mean"), "best": row["best_return"]}
        text = ", ".join(f"{k} {'–' if v is None else f'{v:.1f}'}" for k, v in shown.items())
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(row["step"] - self.bar.n)
        if self.bar.disable and time.monotonic() - self.said_at > 10:  # no terminal: plain lines
            text += f", {row['steps_per_s']:,.0f} steps/s, {row['wall_s'] / 60:.1f} min"
            self.say(f"step {row['step']:,} of {self.bar.total:,}: {text}")

    def say(self, text: str) -> None:
        with self.bar.external_write_mode():
            print(text, flush=True)
        self.said_at = time.monotonic()


def write_config(config: Config, threshold: float | None, path: Path) -> None:
    """Every setting as JSON, to be run again by --config; `_about` is for readers and plots."""
    about = {"_about": {"reward_threshold": threshold, "version": __version__}}
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(plain_settings(config) | about, indent=2) + "\n")


def record_episode(act: Act, config: Config, seed: int, mp4: Path, seconds=None) -> list[Row]:
    """Film one deterministic episode, headless: H.264 in yuv420p, and a GIF of at most 3 MB.

    Or at most so many seconds of it. Returns what each step held. UserError where the environment
    cannot render.
    """
    import imageio

    rows, fps = [], make_env(config).metadata.get("render_fps", 30)
    h264 = {"codec": "libx264", "pixelformat": "yuv420p", "macro_block_size": 2}  # keeps even sizes
    limit = seconds and math.ceil(seconds * fps)
    steps = itertools.islice(play(act, config, [seed], 1, "rgb_array"), limit)
    with atomic_path(mp4) as temporary:
        with imageio.get_writer(temporary, fps=fps, **h264) as video:
            for env, row in steps:
                if (frame := env.render()) is None:
                    raise UserError(f"--env {config.env} renders nothing")
                video.append_data(frame)
                rows.append(row | gait_state(env))
        _write_gif(temporary, mp4.with_suffix(".gif"))
    return rows


def _write_gif(mp4: Path, gif: Path, limit: int = 3_000_000) -> None:
    """Every third frame of the film at half its size, at the true speed; cut at `limit` bytes."""
    from imageio_ffmpeg import get_ffmpeg_exe

    colours = "split[a][b];[a]palettegen=64[p];[b][p]paletteuse=dither=none"
    filters = ["-vf", f"framestep=3,scale=iw/2:-1:flags=area,{colours}", "-fs", str(limit)]
    with atomic_path(gif) as temporary:
        command = [get_ffmpeg_exe(), "-v", "quiet", "-y", "-i", mp4, *filters, temporary]
        if subprocess.run(command, stdin=subprocess.DEVNULL).returncode != 0:
            raise OSError("the encoder failed; is the disk full?")  # it says nothing itself


def gait_state(env: gym.Env) -> dict[str, np.ndarray]:
    """What a BipedalWalker's observation hides; {} for others. Metres, radians, seconds, N m.

    hull (6,): x, y, angle and their rates; joints (4, 3): angle, rate and motor torque of hip,
    knee, hip, knee; knees (2, 3): x, y and the ground's height below; contacts (2, 2): where each
    leg is touched, lowest and highest, as a fraction of the shin from the foot up (above 1: the
    thigh); NaN in the air.
    """
    walker = env.unwrapped
    if not (hasattr(walker, "hull") and hasattr(walker, "legs")):
        return {}
    hull, legs, shins, length = walker.hull, walker.legs, walker.legs[1::2], 34 / 30
    knees = np.array([shin.GetWorldPoint((0, length / 2)) for shin in shins])
    ground = np.interp(knees[:, 0], walker.terrain_x, walker.terrain_y)
    contacts = np.full((2, 2), np.nan)
    for span, thigh, shin in zip(contacts, legs[::2], shins, strict=True):
        touching = [e.contact for e in [*thigh.contacts, *shin.contacts] if e.contact.touching]
        points = [p for c in touching for p in c.worldManifold.points[: c.manifold.pointCount]]
        if heights := [shin.GetLocalPoint(point)[1] / length + 0.5 for point in points]:
            span[:] = min(heights), max(heights)
    pose = np.array([*hull.position, hull.angle, *hull.linearVelocity, hull.angularVelocity])
    joints = np.array([(j.angle, j.speed, j.GetMotorTorque(50)) for j in walker.joints])
    return {"hull": pose, "joints": joints, "knees": np.c_[knees, ground], "contacts": contacts}


def write_data(learner: Learner, rows: list[Row], path: Path) -> None:
    """Steps of `play` as an .npz for viz.py: each entry stacked, values, and what they are in."""
    arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    arrays["values"] = learner.value(arrays["observations"])
    arrays["next_values"] = learner.value(arrays.pop("next_observations"))
    config, scale = learner.config, learner.reward_normalizer.scale()
    clip = config.clip_reward if config.norm_reward else (-math.inf, math.inf)
    units = {"gamma": config.gamma, "reward_scale": scale, "reward_clip": clip}
    units["dt"] = 1 / learner.env.metadata.get("render_fps", 30)
    with atomic_path(path) as temporary:
        np.savez_compressed(temporary, **arrays, **units)


class StopSignals(contextlib.ExitStack):
    """While entered, a SIGINT or SIGTERM is noted in `received`; one more a second later leaves.

    One keypress can arrive twice: from the terminal, and from a launcher that passes it on.
    """

    received: int | None = None

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            replaced = signal.signal(number, self._note) or signal.SIG_DFL
            self.callback(signal.signal, number, replaced)
        return self

    def _note(self, number: int, _frame: Any) -> None:
        if self.received is None:
            self.received, self.noted_at = number, time.monotonic()
            os.write(2, b"\nstopping after this iteration; once more to leave at once\n")
        elif time.monotonic() > self.noted_at + 1:
            os._exit(128 + number)


# ==== 10. Train ===================================================================================

# What --resume may change: nothing that the learner sees.
RESUMABLE = """total_timesteps device compile vector_env step_timeout out eval_every
eval_episodes checkpoint_every record_every tensorboard stop_when_solved""".split()


def prepare_learner(config: Config, resume: str | Path | None) -> Learner:
    """A new learner, or one that goes on from `resume`. Writes nothing."""
    seed_everything(config.seed, rank=0, step=0)  # the same networks in every process
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs `pip install tensorboard`")
    learner = Learner(config)
    if resume is not None:
        state = load_checkpoint(resume, config.env)
        saved = checked(Config.for_env, state["config"], resume)
        for name, old in vars(saved).items():
            if (new := getattr(config, name)) != old and name not in RESUMABLE:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} is {new!r}, but {resume} was trained with {old!r}")
        best = Path(config.out, BEST)  # it may be newer than the checkpoint, or missing
        counters = load_checkpoint(best, config.env)["counters"] if best.exists() else {}
        state["counters"]["best_return"] = counters.get("best_return")
        learner.load(state, resume, LEARNED)
        learner.started -= learner.counters.wall_s
    elif config.init_from is not None:
        learner.load(load_checkpoint(config.init_from, config.env), config.init_from, POLICY)
    return learner


def is_due(every: int, step: int, steps: int, total: float = math.inf) -> bool:
    """Whether the iteration of `steps` that ends at `step` is the first at a multiple, or past.

    Or the last of `total` steps.
    """
    return every > 0 and (step // every > (step - steps) // every or step >= total)


def evaluate_and_rank(learner: Learner, steps: int, log: RunLog) -> tuple[Metrics, bool]:
    """If due: the evaluation columns of an iteration of `steps`, and whether this is the best yet.

    A best mean at the threshold is confirmed on 100 fresh episodes, and the policy ranked by those:
    the highest of many means over a few episodes is high by luck.
    """
    config, counters, threshold = learner.config, learner.counters, learner.threshold
    if not is_due(config.eval_every, counters.step, steps, config.total_timesteps):
        return {}, False
    best = -math.inf if counters.best_return is None else counters.best_return
    seeds = env_seeds(config.seed, EVALUATE, config.eval_episodes)
    returns, _ = evaluate(learner.act, config, seeds)
    columns = {"eval_return_mean": returns.mean(), "eval_return_std": returns.std()}
    if threshold is not None and returns.mean() >= max(threshold, best):
        fresh = env_seeds(config.seed, CONFIRM, 100, step=counters.step)
        returns, _ = evaluate(learner.act, config, fresh)
        if returns.mean() >= threshold and counters.solved_step is None:
            counters.solved_step = counters.step
            counters.solved_wall_s = time.perf_counter() - learner.started
            log.say(f"solved after {counters.solved_wall_s / 60:.1f} min, by 100 fresh episodes")
    is_best = bool(returns.mean() > best)
    counters.best_return = max(float(returns.mean()), best)
    over = f"{returns.mean():.1f} ± {returns.std():.1f} over {len(returns)} episodes"
    log.say(f"step {counters.step:,}: evaluation {over}{', the best so far' if is_best else ''}")
    return columns | {"eval_episodes": len(seeds)}, is_best


def save(learner: Learner, steps: int, iteration_s: float, is_best: bool) -> None:
    """After an iteration of so many steps and seconds: best.pt, step_N.pt and last.pt, where due.

    last.pt is written where that costs under 1 % of the iteration, else at most every 10 s.
    """
    config, step, now = learner.config, learner.counters.step, time.perf_counter()
    if is_best:
        learner.save(BEST)
    if is_due(config.checkpoint_every, step, steps):
        learner.save(LAST.replace("last", f"step_{step}"))
    if now - learner.saved_at >= 10 or learner.save_s < 0.01 * iteration_s:
        learner.save(LAST)
        learner.saved_at = time.perf_counter()


def check_finite(values: Metrics, counters: Counters) -> None:
    """TrainingError that names the first value that is not finite."""
    for name in (name for name, value in values.items() if not math.isfinite(value)):
        where = f"{name} is {values[name]} in the iteration after step {counters.step:,}"
        raise TrainingError(f"{where}: try a lower --learning-rate; last.pt is from before it")


def episode_columns(episodes: Sequence[tuple[float, int]]) -> Metrics:
    """Raw returns and lengths of the episodes that ended in an iteration."""
    columns: Metrics = {"episodes": len(episodes)}
    for name, all_ in zip(("return", "length"), zip(*episodes, strict=True), strict=False):
        columns |= {f"{name}_{f.__name__}": float(f(all_)) for f in (np.mean, min, max)}
    return columns


def film(learner: Learner, log: RunLog, mp4: Path) -> None:
    """`record_episode` in the world of all films of the run; one line where that cannot be."""
    try:
        record_episode(learner.act, learner.config, *env_seeds(learner.config.seed, VIDEO, 1), mp4)
        log.say(f"video: {mp4}, and a GIF beside it")
    except (UserError, EnvironmentFailure) as error:
        log.say(f"no video: {error}")


def export(learner: Learner, log: RunLog, with_film: bool) -> None:
    """Film the best policy there is, and plot the curves."""
    import viz

    out, env = Path(learner.config.out), learner.config.env
    if (out / BEST).exists():
        learner.load(load_checkpoint(out / BEST, env), out / BEST, POLICY)
    if with_film:
        film(learner, log, out / FILM)
    with writing(out / CURVES), explained(TrainingError, "no curves", viz.InputError):
        viz.plot_training_curves(out / METRICS, out / CURVES, learner.threshold)
    log.say(f"curves: {out / CURVES}")


Outcome = tuple[Counters, int | None]  # where the run stands, and the signal that stopped it


def train(config: Config, resume: str | Path | None = None, overwrite: bool = False) -> Outcome:
    """Train, evaluate, save, log, and at the end film the best policy and plot the curves.

    `resume` is the checkpoint to go on from; `overwrite` removes an earlier run's files first.
    Returns where the run stands, and the signal that stopped it, if one did. Raises UserError
    before anything is written, TrainingError where training cannot go on.
    """
    if join_processes() > 0 and Path(config.out, LAST).exists():
        resume, overwrite = Path(config.out, LAST), False  # torchrun has started us again
    rank, steps = process()[0], process()[1] * config.batch_size
    learner, out = prepare_learner(config, resume), Path(config.out)
    agent, counters, normalizer = learner.agent, learner.counters, learner.obs_normalizer
    with contextlib.ExitStack() as stack:
        seeds = env_seeds(config.seed, TRAIN, config.num_envs, rank, counters.step)
        envs, obs = make_vector_env(config, seeds)
        stack.callback(close_envs, envs)
        stop = stack.enter_context(StopSignals())
        any_process(False)  # every process has read what rank 0 may remove now
        if rank == 0:
            stack.callback(claim_folder(out, resume, overwrite).release)
            write_config(config, learner.threshold, out / CONFIG)
            learner.save(LAST)  # before metrics.csv is cut to its step: killed between, they fit
            log = stack.enter_context(RunLog(out / METRICS, config, counters))
        rollout = Rollout(config, normalizer.normalize(obs).to(learner.device), learner.spaces[1])

        while not any_process(learner.is_done() or stop.received is not None):
            # set the learning rate and the random numbers, by the absolute step
            began = time.perf_counter()
            seed_everything(config.seed, rank, counters.step)
            schedule_learning_rates(learner.optimizer, config, counters.step)

            # collect a rollout
            episodes = collect_rollout(envs, agent, normalizer, rollout)
            collected = time.perf_counter()

            # compute advantages of the normalised rewards; update
            rewards = learner.reward_normalizer(rollout.rewards, rollout.valid, rollout.discounted)
            batch = make_batch(rollout, agent, rewards, config)
            losses = update(agent, learner.optimizer, batch, config)
            check_finite(losses, counters)
            counters.step += steps
            counters.iteration += 1
            updated = time.perf_counter()
            if rank > 0:
                continue  # rank 0 evaluates, logs and saves

            # evaluate, if due
            evaluation, is_best = evaluate_and_rank(learner, steps, log)
            ended = time.perf_counter()
            counters.wall_s = ended - learner.started

            # log a row
            row = dataclasses.asdict(counters) | episode_columns(episodes) | losses | evaluation
            row |= {"collect_s": collected - began, "update_s": updated - collected}
            row |= {"eval_s": ended - updated, "steps_per_s": steps / (updated - began)}
            log.row(row)

            # save
            save(learner, steps, ended - began, is_best)
            if is_due(config.record_every, counters.step, steps):
                film(learner, log, out / f"videos/step_{counters.step}.mp4")

        if rank == 0:
            learner.save(LAST)
            best = "" if counters.best_return is None else f", best {counters.best_return:.1f}"
            log.say(f"{counters.step:,} steps in {counters.wall_s / 60:.1f} min{best}")
            export(learner, log, with_film=stop.received != signal.SIGTERM)
        any_process(False)  # a launcher ends all when one ends: not before the film is done
    return counters, stop.received


def load_learner(checkpoint: str, env: str | None, seed: int, device: str, out: str) -> Learner:
    """A trained policy with its statistics. UserError where it is none, or does not fit `env`."""
    state = load_checkpoint(checkpoint, env)
    config = checked(Config.for_env, state["config"], checkpoint)
    changes = {} if env in (None, config.env) else {"env": env, "env_kwargs": ()}
    learner = Learner(dataclasses.replace(config, seed=seed, device=device, out=out, **changes))
    learner.load(state, checkpoint, (*POLICY, "reward_normalizer"))
    return learner


def show(act: Act, config: Config, seeds: Sequence[int], seconds: float) -> None:
    """Play episodes in a window for `seconds` of simulated time, one after another."""
    steps = math.ceil(seconds * make_env(config).metadata.get("render_fps", 30))
    *_, (env, _) = itertools.islice(play(act, config, seeds, 1, "human"), steps)
    env.close()
