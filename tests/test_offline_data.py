"""Offline data: right next observations in every layout, D4RL's tables, broken downloads, every refusal."""

import functools
import http.server
import sys
import threading
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pytest

from common import UserError, datasets
from common.checkpoint import CheckpointError
from common.datasets import D4RL_FILES, load_dataset, reference_scores, save_d4rl

REAL = Path(__file__).parents[1].parent / "shared" / "data" / "real"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"the recorded files are not in {REAL}")


def make_episodes(seed: int, lengths=(4, 1, 6, 2, 1, 5), sizes=(3, 2)) -> list[dict]:
    """Episodes of T steps: T + 1 observations, T actions and rewards; every second one terminates."""
    rng = np.random.default_rng(seed)
    return [
        {
            "observations": rng.normal(size=(steps + 1, sizes[0])).astype(np.float32),
            "actions": rng.uniform(-1, 1, (steps, sizes[1])).astype(np.float32),
            "rewards": rng.normal(size=steps).astype(np.float32),
            "terminated": number % 2 == 0,
        }
        for number, steps in enumerate(lengths)
    ]


def flat(episodes: list[dict]) -> dict[str, np.ndarray]:
    """The arrays of D4RL's layout, one row after another."""
    rows = {key: [] for key in ("observations", "actions", "rewards", "next_observations")}
    rows |= {"terminals": [], "timeouts": []}
    for episode in episodes:
        steps = len(episode["rewards"])
        for t in range(steps):
            last = t == steps - 1
            rows["observations"].append(episode["observations"][t])
            rows["next_observations"].append(episode["observations"][t + 1])
            rows["actions"].append(episode["actions"][t])
            rows["rewards"].append(episode["rewards"][t])
            rows["terminals"].append(last and episode["terminated"])
            rows["timeouts"].append(last and not episode["terminated"])
    return {key: np.array(value) for key, value in rows.items()}


def write(path: Path, arrays: dict[str, np.ndarray], **attributes) -> Path:
    with h5py.File(path, "w") as file:
        for key, value in arrays.items():
            file[key] = value
        file.attrs.update(attributes)
    return path


def check_whole(dataset, episodes: list[dict]) -> None:
    """Every row of every episode is there, with its next observation, and none is held twice."""
    expected = flat(episodes)
    for key in ("observations", "actions", "rewards", "next_observations"):
        assert np.array_equal(getattr(dataset, key), expected[key]), key
        assert getattr(dataset, key).dtype == np.float32
    assert np.array_equal(dataset.terminations, expected["terminals"]) and dataset.terminations.dtype == bool
    lengths = [len(episode["rewards"]) for episode in episodes]
    assert dataset.episode_starts.tolist() == [sum(lengths[:i]) for i in range(len(lengths))]
    assert dataset.episode_starts.dtype == dataset.next_index.dtype == np.int64
    assert dataset.states.shape == (sum(lengths) + len(lengths), expected["observations"].shape[1])
    assert np.shares_memory(dataset.observations, dataset.states)


HAND = {  # rows 0-2 end in a terminal, 3-5 in a time-out, 6 is a time-out of one step, 7-8 is unfinished
    "observations": np.arange(9.0)[:, None] + [0.0, 100.0],
    "actions": np.arange(9.0)[:, None],
    "rewards": np.arange(9.0)[:, None],  # some of D4RL's are (N, 1)
    "terminals": np.isin(np.arange(9), [2]).astype(np.float32),
    "timeouts": np.isin(np.arange(9), [5, 6]),
}
HAND_NEXT = np.array([1.0, 2, 52, 4, 5, 55, 56, 8, 58])[:, None] + [0.0, 100.0]


