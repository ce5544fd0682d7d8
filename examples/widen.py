"""A policy in a network twice as wide, which does the same and has room to learn more (Net2Net).

    python examples/widen.py checkpoints_walker/last.pt wide.pt
    python walker.py --init-from wide.pt --actor-hidden 128 128 --critic-hidden 128 128 --out wide

Every hidden unit is there twice, and what it passes on is shared out unevenly between the two, so
that they do not stay equal (Chen et al. 2016, https://arxiv.org/abs/1511.05641). For `--init-from`
only: the optimizer's state does not fit the new shapes. Networks of vectors, without layer norm.
"""

from __future__ import annotations

import dataclasses
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder
import walker_core as core


def widen(agent: dict[str, torch.Tensor], generator: torch.Generator) -> None:
    """Double the hidden layers of actor and critic, in place."""
    for net in ("actor", "critic"):
        *hidden, last = (name for name in agent if name.startswith(net) and "weight" in name)
        for name in hidden:
            for part in (name, name.replace("weight", "bias")):
                agent[part] = torch.cat([agent[part], agent[part]])
        for name in (*hidden[1:], last):
            share = 0.1 + 0.8 * torch.rand(agent[name].shape, generator=generator)
            agent[name] = torch.cat([agent[name] * share, agent[name] * (1 - share)], dim=1)


def main(argv: Sequence[str]) -> int:
    if len(argv) != 2:
        print("usage: widen.py CHECKPOINT WIDE", file=sys.stderr)
        return 2
    data = io.BytesIO()
    try:
        state = core.load_checkpoint(argv[0], env="any: it is not made here")
        config = core.config_from(state["config"], argv[0])
        if config.layer_norm or any(weight.ndim > 2 for weight in state["agent"].values()):
            raise core.UserError(f"{argv[0]} has layer norm, or is a network for images")
        widen(state["agent"], torch.Generator().manual_seed(0))
        nets = {"actor_hidden": config.actor_hidden, "critic_hidden": config.critic_hidden}
        nets = {name: tuple(2 * units for units in hidden) for name, hidden in nets.items()}
        state["config"] = core.saved_settings(dataclasses.replace(config, **nets))
        torch.save(state, data)
        with core.atomic_path(Path(argv[1])) as temporary:
            temporary.write_bytes(data.getvalue())
    except (core.UserError, core.TrainingError, OSError) as error:
        print(f"widen.py: {error}", file=sys.stderr)
        return 2
    print(f"wide: {argv[1]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
