"""Write a trained policy as ONNX: raw observations in, actions for the environment out.

    pip install onnx onnxscript
    python examples/export_onnx.py checkpoints_walker/pretrained.pt policy.onnx

The observation normalizer and the scaling and clipping of actions are inside, so that
`policy.onnx` does what `Learner.act` does in evaluation and film. Its input `obs` is (batch, O) in
the type of the environment's observations, its output `actions` (batch, A); any batch. To run it:

    session = onnxruntime.InferenceSession("policy.onnx")
    [actions] = session.run(None, {"obs": obs})
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder
import walker_core as core


class Policy(nn.Module):
    """`Learner.act`, in torch alone."""

    def __init__(self, learner: core.Learner) -> None:
        super().__init__()
        self.normalizer, self.agent = learner.obs_normalizer, learner.agent
        self.space = learner.env.action_space

    def forward(self, obs: Tensor) -> Tensor:
        actions = self.agent.mean_action(self.normalizer.normalize(obs))
        if not isinstance(self.space, gym.spaces.Box):
            return actions.reshape(len(obs), *self.space.shape)
        low, high = torch.from_numpy(self.space.low), torch.from_numpy(self.space.high)
        center, half = map(torch.from_numpy, core.action_scale(self.space))
        return torch.clamp(center + half * actions, low, high).to(low.dtype)


def export(checkpoint: str, onnx: str, env: str | None = None) -> None:
    """Write the policy of a checkpoint. UserError where that is none, or a package is missing."""
    missing = [name for name in ("onnx", "onnxscript") if not importlib.util.find_spec(name)]
    if missing:
        raise core.UserError(f"an export needs `pip install {' '.join(missing)}`")
    learner = core.load_learner(checkpoint, env, device="cpu")
    policy, space = Policy(learner).eval(), learner.env.observation_space
    obs = np.zeros((2, *space.shape), space.dtype)
    with torch.no_grad():
        if not np.array_equal(policy(torch.from_numpy(obs)), learner.act(obs)):
            raise core.UserError(f"{checkpoint}: Policy.forward does not do what Learner.act does")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is missing
    with core.atomic_path(Path(onnx)) as temporary, warnings.catch_warnings(action="ignore"):
        torch.onnx.export(
            policy,
            (torch.from_numpy(obs),),
            temporary,
            input_names=["obs"],
            output_names=["actions"],
            dynamic_shapes={"obs": {0: torch.export.Dim("batch")}},
            external_data=False,
            dynamo=True,
            verbose=False,
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write a trained policy as ONNX.")
    parser.add_argument("checkpoint", help="a .pt file of a run")
    parser.add_argument("onnx", help="the file to write")
    parser.add_argument("--env", help="Gymnasium id, which one of the form module:EnvId needs")
    arguments = parser.parse_args(argv)
    try:
        export(**vars(arguments))
    except (core.UserError, core.TrainingError, OSError) as error:
        print(f"export_onnx.py: {error}", file=sys.stderr)
        return 2
    print(f"policy: {arguments.onnx}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
