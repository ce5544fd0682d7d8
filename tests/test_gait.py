"""Claims about gaits and values in `viz.py`, and about the data that the core writes for them."""

import os

import imageio.v3 as imageio
import numpy as np
import pytest

import viz
import walker_core as core

# What a leg touches the ground with: from where to where, from the foot up, as shares of its shin.
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


def episode(hind, front, speed=2.0, steps=200, last_reward=0.0, terminated=False, swapped=False):
    """An episode over flat ground at height 5, with the legs' contacts repeated; x grows evenly.

    Every motor turns at 2 rad/s against 10 N m; the hull is 1.7 m above the ground.
    """
    x = speed * 0.02 * np.arange(steps)
    marks = [np.resize(list(leg), steps) for leg in (hind, front)]
    contacts = np.array([[TOUCHES[mark] for mark in pair] for pair in zip(*marks, strict=True)])
    knees = np.full((steps, 2, 3), 5.0)
    knees[:, :, 0] = x[:, None] + (-0.2, 0.6)
    hull = np.zeros((steps, 6))
    hull[:, :4] = np.stack([x, np.full(steps, 6.7), np.zeros(steps), np.full(steps, speed)], 1)
    order = [1, 0] if swapped else [0, 1]
    return {
        "dt": 0.02, "gamma": 0.9, "reward_scale": 2.0, "reward_clip": (-10.0, 10.0),
        "episode": np.zeros(steps, int), "hull": hull,
        "joints": np.full((steps, 4, 3), (0.1, -2, 10)),
        "knees": knees[:, order], "contacts": contacts[:, order],
        "rewards": np.append(np.zeros(steps - 1), last_reward),
        "terminated": np.arange(steps) == (steps - 1 if terminated else -1),
        "values": np.zeros(steps), "next_values": np.zeros(steps),
    }  # fmt: skip


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **data)
    return path


@pytest.fixture
def figures(monkeypatch):
    """Figure, axes of the legend and title of each picture that would be saved."""
    kept = []
    monkeypatch.setattr(viz, "_save", lambda *picture: kept.append(picture[:3]))
    return kept


def panel(figure, title):
    return next(axes for axes in figure.axes if axes.get_title("left") == title)


def bars(axes, color):
    """Seconds and legs of all bars of a colour in a footfall diagram."""
    from matplotlib.colors import to_rgba

    drawn = [
        c
        for c in axes.collections
        if len(c.get_paths()) and tuple(c.get_facecolor()[0]) == to_rgba(color)
    ]
    corners = [path.vertices.min(axis=0) for one in drawn for path in one.get_paths()]
    return sorted((round(float(x), 6), round(float(y) + 0.4)) for x, y in corners)


# ------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("stance", "speed", "name", "why"),
    [
        ("walking", 2.0, "walking", "strides of 0.8 m, 0 % of the steps in the air"),
        ("running", 4.0, "walking", "strides of 1.6 m, 40 % of the steps in the air"),
        ("hopping", 2.0, "hopping", "50 % of the steps in the air"),
        ("hopping", 0.1, "hopping", "strides of 0.0 m"),
        ("hopping on one leg", 2.0, "hopping", "50 % of the steps in the air"),
        ("kneeling", 2.0, "kneeling", "the hind shin is on the ground in 20 % of the steps"),
        ("on the knee", 2.0, "kneeling", "the hind shin is on the ground in 20 % of the steps"),
        ("standing", 0.0, "shuffling", "strides of 0.0 m"),
        ("standing", 3.0, "shuffling", "m, 0 % of the steps in the air"),
        ("dragging", 3.0, "shuffling", "strides of"),
        ("walking", 0.5, "shuffling", "strides of 0.2 m"),
    ],
)
def test_each_gait_is_called_by_its_name(stance, speed, name, why):
    gait = viz.name_gait(episode(*STANCE[stance], speed=speed))
    assert gait["gait"] == name
    assert why in gait["why"]


def test_a_fall_is_told_from_the_end_of_the_course_and_from_a_cut():
    walk = STANCE["walking"]
    fell = viz.name_gait(episode(*walk, last_reward=-100.0, terminated=True))
    assert (fell["gait"], fell["why"]) == ("falling", "after 4.0 s of walking")
    for reward, terminated in ((0.3, True), (-100.0, False), (-99.0, True)):
        data = episode(*walk, last_reward=reward, terminated=terminated)
        assert viz.name_gait(data)["gait"] == "walking"


