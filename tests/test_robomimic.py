"""RoboMimic's files: what env_args may name, what is read of them, conversions of robosuite's own
demonstrations, and command lines that train on them and evaluate in the environment that they name.

Needs requirements-robosuite.txt.
"""

import importlib.util
import json
import os

import h5py
import numpy as np
import pytest
from test_cli import call, results, run, shell, words

import bc_warmup
import cql
import decision_transformer
import iql
import td3_bc
from common import UserError
from common.datasets import load_dataset, load_demonstrations
from common.envs import robomimic as world
from common.envs import robosuite, to_robomimic

if not importlib.util.find_spec("robosuite"):
    pytest.skip(
        "ROBOSUITE IS NOT INSTALLED, ROBOMIMIC'S WORLD IS NOT TESTED: python3 common/install.py --robosuite",
        allow_module_level=True,
    )

FLAT = {"type": "OSC_POSE", "input_max": 1, "input_min": -1, "output_max": [0.05] * 3 + [0.5] * 3, "kp": 150}
FLAT |= {
    "output_min": [-0.05] * 3 + [-0.5] * 3,
    "damping": 1,
    "impedance_mode": "fixed",
    "kp_limits": [0, 300],
}
FLAT |= {"damping_limits": [0, 10], "position_limits": None, "orientation_limits": None, "ramp_ratio": 0.2}
FLAT |= {"uncouple_pos_ori": True, "control_delta": True, "interpolation": None}
PART = {
    key: value for key, value in FLAT.items() if key not in ("damping", "damping_limits", "control_delta")
}
PART |= {
    "damping_ratio": 1,
    "damping_ratio_limits": [0, 10],
    "input_type": "delta",
    "input_ref_frame": "base",
}
BASIC = {"type": "BASIC", "body_parts": {"right": {**PART, "gripper": {"type": "GRIP"}}}}
KWARGS = {"has_renderer": False, "has_offscreen_renderer": False, "ignore_done": True, "use_object_obs": True}
KWARGS |= {"use_camera_obs": False, "control_freq": 20, "controller_configs": FLAT, "robots": ["Panda"]}
KWARGS |= {"camera_depths": False, "camera_heights": 84, "camera_widths": 84, "reward_shaping": False}
ENV_ARGS = {"env_name": "Lift", "env_version": "1.4.1", "type": 1, "env_kwargs": KWARGS}
FOUR = ("object", "robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")


def env_args(name="Lift", drop=(), **kwargs):
    kept = {key: value for key, value in (KWARGS | kwargs).items() if key not in drop}
    return ENV_ARGS | {"env_name": name, "env_kwargs": kept}


def convert(path, flags):
    to_robomimic.main(words(f"--out {path} {flags}"))
    return path


@pytest.fixture(scope="module")
def expert(tmp_path_factory):
    """Two scripted demonstrations of Lift with pictures, in an environment that ends after 6 steps."""
    path = convert(tmp_path_factory.mktemp("demos") / "expert.hdf5",
                   "--source Lift --episodes 2 --noise 0.1 --cameras agentview wrist --size 32")  # fmt: skip
    with h5py.File(path, "a") as file:
        file["data"].attrs["env_args"] = json.dumps(env_args(horizon=6))
    return path


@pytest.fixture
def file(expert, tmp_path):
    """A copy, to change."""
    path = tmp_path / "lift.hdf5"
    path.write_bytes(expert.read_bytes())
    return path


def change(path, edit):
    with h5py.File(path, "a") as opened:
        edit(opened)
    return path


def name(path, text):
    return change(path, lambda f: f["data"].attrs.__setitem__("env_args", text))


# --- what env_args may name


def test_both_forms_of_a_controller_are_one_environment():
    flat, parts = (
        world.named_environment(json.dumps(env_args(controller_configs=config)), "f")
        for config in (FLAT, BASIC)
    )
    assert json.loads(flat["named"])["controller_configs"][0]["kp"] == 150
    assert json.loads(parts["named"])["controller_configs"][0].pop("damping_ratio") == 1
    for each in (flat, parts):
        (osc,) = json.loads(each["named"])["controller_configs"]
        osc.pop("damping_ratio", None)
        assert osc == {key: FLAT[key] for key in ("type", "interpolation", "kp", "output_max", "output_min")}
        assert (each["task"], each["horizon"]) == ("Lift", None)
    nested = {"type": "BASIC", "body_parts": {"arms": BASIC["body_parts"]}}
    assert world.named_environment(json.dumps(env_args(controller_configs=nested)), "f") == parts


