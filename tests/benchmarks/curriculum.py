"""Does a curriculum help Hardcore? First falls that hardly hurt, then falls in full.

    python tests/benchmarks/curriculum.py --seeds 1 2 3

Three ways to spend 2M steps: 1.5M of the preset, which clips the normalized reward at -1, and from
that policy 0.5M with the clip at -10; the clip at -10 from the first step; the preset throughout.
Draws `plots/pretrained_curriculum.png`. A training that `--out` holds whole is not run again.
Needs envpool.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

import viz

ENV = "BipedalWalkerHardcore-v3"
DEAR = "--clip-reward", "-10", "10"


def train(out: Path, steps: int, *flags: str) -> Path:
    """Its folder of checkpoints, after a training of so many steps, unless one was there."""
    folder = out / "checkpoints_walker"
    metrics = folder / "metrics.csv"
    if not metrics.exists() or viz.read_metrics(metrics)["step"].max(initial=0) < steps:
        run = [sys.executable, "walker.py", "--vector-env", "envpool", "--eval-episodes", "30"]
        run += ["--eval-every", str(min(500_000, steps // 2)), "--total-timesteps", str(steps)]
        subprocess.run([*run, "--out", out, *flags], check=True)
    return folder


def join(parts: list[Path], falls: str, seed: int, folder: Path) -> Path:
    """One metrics.csv of a training in parts, and beside it how the picture is to call it."""
    joined = {}
    for part in parts:
        new = viz.read_metrics(part / "metrics.csv")
        if joined and new["step"][0] < joined["step"][-1]:  # not resumed: it counts anew
            new |= {name: new[name] + joined[name][-1] for name in ("step", "wall_s")}
        joined = {name: np.append(joined.get(name, []), new[name]) for name in new}
    folder.mkdir(parents=True, exist_ok=True)
    rows, header = np.column_stack([*joined.values()]), ",".join(joined)
    np.savetxt(folder / "metrics.csv", rows, "%.9g", ",", header=header, comments="")
    config = {"env": ENV, "falls": falls, "seed": seed, "_about": {"reward_threshold": 300}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "metrics.csv"


def ways(seed: int, out: Path) -> dict[str, list[Path]]:
    """The parts of each way, trained."""
    new = "--env", ENV, "--seed", str(seed)
    cheap = train(out / f"cheap-{seed}", 1_500_000, *new)
    last = str(cheap / "last.pt")
    dear = train(out / f"dear-{seed}", 500_000, *new, *DEAR, "--init-from", last)
    return {
        "cheap, then dear": [cheap, dear],
        "dear throughout": [train(out / f"full-{seed}", 2_000_000, *new, *DEAR)],
        "cheap throughout": [cheap, train(out / f"preset-{seed}", 2_000_000, "--resume", last)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs"))
    options = parser.parse_args()
    drawn = [
        join(parts, falls, seed, options.out / "curriculum" / f"{falls}-{seed}")
        for seed in options.seeds
        for falls, parts in ways(seed, options.out).items()
    ]
    viz.plot_comparison(drawn, "plots/pretrained_curriculum.png")


if __name__ == "__main__":
    main()
