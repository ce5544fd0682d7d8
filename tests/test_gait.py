"""Claims about gaits and values in `viz.py`, and about the episode data that they are read from."""

import imageio.v3 as imageio
import numpy as np
import pytest

import viz
import walker_core as core

# What a leg touches the ground with: lowest and highest contact, in lengths of a shin.
TOUCHES = {".": (np.nan, np.nan), "-": (0.0, 0.02), "#": (0.0, 0.9), "^": (0.95, 1.05)}
STANCE = {
    "walking": ("------------........", "--........----------"),
    "running": ("------..............", "..........------...."),
    "hopping": ("----------..........", "----------.........."),
    "hopping on one leg": ("....................", "----------.........."),
    "kneeling": ("--####------........", "--........----------"),
    "on the knee": ("--^^^^------........", "--........----------"),
    "standing": ("--------------------", "--------------------"),
    "dragging": ("--------------------", "----------.........."),
}


def episode(hind, front, speed=2.0, steps=200, fall=False, swapped=False):
    """An episode over flat ground at height 5, in which the contacts of the legs are repeated.

    Every motor turns at -2 rad/s with 10 N m; the hull is 1.7 m above the ground.
    """
    x = speed * 0.02 * np.arange(steps)
    contacts = np.empty((steps, 2, 2))
    for leg, marks in enumerate((hind, front)):
        contacts[:, leg] = [TOUCHES[marks[t % len(marks)]] for t in range(steps)]
    knees = np.full((steps, 2, 3), 5.0)
    knees[:, :, 0] = x[:, None] + (-0.2, 0.6)
    hull = np.zeros((steps, 6))
    hull[:, 0], hull[:, 1], hull[:, 3] = x, 6.7, speed
    order = [1, 0] if swapped else [0, 1]
    return {
        "dt": 0.02, "episode": np.zeros(steps), "hull": hull,
        "joints": np.full((steps, 4, 3), (0.1, -2, 10)),
        "knees": knees[:, order], "contacts": contacts[:, order],
        "rewards": np.append(np.zeros(steps - 1), -100 if fall else 0),
        "terminated": np.arange(steps) == (steps - 1 if fall else -1),
    }  # fmt: skip


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **data)
    return path


@pytest.fixture
def saved(monkeypatch):
    """Figure, axes of the legend, title and path of every picture, instead of the files."""
    pictures = []
    monkeypatch.setattr(viz, "_save", lambda *picture: pictures.append(picture))
    return pictures


def panel(figure, title):
    return next(axes for axes in figure.axes if axes.get_title("left") == title)


def bars(axes, label):
    """Start in seconds of every bar of a footfall diagram that has this label."""
    drawn = next(one for one in axes.collections if one.get_label() == label)
    return [round(float(path.vertices[:, 0].min()), 6) for path in drawn.get_paths()]


# ---------------------------------------------------------------------------------------- naming


@pytest.mark.parametrize(
    ("stance", "speed", "name", "reason"),
    [
        ("walking", 2.0, "walking", ("0.8 m", "0 %")),
        ("running", 4.0, "walking", ("1.6 m", "40 %")),
        ("hopping", 0.1, "hopping", ("0.0 m", "50 %")),
        ("hopping on one leg", 2.0, "hopping", ("50 %",)),
        ("kneeling", 2.0, "kneeling", ("hind shin", "20 %")),
        ("on the knee", 2.0, "kneeling", ("hind shin", "20 %")),
        ("standing", 3.0, "shuffling", ("0 %",)),
        ("dragging", 3.0, "shuffling", ("0 %",)),
        ("walking", 0.5, "shuffling", ("0.2 m",)),
    ],
)
def test_a_gait_is_named_and_the_reason_tells_what_was_measured(stance, speed, name, reason):
    gait = viz.name_gait(episode(*STANCE[stance], speed=speed))
    assert gait["gait"] == name
    assert all(part in gait["why"] for part in reason)


def test_only_an_episode_that_terminates_with_the_reward_of_a_fall_is_a_fall():
    data = episode(*STANCE["walking"], fall=True)
    gait = viz.name_gait(data)
    assert gait["gait"] == "falling"
    assert "4.0 s of walking" in gait["why"]
    cut, end_of_course = {"terminated": np.zeros(200)}, {"rewards": np.zeros(200)}
    assert viz.name_gait(data | cut)["gait"] == "walking"
    assert viz.name_gait(data | end_of_course)["gait"] == "walking"