def test_a_row_before_a_time_out_is_only_a_next_observation(tmp_path):
    dataset = load_dataset(write(tmp_path / "a.hdf5", HAND))
    assert dataset.observations.tolist() == [[i, 100 + i] for i in (0, 1, 2, 3, 4, 7)]
    assert dataset.actions[:, 0].tolist() == dataset.rewards.tolist() == [0, 1, 2, 3, 4, 7]
    assert dataset.terminations.tolist() == [False, False, True, False, False, False]
    # row 2 terminates, its next observation was not recorded and is never used: its own stands there
    assert dataset.next_observations[:, 0].tolist() == [1, 2, 2, 4, 5, 8]
    assert dataset.episode_starts.tolist() == [0, 3, 5]
    assert len(dataset.states) == 9
    assert dataset.env_id is None and dataset.reference_scores is None


@pytest.mark.parametrize("marked", [True, False])
def test_recorded_next_observations_keep_every_row(tmp_path, marked):
    arrays = {**HAND, "next_observations": HAND_NEXT}
    if not marked:  # ends are where the next observation is not the next row's
        del arrays["timeouts"]
    dataset = load_dataset(write(tmp_path / "a.hdf5", arrays))
    assert np.array_equal(dataset.observations, HAND["observations"])
    assert np.array_equal(dataset.next_observations, HAND_NEXT)
    assert dataset.terminations.tolist() == (np.arange(9) == 2).tolist()
    assert dataset.episode_starts.tolist() == [0, 3, 6, 7]
    assert len(dataset.states) == 9 + 4


def test_a_terminal_at_the_time_limit_is_a_terminal(tmp_path):
    arrays = {**HAND, "timeouts": np.isin(np.arange(9), [2, 5])}
    dataset = load_dataset(write(tmp_path / "a.hdf5", arrays))
    assert dataset.terminations.tolist() == [i == 2 for i in (0, 1, 2, 3, 4, 6, 7)]
    assert dataset.next_observations[:, 0].tolist() == [1, 2, 2, 4, 5, 7, 8]


@pytest.mark.parametrize("block", [1, 7, 10**6])
@pytest.mark.parametrize("seed", range(3))
def test_saved_episodes_come_back_whole(tmp_path, monkeypatch, block, seed):
    monkeypatch.setattr(datasets, "BLOCK", block)
    episodes = make_episodes(seed)
    arrays = flat(episodes)
    terminations = arrays.pop("terminals")
    save_d4rl(tmp_path / "new" / "a.hdf5", **arrays, terminations=terminations, env_id="Hopper-v5")
    dataset = load_dataset(tmp_path / "new" / "a.hdf5")
    check_whole(dataset, episodes)
    assert dataset.env_id == "Hopper-v5" and dataset.reference_scores == (-20.272305, 3234.3)
    assert dataset.name == str(tmp_path / "new" / "a.hdf5")
    with h5py.File(tmp_path / "new" / "a.hdf5") as file:
        assert file["terminals"].dtype == file["timeouts"].dtype == bool
        assert np.array_equal(file["timeouts"], arrays["timeouts"])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_roundings_of_next_observations_end_no_episode(tmp_path, scale):
    """A file off by 3e-7 of its numbers had 2000 episodes; small resets that nobody marked are found."""
    rng, lengths = np.random.default_rng(0), [40, 7, 153]
    arrays = flat(make_episodes(1, lengths))
    arrays["timeouts"][:] = False
    starts = np.cumsum([0, *lengths])[:-1]
    for key in ("observations", "next_observations"):
        arrays[key] = (scale * arrays[key]).astype(np.float32)
    # the second episode starts where the first ends, but for a thousandth in one dimension
    arrays["observations"][40] = arrays["next_observations"][39] + np.float32([0, 1e-3 * scale, 0])
    noise = 3e-7 * scale * rng.choice([-1, 1], arrays["next_observations"].shape)
    arrays["next_observations"] = (arrays["next_observations"] + noise).astype(np.float32)
    arrays["terminals"][:] = False
    dataset = load_dataset(str(write(tmp_path / "off.hdf5", arrays)))
    assert dataset.episode_starts.tolist() == starts.tolist()
    np.testing.assert_allclose(dataset.next_observations, arrays["next_observations"], atol=1e-5 * scale * 5)


