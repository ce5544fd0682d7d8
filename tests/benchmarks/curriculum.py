"""Does a curriculum help Hardcore? First falls that hardly hurt, then falls in full.

    python tests/benchmarks/curriculum.py --seeds 1 2 3

Three ways to spend 2M steps: 1.5M of the preset, which clips the normalised reward at -1, and from
that policy 0.5M with the clip at -10; the clip at -10 from the first step; the preset throughout.
Draws `plots/pretrained_curriculum.png`. A training that `--out` holds is not run again. Needs
envpool.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import viz

ENV = "BipedalWalkerHardcore-v3"
DEAR = "--clip-reward", "-10", "10"


def train(out: Path, *flags: str) -> Path:
    """Its folder of checkpoints, after a training, unless one has been there to its end."""
    if not (out / "videos").exists():  # what a training writes last
        run = [sys.executable, "walker.py", "--out", out, *flags]
        subprocess.run([*run, "--vector-env", "envpool", "--eval-episodes", "30"], check=True)
    return out / "checkpoints_walker"


def join(parts: list[Path], falls: str, seed: int, folder: Path) -> Path:
    """One metrics.csv of a training in parts, and beside it how the picture is to call it."""
    rows, step, wall_s = [], 0, 0.0
    for part in parts:
        new = list(csv.DictReader((part / "metrics.csv").open()))
        if int(new[0]["step"]) > step:  # resumed: it counts on by itself
            step, wall_s = 0, 0.0
        for row in new:
            row["step"], row["wall_s"] = int(row["step"]) + step, float(row["wall_s"]) + wall_s
        rows += new
        step, wall_s = rows[-1]["step"], rows[-1]["wall_s"]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    config = {"env": ENV, "falls": falls, "seed": seed, "_about": {"reward_threshold": 300}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "metrics.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs"))
    options = parser.parse_args()
    drawn = []
    for seed in options.seeds:

        def part(name: str, steps: int, *flags: str, seed: int = seed) -> Path:
            """The part of this seed's ways that is called so."""
            every = str(min(500_000, steps // 2))
            flags = *flags, "--total-timesteps", str(steps), "--eval-every", every
            return train(options.out / f"{name}-{seed}", *flags)

        new = "--env", ENV, "--seed", str(seed)
        cheap = part("cheap", 1_500_000, *new)
        last = str(cheap / "last.pt")
        ways = {
            "cheap, then dear": [cheap, part("dear", 500_000, *new, *DEAR, "--init-from", last)],
            "dear throughout": [part("full", 2_000_000, *new, *DEAR)],
            "cheap throughout": [cheap, part("preset", 2_000_000, "--resume", last)],
        }
        for falls, parts in ways.items():
            folder = options.out / "curriculum" / f"{falls}-{seed}"
            drawn.append(join(parts, falls, seed, folder))
    viz.plot_comparison(drawn, "plots/pretrained_curriculum.png")


if __name__ == "__main__":
    main()
