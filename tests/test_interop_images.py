"""Images in other people's data: uint8 observations of Minari, vector environments and TorchRL's trajectories."""

import sys
import tomllib
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import SyncVectorEnv
from test_interop import an_episode, write
from torchrl.envs import GymWrapper

from torchrl_mouse.data import DatasetStore
from torchrl_mouse.data.images import pillow
from torchrl_mouse.data.interop import from_minari, record_vector_env, to_minari
from torchrl_mouse.data.trajectories import from_trajectories

# Minari recommends, by warnings, to say who made a data set, and how.
pytestmark = pytest.mark.filterwarnings("ignore:.*(is set to None|env_spec is None):UserWarning:minari")
SHAPE, PIXELS = (8, 8, 3), 192
ACTIONS = gym.spaces.Discrete(3)


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))


def box(*shape, dtype=np.uint8):
    return gym.spaces.Box(0, 255, shape, dtype)


def picture(painter, episode, step):
    return np.random.default_rng((painter, episode, step)).integers(0, 256, SHAPE, dtype=np.uint8)


class Painter(gym.Env):
    """A new picture at each step; episodes of 1, 2, 3, 1, ... steps, terminated and truncated in turn."""

    observation_space, action_space = box(*SHAPE), ACTIONS

    def __init__(self, number=0):
        self.number, self.episode, self.step_count = number, -1, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.step_count = self.episode + 1, 0
        return picture(self.number, self.episode, 0), {}

    def step(self, action):
        self.step_count += 1
        over = self.step_count == self.episode % 3 + 1
        even = self.episode % 2 == 0
        return picture(self.number, self.episode, self.step_count), 1.0, over and even, over and not even, {}


def check_pictures(store, painters=1, first_episode=0, steps=None):
    """Each record of a painter's task shows the picture of its place, and nothing is missing."""
    assert store.num_tasks == painters
    bounds = [*store.task_starts.tolist(), len(store)]
    for number in range(painters):
        task = store[bounds[number] : bounds[number + 1]]
        assert "observation" not in task
        assert task["pixels"].dtype == torch.uint8
        time = task["episode_step"].squeeze(-1)
        episode = (time == 0).cumsum(0) - 1 + first_episode
        if steps is not None:
            assert int((time > 0).sum()) == steps
        shown = [picture(number, *at) for at in zip(episode.tolist(), time.tolist(), strict=True)]
        assert torch.equal(task["pixels"][:, :PIXELS], torch.from_numpy(np.stack(shown)).reshape(-1, PIXELS))
        following, mask = task["next", "pixels"], task["collector", "mask"]
        assert torch.equal(following[mask], task["pixels"][1:])


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_images_recorded(mode, copy):
    envs = SyncVectorEnv([partial(Painter, number) for number in range(2)], autoreset_mode=mode, copy=copy)
    store = record_vector_env(envs, None, 12, seed=0, progress_bar=False)
    check_pictures(store, painters=2, steps=None if mode == "NextStep" else 12)


def play(env):
    """One episode, as Minari takes it."""
    seen, ends = [env.reset()[0]], []
    while not ends or not any(ends[-1]):
        frame, _, *end, _ = env.step(1)
        seen.append(frame)
        ends.append(end)
    terminations, truncations = np.transpose(ends)
    taken = {"actions": np.ones(len(ends), np.int64), "rewards": np.ones(len(ends), np.float32)}
    return {"observations": np.stack(seen), "terminations": terminations, "truncations": truncations, **taken}


@pytest.mark.parametrize("room", [PIXELS, PIXELS + 7])
def test_images_of_a_minari_data_set_and_back(room):
    env = Painter()
    episodes = [play(env) for _ in range(6)]  # of 1, 2, 3 steps, twice
    dataset = write(episodes, Painter.observation_space, ACTIONS)
    store = from_minari(dataset, DatasetStore(3, max_obs_image_pixels=room) if room > PIXELS else None)
    check_pictures(store, steps=12)
    assert store[0]["pixels"].shape == (room,)
    back = to_minari(store, "pictures-v1", Painter.observation_space, ACTIONS)
    assert back.observation_space == Painter.observation_space
    for episode, original in zip(back, episodes, strict=True):
        assert episode.observations.dtype == np.uint8
        for name, value in original.items():
            np.testing.assert_array_equal(getattr(episode, name), value, err_msg=name)


@pytest.mark.parametrize(
    ("space", "column"),
    [
        (box(2, 3), "observation_image"),
        (box(40, 36, 3), "observation_image"),  # what Minari takes for an image, which it then may encode
        (box(6), "observation"),
        (box(1, 2, 3, 1), "observation"),
        (box(2, 3, dtype=np.int16), "observation"),
        (box(2, 3, dtype=np.float32), "observation"),
    ],
)
def test_which_spaces_are_images(space, column):
    episodes = [an_episode(length, seed=length) for length in (3, 2)]
    for seed, episode in enumerate(episodes):
        drawn = np.random.default_rng(seed).integers(0, 256, (len(episode["rewards"]) + 1, *space.shape))
        episode["observations"] = drawn.astype(space.dtype)
    dataset = write(episodes, space)
    store = from_minari(dataset)
    rows = store.to_dataset()
    assert [name for name in rows.column_names if name.startswith("observation")] == [column]
    seen = [episode.observations for episode in dataset]
    assert rows[column][:] == np.concatenate(seen).reshape(len(rows), -1).tolist()
    back = to_minari(store, "back-v0", space, gym.spaces.Discrete(5))
    for episode, original in zip(back, seen, strict=True):
        np.testing.assert_array_equal(episode.observations, original)
        assert episode.observations.dtype == space.dtype


