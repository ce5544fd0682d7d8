"""Random wrong command lines: each is one line on standard error and code 2, and touches nothing.

Each is a right and cheap command with one mistake in it, so one that is wrongly let through ends
with code 0 within a second, and fails.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import os
import shutil
import subprocess
import sys
import typing
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import flags, tiny, train_without_pictures, tree
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import walker
import walker_core as core

pytestmark = pytest.mark.usefixtures("no_pictures")

LAST = f"run/{core.LAST}"
KINDS = typing.get_type_hints(core.Config)
SETTINGS = {name.replace("_", "-"): kind for name, kind in KINDS.items()}
BOOLS = [name for name, kind in SETTINGS.items() if kind is bool]
CHOICES = [name for name, kind in SETTINGS.items() if typing.get_origin(kind) is typing.Literal]
INTS = [name for name, kind in SETTINGS.items() if kind in (int, tuple[int, ...])]
FLOATS = [name for name, kind in SETTINGS.items() if kind in (float, float | None)]
TRAINING = {*SETTINGS, "config", "resume", "overwrite"}
TESTING = {field.name for field in dataclasses.fields(walker.Evaluation)} - {"checkpoint"}

# What may be typed: a command line holds no NUL, and a terminal no half of a surrogate pair.
TYPABLE = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
HELP = ("-h", "--help")
TEXT = st.one_of(
    st.text(TYPABLE, max_size=30),
    st.sampled_from(["", " ", "-", "--", "=", "\n", "a\nb", "\x1b[31m", "–", "ÿ" * 9, "%s", "{}"]),
    st.sampled_from(
        ["x" * 5000, "x " * 900, "[" * 300, "1" * 5000 + "x", "../.", "~", "*", "'", '"']
    ),
).filter(lambda text: text not in HELP)
NAME = st.text("abcdefghijklmnopqrstuvwxyz-_", min_size=1, max_size=20)


def is_number(text: str, kind: Callable = float) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True


def known(name: str) -> bool:
    plain = name.replace("_", "-").strip("-").removeprefix("no-")
    return plain in TRAINING | TESTING or plain in ("help", "h")


@st.composite
def typos(draw, names: set[str]) -> list[str]:
    """A flag with one letter left out, doubled, or another."""
    name = draw(st.sampled_from(sorted(names)))
    i = draw(st.integers(0, len(name) - 1))
    letter = draw(st.sampled_from(["", 2 * name[i], *"xq_-."]))
    return [f"--{name[:i]}{letter}{name[i + 1 :]}", *draw(st.sampled_from([[], ["1"]]))]


def bounds_of(kind: object) -> list[tuple[str, float]]:
    """Each bound of the numbers in an annotation: ("ge", 0) of Annotated[float, Field(ge=0)]."""
    found = [bounds_of(part) for part in typing.get_args(kind)]
    for mark in getattr(kind, "__metadata__", ()):
        for bound in getattr(mark, "metadata", [mark]):
            names = [name for name in ("gt", "ge", "lt", "le") if hasattr(bound, name)]
            found.append([(name, getattr(bound, name)) for name in names])
    return list(itertools.chain(*found))


BOUNDS = {
    name: bounds_of(kind)
    for name, kind in typing.get_type_hints(core.Config, include_extras=True).items()
    if bounds_of(kind)
}


@st.composite
def out_of_range(draw) -> list[str]:
    name = draw(st.sampled_from(list(BOUNDS)))
    whole = KINDS[name] in (int, tuple[int, ...])
    wrong = [] if whole else ["nan", "NaN", "inf", "-inf", "1e999", "-nan"]
    for relation, bound in BOUNDS[name]:
        away = -1 if relation in ("gt", "ge") else 1
        wrong += [str(int(bound) + away), str(int(bound) + away * draw(st.integers(1, 10**30)))]
        wrong += [str(bound)] if relation in ("gt", "lt") else []
    return [f"--{name.replace('_', '-')}", draw(st.sampled_from(wrong))]


def test_the_bounds_of_all_numbers_are_known():
    numbers = (int, float, float | None, tuple[int, ...])
    bounded = {name for name, kind in KINDS.items() if kind in numbers} - {"failure_reward"}
    assert set(BOUNDS) == bounded
    assert BOUNDS["gamma"] == [("ge", 0), ("le", 1)]
    assert BOUNDS["target_kl"] == [("gt", 0)]


def valued(names: list[str], values: st.SearchStrategy, joined: bool = True) -> st.SearchStrategy:
    """A flag of these and one of the values, as two words or joined by an equals sign."""
    words = st.tuples(st.sampled_from(names), values, st.booleans())
    return words.map(lambda w: [f"--{w[0]}={w[1]}"] if w[2] and joined else [f"--{w[0]}", w[1]])


def wrong_env(text: str) -> bool:
    return ":" not in text or not text.split(":")[0].isidentifier()


STRAY = TEXT.filter(lambda text: text not in ("", "--") and not known(text.split("=")[0]))
UNKNOWN = NAME.filter(lambda name: not known(name)).map(lambda name: [f"--{name}"])
PATHS = st.one_of(
    st.sampled_from(
        ["nosuch", "run", ".", "", "text.pt", "half.pt", "empty", "afile", "afile/x", "x" * 300]
    ),
    STRAY.filter(lambda text: "/" not in text and not text.startswith("-")),
)
KWARGS = ["gravity", "gravity=3", "=", "=3", " ", "max_episode_steps=x", "max_episode_steps=0"]
KWARGS += ["id=Pendulum-v1", "max_episode_steps=[", "é=1", "max_episode_steps=" + "(" * 999]
ENVS = ["", " ", "Taxi-v4", "Pendulum-v99", "nosuchmodule:X-v0", ":X", "a/b/c-v0", "-v1"]

WRONG_NUMBERS = st.one_of(
    valued(INTS, TEXT.filter(lambda text: text.strip() and not is_number(text, int))),
    valued(INTS, st.sampled_from(["1.5", "1e3", "0x10", "1,000", "nan", "inf"])),
    valued(FLOATS, TEXT.filter(lambda text: text != "None" and not is_number(text))),
    valued(CHOICES, TEXT),
)
WRONG_TRAINING = st.one_of(
    UNKNOWN,
    st.sampled_from([["--overwrit"], ["--ou", "new"], ["--en", "Pendulum-v1"]]),  # abbreviated
    typos(TRAINING).filter(lambda words: not known(words[0])),
    st.sampled_from([[f"--{name}"] for name in [*INTS, *FLOATS, *CHOICES, "env", "out", "config"]]),
    WRONG_NUMBERS,
    out_of_range(),
    valued(BOOLS, STRAY),
    STRAY.map(lambda text: [text]),
    valued(["config", "resume", "init-from"], PATHS),
    st.sampled_from(KWARGS).map(lambda option: ["--env-kwargs", option]),
    valued(["env"], st.sampled_from(ENVS) | STRAY.filter(wrong_env)),
    valued(sorted(TESTING - TRAINING), st.sampled_from(["1", "3", "x"])),
    st.sampled_from(
        [["--clip-reward", "1"], ["--clip-reward", "1", "0"], ["--clip-reward", "1", "1"]]
    ),
    st.sampled_from([["--clip-reward", "1", "2", "3"], ["--out", "afile"], ["--out", "run"]]),
    st.just(["--resume", LAST, "--overwrite"]),
    st.just(["--resume", LAST, "--gamma", "0.5"]),
)
WRONG_TESTING = st.one_of(
    UNKNOWN,
    typos(TESTING).filter(lambda words: not known(words[0])),
    STRAY.map(lambda text: [text]),
    valued(sorted({*INTS, *FLOATS} - TESTING), st.sampled_from(["1", "0.5"])),
    st.sampled_from([["--overwrite"], ["--resume"], ["--config", "run"], ["--no-norm-obs"]]),
    st.sampled_from(
        [[f"--{name}"] for name in ("episodes", "seed", "seconds", "device", "env", "out")]
    ),
    valued(["episodes", "seed"], TEXT.filter(lambda text: not is_number(text, int))),
    valued(["episodes"], st.integers(-(10**30), 0).map(str)),
    valued(["seed"], st.integers(-(10**30), -1).map(str)),
    valued(["seed"], st.integers(2**32, 10**30).map(str)),
    valued(["seconds"], st.sampled_from(["0", "-1", "nan", "inf", "-inf", "x", ""])),
    valued(["device"], TEXT),
    valued(["env"], st.sampled_from(ENVS) | STRAY.filter(wrong_env)),
    valued(["record", "render"], STRAY),
)


@st.composite
def wrong_commands(draw) -> list[str]:
    """A right command for a tiny run with a mistake among its flags."""
    mistake = draw(WRONG_TRAINING)
    groups: list[list[str]] = []
    for word in flags("new", total_timesteps=32):
        groups += [[word]] if word.startswith("--") else []
        groups[-1] += [] if word.startswith("--") else [word]
    if draw(st.booleans()):  # typed rightly before: the last one counts
        return [*itertools.chain(*groups), *mistake]
    flag = mistake[0].partition("=")[0]
    groups = [group for group in groups if group[0] != flag]
    groups.insert(draw(st.integers(0, len(groups))), mistake)
    return list(itertools.chain(*groups))


@st.composite
def wrong_evaluations(draw) -> list[str]:
    """A right test of one episode with a mistake, or a wrong file."""
    if draw(st.integers(0, 5)) == 0:
        return ["evaluate", draw(PATHS), "--episodes", "1"]
    return ["evaluate", LAST, "--episodes", "1", *draw(WRONG_TESTING)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """A folder with a finished run in `run`, and files that are no checkpoints."""
    folder = tmp_path_factory.mktemp("wrong")
    train_without_pictures(tiny(folder / "run", total_timesteps=32))
    whole = (folder / "run" / core.LAST).read_bytes()
    (folder / "half.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "text.pt").write_text("weights, honestly\n")
    (folder / "afile").write_text("[" * 100_000)
    (folder / "empty").touch()
    with pytest.MonkeyPatch.context() as patch:  # tyro reads it again for every unknown flag
        patch.setattr(inspect, "getsource", functools.cache(inspect.getsource))
        yield folder


def said_by(argv: list[str]) -> tuple[int, str, str]:
    """The exit code and both outputs of a command in this process; warnings are errors."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            code = walker.main(argv)
    assert [str(w.message) for w in warned if w.category is not DeprecationWarning] == []
    return code, out.getvalue(), err.getvalue()