@pytest.mark.parametrize("swapped", [False, True])
def test_the_leg_behind_is_the_hind_leg_whichever_comes_first(swapped):
    gait = viz.name_gait(episode(*STANCE["kneeling"], swapped=swapped))
    assert gait["legs"][int(swapped)] == "hind"
    assert gait["why"].startswith("the hind shin")
    gait = viz.name_gait(episode(*STANCE["kneeling"][::-1], swapped=swapped))
    assert gait["why"].startswith("the front shin")


@pytest.mark.parametrize(("height", "name"), [(0.19, "walking"), (0.21, "kneeling")])
def test_the_lowest_fifth_of_the_shin_is_the_foot(height, name):
    data = episode(*STANCE["walking"])
    data["contacts"][..., 1] = np.where(np.isnan(data["contacts"][..., 1]), np.nan, height)
    assert viz.name_gait(data)["gait"] == name


@pytest.mark.parametrize(("steps", "name"), [(9, "walking"), (11, "kneeling")])
def test_a_stumble_is_no_kneeling(steps, name):
    data = episode(*STANCE["walking"])
    data["contacts"][:steps, 1] = TOUCHES["#"]  # of 200 steps
    assert viz.name_gait(data)["gait"] == name


def test_the_numbers_of_a_gait_are_those_of_hand_arithmetic():
    gait = viz.name_gait(episode(*STANCE["walking"]))
    assert gait["speed"] == pytest.approx(2)
    assert gait["hull_height"] == pytest.approx(1.7)
    assert gait["work"] == pytest.approx(np.full(200, 4 * 20 * 0.02))  # |−2 · 10| W, four motors
    assert gait["energy_per_m"] == pytest.approx(200 * 1.6 / (199 * 0.04))
    assert gait["stride_hz"] == pytest.approx(1 / 0.4)
    assert gait["starts"].tolist() in ([*range(20, 200, 20)], [*range(10, 200, 20)])


def test_there_is_no_energy_per_metre_without_a_metre_and_no_frequency_without_strides():
    gait = viz.name_gait(episode(*STANCE["standing"], speed=0.1))
    assert np.isnan([gait["energy_per_m"], gait["stride_hz"]]).all()


def test_a_lift_of_one_or_two_steps_is_chatter_and_of_three_a_stride():
    for lift, strides in ((".", 10), ("..", 10), ("...", 19)):
        hind = "-----" + lift + "-----".ljust(15 - len(lift), ".")
        gait = viz.name_gait(episode(hind, STANCE["walking"][1]))
        assert len(gait["starts"]) in (strides - 1, strides), lift


# ---------------------------------------------------------------------------------------- pictures


def test_the_report_tells_the_name_and_the_numbers(tmp_path, capsys):
    npz = write(tmp_path / "shipped.npz", episode(*STANCE["kneeling"]))
    found = viz.plot_gait(npz, tmp_path / "plots" / "gait.png")
    assert found["gait"] == "kneeling"
    assert found["text"].splitlines() == [
        "kneeling: the hind shin is on the ground in 20 % of the steps",
        "2.0 m/s · 40 J/m · hull 1.7 m high · 2.5 strides/s",
    ]
    assert capsys.readouterr().out == found["text"] + "\n"
    picture = imageio.imread(tmp_path / "plots" / "gait.png")[..., :3]
    assert picture.shape == (1376, 1760, 3)
    red = [int(viz.RED[i : i + 2], 16) for i in (1, 3, 5)]
    assert (picture == red).all(axis=-1).sum() > 2000


def test_the_footfall_diagram_shows_who_is_down_and_who_kneels_in_the_middle(tmp_path, figures):
    viz.plot_gait(write(tmp_path / "a.npz", episode(*STANCE["kneeling"])), "a.png")
    _, axes, title = figures[0]
    assert title.startswith("a · kneeling: ")
    assert axes.get_xlim() == pytest.approx((0.5, 3.5))  # of 4 s
    assert [text.get_text() for text in axes.get_yticklabels()] == ["hind", "front"]
    knees = [t for t in range(200) if STANCE["kneeling"][0][t % 20] == "#"]
    assert bars(axes, viz.RED) == [(round(0.02 * t, 6), 0) for t in knees]
    front = [t for t in range(200) if STANCE["kneeling"][1][t % 20] == "-"]
    assert (
        bars(axes, viz.LEGS["front"])[: len(front) - 1]
        == [(round(0.02 * t, 6), 1) for t in front][:-1]
    )
    labels = axes.get_legend_handles_labels()[1]
    assert labels == ["hind foot down", "front foot down", "shin or knee down"]