def rollout():
    """Twelve steps as GymEnv gives them; it calls the images "pixels"."""
    env = GymWrapper(Painter(), categorical_action_encoding=True)
    return env.rollout(12, break_when_any_done=False)


def test_a_missing_package_is_named_by_its_extra(monkeypatch):
    extras = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert any(package.startswith("pillow") for package in extras["images"])
    assert any(package.startswith("minari") for package in extras["minari"])
    store = from_minari(write([an_episode(2)]))
    for package, extra, use in (
        ("PIL.Image", "images", pillow),
        ("minari", "minari", lambda: to_minari(store, "a-v0", box(2, 3), ACTIONS)),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=rf'pip install "torchrl-mouse\[{extra}\]"'):
            use()


def image_store(pixels=PIXELS, **sizes):
    return DatasetStore(3, max_obs_image_pixels=pixels, **sizes)


def test_images_of_trajectories():
    steps, want = rollout(), {"observation": None, "pixels": "pixels"}
    assert (steps["pixels"].dtype, steps["pixels"].shape) == (torch.uint8, (12, *SHAPE))
    store = from_trajectories(steps, image_store(), **want)
    check_pictures(store, steps=12)

    other = steps.clone()
    for at in ((), ("next",)):
        image = steps[(*at, "pixels")]
        other[(*at, "camera", "top")] = image / 255
        other[(*at, "camera", "flipped")] = image.permute(0, 3, 1, 2).int()
        other[(*at, "observation")] = image[:, 0, 0].float()
    scaled = from_trajectories(other, image_store(max_obs_continuous_dim=3), pixels=("camera", "top"))[:]
    assert torch.equal(scaled["pixels"], store[:]["pixels"])
    assert torch.equal(scaled["observation"], store[:]["pixels"][:, :3].float())
    flipped = from_trajectories(other.split(5), image_store(), observation=None, pixels=("camera", "flipped"))
    # Whatever the order of the dimensions, it stays; each part of the data is a trajectory of its own.
    channel_last = flipped[:]["pixels"].unflatten(-1, (3, 8, 8)).permute(0, 2, 3, 1).flatten(1)
    assert torch.equal(channel_last[:5], store[:5]["pixels"])


def test_images_that_trajectories_refuse():
    steps, want = rollout(), {"observation": None, "pixels": "pixels"}
    for at, number, rule in (
        ("pixels", -1, r"\[0, 255\] where its numbers are integers, got -1 in row 7\."),
        (("next", "pixels"), 256, r"\[0, 255\] where its numbers are integers, got 256 in row 7 under 'next'"),
        ("pixels", 1.5, r"\[0, 1\] where its numbers are floats, got 1.5 in row 7"),
        ("pixels", torch.nan, r"\[0, 1\] where its numbers are floats, got nan in row 7"),
    ):
        broken = steps.clone()
        for key in ("pixels", ("next", "pixels")):
            broken[key] = steps[key] / 255 if isinstance(number, float) else steps[key].long()
        broken[at][7, 0, 0, 1] = number
        with pytest.raises(ValueError, match=f"from_trajectories: column 'observation_image' must lie in {rule}"):
            from_trajectories(broken.split(5), image_store(), **want)
    broken = steps.clone()
    row = int((~steps["next", "done"]).nonzero()[0, 0]) + 1
    broken["pixels"][row, 7, 7, 2] += 1
    with pytest.raises(ValueError, match=f"got another 'pixels' at step {row} of the data"):
        from_trajectories(broken, image_store(), **want)
    with pytest.raises(ValueError, match="one that the store reads, got max_obs_image_pixels=0"):
        from_trajectories(steps, DatasetStore(3, max_obs_continuous_dim=PIXELS), **want)
    with pytest.raises(ValueError, match="at most max_obs_image_pixels=191 values a row, got 192"):
        from_trajectories(steps, image_store(PIXELS - 1), **want)


def test_images_and_stores_that_do_not_fit():
    envs = SyncVectorEnv([Painter])
    with pytest.raises(ValueError, match="one that the store reads, got max_obs_image_pixels=0"):
        record_vector_env(envs, None, 4, DatasetStore(3, max_obs_continuous_dim=PIXELS), progress_bar=False)
    images = record_vector_env(envs, None, 4, progress_bar=False)
    with pytest.raises(ValueError, match=r"'observation_image' must fill the space's shape \(8, 8\), got 192 values"):
        to_minari(images, "a-v0", box(8, 8), ACTIONS)
    with pytest.raises(KeyError, match=r"column 'observation' must be in the store, got only .*observation_image"):
        to_minari(images, "a-v0", box(PIXELS), ACTIONS)
    vectors = from_minari(write([an_episode(3)]))
    with pytest.raises(KeyError, match=r"column 'observation_image' must be in the store, got only .*observation"):
        to_minari(vectors, "a-v0", box(2, 3), gym.spaces.Discrete(5))