@pytest.mark.parametrize("block", [1, 7, 10**6])
def test_without_next_observations_against_a_loop(tmp_path, monkeypatch, block):
    monkeypatch.setattr(datasets, "BLOCK", block)
    episodes = make_episodes(5, lengths=(4, 1, 1, 6, 2, 1, 3, 5))
    arrays = flat(episodes)
    del arrays["next_observations"]
    dataset = load_dataset(write(tmp_path / "a.hdf5", arrays))
    i, starts = 0, []
    for episode in episodes:
        steps = len(episode["rewards"]) - (not episode["terminated"])
        starts += [i] if steps else []
        for t in range(steps):
            terminal = episode["terminated"] and t == steps - 1
            assert np.array_equal(dataset.observations[i], episode["observations"][t])
            after = episode["observations"][t if terminal else t + 1]
            assert np.array_equal(dataset.next_observations[i], after)
            assert np.array_equal(dataset.actions[i], episode["actions"][t])
            assert dataset.rewards[i] == episode["rewards"][t] and dataset.terminations[i] == terminal
            i += 1
    assert len(dataset.actions) == len(dataset.rewards) == i and dataset.episode_starts.tolist() == starts


def test_saving_checks_before_it_replaces(tmp_path):
    path = tmp_path / "a.hdf5"
    arrays = flat(make_episodes(0))
    arrays["terminations"] = arrays.pop("terminals")
    save_d4rl(path, **arrays)
    before = path.read_bytes()
    nan = arrays["actions"].copy()
    nan[3, 1] = np.nan
    for change, message in (
        ({"actions": nan}, "NaN or infinity in 'actions', row 3"),
        ({"next_observations": arrays["observations"][:, :2]}, "'next_observations'"),
        ({"timeouts": arrays["timeouts"][1:]}, "'timeouts'"),
        ({key: value[:0] for key, value in arrays.items()}, "'rewards'"),
    ):
        with pytest.raises(UserError, match=message):
            save_d4rl(path, **{**arrays, **change})
    with pytest.raises(CheckpointError):
        save_d4rl(path / "below a file.hdf5", **arrays)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# --- Names, tasks, scores -----------------------------------------------------------------------------------


def test_reference_scores_are_the_published_ones():
    for name, low, high in (
        ("hopper-medium-v2", -20.272305, 3234.3),
        ("halfcheetah-medium-expert-v0", -280.178953, 12135.0),
        ("walker2d-random-v1", 1.629008, 4592.3),
        ("antmaze-large-diverse-v2", 0.0, 1.0),
        ("kitchen-mixed-v0", 0.0, 4.0),
        ("ant-expert-v2", -325.6, 3879.7),
        ("hammer-human-v1", -274.856578, 12794.134825156867),
        ("relocate-cloned-v0", -6.425911, 4233.877797728884),
        ("maze2d-open-v0", 0.01, 20.66),
        ("maze2d-medium-v1", 13.13, 277.39),
        ("maze2d-large-v1", 6.7, 273.99),
        ("maze2d-umaze-v1", 23.85, 161.86),
        ("pen-human-v0", 96.262799, 3076.8331),
        ("door-cloned-v1", -56.512833, 2880.5693),
        ("HalfCheetah-v5", -280.178953, 12135.0),
        ("Walker2d-v4", 1.629008, 4592.3),
        ("hopper_mine", -20.272305, 3234.3),
    ):
        assert reference_scores(name) == pytest.approx((low, high), rel=1e-7), name
    for name in ("Pendulum-v1", "maze2d-umaze-v9", "Walker2d-v5", "Ant-v5"):
        assert reference_scores(name) is None, name


