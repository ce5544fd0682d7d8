"""Whether a long run grows: memory, open files, and the time of an iteration.

    python tests/benchmarks/long_run.py [--iterations 2000] [--warm 100]

The suite does the same in short, in test_long_run.py.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
from helpers import BATCH, tiny  # noqa: E402

import walker_core as core  # noqa: E402


class Figures(NamedTuple):
    memory_kib: float  # of growth per 1000 iterations, by least squares, after the warm-up
    late_kib: float  # the same in the second half: the heap settles for some 400, a leak goes on
    files: tuple[int, int]  # open after the warm-up, and at the end
    times_ms: tuple[float, float]  # median of an iteration, in the first and in the last fifth


def sample(path: Path) -> None:
    """From now on, every iteration adds to a file: its number, resident KiB, open files, time."""
    save, page = core.save_if_due, os.sysconf("SC_PAGESIZE") // 1024

    def sampled(learner: core.Learner, *args: Any) -> None:
        save(learner, *args)
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
        files = len(os.listdir("/proc/self/fd"))
        with open(path, "a") as file:
            print(learner.counters.iteration, resident, files, time.perf_counter(), file=file)

    core.save_if_due = sampled


def figures(path: Path, warm: int) -> Figures:
    iteration, memory, files, clock = np.loadtxt(path)[warm:].T
    half = len(iteration) // 2
    slopes = (np.polyfit(iteration[i:], memory[i:], 1)[0] * 1000 for i in (0, half))
    fifth, times = len(clock) // 5, 1000 * np.diff(clock)
    ends = np.median(times[:fifth]), np.median(times[-fifth:])
    return Figures(*map(float, slopes), (int(files[0]), int(files[-1])), tuple(map(float, ends)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--warm", type=int, default=100, help="iterations that do not count")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "samples.txt")
        sample(path)
        core.train(tiny(folder, total_timesteps=args.iterations * BATCH, eval_every=10 * BATCH))
        found = figures(path, args.warm)
    print(f"resident memory, KiB per 1000 iterations: {found.memory_kib:+.0f}", end="")
    print(f", in the second half {found.late_kib:+.0f}")
    print(f"open files: {found.files[0]}, at the end {found.files[1]}")
    print("an iteration: {:.2f} ms, in the end {:.2f} ms".format(*found.times_ms))


if __name__ == "__main__":
    main()