@pytest.mark.parametrize("swapped", [False, True])
def test_the_hind_leg_is_the_one_behind_whichever_comes_first(swapped):
    for stance, leg in ((STANCE["kneeling"], "hind"), (STANCE["kneeling"][::-1], "front")):
        gait = viz.name_gait(episode(*stance, swapped=swapped))
        assert gait["legs"][swapped] == "hind"
        assert f"the {leg} shin" in gait["why"]


@pytest.mark.parametrize(
    ("height", "steps", "kneels"),
    [(0.19, 200, False), (0.21, 200, True), (0.9, 9, False), (0.9, 11, True)],
)
def test_kneeling_is_contact_above_a_fifth_of_the_shin_in_over_5_percent(height, steps, kneels):
    data = episode(*STANCE["walking"])
    data["contacts"][:steps, 0] = 0, height
    assert (viz.name_gait(data)["gait"] == "kneeling") == kneels


def test_the_numbers_of_a_gait_are_those_of_hand_arithmetic():
    gait = viz.name_gait(episode(*STANCE["walking"]))
    assert gait["speed"] == pytest.approx(2)
    assert gait["hull_height"] == pytest.approx(1.7)
    assert gait["work"] == pytest.approx(np.full(200, 4 * 20 * 0.02))  # |-2 · 10| W, four motors
    assert gait["energy_per_m"] == pytest.approx(200 * 1.6 / (199 * 0.04))
    assert gait["stride_hz"] == pytest.approx(1 / 0.4)
    assert gait["starts"].tolist() == list(range(10, 200, 20))  # those of the front leg
    still = viz.name_gait(episode(*STANCE["standing"], speed=0.1))
    assert np.isnan([still["energy_per_m"], still["stride_hz"]]).all()


@pytest.mark.parametrize(("lift", "strides"), [(".", 9), ("..", 9), ("...", 19)])
def test_a_lift_of_one_or_two_steps_is_chatter_and_of_three_a_stride(lift, strides):
    hind = "-----" + lift + "-----".ljust(15 - len(lift), ".")
    assert len(viz.name_gait(episode(hind, "-"))["starts"]) == strides


# -------------------------------------------------------------------------------------- pictures


@pytest.mark.slow
def test_the_report_and_the_picture_tell_name_and_numbers(tmp_path, capsys):
    npz = write(tmp_path / "shipped.npz", episode(*STANCE["kneeling"]))
    report = viz.plot_gait(npz, tmp_path / "gait.png")
    assert report["gait"] == "kneeling"
    for part in ("kneeling", "2.0 m/s", "40 J/m", "1.7 m high", "2.5 strides/s"):
        assert part in report["text"]
    assert capsys.readouterr().out.strip() == report["text"]
    picture = imageio.imread(tmp_path / "gait.png")[..., :3]
    assert picture.shape == (1376, 1760, 3)
    red = [int(viz.RED[i : i + 2], 16) for i in (1, 3, 5)]
    assert (picture == red).all(axis=-1).sum() > 2000  # what kneels


@pytest.mark.parametrize("swapped", [False, True])
def test_the_footfall_diagram_shows_what_is_down_in_the_color_of_its_leg(tmp_path, saved, swapped):
    data = episode(*STANCE["walking"], swapped=swapped)
    data["joints"][:, 3 if swapped else 1, 0] = 0.5  # the hind knee
    viz.plot_gait(write(tmp_path / "a.npz", data), "a.png")
    figure, axes, title, _ = saved[0]
    assert title.startswith("a · walking")
    for leg, stance in zip(("hind", "front"), STANCE["walking"], strict=True):
        down = [round(0.02 * t, 6) for t in range(200) if stance[t % 20] == "-"]
        assert bars(axes, f"{leg} foot down") == down
    lines = panel(figure, "knee angle, °").get_lines()
    angles = {one.get_color(): one.get_ydata().mean() for one in lines}
    expected = {viz.COLORS["hind"]: np.degrees(0.5), viz.COLORS["front"]: np.degrees(0.1)}
    assert angles == pytest.approx(expected)


