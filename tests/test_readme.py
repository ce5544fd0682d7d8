"""The README is short, and names only commands, flags and files that exist."""

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
README = (ROOT / "README.md").read_text()
RECORDS = (ROOT / "tests/benchmarks/RECORDS.md").read_text()
OTHER_PROGRAMS = {"standalone", "nproc-per-node", "index-url", "seeds"}  # their flags


def code_lines(text: str) -> list[str]:
    """The lines of a document's code blocks, without comments."""
    blocks = re.findall(r"```(?:python)?\n(.*?)```", text, re.DOTALL)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]


def spans(text: str) -> list[str]:
    """What a document has in `backquotes`."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def walker_arguments(text: str) -> list[str]:
    """What the document's commands pass to walker.py."""
    commands = [part for line in code_lines(text) + spans(text) for part in line.split(" && ")]
    return [
        command.partition("walker.py")[2]
        for command in commands
        if re.match(r"(python|torchrun\b.*) walker\.py\b", command) and "…" not in command
    ]


def test_the_readme_is_at_most_150_lines_and_1600_words_and_starts_with_the_commands():
    assert len(README.splitlines()) <= 150
    assert len(README.split()) <= 1600
    first = README.splitlines()[:20]
    assert "pip install -r requirements.txt && python walker.py" in first
    assert "pip install -r requirements.txt && python -m pytest" in first


@pytest.mark.parametrize("arguments", sorted(set(walker_arguments(README + RECORDS))))
def test_every_command_of_the_documents_parses(arguments, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "checkpoints_walker", tmp_path / "checkpoints_walker")
    words = shlex.split(arguments)
    out = tmp_path / (words[words.index("--out") + 1] if "--out" in words else "")
    (out / core.LAST).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "checkpoints_walker/pretrained.pt", out / core.LAST)
    monkeypatch.chdir(tmp_path)
    if words[:1] == ["evaluate"]:
        parser = walker.make_parser(walker.Evaluation(), "evaluate", "")
        parser.add_argument("checkpoint")
        typed = vars(parser.parse_args(words[1:]))
        assert typed.pop("checkpoint").endswith((".pt", "FILE"))
        walker.Evaluation(**typed)
    elif words != ["--help"]:
        config, _, _ = walker.parse_training(words)
        assert config.env in arguments or config.env == "BipedalWalker-v3"


def test_every_flag_of_the_readme_exists():
    fields = dataclasses.fields(core.Config) + dataclasses.fields(walker.Evaluation)
    known = {core.flag_name(field.name) for field in fields}
    known |= {f"no-{name}" for name in known} | {"resume", "overwrite", "config", "help"}
    named = {
        flag
        for text in code_lines(README) + spans(README)
        for flag in re.findall(r"(?<!\S)--([a-z-]+)", text)
    }
    assert len(named) > 30
    assert named <= known | OTHER_PROGRAMS


@pytest.mark.parametrize("path", ["README.md", "tests/benchmarks/RECORDS.md"])
def test_every_file_that_a_document_names_exists(path):
    document = ROOT / path
    text = document.read_text()
    links = {document.parent / link for link in re.findall(r"\]\(([^)#]+)\)", text)}
    named = [span for span in spans(text) if re.fullmatch(r"[\w./]*/\w+\.(py|md|pt|csv|png)", span)]
    files = {ROOT / name for name in named if not name.startswith("runs/")}
    written = {ROOT / core.CURVES, ROOT / core.BEST, ROOT / core.LAST}  # by a run
    assert len(links) > 4
    assert not [str(file) for file in (links | files) - written if not file.exists()]


@pytest.mark.slow
def test_the_lines_of_python_run(tmp_path, monkeypatch):
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code.strip().splitlines()) <= 7
    monkeypatch.chdir(tmp_path)
    small = "total_timesteps=600, num_envs=2, rollout_steps=64, minibatch_size=64, eval_episodes=1"
    names = {}
    exec(code.replace("total_timesteps=100_000", small), names)
    assert names["env"].action_space.contains(names["action"])
    assert (tmp_path / "runs/notebook" / core.FILM).exists()
