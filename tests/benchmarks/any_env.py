"""Whether the program runs on environments it has never seen: Gymnasium's own and other packages'.

    python tests/benchmarks/any_env.py [--work FOLDER] [--only PATTERN] [--limit SECONDS]

The project's requirements.txt is installed into a fresh environment in FOLDER, and each package
beside it into one of its own, so that none disturbs another. What is in FOLDER already is used as
it is. Each environment takes a few random steps in plain Gymnasium first: one that cannot is
listed, and not counted. Then the shipped walker.py trains on it, evaluates and films, as a user
would run it. A traceback, more than --limit seconds, or an exit code other than 0, 1 and 2 is a
FAULT; a film of a thousand steps without a GPU may take more than two minutes too.

PATTERN is a regular expression of packages and environments; with it, no table is written unless
--table is given. Needs the package index. An hour and 8.0 GB; without a display, films need EGL.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
WALKER = ROOT / "walker.py"
INSTALL_LIMIT_S = 180
TRAIN = (
    "--num-envs 2 --rollout-steps 32 --minibatch-size 32 --total-timesteps 256 --eval-every 128 "
    "--eval-episodes 1 --device cpu"
).split()
SHORT = ["--max-episode-steps", "200"]

# What is installed, by `pip install WORDS` each, and which environments are tried: MODULE:ID, then
# their --env-kwargs. A package whose own list of requirements contradicts ours for no reason is
# installed with --no-deps.
GYMNASIUM = ("gymnasium[mujoco]", "gymnasium[toy-text]", "gymnasium[jax]")
PACKAGES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("highway-env",): ("highway_env:highway-fast-v0", "highway_env:parking-v0"),
    ("panda-gym",): ("panda_gym:PandaReach-v3", "panda_gym:PandaPush-v3"),
    ("mujoco<3.4", "gymnasium-robotics"): (
        "gymnasium_robotics:PointMaze_UMaze-v3",
        "gymnasium_robotics:FetchReach-v4",
        "gymnasium_robotics:AntMaze_UMaze-v5",
        "gymnasium_robotics:HandReach-v3",
        "gymnasium_robotics:FrankaKitchen-v1",
    ),
    ("mujoco<4", "shimmy", "dm-control"): (
        "shimmy:dm_control/cartpole-swingup-v0",
        "shimmy:dm_control/humanoid-walk-v0",
    ),
    ("shimmy", "bsuite"): ("shimmy:bsuite/catch-v0",),
    ("ale-py",): ("ale_py:ALE/Pong-v5", "ale_py:ALE/Breakout-v5 obs_type=ram"),
    ("popgym",): ("popgym:popgym-RepeatPreviousEasy-v0", "popgym:popgym-MineSweeperEasy-v0"),
    ("minigrid",): ("minigrid:MiniGrid-Empty-5x5-v0", "minigrid:BabyAI-GoToLocal-v0"),
    ("gym-pusht",): (
        "gym_pusht:gym_pusht/PushT-v0",
        "gym_pusht:gym_pusht/PushT-v0 obs_type=pixels_agent_pos",
    ),
    ("--no-deps", "pybullet", "numba", "llvmlite", "scipy", "pettingzoo", "pyyaml", "pyflyt"): (
        "PyFlyt.gym_envs:PyFlyt/QuadX-Hover-v4",
    ),
    ("mo-gymnasium",): ("mo_gymnasium:deep-sea-treasure-v0",),
    ("flappy-bird-gymnasium",): ("flappy_bird_gymnasium:FlappyBird-v0",),
    ("gym-anytrading",): ("gym_anytrading:stocks-v0",),
    ("--no-deps", "mujoco==2.3.3", "gymnasium-robotics==1.2.2", "xmltodict", "safety-gymnasium"): (
        "safety_gymnasium:SafetyPointGoal1Gymnasium-v0",
    ),
    ("miniworld",): ("miniworld:MiniWorld-Hallway-v0",),
    ("procgen",): ("procgen:procgen-coinrun-v0",),
    ("gym-xarm",): ("gym_xarm:gym_xarm/XarmLift-v0",),
    ("gym-aloha",): ("gym_aloha:gym_aloha/AlohaInsertion-v0",),
    ("gym-hil",): ("gym_hil:gym_hil/PandaPickCubeBase-v0",),
    ("tetris-gymnasium",): ("tetris_gymnasium.envs:tetris_gymnasium/Tetris",),
    ("buffalo-gym",): ("buffalo_gym:Buffalo-v0", "buffalo_gym:StatefulBandit-v0"),
    ("metaworld",): ("metaworld:Meta-World/MT1 env_name=reach-v3",),
    ("pybullet-envs-gymnasium",): ("pybullet_envs_gymnasium:HopperBulletEnv-v0",),
    ("--no-deps", "gymnasium-2048"): ("gymnasium_2048:gymnasium_2048/TwentyFortyEight-v0",),
    ("--no-deps", "stable-baselines3", "pandas", "gymnasium-search-race"): (
        "gymnasium_search_race:gymnasium_search_race/SearchRace-v3",
    ),
    ("gymnasium-snake-game",): ("gymnasium_snake_game:Snake-v1",),
    ("gymnasium-cartpole-swingup",): ("gymnasium_cartpole_swingup:CartPoleSwingUp-v0",),
    ("vizdoom",): ("vizdoom.gymnasium_wrapper:VizdoomBasic-v1",),
    ("gym-electric-motor",): ("gym_electric_motor:Cont-CC-PMSM-v0",),
    ("gym-sailing",): ("gym_sailing:Sailboat-v0",),
    ("--no-deps", "memory-gym"): ("memory_gym:MortarMayhem-Grid-v0",),
    (
        "--no-deps",
        "pydantic-settings",
        "python-dotenv",
        "loguru",
        "tomlkit",
        "natsort",
        "scipy",
        "neurogym",
    ): ("neurogym:PerceptualDecisionMaking-v0",),
    ("lbforaging",): ("lbforaging:Foraging-5x5-2p-1f-v3",),
}

# Run in the environment that was made: the ids of Gymnasium's own, latest versions only.
OWN_IDS = """
import gymnasium as gym
latest = {}
for spec in gym.registry.values():
    # the entry point of one that was moved away is a function that says so
    if isinstance(spec.entry_point, str) and spec.entry_point.startswith("gymnasium.envs."):
        before = latest.setdefault((spec.namespace, spec.name), spec)
        if spec.version > before.version:
            latest[spec.namespace, spec.name] = spec