def test_published_environments_are_known():
    """Names and arguments of RoboMimic's v141 files (DPPO's env_meta), and two arms in 1.5's words."""
    two = dict(robots=["Panda"] * 2, env_configuration="single-arm-opposed")
    for task in ("Lift", "PickPlaceCan", "NutAssemblySquare", "ToolHang"):
        assert world.named_environment(json.dumps(env_args(task)), "f")["task"] == task
    found = world.named_environment(json.dumps(env_args("TwoArmTransport", **two, horizon=700)), "f")
    assert json.loads(found["named"])["env_configuration"] == "single-arm-opposed"
    assert len(json.loads(found["named"])["controller_configs"]) == 2 and found["horizon"] == 700
    upright = {"type": "BASIC", "body_parts": {"right": PART | {"input_ref_frame": "world"}}}
    newer = two | dict(env_configuration="opposed", controller_configs=[upright] * 2, lite_physics=False)
    newer = world.named_environment(json.dumps(env_args("TwoArmTransport", **newer)), "f")
    assert json.loads(newer["named"])["env_configuration"] == "single-arm-opposed"


def osc(**changed):
    return env_args(controller_configs=FLAT | changed)


WRONG = {
    "env_name Pour": env_args("Pour"),
    "env_name ['Lift']": env_args(["Lift"]),
    "type 2": ENV_ARGS | {"type": 2},
    "has no env_args that name": {"env_name": "Lift"},
    "f has no env_args": [1, 2],
    "robots ['Sawyer']": env_args(robots=["Sawyer"]),
    "robots ['Panda', 'Panda']": env_args(robots=["Panda"] * 2),
    "robots ['/tmp/robot.py']": env_args(robots=["/tmp/robot.py"]),
    "control_freq 10": env_args(control_freq=10),
    "horizon -3": env_args(horizon=-3),
    "horizon True": env_args(horizon=True),
    "horizon 1000000000000": env_args(horizon=10**12),
    "placement_initializer {'__reduce__': 'os.system'}": env_args(
        placement_initializer={"__reduce__": "os.system"}
    ),
    "custom_fpath /etc/passwd": env_args(custom_fpath="/etc/passwd"),
    "hard_reset_hook x, which is not run here; known: no such name": env_args(hard_reset_hook="x"),
    "gripper_types WipingGripper": env_args(gripper_types="WipingGripper"),
    "initialization_noise {'magnitude': 9}": env_args(initialization_noise={"magnitude": 9}),
    "env_configuration bimanual": env_args(env_configuration="bimanual"),
    "controller_configs /tmp/x.json": env_args(controller_configs="/tmp/x.json"),
    "controller_configs [": env_args(controller_configs=[FLAT, FLAT]),
    "type IK_POSE, which is not run here; known: OSC_POSE": osc(type="IK_POSE"),
    "type None": env_args(controller_configs={"kp": 1}),
    "type WHOLE_BODY_IK": env_args(controller_configs=BASIC | {"type": "WHOLE_BODY_IK"}),
    "body_parts None": env_args(controller_configs={"type": "BASIC", "body_parts": {}}),
    "body_parts 3": env_args(controller_configs={"type": "BASIC", "body_parts": {"right": 3}}),
    "kp 1e999": json.dumps(osc(kp=1)).replace('"kp": 1', '"kp": 1e999'),
    "kp [1, 2]": osc(kp=[1, 2]),
    "kp eval, which is not run here; known: a number, or six": osc(kp="eval"),
    "kp 99999": osc(kp=int("9" * 400)),
    "kp NaN": json.dumps(osc(kp=float("nan"))),
    "control_delta False": osc(control_delta=False),
    "impedance_mode variable": osc(impedance_mode="variable"),
    "input_max 2": osc(input_max=2),
    "interpolation linear": osc(interpolation="linear"),
    "sim x": osc(sim="x"),
    "input_ref_frame base": env_args("TwoArmLift", robots=["Panda"] * 2, controller_configs=BASIC),
    "input_ref_frame base, which is not run here; known: world": env_args(  # 1.5's own
        "TwoArmLift",
        robots=["Panda"] * 2,
        controller_configs={"type": "BASIC", "body_parts": {"right": FLAT}},
    ),
    "f has no env_args that": "[" * 100_000,
    "has no env_args that name an": "no json",
}