def test_a_leg_has_its_colour_whichever_comes_first(tmp_path, figures):
    for swapped in (False, True):
        data = episode(*STANCE["running"], swapped=swapped)
        data["joints"][:, 3 if swapped else 1, 0] = 0.5  # the hind knee
        viz.plot_gait(write(tmp_path / "a.npz", data), "a.png")
    for figure, axes, _ in figures:
        lines = panel(figure, "knee angle, °").get_lines()
        angles = {one.get_color(): one.get_ydata().mean() for one in lines}
        assert angles[viz.LEGS["hind"]] == pytest.approx(np.degrees(0.5))
        assert angles[viz.LEGS["front"]] == pytest.approx(np.degrees(0.1))
        times = {round(t % 0.4, 6) % 0.4 for t, _ in bars(axes, viz.LEGS["hind"])}
        assert len(bars(axes, viz.LEGS["hind"])) == 60
        assert max(times) == pytest.approx(0.1)


def test_before_a_fall_the_last_seconds_are_shown(tmp_path, figures):
    data = episode(*STANCE["walking"], last_reward=-100.0, terminated=True)
    viz.plot_gait(write(tmp_path / "a.npz", data), "a.png")
    assert figures[0][1].get_xlim() == pytest.approx((1.0, 4.0))


def test_joints_are_drawn_over_the_stride_and_over_time_where_there_are_few(tmp_path, figures):
    data = episode(*STANCE["walking"])
    data["joints"][:, 1, 0] = np.cos(2 * np.pi * np.arange(200) / 20)
    data["joints"][:, 3, 0] = np.arange(200) // 20 == 5  # in one of nine strides, half each
    viz.plot_gait(write(tmp_path / "a.npz", data), "a.png")
    data |= episode(*STANCE["standing"])
    viz.plot_gait(write(tmp_path / "b.npz", data), "b.png")
    knee, still = (panel(figure, "knee angle, °") for figure, _, _ in figures)
    assert (knee.get_xlabel(), still.get_xlabel()) == ("% of a stride", "seconds")
    x, y = knee.get_lines()[0].get_data()
    assert (x[0], x[-1], len(knee.get_lines())) == (0, 100, 2)
    # a stride begins where the front leg, which comes down more often, does: half a stride later
    assert y == pytest.approx(np.degrees(np.cos(2 * np.pi * (x / 100 + 0.5))), abs=2)
    assert knee.get_lines()[1].get_ydata().mean() == pytest.approx(np.degrees(1 / 9), abs=0.5)
    assert still.get_lines()[0].get_xdata()[-1] == pytest.approx(199 * 0.02)
    for title, value in (("hip torque, N m", 10), ("hull height, m", 1.7), ("speed, m/s", 2),
                         ("motors' power, W", 80), ("hip angle, °", np.degrees(0.1))):  # fmt: skip
        assert panel(figures[0][0], title).get_lines()[0].get_ydata() == pytest.approx(value), title


def test_the_story_puts_the_gaits_side_by_side_in_the_order_given(tmp_path, figures):
    fall = episode(*STANCE["walking"], last_reward=-100.0, terminated=True)
    names = {
        "early": fall,
        "middle": episode(*STANCE["kneeling"]),
        "last": episode(*STANCE["running"]),
    }
    viz.plot_story([write(tmp_path / f"{k}.npz", data) for k, data in names.items()], "s.png")
    figure, _, title = figures[0]
    assert title == "falling → kneeling → walking"
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == [
        "early\nfalling, 2.0 m/s",
        "middle\nkneeling, 2.0 m/s",
        "last\nwalking, 2.0 m/s",
    ]


def test_of_a_file_of_several_episodes_the_first_is_drawn(tmp_path):
    walk, kneel = episode(*STANCE["walking"]), episode(*STANCE["kneeling"])
    both = {
        k: np.concatenate([walk[k], kneel[k]])
        if np.ndim(walk[k]) and k != "reward_clip"
        else walk[k]
        for k in walk
    }
    both["episode"] = np.repeat([0, 1], 200)
    gait = viz.load_gait(write(tmp_path / "a.npz", both))
    assert (gait["gait"], len(gait["down"]), gait["speed"]) == ("walking", 200, pytest.approx(2))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("steps", [1, 2, 3, 30])
