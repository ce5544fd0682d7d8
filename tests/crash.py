"""Kill a training anywhere, look at what is left, resume it: again and again until it finishes.

    python tests/crash.py --random 100        kills at random moments and at random points
    python tests/crash.py --points            every point in every writer, once

A training is a real process, forked from a server that has imported all and trained once, so that
it starts at once; a kill is SIGKILL, which no handler sees. test_crash.py does both in short.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import imageio_ffmpeg  # noqa: E402
import numpy as np  # noqa: E402
from helpers import BATCH, flags  # noqa: E402
from PIL import Image  # noqa: E402

import walker  # noqa: E402
import walker_core as core  # noqa: E402

ITERATIONS = 60
SETTINGS = {"total_timesteps": ITERATIONS * BATCH, "eval_every": 2 * BATCH}
SETTINGS["checkpoint_every"] = 4 * BATCH

WHOLE = ("before the write", "half written", "before fsync", "before replace", "after replace")
ROW = "before the row", "its first digit", "half a row", "a row without its end", "after the row"


class Fault(NamedTuple):
    """SIGKILL at a moment of writing a file, the nth time that it is reached."""

    file: str  # a pattern of its name
    moment: str
    nth: int = 1


RESUMING = [Fault(name, moment) for name in ("config.json", "metrics.csv") for moment in WHOLE]
TRAINING = [Fault(name, moment, 2) for name in ("last.pt", "step_*.pt") for moment in WHOLE]
TRAINING += [Fault("best.pt", moment) for moment in WHOLE]
TRAINING += [Fault("row", moment, 3) for moment in ROW]
PICTURES = [Fault(f"walker_final.{kind}", moment) for kind in ("mp4", "gif") for moment in WHOLE]
PICTURES += [Fault("training_curves.png", m) for m in WHOLE if m != "before fsync"]  # it has none
POINTS = [*TRAINING, *RESUMING, *PICTURES]  # an order in which one run meets them all


# ---- in the process that is killed ---------------------------------------------------------------


def arm(fault: Fault) -> None:
    """Have this process killed there, even if it is a worker that comes there."""
    main = os.getpid()

    def die() -> None:
        os.kill(main, signal.SIGKILL)
        time.sleep(60)  # a worker ends with it

    numbers = itertools.count(1)
    stem, dot, suffix = fault.file.rpartition(".")
    temporary = f".{stem}.*{dot}{suffix}"

    def is_it(name: Any, pattern: str) -> bool:
        matches = fnmatch.fnmatch(os.path.basename(str(name)), pattern)
        return matches and next(numbers) == fault.nth

    def audit(event: str, args: tuple) -> None:
        opened = event == "open" and "w" in str(args[1]) and is_it(args[0], temporary)
        if opened or (event == "subprocess.Popen" and is_it(args[1][-1], temporary)):
            die()

    core_play = core.play

    def play(act: Callable, config: core.Config, seeds: Any, render: Any = None) -> Iterator[Any]:
        is_film = render is not None  # and no evaluation
        yield from itertools.islice(core_play(act, config, seeds, render), 5 if is_film else None)
        if not is_film:
            return
        die()  # the encoder lives on for a moment

    def fsync(file: int, fsync: Callable = os.fsync) -> None:
        if is_it(os.readlink(f"/proc/self/fd/{file}"), temporary):
            die()
        fsync(file)

    def replace(source: Path, target: Path, replace: Callable = os.replace) -> None:
        if not is_it(target, fault.file):
            return replace(source, target)
        if fault.moment == "half written":  # as every writer here would leave it: they only append
            os.truncate(source, os.path.getsize(source) // 2)
        elif fault.moment == "after replace":
            replace(source, target)
        die()

    class TornFile:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, text: str) -> None:
            if next(numbers) == fault.nth:
                ends = 0, 1, len(text) // 2, len(text) - 1, len(text)
                self.file.write(text[: ends[ROW.index(fault.moment)]])
                self.file.flush()
                die()
            self.file.write(text)

        def __enter__(self) -> TornFile:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

    def torn_open(path: Path, mode: str, **how: Any) -> Any:
        file = open(path, mode, **how)
        return TornFile(file) if mode == "a" else file

    if fault.file == "row":
        core.open = torn_open
    elif (fault.file, fault.moment) == ("walker_final.mp4", "half written"):
        core.play = play
    elif fault.moment == "before the write":
        sys.addaudithook(audit)
    elif fault.moment == "before fsync":
        os.fsync = fsync
    else:
        os.replace = replace


def be_trained(argv: list[str], fault: list | None, scores: list[float] | None, hook: str) -> int:
    """`walker.main(argv)`, with last.pt written every third iteration, however fast they are.

    With `scores`, these are the returns of the evaluations, in place of real ones.
    """
    save = core.save_if_due

    def save_every_third(learner: core.Learner, *args: Any) -> None:
        third = learner.counters.iteration % 3 == 0
        learner.saved_at, learner.save_s = -math.inf if third else time.perf_counter(), 1.0
        save(learner, *args)

    core.save_if_due = save_every_third
    if scores is not None:
        left = iter(scores)
        core.evaluate_policy = lambda act, config, seeds: (np.full(len(seeds), next(left)), seeds)
    if fault is not None:
        arm(Fault(*fault))
    exec(hook, {"core": core})
    return walker.main(argv)


def serve() -> None:
    """A line with a job: its process is forked, and its id printed; an empty line: it is waited
    for, and its exit code printed."""
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(sys.stderr):
        assert walker.main(flags(out, total_timesteps=BATCH)) == 0
    for line in sys.stdin:
        job = json.loads(line)
        if (child := os.fork()) == 0:
            log = os.open(job.pop("log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), log, log)):
                os.dup2(file, number)
            code = 99
            try:
                code = be_trained(**job)
            finally:
                sys.stdout.flush()
                os._exit(code)
        print(child, flush=True)
        sys.stdin.readline()
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


# ---- in the process that kills -------------------------------------------------------------------


class Trainings:
    """Starts trainings, each a process of its own, and may kill them."""

    def __init__(self) -> None:
        command = [sys.executable, __file__, "--serve"]
        piped = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        environ = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
        environ["OMP_NUM_THREADS"] = "1"
        self.child: int | None = None
        self.server = subprocess.Popen(command, env=environ, text=True, **piped)

    def start(
        self,
        out: Path,
        *argv: str,
        fault: Fault | None = None,
        scores: list[float] | None = None,
        hook: str = "",
    ) -> int:
        """The id of a process that does `walker.py ARGV --out OUT`; what it says goes to OUT.log.

        `hook` is Python that it runs before.
        """
        self.end()
        job = {"argv": [*argv, "--out", str(out)], "log": f"{out}.log", "hook": hook}
        self._tell(json.dumps(job | {"fault": fault, "scores": scores}))
        self.child = int(self.server.stdout.readline())
        return self.child

    def wait(self, seconds: float = 60) -> int:
        """Its exit code; it is killed if it takes longer."""
        late = threading.Timer(seconds, os.kill, (self.child, signal.SIGKILL))
        late.start()
        self._tell("")
        code = int(self.server.stdout.readline())
        late.cancel()
        self.child = None
        return code

    def end(self) -> None:
        """Kill the process that a test which failed did not wait for."""
        if self.child is not None:
            os.kill(self.child, signal.SIGKILL)
            self.wait()

    def run(self, out: Path, *argv: str, kill_after: float | None = None, **how: Any) -> int:
        """The exit code of a process as `start` starts."""
        child = self.start(out, *argv, **how)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)  # it is not yet waited for: the id is still its own
        return self.wait()

    def _tell(self, line: str) -> None:
        self.server.stdin.write(line + "\n")
        self.server.stdin.flush()

    def close(self) -> None:
        self.end()
        self.server.stdin.close()
        self.server.wait()


def checkpoint(path: Path) -> dict[str, Any]:
    return core.load_checkpoint(path)["counters"]


_whole: dict[tuple, bool] = {}


def is_whole(path: Path) -> bool:
    """Whether a file of a run can be read to its end."""
    status = path.stat()
    key = path, status.st_ino, status.st_mtime_ns, status.st_size
    if key not in _whole:
        try:
            _whole[key] = _read(path)
        except (core.UserError, ValueError, OSError, RuntimeError, SyntaxError):
            _whole[key] = False
    return _whole[key]


def _read(path: Path) -> bool:
    if path.suffix == ".pt":
        return checkpoint(path)["step"] >= 0
    if path.suffix == ".json":
        return "seed" in json.loads(path.read_text())
    if path.suffix == ".mp4":
        return imageio_ffmpeg.count_frames_and_secs(path)[0] == 10
    with Image.open(path) as image:
        image.seek(getattr(image, "n_frames", 1) - 1)
        image.load()
    return True


def read_rows(out: Path) -> tuple[list[str], str]:
    """The rows of metrics.csv below its header, and what stands behind the last whole line."""
    path = out / core.METRICS_CSV
    if not path.exists():
        return [], ""
    *lines, torn = path.read_text().split("\n")
    assert lines[:1] == [",".join(core.CSV_COLUMNS)]
    return lines[1:], torn


def leftovers(out: Path) -> list[str]:
    """Hidden files but the lock."""
    return [path.name for path in out.rglob(".*") if path.name != ".lock"]


def look(out: Path, kept: list[str]) -> Counter:
    """What is wrong in a folder; `kept` are the rows up to the checkpoint that was resumed."""
    wrong = Counter()
    files = [p for p in out.rglob("*.*") if p.suffix in (".pt", ".json", ".mp4", ".gif", ".png")]
    for path in files:
        if not path.name.startswith(".") and not is_whole(path):
            wrong["broken"] += 1
            print(f"broken: {path}")
    rows, _ = read_rows(out)
    iterations = [int(row.split(",")[1]) for row in rows if row.count(",") > 1]
    wrong["torn"] += sum(row.count(",") != len(core.CSV_COLUMNS) - 1 for row in rows)
    wrong["repeated"] += len(iterations) - len(set(iterations))
    last = out / core.LAST
    done = checkpoint(last)["iteration"] if last.exists() and is_whole(last) else 0
    wrong["lost"] += len(set(range(1, done + 1)) - set(iterations))
    wrong["lost"] += sum(old != new for old, new in itertools.zip_longest(kept, rows[: len(kept)]))
    return +wrong


def rows_up_to_last(out: Path) -> list[str]:
    rows, last = read_rows(out)[0], out / core.LAST
    step = checkpoint(last)["step"] if last.exists() else 0
    return [row for row in rows if int(row.split(",")[0]) <= step]


class Campaign:
    """Runs, each killed and resumed in one folder until it finishes; and the table of all."""

    def __init__(self, trainings: Trainings, folder: Path) -> None:
        self.trainings, self.folder, self.runs = trainings, folder, 0
        self.table: dict[tuple[str, str], Counter] = defaultdict(Counter)
        self.redone: list[int] = []  # rows that were done, and were done again after a kill

    def run(self, kills: list[Fault | float]) -> None:
        """One run, killed by each in its turn: at a point, or after so many seconds."""
        self.runs += 1
        out, name = self.folder / f"run{self.runs}", ("", "")
        for kill in [*kills, None]:
            kept = rows_up_to_last(out)
            argv = ["--resume"] if (out / core.LAST).exists() else flags(out, **SETTINGS)[:]
            how = {}
            if isinstance(kill, Fault):
                rising = [time.time() + i for i in range(ITERATIONS)]
                how = {"fault": kill, "scores": rising if kill.file == "best.pt" else None}
            elif kill is not None:
                how = {"kill_after": kill}
            self.redone.append(len(read_rows(out)[0]) - len(kept))
            code = self.trainings.run(out, *argv, **how)
            if code == 2:  # killed before the first last.pt
                self.table[name]["refused"] += 1
                code = self.trainings.run(out, *argv, "--overwrite", **how)
            if name != ("", ""):
                self.table[name]["resumed"] += code in (0, -9)
            if code not in (0, -9):
                self.table[name]["failed"] += 1
            if kill is not None:
                name = (kill.file, kill.moment) if isinstance(kill, Fault) else ("any", "any time")
                self.table[name]["tried"] += 1
                self.table[name]["killed"] += code == -9
            self.table[name] += look(out, kept)
        rows, torn = read_rows(out)
        iterations = [int(row.split(",")[1]) for row in rows]
        self.table[name]["unfinished"] += iterations != list(range(1, ITERATIONS + 1)) or torn != ""
        wrong = [file for file in leftovers(out) if ".tmp." not in file]
        assert not wrong, f"left over after run {self.runs}: {wrong}"

    def __str__(self) -> str:
        columns = ("tried", "killed", "resumed", "refused", "failed", "lost", "repeated", "torn")
        columns += ("broken", "unfinished")
        lines = [f"{'fault':<44}" + "".join(f"{name:>11}" for name in columns)]
        for name, counts in [*sorted(self.table.items()), (("all", ""), self.total())]:
            lines.append(f"{', '.join(name):<44}" + "".join(f"{counts[c]:>11}" for c in columns))
        most = max(self.redone, default=0)
        return "\n".join([*lines, f"{self.runs} runs; at most {most} rows redone after a kill"])

    def total(self) -> Counter:
        return sum(self.table.values(), Counter())


def random_kills(campaign: Campaign, count: int, chance: random.Random, seconds: float) -> None:
    """So many kills, of runs of one to six; half at points, half at any time of a run."""
    while count > 0:
        kills = []
        for _ in range(min(count, chance.randint(1, 6))):
            at_point = chance.random() < 0.5
            fault = chance.choice(POINTS)._replace(nth=chance.randint(1, 3))
            if fault in PICTURES or fault.file not in ("row", "last.pt", "step_*.pt", "best.pt"):
                fault = fault._replace(nth=1)
            kills.append(fault if at_point else chance.uniform(0, seconds))
        campaign.run(kills)
        count -= len(kills)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--random", type=int, default=0, metavar="N", help="so many random kills")
    parser.add_argument("--points", action="store_true", help="every point once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve()
    with contextlib.closing(Trainings()) as trainings, tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(trainings, Path(folder))
        campaign.run([])  # how long a whole run takes
        began = time.perf_counter()
        campaign.run([])
        seconds = time.perf_counter() - began
        print(f"a run takes {seconds:.1f} s")
        if args.points:
            campaign.run(POINTS)
        random_kills(campaign, args.random, random.Random(args.seed), seconds)
        print(campaign)


if __name__ == "__main__":
    main()