@pytest.mark.parametrize("said", WRONG)
def test_what_an_environment_may_not_be_made_of(said):
    text = WRONG[said] if isinstance(WRONG[said], str) else json.dumps(WRONG[said])
    said = {"kp 1e999": "kp inf", "kp NaN": "kp nan"}.get(said, said)
    with pytest.raises(UserError) as error:
        world.named_environment(text, "f")
    sentence = str(error.value)
    assert said in sentence and sentence.startswith("f") and sentence.endswith(".") and "\n" not in sentence


def test_an_environment_is_never_made_of_a_wrong_file(file, monkeypatch):
    import robosuite as package

    monkeypatch.setattr(package, "make", lambda *args, **kwargs: pytest.fail("it was made"))
    for given in (env_args("Pour"), env_args(custom_fpath="/etc/passwd"), osc(type="IK_POSE")):
        name(file, json.dumps(given))
        done = call(iql, f"--dataset {file} --output-dir {file.parent}")
        assert done.code == 2 and "env_args have" in done.err and done.err.count("\n") == 1, done
    for text in (np.float32(3), h5py.Empty("f"), b"\xff", np.zeros(3)):
        name(file, text)
        with pytest.raises(UserError, match="has no env_args that name"):
            world.read(file)


# --- the world


def stock(kwargs, task="Lift"):
    import robosuite as package

    np.random.seed(0)
    return package.make(task, **kwargs | {"hard_reset": False})


@pytest.mark.parametrize("config", [FLAT, BASIC], ids=["1.4", "1.5"])
def test_it_is_robosuites_own_loop_bit_for_bit(file, config):
    """With a controller that is not the default, every key that a file can have, of bodies and of joints."""
    changed = {"kp": 90, "output_max": [0.04] * 3 + [0.3] * 3, "output_min": [-0.04] * 3 + [-0.3] * 3}
    right = config.get("body_parts", {}).get("right")
    named = {"type": "BASIC", "body_parts": {"right": right | changed}} if right else config | changed
    name(file, json.dumps(env_args(controller_configs=named)))
    widths = world.read(file)["widths"]
    assert len(widths) == 8 and list(widths) == sorted(widths)
    more = {"robot0_eef_vel_lin": 3, "robot0_eef_vel_ang": 3, "robot0_joint_pos": 7}
    with h5py.File(file, "a") as opened:
        for key, width in more.items():
            for demo in opened["data"].values():
                demo[f"obs/{key}"] = np.zeros((len(demo["actions"]), width))
    widths = world.read(file)["widths"]
    env = world.make(file=str(file), cameras=("none",))
    env.reset(seed=3)
    rng = np.random.default_rng([0, 3])
    rng.choice(1)
    state = np.random.RandomState(int(rng.integers(2**32))).get_state()
    other = stock(KWARGS | {"controller_configs": FLAT | changed})
    for key in more:
        other.modify_observable(key, "active", True)
    np.random.set_state(state)
    other.reset()
    for action in np.random.default_rng(0).uniform(-1, 1, (6, 7)).astype(np.float32):
        obs = env.step(action)[0]["proprio"]
        seen = other.step(action.astype(np.float64))[0]
        own = [seen["object-state" if key == "object" else key] for key in widths]
        np.testing.assert_array_equal(obs, np.concatenate(own).astype(np.float32))
    assert obs.shape == (sum(widths.values()),) and env.observation_space["proprio"].shape == obs.shape
    env.close()
    other.close()


def test_keys_and_cameras_are_the_files_or_those_asked_for(file):
    env = world.make(file=str(file), cameras=("wrist",))
    obs = env.reset(seed=1)[0]
    assert obs["image"].shape == (1, 32, 32, 3) and env.keys == FOUR[1:] and obs["proprio"].shape == (9,)
    assert env.observation_space.contains(obs) and env.limit == 6
    turned = world.make(file=str(file), keys=("robot0_gripper_qpos", "object"), horizon=9)
    states = turned.reset(seed=1)[0]
    assert set(states) == {"proprio"} and turned.limit == 9
    assert np.array_equal(states["proprio"][:2], obs["proprio"][7:]) and states["proprio"].shape == (12,)
    name(file, json.dumps(env_args()))
    assert world.make(file=str(file)).horizon == 400
    assert env.instructions == ["lift the cube"]
    for each in (env, turned):
        each.close()


