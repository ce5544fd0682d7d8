"""Random wrong command lines: each is one line on standard error and code 2, and touches nothing.

Each is a right and cheap command with one mistake in it, so one that is wrongly let through ends
with code 0 within a second, and fails.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import shutil
import typing
import warnings
from pathlib import Path

import pytest
from helpers import flags, tiny, train_without_pictures, tree

import walker
import walker_core as core

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_pictures")]

LAST = f"run/{core.LAST}"


def flag_kinds(settings: type) -> dict[str, object]:
    fields = settings.__pydantic_fields__.items()
    return {core.flag_name(name): field.annotation for name, field in fields}


TRAINING, TESTING = flag_kinds(core.Config), flag_kinds(walker.Evaluation)
INTS = [flag for flag, kind in TRAINING.items() if kind is int]
FLOATS = [flag for flag, kind in TRAINING.items() if kind in (float, float | None)]
COURSES = [core.flag_name(name) for name in core.COURSES]
BOOLS = [flag for flag, kind in TRAINING.items() if kind is bool]
CHOICES = [flag for flag, kind in TRAINING.items() if typing.get_origin(kind) is typing.Literal]
KNOWN = {*TRAINING, *TESTING, *(f"no-{flag}" for flag in [*BOOLS, *TESTING])}
KNOWN |= {"config", "resume", "overwrite", "help", "h"}

# What may be typed: a command line holds no NUL, and a terminal no half of a surrogate pair.
TYPABLE = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
ODD = ["", " ", "-", "=", "a\nb", "\x1b[31m", "–", "%s", "{}", "x" * 5000, "[" * 300, "'", '"']
TEXT = st.one_of(st.text(TYPABLE, max_size=30), st.sampled_from(ODD))


def is_number(text: str) -> bool:
    try:
        return float(text) == float(text)
    except ValueError:
        return False


def is_known(word: str) -> bool:
    return word.split("=")[0].strip("-") in KNOWN or word.startswith("-h")


def pairs(names: list[str], values: st.SearchStrategy) -> st.SearchStrategy:
    """One of these flags and one of the values, as two words or joined by an equals sign."""
    words = st.tuples(st.sampled_from(names), values, st.booleans())
    return words.map(lambda w: [f"--{w[0]}={w[1]}"] if w[2] else [f"--{w[0]}", w[1]])


@st.composite
def typos(draw) -> list[str]:
    """A flag with one letter left out, doubled, or another."""
    name = draw(st.sampled_from(sorted(KNOWN - {"h"})))
    i = draw(st.integers(0, len(name) - 1))
    letter = draw(st.sampled_from(["", 2 * name[i], *"xq_."]))
    return [f"--{name[:i]}{letter}{name[i + 1 :]}", *draw(st.sampled_from([[], ["1"]]))]


STRAY = TEXT.filter(lambda text: text.strip() and not is_known(text))
NO_NUMBER = TEXT.filter(lambda text: not is_number(text) and not is_known(text))
OUT_OF_RANGE = st.sampled_from(["nan", "-1e300", "1e999", "-inf", "-1", "x"])
FILES = ["nosuch", "run", ".", "half.pt", "empty", "afile", "afile/x", "x" * 300]
KWARGS = ["gravity", "gravity=3", "=3", "max_episode_steps=x", "id=Pendulum-v1", "é=1"]
ENVS = ["", " ", "Taxi-v4", "Pendulum-v99", "nosuchmodule:X-v0", ":X", "a/b/c-v0", "-v1"]
EITHER = st.one_of(
    typos().filter(lambda words: not is_known(words[0])),
    STRAY.map(lambda text: [text]),
    pairs(["device"], TEXT.filter(lambda text: text not in ("auto", "cpu") and not is_known(text))),
    pairs(["env"], st.sampled_from(ENVS)),
    pairs(["seed"], st.sampled_from(["-1", "1.5", "", str(10**30 * -1)])),
)
WRONG_TRAINING = st.one_of(
    EITHER,
    st.sampled_from([[f"--{flag}"] for flag in [*INTS, *FLOATS, *CHOICES, "env", "config"]]),
    st.sampled_from([[f"--{flag}", *values] for flag in COURSES for values in ("", "123")]),
    pairs([*INTS, *FLOATS, *COURSES], NO_NUMBER),
    pairs(INTS, st.sampled_from(["1.5", "0x10", "1,000", "-7", "inf"])),
    pairs([name for name in FLOATS + COURSES if name != "failure-reward"], OUT_OF_RANGE),
    pairs(CHOICES, STRAY),
    pairs(BOOLS, STRAY),
    pairs(["config", "resume", "init-from"], st.sampled_from(FILES)),
    pairs(["env-kwargs"], st.sampled_from(KWARGS)),
    pairs(["episodes", "seconds"], st.just("3")),
    st.sampled_from([["--clip-reward", "1"], ["--clip-reward", "1", "1"], ["--ou", "new"]]),
    st.sampled_from([["--out", "afile"], ["--out", "run"], ["--resume", LAST, "--overwrite"]]),
)
WRONG_TESTING = st.one_of(
    EITHER,
    st.sampled_from([["--overwrite"], ["--resume"], ["--config", "run"], ["--episodes"]]),
    pairs(["episodes"], st.sampled_from(["0", "-1", "1.5"]) | NO_NUMBER),
    pairs(["seconds"], OUT_OF_RANGE | NO_NUMBER),
    pairs(["gamma", "num-envs"], st.just("1")),
    pairs(["record", "render"], STRAY),
)


@st.composite
def wrong_commands(draw) -> list[str]:
    """A right command for a tiny run, or test of one, with a mistake among its flags."""
    if draw(st.integers(0, 2)) == 0:
        return ["evaluate", LAST, "--episodes", "1", *draw(WRONG_TESTING)]
    mistake = draw(WRONG_TRAINING)
    groups: list[list[str]] = []
    for word in flags("new", total_timesteps=32):
        groups += [[word]] if word.startswith("--") else []
        groups[-1] += [] if word.startswith("--") else [word]
    # after the right value, as the last one counts
    groups = [group for group in groups if group[0] != mistake[0].partition("=")[0]]
    groups.insert(draw(st.integers(0, len(groups))), mistake)
    return list(itertools.chain(*groups))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a finished run in `run`, and files that are no checkpoints."""
    folder = tmp_path_factory.mktemp("wrong")
    train_without_pictures(tiny(folder / "run", total_timesteps=32))
    whole = (folder / "run" / core.LAST).read_bytes()
    (folder / "half.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "afile").write_text("[" * 100_000)
    (folder / "empty").touch()
    return folder


@hypothesis.settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=500,
    phases=[hypothesis.Phase.generate],  # to shrink one that trains takes long
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(argv=wrong_commands())
def test_a_wrong_command_is_one_line_and_touches_nothing(folder, argv):
    before = tree(folder)
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(out):
            with contextlib.redirect_stderr(err), warnings.catch_warnings(record=True) as warned:
                code = walker.main(argv)
        assert tree(folder) == before
    finally:
        shutil.rmtree(folder / "new", ignore_errors=True)
    assert (code, out.getvalue()) == (2, "")
    error = err.getvalue()
    assert error.startswith("walker.py: ")
    assert error.endswith("\n")
    assert error[:-1].isprintable()  # one line, no control characters
    assert 20 < len(error) <= 400
    assert [str(w.message) for w in warned if w.category is not DeprecationWarning] == []
