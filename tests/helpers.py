"""Tiny settings and comparisons that several test files share."""

from __future__ import annotations

import csv
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import walker_core as core

TESTS = Path(__file__).resolve().parent
PRETRAINED = str(TESTS.parent / "checkpoints_walker/pretrained.pt")
BATCH = 32  # steps of one iteration of the tiny runs: 16 of each of 2 environments
TINY = {
    "env": "Pendulum-v1",
    "env_kwargs": ("max_episode_steps=10",),
    "device": "cpu",  # where runs of one seed are equal to the bit
    "num_envs": 2,
    "rollout_steps": 16,
    "minibatch_size": 16,
    "update_epochs": 2,
    "actor_hidden": (4,),
    "critic_hidden": (4,),
    "eval_every": 0,
    "eval_episodes": 2,
    "total_timesteps": 4 * BATCH,
}
# Columns that tell of the clock; all others must be equal to the bit between two runs of one seed.
CLOCK = ("wall_s", "steps_per_s", "collect_s", "update_s", "eval_s")
LEARNED = ("agent", "optimizer", "obs_normalizer", "reward_normalizer")


def tiny(out: Path | str = ".", **changes: Any) -> core.Config:
    """A run of four iterations, a tenth of a second long; without evaluations."""
    return core.Config(**{**TINY, "out": str(out), **changes})


def evaluate_here(act: Callable, config: core.Config, seeds: Sequence[int]) -> tuple:
    """What `core.evaluate_policy` returns, without worker processes."""
    saved_act = core.to_bytes(act)
    # a worker has generators of its own
    generators = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        episodes = [core.play_one(saved_act, config, seed) for seed in seeds]
    random.setstate(generators[0])
    np.random.set_state(generators[1])
    returns, lengths = np.transpose(episodes)
    return returns, lengths


def train_without_pictures(config: core.Config) -> None:
    """`core.train` for fixtures of a module, which the fixture `no_pictures` does not reach."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("export", "draw_curves"):
            patch.setattr(core, name, lambda *args, **kwargs: None)
        core.train(config)


def before(monkeypatch, name: str, iteration: int, do: Callable[[], None]) -> None:
    """Have `do` called in the iteration of that number, before `core.NAME` is."""
    function, numbers = getattr(core, name), itertools.count(1)

    def wrapped(*args):
        if next(numbers) == iteration:
            do()
        return function(*args)

    monkeypatch.setattr(core, name, wrapped)


def train_and_interrupt(config: core.Config, k: int, resume=None) -> None:
    """`core.train`, with a Ctrl-C as it collects the rollout after the kth iteration."""
    with pytest.MonkeyPatch.context() as patch:
        before(patch, "collect_rollout", k + 1, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            core.train(config, resume)


def flags(out: Path | str = ".", **changes: Any) -> list[str]:
    """The settings of `tiny`, as typed on the command line."""
    words = []
    for name, value in {**TINY, "out": str(out), **changes}.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            many = isinstance(value, Sequence) and not isinstance(value, str)
            words += [f"--{flag}", *map(str, value if many else [value])]
    return words


def start(out: Path, *typed: str, **popen) -> subprocess.Popen:
    """`python walker.py` in a process of its own, its output in the files out.txt and err.txt."""
    displays = "DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"  # headless
    environ = {name: value for name, value in os.environ.items() if name not in displays}
    out.mkdir(exist_ok=True)
    with open(out / "out.txt", "w") as stdout, open(out / "err.txt", "w") as stderr:
        return subprocess.Popen(
            [sys.executable, TESTS.parent / "walker.py", "--out", out, *typed],
            stdout=stdout,
            stderr=stderr,
            stdin=subprocess.DEVNULL,
            cwd=out,
            env=environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)},
            **popen,
        )


def wait_for(process: subprocess.Popen, what: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not what():
        assert process.poll() is None, "it ended by itself"
        assert time.monotonic() < until, "it takes too long"
        time.sleep(0.02)


def rows(out: Path) -> list[dict[str, str]]:
    """The cells of a run's metrics.csv, as they are written."""
    with open(out / core.METRICS_CSV, newline="") as file:
        return list(csv.DictReader(file))


def without_clock(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{name: cell for name, cell in row.items() if name not in CLOCK} for row in rows]


def column(out: Path, name: str) -> list[float]:
    return [float(row[name]) for row in rows(out)]


def warned(recwarn) -> list[str]:
    """Warnings that a terminal would show: Gymnasium's, which are coloured, and all but those of
    old modules being imported."""
    return [
        str(warning.message)
        for warning in recwarn
        if "WARN" in str(warning.message) or not issubclass(warning.category, DeprecationWarning)
    ]


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: the bytes of files, None for folders."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


def same(a: Any, b: Any) -> bool:
    """Whether two nested values are equal to the bit, types and order of keys included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and _bits(a) == _bits(b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().numpy().tobytes()


def learned(checkpoint: Path) -> dict[str, Any]:
    """All of a checkpoint that training has made: networks, optimizer and normalizers."""
    state = core.load_checkpoint(checkpoint)
    return {name: state[name] for name in LEARNED}
