"""A passive-dynamic biped on a slope: gravity drives it, small motors keep it from falling.

    pip install mujoco
    python walker.py --env examples.passive_walker:PassiveWalker-v0 --out runs/passive

Two kneed legs without a torso, in a plane, after McGeer's walking machines (1990, "Passive Dynamic
Walking" and "... with Knees"). The x-axis points down the slope, which is done by tilting gravity;
only the feet touch it. Without motors (action 0) it takes a step or two and falls. Frames are drawn
by a few lines of NumPy, so that a film needs neither OpenGL nor a display.
"""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.spaces import Box

FOOT = 0.2  # m, radius of the round feet
FALLEN = 0.7  # m, height of the hip, which is 1 m where a leg is straight and upright
HIP_TORQUE, KNEE_TORQUE = 8.0, 4.0  # Nm

# Angles are those of the legs to the slope's normal, forward positive; knees bend backward.
LEG = """
<body name="{side} thigh">
  <joint name="{side} hip"/>
  <geom type="capsule" fromto="0 0 0 0 0 -.5" size=".03" mass="1.5"/>
  <body name="{side} shank" pos="0 0 -.5">
    <joint name="{side} knee" range="-2 0"/>
    <geom type="capsule" fromto="0 0 0 0 0 -.45" size=".025" mass="1"/>
    <geom name="{side} foot" size="{FOOT}" pos=".03 0 -.3" mass="0" contype="1"/>
  </body>
</body>"""
MODEL = f"""
<mujoco>
  <compiler angle="radian"/>
  <option integrator="implicitfast"/>
  <default>
    <geom contype="0" conaffinity="0" friction="1"/>
    <joint axis="0 -1 0" damping=".05" armature=".005"/>
  </default>
  <worldbody>
    <geom name="slope" type="plane" size="1 1 1" conaffinity="1"/>
    <body name="pelvis">
      <joint name="x" type="slide" axis="1 0 0" damping="0"/>
      <joint name="z" type="slide" axis="0 0 1" damping="0"/>
      <geom size=".07" mass="5"/>
      {LEG.format(side="left", FOOT=FOOT)}
      {LEG.format(side="right", FOOT=FOOT)}
    </body>
  </worldbody>
  <tendon>
    <fixed name="hip"> <joint joint="left hip" coef="1"/> <joint joint="right hip" coef="-1"/> </fixed>
  </tendon>
  <actuator>
    <motor tendon="hip" gear="{HIP_TORQUE}"/>
    <motor joint="left knee" gear="{KNEE_TORQUE}"/>
    <motor joint="right knee" gear="{KNEE_TORQUE}"/>
  </actuator>
</mujoco>"""


class PassiveWalker(gym.Env):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}  # noqa: RUF012

    def __init__(self, hz: float = 50, slope: float = 3.0, render_mode: str | None = None) -> None:
        if not 10 <= hz <= 500:
            raise ValueError(f"hz is {hz}: it must be in [10, 500]")
        if not -20 <= slope <= 20:
            raise ValueError(f"slope is {slope}: it must be in [-20, 20] degrees")
        self.render_mode, self.slope = render_mode, math.radians(slope)
        self.metadata = self.metadata | {"render_fps": hz}
        self.model = mujoco.MjModel.from_xml_string(MODEL)
        self.data = mujoco.MjData(self.model)
        self.substeps = math.ceil(500 / hz)
        self.model.opt.timestep = 1 / (hz * self.substeps)
        self.model.opt.gravity[:] = 9.81 * np.array([math.sin(self.slope), 0, -math.cos(self.slope)])
        self.feet = [self.model.geom(f"{side} foot").id for side in ("left", "right")]
        self.dt = 1 / hz
        high = np.array([2, *[math.pi] * 4, *[10] * 2, *[30] * 4, 1, 1], np.float32)
        self.observation_space = Box(-high, high)
        self.action_space = Box(-1.0, 1.0, (3,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        mujoco.mj_resetData(self.model, self.data)
        legs = np.array([0.25, -0.05, -0.25, -0.05])
        speeds = np.array([-0.6, 0, 0, 0])
        if self.np_random.random() < 0.5:
            legs, speeds = np.roll(legs, 2), np.roll(speeds, 2)
        self.data.qpos[2:] = legs + self.np_random.uniform(-0.05, 0.05, 4)
        self.data.qpos[[3, 5]] = np.minimum(self.data.qpos[[3, 5]], 0)
        self.data.qvel[2:] = speeds + self.np_random.uniform(-0.1, 0.1, 4)
        self.data.qvel[0] = 0.6 + self.np_random.uniform(-0.1, 0.1)
        mujoco.mj_kinematics(self.model, self.data)
        self.data.qpos[1] -= self._clearance().min()
        mujoco.mj_forward(self.model, self.data)
        self.steps, self.stance = 0, int(np.argmax(self.data.qpos[[2, 4]]))
        self.touching = self._clearance() < 0.002
        return self._observe(), self._info()

    def step(self, action):
        x = self.data.qpos[0]
        self.data.ctrl[:] = np.clip(action, -1, 1)
        mujoco.mj_step(self.model, self.data, self.substeps)
        mujoco.mj_kinematics(self.model, self.data)
        self._count_steps()
        speed = (self.data.qpos[0] - x) / self.dt
        effort = float(np.square(self.data.ctrl).mean())
        reward = self.dt * (min(speed, 1.0) - 0.1 * effort)
        fallen = bool(self.data.qpos[1] < FALLEN)
        return self._observe(), float(reward), fallen, False, self._info()

    def _clearance(self):
        return self.data.geom_xpos[self.feet, 2] - FOOT

    def _count_steps(self):
        before, self.touching = self.touching, self._clearance() < 0.002
        swing = 1 - self.stance
        feet = self.data.geom_xpos[self.feet, 0]
        if self.touching[swing] and not before[swing] and feet[swing] > feet[self.stance]:
            self.steps, self.stance = self.steps + 1, swing

    def _observe(self):
        obs = np.concatenate((self.data.qpos[1:], self.data.qvel, self.touching))
        return np.clip(obs, self.observation_space.low, self.observation_space.high).astype(np.float32)

    def _info(self):
        return {"steps": self.steps, "distance": float(self.data.qpos[0])}


gym.register("PassiveWalker-v0", PassiveWalker, max_episode_steps=1000)
