"""Steps per second of one process against two and more, by torchrun; medians of several runs.

    python tests/benchmarks/scaling.py --processes 1 2 --repeats 5

Short trainings with the default settings, without evaluation, one after another in turn; of each
the median of metrics.csv's steps_per_s, and its parts. Arguments behind `--` go to walker.py.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def run(processes: int, more: list[str]) -> dict[str, float]:
    """Medians over the iterations of one training, without its first."""
    how = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, *(how if processes > 1 else []), str(ROOT / "walker.py")]
        command += ["--total-timesteps", str(150_000 * processes), "--eval-every", "0"]
        subprocess.run(
            [*command, "--out", out, *more],
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        with open(Path(out, "checkpoints_walker/metrics.csv"), newline="") as file:
            rows = list(csv.DictReader(file))[1:]
    names = "steps_per_s", "collect_s", "update_s"
    return {name: statistics.median(float(row[name]) for row in rows) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("more", nargs="*", help="arguments of walker.py, behind --")
    options = parser.parse_args()
    found: dict[int, list[float]] = {processes: [] for processes in options.processes}
    for _ in range(options.repeats):
        for processes, rates in found.items():
            parts = run(processes, options.more)
            rates.append(parts["steps_per_s"])
            print(processes, *(f"{name} {value:.4g}" for name, value in parts.items()), flush=True)
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {' '.join(options.more)}")
    first = found[options.processes[0]]
    for processes, rates in found.items():
        ratios = [rate / one for rate, one in zip(rates, first, strict=True)]
        middle, ratio = statistics.median(rates), statistics.median(ratios)
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{processes} processes: {middle:,.0f} steps/s, {ratio:.2f} times ({spread})")


if __name__ == "__main__":
    main()
