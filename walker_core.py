"""PPO for BipedalWalker-v3 and its relatives, top to bottom in one file.

Data flows down the page: Config -> environments -> networks -> rollout -> advantages -> update ->
evaluate -> checkpoint -> log and export -> train. A section uses only what stands above it.

BipedalWalker-v3 with the default settings, seeds 11, 12, 13: solved after 4.1, 2.7, 2.9 minutes
(1.6M, 1.0M, 1.1M steps), on two cores of a virtual AMD EPYC, PyTorch 2.13.0, Gymnasium 1.4.0.

Shapes: T rollout steps, N environments, B rows of a minibatch, O observation, A action.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import io
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
import typing
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import typeguard
from filelock import FileLock, Timeout
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

__version__ = "0.1.0"
CHECKPOINT_FORMAT = 1  # raised when a checkpoint's contents change their meaning


class UserError(ValueError):
    """A mistake in what was asked for: shown as one line, exit code 2."""


class TrainingError(RuntimeError):
    """Training cannot go on, though it was asked for correctly: shown as one line, exit code 1."""


class EnvironmentFailure(TrainingError):
    """An environment raised, hung, or gave numbers that are not finite."""


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
        try:
            dist.all_reduce(values)
        except RuntimeError as error:
            raise TrainingError("another process is gone: go on with --resume") from error
    return values


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of all processes' rows, (B,) -> (); B may differ between them."""
    total, count = sum_over_processes(torch.stack([values.sum(), values.new_tensor(len(values))]))
    return total / count


def any_process(flag: bool) -> bool:
    return bool(sum_over_processes(torch.tensor(float(flag))))


def leave(code: int) -> None:
    """End this process; one of several at once, as gloo's threads sometimes abort a usual exit."""
    sys.stdout.flush()
    os._exit(code) if dist.is_initialized() else sys.exit(code)


# ==== 1. Config ===================================================================================

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU, "silu": nn.SiLU}


def within(bounds: str, default: Any) -> Any:
    """A setting whose numbers lie in an interval: [0, 1) is 0 ≤ x < 1."""
    return dataclasses.field(default=default, metadata={"bounds": bounds})


@dataclass(frozen=True)
class Config:
    """Settings of one run; each is also a flag of `walker.py`. Validated once, on creation.

    Raises UserError that names the field, its value and what would be right.
    """

    env: str = "BipedalWalker-v3"  # Gymnasium id; `module:EnvId` imports the module first
    env_kwargs: tuple[str, ...] = ()  # arguments of the environment, each as KEY=VALUE
    total_timesteps: int = within("[1, inf)", 1_000_000)  # environment steps of the whole run
    seed: int = within("[0, 4294967295]", 1)  # of networks, sampling and every environment
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda where present, else cpu
    out: str = "."  # folder in which checkpoints_walker/, videos/ and plots/ are made
    init_from: str | None = None  # start from this checkpoint's weights and observation statistics

    vector_env: Literal["sync", "async", "envpool"] = "sync"  # how the environments are stepped
    num_envs: int = within("[1, 100000]", 8)  # environments stepped together (N)
    rollout_steps: int = within("[2, 1000000]", 256)  # steps of each between two updates (T)
    step_timeout: float = within("(0, inf)", 60.0)  # seconds until an async environment has hung
    norm_obs: bool = True  # normalise observations by their running mean and variance
    norm_reward: bool = True  # divide rewards by the running std of the discounted return
    clip_obs: float = within("(0, inf)", 10.0)  # clip normalised observations to ± this
    clip_reward: tuple[float, float] = within("(-inf, inf)", (-10.0, 10.0))  # normalised: LOW HIGH

    actor_hidden: tuple[int, ...] = within("[1, 4096]", (64, 64))  # layer sizes of the policy
    critic_hidden: tuple[int, ...] = within("[1, 4096]", (64, 64))  # and of the value function
    activation: Literal["tanh", "relu", "elu", "silu"] = "tanh"  # of the hidden layers
    layer_norm: bool = False  # LayerNorm before each activation
    init_std: float = within("[0.001, 10]", 1.0)  # initial standard deviation of the actions

    learning_rate: float = within("(0, inf)", 3e-4)  # of Adam; where the schedule starts
    lr_schedule: Literal["constant", "linear", "cosine", "adaptive"] = "linear"  # adaptive: by KL
    desired_kl: float = within("(0, inf)", 0.01)  # per update, that the adaptive schedule steers to
    gamma: float = within("[0, 1]", 0.99)  # discount factor
    gae_lambda: float = within("[0, 1]", 0.95)  # λ of generalised advantage estimation
    clip_eps: float = within("(0, inf)", 0.2)  # the probability ratio is clipped to 1 ± this
    entropy_coef: float = within("[0, inf)", 0.0)  # weight of the entropy bonus
    value_coef: float = within("[0, inf)", 0.5)  # weight of the value loss
    max_grad_norm: float = within("(0, inf)", 0.5)  # the gradient's norm is clipped to this
    update_epochs: int = within("[1, inf)", 5)  # passes over each rollout
    minibatch_size: int = within("[2, inf)", 256)  # rows of one gradient step (B)
    target_kl: float | None = within("(0, inf)", None)  # end an update whose KL exceeds 1.5 × this

    eval_every: int = within("[0, inf)", 100_000)  # steps between evaluations; 0: never
    eval_episodes: int = within("[1, inf)", 10)  # episodes of each periodic evaluation
    checkpoint_every: int = within("[0, inf)", 0)  # steps between kept step_N.pt; 0: none are kept
    stop_when_solved: bool = False  # end the run once 100 fresh episodes confirm the threshold

    def __post_init__(self) -> None:
        kinds = typing.get_type_hints(Config)
        for field in dataclasses.fields(self):
            kind, bounds = kinds[field.name], field.metadata.get("bounds")
            right = f"{field.type} in {bounds}" if bounds else field.type
            ok = _is_right(getattr(self, field.name), kind, bounds)
            self._check(field.name, ok, right)
        self._check("env_kwargs", all("=" in pair for pair in self.env_kwargs), "KEY=VALUE, each")
        self._check("clip_reward", self.clip_reward[0] < self.clip_reward[1], "LOW < HIGH")
        most = f"at most the batch, num_envs × rollout_steps = {self.batch_size}"
        self._check("minibatch_size", self.minibatch_size <= self.batch_size, most)

    def _check(self, name: str, ok: bool, right: str) -> None:
        if not ok:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} is {getattr(self, name)!r}: it must be {right}")

    @classmethod
    def for_env(cls, env: str, **settings: Any) -> Config:
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
        """At most as many as there are transitions where every second row is a reset row."""
        return min(
            self.batch_size // self.minibatch_size, self.num_envs * (self.rollout_steps // 2)
        )

    @property
    def env_options(self) -> dict[str, Any]:
        """`env_kwargs` as keyword arguments: Python literals where they parse, else strings."""
        options = dict(pair.split("=", 1) for pair in self.env_kwargs)
        for key, value in options.items():
            with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
                options[key] = ast.literal_eval(value)
        return options