def check(code: int, out: str, err: str) -> None:
    assert code == 2, err
    assert out == ""
    assert err.startswith("walker.py: ")
    assert err.endswith("\n")
    assert err[:-1].isprintable()  # one line, no control characters
    assert len(err.removeprefix("walker.py: ").strip()) > 10
    assert len(err) <= 400


STABLE = settings(
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],  # to shrink one that trains takes long
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@settings(STABLE, max_examples=400)
@given(argv=wrong_commands())
def test_a_wrong_command_is_one_line_and_touches_nothing(folder, argv):
    refused_in(folder, argv)


@settings(STABLE, max_examples=200)
@given(argv=wrong_evaluations())
def test_a_wrong_evaluation_is_one_line_and_touches_nothing(folder, argv):
    refused_in(folder, argv)


def refused_in(folder: Path, argv: list[str]) -> None:
    before = tree(folder)
    try:
        with contextlib.chdir(folder):
            check(*said_by(argv))
        assert tree(folder) == before
    finally:
        shutil.rmtree(folder / "new", ignore_errors=True)


PROCESSES = [
    "--gama 0.9",
    "--gamma nan",
    "--num-envs",
    "stray",
    "--resume text.pt",
    "--config afile",
    "--env Nosuch-v0",
    "--env-kwargs gravity=3",
    "--episodes 3",
    "--out b\udcff --device tpu",  # a byte that is no UTF-8
]


@pytest.mark.parametrize("typed", PROCESSES)
def test_a_wrong_command_is_one_line_of_a_process_too(typed, folder):
    before = tree(folder)
    argv = [sys.executable, walker.__file__, *flags("new", total_timesteps=32), *typed.split()]
    words = [os.fsencode(word) for word in argv]
    done = subprocess.run(words, cwd=folder, capture_output=True, timeout=100)
    check(done.returncode, done.stdout.decode(), done.stderr.decode())
    assert tree(folder) == before