def test_urls_are_the_published_ones():
    for name, file in {  # d4rl/infos.py
        "hopper-medium-v2": "gym_mujoco_v2/hopper_medium-v2.hdf5",
        "ant-full-replay-v1": "gym_mujoco_v1/ant_full_replay-v1.hdf5",
        "walker2d-medium-replay-v0": "gym_mujoco/walker_mixed.hdf5",
        "halfcheetah-medium-expert-v0": "gym_mujoco/halfcheetah_medium_expert.hdf5",
        "antmaze-umaze-v0": "ant_maze_new/Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse.hdf5",
        "antmaze-large-play-v2": "ant_maze_v2/"
        "Ant_maze_hardest-maze_noisy_multistart_True_multigoal_False_sparse_fixed.hdf5",
        "antmaze-medium-diverse-v2": "ant_maze_v2/"
        "Ant_maze_big-maze_noisy_multistart_True_multigoal_True_sparse_fixed.hdf5",
        "door-human-v1": "hand_dapg_v1/door-human-v1.hdf5",
        "pen-cloned-v0": "hand_dapg/pen-demos-v0-bc-combined.hdf5",
        "kitchen-partial-v0": "kitchen/kitchen_microwave_kettle_light_slider-v0.hdf5",
        "maze2d-umaze-v1": "maze2d/maze2d-umaze-sparse-v1.hdf5",
        "maze2d-open-dense-v0": "maze2d/maze2d-open-dense.hdf5",
    }.items():
        assert D4RL_FILES[name] == file
    assert len(set(D4RL_FILES.values())) == len(D4RL_FILES) == 115


@pytest.fixture
def d4rl_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    return tmp_path


def test_a_name_reads_the_file_in_d4rls_folder(d4rl_folder):
    episodes = make_episodes(1, sizes=(17, 6))
    published = write(d4rl_folder / "walker_mixed.hdf5", flat(episodes))
    own = write(d4rl_folder / "halfcheetah_mine.hdf5", flat(episodes))
    other = write(d4rl_folder / "hopper-mine.hdf5", flat(episodes))  # has not Hopper's sizes
    named = load_dataset("walker2d-medium-replay-v0")
    check_whole(named, episodes)
    assert named.name == "walker2d-medium-replay-v0" and named.env_id == "Walker2d-v4"
    assert named.reference_scores == load_dataset(published).reference_scores == (1.629008, 4592.3)
    assert load_dataset(own).env_id == "HalfCheetah-v5"
    assert load_dataset(own).reference_scores == (-280.178953, 12135.0)
    assert load_dataset(other).env_id is None and load_dataset(other).reference_scores is None


def test_kitchens_terminals_and_antmazes_jumps_end_episodes(d4rl_folder):
    arrays = flat(make_episodes(1, lengths=(4, 1, 3), sizes=(60, 9)))
    kitchen = {key: arrays[key] for key in ("observations", "actions", "rewards")}
    kitchen["terminals"] = arrays["terminals"] | arrays["timeouts"]
    write(d4rl_folder / Path(D4RL_FILES["kitchen-mixed-v0"]).name, kitchen)
    dataset = load_dataset("kitchen-mixed-v0")
    assert dataset.episode_starts.tolist() == [0, 4, 5] and dataset.terminations.sum() == 3
    with pytest.raises(UserError, match="neither 'timeouts' nor 'next_observations'"):
        load_dataset(write(d4rl_folder / "mine.hdf5", kitchen))
    ant = flat(make_episodes(2, lengths=(10,), sizes=(29, 8)))
    del ant["next_observations"]
    ant["observations"][:, :2] = 0.3 * np.arange(10)[:, None]
    ant["observations"][6:, :2] += 5.0  # a reset without a mark
    ant["terminals"][:], ant["timeouts"][:] = False, False
    write(d4rl_folder / Path(D4RL_FILES["antmaze-umaze-v0"]).name, ant)
    dataset = load_dataset("antmaze-umaze-v0")
    assert dataset.episode_starts.tolist() == [0, 5] and len(dataset.actions) == 8
    assert np.array_equal(dataset.next_observations[4], ant["observations"][5])