# Only what differs from the defaults above; tests/benchmarks/TUNING.md has what was tried.
PRESETS: dict[str, dict[str, Any]] = {
    "BipedalWalker-v3": {"total_timesteps": 3_000_000, "num_envs": 64, "minibatch_size": 2048}
    | {"learning_rate": 1.5e-3, "gamma": 0.995, "init_std": 0.7, "update_epochs": 10}
}
PRESETS["BipedalWalkerHardcore-v3"] = PRESETS["BipedalWalker-v3"] | {"total_timesteps": 20_000_000}


def _is_right(value: Any, kind: Any, bounds: str | None) -> bool:
    """Whether a value is of a setting's type; its names not empty, its numbers within bounds."""
    try:
        every = typeguard.CollectionCheckStrategy.ALL_ITEMS
        typeguard.check_type(value, kind, collection_check_strategy=every)
    except typeguard.TypeCheckError:
        return False
    items = [x for x in (value if isinstance(value, tuple) else (value,)) if x is not None]
    if bounds is None:
        return all(not isinstance(x, str) or x.strip() != "" for x in items)
    low, high = map(float, bounds[1:-1].split(","))
    edges = [edge for edge, mark in ((low, bounds[0]), (high, bounds[-1])) if mark in "[]"]
    in_bounds = (type(x) is not bool and (low < x < high or x in edges) for x in items)
    return (value is None or len(items) > 0) and all(in_bounds)


def plain_settings(config: Config) -> dict[str, Any]:
    """What a config.json and a checkpoint hold: all settings but `out`, which is where they lie."""
    return {k: v for k, v in dataclasses.asdict(config).items() if k != "out"}


