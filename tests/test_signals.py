"""Signals as a user sends them: Ctrl-C in a terminal, to a background job, twice, at any time."""

from __future__ import annotations

import os
import pty
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from crash import checkpoint, look
from helpers import BATCH, flags, rows

import walker_core as core

ROOT = Path(__file__).resolve().parent.parent
CTRL_C = b"\x03"
pytestmark = pytest.mark.slow
ENDLESS = {"total_timesteps": 10**9, "eval_every": 2 * BATCH}
NO_PICTURES = "core.export = lambda *args, **kwargs: None\n"
SAY_AND_LINGER = """
import functools, os, time
def linger(function, *args, **kwargs):
    os.write(1, b"here it is\\n")
    until = time.monotonic() + {seconds}
    while time.monotonic() < until:
        time.sleep(0.01)
    return function(*args, **kwargs)
core.{name} = functools.partial(linger, core.{name})
"""


def until(what: Callable[[], bool]) -> None:
    late = time.monotonic() + 60
    while not what():
        assert time.monotonic() < late, "it takes too long"
        time.sleep(0.01)


def says(out: Path) -> str:
    return Path(f"{out}.log").read_text() if Path(f"{out}.log").exists() else ""


def has_rows(out: Path) -> bool:
    return (out / core.METRICS_CSV).exists() and len(rows(out)) > 2


def check_whole_and_resumable(out: Path, trainings) -> None:
    """All files are whole, no row is missing up to last.pt's, and one more iteration can follow."""
    assert not look(out, [])
    counters = checkpoint(out / core.LAST)
    done, batch = counters["iteration"], counters["step"] // max(counters["iteration"], 1) or BATCH
    assert [int(row["iteration"]) for row in rows(out)][:done] == list(range(1, done + 1))
    goal = str((done + 1) * batch)
    assert trainings.run(out, "--resume", "--total-timesteps", goal, hook=NO_PICTURES) == 0
    assert [int(row["iteration"]) for row in rows(out)] == list(range(1, done + 2))


class Terminal:
    """A command on a terminal of its own, in its foreground; `text` is what it has shown."""

    def __init__(self, *command: str) -> None:
        self.text = ""
        self.child, self.master = pty.fork()
        if self.child == 0:
            os.environ.pop("DISPLAY", None)
            os.environ["OMP_NUM_THREADS"] = "1"
            os.execv(command[0], command)

    def shows(self, text: str) -> bool:
        while select.select([self.master], [], [], 0)[0]:
            try:
                self.text += os.read(self.master, 1 << 16).decode(errors="replace")
            except OSError:  # the other end is closed
                break
        return text in self.text

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def code(self) -> int:
        status = []

        def ended() -> bool:
            self.shows("")
            status[:] = os.waitpid(self.child, os.WNOHANG)
            return status[0] != 0

        try:
            until(ended)
        except BaseException:
            os.kill(self.child, signal.SIGKILL)
            os.waitpid(self.child, 0)
            raise
        finally:
            os.close(self.master)
        return os.waitstatus_to_exitcode(status[1])


def test_ctrl_c_in_a_terminal_saves_draws_and_leaves(trainings, tmp_path):
    long = {"rollout_steps": 1000, "update_epochs": 1, "minibatch_size": 1000}
    typed = flags(tmp_path, **ENDLESS, **long)
    terminal = Terminal(sys.executable, str(ROOT / "walker.py"), *typed)
    until(lambda: terminal.shows("") and has_rows(tmp_path))
    time.sleep(0.05)  # into a rollout, of which most is to come
    done = len(rows(tmp_path))
    terminal.type(CTRL_C)
    assert terminal.code() == 130
    assert "stopped: --resume goes on" in terminal.text
    assert "Traceback" not in terminal.text
    assert (tmp_path / core.CURVES).exists()
    assert checkpoint(tmp_path / core.LAST)["iteration"] >= done
    check_whole_and_resumable(tmp_path, trainings)