print(*(spec.id for spec in latest.values()))
"""

# The same for `ID KEY=VALUE …`: random steps, then its two spaces.
PLAIN = """
import ast, contextlib, sys, warnings
import gymnasium as gym
from gymnasium.spaces import Dict, Discrete, MultiBinary, MultiDiscrete, Tuple

def describe(space):
    match space:
        case Dict() | Tuple():
            parts = space.values() if isinstance(space, Dict) else space
            return f"{type(space).__name__}({', '.join(sorted({describe(s) for s in parts}))})"
        case Discrete() | MultiBinary():
            return f"{type(space).__name__}({space.n})"
        case MultiDiscrete():
            return f"MultiDiscrete of {space.nvec.size}"
    shape = "" if space.shape is None else " × ".join(map(str, space.shape))
    return f"{type(space).__name__}({shape})"

def one_line(kind, error, _traceback):
    print(f"{kind.__name__}: {' '.join(str(error).split())}", file=sys.stderr)

sys.excepthook = one_line
warnings.simplefilter("ignore")
options = dict(pair.split("=", 1) for pair in sys.argv[2:])
for key, value in options.items():
    with contextlib.suppress(ValueError, SyntaxError):
        options[key] = ast.literal_eval(value)
env = gym.make(sys.argv[1], disable_env_checker=True, **options)
env.reset(seed=1)
for _ in range(20):
    _, _, terminated, truncated, _ = env.step(env.action_space.sample())
    if terminated or truncated:
        env.reset()
print(describe(env.observation_space), describe(env.action_space), sep="|")
"""


class Ended(NamedTuple):
    """How a command ended."""

    code: int | None  # None: it ran out of time
    out: str
    err: str

    @property
    def is_fault(self) -> bool:
        return self.code not in (0, 1, 2) or has_traceback(self.err)

    @property
    def reason(self) -> str:
        """The last line that it wrote to standard error, or at all where it was ended."""
        if self.code is None:
            return f"time limit, after: {last_line(self.out) or last_line(self.err)}"
        last = last_line(self.err) or "no message"
        return last if self.code in (0, 1, 2) else f"exit code {self.code}: {last}"


class Row(NamedTuple):
    """What became of an environment; the cells of the table. None: not tried."""

    package: str
    env: str
    spaces: str = ""
    plain: bool = False  # it runs in Gymnasium without us
    trains: bool | None = None
    evaluates: bool | None = None
    films: bool | None = None
    is_fault: bool = False
    why: str = ""

    @property
    def passes(self) -> bool:
        return bool(self.trains and self.evaluates)

    @property
    def cells(self) -> list[str]:
        answers = {True: "yes", False: "no", None: ""}
        tried = [answers[answer] for answer in (self.trains, self.evaluates, self.films)]
        why = f"FAULT: {self.why}" if self.is_fault else self.why
        return [self.env, self.package, self.spaces, *tried, why]


HEADER = [
    "environment",
    "package",
    "observation → action",
    "trains",
    "evaluates",
    "films",
    "why not",
]


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def has_traceback(text: str) -> bool:
    """Whether it holds one other than those of destructors at exit, which Python ignores."""
    before = ""
    for line in text.splitlines():
        if line.startswith("Traceback (most") and not before.startswith("Exception ignored"):
            return True
        before = line
    return False


def end_session(leader: int) -> None:
    """End a process and all that it started; workers have process groups of their own."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(int(entry.name)) == leader:
                os.kill(int(entry.name), signal.SIGKILL)