def config_from_dict(settings: dict[str, Any], source: str | Path) -> Config:
    """Config from plain values as JSON or a checkpoint holds them. UserError names `source`."""
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    values.pop("_about", None)
    try:
        return Config.for_env(values.pop("env", Config.env), **values)
    except (UserError, TypeError) as error:  # TypeError: a name that is no setting
        raise UserError(f"{source}: {str(error).removeprefix('Config.__init__() ')}") from None


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
        self.name, self.seed, self.steps = name, None, 0

    def reset(self, *, seed: int | None = None, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self.seed, self.steps = seed, 0
        return self._run(self.env.reset, seed=seed, **kwargs)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return self._run(self.env.step, action)

    def _run(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        try:
            result = function(*args, **kwargs)  # (obs, info), or (obs, reward, ...)
            reward = result[1] if len(result) > 2 else 0.0
            if not (math.isfinite(reward) and np.isfinite(result[0]).all()):
                raise ValueError("an observation or reward is not finite")
            return result
        except Exception as error:  # whatever a stranger's code raises
            where = f"{self.name}, {self.steps} steps after a reset with seed {self.seed}"
            raise EnvironmentFailure(f"{where}: {error!r}") from error


def make_env(config: Config, render_mode: str | None = None, name: str = "environment") -> gym.Env:
    """One environment of the run. UserError where Gymnasium cannot make it or PPO cannot use it."""
    options = config.env_options | ({"render_mode": render_mode} if render_mode else {})
    try:
        with warnings.catch_warnings(action="ignore"):  # what is wrong is said below, in one line
            env = gym.make(config.env, disable_env_checker=True, **options)
    except (gym.error.Error, ImportError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"--env {config.env} cannot be made: {why}") from error
    if render_mode and render_mode not in env.metadata.get("render_modes", ()):
        raise UserError(f"--env {config.env} cannot render")
    obs, action = env.observation_space, env.action_space
    for space, what in ((obs, "observation"), (action, "action")):
        is_vector = isinstance(space, gym.spaces.Box) and len(space.shape) == 1
        if not is_vector or not np.issubdtype(space.dtype, np.floating):
            raise UserError(f"--env {config.env}: its {what} space must be a float vector (Box)")
    return Reporting(env, name)


def _worker_env(config: Config, index: int) -> gym.Env:
    """An environment of a vector; in a process of its own, it ends with the main one, not before.

    Signals are for the main process, which ends the others; a killed one must leave no orphans.
    """
    if (main := multiprocessing.parent_process()) is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if hasattr(os, "setpgid"):  # not on Windows
            os.setpgid(0, 0)
        threading.Thread(target=lambda: (main.join(), os._exit(1)), daemon=True).start()
    return make_env(config, name=f"environment {index}")


def make_vector_env(config: Config, seeds: Sequence[int]) -> tuple[VectorEnv, np.ndarray]:
    """N environments with NEXT_STEP autoreset, and their first observations (N, O).

    The row after an episode's end ignores its action, has reward 0 and is no transition.
    """
    if config.vector_env == "envpool":
        envs = _make_envpool(config, seeds)
        return envs, envs.reset()[0]  # its seeds were given when it was made
    make = [lambda i=i: _worker_env(config, i) for i in range(config.num_envs)]
    vector = SyncVectorEnv if config.vector_env == "sync" else AsyncVectorEnv
    envs = vector(make, autoreset_mode=AutoresetMode.NEXT_STEP)
    envs.seeds = seeds  # for reports
    if config.vector_env == "async":  # by themselves they would wait for ever
        envs.reset_wait = lambda limit=config.step_timeout, wait=envs.reset_wait: wait(limit)
        envs.step_wait = lambda limit=config.step_timeout, wait=envs.step_wait: wait(limit)
    return envs, ask(envs, envs.reset, seed=seeds)[0]


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
        where = f"environment {index}, first reset with seed {envs.seeds[index]}"
        raise EnvironmentFailure(f"{where}: its process {what}") from None


def close_envs(envs: VectorEnv) -> None:
    """Ends worker processes the hard way: one that hangs or has died answers no polite close."""
    for process in getattr(envs, "processes", ()):
        process.kill()
        process.join()
        envs.closed = True
    envs.close()


def _make_envpool(config: Config, seeds: Sequence[int]) -> VectorEnv:
    try:
        import envpool
    except ImportError as error:
        raise UserError("--vector-env envpool needs `pip install envpool`") from error
    if config.env not in envpool.list_all_envs():
        raise UserError(f"--vector-env envpool has no {config.env}: use sync or async")
    threads = max(os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)
    settings = {"num_envs": config.num_envs, "seed": list(seeds), "num_threads": threads}
    return envpool.make_gymnasium(config.env, **settings, **config.env_options)


class RunningMeanStd(nn.Module):
    """Mean and variance of a stream, merged batch by batch (Chan et al. 1979), in float64."""

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def update(self, batch: Tensor) -> None:
        """Merge the rows of `batch` (B, *shape)."""
        rows, batch = len(batch), batch.to(torch.float64)
        total = self.count + rows
        delta = batch.mean(0) - self.mean
        squares = self.var * self.count + batch.var(0, correction=0) * rows
        self.var.copy_((squares + delta**2 * self.count * rows / total) / total)
        self.mean += delta * rows / total
        self.count.copy_(total)

    def sums(self) -> Tensor:
        """Count, sum and sum of squares of all that was seen, (3, *shape)."""
        ones = torch.ones_like(self.mean)
        return self.count * torch.stack([ones, self.mean, self.var + self.mean**2])

    def merge_processes(self, before: Tensor) -> None:
        """What every process has seen since `before`, the sums when all of them were the same."""
        if dist.is_initialized():
            count, total, squares = before + sum_over_processes(self.sums() - before)
            self.count.copy_(count.max())
            self.mean.copy_(total / count.clamp(min=1))  # where nothing was seen yet: 0 / 0
            self.var.copy_((squares / count.clamp(min=1) - self.mean**2).clamp(min=0))


class ObservationNormalizer(RunningMeanStd):
    """Observations by their running mean and variance, clipped. Lives on the CPU, as they do."""

    def __init__(self, shape: tuple[int, ...], config: Config) -> None:
        super().__init__(shape)
        self.enabled, self.clip = config.norm_obs, config.clip_obs

    def normalize(self, obs: np.ndarray, update: bool = False) -> Tensor:
        """(B, *shape) raw to float32, by the statistics as they stand, or with these rows in."""
        obs = torch.as_tensor(obs)
        if not self.enabled:
            return obs.float()
        if update:
            self.update(obs)
        scaled = (obs - self.mean) / torch.sqrt(self.var + 1e-8)
        return scaled.clamp_(-self.clip, self.clip).float()


class RewardNormalizer(RunningMeanStd):
    """Rewards by the running std of the discounted return, so that values are of order one.

    Only the scale is changed, never the sign: the mean is not subtracted.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.enabled, self.clip, self.gamma = config.norm_reward, config.clip_reward, config.gamma

    def forward(self, rewards: Tensor, valid: Tensor, running: Tensor) -> Tensor:
        """Rewards (T, N) of a rollout, scaled; `running` (N,), each episode's return so far, moves.

        A reset row sets the running return to zero, so every episode starts from there.
        """
        if not self.enabled:
            return rewards
        device, rewards, valid = rewards.device, rewards.cpu(), valid.cpu()  # sync point
        discounted = torch.empty_like(rewards)
        for t in range(len(rewards)):
            running.mul_(self.gamma).add_(rewards[t]).mul_(valid[t])
            discounted[t] = running
        before = self.sums()
        self.update(discounted[valid])
        self.merge_processes(before)
        scale = torch.sqrt(self.var + 1e-8).to(rewards.dtype)
        return (rewards / scale).clamp_(*self.clip).to(device)


# ==== 3. Networks =================================================================================


def mlp(sizes: Sequence[int], config: Config, out_gain: float) -> nn.Sequential:
    """Linear layers with activations between; orthogonal weights, zero biases.

    Gains √2 inside and `out_gain` last: Andrychowicz et al. 2021, "What Matters In On-Policy RL".
    """
    layers: list[nn.Module] = []
    for i, outputs in enumerate(sizes[1:]):
        last = i == len(sizes) - 2
        layers.append(linear := nn.Linear(sizes[i], outputs))
        nn.init.orthogonal_(linear.weight, out_gain if last else math.sqrt(2))
        nn.init.zeros_(linear.bias)
        if not last:
            norm = [nn.LayerNorm(outputs)] * config.layer_norm
            layers += [*norm, ACTIVATIONS[config.activation]()]
    return nn.Sequential(*layers)


class ActorCritic(nn.Module):
    """Gaussian policy with a state-independent std, and a value function: two separate networks.

    Observations are normalised already, (B, O); actions are unclipped, (B, A).
    """

    def __init__(self, obs_dim: int, action_dim: int, config: Config) -> None:
        super().__init__()
        self.actor = mlp([obs_dim, *config.actor_hidden, action_dim], config, out_gain=0.01)
        self.critic = mlp([obs_dim, *config.critic_hidden, 1], config, out_gain=1.0)
        raw_std = math.log(math.expm1(config.init_std))  # softplus⁻¹
        self.raw_std = nn.Parameter(torch.full((action_dim,), raw_std))

    @property
    def std(self) -> Tensor:
        return F.softplus(self.raw_std)  # (A,)

    def distribution(self, obs: Tensor) -> torch.distributions.Distribution:
        normal = torch.distributions.Normal(self.actor(obs), self.std, validate_args=False)
        return torch.distributions.Independent(normal, 1, validate_args=False)

    def act(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """A sampled action (B, A) and its log-probability (B,)."""
        distribution = self.distribution(obs)
        actions = distribution.sample()
        return actions, distribution.log_prob(actions)

    def evaluate_actions(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (B,) of given actions under the policy now, and its entropies (B,)."""
        distribution = self.distribution(obs)
        return distribution.log_prob(actions), distribution.entropy()

    def value(self, obs: Tensor) -> Tensor:
        """Expected discounted return of normalised rewards, (..., O) -> (...)."""
        return self.critic(obs).squeeze(-1)

    def mean_action(self, obs: Tensor) -> Tensor:
        """The deterministic policy, (B, A)."""
        return self.actor(obs)


# ==== 4. Rollout ==================================================================================


class Rollout:
    """T steps of N environments, preallocated on the device, and what goes over to the next T."""

    def __init__(self, config: Config, obs: Tensor, action_dim: int) -> None:
        T, N = config.rollout_steps, config.num_envs
        self.obs = obs.new_zeros(T + 1, *obs.shape)  # row t + 1 is what step t returned
        self.obs[-1] = obs  # (N, O) the first ones, normalised
        self.actions = obs.new_zeros(T, N, action_dim)  # unclipped
        self.logprobs = obs.new_zeros(T, N)
        self.rewards = obs.new_zeros(T, N)  # raw
        self.terminated = torch.zeros_like(self.rewards, dtype=torch.bool)
        self.truncated = torch.zeros_like(self.terminated)
        self.valid = torch.zeros_like(self.terminated)  # False on reset rows

        self.ended = np.zeros(N, dtype=bool)  # whether the step before ended an episode
        self.episode_return = np.zeros(N)
        self.episode_length = np.zeros(N, dtype=np.int64)
        self.discounted = torch.zeros(N)  # the reward normaliser's running return


@torch.no_grad()
def collect_rollout(
    envs: VectorEnv, agent: ActorCritic, normalizer: ObservationNormalizer, rollout: Rollout
) -> list[tuple[float, int]]:
    """Fill `rollout` with its next T steps; raw (return, length) of the episodes that ended."""
    low, high = envs.single_action_space.low, envs.single_action_space.high
    episodes, before = [], normalizer.sums()
    rollout.obs[0] = rollout.obs[-1]
    for t in range(len(rollout.rewards)):
        rollout.valid[t] = torch.from_numpy(~rollout.ended)
        rollout.actions[t], rollout.logprobs[t] = agent.act(rollout.obs[t])
        actions = rollout.actions[t].cpu().numpy()  # sync point: the environments are on the CPU
        clipped = np.clip(actions, low, high)
        obs, rewards, terminated, truncated, _ = ask(envs, envs.step, clipped)
        rollout.obs[t + 1] = normalizer.normalize(obs, update=True)
        rollout.rewards[t] = torch.from_numpy(rewards)
        rollout.terminated[t] = torch.from_numpy(terminated)
        rollout.truncated[t] = torch.from_numpy(truncated)

        rollout.episode_return += rewards
        rollout.episode_length += ~rollout.ended
        rollout.ended = terminated | truncated
        for i in np.flatnonzero(rollout.ended):
            episodes.append((float(rollout.episode_return[i]), int(rollout.episode_length[i])))
            rollout.episode_return[i] = rollout.episode_length[i] = 0
    normalizer.merge_processes(before)
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
    deltas = rewards + gamma * values[1:] * alive - values[:-1]  # δ_t
    advantages = torch.empty_like(deltas)
    trace = torch.zeros_like(deltas[0])
    for t in reversed(range(len(rewards))):
        trace = deltas[t] + gamma * gae_lambda * traced[t] * trace  # A_t = δ_t + γλ A_{t+1}
        advantages[t] = trace
    return advantages, advantages + values[:-1]


class Batch(NamedTuple):
    """The transitions of one rollout, or of a minibatch; reset rows are left out. B rows."""

    obs: Tensor  # (B, O) normalised
    actions: Tensor  # (B, A) unclipped
    logprobs: Tensor  # (B,) when collected
    values: Tensor  # (B,) when collected
    advantages: Tensor  # (B,) of mean 0 and std 1 over the rollout
    returns: Tensor  # (B,)


@torch.no_grad()
def make_batch(rollout: Rollout, agent: ActorCritic, rewards: Tensor, config: Config) -> Batch:
    """Values in one pass, advantages and returns of `rewards` (T, N); reset rows dropped last."""
    values = agent.value(rollout.obs)  # (T + 1, N)
    advantages, returns = compute_gae(
        rewards, values, rollout.terminated, rollout.truncated, config.gamma, config.gae_lambda
    )
    rows = (rollout.obs[:-1], rollout.actions, rollout.logprobs, values[:-1], advantages, returns)
    batch = Batch(*(tensor[rollout.valid] for tensor in rows))
    advantages = batch.advantages - mean_over_processes(batch.advantages)
    std = mean_over_processes(advantages.square()).sqrt()
    return batch._replace(advantages=advantages / (std + 1e-8))


# ==== 6. Update ===================================================================================

Metrics = dict[str, float]  # names of CSV columns to values
LOSS_METRICS = ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction")


def ppo_loss(
    batch: Batch, logprobs: Tensor, entropy: Tensor, values: Tensor, config: Config
) -> tuple[Tensor, Tensor]:
    """The clipped objective (Schulman et al. 2017, equations 7 and 9) of rows `batch`.

    logprobs, entropy, values: (B,), of the networks as they are now. Returns the loss and,
    detached, LOSS_METRICS stacked.
    """
    log_ratio = logprobs - batch.logprobs
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - config.clip_eps, 1 + config.clip_eps)
    policy_loss = -torch.min(ratio * batch.advantages, clipped * batch.advantages).mean()
    value_loss = 0.5 * (values - batch.returns).square().mean()
    loss = policy_loss + config.value_coef * value_loss - config.entropy_coef * entropy.mean()
    with torch.no_grad():
        approx_kl = (ratio - 1 - log_ratio).mean()  # k3 of Schulman 2020, "Approximating KL"
        clip_fraction = ((ratio - 1).abs() > config.clip_eps).float().mean()
        metrics = torch.stack([policy_loss, value_loss, entropy.mean(), approx_kl, clip_fraction])
    return loss, metrics


def adapt_learning_rate(rate: Tensor, kl: Tensor, desired_kl: float) -> None:
    """Steer the KL of an update, in place and without a sync point (rsl_rl's rule).

    A KL of exactly zero is the first minibatch, where the policy is still the old one.
    """
    slower = (kl > 2 * desired_kl).to(rate.dtype)
    faster = ((kl < desired_kl / 2) & (kl > 0)).to(rate.dtype)
    rate.mul_(1.5 ** (faster - slower)).clamp_(1e-5, 1e-2)


def average_gradients(agent: ActorCritic, metrics: Tensor, rows: int) -> Tensor:
    """Gradients and `metrics` as means over the rows of all processes, in one flat all-reduce."""
    if not dist.is_initialized():
        return metrics
    parts = [*(p.grad.flatten() for p in agent.parameters()), metrics, metrics.new_ones(1)]
    flat = sum_over_processes(torch.cat(parts) * rows)
    *gradients, metrics, _ = (flat / flat[-1]).split([len(part) for part in parts])
    for parameter, gradient in zip(agent.parameters(), gradients, strict=True):
        parameter.grad.copy_(gradient.view_as(parameter))
    return metrics


def update(agent: ActorCritic, optimizer: Optimizer, batch: Batch, config: Config) -> Metrics:
    """Epochs of freshly shuffled minibatches; metrics averaged over all of them.

    The rows are split into `num_minibatches` near-equal parts, so that none is tiny and every
    process has as many.
    """
    rate = optimizer.param_groups[0]["lr"]  # a tensor: changing it needs no sync point
    history = []
    for _ in range(config.update_epochs):
        shuffled = torch.randperm(len(batch.obs), device=batch.obs.device)
        for rows in shuffled.tensor_split(config.num_minibatches):
            minibatch = Batch(*(tensor[rows] for tensor in batch))
            logprobs, entropy = agent.evaluate_actions(minibatch.obs, minibatch.actions)
            values = agent.value(minibatch.obs)
            loss, metrics = ppo_loss(minibatch, logprobs, entropy, values, config)
            optimizer.zero_grad()
            loss.backward()
            metrics = average_gradients(agent, metrics, len(rows))
            grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), config.max_grad_norm)
            if config.lr_schedule == "adaptive":
                adapt_learning_rate(rate, metrics[3], config.desired_kl)
            optimizer.step()
            history.append(torch.cat([metrics, grad_norm.view(1)]))
        epoch = torch.stack(history[-config.num_minibatches :])
        if config.target_kl is not None and epoch[:, 3].mean() > 1.5 * config.target_kl:
            break  # the test is a sync point, once an epoch
    averages = torch.stack(history).mean(0).tolist()  # sync point, once an update
    residual = (batch.returns - batch.values).var(correction=0)
    return dict(zip((*LOSS_METRICS, "grad_norm"), averages, strict=True)) | {
        "explained_variance": float(1 - residual / (batch.returns.var(correction=0) + 1e-8)),
        "action_std": float(agent.std.detach().mean()),
        "learning_rate": float(rate),
    }


