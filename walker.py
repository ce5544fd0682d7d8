"""The command line: `python walker.py` trains, `python walker.py evaluate CHECKPOINT` tests."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any, Literal

import pydantic
import tyro

import viz
import walker_core as core


def parse(cls: Any, argv: list[str], **kwargs: Any) -> Any:
    """tyro, with its box of an error made one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(cls, args=argv, prog="walker.py", **kwargs)
    except SystemExit as end:
        if end.code == 0:  # --help
            raise
        text = re.sub(r"\x1b\[[0-9;]*m|[╭╮╰╯│|+]", " ", said.getvalue())
        _title, message, *hints = [" ".join(part.split()) for part in re.split("[-─]{4,}", text)]
        meant = re.match(r"Perhaps you meant: (--\S+)", hints[0]) if hints else None
        raise core.UserError(f"{message} (perhaps {meant[1]}?)" if meant else message) from None


@pydantic.dataclasses.dataclass(frozen=True, config=core.STRICT)
class Evaluation(core.Checked):
    """Test a checkpoint: deterministic, statistics frozen, raw returns."""

    checkpoint: tyro.conf.Positional[str]  # a .pt file of a run
    env: str | None = None  # Gymnasium id, if not the checkpoint's own
    episodes: pydantic.PositiveInt = 100  # how many are started, and all count
    seed: pydantic.NonNegativeInt = 0  # episode k's own seed is derived from this and k
    record: bool = False  # film one as videos/NAME.mp4, .gif, .npz (its data); NAME: checkpoint's
    analyze_value: bool = False  # predicted values against realised returns: plots/NAME_value.png
    render: bool = False  # show episodes in a window before the test
    seconds: pydantic.PositiveFloat | None = None  # at most; else one episode, a show of 30 s
    json: bool = False  # the last line is a JSON object
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda where present, else cpu
    out: str = "."  # folder in which videos/ and plots/ are made


def evaluate(test: Evaluation) -> None:
    """Film, analyse or show the policy, where asked, then test it on fresh episodes."""
    learner = core.load_learner(test.checkpoint, test.env, test.seed, test.device, test.out)
    policy, name = (learner.act, learner.config), Path(test.checkpoint).stem
    seeds = core.env_seeds(test.seed, core.TEST, test.episodes)
    if test.record:
        data = Path(test.out, "videos", f"{name}.npz")
        core.make_folders(data.parent)
        rows = core.record_episode(*policy, seeds[0], data.with_suffix(".mp4"), test.seconds)
        core.write_data(learner, rows, data)
        print(f"video: {data.with_suffix('.mp4')}, its GIF and its data beside it")
        if "hull" in rows[0]:
            viz.plot_gait(data, Path(test.out, "plots", f"{name}_gait.png"))
    if test.analyze_value:
        data = Path(test.out, "plots", f"{name}_value.npz")
        core.make_folders(data.parent)
        core.write_data(learner, [row for _, row in core.play(*policy, seeds[:10])], data)
        print(viz.plot_value(data, data.with_suffix(".png")))
    if test.render:
        core.show(*policy, seeds, test.seconds or 30.0)
    returns, lengths = core.evaluate(*policy, seeds)
    found = {"mean": returns.mean(), "std": returns.std(), "episodes": len(returns)}
    found |= {"min": returns.min(), "max": returns.max(), "length": lengths.mean()}
    line = "return {mean:.1f} ± {std:.1f} over {episodes} episodes (min {min:.1f}, max {max:.1f})"
    print(json.dumps(found) if test.json else (line + ", length {length:.0f}").format(**found))


def parse_training(argv: list[str]) -> tuple[core.Config, Path | None, bool]:
    """Train PPO, then film the best policy and plot the curves.

    Besides the settings below: --resume [CHECKPOINT] goes on with a run (without a name: the
    last.pt of --out), --config FILE takes a config.json's settings, --overwrite removes the run
    that --out holds. `walker.py evaluate --help` tells how to test a checkpoint. Precedence, lowest
    first: defaults, the environment's preset, --config, the resumed checkpoint's, flags typed.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--env", "--out", "--config"):
        parser.add_argument(flag)
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--resume", nargs="?", const="")
    one.add_argument("--overwrite", action="store_true")
    typed, rest = parser.parse_known_args(argv)
    base, resume = {}, None
    if typed.config is not None:
        with core.explained(core.UserError, typed.config, ValueError, TypeError, RecursionError):
            base = {**json.loads(Path(typed.config).read_bytes())}
    if typed.resume is not None:
        resume = Path(typed.resume or Path(typed.out or ".", core.LAST))
        base = core.load_checkpoint(resume, typed.env)["config"]
        if typed.out is None and resume.parent.name == "checkpoints_walker":
            typed.out = str(resume.parent.parent)
    named = {"env": typed.env, "out": typed.out}  # an environment's preset is below all the rest
    base |= {name: value for name, value in named.items() if value is not None}
    default = core.checked(core.Config.for_env, base, resume or typed.config or "typed")
    config = parse(core.Config, rest, default=default, description=parse_training.__doc__)
    return config, resume, typed.overwrite


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 2 for a wrong command, 1 where training failed, 130 or 143 after a signal."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["evaluate"]:
            evaluate(parse(Evaluation, argv[1:]))
            return 0
        _, stopped_by = core.train(*parse_training(argv))
    except KeyboardInterrupt:  # before training began, or in an evaluation
        return 130
    except (core.UserError, core.TrainingError, argparse.ArgumentError, OSError) as error:
        said = "".join(c if c.isprintable() else " " for c in str(error))
        print(f"walker.py: {said[:380]}", file=sys.stderr)
        return 1 if isinstance(error, core.TrainingError) else 2
    return 0 if stopped_by is None else 128 + stopped_by


if __name__ == "__main__":
    core.leave(main())