def run(command: list, limit_s: float, cwd=None) -> Ended:
    """A command as a user would start it, without a terminal; whatever it left behind is ended."""
    environ = os.environ.copy()
    if "DISPLAY" not in environ and sys.platform == "linux":
        environ |= {"MUJOCO_GL": "egl", "PYOPENGL_PLATFORM": "egl", "PYGLET_HEADLESS": "1"}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd=cwd,
            env=environ,
            start_new_session=True,
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_session(process.pid)
            process.wait()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace").replace("\r", "\n"))
    return Ended(code, *texts)


# ---- installing ----------------------------------------------------------------------------------


def site_packages(folder: Path) -> Path:
    return next(folder.glob("lib/python*/site-packages"), folder / "Lib/site-packages")


def python_of(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def version(name: str, folder: Path) -> str | None:
    """Of a package, if it is installed into this very environment."""
    path = [str(site_packages(folder))]
    found = importlib.metadata.Distribution.discover(name=name, path=path)
    return next((one.version for one in found), None)


def versions(requirement: str, folder: Path) -> str:
    """Of a package, and of what pip had to install to suit it."""
    name = re.split(r"[\[=<>~]", requirement)[0]
    found = {other: version(other, folder) for other in ("torch", "numpy", "gymnasium", "mujoco")}
    others = ", ".join(f"{other} {number}" for other, number in found.items() if number)
    return f"{name} {version(name, folder) or ''}".strip() + (f" (with {others})" if others else "")


def make_base(work: Path) -> Path:
    """The environment with the project's requirements.txt."""
    base = work / "base"
    if not (base / "installed").exists():
        venv.create(base, with_pip=True, clear=True)
        command = [python_of(base), "-m", "pip", "install", "-r", ROOT / "requirements.txt"]
        ended = run(command, 1800)
        if ended.code != 0:
            sys.exit(f"requirements.txt does not install: {ended.reason}")
        (base / "installed").touch()
    return base


def install(requirements: tuple[str, ...], work: Path, base: Path) -> tuple[Path, dict[str, str]]:
    """An environment that sees the base's packages, and why what failed of these did."""
    name = re.sub(r"\W+", "_", requirements[-1]).strip("_")
    folder, constraints = work / "packages" / name, work / "constraints.txt"
    pins = re.sub(r"\[.*?\]", "", (ROOT / "requirements.txt").read_text(encoding="utf-8"))
    constraints.write_text(pins, encoding="utf-8")
    record = folder / "installed.json"
    with contextlib.suppress(FileNotFoundError):
        known, failures = json.loads(record.read_text(encoding="utf-8"))
        if known == list(requirements):
            return folder, failures
    venv.create(folder, with_pip=False, clear=True)
    (site_packages(folder) / "base.pth").write_text(str(site_packages(base)))
    failures = {}
    flags = [word for word in requirements if word.startswith("-")]
    for requirement in requirements:
        if requirement not in flags:
            pip = [python_of(base), "-m", "pip", "--python", python_of(folder), "install"]
            limits = ["--no-input", "--constraint", constraints]
            ended = run([*pip, *limits, *flags, requirement], INSTALL_LIMIT_S)
            if ended.code != 0:
                failures[requirement] = ended.reason
    record.write_text(json.dumps([requirements, failures]), encoding="utf-8")
    return folder, failures


# ---- trying --------------------------------------------------------------------------------------


def try_env(python: Path, package: str, words: str, short: list[str], limit_s: float) -> Row:
    """Random steps without us; then training, evaluation and film."""
    env, *kwargs = words.split()
    row = Row(package, words)
    plain = run([python, "-c", PLAIN, env, *kwargs], limit_s, tempfile.gettempdir())
    if plain.code != 0:
        return row._replace(why=f"does not run in plain Gymnasium: {plain.reason}")
    spaces = plain.out.splitlines()[-1].replace("|", " → ")
    row = row._replace(spaces=spaces, plain=True)
    with tempfile.TemporaryDirectory() as out:
        chosen = ["--env", env, *(["--env-kwargs", *kwargs] if kwargs else [])]
        training = run([python, WALKER, *chosen, *TRAIN, *short, "--out", out], limit_s, out)
        row = row._replace(trains=training.code == 0, is_fault=training.is_fault)
        if not row.trains or row.is_fault:
            return row._replace(why=training.reason)
        last = Path(out, "checkpoints_walker/last.pt")
        command = [python, WALKER, "evaluate", last, "--episodes", "2", "--env", env, "--out", out]
        evaluation = run(command, limit_s, out)
        films = Path(out, "videos/walker_final.mp4").exists()
    row = row._replace(evaluates=evaluation.code == 0, films=films, is_fault=evaluation.is_fault)
    if not row.evaluates or row.is_fault:
        return row._replace(why=f"evaluate: {evaluation.reason}")
    text = training.out + training.err
    why = "" if films else next((line for line in text.splitlines() if "no video" in line), "")
    return row._replace(why=why.strip())


def walk(work: Path, only: str, limit_s: float):
    """The rows, one after another."""
    base = make_base(work)
    help_text = run([python_of(base), WALKER, "--help"], limit_s).out
    short = SHORT if SHORT[0] in help_text else []
    for requirements, envs in {GYMNASIUM: (), **PACKAGES}.items():
        if not re.search(only, " ".join([*requirements, *envs])) and requirements != GYMNASIUM:
            continue
        folder, failures = install(requirements, work, base)
        python, package = python_of(folder), versions(requirements[-1], folder)
        if requirements == GYMNASIUM:
            package = "gymnasium"
            envs = run([python, "-c", OWN_IDS], limit_s).out.split()
        for requirement, why in failures.items():
            yield Row(requirement, "", why=f"does not install: {why}")
        if requirements == GYMNASIUM or not failures:
            for env in envs:
                if re.search(only, " ".join([*requirements, env])):
                    yield try_env(python, package, env, short, limit_s)


# ---- the report ----------------------------------------------------------------------------------


def summary(rows: list[Row]) -> str:
    own = [row for row in rows if row.package == "gymnasium" and row.plain]
    others = [row for row in rows if row.package != "gymnasium" and row.plain]
    parts = []
    for name, group in (("Gymnasium's own", own), ("third-party", others)):
        passed = sum(row.passes for row in group)
        verb = " train and evaluate" if name == "Gymnasium's own" else ""
        parts.append(f"{name}: {passed} of {len(group)}{verb}")
    return "; ".join([*parts, f"faults: {sum(row.is_fault for row in rows)}"])


def markdown(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|")[:200] for cell in cells) + " |\n"


def write_table(rows: list[Row], work: Path, path: Path) -> None:
    base = work / "base"
    found = ", ".join(f"{name} {version(name, base)}" for name in ("torch", "gymnasium", "numpy"))
    which = f"{time.strftime('%Y-%m-%d')}, Python {platform.python_version()}, {found}"
    text = "# Environments that walker.py had not seen\n\n"
    text += f"`python tests/benchmarks/any_env.py`, {which}, {platform.system()}.\n\n"
    text += f"{summary(rows)}. Not counted are those that do not run in plain Gymnasium either.\n\n"
    text += markdown(HEADER) + "|---" * len(HEADER) + "|\n"
    text += "".join(markdown(row.cells) for row in rows)
    path.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--work", type=Path, help="folder of what is installed (default: temporary)"
    )
    parser.add_argument("--only", help="regular expression: these packages and environments")
    parser.add_argument("--limit", type=float, default=120, help="seconds of each command")
    parser.add_argument("--table", type=Path, help="default: ANY_ENV.md, beside this file")
    options = parser.parse_args()
    table = options.table
    if table is None and options.only is None:
        table = Path(__file__).with_name("ANY_ENV.md")
    with tempfile.TemporaryDirectory() as folder:
        work = (options.work or Path(folder)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        rows = []
        for row in walk(work, options.only or "", options.limit):
            rows.append(row)
            print(" | ".join(row.cells), flush=True)
            if table is not None:
                write_table(rows, work, table)
    print(summary(rows))


if __name__ == "__main__":
    main()