def scheduled_rate(config: Config, step: int) -> float:
    """The learning rate at an absolute step of the whole run."""
    progress = min(step / config.total_timesteps, 1.0)
    shapes = {"linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return config.learning_rate * shapes.get(config.lr_schedule, 1.0)


# ==== 7. Evaluate =================================================================================

Act = Callable[[np.ndarray], np.ndarray]  # raw observations (B, O) to actions (B, A)


def evaluate(act: Act, config: Config, seeds: Sequence[int], together: int = 16) -> np.ndarray:
    """Raw returns and lengths, (2, episodes), of one deterministic episode for each seed.

    Episode k is reset with seeds[k], and every episode that is started counts, however many step
    together: to count the first to finish would favour falls. Touches no training state.
    """
    totals = np.zeros((2, len(seeds)))  # returns, lengths
    waiting, running = list(enumerate(seeds))[::-1], []
    while waiting or running:
        while waiting and len(running) < together:
            k, seed = waiting.pop()
            env = make_env(config)  # a new one: a Box2D world keeps traces of who walked before
            running.append((k, env, env.reset(seed=seed)[0]))
        actions = act(np.stack([obs for _, _, obs in running]))
        stepped, running = zip(running, actions, strict=True), []
        for (k, env, _), action in stepped:
            obs, reward, terminated, truncated, _ = env.step(action)
            totals[:, k] += reward, 1
            if terminated or truncated:
                env.close()
            else:
                running.append((k, env, obs))
    return totals


def play(act: Act, env: gym.Env, seeds: Sequence[int], seconds: float) -> Iterator[Any]:
    """Deterministic episodes, one for each seed; yields what `env.render()` gives at each state.

    Ends with the last episode, or after so many seconds of simulated time.
    """
    frames_left = seconds * env.metadata.get("render_fps", 30)
    for seed in seeds:
        obs, _ = env.reset(seed=seed)
        ended = False
        while frames_left > 0:
            yield env.render()
            frames_left -= 1
            if ended:
                break
            obs, _, terminated, truncated, _ = env.step(act(obs[None])[0])
            ended = terminated or truncated


# ==== 8. Checkpoint ===============================================================================


def resolve_device(name: str) -> torch.device:
    """The device of that name. UserError where this machine has none."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.mps.is_available()}
    name = ("cuda" if there["cuda"] else "cpu") if name == "auto" else name
    if not there[name]:
        raise UserError(f"--device {name}: there is none here, use --device cpu")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)


@dataclass
class Counters:
    """Where a run stands; plain numbers, saved with it."""

    step: int = 0
    iteration: int = 0
    wall_s: float = 0.0
    best_return: float | None = None
    best_step: int | None = None
    solved_step: int | None = None
    solved_wall_s: float | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str | Path) -> Counters:
        """UserError where these are no counters."""
        kinds, sign = typing.get_type_hints(cls), {"best_return": "(-inf, inf)"}
        fine = (
            k in values and _is_right(values[k], kinds[k], sign.get(k, "[0, inf)")) for k in kinds
        )
        if not all(fine) or len(values) > len(kinds):
            raise UserError(f"{source}: its counters are damaged")
        return cls(**values)


class Learner:
    """Everything that a checkpoint holds: networks, optimiser, normalisers and counters."""

    def __init__(self, config: Config) -> None:
        self.config, self.device = config, resolve_device(config.device)
        self.env = make_env(config)  # for its spaces; never stepped
        self.threshold = self.env.spec.reward_threshold
        self.dims = self.env.observation_space.shape[0], self.env.action_space.shape[0]
        self.agent = ActorCritic(*self.dims, config).to(self.device)
        if sum(p.numel() for p in self.agent.parameters()) < 100_000:
            torch.set_num_threads(1)  # small networks lose more to threads than they gain
        rate = torch.tensor(config.learning_rate, device=self.device)
        self.optimizer = torch.optim.Adam(self.agent.parameters(), rate, eps=1e-5, fused=True)
        self.obs_normalizer = ObservationNormalizer(self.dims[:1], config)
        self.reward_normalizer = RewardNormalizer(config)
        self.counters = Counters()
        self.saved_at = self.save_s = 0.0  # when last.pt was written, and how long a save takes
        self.started = time.perf_counter()  # as if the run had been in one piece

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """Raw observations (B, O) to deterministic actions (B, A) for the environments.

        What plays in evaluation and video: statistics frozen, actions clipped to their space.
        """
        actions = self.agent.mean_action(self.obs_normalizer.normalize(obs).to(self.device))
        space = self.env.action_space
        return np.clip(actions.cpu().numpy(), space.low, space.high)

    def save(self, name: str) -> None:
        """Write the checkpoint `name` below --out.

        Tensors and plain values only, so that loading them can run no code.
        """
        state = {
            "format": CHECKPOINT_FORMAT,
            "version": __version__,
            "config": plain_settings(self.config),
            "counters": dataclasses.asdict(self.counters),
        } | {part: getattr(self, part).state_dict() for part in LEARNED}
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
            self.counters = Counters.from_dict(state["counters"], source)
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
    made = ("dtype", "shape", "layout", "is_meta")
    least = 0 if name.endswith(("var", "count", "sq", "step", "lr")) else -math.inf
    if [getattr(value, k) for k in made] == [getattr(like, k) for k in made]:
        if value.isfinite().all() and (value >= least).all():
            return None
    return f"{name} is damaged, or of shape {tuple(value.shape)}, not {tuple(like.shape)}"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """TrainingError that names the file where it cannot be written."""
    try:
        yield
    except OSError as error:
        raise TrainingError(f"{path} cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to, moved into place once it is whole on the disk.

    TrainingError where that fails; what was there before stays.
    """
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    with writing(path):
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


POLICY = ("agent", "obs_normalizer")
LEARNED = (*POLICY, "optimizer", "reward_normalizer")


def load_checkpoint(path: str | Path, env: str | None = None) -> dict[str, Any]:
    """A checkpoint's state on the CPU. Runs no code from it; UserError where it cannot be used.

    torch.load sees only records whose checksum was right: by itself it does not look, and would
    load most flipped bits silently as other values. An environment of the form `module:EnvId` would
    be imported, so it must be given as `env`, by the user.
    """
    verified, data = io.BytesIO(), Path(path).read_bytes()
    try:
        with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = archive.infolist()
            size = sum(record.file_size for record in records)
            if size > len(data) or any(record.compress_type for record in records):
                raise ValueError("it would inflate: torch packs nothing")
            with zipfile.ZipFile(verified, "w") as copy:
                for record in records:
                    copy.writestr(record.filename, archive.read(record))  # checks the checksum
            verified.seek(0)
            state = torch.load(verified, "cpu", weights_only=True)
    except Exception:  # whatever a forged pickle makes of it
        raise UserError(f"{path} is no checkpoint, or a damaged one") from None
    state = state if isinstance(state, dict) else {}
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

CSV_COLUMNS = (
    "step,iteration,wall_s,steps_per_s,collect_s,update_s,eval_s,episodes,return_mean,return_min,"
    "return_max,length_mean,length_min,length_max,eval_return_mean,eval_return_std,eval_episodes,"
    "policy_loss,value_loss,entropy,approx_kl,clip_fraction,explained_variance,action_std,"
    "grad_norm,learning_rate"
).split(",")


# A run writes these files and step_N.pt below --out, and no others.
BEST, LAST = "checkpoints_walker/best.pt", "checkpoints_walker/last.pt"
METRICS, CONFIG = "checkpoints_walker/metrics.csv", "checkpoints_walker/config.json"
FILM, CURVES = "videos/walker_final.mp4", "plots/training_curves.png"


def make_folders(*folders: Path) -> None:
    """UserError, before any is made, where one cannot be made or written to."""
    blocked = [folder for folder in folders if folder.exists() and not folder.is_dir()]
    try:
        for folder in blocked or folders:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"--out cannot be written to: {error}") from None


