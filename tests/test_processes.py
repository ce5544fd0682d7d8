"""Data-parallel training: what two processes compute is what one would, on all of their rows.

As a script, started by torchrun: `walker.py`, whose process of rank 1 is killed the first time.
"""

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
from helpers import BATCH, TESTS, column, flags, tiny
from torch import distributed as dist

import walker
import walker_core as core

RANKS = 2
SHARED = (  # metrics of all rows
    *("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction"),
    *("grad_norm", "action_std", "learning_rate"),
)
T, N = 12, 8  # of the rollout that two processes share, 4 environments each
ROWS = ((5, 2), (1, 30), (17, 0))  # that each rank sees before each update of statistics
EPISODES = (  # return and length of those that end in each of four iterations of a rank
    [[], [(1.0, 9), (2.0, 4)], [(5.0, 1)], []],
    [[], [(6.0, 7)], [], [(-3.0, 2)]],
)
ITERATIONS = 2


def test_a_process_alone_is_rank_0_of_1_and_its_sums_are_its_own():
    assert core.rank_and_world_size() == (0, 1)
    assert core.sum_over_processes(torch.tensor([1.0, 2.0])).tolist() == [1, 2]
    assert not core.any_process(False)
    assert core.any_process(True)


# ---- what a process of rank 0 or 1 computes, or one alone ----------------------------------------


def learn(envs: slice) -> dict[str, Any]:
    """An update in float64, on those of the N environments of a rollout made of random numbers.

    One minibatch an epoch, so that shuffling does not matter; gradients that are clipped.
    """
    seeds = range(N)[envs]
    adaptive = {"lr_schedule": "adaptive", "desired_kl": 1e-3, "max_grad_norm": 0.05}
    sizes = {"num_envs": len(seeds), "rollout_steps": T, "minibatch_size": len(seeds) * T}
    config = tiny(**sizes, **adaptive, update_epochs=4, entropy_coef=0.01)
    core.seed_generators(1)
    learner = core.Learner(config)
    agent, normalizer = learner.agent.double(), learner.reward_normalizer
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    obs, noise = draw(T + 1, N, 3), draw(T, N)
    actions, rewards, endings = draw(T, N, 1), 3 + 2 * draw(T, N), draw(2, T, N) > 1.2
    rewards[:, N // 2 :] *= 5  # other moments in the second half, and more reset rows
    valid = draw(T, N) > torch.linspace(-3, 1, N)
    with torch.no_grad():
        logprobs = agent.evaluate_actions(obs[:-1], actions)[0] + 0.1 * noise

    rollout = core.Rollout(config, learner.env, seeds, obs[0, envs])
    rollout.obs, rollout.actions, rollout.logprobs = obs[:, envs], actions[:, envs], logprobs
    rollout.logprobs, rollout.rewards = logprobs[:, envs], (rewards * valid)[:, envs]
    rollout.terminated, rollout.truncated = endings[:, :, envs]
    rollout.valid = valid[:, envs]
    batch = core.make_batch(rollout, agent, normalizer, config)
    metrics = core.update(agent, learner.optimizer, batch, config)
    return {
        "advantages": batch.advantages,
        "parameters": list(agent.state_dict().values()),
        "gradients": [parameter.grad for parameter in agent.parameters()],
        "metrics": {name: metrics[name] for name in SHARED},
        "reward statistics": [normalizer.mean, normalizer.var, normalizer.count],
    }


def stream(rank: int) -> list[np.ndarray]:
    """What a rank sees before each update: rows of two numbers."""
    rng = np.random.default_rng(rank)
    return [(1 + rank) * rng.normal(3 + k, 1, (rows[rank], 2)) for k, rows in enumerate(ROWS)]


def merge(rank: int) -> list[torch.Tensor]:
    """Mean, variance and count after each of the updates, stacked."""
    statistics, after = core.RunningMeanStd((2,)), []
    for batch in stream(rank):
        statistics.update(torch.as_tensor(batch))
        after.append(torch.stack([statistics.mean, statistics.var, statistics.count.expand(2)]))
    return after


def average(rank: int) -> list[float]:
    """The running mean of returns after each iteration."""
    after = [-math.inf]
    for episodes in EPISODES[rank]:
        after.append(core.average_return(after[-1], episodes))
    return after[1:]


def train(rank: int, out: Path) -> dict[str, Any]:
    """A training of two iterations: what each drew and learned."""
    make, update = core.make_vector_env, core.update
    seen: dict[str, Any] = {"actions": [], "statistics": [], "weights": []}

    def make_vector_env(config, env, seeds):
        seen["seeds"] = list(seeds)
        return make(config, env, seeds)

    def do_update(agent, optimizer, batch, config):
        seen["actions"].append(batch.actions.clone())
        metrics = update(agent, optimizer, batch, config)
        seen["weights"].append(copy.deepcopy(agent.state_dict()))
        return metrics

    def merge_statistics(statistics, batch):
        merged(statistics, batch)
        if isinstance(statistics, core.ObservationNormalizer):
            seen["statistics"].append(copy.deepcopy(statistics.state_dict()))

    def export(*args, **kwargs):
        time.sleep(0.5)
        (out / "filmed").touch()

    merged = core.RunningMeanStd.update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "make_vector_env", make_vector_env)
        patch.setattr(core, "update", do_update)
        patch.setattr(core.RunningMeanStd, "update", merge_statistics)
        patch.setattr(core, "export", export)
        counters = core.train(tiny(out, total_timesteps=ITERATIONS * BATCH * RANKS))
    seen.update(step=counters.step, filmed=(out / "filmed").exists())
    return seen


