"""Checkpoints: everything comes back to the bit, nothing damaged or foreign ever loads."""

from __future__ import annotations

import dataclasses
import errno
import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import LEARNED, flags, learned, same, tiny, train_without_pictures, tree

import walker
import walker_core as core
from walker_core import UserError

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The last checkpoint of a run, which must not be changed."""
    out = tmp_path_factory.mktemp("checkpoint")
    train_without_pictures(tiny(out, eval_every=64, layer_norm=True))
    return out / core.LAST


@pytest.fixture(scope="module")
def state(trained):
    return core.load_checkpoint(trained)


def write(state, path: Path) -> Path:
    torch.save(state, path)
    return path


# ---- what a checkpoint holds ---------------------------------------------------------------------


def test_everything_comes_back_to_the_bit(trained, state, tmp_path):
    settings = {"out": str(tmp_path), "eval_every": 64, "layer_norm": True, "seed": 9}
    learner = core.Learner(tiny(**settings))  # other weights, statistics and counters
    torch.manual_seed(9)
    assert not same(learner.agent.state_dict(), state["agent"])
    learner.load(state, trained, core.LEARNED)
    learner.counters = core.checked(core.Counters, state["counters"], trained)
    learner.save("again.pt")
    again = core.load_checkpoint(tmp_path / "again.pt")
    assert again.pop("config").pop("seed") == 9
    assert same(again, {name: value for name, value in state.items() if name != "config"})


def test_a_checkpoint_holds_all_that_training_changed(state, tmp_path):
    torch.manual_seed(1)
    learner = core.Learner(tiny(tmp_path, layer_norm=True))
    torch.manual_seed(1)
    learner.save("start.pt")
    start = core.load_checkpoint(tmp_path / "start.pt")
    for part in LEARNED:
        assert not same(state[part], start[part]), part
    assert set(start) == {*LEARNED, "format", "version", "config", "counters"}
    assert state["version"] == core.__version__
    counters = state["counters"]
    assert (counters["step"], counters["iteration"]) == (128, 4)
    assert counters["wall_s"] > 0
    assert np.isfinite(counters["best_return"])
    assert len(state["optimizer"]["state"]) == len(list(learner.agent.parameters()))
    assert all(entry["step"] > 0 for entry in state["optimizer"]["state"].values())
    assert state["obs_normalizer"]["count"] > 100
    assert 100 < state["reward_normalizer"]["count"] <= 128
    config = tiny(eval_every=64, layer_norm=True)
    assert core.checked(core.Config.for_env, state["config"], "last.pt") == config


def test_a_checkpoint_is_tensors_and_plain_values_only(trained):
    plain = (bool, int, float, str, type(None), torch.Tensor)

    def check(value):
        if isinstance(value, dict):
            assert all(type(key) in (str, int) for key in value)
            value = list(value.values())
        if isinstance(value, list | tuple):
            for item in value:
                check(item)
        else:
            assert isinstance(value, plain), type(value)
            assert not type(value).__module__.startswith("numpy")

    check(torch.load(trained, weights_only=True))


def test_a_learner_acts_the_same_after_loading(trained, state):
    learner, other = (core.Learner(tiny(layer_norm=True, seed=seed)) for seed in (1, 2))
    learner.load(state, trained, core.LEARNED)
    other.load(state, trained, core.POLICY)
    obs = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    assert np.array_equal(learner.act(obs), other.act(obs))
    assert np.ptp(learner.act(obs)) > 0


# ---- writing -------------------------------------------------------------------------------------


def test_a_write_that_fails_is_a_clear_error_and_leaves_the_old_file_and_no_other(
    tmp_path, monkeypatch
):
    learner = core.Learner(tiny(tmp_path))
    learner.save("last.pt")
    before, write_bytes = tree(tmp_path), Path.write_bytes

    def out_of_space(path, data):
        write_bytes(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", out_of_space)
    with pytest.raises(core.TrainingError) as caught:
        learner.save("last.pt")
    assert str(caught.value) == f"{tmp_path}/last.pt cannot be written: No space left on device"
    assert tree(tmp_path) == before


def test_a_crash_while_writing_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "some.txt"
    path.write_text("old")
    with core.atomic_path(path) as temporary:
        assert temporary.parent == path.parent  # else the move would not be atomic
        temporary.write_text("new, half wri")
        assert path.read_text() == "old"
    assert path.read_text() == "new, half wri"
    assert tree(tmp_path) == {"some.txt": b"new, half wri"}


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("replace"), replace(*paths)))
    core.Learner(tiny(tmp_path)).save("last.pt")
    assert done == ["fsync", "replace"]


# ---- damage --------------------------------------------------------------------------------------


def loads_as(data: bytes, path: Path) -> dict | None:
    """What the bytes load as; None where they are refused. Anything else is an error."""
    path.write_bytes(data)
    try:
        return core.load_checkpoint(path)
    except UserError as error:
        said = str(error)
    assert said.startswith(str(path))
    assert "\n" not in said
    return None


def flipped(data: bytes, position: int, bits: int) -> bytes:
    return data[:position] + bytes([data[position] ^ bits]) + data[position + 1 :]


def central_headers(path: Path) -> list[tuple[int, int]]:
    """Where each record's header in the archive's table of contents starts and ends."""
    data, spans = path.read_bytes(), []
    with zipfile.ZipFile(path) as archive:
        start, count = archive.start_dir, len(archive.infolist())
    for _ in range(count):
        assert data[start : start + 4] == b"PK\x01\x02"
        end = start + 46 + sum(struct.unpack("<HHH", data[start + 28 : start + 34]))
        spans.append((start, end))
        start = end
    return spans


def test_a_flipped_byte_anywhere_is_refused_or_changes_nothing(trained, state, tmp_path):
    data = trained.read_bytes()
    refused = 0
    for position in np.linspace(0, len(data) - 1, 60).astype(int):
        for bits in (0x01, 0x80, 0xFF):
            found = loads_as(flipped(data, position, bits), tmp_path / "flipped.pt")
            assert found is None or same(found, state), (position, bits)
            refused += found is None
    assert refused > 90  # padding between records may be anything


def test_every_flipped_bit_of_an_archives_headers_is_refused_or_changes_nothing(
    trained, state, tmp_path
):
    data = trained.read_bytes()
    spans = central_headers(trained)
    local = (0, 64)  # the first record's own header
    end = (spans[-1][1], len(data))  # the archive's end
    for start, stop in (local, spans[0], end):
        for position in range(start, stop):
            for bit in range(8):
                found = loads_as(flipped(data, position, 1 << bit), tmp_path / "flipped.pt")
                assert found is None or same(found, state), (position, bit)


def test_a_record_marked_as_a_folder_does_not_load_as_whatever_lies_in_memory(
    trained, state, tmp_path
):
    data = trained.read_bytes()
    for start, _ in central_headers(trained):
        found = loads_as(flipped(data, start + 38, 0x10), tmp_path / "flipped.pt")
        assert found is None or same(found, state), start


def test_a_truncated_file_is_refused(trained, tmp_path):
    data = trained.read_bytes()
    lengths = {0, 1, 4, 30, 100, len(data) - 1, len(data) - 22, len(data) - 100}
    for length in sorted(lengths | set(range(0, len(data), len(data) // 23))):
        assert loads_as(data[:length], tmp_path / "short.pt") is None, length


def test_the_message_of_damaged_weights_names_the_file_and_says_damaged(trained, tmp_path):
    with zipfile.ZipFile(trained) as archive:
        record = max(archive.infolist(), key=lambda record: record.file_size)
    path = tmp_path / "flipped.pt"
    inside = record.header_offset + record.file_size // 2
    path.write_bytes(flipped(trained.read_bytes(), inside, 1))
    with pytest.raises(UserError, match="damaged"):
        core.load_checkpoint(path)


# ---- foreign files -------------------------------------------------------------------------------


class Burglar:
    """Runs code of its own when it is unpickled."""

    def __init__(self, evidence: Path) -> None:
        self.evidence = evidence

    def __reduce__(self):
        return os.system, (f"touch {self.evidence}",)


def test_loading_runs_no_code_that_a_file_brings(state, tmp_path):
    evidence = tmp_path / "evidence"
    path = write(state | {"extra": Burglar(evidence)}, tmp_path / "a.pt")
    bare = tmp_path / "b.pt"
    bare.write_bytes(pickle.dumps(Burglar(evidence)))
    for file in (path, bare):
        with pytest.raises(UserError, match="is no checkpoint"):
            core.load_checkpoint(file)
        assert not evidence.exists()
    torch.load(path, weights_only=False)
    assert evidence.exists()  # it would have


@pytest.mark.parametrize(
    "foreign",
    [
        {"model": torch.zeros(2)},
        [torch.zeros(2)],
        torch.zeros(2),
        {"format": 1, "config": None},
        {"format": 1, "config": {}},
        {"format": 1, "config": {"env": "Pendulum-v1"}, "agent": {}, "obs_normalizer": {}},
        {"format": 1, "config": {"env": "Pendulum-v1"}, "agent": 3, "obs_normalizer": []},
    ],
    ids=["dict", "list", "tensor", "no config", "hollow", "empty", "numbers"],
)
def test_a_foreign_file_is_one_line_and_code_2(foreign, tmp_path, capsys):
    path = write(foreign, tmp_path / "foreign.pt")
    assert walker.main(["evaluate", str(path), "--episodes", "1"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"walker.py: {path}")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("part", [*LEARNED, "counters"])
def test_a_checkpoint_without_one_of_its_parts_is_one_line(part, state, tmp_path, capsys):
    whole = {name: value for name, value in state.items() if name != part}
    path = write(whole, tmp_path / "part.pt")
    assert walker.main(["--resume", str(path), "--out", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"walker.py: {path}")
    assert error.count("\n") == 1


@pytest.mark.parametrize("other", [0, 2, 99, None, "1"])
def test_another_format_is_refused_with_both_numbers(other, state, tmp_path):
    path = write(state | {"format": other, "version": "7.8.9"}, tmp_path / "other.pt")
    with pytest.raises(UserError) as caught:
        core.load_checkpoint(path)
    for part in (str(path), "7.8.9", str(other), str(core.CHECKPOINT_FORMAT)):
        assert part in str(caught.value)


def test_networks_of_other_sizes_are_one_line(trained, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = flags("new", init_from=str(trained), layer_norm=True, actor_hidden=(5,))
    assert walker.main(other) == 2
    error = capsys.readouterr().err
    wrong = "agent.actor.0.weight is damaged, or of shape (4, 3), not (5, 3)"
    assert error == f"walker.py: {trained} does not fit this run: {wrong}\n"
    assert tree(tmp_path) == {}


# ---- module:EnvId --------------------------------------------------------------------------------

MODULE = """
import gymnasium
from pathlib import Path