def claim_folder(out: Path, resume: str | Path | None, overwrite: bool) -> FileLock:
    """Make the folders of a run and lock them, as long as this process lives.

    UserError where they hold another run, one is running in them, or they cannot be written to.
    """
    own = resume is not None and Path(resume).resolve().parent == (out / LAST).resolve().parent
    if not (own or overwrite) and any((out / name).exists() for name in (BEST, LAST, METRICS)):
        choices = "go on with --resume, choose another folder with --out, or --overwrite it"
        raise UserError(f"{(out / LAST).parent} holds a run: {choices}")
    make_folders(*((out / name).parent for name in (LAST, FILM, CURVES)))
    lock = FileLock((out / LAST).with_name(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{(out / LAST).parent} is in use by a run that is still going") from None
    for folder in {(out / name).parent for name in (LAST, FILM, CURVES)}:
        for path in folder.glob(".*.tmp.*"):  # half-written by a run that was killed
            path.unlink()
    if overwrite:
        gif = (out / FILM).with_suffix(".gif")
        steps = [p for p in (out / LAST).parent.glob("step_*.pt") if p.stem[5:].isdecimal()]
        for path in [*(out / n for n in (BEST, LAST, METRICS, CONFIG, FILM, CURVES)), gif, *steps]:
            path.unlink(missing_ok=True)
    return lock


class RunLog:
    """metrics.csv, the progress bar on a terminal, and plain lines everywhere."""

    def __init__(self, path: Path, config: Config, counters: Counters) -> None:
        from tqdm import tqdm

        whole = path.read_text().rpartition("\n")[0] if path.exists() else ""  # no torn last line
        rows = whole.splitlines()[1:]
        if any(not row.split(",")[0].isdecimal() for row in rows):
            raise UserError(f"{path} is damaged: a row has no step; mend it, or remove it")
        rows = [row for row in rows if int(row.split(",")[0]) <= counters.step]
        with atomic_path(path) as temporary:
            temporary.write_text("\n".join([",".join(CSV_COLUMNS), *rows, ""]))
        self.path, self.file, self.said_at = path, open(path, "a"), time.monotonic()
        total = config.num_iterations * config.batch_size * process()[1]
        how = {"unit": " steps", "unit_scale": True, "disable": None}  # None: but on a terminal
        self.bar = tqdm(total=total, initial=counters.step, **how)

    def row(self, row: dict[str, Any]) -> None:
        """Append a row, flushed; a column that is not given stays empty. Show where the run is."""
        cells = (row.get(name) for name in CSV_COLUMNS)
        cells = (f"{x:.6g}" if isinstance(x, float) else "" if x is None else str(x) for x in cells)
        with writing(self.path):
            self.file.write(",".join(cells) + "\n")
            self.file.flush()
        shown = {"return": row.get("return_mean"), "best": row["best_return"]}
        text = ", ".join(f"{k} {'–' if v is None else f'{v:.1f}'}" for k, v in shown.items())
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(row["step"] - self.bar.n)
        if self.bar.disable and time.monotonic() - self.said_at > 10:  # no terminal: plain lines
            text += f", {row['steps_per_s']:,.0f} steps/s, {row['wall_s'] / 60:.1f} min"
            self.say(f"step {row['step']:,} of {self.bar.total:,}: {text}")

    def say(self, text: str) -> None:
        self.bar.write(text)
        sys.stdout.flush()
        self.said_at = time.monotonic()

    def close(self) -> None:
        self.bar.close()
        with writing(self.path):  # what could not be flushed is tried again
            self.file.close()


def write_config(config: Config, threshold: float | None, path: Path) -> None:
    """Every setting as JSON, to be run again by --config; `_about` is for readers and plots."""
    versions = {"walker": __version__, "torch": torch.__version__, "gymnasium": gym.__version__}
    about = {"_about": {"reward_threshold": threshold, "versions": versions}}
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(plain_settings(config) | about, indent=2) + "\n")


def record_episode(act: Act, config: Config, seed: int, mp4: Path, seconds: float) -> None:
    """Film one deterministic episode, headless: H.264 in yuv420p, and a GIF of at most 3 MB.

    UserError where the environment cannot render.
    """
    import imageio

    env = make_env(config, "rgb_array")
    fps = env.metadata.get("render_fps", 30)
    h264 = {"codec": "libx264", "pixelformat": "yuv420p", "macro_block_size": 2}  # keeps even sizes
    with contextlib.closing(env), atomic_path(mp4) as temporary:
        with imageio.get_writer(temporary, fps=fps, **h264) as video:
            for frame in play(act, env, [seed], seconds):
                if frame is None:
                    raise UserError(f"--env {config.env} renders nothing")
                video.append_data(frame)
        _write_gif(temporary, fps, mp4.with_suffix(".gif"))


def _write_gif(mp4: Path, fps: float, gif: Path, limit: int = 3_000_000) -> None:
    """The film at half its size, in fewer frames until it is small enough, at the true speed."""
    from imageio_ffmpeg import get_ffmpeg_exe

    colours = "split[a][b];[a]palettegen=64[p];[b][p]paletteuse=dither=none"
    for stride in (2, 3, 4, 6, 8, 12, 24):
        with atomic_path(gif) as temporary:
            filters = ["-vf", f"fps={fps / stride},scale=iw/2:-1:flags=area,{colours}", temporary]
            command = [get_ffmpeg_exe(), "-v", "quiet", "-y", "-i", mp4, *filters]
            if subprocess.run(command, stdin=subprocess.DEVNULL).returncode != 0:
                raise OSError("the encoder failed; is the disk full?")  # it says nothing itself
            if temporary.stat().st_size <= limit:
                return


class StopSignals:
    """While entered, a SIGINT or SIGTERM is noted in `received`; one more a second later leaves.

    One keypress can arrive twice: from the terminal, and from a launcher that passes it on.
    """

    received: int | None = None

    def __enter__(self) -> StopSignals:
        in_main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if in_main else ()
        self.replaced = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def _note(self, number: int, _frame: Any) -> None:
        if self.received is None:
            self.received, self.noted_at = number, time.monotonic()
            os.write(2, b"\nstopping after this iteration; once more to leave at once\n")
        elif time.monotonic() > self.noted_at + 1:
            os._exit(128 + number)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.replaced.items():
            signal.signal(number, handler or signal.SIG_DFL)


# ==== 10. Train ===================================================================================

# What --resume may change: nothing that the learner sees.
RESUMABLE = """total_timesteps device vector_env step_timeout out
eval_every eval_episodes checkpoint_every stop_when_solved""".split()


def prepare_learner(config: Config, resume: str | Path | None) -> Learner:
    """A new learner, or one that goes on from `resume`. Writes nothing."""
    seed_everything(config.seed, rank=0, step=0)  # the same networks in every process
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA
    learner = Learner(config)
    if resume is not None:
        state = load_checkpoint(resume, config.env)
        saved = config_from_dict(state["config"], str(resume))
        for field in dataclasses.fields(Config):
            new, old = getattr(config, field.name), getattr(saved, field.name)
            if new != old and field.name not in RESUMABLE:
                flag = field.name.replace("_", "-")
                raise UserError(f"--{flag} is {new!r}, but {resume} was trained with {old!r}")
        learner.load(state, resume, LEARNED)
        learner.started -= learner.counters.wall_s
        best = Path(config.out, BEST)  # it may be newer than the checkpoint
        found = Counters()
        if best.exists():
            found = Counters.from_dict(load_checkpoint(best, config.env)["counters"], best)
        for name in ("best_return", "best_step"):
            setattr(learner.counters, name, getattr(found, name))
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
    if is_best:
        counters.best_return, counters.best_step = float(returns.mean()), counters.step
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


def episode_columns(episodes: list[tuple[float, int]]) -> Metrics:
    """Raw returns and lengths of the episodes that ended in an iteration."""
    columns: Metrics = {"episodes": len(episodes)}
    for name, values in zip(("return", "length"), zip(*episodes, strict=True), strict=False):
        columns[f"{name}_mean"] = float(np.mean(values))
        columns[f"{name}_min"], columns[f"{name}_max"] = min(values), max(values)
    return columns


def export(learner: Learner, log: RunLog, film: bool) -> None:
    """Film the best policy there is, and plot the curves."""
    import viz

    out, config = Path(learner.config.out), learner.config
    if (out / BEST).exists():
        learner.load(load_checkpoint(out / BEST, config.env), out / BEST, POLICY)
    try:
        if film:
            [seed] = env_seeds(config.seed, VIDEO, 1)
            record_episode(learner.act, config, seed, out / FILM, math.inf)
            log.say(f"video: {out / FILM}, and a GIF beside it")
    except (UserError, gym.error.Error, NotImplementedError) as error:
        log.say(f"no video: {error}")
    with writing(out / CURVES):
        viz.plot_training_curves(out / METRICS, out / CURVES, learner.threshold)
    log.say(f"curves: {out / CURVES}")


def summary(counters: Counters) -> str:
    text = f"{counters.step:,} steps in {counters.wall_s / 60:.1f} min"
    if counters.best_return is not None:
        text += f", best evaluation {counters.best_return:.1f} at step {counters.best_step:,}"
    if counters.solved_step is not None:
        text += f", solved at step {counters.solved_step:,} ({counters.solved_wall_s / 60:.1f} min)"
    return text


def train(
    config: Config, resume: str | Path | None = None, overwrite: bool = False
) -> tuple[Counters, int | None]:
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
            log = stack.enter_context(contextlib.closing(RunLog(out / METRICS, config, counters)))
        rollout = Rollout(config, normalizer.normalize(obs).to(learner.device), learner.dims[1])

        while not any_process(learner.is_done() or stop.received is not None):
            # set the learning rate and the random numbers, by the absolute step
            began = time.perf_counter()
            seed_everything(config.seed, rank, counters.step)
            if config.lr_schedule != "adaptive":
                learner.optimizer.param_groups[0]["lr"].fill_(scheduled_rate(config, counters.step))

            # collect a rollout
            try:
                episodes = collect_rollout(envs, agent, normalizer, rollout)
            except EnvironmentFailure:
                if rank == 0:
                    learner.save(LAST)
                raise
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

        if rank == 0:
            learner.save(LAST)
            log.say(summary(counters))
            export(learner, log, film=stop.received != signal.SIGTERM)
        any_process(False)  # a launcher ends all when one ends: not before the film is done
    return counters, stop.received


def load_learner(checkpoint: str, env: str | None, seed: int, device: str, out: str) -> Learner:
    """A trained policy with its statistics. UserError where it is none, or does not fit `env`."""
    state = load_checkpoint(checkpoint, env)
    config = config_from_dict(state["config"], checkpoint)
    changes = {} if env in (None, config.env) else {"env": env, "env_kwargs": ()}
    learner = Learner(dataclasses.replace(config, seed=seed, device=device, out=out, **changes))
    learner.load(state, checkpoint, POLICY)
    return learner


def show(act: Act, config: Config, seeds: Sequence[int], seconds: float) -> None:
    """Play episodes in a window for `seconds` of simulated time, one after another."""
    with contextlib.closing(make_env(config, "human")) as env:
        for _ in play(act, env, seeds, seconds):
            pass  # the window shows each step by itself
