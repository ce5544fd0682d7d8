"""A disk that is full, read-only or gone: one line, exit code 1, and the last good files stay."""

from __future__ import annotations

import contextlib
import re
import subprocess
from pathlib import Path

import pytest
from crash import checkpoint, look
from helpers import BATCH, flags, rows, tree

import walker_core as core

pytestmark = pytest.mark.slow
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
    "config.json": ("core", "open_run", 1, "", 500),
    "the first last.pt": ("Learner", "save", 1, core.LAST, 5000),
    "last.pt": ("Learner", "save", 3, core.LAST, 5000),
    "best.pt": ("Learner", "save", 2, core.BEST, 5000),
    "a row of metrics.csv": ("RunLog", "row", 5, "", 1000),
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
    assert f"/{writer.split()[-1]} cannot be " in line
    assert re.search("File too large|is the disk full", line)
    wrong = look(out, [])
    wrong.pop("torn", 0)
    assert not wrong
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
        assert str(out) in complaint(out)
        assert "Read-only file system" in complaint(out)
        assert tree(out) == before


@pytest.mark.parametrize(
    ("gone", "moment", "why", "code"),
    [
        ("checkpoints_walker", "core.update", "No such file", 1),
        ("videos", "viz.film", "", 0),  # a film is not worth a training
    ],
)
def test_a_folder_deleted_while_running_is_one_line(gone, moment, why, code, trainings, tmp_path):
    out = tmp_path / "run"
    hook = f"import shutil, viz\nfunction, calls = {moment}, []\n"
    hook += "def delete(*args, **how):\n    calls.append(1)\n"
    hook += f"    if len(calls) == 5 or {moment != 'core.update'}:\n"
    hook += f"        shutil.rmtree({str(out / gone)!r})\n"
    hook += f"    return function(*args, **how)\n{moment} = delete"
    assert trainings.run(out, *flags(out, **SETTINGS), hook=hook) == code
    said = Path(f"{out}.log").read_text()
    assert re.search(f"(cannot be written|no video): .*({why})", said)
    assert ("no video: " in said, "walker.py: " in said) == (code == 0, code == 1)
    assert not look(out, [])