def test_an_episode_may_be_short(tmp_path, steps):
    npz = write(tmp_path / "a.npz", episode(*STANCE["walking"], steps=steps))
    viz.plot_gait(npz, tmp_path / "a.png")
    viz.plot_story([npz], tmp_path / "s.png")
    viz.plot_value(npz, tmp_path / "v.png")
    assert sorted(os.listdir(tmp_path)) == ["a.npz", "a.png", "s.png", "v.png"]


# ------------------------------------------------------------------------------------------ values


def values():
    """Two episodes of two steps; the first terminated, the second cut where the value is 6."""
    return {
        "dt": 0.5, "gamma": 0.5, "reward_scale": 2.0, "reward_clip": (-10.0, 10.0),
        "episode": [0, 0, 1, 1], "rewards": [2.0, 4.0, 2.0, -100.0],
        "terminated": [False, True, False, False], "next_values": [9.0, 9.0, 9.0, 6.0],
        "values": [3.0, 2.0, -2.5, -6.0],
    }  # fmt: skip


def test_returns_are_of_normalised_rewards_and_go_on_where_an_episode_was_cut():
    data = {name: np.array(value) for name, value in values().items()}
    assert viz.realised_returns(data).tolist() == [1 + 0.5 * 2, 2, 1 - 0.5 * 7, -10 + 0.5 * 6]


def test_the_three_numbers_of_a_value_function(tmp_path, figures):
    text = viz.plot_value(write(tmp_path / "v.npz", values()), "v.png")
    realised, error = np.array([2, 2, -2.5, -7]), np.array([1, 0, 0, 1])
    explained = 1 - 0.25 / (np.square(realised + 1.375).sum() / 4)
    assert text == f"value: explained variance {explained:.3f}, bias +0.500, RMSE 0.707"
    calibration, over_time = figures[0][0].axes
    x, y = calibration.get_lines()[0].get_data()
    assert (x.tolist(), y.tolist()) == ([3, 2, -2.5, -6], realised.tolist())
    x, y = over_time.get_lines()[0].get_data()
    assert (x.tolist(), y.tolist()) == ([0.5, 0, 0.5, 0], error.tolist())


def test_a_perfect_value_function_explains_everything_and_a_constant_return_nothing(tmp_path):
    data = values() | {"values": [2.0, 2.0, -2.5, -7.0]}
    text = viz.plot_value(write(tmp_path / "v.npz", data), tmp_path / "v.png")
    assert text == "value: explained variance 1.000, bias +0.000, RMSE 0.000"
    assert imageio.imread(tmp_path / "v.png").shape[:2] == (832, 1760)
    data |= {"rewards": np.zeros(4), "next_values": np.zeros(4)}
    assert "variance nan" in viz.plot_value(write(tmp_path / "v.npz", data), tmp_path / "v.png")


# -------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        (["run/videos/best.npz"], "run/plots/best_gait.png"),
        (["here/best.npz"], "here/best_gait.png"),
        (["run/videos/best.npz", "here/best.npz"], "plots/story.png"),
        (["here/best.npz", "--out", "x.png"], "x.png"),
    ],
)
def test_a_gait_goes_to_the_plots_of_its_run_and_a_story_to_plots(
    tmp_path, monkeypatch, capsys, arguments, written
):
    for name in ("run/videos/best.npz", "here/best.npz"):
        write(tmp_path / name, episode(*STANCE["kneeling"]))
    monkeypatch.chdir(tmp_path)
    assert viz.main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1] == written
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")] == [written]


def damaged(path, byte):
    data = bytearray(path.read_bytes())
    data[byte] ^= 255
    path.write_bytes(data)


def one_array(path):
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))


def pressed(path):
    np.savez_compressed(path, **episode("-", "-"))