@pytest.mark.parametrize(
    ("edit", "kwargs", "said"),
    [
        (None, dict(keys=("nose",)), "has no numbers 'nose' in its obs; it has object, robot0_eef_pos"),
        (
            "PickPlaceCan",
            {},
            "has 10 numbers of object, robosuite's PickPlaceCan shows 14; give --env robomimic",
        ),
        ("head_pos", {}, "has 3 numbers of head_pos, robosuite's Lift shows 0"),
        (None, dict(file=None), "--env robomimic needs --file"),
        (None, dict(file="gone.hdf5"), "gone.hdf5 is no file; give one in RoboMimic's layout"),
        ("obs", {}, "lift.hdf5 is not in RoboMimic's layout"),
        ("none", {}, "lift.hdf5 is not in RoboMimic's layout"),
    ],
)
def test_keys_that_are_not_the_environments(file, edit, kwargs, said):
    if edit == "PickPlaceCan":
        name(file, json.dumps(env_args(edit)))
    elif edit == "obs":
        change(
            file, lambda f: (f.__delitem__("data/demo_0/obs"), f.__setitem__("data/demo_0/obs", np.ones(3)))
        )
    elif edit == "none":
        change(file, lambda f: [f["data"].__delitem__(demo) for demo in list(f["data"])])
    elif edit:
        change(file, lambda f: f["data/demo_0/obs"].create_dataset(edit, data=np.zeros((3, 3))))
    with pytest.raises(UserError) as error:
        world.make(**{"file": str(file), "cameras": ("none",)} | kwargs)
    assert said in str(error.value) and "\n" not in str(error.value) and str(error.value).endswith(".")


