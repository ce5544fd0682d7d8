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
import csv
import dataclasses
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import signal
import sys
import tempfile
import threading
import time
import types
import typing
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from torch import Tensor, nn
from torch.nn import functional as F

__version__ = "0.1.0"
CHECKPOINT_FORMAT = 1  # raised when a checkpoint's contents change their meaning


class UserError(ValueError):
    """A mistake in what was asked for: shown as one line, exit code 2."""


class TrainingError(RuntimeError):
    """Training cannot go on, though it was asked for correctly: shown as one line, exit code 1."""


# ==== 1. Config ===================================================================================

Device = Literal["auto", "cpu", "cuda", "mps"]
Backend = Literal["sync", "async", "envpool"]
Schedule = Literal["constant", "linear", "cosine", "adaptive"]
ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU, "silu": nn.SiLU}


@dataclass(frozen=True)
class Config:
    """Settings of one run; each is also a flag of `walker.py`. Validated once, on creation.

    Raises UserError that names the field, its value and what would be right.
    """

    env: str = "BipedalWalker-v3"  # Gymnasium id; `module:EnvId` imports the module first
    env_kwargs: tuple[str, ...] = ()  # arguments of the environment, each as KEY=VALUE
    total_timesteps: int = 1_000_000  # environment steps of the whole run
    seed: int = 1  # of networks, sampling and every environment
    device: Device = "auto"  # auto: cuda where present, else cpu
    out: str = "."  # folder in which checkpoints_walker/, videos/ and plots/ are made
    init_from: str | None = None  # start from this checkpoint's weights and observation statistics

    vector_env: Backend = "sync"  # how the environments are stepped
    num_envs: int = 8  # environments stepped together (N)
    rollout_steps: int = 256  # steps of each environment between two updates (T)
    norm_obs: bool = True  # normalise observations by their running mean and variance
    norm_reward: bool = True  # divide rewards by the running std of the discounted return
    clip_obs: float = 10.0  # clip normalised observations to ± this
    clip_reward: tuple[float, float] = (-10.0, 10.0)  # clip normalised rewards to LOW HIGH

    actor_hidden: tuple[int, ...] = (64, 64)  # hidden layer sizes of the policy
    critic_hidden: tuple[int, ...] = (64, 64)  # hidden layer sizes of the value function
    activation: Literal["tanh", "relu", "elu", "silu"] = "tanh"  # of the hidden layers
    layer_norm: bool = False  # LayerNorm before each activation
    init_std: float = 1.0  # initial standard deviation of the actions

    learning_rate: float = 3e-4  # of Adam; where the schedule starts
    lr_schedule: Schedule = "linear"  # adaptive: by KL
    desired_kl: float = 0.01  # KL per update that the adaptive schedule steers to
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # λ of generalised advantage estimation
    clip_eps: float = 0.2  # the probability ratio is clipped to 1 ± this
    entropy_coef: float = 0.0  # weight of the entropy bonus
    value_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # the gradient's norm is clipped to this
    update_epochs: int = 5  # passes over each rollout
    minibatch_size: int = 256  # rows of one gradient step (B)
    target_kl: float | None = None  # end an update after an epoch whose KL exceeds 1.5 × this

    eval_every: int = 100_000  # steps between evaluations; 0: never
    eval_episodes: int = 10  # episodes of each periodic evaluation
    checkpoint_every: int = 0  # steps between kept step_N.pt files; 0: none are kept
    stop_when_solved: bool = False  # end the run once 100 fresh episodes confirm the threshold

    def __post_init__(self) -> None:
        for names, is_right, right in RULES:
            for name in names.split():
                try:
                    ok = is_right(getattr(self, name))
                except (TypeError, AttributeError):  # a value of another type
                    ok = False
                self._check(name, ok, right)
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
        """Steps of one iteration, T × N."""
        return self.num_envs * self.rollout_steps

    @property
    def num_iterations(self) -> int:
        return math.ceil(self.total_timesteps / self.batch_size)

    @property
    def num_minibatches(self) -> int:
        return self.batch_size // self.minibatch_size

    @property
    def env_options(self) -> dict[str, Any]:
        """`env_kwargs` as keyword arguments: Python literals where they parse, else strings."""
        options = {}
        for option in self.env_kwargs:
            key, _, value = option.partition("=")
            try:
                options[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                options[key] = value
        return options


RULES = [  # every field once: names, whether a value is right, and what would be
    ("env out", lambda v: v.strip() != "", "a name, not empty"),
    ("env_kwargs", lambda v: all("=" in option for option in v), "KEY=VALUE, each"),
    ("init_from", lambda v: v is None or v.strip() != "", "a checkpoint file"),
    ("num_envs total_timesteps", lambda v: _whole(v, 1), "a whole number, at least 1"),
    ("update_epochs eval_episodes", lambda v: _whole(v, 1), "a whole number, at least 1"),
    ("rollout_steps minibatch_size", lambda v: _whole(v, 2), "a whole number, at least 2"),
    ("eval_every checkpoint_every", lambda v: _whole(v, 0), "a whole number; 0: never"),
    ("seed", lambda v: _whole(v, 0) and v < 2**32, "a whole number from 0 to 4294967295"),
    ("actor_hidden critic_hidden", lambda v: all(_whole(n, 1) for n in v) and v, "sizes, each ≥ 1"),
    ("gamma gae_lambda", lambda v: _real(v) and 0 <= v <= 1, "from 0 to 1"),
    ("entropy_coef value_coef", lambda v: _real(v) and v >= 0, "a finite number, 0 or more"),
    ("init_std", lambda v: _real(v) and 1e-3 <= v <= 10, "from 0.001 to 10"),
    ("clip_obs learning_rate", lambda v: _real(v) and v > 0, "a finite number above 0"),
    ("desired_kl clip_eps max_grad_norm", lambda v: _real(v) and v > 0, "a finite number above 0"),
    ("target_kl", lambda v: v is None or (_real(v) and v > 0), "a finite number above 0, or None"),
    (
        "clip_reward",
        lambda v: [*map(_real, v)] == [True, True] and v[0] < v[1],
        "finite LOW HIGH, LOW < HIGH",
    ),
    ("norm_obs norm_reward", lambda v: type(v) is bool, "true or false"),
    ("layer_norm stop_when_solved", lambda v: type(v) is bool, "true or false"),
    ("device", lambda v: v in typing.get_args(Device), f"of {typing.get_args(Device)}"),
    ("vector_env", lambda v: v in typing.get_args(Backend), f"of {typing.get_args(Backend)}"),
    ("lr_schedule", lambda v: v in typing.get_args(Schedule), f"of {typing.get_args(Schedule)}"),
    ("activation", lambda v: v in ACTIVATIONS, f"of {tuple(ACTIVATIONS)}"),
]

# Only what differs from the defaults above; tests/benchmarks/TUNING.md has what was tried.
PRESETS: dict[str, dict[str, Any]] = {
    "BipedalWalker-v3": {
        "total_timesteps": 3_000_000,
        "num_envs": 64,
        "learning_rate": 1.5e-3,
        "gamma": 0.995,
        "init_std": 0.7,
        "update_epochs": 10,
        "minibatch_size": 2048,
    }
}
PRESETS["BipedalWalkerHardcore-v3"] = PRESETS["BipedalWalker-v3"] | {"total_timesteps": 20_000_000}


def _whole(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def _real(value: Any) -> bool:
    return type(value) is int or (isinstance(value, float) and math.isfinite(value))


def plain_settings(config: Config) -> dict[str, Any]:
    """What a config.json and a checkpoint hold: all settings but `out`, which is where they lie."""
    return {k: v for k, v in dataclasses.asdict(config).items() if k != "out"}


def config_from_dict(settings: dict[str, Any], source: str | Path) -> Config:
    """Config from plain values as JSON or a checkpoint holds them. UserError names `source`."""
    unknown = set(settings) - {field.name for field in dataclasses.fields(Config)} - {"_about"}
    if unknown:
        raise UserError(f"{source}: unknown setting {min(unknown)!r}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    values.pop("_about", None)
    try:
        return Config.for_env(values.pop("env", Config.env), **values)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def read_file(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


# ==== 2. Environments =============================================================================

TRAIN, EVALUATE, CONFIRM, VIDEO, TEST = range(5)  # streams of environment seeds


def env_seeds(seed: int, stream: int, count: int, rank: int = 0, step: int = 0) -> list[int]:
    """`count` seeds of one stream; the first k are the same whatever `count` is.

    Consecutive integers would make runs with seeds 1 and 2 share all worlds but one.
    """
    entropy = np.random.SeedSequence([seed, stream, rank, step])
    return [int(word) >> 1 for word in entropy.generate_state(count)]  # 31 bits: EnvPool's limit


def make_env(config: Config, render_mode: str | None = None) -> gym.Env:
    """One environment of the run. UserError where Gymnasium cannot make it or PPO cannot use it."""
    options = config.env_options | ({"render_mode": render_mode} if render_mode else {})
    try:
        with warnings.catch_warnings(action="ignore"):  # what is wrong is said below, in one line
            env = gym.make(config.env, disable_env_checker=True, **options)
    except (gym.error.Error, ImportError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--env {config.env} cannot be made: {reason}") from error
    if render_mode and render_mode not in env.metadata.get("render_modes", ()):
        raise UserError(f"--env {config.env} cannot render")
    obs, action = env.observation_space, env.action_space
    for space, what in ((obs, "observation"), (action, "action")):
        is_vector = isinstance(space, gym.spaces.Box) and len(space.shape) == 1
        if not is_vector or not np.issubdtype(space.dtype, np.floating):
            raise UserError(f"--env {config.env}: its {what} space must be a float vector (Box)")
    return env


def _worker_env(config: Config) -> gym.Env:
    """An environment in an AsyncVectorEnv: a Ctrl-C is for the main process, not its workers."""
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return make_env(config)


def make_vector_env(config: Config, seeds: Sequence[int]) -> tuple[VectorEnv, np.ndarray]:
    """N environments with NEXT_STEP autoreset, and their first observations (N, O).

    The row after an episode's end ignores its action, has reward 0 and is no transition.
    """
    if config.vector_env == "envpool":
        envs = _make_envpool(config, seeds)
        return envs, envs.reset()[0]  # its seeds were given when it was made
    make = [functools.partial(_worker_env, config)] * config.num_envs
    vector = SyncVectorEnv if config.vector_env == "sync" else AsyncVectorEnv
    envs = vector(make, autoreset_mode=AutoresetMode.NEXT_STEP)
    return envs, envs.reset(seed=seeds)[0]


def _make_envpool(config: Config, seeds: Sequence[int]) -> VectorEnv:
    try:
        import envpool
    except ImportError as error:
        raise UserError("--vector-env envpool needs `pip install envpool`") from error
    if config.env not in envpool.list_all_envs():
        raise UserError(f"--vector-env envpool has no {config.env}: use sync or async")
    settings = {"num_envs": config.num_envs, "seed": list(seeds), "num_threads": os.cpu_count()}
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
        rows = len(batch)
        if rows == 0:
            return
        batch = batch.to(torch.float64)
        total = self.count + rows
        delta = batch.mean(0) - self.mean
        squares = self.var * self.count + batch.var(0, correction=0) * rows
        self.var.copy_((squares + delta**2 * self.count * rows / total) / total)
        self.mean += delta * rows / total
        self.count.copy_(total)


class ObservationNormalizer(RunningMeanStd):
    """Observations by their running mean and variance, clipped. Lives on the CPU, as they do."""

    def __init__(self, shape: tuple[int, ...], config: Config) -> None:
        super().__init__(shape)
        self.enabled, self.clip = config.norm_obs, config.clip_obs

    def normalize(self, obs: np.ndarray) -> Tensor:
        """(B, *shape) raw to (B, *shape) float32, by the statistics as they stand."""
        obs = torch.as_tensor(obs)
        if not self.enabled:
            return obs.float()
        scaled = (obs - self.mean) / torch.sqrt(self.var + 1e-8)
        return scaled.clamp_(-self.clip, self.clip).float()

    def update_and_normalize(self, obs: np.ndarray) -> Tensor:
        if self.enabled:
            self.update(torch.as_tensor(obs))
        return self.normalize(obs)


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
        self.update(discounted[valid])
        scale = torch.sqrt(self.var + 1e-8).to(rewards.dtype)
        return (rewards / scale).clamp_(*self.clip).to(device)


# ==== 3. Networks =================================================================================


def mlp(sizes: Sequence[int], config: Config, out_gain: float) -> nn.Sequential:
    """Linear layers with activations between; orthogonal weights, zero biases.

    Gains √2 inside and `out_gain` last: Andrychowicz et al. 2021, "What Matters In On-Policy RL".
    """
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        last = i == len(sizes) - 2
        linear = nn.Linear(inputs, outputs)
        nn.init.orthogonal_(linear.weight, out_gain if last else math.sqrt(2))
        nn.init.zeros_(linear.bias)
        layers.append(linear)
        if not last:
            layers += [nn.LayerNorm(outputs)] if config.layer_norm else []
            layers.append(ACTIVATIONS[config.activation]())
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

    def __init__(self, config: Config, first_obs: Tensor, action_dim: int) -> None:
        T, N = config.rollout_steps, config.num_envs
        self.obs = first_obs.new_zeros(T + 1, *first_obs.shape)  # row t + 1 is what step t returned
        self.obs[-1] = first_obs  # (N, O) normalised
        self.actions = first_obs.new_zeros(T, N, action_dim)  # unclipped
        self.logprobs = first_obs.new_zeros(T, N)
        self.rewards = first_obs.new_zeros(T, N)  # raw
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
    episodes = []
    rollout.obs[0] = rollout.obs[-1]
    for t in range(len(rollout.rewards)):
        rollout.valid[t] = torch.from_numpy(~rollout.ended)
        rollout.actions[t], rollout.logprobs[t] = agent.act(rollout.obs[t])
        actions = rollout.actions[t].cpu().numpy()  # sync point: the environments are on the CPU
        obs, rewards, terminated, truncated, _ = envs.step(np.clip(actions, low, high))
        rollout.obs[t + 1] = normalizer.update_and_normalize(obs)
        rollout.rewards[t] = torch.from_numpy(rewards)
        rollout.terminated[t] = torch.from_numpy(terminated)
        rollout.truncated[t] = torch.from_numpy(truncated)

        rollout.episode_return += rewards
        rollout.episode_length += ~rollout.ended
        rollout.ended = terminated | truncated
        for i in np.flatnonzero(rollout.ended):
            episodes.append((float(rollout.episode_return[i]), int(rollout.episode_length[i])))
            rollout.episode_return[i] = rollout.episode_length[i] = 0
    return episodes


# ==== 5. Advantages ===============================================================================


def compute_gae(
    rewards: Tensor,
    values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, equation 16) under two endings.

    rewards, terminated, truncated: (T, N); values: (T + 1, N), where values[t + 1] is the value of
    the observation that step t returned: the true last one where an episode ended. Termination
    stops the bootstrap; either ending stops the λ-trace. Returns advantages and returns, (T, N);
    on reset rows they are unspecified.
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
    advantages = batch.advantages - batch.advantages.mean()
    return batch._replace(advantages=advantages / (advantages.std(correction=0) + 1e-8))


# ==== 6. Update ===================================================================================

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


def update(
    agent: ActorCritic, optimizer: torch.optim.Optimizer, batch: Batch, config: Config
) -> dict[str, float]:
    """Epochs of freshly shuffled minibatches; metrics averaged over all of them.

    The rows are split into `num_minibatches` near-equal parts, so that none is tiny.
    """
    rate = optimizer.param_groups[0]["lr"]  # a tensor: changing it needs no sync point
    history = []
    for _ in range(config.update_epochs):
        shuffled = torch.randperm(len(batch.obs), device=batch.obs.device)
        for rows in shuffled.tensor_split(min(config.num_minibatches, len(shuffled))):
            minibatch = Batch(*(tensor[rows] for tensor in batch))
            logprobs, entropy = agent.evaluate_actions(minibatch.obs, minibatch.actions)
            values = agent.value(minibatch.obs)
            loss, metrics = ppo_loss(minibatch, logprobs, entropy, values, config)
            optimizer.zero_grad()
            loss.backward()
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


def evaluate(
    act: Act, config: Config, seeds: Sequence[int], together: int = 16
) -> tuple[np.ndarray, np.ndarray]:
    """Raw returns and lengths of exactly one deterministic episode for each seed.

    Episode k is reset with seeds[k], and every episode that is started counts, however many step
    together: to count the first to finish would favour falls. Touches no training state.
    """
    returns, lengths = np.zeros(len(seeds)), np.zeros(len(seeds), dtype=np.int64)
    waiting = iter(range(len(seeds)))
    running = []
    while True:
        for k in itertools.islice(waiting, together - len(running)):
            env = make_env(config)  # a new one: a Box2D world keeps traces of who walked before
            running.append((env, k, env.reset(seed=seeds[k])[0]))
        if not running:
            return returns, lengths
        actions = act(np.stack([obs for _, _, obs in running]))
        still_running = []
        for (env, k, _), action in zip(running, actions, strict=True):
            obs, reward, terminated, truncated, _ = env.step(action)
            returns[k] += reward
            lengths[k] += 1
            if terminated or truncated:
                env.close()
            else:
                still_running.append((env, k, obs))
        running = still_running


def play(
    act: Act, env: gym.Env, seeds: Sequence[int], seconds: float = math.inf
) -> Iterator[np.ndarray | None]:
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
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "cpu"
    if not {"cpu": True, "cuda": cuda, "mps": mps}[name]:
        raise UserError(f"--device {name}: there is none here, use --device cpu")
    return torch.device(name)


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
        cuda = torch.cuda.get_rng_state_all() if self.device.type == "cuda" else []
        state = {
            "format": CHECKPOINT_FORMAT,
            "version": __version__,
            "config": plain_settings(self.config),
            "counters": dataclasses.asdict(self.counters),
            "agent": self.agent.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "obs_normalizer": self.obs_normalizer.state_dict(),
            "reward_normalizer": self.reward_normalizer.state_dict(),
            "rng": {"cpu": torch.get_rng_state(), "cuda": cuda},
        }
        began, data = time.perf_counter(), io.BytesIO()
        torch.save(state, data)  # by itself it makes a RuntimeError of a full disk
        with atomic_path(Path(self.config.out) / name) as temporary:
            temporary.write_bytes(data.getvalue())
        self.save_s = time.perf_counter() - began

    def load_policy(self, state: dict[str, Any], source: str | Path) -> None:
        """Weights and observation statistics. UserError where they do not fit."""
        try:
            self.agent.load_state_dict(state["agent"])
            self.obs_normalizer.load_state_dict(state["obs_normalizer"])
        except (RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split()).split(": ", 1)[-1]
            raise UserError(f"{source} does not fit this network: {reason}") from None

    def load(self, state: dict[str, Any], source: str | Path) -> None:
        """Everything, to go on as if the run had not stopped."""
        self.load_policy(state, source)
        self.optimizer.load_state_dict(state["optimizer"])
        self.reward_normalizer.load_state_dict(state["reward_normalizer"])
        self.counters = Counters(**state["counters"])
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and state["rng"]["cuda"]:
            torch.cuda.set_rng_state_all(state["rng"]["cuda"])


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to, moved into place once it is whole on the disk."""
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


PARTS = ("config", "counters", "agent", "optimizer", "obs_normalizer", "reward_normalizer", "rng")
_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, OverflowError)
DAMAGE = (*_BROKEN, pickle.UnpicklingError, RuntimeError, ValueError)  # what a damaged file raises


def load_checkpoint(path: str | Path, env: str | None = None) -> dict[str, Any]:
    """A checkpoint's state on the CPU. Runs no code from it; UserError where it cannot be used.

    torch.load sees only records whose checksum was right: by itself it does not look, and would
    load most flipped bits silently as other values. An environment of the form `module:EnvId` would
    be imported, so it must be given as `env`, by the user.
    """
    verified, data = io.BytesIO(), io.BytesIO(read_file(path))
    try:
        with zipfile.ZipFile(data) as archive, zipfile.ZipFile(verified, "w") as copy:
            for record in archive.infolist():
                copy.writestr(record.filename, archive.read(record))  # checks the checksum
        verified.seek(0)
        state = torch.load(verified, "cpu", weights_only=True)
    except DAMAGE:
        raise UserError(f"{path} is no checkpoint, or a damaged one") from None
    if not isinstance(state, dict) or "format" not in state:
        raise UserError(f"{path} is no checkpoint of this program")
    if state["format"] != CHECKPOINT_FORMAT:
        theirs = f"its format is {state['format']}, this program's is {CHECKPOINT_FORMAT}"
        raise UserError(f"{path} was written by version {state.get('version')}: {theirs}")
    if not all(isinstance(state.get(part), dict) for part in PARTS):
        raise UserError(f"{path} is no checkpoint of this program: a part of it is missing")
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
    """UserError, before any is made, where they cannot be written to."""
    blocked = [folder for folder in folders if folder.exists() and not folder.is_dir()]
    try:
        for folder in blocked or folders:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"--out: cannot write to {folder}: {error.strerror}") from None


def claim_folder(out: Path, resume: str | Path | None, overwrite: bool) -> None:
    """Make the folders of a run. UserError where they hold another, or cannot be written to."""
    own = resume is not None and Path(resume).resolve().parent == (out / LAST).resolve().parent
    if not (own or overwrite) and any((out / name).exists() for name in (BEST, LAST, METRICS)):
        choices = "go on with --resume, choose another folder with --out, or --overwrite it"
        raise UserError(f"{(out / LAST).parent} holds a run: {choices}")
    make_folders(*((out / name).parent for name in (LAST, FILM, CURVES)))
    if overwrite:
        gif = (out / FILM).with_suffix(".gif")
        steps = [p for p in (out / LAST).parent.glob("step_*.pt") if p.stem[5:].isdecimal()]
        for path in [*(out / n for n in (BEST, LAST, METRICS, CONFIG, FILM, CURVES)), gif, *steps]:
            path.unlink(missing_ok=True)


class RunLog:
    """metrics.csv, the progress bar on a terminal, and plain lines everywhere."""

    def __init__(self, path: Path, config: Config, step: int) -> None:
        from tqdm import tqdm

        whole = path.read_text().rpartition("\n")[0] if path.exists() else ""  # no torn last line
        rows = [line for line in whole.splitlines()[1:] if int(line.split(",")[0]) <= step]
        with atomic_path(path) as temporary:
            temporary.write_text("\n".join([",".join(CSV_COLUMNS), *rows, ""]))
        self.file = open(path, "a", newline="")
        self.writer = csv.DictWriter(
            self.file, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n"
        )
        total = config.num_iterations * config.batch_size
        self.bar = tqdm(total=total, initial=step, unit=" steps", unit_scale=True, disable=None)
        self.said_at = time.monotonic()

    def row(self, row: dict[str, Any]) -> None:
        """Append a row, flushed; a column that is not given stays empty. Show where the run is."""
        self.writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        self.file.flush()
        shown = {"return": row.get("return_mean"), "best": row["best_return"]}
        text = ", ".join(f"{k} {'–' if v is None else f'{v:.1f}'}" for k, v in shown.items())
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(row["step"] - self.bar.n)
        if self.bar.disable and time.monotonic() - self.said_at > 10:  # no terminal: plain lines
            left = (self.bar.total - row["step"]) / row["steps_per_s"] / 60
            text += f", {row['steps_per_s']:,.0f} steps/s, {left:.1f} min left"
            self.say(f"step {row['step']:,} of {self.bar.total:,}: {text}")

    def say(self, text: str) -> None:
        self.bar.write(text)
        sys.stdout.flush()
        self.said_at = time.monotonic()

    def close(self) -> None:
        self.bar.close()
        self.file.close()


def write_config(config: Config, threshold: float | None, path: Path) -> None:
    """Every setting as JSON, to be run again by --config; `_about` is for readers and plots."""
    versions = {"walker": __version__, "torch": torch.__version__, "gymnasium": gym.__version__}
    about = {"reward_threshold": threshold, "versions": versions}
    text = json.dumps(plain_settings(config) | {"_about": about}, indent=2)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n")


def record_episode(
    act: Act, config: Config, seed: int, mp4: Path, seconds: float = math.inf
) -> None:
    """Film one deterministic episode, headless: H.264 in yuv420p, and a GIF of at most 3 MB.

    UserError where the environment cannot render.
    """
    import imageio
    from PIL import Image

    env = make_env(config, "rgb_array")
    fps = env.metadata.get("render_fps", 30)
    h264 = {"codec": "libx264", "pixelformat": "yuv420p", "macro_block_size": 2}  # keeps even sizes
    small = []  # every second frame, half size, for the GIF
    with contextlib.closing(env), atomic_path(mp4) as temporary:
        with imageio.get_writer(temporary, fps=fps, **h264) as video:
            for t, frame in enumerate(play(act, env, [seed], seconds)):
                if frame is None:
                    raise UserError(f"--env {config.env} renders nothing")
                video.append_data(frame)
                if t % 2 == 0:
                    small.append(Image.fromarray(frame).reduce(2))
    _write_gif(small, fps / 2, mp4.with_suffix(".gif"))


def show(act: Act, config: Config, seeds: Sequence[int], seconds: float) -> None:
    """Play episodes in a window for `seconds` of simulated time, one after another."""
    with contextlib.closing(make_env(config, "human")) as env:
        for _ in play(act, env, seeds, seconds):
            pass  # the window shows each step by itself


def _write_gif(frames: list[Any], fps: float, path: Path, limit: int = 3_000_000) -> None:
    """Fewer frames, at the true speed, until the file is small enough."""
    for stride in (1, 2, 3, 4, 6, 8, 12):
        kept = [frame.quantize(64, dither=0) for frame in frames[::stride]]
        timing = {"duration": 1000 * stride / fps, "loop": 0}  # milliseconds; for ever
        with atomic_path(path) as temporary:
            kept[0].save(temporary, save_all=True, append_images=kept[1:], **timing)
            small_enough = temporary.stat().st_size <= limit
        if small_enough:
            return


class StopSignals:
    """While entered, a SIGINT or SIGTERM is noted in `received`; a second one leaves at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> StopSignals:
        self.replaced = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.replaced[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, _frame: types.FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = number
        os.write(2, b"\nstopping after this iteration; once more to leave at once\n")

    def __exit__(self, *_: object) -> None:
        for number, handler in self.replaced.items():
            signal.signal(number, handler or signal.SIG_DFL)


# ==== 10. Train ===================================================================================

RESUMABLE = {  # what --resume may change: nothing that the learner sees
    *("total_timesteps", "device", "vector_env", "eval_every", "eval_episodes"),
    *("checkpoint_every", "stop_when_solved", "out"),
}


def prepare_learner(config: Config, resume: str | Path | None) -> Learner:
    """A new learner, or one that goes on from `resume`. Writes nothing."""
    random.seed(config.seed)
    np.random.seed(config.seed)
    torch.manual_seed(config.seed)
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
        learner.load(state, resume)
    elif config.init_from is not None:
        learner.load_policy(load_checkpoint(config.init_from, config.env), config.init_from)
    return learner


def is_due(every: int, step: int, batch_size: int) -> bool:
    """Whether the iteration that ends at `step` is the first at or past a multiple of `every`."""
    return every > 0 and step // every > (step - batch_size) // every


def evaluate_and_rank(learner: Learner, log: RunLog) -> tuple[dict[str, float], bool]:
    """Evaluation columns, and whether this policy is the best so far.

    A best mean at the threshold is confirmed on 100 fresh episodes, and the policy ranked by those:
    the highest of many means over a few episodes is high by luck.
    """
    config, counters, threshold = learner.config, learner.counters, learner.threshold
    best = -math.inf if counters.best_return is None else counters.best_return
    seeds = env_seeds(config.seed, EVALUATE, config.eval_episodes)
    returns, _ = evaluate(learner.act, config, seeds)
    columns = {"eval_return_mean": returns.mean(), "eval_return_std": returns.std()}
    columns["eval_episodes"] = len(returns)
    if threshold is not None and returns.mean() >= max(threshold, best):
        fresh = env_seeds(config.seed, CONFIRM, 100, step=counters.step)
        returns, _ = evaluate(learner.act, config, fresh)
        if returns.mean() >= threshold and counters.solved_step is None:
            counters.solved_step = counters.step
    is_best = bool(returns.mean() > best)
    if is_best:
        counters.best_return, counters.best_step = float(returns.mean()), counters.step
    over = f"{returns.mean():.1f} ± {returns.std():.1f} over {len(returns)} episodes"
    log.say(f"step {counters.step:,}: evaluation {over}{', the best so far' if is_best else ''}")
    return columns, is_best


def save(learner: Learner, iteration_s: float, is_best: bool, is_last: bool) -> None:
    """After an iteration of so many seconds: best.pt and step_N.pt where due, and last.pt.

    last.pt is written where that costs under 1 % of the iteration, else at most every 10 s.
    """
    config, step, now = learner.config, learner.counters.step, time.perf_counter()
    if is_best:
        learner.save(BEST)
    if is_due(config.checkpoint_every, step, config.batch_size):
        learner.save(LAST.replace("last", f"step_{step}"))
    if is_last or now - learner.saved_at >= 10 or learner.save_s < 0.01 * iteration_s:
        learner.save(LAST)
        learner.saved_at = time.perf_counter()


def check_finite(values: dict[str, float], counters: Counters) -> None:
    """TrainingError that names the first value that is not finite."""
    for name, value in values.items():
        if not math.isfinite(value):
            where = f"{name} is {value} in the iteration after step {counters.step:,}"
            raise TrainingError(f"{where}: try a lower --learning-rate; last.pt is from before it")


def episode_columns(episodes: list[tuple[float, int]]) -> dict[str, float]:
    """Raw returns and lengths of the episodes that ended in an iteration."""
    columns: dict[str, float] = {"episodes": len(episodes)}
    for name, values in zip(("return", "length"), zip(*episodes, strict=True), strict=False):
        columns[f"{name}_mean"] = float(np.mean(values))
        columns[f"{name}_min"], columns[f"{name}_max"] = min(values), max(values)
    return columns


def export(learner: Learner, log: RunLog, film: bool) -> None:
    """Film the best policy there is, and plot the curves."""
    import viz

    out, config = Path(learner.config.out), learner.config
    if (out / BEST).exists():
        learner.load_policy(load_checkpoint(out / BEST, config.env), out / BEST)
    try:
        if film:
            seed = env_seeds(config.seed, VIDEO, 1)[0]
            record_episode(learner.act, config, seed, out / FILM)
            log.say(f"video: {out / FILM}, and a GIF beside it")
    except (UserError, gym.error.Error, NotImplementedError) as error:
        log.say(f"no video: {error}")
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
    learner, out, mark = prepare_learner(config, resume), Path(config.out), time.perf_counter()
    agent, counters, normalizer = learner.agent, learner.counters, learner.obs_normalizer
    with contextlib.ExitStack() as stack:
        seeds = env_seeds(config.seed, TRAIN, config.num_envs, step=counters.step)
        envs, obs = make_vector_env(config, seeds)
        stack.callback(envs.close)
        claim_folder(out, resume, overwrite)
        write_config(config, learner.threshold, out / CONFIG)
        log = stack.enter_context(contextlib.closing(RunLog(out / METRICS, config, counters.step)))
        stop = stack.enter_context(StopSignals())
        learner.save(LAST)
        first_obs = normalizer.update_and_normalize(obs).to(learner.device)
        rollout = Rollout(config, first_obs, learner.dims[1])
        is_last = counters.step >= config.total_timesteps

        while not is_last:
            # set the learning rate, by the absolute step
            began = time.perf_counter()
            if config.lr_schedule != "adaptive":
                learner.optimizer.param_groups[0]["lr"].fill_(scheduled_rate(config, counters.step))

            # collect a rollout
            episodes = collect_rollout(envs, agent, normalizer, rollout)
            collected = time.perf_counter()

            # compute advantages of the normalised rewards; update
            rewards = learner.reward_normalizer(rollout.rewards, rollout.valid, rollout.discounted)
            batch = make_batch(rollout, agent, rewards, config)
            losses = update(agent, learner.optimizer, batch, config)
            check_finite(losses, counters)
            counters.step += config.batch_size
            counters.iteration += 1
            updated = time.perf_counter()

            # evaluate, if due
            is_last = counters.iteration >= config.num_iterations
            evaluation, is_best = {}, False
            is_final = is_last and config.eval_every > 0
            if is_final or is_due(config.eval_every, counters.step, config.batch_size):
                evaluation, is_best = evaluate_and_rank(learner, log)
            ended = time.perf_counter()
            counters.wall_s, mark = counters.wall_s + ended - mark, ended
            if counters.solved_step == counters.step:
                counters.solved_wall_s = counters.wall_s
                log.say(f"solved after {counters.wall_s / 60:.1f} min: confirmed on fresh episodes")
                is_last |= config.stop_when_solved

            # log a row
            row = dataclasses.asdict(counters) | episode_columns(episodes) | losses | evaluation
            row["steps_per_s"] = config.batch_size / (updated - began)
            row["collect_s"], row["update_s"] = collected - began, updated - collected
            row["eval_s"] = ended - updated
            log.row(row)

            # save
            is_last |= stop.received is not None
            save(learner, ended - began, is_best, is_last)

        log.say(summary(counters))
        export(learner, log, film=stop.received != signal.SIGTERM)
    return counters, stop.received


@dataclass(frozen=True)
class Evaluation:
    """Test a checkpoint: deterministic, statistics frozen, raw returns."""

    checkpoint: tyro.conf.Positional[str]  # a .pt file of a run
    env: str | None = None  # Gymnasium id, if not the checkpoint's own
    episodes: int = 100  # how many are started, and all count
    seed: int = 0  # episode k is reset with its own seed derived from this and k
    record: bool = False  # film one episode: videos/NAME.mp4 and .gif, NAME being the checkpoint's
    render: bool = False  # show episodes in a window before the test
    seconds: float | None = None  # at most so long a film or show; default: one episode, or 30 s
    device: Device = "auto"  # auto: cuda where present, else cpu
    out: str = "."  # folder in which videos/ is made


def run_evaluation(options: Evaluation) -> str:
    """Film or show the policy, where asked, then test it on fresh episodes.

    Returns one line, `return MEAN ± STD over N episodes (min A, max B), length L`.
    """
    state = load_checkpoint(options.checkpoint, options.env)
    config = config_from_dict(state["config"], options.checkpoint)
    changes = {name: getattr(options, name) for name in ("seed", "device", "out")}
    if options.env not in (None, config.env):
        changes |= {"env": options.env, "env_kwargs": ()}
    config = dataclasses.replace(config, **changes)
    if options.episodes < 1:
        raise UserError(f"--episodes is {options.episodes}: it must be at least 1")
    if options.seconds is not None and not 0 < options.seconds < math.inf:
        raise UserError(f"--seconds is {options.seconds}: it must be above 0, and finite")
    learner = Learner(config)
    learner.load_policy(state, options.checkpoint)
    seeds = env_seeds(options.seed, TEST, options.episodes)
    if options.record:
        mp4 = Path(options.out, "videos", f"{Path(options.checkpoint).stem}.mp4")
        make_folders(mp4.parent)
        record_episode(learner.act, config, seeds[0], mp4, options.seconds or math.inf)
        print(f"video: {mp4}, and a GIF beside it")
    if options.render:
        show(learner.act, config, seeds, options.seconds or 30.0)
    returns, lengths = evaluate(learner.act, config, seeds)
    mean = f"{returns.mean():.1f} ± {returns.std():.1f} over {len(returns)} episodes"
    span = f"(min {returns.min():.1f}, max {returns.max():.1f})"
    return f"return {mean} {span}, length {lengths.mean():.0f}"
