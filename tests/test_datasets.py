"""Demonstrations: our own files, LIBERO's and RoboMimic's names, and every way a file can be wrong."""

import json

import h5py
import numpy as np
import pytest

from common import UserError
from common.checkpoint import CheckpointError
from common.datasets import chunk_targets, load_demonstrations, save_demonstrations

RNG = np.random.default_rng(0)


def episode(steps: int, instruction: str) -> dict:
    return {
        "image": RNG.integers(0, 255, (steps, 2, 6, 8, 3), np.uint8),
        "proprio": RNG.normal(size=(steps, 5)).astype(np.float32),
        "actions": RNG.uniform(-1, 1, (steps, 7)).astype(np.float32),
        "instruction": instruction,
    }


@pytest.fixture
def own(tmp_path):
    episodes = [episode(2 + i % 3, f"lift cube {i % 2}") for i in range(12)]
    save_demonstrations(tmp_path / "own.hdf5", iter(episodes))
    return tmp_path / "own.hdf5", episodes


def test_roundtrip_in_the_order_of_numbers(own):
    path, episodes = own
    loaded = load_demonstrations(path)  # demo_10 comes after demo_9, not after demo_1
    for key, dtype in (("image", np.uint8), ("proprio", np.float32), ("actions", np.float32)):
        assert np.asarray(loaded[key]).dtype == dtype
        assert np.array_equal(loaded[key], np.concatenate([e[key] for e in episodes]))
    lengths = [len(e["actions"]) for e in episodes]
    assert loaded["episode_starts"].tolist() == [sum(lengths[:i]) for i in range(12)]
    assert loaded["instructions"] == ["lift cube 0", "lift cube 1"]
    assert loaded["task"].tolist() == [i % 2 for i in range(12) for _ in range(lengths[i])]
    assert loaded["task"].dtype == loaded["episode_starts"].dtype == np.int64
    few = load_demonstrations(path, max_demos=3, image_keys=("eye_in_hand_rgb",))
    assert len(few["episode_starts"]) == 3 and np.array_equal(
        np.asarray(few["image"])[:, 0], loaded["image"][np.arange(sum(lengths[:3]))][:, 1]
    )
    assert [p.name for p in path.parent.iterdir()] == ["own.hdf5"]


def write_libero(path, robomimic=False):
    steps, values = 4, {}
    values["image"] = RNG.integers(0, 255, (steps, 2, 6, 6, 3), np.uint8)
    values["pos"], values["fingers"] = RNG.normal(size=(steps, 3)), RNG.normal(size=(steps, 2))
    axis = RNG.normal(size=(steps, 3))
    axis /= np.linalg.norm(axis, axis=1, keepdims=True)
    angle = np.array([[0.0], [1e-5], [1.5], [4.0]])
    values["axis_angle"] = axis * angle
    values["quat"] = np.concatenate([axis * np.sin(angle / 2), np.cos(angle / 2)], axis=1)
    names = (
        [
            "agentview_image",
            "robot0_eye_in_hand_image",
            "robot0_eef_pos",
            "robot0_eef_quat",
            "robot0_gripper_qpos",
        ]
        if robomimic
        else ["agentview_rgb", "eye_in_hand_rgb", "ee_pos", "ee_ori", "gripper_states"]
    )
    orientation = values["quat" if robomimic else "axis_angle"]
    contents = [values["image"][:, 0], values["image"][:, 1], values["pos"], orientation, values["fingers"]]
    with h5py.File(path, "w") as file:
        if robomimic:
            file.create_group("data").attrs["env_args"] = json.dumps({"env_name": "NutAssemblySquare"})
        else:
            info = {"problem_name": "libero", "language_instruction": "put the bowl on the plate"}
            file.create_group("data").attrs["problem_info"] = json.dumps(info)
        file["data/demo_0/actions"] = np.zeros((steps, 7))
        file["data/demo_0/states"] = np.zeros((steps, 9))
        for name, content in zip(names, contents, strict=True):
            file[f"data/demo_0/obs/{name}"] = content
    return values


@pytest.mark.parametrize(
    ("name", "instruction"),
    [
        ("libero_object/pick_up_the_milk", "pick up the milk"),
        ("libero_10/LIVING_ROOM_SCENE2_put_both_the_pots_on_it", "put both the pots on it"),
        ("libero_90/KITCHEN_SCENE10_close_the_top_drawer", "close the top drawer"),
    ],
)
def test_liberos_task_is_named_as_its_benchmark_does(tmp_path, name, instruction):
    write_libero(tmp_path / "a.hdf5", False)
    with h5py.File(tmp_path / "a.hdf5", "a") as file:
        file["data"].attrs["bddl_file_name"] = f"libero/bddl_files/{name}.bddl"
    assert load_demonstrations(tmp_path / "a.hdf5")["instructions"] == [instruction]


@pytest.mark.parametrize("robomimic", [False, True])
def test_libero_and_robomimic_names(tmp_path, robomimic):
    values = write_libero(tmp_path / "a.hdf5", robomimic)
    loaded = load_demonstrations(tmp_path / "a.hdf5")
    assert np.array_equal(loaded["image"], values["image"])
    expected = np.concatenate([values["pos"], values["axis_angle"], values["fingers"]], axis=1)
    np.testing.assert_allclose(loaded["proprio"], expected, rtol=1e-6, atol=1e-12)
    assert loaded["proprio"].dtype == loaded["actions"].dtype == np.float32
    assert loaded["instructions"] == ["nut assembly square" if robomimic else "put the bowl on the plate"]


