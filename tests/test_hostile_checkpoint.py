"""A checkpoint that came broken, or from somebody who means harm: one line, or as if unchanged."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LEARNED, flags, same, tiny, train_without_pictures, tree

import walker
import walker_core as core

pytestmark = pytest.mark.usefixtures("no_pictures")

FILE = "hostile.pt"
COMMANDS = {
    "evaluate": ["evaluate", FILE, "--episodes", "1"],
    "resume": ["--resume", FILE, "--out", "new", "--total-timesteps", "160"],
    "init-from": flags("new", init_from=FILE, total_timesteps=32),
}
EACH_COMMAND = pytest.mark.parametrize("command", COMMANDS)


@pytest.fixture(scope="module")
def honest(tmp_path_factory) -> bytes:
    """The last checkpoint of a run."""
    out = tmp_path_factory.mktemp("honest")
    train_without_pictures(tiny(out, eval_every=64))
    return (out / core.LAST).read_bytes()


@pytest.fixture(scope="module")
def expected(honest, tmp_path_factory) -> dict[str, Any]:
    """What each command does with the checkpoint as it was written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("expected"))
        patch.setattr(core, "export", lambda *args, **kwargs: None)
        Path(FILE).write_bytes(honest)
        return {command: done(command)[1] for command in COMMANDS}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty folder, and the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def state(honest) -> dict[str, Any]:
    """What the checkpoint holds, to be changed."""
    return torch.load(io.BytesIO(honest), weights_only=True)


def done(command: str) -> tuple[int, Any]:
    """The exit code, and what the command has computed from the checkpoint, if anything."""
    acted = []

    def act_once(act, config, seeds):
        acted.append(act(np.linspace(-3, 3, 96, dtype=np.float32).reshape(32, 3)).tolist())
        return np.zeros(1), np.ones(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "evaluate", act_once)
        code = walker.main(COMMANDS[command])
    if not Path("new", core.LAST).exists():
        return code, acted
    trained = core.load_checkpoint(Path("new", core.LAST))
    trained["counters"].pop("wall_s")
    shutil.rmtree("new")
    return code, {part: trained[part] for part in (*LEARNED, "counters")}


def refuses(command: str, expected: dict[str, Any], folder: Path, capfd) -> bool:
    """True where the command refuses the file, False where it does as with the honest one.

    Anything else fails: a traceback, a warning, two lines, other values, a file written in vain.
    """
    before = tree(folder)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        code, did = done(command)
    printed = capfd.readouterr()
    assert [str(w.message) for w in warned if w.category is not DeprecationWarning] == []
    if code == 0:
        assert same(did, expected[command])
        assert printed.err == ""
        return False
    assert code == 2
    assert printed.out == ""
    assert printed.err.startswith("walker.py: ")
    assert printed.err.endswith("\n")
    assert printed.err[:-1].isprintable(), printed.err  # one line, no control characters
    assert len(printed.err) < 2000
    assert tree(folder) == before
    return True


def quietly_loaded() -> dict[str, Any] | None:
    """The file's state, or None where it is refused; a warning is an error."""
    try:
        with warnings.catch_warnings(action="error"):
            return core.load_checkpoint(FILE)
    except core.UserError as error:
        said = str(error)
    assert said.startswith(FILE)
    assert said.isprintable()
    return None