def test_joints_are_averaged_over_strides_and_shown_over_time_if_there_are_few(tmp_path, saved):
    data = episode(*STANCE["walking"])
    data["joints"][:, 1, 0] = np.cos(2 * np.pi * np.arange(200) / 20)
    data["joints"][:, 3, 0] = np.arange(200) // 20 == 5  # in one of nine strides
    viz.plot_gait(write(tmp_path / "a.npz", data), "a.png")
    viz.plot_gait(write(tmp_path / "b.npz", episode(*STANCE["standing"])), "b.png")
    knee, still = (panel(figure, "knee angle, °") for figure, *_ in saved)
    assert (knee.get_xlabel(), still.get_xlabel()) == ("% of a stride", "seconds")
    hind, front = knee.get_lines()
    x, y = hind.get_data()
    assert (x[0], x[-1]) == (0, 100)
    # A stride begins when the front leg comes down, half a stride after the hind leg.
    assert y == pytest.approx(np.degrees(np.cos(2 * np.pi * (x / 100 + 0.5))), abs=2)
    assert front.get_ydata().mean() == pytest.approx(np.degrees(1 / 9), abs=0.5)
    assert still.get_lines()[0].get_xdata()[-1] == pytest.approx(199 * 0.02)
    for title, value in (("hip torque, N m", 10), ("hull height, m", 1.7), ("speed, m/s", 2),
                         ("motors' power, W", 80), ("hip angle, °", np.degrees(0.1))):  # fmt: skip
        drawn = panel(saved[0][0], title).get_lines()[0].get_ydata()
        assert drawn == pytest.approx(value), title


@pytest.mark.parametrize(
    ("stance", "fall", "shown"), [("walking", True, 1.0), ("running", False, 0.5)]
)
def test_the_middle_of_an_episode_is_shown_or_the_last_seconds_before_a_fall(
    stance, fall, shown, tmp_path, saved
):
    viz.plot_gait(write(tmp_path / "a.npz", episode(*STANCE[stance], fall=fall)), "a.png")
    [footfall] = [axes for axes in saved[0][0].axes if axes.get_xlabel() == "seconds"]
    assert footfall.get_xlim() == pytest.approx((shown, shown + 3))  # of 4 s


def test_of_several_episodes_the_first_is_drawn(tmp_path):
    walk, kneel = episode(*STANCE["walking"]), episode(*STANCE["kneeling"])
    both = {name: np.concatenate([walk[name], kneel[name]]) for name in walk if name != "dt"}
    both |= {"dt": 0.02, "episode": np.repeat([0, 1], 200)}
    gait = viz.load_gait(write(tmp_path / "a.npz", both))
    assert (gait["gait"], len(gait["down"])) == ("walking", 200)


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_an_episode_may_be_short(tmp_path, steps):
    npz = write(tmp_path / "a.npz", episode(*STANCE["walking"], steps=steps))
    viz.plot_gait(npz, tmp_path / "a.png")
    assert imageio.imread(tmp_path / "a.png").shape[:2] == (1376, 1760)


# ---------------------------------------------------------------------------------------- values


# Two episodes of two steps; the first failed, the second was cut where the value is 6.
VALUES = {
    "gamma": 0.5, "episode": [0, 0, 1, 1], "learned_rewards": [1.0, 2.0, 1.0, -10.0],
    "failed": [False, True, False, False], "next_values": [9.0, 9.0, 9.0, 6.0],
    "values": [3.0, 2.0, -2.5, -6.0],
}  # fmt: skip


def test_returns_are_of_normalised_rewards_and_go_on_where_an_episode_was_cut():
    data = {name: np.array(value) for name, value in VALUES.items()}
    assert viz.realized_returns(data).tolist() == [1 + 0.5 * 2, 2, 1 - 0.5 * 7, -10 + 0.5 * 6]


def test_the_three_numbers_of_a_value_function(tmp_path, saved):
    text = viz.plot_value(write(tmp_path / "v.npz", VALUES), "v.png")
    realized = np.array([2, 2, -2.5, -7])  # the errors are 1, 0, 0, 1
    explained = 1 - 0.25 / (np.square(realized + 1.375).sum() / 4)
    for part in (f"variance {explained:.3f}", "bias +0.500", "RMSE 0.707"):
        assert part in text
    x, y = saved[0][1].get_lines()[0].get_data()
    assert (x.tolist(), y.tolist()) == ([3, 2, -2.5, -6], realized.tolist())


def test_a_perfect_value_function_explains_everything_and_of_a_constant_there_is_no_share(tmp_path):
    npz = write(tmp_path / "v.npz", VALUES | {"values": [2.0, 2.0, -2.5, -7.0]})
    assert "variance 1.000" in viz.plot_value(npz, tmp_path / "v.png")
    assert imageio.imread(tmp_path / "v.png").shape[:2] == (832, 1760)
    write(npz, VALUES | {"learned_rewards": np.zeros(4), "next_values": np.zeros(4)})
    assert "variance nan" in viz.plot_value(npz, tmp_path / "v.png")


# ---------------------------------------------------------------------------------- command line