def test_folders_and_pipes_are_no_files(tmp_path):
    """A pipe would be waited for."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        for read, said in (
            (world.read, "is no file; give one"),
            (to_robomimic.recorded, "is no file with states"),
        ):
            with pytest.raises(UserError, match=said):
                read(path)


def test_a_files_actions_lead_to_its_observations(file):
    """From its layout on, as the script drew it; its sensors lag by a substep once the arm moves."""
    name(file, json.dumps(env_args()))
    data, layout = load_dataset(file), np.random.default_rng([1, 1]).integers(2**31, size=2).tolist()[0]
    env, states = world.make(file=str(file), cameras=("none",)), data.states[: data.episode_starts[1]]
    obs = env.reset(seed=layout)[0]["proprio"]
    assert np.array_equal(obs, states[0])
    for state, action in zip(states, data.actions, strict=False):
        assert np.abs(obs - state).max() < 3e-3
        obs, reward, terminated, _, _ = env.step(action)
        obs = obs["proprio"]
    assert terminated and reward == data.rewards[len(states) - 1] == 1.0
    env.close()


# --- conversions


@pytest.mark.parametrize(
    ("source", "steps", "won", "width", "task"),
    [("lift", 1381, 3, 7, "Lift"), ("handover", 2768, 5, 14, "TwoArmHandover")],
)
def test_peoples_demonstrations(tmp_path, capsys, source, steps, won, width, task):
    """robosuite's own, in their states; what was written is what a stock environment shows there."""
    path = convert(tmp_path / "a.hdf5", f"--source {source}")
    assert f"of {steps} steps, {won} successful" in capsys.readouterr().out
    with h5py.File(path) as file:
        data, demos = file["data"], list(file["data"].values())
        assert data.attrs["total"] == sum(demo.attrs["num_samples"] for demo in demos) == steps
        assert sum(bool(demo.attrs["success"]) for demo in demos) == won
        assert file["mask/train"].asstr()[0] == "demo_0" and "<mujoco" in demos[0].attrs["model_file"]
        named = json.loads(data.attrs["env_args"])
        assert (named["env_name"], named["type"], named["env_kwargs"]["horizon"]) == (
            task, 1, 600 if source == "lift" else 700,
        )  # fmt: skip
        other = stock(named["env_kwargs"] | KWARGS | {"robots": ["Panda"] * (width // 7)}, task)
        for demo in (demos[0], demos[-1]):
            assert demo["actions"].shape == (len(demo["states"]), width)
            assert not (demo["rewards"][()] != demo["dones"][()]).any()
            for row in (0, len(demo["states"]) // 2, len(demo["states"]) - 1):
                other.sim.set_state_from_flattened(demo["states"][row])
                other.sim.forward()
                seen = other._get_observations(force_update=True)
                for key in demo["obs"]:
                    own = seen["object-state" if key == "object" else key]
                    np.testing.assert_array_equal(demo[f"obs/{key}"][row], own, key)
                if row:
                    assert other._check_success() == demo["rewards"][row - 1]
                    now, before = demo[f"obs/{key}"][row], demo[f"next_obs/{key}"][row - 1]
                    np.testing.assert_array_equal(now, before)
        other.close()


def test_pictures_are_upright_and_of_the_state(expert):
    other = stock(KWARGS | {"has_offscreen_renderer": True})
    with h5py.File(expert) as file:
        demo = file["data/demo_0"]
        assert "next_obs" not in demo and demo["obs/agentview_image"].shape[1:] == (32, 32, 3)
        for row in (0, len(demo["actions"]) - 1):
            other.sim.set_state_from_flattened(demo["states"][row])
            other.sim.forward()
            for camera in ("agentview", "robot0_eye_in_hand"):
                theirs = other.sim.render(camera_name=camera, width=32, height=32).astype(float)
                ours = demo[f"obs/{camera}_image"][row].astype(float)
                right, wrong = (np.abs(ours - x).mean() for x in (theirs[::-1], theirs))
                assert right < 12 and right < wrong / 2, (camera, row, right, wrong)
    other.close()


def test_a_robomimic_file_is_rendered_anew(file, tmp_path, capsys):
    path = convert(tmp_path / "again.hdf5", f"--source {file} --cameras wrist --size 16")
    with h5py.File(path) as again, h5py.File(file) as first:
        for demo in first["data"]:
            steps = len(first[f"data/{demo}/actions"]) - 1  # its states end before the last outcome
            assert again[f"data/{demo}/obs/robot0_eye_in_hand_image"].shape == (steps, 16, 16, 3)
            for key in ("actions", "rewards", "obs/object", "obs/robot0_joint_vel"):
                ours, theirs = again[f"data/{demo}/{key}"][()], first[f"data/{demo}/{key}"][:steps]
                np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--source gone.hdf5", "gone.hdf5 is no file with states"),
        ("--source Lift --episodes 1 --cameras nose", "robosuite has no camera 'nose'"),
        ("--source wipe", "wipe is no file with states"),
    ],
)
def test_what_cannot_be_converted(tmp_path, capsys, flags, said):
    with pytest.raises(SystemExit) as stop:
        convert(tmp_path / "a.hdf5", flags)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and said in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


# --- what is read


def write_low_dim(path, lengths, ends, next_obs, order=("object", "robot0_eef_pos")):
    """Demonstrations whose object counts states, 100 a demonstration; ends: the rows that are done."""
    with h5py.File(path, "w") as file:
        file.create_group("data").attrs["env_args"] = json.dumps(ENV_ARGS)
        for i, (steps, done) in enumerate(zip(lengths, ends, strict=True)):
            demo, time = file.create_group(f"data/demo_{i}"), 100.0 * i + np.arange(steps + 1)
            for group in ("obs", "next_obs") if next_obs else ("obs",):
                rows = time[1:] if group == "next_obs" else time[:-1]
                demo[f"{group}/{order[0]}"], demo[f"{group}/{order[1]}"] = rows[:, None], -rows[:, None]
                demo[f"{group}/agentview_image"] = np.zeros((steps, 4, 4, 3), np.uint8)
            demo["actions"] = np.tile(time[:-1, None] / 1000, 7)
            demo["rewards"] = demo["dones"] = np.isin(np.arange(steps), done).astype(np.int64)
    return path


@pytest.mark.parametrize("next_obs", [True, False])
def test_ends_of_episodes(tmp_path, next_obs):
    """The first success ends one, and is not bootstrapped; of one that ends otherwise the last transition
    leads to its next_obs, or is left out where there is none."""
    path = write_low_dim(tmp_path / "a.hdf5", (4, 3, 5, 1), ([3], [], [2, 3, 4], []), next_obs)
    data = load_dataset(path)
    starts = [0, 4, 7, 10] if next_obs else [0, 4, 6]
    wanted = [0, 1, 2, 3, 100, 101, 102, 200, 201, 202, 300]
    follow = [1, 2, 3, 4, 101, 102, 103, 201, 202, 203, 301]
    if not next_obs:
        wanted, follow = [0, 1, 2, 3, 100, 101, 200, 201, 202], [1, 2, 3, 3, 101, 102, 201, 202, 203]
    assert data.observations[:, 0].tolist() == wanted and data.next_observations[:, 0].tolist() == follow
    assert np.array_equal(data.observations[:, 1], -data.observations[:, 0])
    assert data.episode_starts.tolist() == starts
    ends = np.isin(wanted, [3, 202])
    assert np.array_equal(data.terminations, ends) and np.array_equal(data.rewards, ends.astype(np.float32))
    np.testing.assert_allclose(data.actions[:, 6], np.array(wanted) / 1000, rtol=1e-6)
    assert data.env_id == "robomimic" and data.env_flags["keys"] == ("object", "robot0_eef_pos")
    turned = load_dataset(path, ("robot0_eef_pos", "object"))
    assert np.array_equal(turned.observations, data.observations[:, ::-1])
    assert turned.env_flags["keys"] == ("robot0_eef_pos", "object")
    write_low_dim(path, (1, 1), ([], []), False)
    with pytest.raises(UserError, match="only episodes of one row"):
        load_dataset(path)


def test_teleoperation_is_clipped_as_the_controller_does_and_nonsense_is_not(file, capsys):
    def put(row, value):
        change(file, lambda f: f["data/demo_1/actions"].__setitem__((row, 1), value))

    def both():
        demos = load_demonstrations(file, image_keys=("agentview_image",))
        return demos["actions"], load_dataset(file).actions

    before = both()
    assert capsys.readouterr().err == ""
    put(2, -3.75)
    row = 2 + int(load_dataset(file).episode_starts[1])
    capsys.readouterr()
    for actions, old in zip(both(), before, strict=True):
        assert actions[row, 1] == -1 and np.array_equal(np.delete(actions, row, 0), np.delete(old, row, 0))
    said = f"warning: {file}: 1 of {len(before[0])} actions are beyond [-1, 1], and clipped as robosuite's "
    assert capsys.readouterr().err == 2 * f"{said}controllers do.\n"
    for value, sentence in ((11, "actions"), (np.nan, "NaN"), (np.inf, "actions|NaN")):
        put(2, value)
        for load in (
            lambda: load_demonstrations(file, image_keys=("agentview_image",)),
            lambda: load_dataset(file),
        ):
            with pytest.raises(UserError, match=sentence):
                load()
    put(2, 1.5)
    change(file, lambda f: f["data"].attrs.__delitem__("env_args"))  # of nobody knows which controller
    with pytest.raises(UserError, match=r"outside \[-1, 1\] in row 2; normalise them first"):
        load_demonstrations(file, image_keys=("agentview_image",))
    assert load_dataset(file).env_id is None and load_dataset(file).actions.max() == 1.5


def test_two_arms_are_read_as_the_world_of_robosuite_shows_them(tmp_path):
    path = tmp_path / "two.hdf5"
    with h5py.File(path, "w") as file:
        file.create_group("data").attrs["env_args"] = json.dumps(env_args("TwoArmLift"))
        for k in range(2):
            obs = file.require_group("data/demo_0/obs")
            obs[f"robot{k}_eef_pos"], obs[f"robot{k}_gripper_qpos"] = (
                np.full((2, 3), k),
                np.full((2, 2), 5 + k),
            )
            obs[f"robot{k}_eef_quat"] = np.tile([np.sin(0.5), 0, 0, np.cos(0.5)], (2, 1))
        file["data/demo_0/actions"] = np.zeros((2, 14))
    demos = load_demonstrations(path, image_keys=(), action_dim=14, names=robosuite.DEMO_TASKS)
    assert "image" not in demos and demos["instructions"] == ["lift the pot with both arms"]
    arm = [0, 0, 0, 1, 0, 0, 5, 5, 1, 1, 1, 1, 0, 0, 6, 6]
    np.testing.assert_allclose(demos["proprio"], [arm, arm], atol=1e-6)


# --- command lines

SMALL = "--device cpu --seed 3 --eval-episodes 1"
BC = f"{SMALL} --eval-envs 1 --num-workers 0 --gradient-steps 2 --batch-size 4 --warmup-steps 1"


def test_the_command_line_learns_and_evaluates_in_the_files_world(expert, tmp_path):
    small = f"{SMALL} --total-timesteps 3 --no-normalize-rewards --batch-size 8 --output-dir {tmp_path}"
    done = shell(iql, f"--dataset {expert} {small} --run-name r", cwd=tmp_path)
    assert done.returncode == 0, done
    found = results(tmp_path / "r")
    assert found["final"]["success_rate"] == 0.0 and len(found["final"]["success_rate_ci95"]) == 2
    assert found["final"]["mean_length"] == 6.0 and found["gradient_steps"] == 3
    again = f"--evaluate --checkpoint {tmp_path}/r --output-dir {tmp_path} --run-name e --eval-episodes 1"
    run(iql, again, "--device cpu")
    assert results(tmp_path / "e")["final"] == found["final"]


@pytest.mark.parametrize("script", [td3_bc, cql, decision_transformer])
def test_the_other_scripts_too_with_keys_of_choice(expert, tmp_path, script):
    flags = f"--env robomimic --dataset {expert} --keys {' '.join(FOUR)} --horizon 4 {SMALL} --batch-size 8"
    more = "--warmup-steps 1 --target-returns 1" if script is decision_transformer else ""
    run(script, flags, f"--total-timesteps 2 --output-dir {tmp_path} --run-name r {more}")
    found = results(tmp_path / "r")
    assert found["args"]["keys"] == list(FOUR) and found["args"]["file"] == str(expert)
    assert found["final"]["mean_length"] == 4.0 and "success_rate_ci95" in found["final"]


def test_a_file_without_evaluation_needs_no_environment(file, tmp_path):
    name(file, json.dumps(env_args("Pour")))
    flags = f"--total-timesteps 2 --no-normalize-rewards --device cpu --output-dir {tmp_path} --run-name r"
    run(iql, f"--dataset {file} --eval-episodes 0", flags)
    assert results(tmp_path / "r")["final"] == {"episodes": 0}


def test_cloning_from_states_of_the_file(file, tmp_path):
    change(
        file, lambda f: [f[f"data/{demo}"].attrs.__delitem__("language_instruction") for demo in f["data"]]
    )
    flags = f"--env robomimic --demos {file} --cameras none --backbone mlp --head gaussian --chunk 2 {BC}"
    run(bc_warmup, flags, f"--output-dir {tmp_path} --run-name r")
    found = results(tmp_path / "r")
    assert found["args"]["cameras"] == ["none"] and len(found["args"]["keys"]) == 8
    assert found["final"]["mean_length"] == 6.0 and found["final"]["success_rate"] == 0.0
    again = (
        f"--evaluate --checkpoint {tmp_path}/r --eval-episodes 1 --eval-envs 1 --num-workers 0 --device cpu"
    )
    run(bc_warmup, again, f"--output-dir {tmp_path} --run-name e")
    assert results(tmp_path / "e")["final"] == found["final"]
    for flag in ("--image-aug 0.3", "--word-dropout 0.1"):
        done = call(bc_warmup, flags, f"{flag} --output-dir {tmp_path}")
        assert done.code == 2 and "--env robomimic shows no pictures" in done.err, done
    done = call(bc_warmup, flags, f"--keys nose --output-dir {tmp_path}")
    assert done.code == 2 and "has no numbers 'nose'" in done.err and done.err.count("\n") == 1
    done = call(bc_warmup, flags.replace("mlp --head gaussian", "tiny"), f"--output-dir {tmp_path}")
    assert done.code == 2 and "for vector observations use --backbone mlp" in done.err


def test_cloning_from_pictures_then_from_its_own_rollouts(file, tmp_path):
    base = f"--env robomimic --file {file} {BC} --output-dir {tmp_path}"
    run(bc_warmup, base, f"--demos {file} --run-name r")
    found = results(tmp_path / "r")["args"]
    assert found["head"] == "tokens" and found["cameras"] == ["agentview", "wrist"]
    assert found["keys"] == list(FOUR[1:])
    rollouts = f"--checkpoint {tmp_path}/r --collect 1 --save-dataset {tmp_path}/own.hdf5 --run-name c"
    run(bc_warmup, base, rollouts)
    with h5py.File(tmp_path / "own.hdf5") as own:
        assert own["data/demo_0/obs/robot0_eef_quat"].shape == (6, 4)
    run(bc_warmup, base, f"--demos {tmp_path}/own.hdf5 --run-name again")
    plain = f"--env robosuite --demos {file} --size 32 {BC} --output-dir {tmp_path} --run-name plain"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(robosuite.TASKS, "Lift", (1, 5, "lift the cube"))
        run(bc_warmup, plain)