def stored(records: dict[str, bytes], file: Any) -> None:
    """An archive of these records, with right checksums, as torch writes it."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def records_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {record.filename: archive.read(record) for record in archive.infolist()}


# ---- damage --------------------------------------------------------------------------------------


@EACH_COMMAND
def test_a_checkpoint_cut_at_any_hundredth_is_refused(command, honest, expected, folder, capfd):
    for percent in range(100):
        Path(FILE).write_bytes(honest[: len(honest) * percent // 100])
        assert refuses(command, expected, folder, capfd), percent


def test_a_thousand_flipped_bits_are_each_refused_or_change_nothing(
    honest, state, expected, folder, capfd
):
    draw = random.Random(1)
    stretch = 8 * len(honest) / 1000
    refused = 0
    for i in range(1000):
        bit = int((i + draw.random()) * stretch)
        data = bytearray(honest)
        data[bit // 8] ^= 1 << bit % 8
        Path(FILE).write_bytes(data)
        if i % 40 == 0:
            was_refused = [refuses(command, expected, folder, capfd) for command in COMMANDS]
            assert len(set(was_refused)) == 1, bit
        loaded = quietly_loaded()
        assert loaded is None or same(loaded, state), bit
        refused += loaded is None
    assert refused > 300  # padding between records may be anything
    assert capfd.readouterr().err == ""


def test_a_forged_pickle_with_a_right_checksum_is_refused_or_changes_nothing(honest, folder, capfd):
    records = records_of(honest)
    [name] = [name for name in records if name.endswith("data.pkl")]
    draw = random.Random(2)
    refused = 0
    for _ in range(1000):
        data = bytearray(records[name])
        for _ in range(draw.choice((1, 1, 2, 8))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        stored(records | {name: bytes(data)}, FILE)
        refused += quietly_loaded() is None
    assert refused > 300  # others are another checkpoint, as far as loading can tell
    assert capfd.readouterr().err == ""


# ---- code ----------------------------------------------------------------------------------------


class Burglar:
    """Runs code of its own when it is unpickled."""

    def __init__(self, function: Callable, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self):
        return self.call


def as_zip(value: Any, state: dict[str, Any]) -> None:
    torch.save(state | {"extra": value}, FILE)


def as_a_part(value: Any, state: dict[str, Any]) -> None:
    torch.save(state | {"counters": value}, FILE)


def as_pickle(value: Any, state: dict[str, Any]) -> None:
    Path(FILE).write_bytes(pickle.dumps(value))


def as_legacy(value: Any, state: dict[str, Any]) -> None:
    torch.save(state | {"extra": value}, FILE, _use_new_zipfile_serialization=False)


@EACH_COMMAND
@pytest.mark.parametrize("write", [as_zip, as_a_part, as_pickle, as_legacy])
@pytest.mark.parametrize("function", [os.system, eval, os.mkdir], ids=lambda f: f.__name__)
def test_no_code_that_a_file_brings_is_run(
    function, write, command, state, expected, folder, capfd, tmp_path_factory
):
    evidence = tmp_path_factory.mktemp("evidence") / "burgled"
    what = {os.system: f"mkdir {evidence}", eval: f"__import__('os').mkdir({str(evidence)!r})"}
    write(Burglar(function, what.get(function, str(evidence))), state)
    assert refuses(command, expected, folder, capfd)
    assert not evidence.exists()
    if write is as_pickle:
        pickle.loads(Path(FILE).read_bytes())
    else:
        torch.load(FILE, weights_only=False)
    assert evidence.exists()  # it would have


# ---- archives ------------------------------------------------------------------------------------


def torchscript(records: dict[str, bytes]) -> None:
    stored(records | {"constants.pkl": b"", "archive/constants.pkl": pickle.dumps(())}, FILE)


def twice(records: dict[str, bytes]) -> None:
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(FILE, "w") as archive:
        for name, data in [*records.items(), *records.items()]:
            archive.writestr(name, data)


def outside(records: dict[str, bytes]) -> None:
    stored(records | {"../outside": b"x", "/outside": b"x"}, FILE)


def bz2(records: dict[str, bytes]) -> None:
    stored(records, FILE)
    with zipfile.ZipFile(FILE) as archive:
        position = archive.start_dir + 10
    data = bytearray(Path(FILE).read_bytes())
    data[8] = data[position] = zipfile.ZIP_BZIP2
    Path(FILE).write_bytes(data)


def encrypted(records: dict[str, bytes]) -> None:
    stored(records, FILE)
    with zipfile.ZipFile(FILE) as archive:
        position = archive.start_dir + 8
    data = bytearray(Path(FILE).read_bytes())
    data[6] |= 1
    data[position] |= 1
    Path(FILE).write_bytes(data)


def nothing(records: dict[str, bytes]) -> None:
    stored({}, FILE)


@EACH_COMMAND
@pytest.mark.parametrize("write", [torchscript, twice, outside, bz2, encrypted, nothing])
def test_an_archive_that_torch_would_not_write_is_refused_or_changes_nothing(
    write, command, honest, expected, folder, capfd
):
    write(records_of(honest))
    refuses(command, expected, folder, capfd)
    assert not Path("../outside").exists()


def zeros(gigabytes: int) -> bytes:
    """A raw deflate stream of so many GB of zeros."""
    press = zlib.compressobj(9, wbits=-15)
    first = press.compress(bytes(1 << 24)) + press.flush(zlib.Z_FULL_FLUSH)
    return first * (gigabytes * 64) + press.flush()


def bomb(name: str, gigabytes: int, declared: int) -> bytes:
    """An archive whose one record inflates to more than it says, or to what it says."""
    archive, stream = io.BytesIO(), zeros(gigabytes)
    with zipfile.ZipFile(archive, "w") as writer:
        writer.writestr(name, stream)
        start, record = writer.start_dir, writer.infolist()[0]
    data = bytearray(archive.getvalue())
    for offset in (8, start + 10):
        data[offset] = zipfile.ZIP_DEFLATED
    for offset in (record.header_offset + 22, start + 24):
        data[offset : offset + 4] = declared.to_bytes(4, "little")
    return bytes(data)


def quilt(records: int) -> bytes:
    """An archive each of whose records holds all that follow: 1 MB, in which lie GB unpacked."""
    data, entries = bytes(1 << 20), []
    for i in range(records):
        name = f"archive/data/{i}".encode()
        sizes = struct.pack("<IIIHH", zlib.crc32(data), len(data), len(data), len(name), 0)
        data = struct.pack("<4s5H", b"PK\3\4", 20, 0, 0, 0, 0) + sizes + name + data
        entries.append((sizes, name, len(data)))
    table = b""
    for sizes, name, from_end in entries:
        fixed = struct.pack("<4s6H", b"PK\1\2", 20, 20, 0, 0, 0, 0)
        table += fixed + sizes + struct.pack("<HHHII", 0, 0, 0, 0, len(data) - from_end) + name
    end = struct.pack("<4s4HIIH", b"PK\5\6", 0, 0, records, records, len(table), len(data), 0)
    return data + table + end


class Bytes:
    """A buffer of a terabyte, in a few bytes of a pickle that weights_only lets pass."""

    def __reduce__(self):
        return bytearray, (10**12,)


# Runs each command in turn, with no more than 8 GB: prints its code, and the most memory so far.
TRIES = """
import json, resource, sys, walker
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
for argv in json.loads(sys.argv[1]):
    try:
        code = walker.main(argv)
    except BaseException as error:
        code = repr(error)[:200]
    print(json.dumps([code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024]))
