"""A disk that is full, read-only or gone: one line, exit code 1, and the last good files stay."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from pathlib import Path

import pytest
from crash import checkpoint, leftovers, look
from helpers import BATCH, flags, rows, tree

import walker_core as core

SETTINGS = {"total_timesteps": 20 * BATCH, "eval_every": 2 * BATCH, "checkpoint_every": 2 * BATCH}
FULL = """
import resource, viz
places = {{"core": core, "Learner": core.Learner, "RunLog": core.RunLog, "viz": viz}}
place, name, nth, file = places[{place!r}], {name!r}, {nth}, {file!r}
function, calls = getattr(place, name), []
def fills_the_disk(*args, **kwargs):
    calls.append(file in map(str, args))
    if sum(calls) == nth:  # no file may become larger than this
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
    return function(*args, **kwargs)
setattr(place, name, fills_the_disk)
"""


def complaint(out: Path) -> str:
    """The one line of a run that could not go on."""
    said = Path(f"{out}.log").read_text()
    assert "Traceback" not in said
    assert said.count("walker.py: ") == 1
    line = said.splitlines()[-1]
    assert line.startswith("walker.py: ")
    return line


WRITERS = {  # where the disk is full from the nth call of it on, for files larger than so much
    "config.json": ("core", "write_config", 1, "", 500),
    "metrics.csv": ("core", "RunLog", 1, "", 250),
    "the first last.pt": ("Learner", "save", 1, core.LAST, 5000),
    "last.pt": ("Learner", "save", 3, core.LAST, 5000),
    "best.pt": ("Learner", "save", 2, core.BEST, 5000),
    "step_256.pt": ("Learner", "save", 1, "checkpoints_walker/step_256.pt", 5000),
    "a row of metrics.csv": ("RunLog", "row", 5, "", 1000),
    "walker_final.mp4": ("core", "record_episode", 1, "", 3000),
    "walker_final.gif": ("core", "_write_gif", 1, "", 3000),
    "training_curves.png": ("viz", "plot_training_curves", 1, "", 50_000),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_where_a_file_does_not_fit_the_others_stay_and_the_run_can_go_on(
    writer, trainings, tmp_path
):
    out = tmp_path / "run"
    place, name, nth, file, limit = WRITERS[writer]
    hook = FULL.format(place=place, name=name, nth=nth, file=file, limit=limit)
    hook = hook if file else hook.replace("file in map(str, args)", "True")
    rising = [float(i) for i in range(20)]
    assert trainings.run(out, *flags(out, **SETTINGS), hook=hook, scores=rising) == 1
    line = complaint(out)
    name = writer.split()[-1]
    why = "File too large"
    if name.startswith("walker_final"):  # the encoder does not say why; a film is tried by its GIF
        name, why = "walker_final.gif", "the encoder failed; is the disk full?"
    assert line.endswith(f"/{name} cannot be written: {why}")
    wrong = look(out, [])
    wrong.pop("torn", 0)
    assert not wrong
    assert leftovers(out) == []
    if (out / core.LAST).exists():
        rest = [float(i) for i in range(20, 40)]
        assert trainings.run(out, "--resume", scores=rest) == 0
        assert [row["iteration"] for row in rows(out)] == [str(i) for i in range(1, 21)]
        assert not look(out, [])
    else:
        assert trainings.run(out, *flags(out, total_timesteps=BATCH)) == 0


@contextlib.contextmanager
def mounted(folder: Path, *options: str):
    """A file system in memory, or a skip where this user may not mount one."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_keeps_what_was_good(trainings, tmp_path):
    out = tmp_path / "run"
    with mounted(out, "-o", "size=128k"):  # eight checkpoints or so
        assert trainings.run(out, *flags(out, **SETTINGS)) == 1
        assert "cannot be written: No space left on device" in complaint(out)
        assert not look(out, [])
        assert leftovers(out) == []
        assert checkpoint(out / core.LAST)["iteration"] >= 3
        for path in (out / core.LAST).parent.glob("step_*.pt"):
            path.unlink()
        again = ["--resume", "--checkpoint-every", "0"]
        assert trainings.run(out, *again, hook="core.export = lambda *a, **k: None") == 0
        assert len(rows(out)) == 20


@pytest.mark.parametrize("resumed", [False, True])
def test_a_read_only_folder_is_refused_before_anything_begins(resumed, trainings, tmp_path):
    out = tmp_path / "run"
    with mounted(out):
        typed = flags(out, total_timesteps=BATCH)
        if resumed:
            assert trainings.run(out, *typed, hook="core.export = lambda *a, **k: None") == 0
            typed = ["--resume", "--total-timesteps", "640"]
        before = tree(out)
        subprocess.run(["mount", "-o", "remount,ro", str(out)], check=True)
        assert trainings.run(out, *typed) == 2
        assert "--out cannot be written to: " in complaint(out)
        assert "Read-only file system" in complaint(out)
        assert tree(out) == before


def test_a_folder_that_the_user_may_not_write_to_is_refused(trainings, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    try:
        assert trainings.run(tmp_path, *flags(tmp_path)) == 2
    finally:
        tmp_path.chmod(0o700)
    assert "--out cannot be written to: " in complaint(tmp_path)


@pytest.mark.parametrize(
    ("gone", "moment", "why"),
    [
        ("checkpoints_walker", "update", "No such file"),
        (".", "update", "No such file"),
        ("videos", "record_episode", "No such file|does not exist"),
        ("videos", "_write_gif", "the encoder failed"),
    ],
)
def test_a_folder_deleted_while_running_is_one_line(gone, moment, why, trainings, tmp_path):
    out = tmp_path / "run"
    hook = f"import shutil\nfunction, calls = core.{moment}, []\n"
    hook += "def delete(*args):\n    calls.append(1)\n"
    hook += f"    if len(calls) == 5 or {moment != 'update'}:\n"
    hook += f"        shutil.rmtree({str(out / gone)!r})\n"
    hook += f"    return function(*args)\ncore.{moment} = delete"
    assert trainings.run(out, *flags(out, **SETTINGS), hook=hook) == 1
    assert re.search(f"cannot be written: .*({why})", complaint(out))
    assert not look(out, [])
