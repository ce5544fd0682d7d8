"""A policy in a network twice as wide, which does the same and has room to learn more (Net2Net).

    python examples/widen.py checkpoints_walker/last.pt wide.pt
    python walker.py --init-from wide.pt --actor-hidden 128 128 --critic-hidden 128 128 --out wide

Every hidden unit is there twice, and what it passes on is shared out unevenly between the two, so
that they do not stay equal (Chen et al. 2016, https://arxiv.org/abs/1511.05641). For `--init-from`
only: the optimiser's state does not fit the new shapes. Networks of vectors, without layer norm.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder
import walker_core as core


def widen(agent: dict[str, torch.Tensor], generator: torch.Generator) -> None:
    """Double the hidden layers of actor and critic, linear layers with SiLU or the like between."""
    for net in ("actor", "critic"):
        layers = [name.removesuffix(".weight") for name in agent if name.startswith(net)]
        layers = [name for name in layers if not name.endswith(".bias")]
        for first, then in zip(layers, layers[1:], strict=False):
            for name in (f"{first}.weight", f"{first}.bias"):
                agent[name] = torch.cat([agent[name], agent[name]])
            weight = agent[f"{then}.weight"]
            share = 0.1 + 0.8 * torch.rand(weight.shape, generator=generator)
            agent[f"{then}.weight"] = torch.cat([weight * share, weight * (1 - share)], dim=1)


def main(argv: Sequence[str]) -> int:
    if len(argv) != 2:
        print("usage: widen.py CHECKPOINT WIDE", file=sys.stderr)
        return 2
    try:
        state = core.load_checkpoint(argv[0], torch.load(argv[0], weights_only=True)["config"]["env"])
        print(type(state))
    except (core.UserError, OSError) as error:
        print(f"widen.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