def replace(file, key, value):
    del file[key]
    file[key] = value


def nan(file, key, row):
    file[key][row, 1] = np.nan


FAULTS = {
    "no group 'data'": lambda f: f.move("data", "other"),
    "no demonstrations": lambda f: [f["data"].__delitem__(name) for name in list(f["data"])],
    "demo_1 has no array 'actions'": lambda f: f.__delitem__("data/demo_1/actions"),
    "demo_2 has no array 'obs/proprio'": lambda f: f.__delitem__("data/demo_2/obs/proprio"),
    "demo_2 has no array 'obs/agentview_image'": lambda f: f.__delitem__("data/demo_2/obs/agentview_rgb"),
    "demo_3 has no array 'obs/proprio'": lambda f: f.__delitem__("data/demo_3/obs"),
    "demo_0 has NaN or infinity in actions, row 1": lambda f: nan(f, "data/demo_0/actions", 1),
    "demo_1 has NaN or infinity in proprio, row 2": lambda f: nan(f, "data/demo_1/obs/proprio", 2),
    "demo_0 has actions of shape": lambda f: replace(f, "data/demo_0/actions", np.zeros((2, 6))),
    "demo_0 has actions of shape (0, 7)": lambda f: [
        replace(f, f"data/demo_0/{key}", f[f"data/demo_0/{key}"][:0])
        for key in ("actions", "obs/proprio", "obs/agentview_rgb", "obs/eye_in_hand_rgb")
    ],
    "demo_0 has actions outside": lambda f: replace(f, "data/demo_0/actions", np.full((2, 7), 1.002)),
    "demo_0 has actions |S1": lambda f: replace(f, "data/demo_0/actions", np.full((2, 7), b"a")),
    "demo_0 has proprio float64 (3, 5)": lambda f: replace(f, "data/demo_0/obs/proprio", np.zeros((3, 5))),
    "demo_1 has proprio of shape": lambda f: replace(f, "data/demo_1/obs/proprio", np.zeros((3, 4))),
    "demo_0 has agentview_rgb float64": lambda f: replace(
        f, "data/demo_0/obs/agentview_rgb", np.zeros((2, 6, 8, 3))
    ),
    "demo_0 has eye_in_hand_rgb of size (6, 6)": lambda f: replace(
        f, "data/demo_0/obs/eye_in_hand_rgb", np.zeros((2, 6, 6, 3), np.uint8)
    ),
    "demo_1 has image of shape": lambda f: [
        replace(f, f"data/demo_1/obs/{key}", np.zeros((3, 4, 4, 3), np.uint8))
        for key in ("agentview_rgb", "eye_in_hand_rgb")
    ],
    "demo_0 has decided of shape (3,)": lambda f: f["data/demo_0"].create_dataset("decided", data=np.ones(3)),
    "demo_0 has no instruction": lambda f: f["data/demo_0"].attrs.__delitem__("language_instruction"),
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_faulty_file_is_named_in_one_sentence(own, message):
    path, _ = own
    with h5py.File(path, "a") as file:
        FAULTS[message](file)
    with pytest.raises(UserError) as error:
        load_demonstrations(path)
    assert message in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_rounding_of_recorders_is_accepted(own):
    path, _ = own
    with h5py.File(path, "a") as file:
        file["data/demo_0/actions"][0, 0] = -1.0005
    assert load_demonstrations(path, max_demos=1)["actions"][0, 0] == np.float32(-1.0005)


def test_a_file_that_is_no_hdf5_is_named(own, tmp_path):
    path, _ = own
    (tmp_path / "text.hdf5").write_text("hello" * 100)
    (tmp_path / "half.hdf5").write_bytes(path.read_bytes()[:-500])
    for name, message in {
        "text.hdf5": "not HDF5",
        "half.hdf5": "truncated",
        "gone.hdf5": "does not exist",
    }.items():
        with pytest.raises(UserError) as error:
            load_demonstrations(tmp_path / name)
        assert name in str(error.value) and message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="at least 1"):
        load_demonstrations(path, max_demos=0)


def test_saving_checks_before_it_replaces(own, tmp_path):
    path, episodes = own
    before = path.read_bytes()
    bad = {**episodes[0], "actions": np.full((2, 7), np.nan)}
    one_camera = {**episodes[0], "image": episodes[0]["image"][:, :1]}
    for faulty in ([], [episodes[0], bad], [one_camera]):
        with pytest.raises(UserError):
            save_demonstrations(path, faulty)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(CheckpointError):
        save_demonstrations(path / "below a file.hdf5", episodes)


def test_chunk_targets_against_a_loop():
    starts, total, chunk = np.array([0, 3, 4, 9]), 11, 4
    actions = RNG.normal(size=(total, 7)).astype(np.float32)
    targets, mask = chunk_targets(actions, starts, chunk)
    assert targets.shape == (total, chunk, 7) and mask.shape == (total, chunk) and mask.dtype == bool
    ends = [*starts[1:], total]
    for start, end in zip(starts, ends, strict=True):
        for s in range(start, end):
            for k in range(chunk):
                assert mask[s, k] == (s + k < end)
                assert np.array_equal(targets[s, k], actions[s + k] if s + k < end else actions[end - 1])
    for wrong in ([1, 3], [0, 3, 3], [0, 11], []):
        with pytest.raises(UserError):
            chunk_targets(actions, np.array(wrong, np.int64), chunk)
    with pytest.raises(UserError):
        chunk_targets(actions, starts, 0)
