"""Terminals, notebooks and scripts: what surrounds a run does not end it, names are found."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import field_envs  # noqa: F401
import numpy as np
import pytest
import torch
from helpers import BATCH, flags, rows, start, tiny, train_without_pictures, tree, wait_for

import walker
import walker_core as core

pytestmark = pytest.mark.usefixtures("no_pictures")
slow = pytest.mark.slow
LAST = f"run/{core.LAST}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("terminals")
    train_without_pictures(tiny(folder / "run", total_timesteps=2 * BATCH))
    train_without_pictures(tiny(folder / "other", total_timesteps=BATCH, seed=2))
    return folder


def refusal(capsys, *argv: str) -> str:
    """The one line of a command that is refused with code 2."""
    capsys.readouterr()
    assert walker.main(list(argv)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


# ---- a run is only gone on with by its own checkpoints -------------------------------------------

MORE = ["--total-timesteps", str(3 * BATCH)]


def test_a_checkpoint_of_another_run_does_not_take_over_the_folder_it_lies_in(folder, capsys):
    shutil.copy("other/" + core.LAST, "run/checkpoints_walker/pretrained_other.pt")
    before = tree(folder)
    error = refusal(capsys, "--resume", "run/checkpoints_walker/pretrained_other.pt", *MORE)
    assert "run/checkpoints_walker holds a run" in error
    assert tree(folder) == before
    assert walker.main(["--resume", "run", *MORE]) == 0


def test_a_resume_that_is_refused_has_written_nothing(folder, capsys):
    with open(f"run/{core.METRICS_CSV}", "a") as file:
        file.write("spoiled,by,another\n")
    before = tree(folder)
    assert core.METRICS_CSV in refusal(capsys, "--resume", "run", *MORE)
    assert tree(folder) == before


@pytest.mark.parametrize("place", ["run", LAST, "link.pt"])
def test_a_run_is_resumed_by_its_folder_or_a_file_of_it(place, folder):
    if place == "link.pt":
        shutil.move(LAST, "elsewhere.pt")
        os.symlink(Path("elsewhere.pt").absolute(), LAST)
        place = LAST
    assert walker.main(["--resume", place, *MORE]) == 0
    assert len(rows(folder / "run")) == 3


def test_a_run_is_resumed_from_within_its_folder(folder, monkeypatch):
    monkeypatch.chdir("run/checkpoints_walker")
    assert walker.main(["--resume", "last.pt", *MORE]) == 0
    assert len(rows(folder / "run")) == 3


# ---- wrong in one line ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--stop-when-solved", ("--stop-when-solved", "--eval-every")),
        ("--stop-when-solved --eval-every 64", ("--stop-when-solved", "threshold")),
        (
            "--env Field/Picture-v0 --env-kwargs shape=(400,400,4) --rollout-steps 1000000",  # 5 TB
            ("lower --num-envs or --rollout-steps", "memory"),
        ),
        ("--total-timesteps 1.5e0", ("--total-timesteps", "'1.5e0'")),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(words, parts, folder, capsys):
    before = tree(folder)
    error = refusal(capsys, *flags("new"), *words.split())
    assert [part for part in parts if part not in error] == []
    assert tree(folder) == before


def test_a_world_size_without_torchrun_is_refused(folder, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "WORLD_SIZE is set" in refusal(capsys, *flags("new"))


@pytest.mark.parametrize("kwargs", ["max_episode_steps=-1", "wind=3"])
def test_an_argument_that_envpool_does_not_know_is_refused(kwargs, folder, capsys):
    pytest.importorskip("envpool")
    typed = flags("new", env="BipedalWalker-v3", vector_env="envpool", env_kwargs=(kwargs,))
    assert "--env" in refusal(capsys, *typed)


# ---- names and numbers ---------------------------------------------------------------------------


def test_a_preset_is_found_without_a_version_and_behind_a_module_and_none_is_made_up():
    known = core.Config.for_env("BipedalWalker-v3").num_envs
    assert known != core.Config().num_envs
    for name in ("BipedalWalker", "gymnasium:BipedalWalker-v3"):
        assert core.Config.for_env(name).num_envs == known
    assert core.Config.for_env("BipedalWalker-v4").num_envs == core.Config().num_envs


def test_whole_numbers_may_be_scientific():
    config, *_ = walker.parse_training(["--total-timesteps", "3e6", "--eval-every", "1E5"])
    assert (config.total_timesteps, config.eval_every) == (3_000_000, 100_000)
    assert type(config.total_timesteps) is int


def test_the_start_says_what_runs_and_the_files_what_made_it(folder, capsys):
    assert walker.main(flags("new", total_timesteps=BATCH)) == 0
    first = " ".join(capsys.readouterr().out.splitlines()[:2])
    for part in ("Pendulum-v1", "no preset", "10 steps", "seed 1", "2 sync", "cpu", "work/new"):
        assert part in first
    about = json.loads(Path("new", core.CONFIG_JSON).read_text())["_about"]
    saved = core.load_checkpoint(Path("new", core.LAST))["about"]
    assert about == {**about, **saved}
    assert saved["packages"]["torch"] == torch.__version__
    assert saved["packages"]["numpy"] == np.__version__
    assert saved["command"] == sys.argv
    assert len(saved["run"]) == 16


def test_evaluate_takes_arguments_of_the_environment_and_gives_an_interval(folder, capsys):
    typed = ["--env-kwargs", "max_episode_steps=7", "--episodes", "30"]
    assert walker.main(["evaluate", LAST, *typed]) == 0
    interval, result = capsys.readouterr().out.splitlines()
    assert result.endswith("length 7")
    learner = core.load_learner(LAST, "Pendulum-v1", "cpu", ("max_episode_steps=7",))
    returns, _ = core.evaluate_policy(learner.act, learner.config, core.env_seeds(0, core.TEST, 30))
    low, high = map(float, interval.rpartition(": ")[2].split(" to "))
    error = returns.std() / np.sqrt(30)  # the bootstrap's is about the same
    assert low == pytest.approx(returns.mean() - 1.96 * error, abs=error / 2)
    assert high == pytest.approx(returns.mean() + 1.96 * error, abs=error / 2)


@slow
def test_films_of_two_runs_do_not_meet(folder):
    for run in ("run", "other"):
        assert walker.main(["evaluate", f"{run}/{core.LAST}", "--record", "--episodes", "1"]) == 0
    one, other = (Path(run, "videos/last.npz").read_bytes() for run in ("run", "other"))
    assert one != other


# ---- threads, encodings, pipes and signals -------------------------------------------------------


def test_training_in_a_thread_sets_no_handler_and_raises_nothing(tmp_path):
    before, failed = signal.getsignal(signal.SIGINT), []
    thread = threading.Thread(target=lambda: core.train(tiny(tmp_path)))
    threading.excepthook, hook = failed.append, threading.excepthook
    thread.start()
    assert signal.getsignal(signal.SIGINT) == before
    thread.join()
    threading.excepthook = hook
    assert failed == []
    assert len(rows(tmp_path)) == 4


@slow
@pytest.mark.parametrize("encoding", ["ascii", "cp932", "cp949", "latin-1"])
def test_no_encoding_of_the_output_ends_a_training(encoding, tmp_path):
    command = [sys.executable, walker.__file__, *flags(tmp_path, eval_every=BATCH)]
    environ = os.environ | {"PYTHONIOENCODING": encoding, "TERM": "dumb"}
    done = subprocess.run(command, env=environ, capture_output=True)
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False)
    assert b"the best so far" in done.stdout


@slow
@pytest.mark.parametrize("where", [">&-", "2>&-", "| head -n 1", "| true"])
def test_an_output_that_is_closed_does_not_end_a_training(where, tmp_path):
    typed = " ".join(flags(tmp_path, eval_every=BATCH))
    command = f"({sys.executable} {walker.__file__} {typed}; echo $? > {tmp_path}/code) {where}"
    done = subprocess.run(["bash", "-c", command], capture_output=True)
    assert (tmp_path / "code").read_text() == "0\n"
    assert len(rows(tmp_path)) == 4
    assert b"Traceback" not in done.stderr


@slow
def test_a_reader_that_has_had_enough_is_no_wrong_command(folder):
    command = f"({sys.executable} {walker.__file__} evaluate {LAST} --episodes 2; echo $? > code)"
    done = subprocess.run(["bash", "-c", f"{command} | true"], capture_output=True)
    assert Path("code").read_text() == "141\n"
    assert done.stderr == b""


@slow
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has none")
@pytest.mark.parametrize("ignored", [False, True], ids=["a lost terminal", "nohup"])
def test_a_hangup_ends_a_run_like_a_schedulers_signal_unless_it_is_ignored(ignored, tmp_path):
    preexec = (lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) if ignored else None
    typed = flags(tmp_path, total_timesteps=10**9)
    process = start(tmp_path, *typed, preexec_fn=preexec)
    csv = tmp_path / core.METRICS_CSV
    wait_for(process, lambda: csv.exists() and csv.read_text().count("\n") > 2)
    process.send_signal(signal.SIGHUP)
    if ignored:
        lines = csv.read_text().count("\n")
        wait_for(process, lambda: csv.read_text().count("\n") > lines + 2)
        process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + (signal.SIGTERM if ignored else signal.SIGHUP)
    saved = core.load_checkpoint(tmp_path / core.LAST)["counters"]["iteration"]
    assert 1 <= saved <= len(rows(tmp_path))
