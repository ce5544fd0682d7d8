"""A damaged or forged checkpoint: refused in one line, or loaded as if it were unchanged."""

from __future__ import annotations

import io
import json
import math
import os
import random
import struct
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import same, tiny, train_without_pictures, tree

import walker
import walker_core as core

pytestmark = pytest.mark.usefixtures("no_pictures")
slow = pytest.mark.slow

FILE = "hostile.pt"
EVALUATE = ["evaluate", FILE, "--episodes", "1"]
RESUME = ["--resume", FILE, "--out", "new", "--total-timesteps", "160"]


@pytest.fixture(scope="module")
def honest(tmp_path_factory) -> bytes:
    """The last checkpoint of a run."""
    out = tmp_path_factory.mktemp("honest")
    train_without_pictures(tiny(out, eval_every=64))
    return (out / core.LAST).read_bytes()


@pytest.fixture
def state(honest, tmp_path, monkeypatch) -> dict[str, Any]:
    """What the checkpoint holds, to be changed. The current folder is an empty one."""
    monkeypatch.chdir(tmp_path)
    return torch.load(io.BytesIO(honest), weights_only=True)


def loaded() -> dict[str, Any] | None:
    """What FILE loads as; None if it is refused in one line that names it."""
    with warnings.catch_warnings(record=True) as warned:
        try:
            return core.load_checkpoint(FILE)
        except core.UserError as error:
            message = str(error)
    assert message.startswith(FILE)
    assert "\n" not in message
    assert warned == []
    return None


def refuses(argv: list[str], capfd) -> bool:
    """True if the command refuses FILE with one line and writes nothing; False if it runs."""
    before = tree(Path())
    capfd.readouterr()
    code = walker.main(argv)
    printed = capfd.readouterr()
    if code == 0:
        assert printed.err == ""
        return False
    assert code == 2
    assert printed.out == ""
    assert printed.err.startswith("walker.py: ")
    assert printed.err[:-1].isprintable()  # one line, no control characters
    assert len(printed.err) < 500
    assert tree(Path()) == before
    return True


def records_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {record.filename: archive.read(record) for record in archive.infolist()}


def store(records: dict[str, bytes]):
    """Write FILE as an archive of these records, with right checksums."""
    with zipfile.ZipFile(FILE, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)
        for record in archive.infolist():
            record.external_attr = 0  # as in a file of torch's


# ---- damage --------------------------------------------------------------------------------------


def central_headers(data: bytes) -> list[tuple[int, int]]:
    """Where each record's header in the archive's table of contents starts and ends."""
    spans = []
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        start, count = archive.start_dir, len(archive.infolist())
    for _ in range(count):
        end = start + 46 + sum(struct.unpack("<HHH", data[start + 28 : start + 34]))
        spans.append((start, end))
        start = end
    return spans


