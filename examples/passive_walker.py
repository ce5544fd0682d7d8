r"""A passive-dynamic biped on a slope: gravity drives it, small motors keep it from falling.

    pip install mujoco
    python walker.py --env examples.passive_walker:PassiveWalker-v0 --total-timesteps 400000 \
        --learning-rate 1e-3 --init-std 0.5 --seed 11 --out runs/passive
    python examples/count_steps.py runs/passive/checkpoints_walker/best.pt

Two kneed legs without a torso, in a plane, after McGeer's machines (1990, "Passive Dynamic Walking"
and "Passive Walking with Knees"). Without motors it falls after two steps in the mean; on a slope
of 2 degrees about a third of the starts find a gait that needs none. Motors too strong at first
would hide what gravity does, hence the low --init-std. MuJoCo steps it; frames are drawn by a few
lines of NumPy, so that a film needs neither OpenGL nor a display.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box

try:
    import mujoco
except ImportError as error:
    raise ImportError("the passive walker needs `pip install mujoco`") from error

THIGH, SHANK, FOOT = 0.5, 0.5, 0.2  # m: lengths, the shank's down to the sole; the foot's radius
EFFORT = 0.5  # m/s, what full torque of all motors costs
FAST = 0.8  # m/s, a higher speed pays no more
STRIDE = 1.0  # m, so far from the last step the way is paid
FALLEN = 0.7  # m, height of the hip, which is 1 where a leg is straight and upright
SIDES = ("left", "right")

# A foot is a circle to the simulator, of which an arc is drawn. Its centre lies before the shank:
# the ground then presses the knee against its stop, and a leg stands without a motor.
LEG = f"""
<body name="SIDE thigh">
  <joint name="SIDE hip"/>
  <geom type="capsule" fromto="0 0 0 0 0 -{THIGH}" size=".03" mass="1.5"/>
  <body name="SIDE shank" pos="0 0 -{THIGH}">
    <joint name="SIDE knee" range="-2 0"/>
    <geom type="capsule" fromto="0 0 0 0 0 -.45" size=".025" mass="1"/>
    <geom name="SIDE foot" size="{FOOT}" pos=".07 0 {FOOT - SHANK}" mass="0" contype="1"/>
  </body>
</body>"""
MODEL = f"""
<mujoco model="passive walker">
  <compiler angle="radian"/>
  <option integrator="implicitfast"/>
  <default>
    <geom contype="0" conaffinity="0" friction="1"/>
    <joint axis="0 -1 0" damping=".05" armature=".005"/>
  </default>
  <worldbody>
    <geom type="plane" size="1 1 1" conaffinity="1"/>
    <body name="pelvis">
      <joint name="x" type="slide" axis="1 0 0" damping="0"/>
      <joint name="z" type="slide" axis="0 0 1" damping="0"/>
      <geom size=".07" mass="5"/>
      {"".join(LEG.replace("SIDE", side) for side in SIDES)}
    </body>
  </worldbody>
  <tendon>
    <fixed name="hip"><joint joint="left hip" coef="1"/><joint joint="right hip" coef="-1"/></fixed>
  </tendon>
  <actuator>
    <motor tendon="hip" gear="8"/>
    <motor joint="left knee" gear="4"/>
    <motor joint="right knee" gear="4"/>
  </actuator>
