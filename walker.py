"""The command line: `python walker.py` trains, `python walker.py evaluate CHECKPOINT` tests."""

import argparse
import itertools
import json
import signal
import sys
import typing
from pathlib import Path

import numpy as np
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
    record: bool = setting(False, "film one into videos/")
    analyze_value: bool = setting(False, "plot ten into plots/")
    render: bool = setting(False, "show some in a window")
    seconds: float | None = setting(None, "seconds to film or show", gt=0)
    env_kwargs: tuple[core.KeyValue, ...] = setting((), "environment arguments, KEY=VALUE")
    out: str | None = setting(None, "for the files; None: the run's")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise core.UserError(f"{message}, see --help")


def make_parser(defaults, usage, text) -> Parser:
    """A flag for each field of `defaults`; the dataclass itself converts and checks the text."""
    # the result holds only what was typed
    parser = Parser(None, usage, text, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name, field in defaults.__pydantic_fields__.items():
        kind, parts = typing.get_origin(field.annotation), typing.get_args(field.annotation)
        options = {"metavar": "|".join(parts) if kind is typing.Literal else "VALUE"}
        if field.annotation is bool:
            options = {"action": argparse.BooleanOptionalAction}
        if kind is tuple or name in core.COURSES:
            # tuple[X, ...], a setting that may move, or tuple[X, Y]
            options["nargs"] = "*" if ... in parts or not parts else len(parts)
        meaning = f"{field.description} (default: {getattr(defaults, name)})"
        parser.add_argument(f"--{core.flag_name(name)}", help=meaning, **options)
    return parser


def parse_training(argv) -> tuple:
    """Train PPO, then plot the curves and film the best policy. `walker.py evaluate` tests it.

    A setting comes from, lowest first: the defaults, the preset of the environment, --config, the
    checkpoint of --resume (or, for the networks only, of --init-from), its flag. The defaults below
    are those of BipedalWalker-v3. --desired-kl, --failure-cost, --action-cost and --entropy-coef
    are VALUE; START END over the run; or START END FROM TO while the mean training return goes
    from FROM to TO.
    """
    parser = make_parser(core.Config.for_env(), "walker.py [SETTINGS]", parse_training.__doc__)
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--resume", nargs="?", const="", metavar="FILE", help="go on from a run")
    one.add_argument("--overwrite", action="store_true", help="remove the run in --out first")
    parser.add_argument("--config", metavar="FILE", help="settings of a config.json")
    typed = vars(parser.parse_args(argv))
    resume, overwrite = typed.pop("resume", None), typed.pop("overwrite", False)
    source, base = typed.pop("config", None), {}
    if source is not None:
        with core.reraise_as(core.UserError, source, ValueError, TypeError, RecursionError):
            base = dict(json.loads(Path(source).read_bytes()))
    if resume is not None:
        place = Path(resume or typed.get("out", ".")).absolute()
        source = resume = place / core.LAST if place.is_dir() else place
        base.update(core.load_checkpoint(resume, typed.get("env"))["config"])
        typed.setdefault("out", str(folder_of(resume)))
    elif "init_from" in typed:
        saved = core.load_checkpoint(typed["init_from"], typed.get("env"))["config"]
        saved = core.config_from(saved, typed["init_from"])
        base.update({name: getattr(saved, name) for name in core.NETWORKS})
    if source is not None:
        if "env" in typed:
            base["env"] = typed["env"]
        # check the file by itself, so that the message names it
        base = vars(core.config_from(base, source))
    return core.Config.for_env(**{**base, **typed}), resume, overwrite


def folder_of(checkpoint: Path) -> Path:
    """That of its run, or this one."""
    return checkpoint.parents[1] if checkpoint.parent.name == "checkpoints_walker" else Path()


def evaluate(argv):
    """Film, analyze or show a policy, where asked, then test it on new episodes."""
    parser = make_parser(Evaluation(), "walker.py evaluate FILE [OPTIONS]", Evaluation.__doc__)
    parser.add_argument("checkpoint", metavar="FILE", help="a .pt file of a run")
    typed = vars(parser.parse_args(argv))
    # absolute, as an environment may change the current folder
    checkpoint = Path(typed.pop("checkpoint")).absolute()
    test = Evaluation(**typed)
    learner = core.load_learner(checkpoint, test.env, env_kwargs=test.env_kwargs)
    seeds = core.env_seeds(test.seed, core.TEST, test.episodes)
    out, name = Path(test.out or folder_of(checkpoint)).absolute(), checkpoint.stem
    if test.record:
        mp4, data = out / f"videos/{name}.mp4", out / f"videos/{name}.npz"
        steps = core.record_episode(learner, seeds[0], mp4, test.seconds, viz.gait_state)
        core.write_episode_data(learner, steps, data)
        print(f"video: {mp4}")
        if "hull" in steps[0]:
            viz.plot_gait(data, out / f"plots/{name}_gait.png")
    if test.analyze_value:
        data = out / f"plots/{name}_value.npz"
        steps = [step for _, step in core.play(learner.act, learner.config, seeds[:10])]
        core.write_episode_data(learner, steps, data)
        print(viz.plot_value(data, data.with_suffix(".png")))
    if test.render:
        limit = round((test.seconds or 30) * learner.fps)
        list(itertools.islice(core.play(learner.act, learner.config, seeds, "human"), limit))
    returns, lengths = core.evaluate_policy(learner.act, learner.config, seeds)
    means = [np.random.default_rng(i).choice(returns, len(returns)).mean() for i in range(10_000)]
    print("95 % bootstrap interval: {:.1f} to {:.1f}".format(*np.percentile(means, [2.5, 97.5])))
    text = f"return {returns.mean():.1f} ± {returns.std():.1f} over {len(returns)} episodes"
    text += f" (min {returns.min():.1f}, max {returns.max():.1f}), length {lengths.mean():.0f}"
    print(text, flush=True)


def main(argv=None) -> int:
    """Exit code: 0, 2 for a wrong command, 1 if training failed, 130, 143 or 129 after a signal."""
    argv = sys.argv[1:] if argv is None else argv
    # None if it is closed
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    for number in core.END_SIGNALS:
        # nohup lets it be ignored
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, core.interrupt)
    try:
        if argv[:1] == ["evaluate"]:
            evaluate(argv[1:])
        else:
            core.train(*parse_training(argv))
        return 0
    except KeyboardInterrupt as stop:
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    except BrokenPipeError:
        # whoever read the output has had enough
        sys.stdout = None
        return 141
    except (core.UserError, core.TrainingError, OSError) as error:
        # one line, whatever an environment or a file has put into it
        text = "".join(c if c.isprintable() else " " for c in f"walker.py: {error}")
        print(text[:380], file=sys.stderr)
        return 1 if isinstance(error, core.TrainingError) else 2


if __name__ == "__main__":
    sys.exit(main())