Path({evidence!r}).write_text("imported")
gymnasium.register(
    "Mine-v0", "gymnasium.envs.classic_control:PendulumEnv", max_episode_steps=10
)
"""


@pytest.fixture
def mine(state, tmp_path, monkeypatch):
    """A checkpoint whose environment is in a module that tells of its import, and that proof."""
    evidence = tmp_path / "evidence"
    (tmp_path / "mine_envs.py").write_text(MODULE.format(evidence=str(evidence)))
    monkeypatch.syspath_prepend(tmp_path)
    config = state["config"] | {"env": "mine_envs:Mine-v0", "env_kwargs": []}
    yield write(state | {"config": config}, tmp_path / "mine.pt"), evidence
    sys.modules.pop("mine_envs", None)
    core.gym.registry.pop("Mine-v0", None)


@pytest.mark.parametrize("command", ["--resume", "evaluate"])
def test_a_module_named_in_a_checkpoint_is_not_imported_unless_typed(command, mine, capsys):
    path, evidence = mine
    assert walker.main([command, str(path)]) == 2
    error = capsys.readouterr().err
    assert "--env mine_envs:Mine-v0" in error
    assert error.count("\n") == 1
    assert not evidence.exists()
    assert "mine_envs" not in sys.modules


def test_starting_from_a_checkpoints_weights_does_not_import_its_module(mine, tmp_path):
    path, evidence = mine
    argv = flags(tmp_path / "new", init_from=str(path), layer_norm=True, total_timesteps=32)
    assert walker.main(argv) == 0
    assert not evidence.exists()


def test_evaluating_on_another_environment_does_not_import_the_checkpoints_module(mine):
    path, evidence = mine
    assert walker.main(["evaluate", str(path), "--episodes", "1", "--env", "Pendulum-v1"]) == 0
    assert not evidence.exists()


def test_resuming_on_another_environment_does_not_import_the_checkpoints_module(mine, capsys):
    path, evidence = mine
    assert walker.main(["--resume", str(path), "--env", "Pendulum-v1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not evidence.exists()


def test_a_typed_module_is_imported(mine, tmp_path, capsys):
    path, evidence = mine
    typed = ["--env", "mine_envs:Mine-v0"]
    assert walker.main(["evaluate", str(path), "--episodes", "1", *typed]) == 0
    assert capsys.readouterr().out.endswith(", length 10\n")
    assert evidence.read_text() == "imported"
    resume = ["--resume", str(path), "--out", str(tmp_path / "new"), "--total-timesteps", "160"]
    assert walker.main([*resume, *typed]) == 0
    assert core.load_checkpoint(tmp_path / "new" / core.LAST, typed[1])["counters"]["step"] == 160


# ---- --init-from ---------------------------------------------------------------------------------


def test_init_from_takes_weights_and_observation_statistics_and_nothing_else(trained, state):
    config = tiny(layer_norm=True, learning_rate=0.5)
    fresh = core.prepare_learner(config, None)
    drawn = torch.rand(4)
    learner = core.prepare_learner(dataclasses.replace(config, init_from=str(trained)), None)
    assert torch.equal(torch.rand(4), drawn)  # the random stream of a fresh run
    assert same(learner.agent.state_dict(), state["agent"])
    assert same(dict(learner.obs_normalizer.state_dict()), dict(state["obs_normalizer"]))
    assert not same(fresh.agent.state_dict(), state["agent"])
    assert learner.counters == core.Counters(0, 0, 0.0)
    assert learner.optimizer.state_dict()["state"] == {}
    assert learner.optimizer.param_groups[0]["lr"] == 0.5
    assert learner.reward_normalizer.count == 0


def test_a_run_from_anothers_weights_starts_at_step_zero_and_leaves_that_file_alone(
    trained, state, tmp_path, monkeypatch
):
    before = trained.read_bytes()
    seen = []
    update = core.update
    monkeypatch.setattr(
        core, "update", lambda agent, *a: (seen.append(agent.raw_std.item()), update(agent, *a))[1]
    )
    out = tmp_path / "new"
    argv = flags(out, init_from=str(trained), layer_norm=True, total_timesteps=64)
    assert walker.main(argv) == 0
    assert seen[0] == state["agent"]["raw_std"].item()
    assert core.load_checkpoint(out / core.LAST)["counters"]["step"] == 64
    assert not same(learned(out / core.LAST)["agent"], state["agent"])
    assert trained.read_bytes() == before


def test_the_best_of_a_run_may_be_where_the_run_that_replaces_it_starts(tmp_path, state):
    (tmp_path / core.LAST).parent.mkdir()
    write(state, tmp_path / core.BEST)
    argv = flags(tmp_path, init_from=str(tmp_path / core.BEST), layer_norm=True, total_timesteps=32)
    assert walker.main(argv) == 2  # it is a run
    assert walker.main([*argv, "--overwrite"]) == 0
    assert not (tmp_path / core.BEST).exists()
    assert learned(tmp_path / core.LAST)["obs_normalizer"]["count"] > 128