def test_an_unknown_name_gets_the_nearest_ones(tmp_path):
    with pytest.raises(UserError, match="not a file.*hopper-medium-v2.*Minari"):
        load_dataset("hopper-medum-v2")
    for missing in (tmp_path, tmp_path / "gone.hdf5"):
        with pytest.raises(UserError, match="not a file"):
            load_dataset(missing)


# --- Refusals -----------------------------------------------------------------------------------------------


def replace(file, key, value):
    del file[key]
    file[key] = value


def put(file, key, row, value):
    file[key][row] = value


FAULTS = {
    "has no array 'terminals'": lambda f: f.__delitem__("terminals"),
    "has no array 'terminals';": lambda f: (f.__delitem__("terminals"), f.__setitem__("data", np.ones(3))),
    "has no array 'observations'": lambda f: f.__delitem__("observations"),
    "has no array 'actions'": lambda f: (f.__delitem__("actions"), f.create_group("actions")),
    "'rewards' float64 (8,); it needs numbers (9)": lambda f: replace(f, "rewards", np.zeros(8)),
    "'rewards' float64 (9, 2)": lambda f: replace(f, "rewards", np.zeros((9, 2))),
    "'actions' float64 (9,); it needs numbers (9, any)": lambda f: replace(f, "actions", np.zeros(9)),
    "'actions' |S1": lambda f: replace(f, "actions", np.full((9, 1), b"a")),
    "'observations' float64 (0, 2)": lambda f: replace(f, "observations", np.zeros((0, 2))),
    "'observations' float64 (9, 0)": lambda f: replace(f, "observations", np.zeros((9, 0))),
    "'terminals' float64 (0,)": lambda f: replace(f, "terminals", np.zeros(0)),
    "'timeouts' float64 (10,)": lambda f: replace(f, "timeouts", np.zeros(10)),
    "'next_observations' float64 (9, 3); it needs numbers (9, 2)": lambda f: f.__setitem__(
        "next_observations", np.zeros((9, 3))
    ),
    "NaN or infinity in 'observations', row 7": lambda f: put(f, "observations", 7, [0, np.nan]),
    "NaN or infinity in 'actions', row 8": lambda f: put(f, "actions", 8, np.inf),
    "NaN or infinity in 'rewards', row 0": lambda f: put(f, "rewards", 0, -np.inf),
    "NaN or infinity in 'rewards', row 4": lambda f: put(f, "rewards", 4, 1e300),
    "NaN or infinity in 'terminals', row 2": lambda f: put(f, "terminals", 2, np.nan),
    "only episodes of one row": lambda f: (replace(f, "timeouts", np.ones(9)), put(f, "terminals", 2, 0)),
}