def check_flips(honest: bytes, bits) -> float:
    """Flip each of these bits, alone; returns the share of them that was refused."""
    Path(FILE).write_bytes(honest)
    expected, refused = loaded(), []
    for bit in bits:
        data = bytearray(honest)
        data[bit // 8] ^= 1 << bit % 8
        Path(FILE).write_bytes(data)
        found = loaded()
        assert found is None or same(found, expected), (bit // 8, bit % 8)
        refused.append(found is None)
    return np.mean(refused)


@pytest.mark.parametrize("count", [12, pytest.param(1000, marks=slow)])
def test_a_flipped_bit_anywhere_is_refused_or_changes_nothing(count, honest, state):
    bits = np.linspace(0, 8 * len(honest) - 1, count).astype(int)
    assert 0.3 <= check_flips(honest, map(int, bits)) < 1  # padding may be anything


def test_a_flipped_bit_of_the_weights_is_refused(honest, state):
    weights = state["agent"]["actor.0.weight"].numpy().tobytes()
    start = 8 * honest.index(weights)
    assert check_flips(honest, range(start, start + 8 * len(weights), 31)) == 1


def test_a_record_marked_as_a_folder_does_not_load_as_whatever_lies_in_memory(honest, state):
    """Torch does not read such a record, and gives out memory as it finds it."""
    attributes = [8 * (start + 38) + 4 for start, _ in central_headers(honest)]
    assert check_flips(honest, attributes) > 0


@slow
def test_every_flipped_bit_of_an_archives_headers_is_refused_or_changes_nothing(honest, state):
    spans = central_headers(honest)
    for start, stop in ((0, 64), spans[0], spans[-1], (spans[-1][1], len(honest))):
        assert check_flips(honest, range(8 * start, 8 * stop)) > 0


@pytest.mark.parametrize("count", [10, pytest.param(100, marks=slow)])
def test_a_truncated_file_is_refused(count, honest, state):
    for length in np.linspace(0, len(honest) - 1, count).astype(int):
        Path(FILE).write_bytes(honest[:length])
        assert loaded() is None, length


@slow
# torch's, of a pickle that it would not write
@pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:TypedStorage")
def test_a_forged_pickle_with_a_right_checksum_is_refused_or_loads(honest, state, capfd):
    records = records_of(honest)
    [name] = [name for name in records if name.endswith("data.pkl")]
    store(records)
    assert loaded() is not None
    draw = random.Random(2)
    refused = 0
    for _ in range(1000):
        data = bytearray(records[name])
        for _ in range(draw.choice((1, 1, 2, 8))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        store({**records, name: bytes(data)})
        refused += loaded() is None
    assert refused > 300  # the others are another checkpoint, as far as loading can tell
    assert capfd.readouterr().err == ""


# ---- memory and time -----------------------------------------------------------------------------


class Bytes:
    """A buffer of a terabyte, in a few bytes of a pickle that weights_only accepts."""

    def __reduce__(self):
        return bytearray, (10**12,)


def with_config(state: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {**state, "config": {**state["config"], **settings}}


def terabyte(state):
    return {**state, "extra": Bytes()}


def endless_list(state):
    endless = []
    endless.append(endless)
    return with_config(state, gamma=endless)


# runs a command with no more than so much memory than now; prints its code, seconds, and MiB
TRY = """
import json, resource, sys, time, torch, walker, walker_core
memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
virtual = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (virtual + (2 << 30), virtual + (2 << 30)))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
began, before = time.process_time(), memory()
code = walker.main(json.loads(sys.argv[1]))
print(json.dumps([code, time.process_time() - began, memory() - before]))
"""


def check_cost(argv: list[str]):
    """The command must refuse FILE within a few seconds and MiB."""
    command = [sys.executable, "-c", TRY, json.dumps(argv)]
    environ = {**os.environ, "PYTHONPATH": str(Path(walker.__file__).parent)}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environ)
    assert ended.returncode == 0, ended.stderr
    code, seconds, mebibytes = json.loads(ended.stdout)
    assert code == 2
    assert ended.stderr.count("\n") == 1
    assert seconds < 5
    assert mebibytes < 200


@slow
@pytest.mark.parametrize("argv", [EVALUATE, RESUME], ids=["evaluate", "resume"])
@pytest.mark.parametrize("forge", [terabyte, endless_list])
def test_no_forged_checkpoint_costs_memory_or_time(forge, argv, state):
    torch.save(forge(state), FILE)
    check_cost(argv)


# ---- values --------------------------------------------------------------------------------------

GONE = object()


def change(state: dict[str, Any], path: tuple, value: Any):
    """Replace or remove one entry; a function makes the new one from the old."""
    for key in path[:-1]:
        state = state[key]
    if value is GONE:
        del state[path[-1]]
    else:
        state[path[-1]] = value(state[path[-1]]) if callable(value) else value


VALUES = [
    *((path, value)
      for path in (("agent", "actor.0.weight"), ("obs_normalizer", "var"),
                   ("reward_normalizer", "mean"))
      for value in (GONE, "x", None, torch.zeros(7, 7))),
    (("agent",), {}), (("agent", "more"), torch.zeros(1)), (("agent", 3), torch.zeros(1)),
    (("optimizer",), GONE), (("optimizer",), "x"), (("optimizer", "state", 0), "x"),
    (("optimizer", "state"), "x"), (("optimizer", "state"), GONE),
    (("optimizer", "param_groups"), "x"), (("optimizer", "param_groups"), GONE),
    (("counters", "step"), "x"), (("counters", "step"), -3), (("counters", "wall_s"), math.nan),
    (("counters", 3), 1),
]  # fmt: skip
CONFIG_VALUES = [
    *(((part,), value) for part in ("config", "counters", *core.POLICY, "reward_normalizer")
      for value in (GONE, "x")),
    (("format",), "x\ny\x1b[31m"),
    (("config",), {3: 1}), (("config", "gama"), 0.9), (("config", "gamma"), "x"),
    (("config", "learning_rate"), torch.zeros(3)), (("config", "num_envs"), 10**9),
    (("config", "actor_hidden"), [5]), (("config", "layer_norm"), True),
    (("config", "env"), "x\ny\x1b[31m-v1"), (("config", "env"), "Pendulum-v" + "1" * 5000),
    (("config", "env_kwargs"), ["max_episode_steps=" + "-" * 100_000 + "1"]),
    (("config",), lambda config: {**config, "env": "CartPole-v1", "env_kwargs": []}),
]  # fmt: skip


def some_fast(cases: list) -> list:
    """All cases as parameters; all but every eighth are slow."""
    return [pytest.param(*case, marks=[slow] if i % 8 else []) for i, case in enumerate(cases)]


def title(value: Any) -> str:
    if isinstance(value, tuple):
        return ".".join(map(str, value))
    return "changed" if callable(value) else "gone" if value is GONE else ascii(value)[:24]


@pytest.mark.parametrize(("path", "value"), some_fast(VALUES), ids=title)
def test_a_wrong_value_is_refused_before_training(path, value, state):
    change(state, path, value)
    torch.save(state, FILE)
    with pytest.raises(core.UserError) as caught, warnings.catch_warnings(action="error"):
        core.prepare_learner(tiny(eval_every=64), FILE)
    assert str(caught.value).startswith(FILE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("path", "value"), some_fast(CONFIG_VALUES), ids=title)
def test_a_part_that_every_command_reads_is_refused_by_each_in_one_line(path, value, state, capfd):
    change(state, path, value)
    torch.save(state, FILE)
    for argv in (EVALUATE, RESUME):
        assert refuses(argv, capfd)