def test_ctrl_c_in_a_terminal_ends_a_film_within_a_second(trainings, tmp_path):
    code = f"import sys\nsys.path.append({str(ROOT)!r})\nimport walker, walker_core as core\n"
    code += "play = core.play\n"
    code += "def slow(*args):\n    for i, step in enumerate(play(*args)):\n"
    code += "        if args[-1] == 'rgb_array':\n            print('frame', i, flush=True)\n"
    code += "            core.time.sleep(0.1)\n"
    code += "        yield step\n"
    code += "core.play = slow\nsys.exit(walker.main())"
    terminal = Terminal(sys.executable, "-c", code, *flags(tmp_path, eval_every=BATCH))
    until(lambda: terminal.shows("frame 3"))
    terminal.type(CTRL_C)
    assert terminal.code() == 130
    assert "frame 14" not in terminal.text
    assert "stopped: --resume goes on" in terminal.text
    assert "Traceback" not in terminal.text
    assert list((tmp_path / "videos").iterdir()) == []
    assert (tmp_path / core.CURVES).exists()
    check_whole_and_resumable(tmp_path, trainings)


def held(out: Path, trainings, name: str, seconds: float, **changes) -> int:
    """A training that waits so long before it calls `core.NAME`; it is now there."""
    hook = SAY_AND_LINGER.format(name=name, seconds=seconds)
    hook += "" if name in ("draw_curves", "record_episode") else NO_PICTURES
    child = trainings.start(out, *flags(out, **changes), hook=hook)
    until(lambda: "here it is" in says(out))
    return child


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_an_update_leaves_the_iterations_before(number, trainings, tmp_path):
    out = tmp_path / "run"
    child = held(out, trainings, "update", 30, **ENDLESS)
    began = time.monotonic()
    os.kill(child, number)
    assert trainings.wait() == 128 + number
    assert time.monotonic() - began < 5
    assert rows(out) == []
    check_whole_and_resumable(out, trainings)


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_without_the_curves(second, trainings, tmp_path):
    out = tmp_path / "run"
    child = held(out, trainings, "draw_curves", 30, eval_every=BATCH)
    os.kill(child, signal.SIGINT)
    until(lambda: says(out).count("here it is") == 2)  # at the run's end, and after the signal
    began = time.monotonic()
    os.kill(child, second)
    assert trainings.wait() == 128 + second
    assert time.monotonic() - began < 5
    assert len(rows(out)) == 4
    check_whole_and_resumable(out, trainings)


def test_a_signal_in_an_evaluation_ends_it_soon_and_a_resume_repeats_it(trainings, tmp_path):
    """Without the minute that its 400 episodes would take."""
    out, number = tmp_path / "run", signal.SIGTERM
    hook = "play = core.play\ndef slow(*args, **how):\n    core.time.sleep(0.3)\n"
    hook += "    print('an episode', flush=True)\n    yield from play(*args, **how)\n"
    typed = flags(out, **ENDLESS, eval_episodes=400)
    child = trainings.start(out, *typed, hook=f"{hook}core.play = slow\n{NO_PICTURES}")
    until(lambda: says(out).count("an episode") >= 4)
    began = time.monotonic()
    os.kill(child, number)
    assert trainings.wait() == 128 + number
    assert time.monotonic() - began < 10
    assert [row["iteration"] for row in rows(out)] == ["1"]
    assert not (out / core.BEST).exists()
    goal = str(2 * BATCH)
    more = "--eval-episodes", "2", "--total-timesteps", goal
    assert trainings.run(out, "--resume", *more, hook=NO_PICTURES) == 0
    assert [row["eval_episodes"] for row in rows(out)] == ["", "2"]
    check_whole_and_resumable(out, trainings)


def test_a_keypress_while_the_film_is_made_leaves_the_films_before(trainings, tmp_path):
    out = tmp_path / "run"
    child = held(out, trainings, "record_episode", 30, eval_every=BATCH)
    os.kill(child, signal.SIGINT)
    assert trainings.wait() == 130
    assert not (out / core.FILM).exists()
    check_whole_and_resumable(out, trainings)
