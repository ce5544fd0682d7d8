"""Checkpoints: everything comes back to the bit, and no code of a file is run."""

from __future__ import annotations

import dataclasses
import errno
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import LEARNED, PRETRAINED, flags, learned, same, tiny, train_without_pictures, tree

import walker
import walker_core as core

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The last checkpoint of a run, which must not be changed."""
    out = tmp_path_factory.mktemp("checkpoint")
    train_without_pictures(tiny(out, eval_every=64, layer_norm=True))
    return out / core.LAST


@pytest.fixture
def state(trained) -> dict:
    return core.load_checkpoint(trained)


def write(state, path: Path) -> Path:
    torch.save(state, path)
    return path


def test_everything_comes_back_to_the_bit(trained, state, tmp_path):
    torch.manual_seed(9)  # other weights, statistics and counters
    learner = core.Learner(tiny(tmp_path, eval_every=64, layer_norm=True, seed=9))
    assert not same(learner.agent.state_dict(), state["agent"])
    learner.load(state, trained, core.LEARNED)
    learner.counters = core.Counters(**state["counters"])
    learner.save("again.pt")
    again = core.load_checkpoint(tmp_path / "again.pt")
    assert again.pop("config").pop("seed") == 9
    assert again.pop("about") != state["about"]
    kept = {name: value for name, value in state.items() if name not in ("config", "about")}
    assert same(again, kept)


def test_a_checkpoint_holds_all_that_training_changed(state, tmp_path):
    torch.manual_seed(1)
    learner = core.prepare_learner(tiny(tmp_path, layer_norm=True), None)
    learner.save("start.pt")
    start = core.load_checkpoint(tmp_path / "start.pt")
    for part in LEARNED:
        assert not same(state[part], start[part]), part
    assert set(start) == {*LEARNED, "format", "about", "config", "counters"}
    counters = state["counters"]
    assert (counters["step"], counters["iteration"]) == (128, 4)
    assert counters["wall_s"] > 0
    assert np.isfinite(counters["best_return"])
    assert len(state["optimizer"]["state"]) == len(list(learner.agent.parameters()))
    assert 100 < state["reward_normalizer"]["count"] <= 128
    assert core.config_from(state["config"], "FILE") == tiny(eval_every=64, layer_norm=True)


def test_a_checkpoint_is_tensors_and_plain_values_only(trained):
    def check(value):
        if isinstance(value, dict):
            assert all(type(key) in (str, int) for key in value)
            value = list(value.values())
        if isinstance(value, list | tuple):
            for item in value:
                check(item)
        else:
            assert type(value) in (bool, int, float, str, type(None), torch.Tensor)

    check(torch.load(trained, weights_only=True))


# ---- writing -------------------------------------------------------------------------------------


def test_a_write_that_fails_names_the_file_and_leaves_the_old_one(tmp_path, monkeypatch):
    learner = core.Learner(tiny(tmp_path))
    learner.save("last.pt")
    before, write_bytes = tree(tmp_path), Path.write_bytes

    def out_of_space(path, data):
        write_bytes(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", out_of_space)
    with pytest.raises(core.TrainingError, match=r"last\.pt .*No space left on device$"):
        learner.save("last.pt")
    assert tree(tmp_path) == before


def test_a_file_takes_its_place_only_when_it_is_whole_and_on_the_disk(tmp_path, monkeypatch):
    path, done, fsync, replace = tmp_path / "some.txt", [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("replace"), replace(*paths)))
    path.write_text("old")
    with core.atomic_path(path) as temporary:
        assert temporary.parent == path.parent  # a move to another disk would not be atomic
        temporary.write_text("new, half wri")
        assert path.read_text() == "old"
    assert done == ["fsync", "replace"]
    assert tree(tmp_path) == {"some.txt": b"new, half wri"}


def test_what_a_killed_run_was_writing_does_no_harm(tmp_path):
    core.train(tiny(tmp_path, total_timesteps=64))
    folder = (tmp_path / core.LAST).parent
    for name in (".last.tmp.pt", ".config.tmp.json", ".metrics.tmp.csv"):
        (folder / name).write_bytes(b"half")
    core.train(tiny(tmp_path), tmp_path / core.LAST)
    assert core.load_checkpoint(tmp_path / core.LAST)["counters"]["iteration"] == 4
    assert list(folder.glob(".*.tmp.*")) == []


# ---- foreign files -------------------------------------------------------------------------------


class Burglar:
    """Runs code of its own when it is unpickled."""

    def __init__(self, evidence: Path):
        self.evidence = evidence

    def __reduce__(self):
        return os.mkdir, (str(self.evidence),)


def as_zip(value, path: Path):
    torch.save(value, path)


def as_legacy(value, path: Path):
    torch.save(value, path, _use_new_zipfile_serialization=False)


def as_pickle(value, path: Path):
    path.write_bytes(pickle.dumps(value))


@pytest.mark.parametrize("write_as", [as_zip, as_legacy, as_pickle])
def test_loading_runs_no_code_that_a_file_brings(write_as, state, tmp_path):
    evidence, path = tmp_path / "evidence", tmp_path / "a.pt"
    write_as({**state, "extra": Burglar(evidence)}, path)
    with pytest.raises(core.UserError, match=r"a\.pt is no checkpoint"):
        core.load_checkpoint(path)
    assert not evidence.exists()
    if write_as is as_pickle:
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert evidence.exists()  # it would have run


def test_another_format_is_refused_with_both_numbers(state, tmp_path):
    path = write({**state, "format": 99}, tmp_path / "other.pt")
    with pytest.raises(core.UserError) as caught:
        core.load_checkpoint(path)
    for part in (str(path), "99", str(core.CHECKPOINT_FORMAT)):
        assert part in str(caught.value)


def test_networks_of_other_sizes_are_one_line_with_both_shapes(trained, tmp_path, capsys):
    out = tmp_path / "new"
    other = flags(out, init_from=str(trained), layer_norm=True, actor_hidden=(5,))
    assert walker.main(other) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for part in (str(trained), "actor.0.weight", "[4, 3]", "[5, 3]"):
        assert part in error
    assert not out.exists()


# ---- MODULE:ID -----------------------------------------------------------------------------------

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
    """A checkpoint of an environment in a module that proves its import, and that proof."""
    evidence = tmp_path / "evidence"
    (tmp_path / "mine_envs.py").write_text(MODULE.format(evidence=str(evidence)))
    monkeypatch.syspath_prepend(tmp_path)
    config = {**state["config"], "env": "mine_envs:Mine-v0", "env_kwargs": []}
    yield write({**state, "config": config}, tmp_path / "mine.pt"), evidence
    sys.modules.pop("mine_envs", None)
    core.gym.registry.pop("Mine-v0", None)


@pytest.mark.parametrize("command", ["--resume", "evaluate"])
def test_a_module_named_in_a_checkpoint_is_not_imported_unless_typed(command, mine, capsys):
    path, evidence = mine
    assert walker.main([command, str(path)]) == 2
    error = capsys.readouterr().err
    assert "mine_envs:Mine-v0" in error
    assert "--env" in error
    assert error.count("\n") == 1
    assert not evidence.exists()


def test_another_typed_environment_does_not_import_the_checkpoints_module(mine, tmp_path):
    path, evidence = mine
    assert walker.main(["evaluate", str(path), "--episodes", "1", "--env", "Pendulum-v1"]) == 0
    assert walker.main(["--resume", str(path), "--env", "Pendulum-v1"]) == 2
    argv = flags(tmp_path / "new", init_from=str(path), layer_norm=True, total_timesteps=32)
    assert walker.main(argv) == 0
    assert not evidence.exists()


def test_a_typed_module_is_imported(mine, tmp_path):
    path, evidence = mine
    typed = ["--env", "mine_envs:Mine-v0", "--out", str(tmp_path / "new")]
    assert walker.main(["--resume", str(path), "--total-timesteps", "160", *typed]) == 0
    assert evidence.read_text() == "imported"
    assert core.load_checkpoint(tmp_path / "new" / core.LAST, typed[1])["counters"]["step"] == 160


# ---- --init-from ---------------------------------------------------------------------------------


def test_init_from_takes_weights_and_statistics_and_nothing_else(trained, state):
    config = tiny(layer_norm=True, learning_rate=0.5)
    fresh = core.prepare_learner(config, None)
    drawn = torch.rand(4)
    learner = core.prepare_learner(dataclasses.replace(config, init_from=str(trained)), None)
    assert torch.equal(torch.rand(4), drawn)  # the random stream of a fresh run
    assert same(dict(learner.agent.state_dict()), dict(state["agent"]))
    assert same(dict(learner.obs_normalizer.state_dict()), dict(state["obs_normalizer"]))
    assert not same(dict(fresh.agent.state_dict()), dict(state["agent"]))
    assert learner.counters == core.Counters()
    assert learner.optimizer.state_dict()["state"] == {}
    assert learner.optimizer.param_groups[0]["lr"] == 0.5
    rewards = dict(learner.reward_normalizer.state_dict())
    assert same(rewards, dict(state["reward_normalizer"]))  # the scale of the critic's values


def test_init_from_brings_its_networks_unless_other_sizes_are_typed():
    """Hardcore's preset has larger ones than a flat walker's."""
    argv = ["--env", "BipedalWalkerHardcore-v3", "--init-from", PRETRAINED, "--device", "cpu"]
    config, _, _ = walker.parse_training(argv)
    preset = core.Config.for_env("BipedalWalkerHardcore-v3", init_from=PRETRAINED, device="cpu")
    assert preset.actor_hidden == (128, 128)
    assert config == dataclasses.replace(preset, actor_hidden=(64, 64), critic_hidden=(64, 64))
    core.prepare_learner(config, None)
    config, _, _ = walker.parse_training([*argv, "--actor-hidden", "5"])
    assert (config.actor_hidden, config.critic_hidden) == ((5,), (64, 64))
    with pytest.raises(core.UserError, match="does not fit this run"):
        core.prepare_learner(config, None)


def test_the_best_of_a_run_may_be_where_the_run_that_replaces_it_starts(tmp_path, state):
    (tmp_path / core.LAST).parent.mkdir()
    write(state, tmp_path / core.BEST)
    argv = flags(tmp_path, init_from=str(tmp_path / core.BEST), layer_norm=True, total_timesteps=32)
    assert walker.main(argv) == 2  # the folder holds a run
    assert walker.main([*argv, "--overwrite"]) == 0
    assert not (tmp_path / core.BEST).exists()
    assert learned(tmp_path / core.LAST)["obs_normalizer"]["count"] > 128