def test_a_gait_goes_to_the_plots_of_its_run(tmp_path, monkeypatch, saved):
    for name in ("run/videos/best.npz", "here/best.npz"):
        write(tmp_path / name, episode(*STANCE["kneeling"]))
    monkeypatch.chdir(tmp_path)
    for file in ("run/videos/best.npz", "here/best.npz"):
        assert viz.main([file]) == 0
    written = [str(png) for *_, png in saved]
    assert written == ["run/plots/best_gait.png", "here/best_gait.png"]


def test_a_file_that_is_no_episode_is_refused_in_one_line_that_names_it(tmp_path, capsys):
    np.savez_compressed(tmp_path / "whole.npz", **episode("-", "-"))
    whole = (tmp_path / "whole.npz").read_bytes()
    broken = {"empty": b"", "text": b"step,loss\n1,2\n", "torn": whole[:-99]}
    broken["damaged"] = whole[:28] + bytes([whole[28] ^ 255]) + whole[29:]
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
    with open(tmp_path / "array", "wb") as file:
        np.save(file, np.zeros(3))
    write(tmp_path / "values.npz", VALUES)
    write(tmp_path / "words.npz", episode("-", "-") | {"hull": np.array(["a"])})
    for name in (*broken, "array", "values.npz", "words.npz", "missing"):
        with pytest.raises((viz.InputError, FileNotFoundError)) as error:
            viz.load_gait(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)
        assert "\n" not in str(error.value)
    assert viz.main([str(tmp_path / "values.npz")]) == viz.main(["missing.npz"]) == 2
    assert capsys.readouterr().err.count("\n") == 2


# ------------------------------------------------------------------------------------- measuring


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """150 steps of the shipped policy: their file, the steps, and the feet, (steps, 2, 2)."""
    learner = core.load_learner("checkpoints_walker/pretrained.pt", device="cpu")
    steps, feet = [], []
    for env, step in core.play(learner.act, learner.config, [3]):
        steps.append(step | viz.gait_state(env))
        feet.append([shin.GetWorldPoint((0, -17 / 30)) for shin in env.unwrapped.legs[1::2]])
        if len(steps) == 150:
            break
    path = tmp_path_factory.mktemp("run") / "a.npz"
    core.write_episode_data(learner, steps, path)
    return path, steps, np.array(feet)


def test_what_the_core_writes_of_a_shipped_policy_is_read_as_a_walking_gait(recorded, saved):
    path, steps, _ = recorded
    gait = viz.plot_gait(path, "g.png")
    assert gait["gait"] == "walking"
    assert gait["dt"] == 1 / 50
    travelled = np.diff([step["hull"][0] for step in steps]).mean() * 50
    assert gait["speed"] == pytest.approx(travelled)
    assert "RMSE" in viz.plot_value(path, "v.png")


def test_what_is_measured_agrees_with_the_observation_and_the_feet(recorded):
    path, steps, feet = recorded
    reported = np.array([step["next_observations"][[8, 13]] for step in steps]) > 0
    contacts = np.array([step["contacts"] for step in steps])
    assert reported.any()
    assert np.isfinite(contacts[reported]).all()
    assert (np.diff(contacts[reported]) >= 0).all()
    assert -0.2 < np.nanmin(contacts) < 0.1  # a foot
    shins = viz.load_gait(path)["knees"][..., :2] - feet
    assert np.hypot(*shins.T) == pytest.approx(34 / 30, abs=1e-4)  # a shin's length


def test_the_walker_is_drawn_as_it_stands(recorded, saved):
    path, _, feet = recorded
    gait = viz.plot_gait(path, "g.png")
    strip = next(axes for axes in saved[0][0].axes if axes.get_aspect() == 1)
    drawn = [one.get_xydata() for one in strip.get_lines() if len(one.get_xdata()) == 3]
    for i in range(12):
        t = int((i + 0.5) / 12 * 150)  # all 3 s are shown
        for leg in (0, 1):
            x, y = feet[t, leg] - gait["hull"][t, :2] + (2.4 * (i + 0.5), gait["height"][t])
            assert drawn[2 * i + leg][2] == pytest.approx([x, y], abs=1e-4)


class Car:
    """An environment with a hull and legs that are not a walker's."""

    hull, legs = "carbon", 4

    @property
    def unwrapped(self):
        return self


def test_another_environment_has_no_pose():
    env = core.make_env(core.Config(env="Pendulum-v1", device="cpu"))
    assert viz.gait_state(env) == viz.gait_state(Car()) == {}
    env.close()