"""


def with_config(state: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return state | {"config": state["config"] | settings}


def wide(state: dict[str, Any]) -> dict[str, Any]:
    """Sizes in the config that are those of the weights, which are one number seen very often."""
    one, agent = torch.zeros(1), dict(state["agent"])
    for name, shape in {"0.weight": (10**9, 3), "0.bias": (10**9,), "2.weight": (1, 10**9)}.items():
        agent[f"actor.{name}"] = one.expand(shape)
    return with_config(state, actor_hidden=[10**9]) | {"agent": agent}


def test_no_checkpoint_eats_the_memory(state, honest, folder):
    torch.save(with_config(state, actor_hidden=[10**9, 10**9]), "hidden.pt")
    torch.save(wide(state), "wide.pt")
    state["counters"] |= {"step": 0, "iteration": 0}  # of no batch size
    torch.save(with_config(state, num_envs=10**9), "envs.pt")
    torch.save(with_config(state, rollout_steps=10**12), "steps.pt")
    torch.save(state | {"extra": Bytes()}, "bytes.pt")
    Path("bomb.pt").write_bytes(bomb("archive/data.pkl", 3, 3 << 30))
    Path("liar.pt").write_bytes(bomb("archive/data.pkl", 2, 100))
    Path("quilt.pt").write_bytes(quilt(1000))
    Path("honest.pt").write_bytes(honest)
    evaluations = [["evaluate", "honest.pt", "--episodes", "1"]]
    names = ("hidden.pt", "wide.pt", "bytes.pt", "bomb.pt", "liar.pt", "quilt.pt")
    evaluations += [["evaluate", name, "--episodes", "1"] for name in names]
    resumes = [["--resume", name] for name in ("envs.pt", "steps.pt", *names)]
    before = tree(folder)
    command = [sys.executable, "-c", TRIES, json.dumps([*evaluations, *resumes])]
    path = str(Path(walker.__file__).parent)
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": path}
    )
    codes, peaks = zip(
        *(json.loads(line) for line in ended.stdout.splitlines() if line.startswith("[")),
        strict=True,
    )
    tried = [" ".join(argv[:2]) for argv in (*evaluations, *resumes)]
    assert dict(zip(tried, codes, strict=True)) == dict.fromkeys(tried, 2) | {tried[0]: 0}
    assert peaks[-1] < peaks[0] + 200, dict(zip(tried, peaks, strict=True))  # MB
    assert len(ended.stderr.splitlines()) == len(tried) - 1, ended.stderr
    assert tree(folder) == before


# ---- values --------------------------------------------------------------------------------------

GONE = object()
NAN, INF = math.nan, math.inf


def change(state: dict[str, Any], path: tuple, value: Any) -> None:
    """Set one entry, or remove it; a function makes the new one from the old."""
    for key in path[:-1]:
        state = state[key]
    if value is GONE:
        del state[path[-1]]
    else:
        state[path[-1]] = value(state[path[-1]]) if callable(value) else value


def changes() -> Iterator[tuple[str, tuple, Any]]:
    """The commands that must refuse it, where it is, and what is written there."""
    reads_all = "evaluate resume init-from"
    values = ("x", None, [1.0], {}, lambda t: t * NAN, lambda t: t * INF, lambda t: t.to("meta"))
    for value in (*values, GONE, torch.zeros(7, 7), lambda t: t.to_sparse() if t.ndim else "x"):
        for path in (("agent", "actor.0.weight"), ("agent", "raw_std"), ("obs_normalizer", "var")):
            yield reads_all, path, value
        yield "resume", ("reward_normalizer", "mean"), value
        yield "resume", ("optimizer", "state", 0, "exp_avg"), value
    for dtype in (torch.int64, torch.bool, torch.float16, torch.complex64):
        yield reads_all, ("agent", "actor.0.weight"), lambda t, dtype=dtype: t.to(dtype)
        yield reads_all, ("obs_normalizer", "mean"), lambda t, dtype=dtype: t.to(dtype)
        yield "resume", ("reward_normalizer", "var"), lambda t, dtype=dtype: t.to(dtype)
        yield "resume", ("optimizer", "state", 0, "exp_avg"), lambda t, dtype=dtype: t.to(dtype)
    for name in ("obs_normalizer", "reward_normalizer"):
        reader = reads_all if name == "obs_normalizer" else "resume"
        for number in (-5.0, NAN):
            yield reader, (name, "count"), torch.tensor(number, dtype=torch.float64)
        yield reader, (name, "var"), lambda t: -t
    for part in ("agent", "obs_normalizer", "reward_normalizer"):
        reader = "resume" if part == "reward_normalizer" else reads_all
        for key in ("more", 3):
            yield reader, (part, key), torch.zeros(1)
    for part in ("agent", "obs_normalizer", "config", "counters", "optimizer", "reward_normalizer"):
        reader = reads_all if part in ("agent", "obs_normalizer") else "resume"
        for value in (GONE, None, "x", {}, [], torch.zeros(3)):
            yield reader, (part,), value

    for name in ("step", "iteration", "wall_s", "solved_step", "solved_wall_s"):
        for value in ("x", -3, NAN, torch.zeros(3), [1]):
            yield "resume", ("counters", name), value
    for value in ("x", NAN, [1.0]):
        yield "", ("counters", "best_return"), value  # best.pt's counts
    for value in (1.5, None, True, -(10**30)):  # one that might be right is another checkpoint
        yield "resume", ("counters", "step"), value
        yield "resume", ("counters", "iteration"), value
    for name in ("step", "iteration"):
        yield "resume", ("counters", name), GONE
    for key in ("more", 3):
        yield "resume", ("counters", key), 1

    for value in (3, {}, GONE, {0: {}}, {"x": {}}):
        yield "resume", ("optimizer", "state"), value
    for value in (3, [], "x", ["x"], [{}], GONE):
        yield "resume", ("optimizer", "param_groups"), value
    yield "", ("optimizer", "param_groups"), lambda groups: groups * 2
    for value in ("x", {}, GONE):
        yield "resume", ("optimizer", "state", 0), value
    yield "resume", ("optimizer", "state", 99), {"step": torch.zeros(())}
    yield "resume", ("optimizer", "state", 0, "exp_avg_sq"), lambda t: -t - 1
    for value in ("x", torch.tensor(-3.0), torch.tensor(NAN), torch.zeros(4), GONE):
        yield "resume", ("optimizer", "state", 0, "step"), value
    group = ("optimizer", "param_groups", 0)
    for value in ("x", torch.zeros(3), torch.tensor(NAN), torch.tensor(-1.0), GONE):
        yield "resume", (*group, "lr"), value
    for key, value in {
        **{"betas": "xy", "eps": NAN, "amsgrad": True, "maximize": True, "weight_decay": 1e9},
        **{"params": [0], "fused": False, "capturable": True, "differentiable": True},
        **{"foreach": {}, "decoupled_weight_decay": [torch.zeros(3)]},
    }.items():
        for wrong in (value, GONE, {}):
            yield "", (*group, key), wrong

    reads_config = "evaluate resume"
    for key, value in {
        **{"gama": 0.9, "gamma": "x", "env": 5, "env_kwargs": 5, "actor_hidden": 64, "seed": 1.5},
        **{"activation": "gelu", "device": "tpu", "init_from": 5, "learning_rate": torch.zeros(3)},
        **{"clip_obs": torch.ones(2), "clip_reward": [1], "num_envs": NAN, "critic_hidden": []},
        **{"layer_norm": 1, "norm_obs": "no", "total_timesteps": -1, "init_std": INF, 3: 4},
    }.items():
        yield reads_config, ("config", key), value
    for value in (
        "Nosuch-v0",
        "",
        " ",
        "x\ny\x1b[31m-v1",
        "Pendulum-v" + "1" * 5000,
        "x" * 100_000,
    ):
        yield reads_config, ("config", "env"), value
    for value in ("x", "id=CartPole-v1", "max_episode_steps=x", "gravity=3"):
        yield reads_config, ("config", "env_kwargs"), [value]
    yield reads_config, ("config", "env_kwargs"), ["max_episode_steps=" + "-" * 100_000 + "1"]
    yield reads_config, ("config",), lambda config: config | {3: 1, "gama": 1}
    yield reads_config, ("config", "actor_hidden"), [5]
    yield reads_config, ("config", "layer_norm"), True
    yield reads_config, ("config", "env"), "MountainCarContinuous-v0"
    yield (
        reads_config,
        ("config",),
        lambda config: config | {"env": "MountainCarContinuous-v0", "env_kwargs": []},
    )

    for value in (0, 2, -1, None, "1", [1], torch.zeros(3), "x\ny\x1b[31m", "x" * 100_000, GONE):
        yield reads_all, ("format",), value
    yield "", ("version",), "x\ny"


def title(change: Any) -> str:
    _, path, value = change
    made = "changed" if callable(value) else "gone" if value is GONE else ascii(value)[:24]
    return f"{'.'.join(map(str, path))}={made}"


CHANGES = list(changes())


@pytest.mark.parametrize("changed", CHANGES, ids=title)
def test_a_wrong_value_is_refused_by_who_reads_it_or_changes_nothing(
    changed, state, expected, folder, capfd
):
    readers, path, value = changed
    change(state, path, value)
    torch.save(state, FILE)
    for command in COMMANDS:
        assert refuses(command, expected, folder, capfd) or command not in readers, command


def test_a_checkpoint_does_not_say_where_its_run_goes_on(state, folder):
    torch.save(with_config(state, out="elsewhere"), FILE)
    code = walker.main(["--resume", FILE, "--total-timesteps", "160"])
    assert code == 2 or Path(core.LAST).exists()
    assert not Path("elsewhere").exists()
