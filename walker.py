"""The command line: `python walker.py` trains, `python walker.py evaluate CHECKPOINT` tests."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import tyro

import walker_core as core

TRAIN_HELP = """Train PPO, then film the best policy and plot the curves.

Besides the settings below: --resume [CHECKPOINT] goes on with a run (without a name: the last.pt of
--out), --config FILE takes a config.json's settings, --overwrite removes the run that --out holds.
`walker.py evaluate --help` tells how to test a checkpoint."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise core.UserError(message)


def parse(cls: Any, argv: Sequence[str], default: Any = None, **kwargs: Any) -> Any:
    """tyro, with its box of an error made one line."""
    if "-h" in argv or "--help" in argv:
        return tyro.cli(cls, args=argv, default=default, prog="walker.py", **kwargs)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return tyro.cli(cls, args=argv, default=default, prog="walker.py", **kwargs)
    except SystemExit:
        text = re.sub(r"\x1b\[[0-9;]*m|[╭╮╰╯│|+]", " ", said.getvalue())
        _title, message, *hints = [" ".join(part.split()) for part in re.split("[-─]{4,}", text)]
        message = message.removeprefix(f"Error parsing {cls.__name__}: ")
        meant = re.match(r"Perhaps you meant: (--\S+)", hints[0]) if hints else None
        raise core.UserError(f"{message} (perhaps {meant[1]}?)" if meant else message) from None


def parse_training(argv: Sequence[str]) -> tuple[core.Config, Path | None, bool]:
    """The config, the checkpoint to resume, and --overwrite.

    Precedence, lowest first: defaults, the environment's preset, --config, the resumed
    checkpoint's config, flags actually typed.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    for flag in ("--env", "--out", "--config"):
        parser.add_argument(flag)
    parser.add_argument("--resume", nargs="?", const="")
    parser.add_argument("--overwrite", action="store_true")
    typed, rest = parser.parse_known_args(argv)
    if typed.resume is not None and typed.overwrite:
        raise core.UserError("--resume goes on with a run, --overwrite removes it: choose one")

    base, resume = {}, None
    if typed.config is not None:
        text = core.read_file(typed.config)
        try:
            base = json.loads(text)
        except ValueError:
            base = None
        if not isinstance(base, dict):
            raise core.UserError(f"{typed.config} is no JSON object")
    if typed.resume is not None:
        resume = Path(typed.resume or Path(typed.out or ".", core.LAST))
        base = core.load_checkpoint(resume, typed.env)["config"]
        if typed.out is None and resume.parent.name == "checkpoints_walker":
            typed.out = str(resume.parent.parent)
    for flag in ("env", "out"):
        if getattr(typed, flag) is not None:
            rest += [f"--{flag}", getattr(typed, flag)]
    if typed.env is not None and resume is None:
        base["env"] = typed.env  # its preset is below --config, and below what is typed
    default = core.config_from_dict(base, str(resume or typed.config))
    return parse(core.Config, rest, default, description=TRAIN_HELP), resume, typed.overwrite


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 2 for a wrong command, 1 where training failed, 130 or 143 after a signal."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        if argv[:1] == ["evaluate"]:
            print(core.run_evaluation(parse(core.Evaluation, argv[1:])))
            return 0
        config, resume, overwrite = parse_training(argv)
        _, stopped_by = core.train(config, resume, overwrite)
    except KeyboardInterrupt:  # before training began, or in an evaluation
        return 130
    except (core.UserError, core.TrainingError, OSError) as error:  # OSError: a full disk, say
        print(f"walker.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, core.UserError) else 1
    return 0 if stopped_by is None else 128 + stopped_by


if __name__ == "__main__":
    raise SystemExit(main())
