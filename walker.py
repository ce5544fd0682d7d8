"""The command line: `python walker.py` trains, `python walker.py evaluate CHECKPOINT` tests."""

import argparse
import difflib
import json
import re
import sys
import typing
from pathlib import Path

import pydantic

import viz
import walker_core as core
from walker_core import setting


@pydantic.dataclasses.dataclass(frozen=True, config=core.VALIDATION)
class Evaluation(core.Validated):
    """Test a checkpoint: deterministic policy, statistics frozen, raw returns."""

    env: str | None = setting(None, "play in another environment")
    episodes: int = setting(100, "how many episodes", ge=1)
    seed: int = setting(0, "seed of the episodes", ge=0)
    record: bool = setting(False, "film one, into videos/")
    analyze_value: bool = setting(False, "plot ten, into plots/")
    render: bool = setting(False, "show some in a window")
    seconds: float | None = setting(None, "limit of film or show", gt=0)
    json: bool = setting(False, "print the result as JSON")
    device: core.Device = setting("auto", "auto: cuda or cpu")
    out: str = setting(".", "folder for videos/ and plots/", min_length=1)


def make_parser(defaults, usage, description) -> argparse.ArgumentParser:
    """A flag for each field of `defaults`; the dataclass itself converts and checks the text."""
    parser = argparse.ArgumentParser(usage=usage, allow_abbrev=False, exit_on_error=False)
    parser.description = description
    # the result holds only what was typed
    parser.argument_default = argparse.SUPPRESS
    # -1e9 is a number, not a flag
    parser._negative_number_matcher = re.compile(r"-[\d.]")
    for name, field in defaults.__pydantic_fields__.items():
        kind = typing.get_origin(field.annotation)
        parts = typing.get_args(field.annotation)
        options = {"metavar": "|".join(parts) if kind is typing.Literal else "VALUE"}
        if field.annotation is bool:
            options = {"action": argparse.BooleanOptionalAction}
        if kind is tuple or name in core.COURSES:
            # tuple[X, ...], a setting that may move, or tuple[X, Y]
            options["nargs"] = "*" if ... in parts or not parts else len(parts)
        meaning = f"{field.description} (default: {getattr(defaults, name)})"
        parser.add_argument(f"--{core.flag_name(name)}", help=meaning, **options)
    return parser


def parse(parser, argv) -> dict:
    """What was typed, by name. UserError if an argument does not exist."""
    typed, unknown = parser.parse_known_args(argv)
    if unknown:
        similar = difflib.get_close_matches(unknown[0], parser._option_string_actions)
        hint = f"did you mean {similar[0]}?" if similar else "see --help"
        raise core.UserError(f"unrecognized argument {unknown[0]}, {hint}")
    return vars(typed)


def parse_training(argv) -> tuple:
    """Train PPO, then film the best policy and plot the curves.

    A setting comes from, lowest first: the defaults, the preset of the environment, --config, the
    resumed checkpoint, its flag. The defaults below are those of BipedalWalker-v3. --desired-kl,
    --failure-cost, --action-cost and --entropy-coef are VALUE; START END over the run; or START
    END FROM TO while the mean training return goes from FROM to TO.
    """
    usage = "walker.py [SETTINGS] or walker.py evaluate FILE [OPTIONS]"
    parser = make_parser(core.Config.for_env(), usage, parse_training.__doc__)
    one = parser.add_mutually_exclusive_group()
    meaning = "go on from FILE, or last.pt in --out"
    one.add_argument("--resume", nargs="?", const="", metavar="FILE", help=meaning)
    one.add_argument("--overwrite", action="store_true", help="remove the run in --out first")
    parser.add_argument("--config", metavar="FILE", help="settings of a config.json")
    typed = parse(parser, argv)
    resume, overwrite = typed.pop("resume", None), typed.pop("overwrite", False)
    source, base = typed.pop("config", None), {}
    if source is not None:
        with core.reraise_as(core.UserError, source, ValueError, TypeError, RecursionError):
            base = dict(json.loads(Path(source).read_bytes()))
    if resume is not None:
        source = resume = Path(resume or Path(typed.get("out", "."), core.LAST))
        base.update(core.load_checkpoint(resume, typed.get("env"))["config"])
        if resume.parent.name == "checkpoints_walker":
            base["out"] = str(resume.parent.parent)
    if source is not None:
        # check the file by itself, so that the message names it
        chosen = {name: typed[name] for name in ("env", "out") if name in typed}
        base = vars(core.config_from({**base, **chosen}, source))
    return core.Config.for_env(**{**base, **typed}), resume, overwrite


def evaluate(argv) -> None:
    """Film, analyze or show a policy, where asked, then test it on new episodes."""
    parser = make_parser(Evaluation(), "walker.py evaluate FILE [OPTIONS]", Evaluation.__doc__)
    parser.add_argument("checkpoint", nargs="?", help="a .pt file of a run")
    typed = parse(parser, argv)
    if "checkpoint" not in typed:
        raise core.UserError("evaluate needs a FILE, a checkpoint")
    checkpoint = typed.pop("checkpoint")
    test = Evaluation(**typed)
    learner = core.load_learner(checkpoint, test.env, test.device)
    core.configure_torch(learner.agent)
    seeds = core.env_seeds(test.seed, core.TEST, test.episodes)
    videos, plots, name = Path(test.out, "videos"), Path(test.out, "plots"), Path(checkpoint).stem
    if test.record:
        core.make_folders(videos)
        mp4, data = videos / f"{name}.mp4", videos / f"{name}.npz"
        steps = core.record_episode(learner, seeds[0], mp4, test.seconds, viz.gait_state)
        core.write_episode_data(learner, steps, data)
        print(f"video: {mp4}")
        if "hull" in steps[0]:
            viz.plot_gait(data, plots / f"{name}_gait.png")
    if test.analyze_value:
        core.make_folders(plots)
        data = plots / f"{name}_value.npz"
        steps = [step for _, step in core.play(learner.act, learner.config, seeds[:10])]
        core.write_episode_data(learner, steps, data)
        print(viz.plot_value(data, data.with_suffix(".png")))
    if test.render:
        core.show(learner, seeds, test.seconds or 30.0)
    with core.ProcessPoolExecutor(initializer=core.prepare_worker) as pool:
        returns, lengths = core.evaluate_policy(learner.act, learner.config, seeds, pool)
    result = {"mean": returns.mean(), "std": returns.std(), "episodes": len(returns)}
    result.update(min=returns.min(), max=returns.max(), length=lengths.mean())
    line = "return {mean:.1f} ± {std:.1f} over {episodes} episodes"
    line += " (min {min:.1f}, max {max:.1f}), length {length:.0f}"
    print(json.dumps(result) if test.json else line.format(**result))


def main(argv=None) -> int:
    """Exit code: 0, 2 for a wrong command, 1 if training failed, 130 or 143 after a signal."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["evaluate"]:
            evaluate(argv[1:])
            return 0
        _, stopped_by = core.train(*parse_training(argv))
    except KeyboardInterrupt:
        # before training began, or in an evaluation
        return 130
    except (core.UserError, core.TrainingError, argparse.ArgumentError, OSError) as error:
        # one line, even if an environment's error has several
        message = "".join(c if c.isprintable() else " " for c in str(error))
        print(f"walker.py: {message[:380]}", file=sys.stderr)
        return 1 if isinstance(error, core.TrainingError) else 2
    return 0 if stopped_by is None else 128 + stopped_by


if __name__ == "__main__":
    sys.exit(main())
