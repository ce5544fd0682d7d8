"""Data-parallel training: what two processes compute is what one would, on all of their rows.

As a script, started by torchrun: a training whose process of rank 1 is killed the first time.
"""

from __future__ import annotations

import contextlib
import copy
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import BATCH, TESTS, TINY, column, flags, tiny
from torch import distributed as dist

import walker_core as core

RANKS = 2
SHARED = (*core.LOSS_METRICS, "grad_norm", "action_std", "learning_rate")  # over all rows
T, N = 12, 8  # of the rollout that two processes share, 4 environments each
ROWS = ((5, 2), (1, 30), (17, 0))  # that each rank sees before each update
STOP_AT = 2  # the iteration in which rank 1 alone gets a SIGTERM


# ---- what a process of rank 0 or 1 computes, or one alone ----


def part(envs: int) -> core.Config:
    """One minibatch an epoch, so that shuffling does not matter; gradients that are clipped."""
    adaptive = {"lr_schedule": "adaptive", "desired_kl": 1e-3, "max_grad_norm": 0.05}
    sizes = {"num_envs": envs, "rollout_steps": T, "minibatch_size": envs * T}
    return tiny(**sizes, **adaptive, update_epochs=4, entropy_coef=0.01)


def learn(envs: slice) -> dict[str, Any]:
    """An update in float64, on those of the N environments of a rollout made of random numbers."""
    config = part(len(range(N)[envs]))
    core.seed_everything(1, rank=0, step=0)
    learner = core.Learner(config)
    agent = learner.agent.double()
    random = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    obs, noise = draw(T + 1, N, 3), draw(T, N)
    actions, rewards, endings = draw(T, N, 1), 3 + 2 * draw(T, N), draw(2, T, N) > 1.2
    rewards[:, N // 2 :] *= 5  # other moments in the second half, and more reset rows
    valid = draw(T, N) > torch.linspace(-3, 1, N)
    assert valid[:, : N // 2].sum() > 1.2 * valid[:, N // 2 :].sum()
    with torch.no_grad():
        logprobs = agent.evaluate_actions(obs[:-1], actions)[0] + 0.1 * noise

    rollout = core.Rollout(config, obs[0, envs], learner.spaces[1])
    rollout.obs, rollout.actions, rollout.logprobs = obs[:, envs], actions[:, envs], logprobs
    rollout.logprobs, rollout.rewards = logprobs[:, envs], (rewards * valid)[:, envs]
    rollout.terminated, rollout.truncated = endings[:, :, envs]
    rollout.valid = valid[:, envs]
    normalizer = learner.reward_normalizer
    scaled = normalizer(rollout.rewards, rollout.valid, rollout.discounted)
    batch = core.make_batch(rollout, agent, scaled, config)
    metrics = core.update(agent, learner.optimizer, batch, config)
    gradients = [parameter.grad for parameter in agent.parameters()]
    return {
        "advantages": batch.advantages,
        "parameters": list(agent.state_dict().values()),
        "gradients": gradients,
        "metrics": metrics,
        "reward statistics": [normalizer.mean, normalizer.var, normalizer.count],
    }


def stream(rank: int) -> list[np.ndarray]:
    """What a rank sees before each update: rows of two numbers."""
    random = np.random.default_rng(rank)
    return [(1 + rank) * random.normal(3 + k, 1, (rows[rank], 2)) for k, rows in enumerate(ROWS)]


def merge(rank: int) -> list[torch.Tensor]:
    """Mean, variance and count after each of the updates, stacked."""
    statistics, after = core.RunningMeanStd(core.Config(), (2,)), []
    for batch in stream(rank):
        statistics.update(torch.as_tensor(batch))
        after.append(torch.stack([statistics.mean, statistics.var, statistics.count.expand(2)]))
    return after


def merge_constant(value: float, counts: tuple[int, ...]) -> list[torch.Tensor]:
    """Mean and variance where all that both ranks see is one value, so many times an update."""
    statistics = core.RunningMeanStd(core.Config(), (1,))
    for count in counts:
        statistics.update(torch.full((count, 1), value))
    return [statistics.mean, statistics.var]


def train(rank: int, out: Path) -> dict[str, Any]:
    """A training in which rank 1 gets a SIGTERM; what it drew, and learned by each iteration."""
    make, collect, update = core.make_vector_env, core.collect_rollout, core.update
    seen: dict[str, Any] = {"actions": [], "obs": [], "statistics": [], "before": [], "after": []}

    def make_vector_env(config, seeds):
        seen["seeds"] = list(seeds)
        return make(config, seeds)

    def collect_rollout(envs, agent, normalizer, rollout):
        episodes = collect(envs, agent, normalizer, rollout)
        seen["actions"].append(rollout.actions.clone())
        seen["obs"].append(rollout.obs.clone())
        seen["statistics"].append(copy.deepcopy(normalizer.state_dict()))
        return episodes

    def do_update(agent, *args):
        seen["before"].append(copy.deepcopy(agent.state_dict()))
        if rank == 1 and len(seen["before"]) == STOP_AT:
            os.kill(os.getpid(), signal.SIGTERM)
        metrics = update(agent, *args)
        seen["after"].append(copy.deepcopy(agent.state_dict()))
        return metrics

    def film(*args, **kwargs):
        time.sleep(0.5)
        (out / "filmed").touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "make_vector_env", make_vector_env)
        patch.setattr(core, "collect_rollout", collect_rollout)
        patch.setattr(core, "update", do_update)
        patch.setattr(core, "export", film)
        patch.setattr(core, "join_processes", lambda: 0)  # they have met
        counters, stopped_by = core.train(tiny(out, total_timesteps=8 * BATCH * RANKS))
    ending = {"step": counters.step, "stopped_by": stopped_by}
    return seen | ending | {"filmed": (out / "filmed").exists()}


def work(rank: int, folder: Path) -> None:
    """All of the above, into a file."""
    torch.set_num_threads(1)
    meet = f"file://{folder / 'meet'}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=RANKS)
    found = {
        "process": core.process(),
        "sum": core.sum_over_processes(torch.tensor([1.0, 2.0]) + rank),
        "any": [core.any_process(flag) for flag in (False, rank == 0, rank == 1, True)],
        "learn": learn(slice(N // RANKS * rank, N // RANKS * (rank + 1))),
        "merge": merge(rank),
        "nothing": merge_constant(0.0, (0,)),
        "constant": merge_constant(123456.789, (7, 8, 0, 9)),
        "train": train(rank, folder / "run"),
    }
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder, context = tmp_path_factory.mktemp("ranks"), multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=(rank, folder)) for rank in range(RANKS)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        assert [worker.exitcode for worker in workers] == [0] * RANKS
    finally:
        for worker in workers:
            worker.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


# ---- torchrun ----


@contextlib.contextmanager
def torchrun(out: Path, script: Path, *typed: str, restarts: int = 0) -> Iterator[subprocess.Popen]:
    """Two processes of `script`; what they say is in the file err.txt."""
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--max-restarts", str(restarts), "--nproc-per-node"]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    with open(out / "err.txt", "w") as file:
        process = subprocess.Popen(
            [*command, str(RANKS), script, *typed],
            stdout=file,
            stderr=file,
            stdin=subprocess.DEVNULL,
            cwd=out,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        )
    try:
        yield process
    finally:
        process.terminate()  # it ends its processes
        process.wait(60)


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> Iterator[dict[str, tuple[Path, int]]]:
    """Folder and exit code of a whole run and of two whose rank 1 is killed, done at once."""
    names = ("whole", "killed", "restarted")
    whole, killed, restarted = (tmp_path_factory.mktemp(name) for name in names)
    typed = flags(whole, total_timesteps=200, eval_every=64)
    with (
        torchrun(whole, TESTS.parent / "walker.py", *typed) as first,
        torchrun(killed, Path(__file__), str(killed), "1000000") as second,
        torchrun(restarted, Path(__file__), str(restarted), "200", restarts=1) as third,
    ):
        runs = zip(names, (whole, killed, restarted), (first, second, third), strict=True)
        yield {name: (out, run.wait(90)) for name, out, run in runs}


def said(out: Path) -> str:
    return (out / "err.txt").read_text()


# ---- the claims ----


def test_a_process_alone_is_rank_0_of_1_and_its_sums_are_its_own():
    assert core.process() == (0, 1)
    assert core.sum_over_processes(torch.tensor([1.0, 2.0])).tolist() == [1, 2]
    assert not core.any_process(False)
    assert core.any_process(True)


def test_sums_and_flags_are_of_all_processes(ranks):
    assert [found["process"] for found in ranks] == [(0, 2), (1, 2)]
    for found in ranks:
        assert found["sum"].tolist() == [3, 5]
        assert found["any"] == [False, True, True, True]


def test_two_processes_learn_what_one_learns_from_all_their_environments(ranks):
    alone = learn(slice(0, N))
    for found in ranks:
        close = {"rtol": 0, "atol": 1e-10}
        for name in ("parameters", "gradients", "reward statistics"):
            torch.testing.assert_close(found["learn"][name], alone[name], **close)
        metrics = {name: found["learn"]["metrics"][name] for name in SHARED}
        expected = {name: alone["metrics"][name] for name in SHARED}
        assert metrics == pytest.approx(expected, rel=1e-6)  # one is made in float32
    assert alone["metrics"]["grad_norm"] > 0.05  # it is clipped
    assert alone["metrics"]["learning_rate"] != TINY.get("learning_rate", 3e-4)  # it is adapted


def test_advantages_are_normalised_over_the_rows_of_all_processes(ranks):
    """Rows go by time, then environment: as a set, those of two are those of one."""
    alone = learn(slice(0, N))["advantages"]
    both = [found["learn"]["advantages"] for found in ranks]
    assert len(both[0]) > 1.2 * len(both[1])
    together = torch.cat(both)
    torch.testing.assert_close(together.sort()[0], alone.sort()[0], rtol=0, atol=1e-10)
    assert abs(float(together.mean())) < 1e-12
    assert float(together.std(correction=0)) == pytest.approx(1, abs=1e-6)


def test_merged_statistics_are_numpys_over_all_that_all_processes_saw(ranks):
    streams = [stream(rank) for rank in range(RANKS)]
    for k in range(len(ROWS)):
        seen = np.concatenate([batch for batches in streams for batch in batches[: k + 1]])
        expected = np.stack([seen.mean(0), seen.var(0), np.full(2, len(seen))])
        for found in ranks:
            np.testing.assert_allclose(found["merge"][k].numpy(), expected, rtol=1e-12)
        assert torch.equal(ranks[0]["merge"][k], ranks[1]["merge"][k])


def test_statistics_of_nothing_stay_finite_when_merged(ranks):
    for found in ranks:
        assert [float(x) for x in found["nothing"]] == [0, 0]


def test_the_variance_of_a_constant_is_not_negative_when_merged(ranks):
    for found in ranks:
        mean, variance = found["constant"]
        assert float(mean) == pytest.approx(123456.789)
        assert 0 <= float(variance) < 1e-4


def test_processes_draw_different_seeds_and_actions(ranks):
    first, second = (found["train"] for found in ranks)
    assert not set(first["seeds"]) & set(second["seeds"])
    assert not torch.equal(first["obs"][0][0], second["obs"][0][0])
    for mine, others in zip(first["actions"], second["actions"], strict=True):
        assert not torch.isclose(mine, others, atol=1e-3, rtol=0).all(-1).any(0).all()
    noise = [found["train"]["actions"][0] for found in ranks]  # the policy's mean is near zero
    assert abs(np.corrcoef(noise[0].flatten(), noise[1].flatten())[0, 1]) < 0.9


def test_processes_have_equal_networks_and_statistics_after_each_iteration(ranks):
    first, second = (found["train"] for found in ranks)
    for name in ("before", "after", "statistics"):
        assert len(first[name]) == STOP_AT
        for mine, others in zip(first[name], second[name], strict=True):
            assert all(torch.equal(mine[key], others[key]) for key in mine)
    assert any(not torch.equal(x, first["after"][-1][k]) for k, x in first["before"][0].items())
    assert [int(x["count"]) for x in first["statistics"]] == [BATCH * RANKS, 2 * BATCH * RANKS]


def test_a_signal_to_one_process_ends_all_after_the_same_iteration(ranks):
    assert [found["train"]["step"] for found in ranks] == [STOP_AT * BATCH * RANKS] * RANKS
    assert [found["train"]["stopped_by"] for found in ranks] == [None, signal.SIGTERM]


def test_no_process_returns_before_the_film_is_done(ranks):
    """A launcher that sees one end with the code of a signal would end the others."""
    assert [found["train"]["filmed"] for found in ranks] == [True] * RANKS


def test_torchrun_trains_in_two_processes_and_one_can_go_on(launched):
    out, code = launched["whole"]
    assert code == 0, said(out)
    steps = BATCH * RANKS
    expected = [steps * (k + 1) for k in range(math.ceil(200 / steps))]
    assert column(out, "step") == expected
    assert column(out, "eval_episodes") == [2] * len(expected)
    for name in (core.LAST, core.BEST):
        assert core.load_checkpoint(out / name)["counters"]["step"] in expected
    assert core.load_checkpoint(out / core.LAST)["counters"]["step"] == expected[-1]
    assert list((out / "videos").glob("*.mp4")) == [out / core.FILM]
    assert said(out).count("curves: ") == 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "export", lambda *args, **kwargs: None)
        counters, _ = core.train(
            tiny(out, total_timesteps=expected[-1] + 50, eval_every=64), out / core.LAST
        )
    expected += [expected[-1] + BATCH, expected[-1] + 2 * BATCH]
    assert column(out, "step") == expected
    assert counters.step == expected[-1]


def test_a_process_that_is_killed_ends_the_run_and_leaves_a_checkpoint(launched):
    out, code = launched["killed"]
    assert code not in (0, None)
    assert "another process is gone" in said(out) or "SIGKILL" in said(out)
    assert (out / "killed").exists()
    assert not (out / "returned").exists()
    counters = core.load_checkpoint(out / core.LAST)["counters"]
    assert counters["step"] in (0, BATCH * RANKS)
    assert len(column(out, "step")) == 1


def test_a_restart_by_torchrun_goes_on_by_itself(launched):
    out, code = launched["restarted"]
    assert code == 0, said(out)
    assert (out / "killed").exists()
    steps = BATCH * RANKS
    assert column(out, "step") == [steps * (k + 1) for k in range(math.ceil(200 / steps))]
    assert list((out / "videos").glob("*.mp4")) == [out / core.FILM]


def be_killed(out: Path, total_timesteps: int) -> int:
    """`walker.py`, in which rank 1 is killed in its second iteration, unless it was before."""
    import walker

    update, calls = core.update, []

    def do_update(*args):
        calls.append(1)
        if os.environ["RANK"] == "1" and len(calls) == 2 and not (out / "killed").exists():
            (out / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return update(*args)

    core.update = do_update
    code = walker.main(flags(out, total_timesteps=total_timesteps))
    if code == 0:
        (out / "returned").touch()
    return code


if __name__ == "__main__":
    core.leave(be_killed(Path(sys.argv[1]), int(sys.argv[2])))