</mujoco>"""

WIDTH, HEIGHT, SCALE = 480, 320, 150  # pixels, and pixels per metre
SKY, SLOPE, MARK = np.array([(244, 247, 250), (214, 219, 224), (120, 130, 140)])
FAR, NEAR, HIP = np.array([(240, 170, 80), (40, 100, 170), (50, 50, 60)])


class PassiveWalker(gym.Env):
    """The biped of the module's docstring. Arguments:

    - `hz`: control steps per second, 10 to 500. The simulator takes at least 500 a second; the
      time limit is 1,000 control steps whatever their length, so 20 s at 50 Hz.
    - `slope`: of the ground in degrees, -20 to 20; positive leads down in the walking direction.

    Coordinates are along the slope (x) and normal to it (z). Angles are in rad; those of the legs
    are to the slope's normal, forward is positive; knees are 0 where straight, and bend to -2.

    - Observation (15): height of the hip; left leg, left knee, right leg, right knee; the hip's
      speed along and off the slope in m/s; the four angles' speeds in rad/s; 1 where the left foot,
      the right foot touches; 1 where the right foot made the last step, and the hip's way since
      then in metres. Clipped to the bounds of its space.
    - Action (3), in ±1: torque between the legs (8 Nm, positive swings the left one forward), of
      the left knee and of the right knee (4 Nm, positive straightens). 0 is the passive machine.
    - Reward: the hip's way in metres, at most that of `FAST`, and forward only while the last step
      is less than `STRIDE` behind (a gallop on one leg is not walking), less `EFFORT` per second
      times the mean square of the action.
    - An episode begins in the middle of a stride, one leg before the other, at 0.8 to 1 m/s. It
      terminates where the hip is lower than 0.7 m.
    - Info: `steps`, how often a foot came down at least 0.1 m ahead of the other one, the feet
      taking turns; `distance`, the hip's way in metres.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}  # noqa: RUF012

    def __init__(self, hz: float = 50, slope: float = 3.0, render_mode: str | None = None) -> None:
        for name, value, low, high in (("hz", hz, 10, 500), ("slope", slope, -20, 20)):
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}: it must be in [{low}, {high}]")
        self.metadata = self.metadata | {"render_fps": hz}
        self.render_mode, self.dt, self.slope = render_mode, 1 / hz, math.radians(slope)
        self.model = mujoco.MjModel.from_xml_string(MODEL)
        self.data = mujoco.MjData(self.model)
        self.substeps = math.ceil(500 / hz)
        self.model.opt.timestep = self.dt / self.substeps
        downhill = [math.sin(self.slope), 0, -math.cos(self.slope)]
        self.model.opt.gravity = 9.81 * np.array(downhill)  # gravity is tilted, not the ground
        self.feet = [self.model.geom(f"{side} foot").id for side in SIDES]
        high = np.array([2, *[math.pi] * 4, 10, 10, *[30] * 4, 1, 1, 1, 2], np.float32)
        low = np.array([*-high[:-4], 0, 0, 0, -2], np.float32)
        self.observation_space = Box(low, high)
        self.action_space = Box(-1.0, 1.0, (3,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        mujoco.mj_resetData(self.model, self.data)
        # the leg in front and its knee, the leg behind and its knee
        legs = self.np_random.uniform([0.1, 0.0, -0.35, -0.35], [0.2, 0.0, -0.25, -0.25])
        speeds = self.np_random.uniform([-1.0, 0.0, -0.1, -0.1], [-0.8, 0.0, 0.1, 0.1])
        self.steps, self.stepped_at = 0, 0.0  # where the hip was at the last step
        self.front = int(self.np_random.integers(2))  # the foot that made it: 0 left, 1 right
        self.data.qpos[2:] = np.roll(legs, 2 * self.front)
        self.data.qvel[2:] = np.roll(speeds, 2 * self.front)
        self.data.qvel[0] = -speeds[0]  # the hip turns over the foot in front
        mujoco.mj_kinematics(self.model, self.data)
        self.data.qpos[1] -= self._clearances().min()
        mujoco.mj_kinematics(self.model, self.data)
        self.touching = self._clearances() < 0.002
        return self._observation(), self._info()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        x = self.data.qpos[0]
        self.data.ctrl = np.clip(action, -1.0, 1.0)
        mujoco.mj_step(self.model, self.data, self.substeps)
        mujoco.mj_kinematics(self.model, self.data)  # mj_step leaves positions a substep behind
        self._count_step()
        paid = FAST * self.dt if self.data.qpos[0] < self.stepped_at + STRIDE else 0.0
        way = min(self.data.qpos[0] - x, paid)
        reward = float(way - EFFORT * self.dt * np.square(self.data.ctrl).mean())
        return self._observation(), reward, bool(self.data.qpos[1] < FALLEN), False, self._info()

    def _clearances(self) -> np.ndarray:
        """Height of the left and the right sole over the slope, (2,)."""
        return self.data.geom_xpos[self.feet, 2] - FOOT

    def _count_step(self) -> None:
        before, self.touching = self.touching, self._clearances() < 0.002
        hind = 1 - self.front
        x = self.data.geom_xpos[self.feet, 0]
        if self.touching[hind] and not before[hind] and x[hind] > x[self.front] + 0.1:
            self.steps, self.front, self.stepped_at = self.steps + 1, hind, self.data.qpos[0]

    def _observation(self) -> np.ndarray:
        last_step = self.front, self.data.qpos[0] - self.stepped_at
        obs = np.concatenate((self.data.qpos[1:], self.data.qvel, self.touching, last_step))
        space = self.observation_space
        return np.clip(obs, space.low, space.high).astype(np.float32)

    def _info(self) -> dict[str, Any]:
        return {"steps": self.steps, "distance": float(self.data.qpos[0])}

    # ---- Drawing: from the side, the hip in the middle -------------------------------------------

    def render(self) -> np.ndarray:
        """The walker as it stands, (HEIGHT, WIDTH, 3) uint8."""
        image = np.full((HEIGHT, WIDTH, 3), SKY, float)
        x = self.data.qpos[0]
        self._stroke(image, [(x - 3, -1), (x + 3, -1)], 1.0, SLOPE)
        for mark in np.arange(math.ceil(2 * x) - 5, 2 * x + 5) / 2:  # every half metre
            self._stroke(image, [(mark, 0), (mark, -0.06)], 0.008, MARK)
        for side, colour in (("right", FAR), ("left", NEAR)):
            hip, knee = (
                self.data.body(f"{side} {part}").xpos[[0, 2]] for part in ("thigh", "shank")
            )
            foot = self.data.geom(f"{side} foot")
            down = -foot.xmat.reshape(3, 3)[[0, 2], 2]  # along the shank
            turns = np.linspace(-0.9, 0.9, 13)
            arc = [down * math.cos(a) + down[::-1] * (-1, 1) * math.sin(a) for a in turns]
            sole = foot.xpos[[0, 2]] + (FOOT - 0.012) * np.array(arc)
            self._stroke(image, [hip, knee, knee + 0.45 * down], 0.03, colour)
            self._stroke(image, sole, 0.012, colour)
        self._stroke(image, [self.data.body("pelvis").xpos[[0, 2]]] * 2, 0.07, HIP)
        return image.round().astype(np.uint8)

    def _stroke(self, image: np.ndarray, points: Any, radius: float, colour: np.ndarray) -> None:
        """Draw a line through points (n, 2) of the slope's plane, round and smooth at its edges."""
        sin, cos = math.sin(self.slope), math.cos(self.slope)
        turned = (np.array(points) - (self.data.qpos[0], 0)) @ [[cos, sin], [sin, -cos]]
        pixels, radius = turned * SCALE + (WIDTH / 2, 0.8 * HEIGHT), radius * SCALE
        (left, top), (right, bottom) = pixels.min(0) - radius - 1, pixels.max(0) + radius + 1
        rows = np.arange(max(0, int(top)), min(HEIGHT, int(bottom) + 1))[:, None]
        columns = np.arange(max(0, int(left)), min(WIDTH, int(right) + 1))
        distance = np.full(np.broadcast_shapes(rows.shape, columns.shape), np.inf)
        for a, b in itertools.pairwise(pixels):  # to the nearest point of each part
            x, y = columns - a[0], rows - a[1]
            along = (x * (b - a)[0] + y * (b - a)[1]) / max((b - a) @ (b - a), 1e-9)
            along = along.clip(0, 1)
            apart = np.hypot(x - along * (b - a)[0], y - along * (b - a)[1])
            distance = np.minimum(distance, apart)
        cover = (radius + 0.5 - distance).clip(0, 1)[:, :, None]
        part = image[rows, columns]
        image[rows, columns] = part + cover * (colour - part)


gym.register("PassiveWalker-v0", PassiveWalker, max_episode_steps=1000)