def work(rank: int, folder: Path) -> None:
    """All of the above, into a file."""
    torch.set_num_threads(1)
    meet = f"file://{folder / 'meet'}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=RANKS)
    found = {
        "rank": core.rank_and_world_size(),
        "sum": core.sum_over_processes(torch.tensor([1.0, 2.0]) + rank),
        "any": [core.any_process(flag) for flag in (False, rank == 0, rank == 1, True)],
        "learn": learn(slice(N // RANKS * rank, N // RANKS * (rank + 1))),
        "merge": merge(rank),
        "average": average(rank),
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
            worker.join(120)
        assert [worker.exitcode for worker in workers] == [0] * RANKS
    finally:
        for worker in workers:
            worker.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.mark.slow
def test_sums_and_flags_are_of_all_processes(ranks):
    assert [found["rank"] for found in ranks] == [(0, 2), (1, 2)]
    for found in ranks:
        assert found["sum"].tolist() == [3, 5]
        assert found["any"] == [False, True, True, True]


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_from_all_their_environments(ranks):
    alone = learn(slice(0, N))
    for found in ranks:
        for name in ("parameters", "gradients", "reward statistics"):
            torch.testing.assert_close(found["learn"][name], alone[name], rtol=0, atol=1e-10)
        # one is made in float32
        assert found["learn"]["metrics"] == pytest.approx(alone["metrics"], rel=1e-6)
    assert alone["metrics"]["grad_norm"] > 0.05  # it is clipped
    assert alone["metrics"]["learning_rate"] != pytest.approx(3e-4)  # it is adapted


@pytest.mark.slow
def test_advantages_are_normalized_over_the_rows_of_all_processes(ranks):
    """Rows go by time, then environment: as a set, those of two are those of one."""
    alone = learn(slice(0, N))["advantages"]
    both = [found["learn"]["advantages"] for found in ranks]
    assert len(both[0]) > 1.2 * len(both[1])
    together = torch.cat(both)
    torch.testing.assert_close(together.sort()[0], alone.sort()[0], rtol=0, atol=1e-10)
    assert float(together.std(correction=0)) == pytest.approx(1, abs=1e-6)


@pytest.mark.slow
def test_running_statistics_are_numpys_over_all_that_all_processes_saw(ranks):
    streams = [stream(rank) for rank in range(RANKS)]
    for k in range(len(ROWS)):
        seen = np.concatenate([batch for batches in streams for batch in batches[: k + 1]])
        expected = np.stack([seen.mean(0), seen.var(0), np.full(2, len(seen))])
        for found in ranks:
            np.testing.assert_allclose(found["merge"][k].numpy(), expected, rtol=1e-12)
        assert torch.equal(ranks[0]["merge"][k], ranks[1]["merge"][k])


@pytest.mark.slow
def test_the_running_return_is_of_the_episodes_of_all_processes(ranks):
    expected = [-math.inf, 3.0, 5 + 0.98 * (3 - 5)]
    expected.append(-3 + 0.98 * (expected[-1] + 3))
    assert ranks[0]["average"] == ranks[1]["average"] == pytest.approx(expected)


@pytest.mark.slow
def test_processes_draw_apart_and_stay_equal_in_weights_and_statistics(ranks):
    first, second = (found["train"] for found in ranks)
    assert not set(first["seeds"]) & set(second["seeds"])
    noise = [found["train"]["actions"][0].flatten() for found in ranks]  # the means are near zero
    assert abs(np.corrcoef(*noise)[0, 1]) < 0.9
    for name in ("weights", "statistics"):
        assert len(first[name]) == ITERATIONS
        for mine, others in zip(first[name], second[name], strict=True):
            assert all(torch.equal(mine[key], others[key]) for key in mine)
    assert not torch.equal(first["weights"][0]["raw_std"], first["weights"][1]["raw_std"])
    assert [int(x["count"]) for x in first["statistics"]] == [BATCH * RANKS, 2 * BATCH * RANKS]


@pytest.mark.slow
def test_all_processes_end_after_the_same_iteration_and_the_film(ranks):
    """A launcher that sees one end would end the others."""
    assert [found["train"]["step"] for found in ranks] == [ITERATIONS * BATCH * RANKS] * RANKS
    assert [found["train"]["filmed"] for found in ranks] == [True] * RANKS


@pytest.mark.parametrize(("gpus", "processes"), [(0, 1), (1, 1), (1, 2), (2, 2)])
def test_a_gpu_is_used_where_every_process_has_one(gpus, processes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setenv("LOCAL_RANK", str(processes - 1))
    if gpus < processes:
        assert core.resolve_device("auto") == torch.device("cpu")
        with pytest.raises(core.UserError, match="--device cuda"):
            core.resolve_device("cuda")
    else:
        for name in ("auto", "cuda"):
            assert core.resolve_device(name) == torch.device("cuda", processes - 1)


# ---- torchrun ------------------------------------------------------------------------------------


@contextlib.contextmanager
def torchrun(out: Path, script: Path, *typed: str, restarts: int = 0) -> Iterator[subprocess.Popen]:
    """Two processes of `script`; what they print is in the file err.txt."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--max-restarts", str(restarts), "--nproc-per-node", str(RANKS), script, *typed]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    with open(out / "err.txt", "w") as file:
        output = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
        process = subprocess.Popen(command, cwd=out, env=environ, **output)
    try:
        yield process
    finally:
        process.terminate()  # it ends its processes
        process.wait(60)


def printed(out: Path) -> str:
    return (out / "err.txt").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")  # in this process
def test_torchrun_trains_in_two_processes_exits_cleanly_and_one_can_go_on(tmp_path):
    typed = flags(tmp_path, total_timesteps=200, eval_every=64)
    with torchrun(tmp_path, TESTS.parent / "walker.py", *typed) as process:
        assert process.wait(120) == 0, printed(tmp_path)
    assert "terminate called" not in printed(tmp_path)
    assert "Traceback" not in printed(tmp_path)
    assert printed(tmp_path).count("curves: ") == 1
    steps = [64, 128, 192, 256]
    assert column(tmp_path, "step") == steps
    assert column(tmp_path, "eval_episodes") == [2] * 4
    assert core.load_checkpoint(tmp_path / core.LAST)["counters"]["step"] == 256
    assert core.load_checkpoint(tmp_path / core.BEST)["counters"]["step"] in steps

    core.train(tiny(tmp_path, total_timesteps=300, eval_every=64), tmp_path / core.LAST)
    assert column(tmp_path, "step") == [*steps, 256 + BATCH, 256 + 2 * BATCH]


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_run_and_leaves_a_checkpoint(tmp_path):
    with torchrun(tmp_path, Path(__file__), *flags(tmp_path, total_timesteps=10**6)) as process:
        assert process.wait(120) not in (0, None)
    assert "another process is gone" in printed(tmp_path) or "SIGKILL" in printed(tmp_path)
    assert core.load_checkpoint(tmp_path / core.LAST)["counters"]["step"] in (0, BATCH * RANKS)
    assert column(tmp_path, "step") == [BATCH * RANKS]


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")  # in this process
def test_a_restart_by_torchrun_with_resume_goes_on_from_the_last_checkpoint(tmp_path):
    core.train(tiny(tmp_path, total_timesteps=BATCH))
    typed = "--resume", "--out", str(tmp_path), "--total-timesteps", "200"
    with torchrun(tmp_path, Path(__file__), *typed, restarts=1) as process:
        assert process.wait(120) == 0, printed(tmp_path)
    assert (tmp_path / "killed").exists()
    assert column(tmp_path, "step") == [32, 96, 160, 224]


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--overwrite",)], ids=["", "overwrite"])
def test_a_restart_by_torchrun_without_resume_is_refused_and_removes_nothing(more, tmp_path):
    typed = flags(tmp_path, total_timesteps=200)
    with torchrun(tmp_path, Path(__file__), *typed, *more, restarts=1) as process:
        assert process.wait(120) not in (0, None)
    assert (tmp_path / "killed").exists()
    assert f"{tmp_path / 'checkpoints_walker'} holds a run: --resume it" in printed(tmp_path)
    assert column(tmp_path, "step") == [64]
    assert core.load_checkpoint(tmp_path / core.LAST)["counters"]["step"] == 64


def be_killed(*typed: str) -> int:
    """`walker.py`, in which rank 1 is killed in its second iteration, unless it was before.

    That it was is a file in the current folder.
    """
    update, calls, killed = core.update, [], Path("killed")

    def do_update(*args):
        calls.append(1)
        if os.environ["RANK"] == "1" and len(calls) == 2 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return update(*args)

    core.update = do_update
    code = walker.main(list(typed))
    threads = [file.read_text() for file in Path("/proc/self/task").glob("*/comm")]
    assert not any("gloo" in name for name in threads), "one could abort the process at its end"
    return code


if __name__ == "__main__":
    sys.exit(be_killed(*sys.argv[1:]))
