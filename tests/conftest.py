"""What every test has: one torch thread, and a way to leave out the film and the curves."""

import contextlib
import shutil
import signal
from pathlib import Path

import pytest
import torch

import walker_core as core

torch.set_num_threads(1)  # with networks this small, two only fight for the cores
# a job in the background ignores Ctrl-C, one of nohup a hangup, and so would the tests' runs
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def signals():
    """`walker.main` sets handlers for the rest of its process."""
    handlers = {number: signal.getsignal(number) for number in core.END_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def no_pictures(monkeypatch):
    """A film and curves cost a second a run: the smoke run of test_train.py checks them."""
    for name in ("export", "draw_curves"):
        monkeypatch.setattr(core, name, lambda *args, **kwargs: None)


@pytest.fixture
def folder(trained, tmp_path, monkeypatch) -> Path:
    """A fresh copy of the folder that the test's file has `trained` in, and the current one."""
    shutil.copytree(trained, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture(scope="session")
def trainings():
    """Starts trainings as processes of their own, at once."""
    from crash import Trainings

    with contextlib.closing(Trainings()) as trainings:
        yield trainings
