"""What a training costs as it grows: steps per second and memory along one axis.

    python tests/benchmarks/scaling.py processes 1 2 --repeats 5
    python tests/benchmarks/scaling.py envs 16 64 256 1024 -- --vector-env envpool
    python tests/benchmarks/scaling.py hidden 64 256 512
    python tests/benchmarks/scaling.py delay 0 0.1 0.3 1

Short trainings with the default settings, without evaluation, in turn. `processes` are torchrun's,
and share the environments of one; `envs` keep the batch of 8,192 steps; `hidden` is the width of
both layers of both networks; `delay` adds so many milliseconds to each collective of two processes,
as a network would. Arguments behind `--` go to walker.py.
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
BATCH = 8192
# walker.py, with collectives that take longer
DELAYED = """
import sys, time
import torch.distributed as dist
import walker

all_reduce, delay = dist.all_reduce, float(sys.argv.pop(1))

def slow_all_reduce(values):
    time.sleep(delay / 1000)
    return all_reduce(values)

dist.all_reduce = slow_all_reduce
sys.exit(walker.main())
"""


def command_of(axis: str, value: float, folder: Path) -> list[str]:
    """The command of one training, without the arguments that are the user's."""
    processes = {"processes": int(value), "delay": 2}.get(axis, 1)
    num_envs = int(value) if axis == "envs" else 64
    width = str(int(value) if axis == "hidden" else 64)
    script = [str(ROOT / "walker.py")]
    if axis == "delay":
        (folder / "delayed.py").write_text(DELAYED)
        script = [str(folder / "delayed.py"), str(value)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [
        *(sys.executable, *(torchrun if processes > 1 else []), *script),
        *("--num-envs", str(num_envs // processes), "--rollout-steps", str(BATCH // num_envs)),
        *("--minibatch-size", str(2048 // processes), "--total-timesteps", str(20 * BATCH)),
        *("--actor-hidden", width, width, "--critic-hidden", width, width, "--eval-every", "0"),
        *("--out", str(folder)),
    ]


def run(axis: str, value: float, more: list[str]) -> dict[str, float]:
    """Medians over the iterations of one training, without its first, and its memory in MB."""
    with tempfile.TemporaryDirectory() as out:
        process = subprocess.Popen(
            [*command_of(axis, value, Path(out)), *more],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise SystemExit(f"{axis} {value}: exit code {process.returncode}")
        with open(Path(out, "checkpoints_walker/metrics.csv"), newline="") as file:
            rows = list(csv.DictReader(file))[1:]
    names = "steps_per_s", "collect_s", "update_s"
    found = {name: statistics.median(float(row[name]) for row in rows) for name in names}
    # kilobytes on Linux; of torchrun's processes, the largest
    return {**found, "memory_mb": usage.ru_maxrss / 1024}


def plot(axis: str, found: dict[float, list[dict[str, float]]], png: str) -> None:
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for panel, name in zip(panels, ("steps_per_s", "memory_mb"), strict=True):
        middle = [statistics.median(parts[name] for parts in runs) for runs in found.values()]
        panel.plot(list(found), middle, "o-")
        panel.set(xscale="log", xlabel=axis, ylim=(0, None), title=name.replace("_", " "))
        panel.set_xticks(list(found), [f"{value:g}" for value in found], minor=False)
        panel.grid(alpha=0.3)
    figure.savefig(png, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("axis", choices=["processes", "envs", "hidden", "delay"])
    parser.add_argument("values", type=float, nargs="+")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--png", help="plot the medians")
    # argparse would take what is behind -- for more values
    argv = sys.argv[1:]
    split = argv.index("--") if "--" in argv else len(argv)
    options, more = parser.parse_args(argv[:split]), argv[split + 1 :]
    found: dict[float, list[dict[str, float]]] = {value: [] for value in options.values}
    for _ in range(options.repeats):
        for value, runs in found.items():
            runs.append(run(options.axis, value, more))
            parts = (f"{name} {part:.4g}" for name, part in runs[-1].items())
            print(f"{options.axis} {value:g}:", *parts, flush=True)
    print(f"torch {torch.__version__}, {os.cpu_count()} cores {' '.join(more)}")
    first = [parts["steps_per_s"] for parts in found[options.values[0]]]
    for value, runs in found.items():
        rates = [parts["steps_per_s"] for parts in runs]
        ratios = [rate / one for rate, one in zip(rates, first, strict=True)]
        memory = statistics.median(parts["memory_mb"] for parts in runs)
        text = f"{statistics.median(rates):,.0f} steps/s, {statistics.median(ratios):.2f} times"
        spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{options.axis} {value:g}: {text} {spread}, {memory:,.0f} MB")
    if options.png:
        plot(options.axis, found, options.png)


if __name__ == "__main__":
    main()
