"""The README names only commands, flags and files that there are."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil

import pytest
from helpers import TESTS

import walker
import walker_core as core

ROOT = TESTS.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```\n(.*?)```", TEXT, re.DOTALL)
SPANS = re.findall(r"`([^`\n]+)`", re.sub(r"```\n.*?```", "", TEXT, flags=re.DOTALL))
LINES = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines()]
COMMANDS = [
    part.partition("walker.py")[2]
    for line in [*LINES, *SPANS]
    for part in line.split(" && ")
    if re.match(r"(python|torchrun\b.*) walker\.py\b", part) and "…" not in part
]
LAUNCHER = "standalone nproc-per-node nnodes rdzv-backend rdzv-endpoint max-restarts".split()
SCRIPTS = "seeds limit cleanrl report points random processes repeats episodes".split()


def known_flags() -> set[str]:
    names = {field.name for field in dataclasses.fields(core.Config)}
    names |= {field.name for field in dataclasses.fields(walker.Evaluation)}
    flags = {name.replace("_", "-") for name in names} | {"resume", "overwrite", "config", "help"}
    flags |= {f"no-{f.name}".replace("_", "-") for f in dataclasses.fields(core.Config)}
    return flags | {*LAUNCHER, *SCRIPTS}


@pytest.mark.parametrize("typed", sorted(set(COMMANDS)))
def test_every_command_of_the_readme_is_understood(typed, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "checkpoints_walker", tmp_path / "checkpoints_walker")
    shutil.copy(ROOT / "checkpoints_walker/pretrained_default.pt", tmp_path / core.LAST)
    monkeypatch.chdir(tmp_path)
    words = shlex.split(typed)
    if words[:1] == ["evaluate"]:
        assert walker.parse(walker.Evaluation, words[1:]).checkpoint.endswith(".pt")
    elif "--help" not in words:
        config, _, _ = walker.parse_training(words)
        assert config.env in typed or config.env == "BipedalWalker-v3"


def test_there_are_commands_of_every_kind():
    assert len(set(COMMANDS)) > 15
    assert any("evaluate" in typed for typed in COMMANDS)


def test_every_flag_of_the_readme_is_one():
    named = {flag for text in [*LINES, *SPANS] for flag in re.findall(r"(?<!\S)--([a-z-]+)", text)}
    assert len(named) > 30
    assert named <= known_flags()


def test_every_file_of_the_readme_is_there():
    named = set(re.findall(r"\]\(([^)#]+)\)", TEXT))
    named |= {span for span in SPANS if re.fullmatch(r"[\w./-]*(pretrained[\w.]*|\.py|\.md)", span)}
    named -= {"mujoco.py", "ppo_continuous_action.py"}  # not ours
    missing = [name for name in named if not (ROOT / name).exists() and "://" not in name]
    assert len(named) > 8
    assert not missing