def assert_refused(path, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_dataset(path)
    assert message in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize("message", FAULTS)
@pytest.mark.parametrize("block", [2, 10**6])
def test_a_faulty_file_is_named_in_one_sentence(tmp_path, monkeypatch, message, block):
    monkeypatch.setattr(datasets, "BLOCK", block)
    path = write(tmp_path / "a.hdf5", HAND)
    with h5py.File(path, "a") as file:
        FAULTS[message](file)
    assert_refused(path, message)


def test_damaged_bytes_are_named(tmp_path, monkeypatch):
    path = tmp_path / "a.hdf5"
    with h5py.File(write(path, HAND), "a") as file:
        del file["observations"]
        data = np.random.default_rng(0).normal(size=(9, 2))
        compressed = file.create_dataset("observations", data=data, chunks=(3, 2), compression="gzip")
        offset = compressed.id.get_chunk_info(1).byte_offset  # of rows 3 to 5
    whole = path.read_bytes()
    path.write_bytes(whole[:offset] + b"\xff" * 8 + whole[offset + 8 :])
    monkeypatch.setattr(datasets, "BLOCK", 6)  # blocks of 3 rows
    assert_refused(path, "damaged in 'observations' from row 3 on")
    path.write_bytes(whole[:-200])
    assert_refused(path, "truncated")
    path.write_text("hello" * 100)
    assert_refused(path, "not HDF5")


# --- RoboMimic, Minari, the real files ----------------------------------------------------------------------


def write_robomimic(path: Path, episodes: list[dict]) -> Path:
    """Observations of three numbers in two keys beside an image; demo_10 follows demo_9."""
    with h5py.File(path, "w") as file:
        for number, episode in enumerate(episodes):
            demo, steps = file.create_group(f"data/demo_{number}"), len(episode["rewards"])
            for group, rows in (("obs", slice(0, steps)), ("next_obs", slice(1, steps + 1))):
                demo[f"{group}/robot0_eef_pos"] = episode["observations"][rows, 1:].astype(np.float64)
                demo[f"{group}/object"] = episode["observations"][rows, :1]
                demo[f"{group}/agentview_image"] = np.zeros((steps, 4, 4, 3), np.uint8)
            demo["actions"], demo["rewards"] = episode["actions"], episode["rewards"]
            demo["dones"] = (np.arange(steps) == steps - 1) & episode["terminated"]
    return path


def test_robomimic(tmp_path):
    episodes = make_episodes(3, lengths=(2, 3, 1) * 4)
    path = write_robomimic(tmp_path / "low_dim.hdf5", episodes)
    dataset = load_dataset(path)
    check_whole(dataset, episodes)
    assert dataset.env_id is None and dataset.reference_scores is None
    for message, fault in {
        "demo_7, next_obs has no array 'object'": lambda f: f.__delitem__("data/demo_7/next_obs/object"),
        "demo_3 has no array 'dones'": lambda f: f.__delitem__("data/demo_3/dones"),
        "demo_4 has no low-dimensional observation": lambda f: f.__delitem__("data/demo_4/obs"),
        "demo_1 has 'actions' float64 (3, 4)": lambda f: replace(f, "data/demo_1/actions", np.ones((3, 4))),
        "demo_1, obs has NaN or infinity in 'object', row 2": lambda f: put(
            f, "data/demo_1/obs/object", 2, np.nan
        ),
        "demo_1 has 'obs' float32 (4, 2)": lambda f: (
            f.__delitem__("data/demo_1/obs/object"),
            f.__delitem__("data/demo_1/next_obs/object"),
        ),
        "demo_2 has no array 'rewards'": lambda f: replace(f, "data/demo_2", np.ones(3)),
        "demo_5 has no low-dimensional": lambda f: replace(f, "data/demo_5/obs", np.ones((1, 3))),
        "demo_5, next_obs has no array 'object'": lambda f: replace(f, "data/demo_5/next_obs", np.ones(1)),
        "no demonstrations": lambda f: [f["data"].__delitem__(key) for key in list(f["data"])],
    }.items():
        write_robomimic(path, episodes)
        with h5py.File(path, "a") as file:
            fault(file)
        assert_refused(path, message)


@pytest.fixture
def minari(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return pytest.importorskip("minari")


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
def test_minari(minari, monkeypatch):
    def create(name, episodes, observe=lambda observations: observations, **options):
        buffers = [
            minari.data_collector.EpisodeBuffer(
                observations=observe(episode["observations"]),
                actions=episode["actions"],
                rewards=list(episode["rewards"]),
                terminations=[False] * (len(episode["rewards"]) - 1) + [episode["terminated"]],
                truncations=[False] * (len(episode["rewards"]) - 1) + [not episode["terminated"]],
                infos={},
            )
            for episode in episodes
        ]
        minari.create_dataset_from_buffers(name, buffers, **options)

    hopper, others = make_episodes(4, sizes=(11, 3)), make_episodes(5)
    create("mujoco/hopper/mine-v0", hopper, env="Hopper-v5")
    dataset = load_dataset("mujoco/hopper/mine-v0")
    check_whole(dataset, hopper)
    assert dataset.env_id == "Hopper-v5" and dataset.reference_scores == (-20.272305, 3234.3)
    create("mujoco/hopper/other-v0", hopper, env=gymnasium.make("Hopper-v5", frame_skip=2))
    assert load_dataset("mujoco/hopper/other-v0").env_id is None  # make("Hopper-v5") is another task
    box = functools.partial(gymnasium.spaces.Box, -9, 9, dtype=np.float32)
    create(
        "D4RL/door/mine-v2",
        others,
        lambda value: {"goal": value[:, 1:], "achieved": value[:, :1]},
        observation_space=gymnasium.spaces.Dict(goal=box((2,)), achieved=box((1,))),
        action_space=box((2,)),
    )
    scores = {"ref_min_score": -1.0, "ref_max_score": 3.0}
    minari.load_dataset("D4RL/door/mine-v2").storage.update_metadata(scores)
    dataset = load_dataset("D4RL/door/mine-v2")
    check_whole(dataset, others)
    assert dataset.env_id is None and dataset.reference_scores == (-1.0, 3.0)
    others[2]["actions"][3, 1] = np.nan
    create("D4RL/door/nan-v0", others, observation_space=box((3,)), action_space=box((2,)))
    assert_refused("D4RL/door/nan-v0", "episode 2 has NaN or infinity in 'actions', row 3")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_refused("mujoco/hopper/medium-v0", "minari download mujoco/hopper/medium-v0")
    monkeypatch.setitem(sys.modules, "minari", None)
    assert_refused("mujoco/hopper/mine-v0", "import of minari halted")


@needs_real
@pytest.mark.filterwarnings("ignore:.*out of date:DeprecationWarning")
def test_real_files():
    for name, env_id, sizes, returns in (
        ("hopper-expert-2ep", "Hopper-v5", (11, 3), 3700),
        ("halfcheetah-expert-2ep", "HalfCheetah-v5", (17, 6), 4000),
        ("walker2d-expert-2ep", "Walker2d-v4", (17, 6), 5300),
        ("ant-expert-2ep", None, (27, 8), 4000),
    ):
        dataset = load_dataset(REAL / f"{name}.hdf5")
        assert dataset.env_id == env_id and dataset.episode_starts.tolist() == [0, 999]
        assert (dataset.observations.shape[1], dataset.actions.shape[1]) == sizes
        assert len(dataset.actions) == 1998 and not dataset.terminations.any()
        assert dataset.rewards.sum() / 2 > returns
        if env_id:
            assert dataset.observations.shape[1:] == gymnasium.make(env_id).observation_space.shape
    door = load_dataset(REAL / "door-human.hdf5")
    assert len(door.episode_starts) == 25 and len(door.actions) == 6729 - 25 and door.env_id is None
    assert door.reference_scores == reference_scores("door-human-v1")


@needs_real
def test_real_next_observations_are_the_simulators():
    dataset = load_dataset(REAL / "hopper-expert-2ep.hdf5")
    env = gymnasium.make(dataset.env_id).unwrapped
    env.reset(seed=0)
    for i in range(990, 1004):  # across the time-out, where the second episode's first row is number 999
        state = dataset.observations[i].astype(np.float64)
        env.set_state(np.concatenate([[0.0], state[:5]]), state[5:])
        after, reward, _, _, _ = env.step(dataset.actions[i])
        np.testing.assert_allclose(dataset.next_observations[i], after, atol=1e-5)
        assert dataset.rewards[i] == pytest.approx(reward, abs=1e-5)


# --- Download -----------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server for one file: its bytes, and what it does wrong; its requests' ranges are in `asked`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            state, data = self.server, self.server.data
            wanted = self.headers.get("Range")
            state.asked.append(wanted)
            first = int(wanted[6:-1]) if wanted and state.ranges else 0
            if state.error or (first and first >= len(data)):
                self.send_response(state.error or 416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.end_headers()
                return
            self.send_response(206 if first else 200)
            if first:
                self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
            if state.length:
                self.send_header("Content-Length", str(len(data) - first))
            self.end_headers()
            self.wfile.write(data[first:][: state.breaks_after])

        def log_message(self, *args):
            pass

    write(tmp_path / "source.hdf5", flat(make_episodes(6, sizes=(11, 3))))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as state:
        state.data, state.asked = (tmp_path / "source.hdf5").read_bytes(), []
        state.ranges, state.breaks_after, state.error, state.length = True, None, None, True
        thread = threading.Thread(target=state.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        monkeypatch.setattr(datasets, "D4RL_URL", f"http://127.0.0.1:{state.server_port}/")
        monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield state
        state.shutdown()
        thread.join()


def download() -> None:
    check_whole(load_dataset("hopper-medium-v2"), make_episodes(6, sizes=(11, 3)))


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on_where_it_stopped(server, tmp_path, ranges):
    target = tmp_path / "d4rl" / "hopper_medium-v2.hdf5"
    server.ranges, server.breaks_after = ranges, 1000
    for sizes in (1000, 2000) if ranges else (1000, 1000):
        with pytest.raises(UserError) as error:
            load_dataset("hopper-medium-v2")
        message = str(error.value)
        assert f"broke off after {sizes} of {len(server.data)} bytes" in message and "\n" not in message
        assert f"{datasets.D4RL_URL}gym_mujoco_v2/hopper_medium-v2.hdf5" in message
        assert f"put it at {target}." in message
        assert (tmp_path / "d4rl" / "hopper_medium-v2.hdf5.part").stat().st_size == sizes
    server.breaks_after = None
    download()
    assert server.asked == [None, "bytes=1000-", "bytes=2000-" if ranges else "bytes=1000-"]
    assert target.read_bytes() == server.data and list(target.parent.iterdir()) == [target]
    download()
    assert len(server.asked) == 3  # the second time it is on this disk


@pytest.mark.parametrize("length", [True, False])
def test_a_first_download_with_and_without_a_known_size(server, length):
    server.length = length
    download()
    assert server.asked == [None]


def test_a_part_that_is_already_whole_or_of_another_file(server, tmp_path):
    part = tmp_path / "d4rl" / "hopper_medium-v2.hdf5.part"
    part.parent.mkdir()
    part.write_bytes(server.data + b"x")
    assert_download_refused(f"its {len(server.data) + 1} bytes are no HDF5")
    assert part.stat().st_size == 0  # the next call starts over
    part.write_bytes(server.data)
    download()


def assert_download_refused(reason: str) -> None:
    with pytest.raises(UserError) as error:
        load_dataset("hopper-medium-v2")
    message = str(error.value)
    assert reason in message and "put it at" in message and "\n" not in message


def test_what_is_no_data_set_is_not_kept(server, tmp_path):
    whole = server.data
    server.data = b"<html>please log in</html>"
    assert_download_refused("no HDF5")
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["weights"] = np.zeros(3)
    server.data = (tmp_path / "other.hdf5").read_bytes()
    assert_download_refused("no HDF5 file in D4RL's layout")
    server.error = 503
    assert_download_refused("503")
    assert not (tmp_path / "d4rl" / "hopper_medium-v2.hdf5").exists()
    server.data, server.error = whole, None
    download()


def test_without_a_network_the_sentence_says_which_file_to_put_where(server):
    server.shutdown()
    server.server_close()
    assert_download_refused("refused")


def test_several_processes_download_once(server, tmp_path):
    outcomes = []
    threads = [threading.Thread(target=lambda: outcomes.append(download())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [None] * 4 and server.asked == [None]
    assert [path.name for path in (tmp_path / "d4rl").iterdir()] == ["hopper_medium-v2.hdf5"]