WRONG = {
    "missing.npz": lambda path: None,
    "folder.npz": lambda path: path.mkdir(),
    "empty.npz": lambda path: path.write_bytes(b""),
    "text.npz": lambda path: path.write_text("step,loss\n1,2\n"),
    "one_array.npz": one_array,
    "no_gait.npz": lambda path: np.savez(path, **values()),
    "words.npz": lambda path: np.savez(path, **episode("-", "-") | {"hull": np.array(["a"])}),
    "torn.npz": lambda path: path.write_bytes(write(path, episode("-", "-")).read_bytes()[:-99]),
    "damaged.npz": lambda path: damaged(write(path, episode("-", "-")), 3000),
    "pressed.npz": lambda path: (pressed(path), damaged(path, 28)),  # where its data begin
    "method.npz": lambda path: (pressed(path), damaged(path, -756)),  # how it was pressed
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_episode_is_refused_in_one_line_that_names_it(tmp_path, capsys, name):
    WRONG[name](tmp_path / name)
    good = write(tmp_path / "good.npz", episode(*STANCE["walking"]))
    for files in ([tmp_path / name], [good, tmp_path / name]):
        assert viz.main([*map(str, files), "--out", str(tmp_path / "x.png")]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert name in err
    assert not (tmp_path / "x.png").exists()


# ---------------------------------------------------------------------------------- what is written


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """An untrained walker's episodes: file, rows, and where the feet were, (states, 2, 2)."""
    settings = {"device": "cpu", "num_envs": 1, "rollout_steps": 64, "minibatch_size": 64}
    learner = core.Learner(core.Config(env="BipedalWalker-v3", **settings))
    path, rows, feet = tmp_path_factory.mktemp("run") / "a.npz", [], []
    for env, row in core.play(learner.act, learner.config, [3, 4]):
        shins = env.unwrapped.legs[1::2]
        feet.append([shin.GetWorldPoint((0, -17 / 30)) for shin in shins])
        rows.append(row | core.gait_state(env))
        if len(rows) == 200:
            break
    core.write_data(learner, rows, path)
    return path, rows, np.array(feet)


def test_the_core_writes_what_the_pictures_read(recorded, tmp_path, capsys):
    path, rows, _ = recorded
    gait = viz.load_gait(path)
    assert gait["dt"] == 1 / 50
    assert gait["hull"].shape == (sum(row["episode"] == 0 for row in rows), 6)
    assert viz.plot_gait(path, tmp_path / "g.png")["gait"] in (
        "falling",
        "kneeling",
        "shuffling",
        "hopping",
    )
    assert "RMSE" in viz.plot_value(path, tmp_path / "v.png")


def test_a_contact_that_the_observation_reports_is_measured(recorded):
    _, rows, _ = recorded
    flags = np.array([row["next_observations"][[8, 13]] for row in rows]) > 0
    contacts = np.array([row["contacts"] for row in rows])
    assert flags.any()
    assert np.isfinite(contacts[flags]).all()
    assert (np.diff(contacts[flags]) >= 0).all()
    assert -0.2 < np.nanmin(contacts) < 0.1  # it begins on its feet
    assert np.nanmax(contacts) < 1.3


def test_a_knee_is_a_shins_length_from_the_foot(recorded):
    path, rows, feet = recorded
    count = sum(row["episode"] == 0 for row in rows)
    away = viz.load_gait(path)["knees"][..., :2] - feet[:count]
    assert np.hypot(*away.T) == pytest.approx(34 / 30, abs=1e-4)
    assert (away[0, :, 1] > 0).all()


def test_the_walker_is_drawn_as_it_stands(recorded, figures):
    path, _, feet = recorded
    viz.plot_gait(path, "g.png")
    strip = next(axes for axes in figures[0][0].axes if axes.get_aspect() == 1)
    shins = [line for line in strip.get_lines() if np.size(line.get_xdata()) == 2]
    gait = viz.load_gait(path)
    first, last = (round(second / gait["dt"]) for second in figures[0][1].get_xlim())
    shown = first + ((np.arange(12) + 0.5) / 12 * (last - first)).astype(int)
    drawn = {tuple(np.round([line.get_xdata()[1], line.get_ydata()[1]], 2)) for line in shins}
    for i, t in enumerate(shown):
        for foot in feet[t]:
            x = 2.4 * i + 1.2 + foot[0] - gait["hull"][t, 0]
            y = foot[1] - gait["knees"][t, :, 2].mean()
            assert min(np.hypot(x - a, y - b) for a, b in drawn) < 0.02


def test_another_environment_has_no_gait():
    env = core.make_env(core.Config(env="Pendulum-v1", device="cpu"))
    assert core.gait_state(env) == {}
    env.close()
