"""Records, collected steps and stores for the tests of the store."""

import io
import itertools

import datasets
import numpy as np
import PIL.Image
import torch
from tensordict import TensorDict

from torchrl_mouse import schema
from torchrl_mouse.data import DatasetStore

ACTIONS, OBSERVATION = 5, 3


def make_columns(lengths, seed=0, task=True, first_task=0):
    """Random records of tasks of the given lengths."""
    rng = np.random.default_rng(seed)
    n = sum(lengths)
    columns = {
        "action": rng.integers(0, ACTIONS, n),
        "reward": rng.standard_normal(n).astype(np.float32),
        "done": rng.integers(0, 3, n),
        "episode_step": rng.integers(0, 20, n),
        "observation": rng.standard_normal((n, OBSERVATION)).astype(np.float32),
        "observation_discrete": rng.integers(0, 7, n),
        "metadata_q_star": rng.standard_normal((n, ACTIONS)).astype(np.float32),
        "xformed_reward": rng.standard_normal(n).astype(np.float32),
    }
    if task:
        columns["task"] = np.repeat(np.arange(len(lengths)), lengths) + first_task
    return columns


def make_dataset(columns, fixed=True):
    features = {}
    for name, value in columns.items():
        kind = datasets.Value("float32" if value.dtype == np.float32 else "int64")
        features[name] = datasets.List(kind, length=value.shape[1] if fixed else -1) if value.ndim > 1 else kind
    return datasets.Dataset.from_dict(
        {name: value.tolist() for name, value in columns.items()}, features=datasets.Features(features)
    )


def make_store(**kwargs):
    return DatasetStore(**{"max_action_dim": ACTIONS, "max_obs_continuous_dim": OBSERVATION} | kwargs)


def loaded(lengths, fixed=True, **kwargs):
    return make_store(max_obs_discrete_dim=7).from_dataset(make_dataset(make_columns(lengths, **kwargs), fixed))


def assert_equal(got, expected):
    assert got.shape == expected.shape
    keys = set(got.keys(True, True))
    assert keys == set(expected.keys(True, True))
    for key in keys:
        assert got[key].dtype == expected[key].dtype, key
        torch.testing.assert_close(got[key], expected[key], rtol=0, atol=0, equal_nan=True, msg=str(key))


def from_columns(columns, start, stop):
    """The steps of one task by the schema's own conversion, with the task's end written in."""
    part = {name: torch.from_numpy(np.asarray(value[start:stop])) for name, value in columns.items()}
    records = {
        "action": part["action"],
        "reward": part["reward"],
        "done": part["done"],
        "time": part["episode_step"],
        "obs_continuous": part["observation"],
        "obs_discrete": part["observation_discrete"],
        "q_star": part["metadata_q_star"],
        "xformed_reward": part["xformed_reward"],
    }
    steps = schema.from_mouse_records(TensorDict(records, [stop - start]).unsqueeze(0)).squeeze(0)
    ends = torch.zeros(stop - start, 1, dtype=torch.bool)
    ends[-2:] = True
    terminated = bool(part["done"][-1] == 1)
    steps["next", "done"] = ends
    steps["next", "terminated"] = ends & terminated
    steps["next", "truncated"] = ends & (not terminated)
    return steps


def collect(lengths, rows, seed=0, one_hot=False):
    """Transitions of environments: ``rows`` rows of ``T`` steps, tasks of the given lengths (in steps) one by one.

    Built by hand in the layout of TaskEnv's output; returns the batch and each task's records as they must be stored.
    """
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    batch, tasks = [], []
    for row in range(rows):
        pieces = []
        for length in lengths:
            done = torch.randint(0, 3, (length + 1,), generator=generator)
            records = {
                "action": torch.randint(0, ACTIONS, (length + 1,), generator=generator),
                "reward": torch.randn(length + 1, generator=generator),
                "done": done,
                "episode_step": torch.arange(length + 1),
                "observation": torch.randn(length + 1, OBSERVATION, generator=generator),
            }
            tasks.append((row, records))
            action = torch.nn.functional.one_hot(records["action"], ACTIONS) if one_hot else records["action"]
            frames = TensorDict(
                {
                    "observation": records["observation"],
                    "previous": {
                        "action": action,
                        "reward": records["reward"].unsqueeze(-1),
                        "terminated": (done == 1).unsqueeze(-1),
                        "truncated": (done == 2).unsqueeze(-1),
                    },
                    "episode_step": records["episode_step"].unsqueeze(-1),
                },
                [length + 1],
            )
            steps = frames[:-1].clone()
            steps["action"] = action[1:]
            steps["next"] = frames[1:].clone()
            steps["is_init"] = (torch.arange(length) == 0).unsqueeze(-1)
            steps["next", "done"] = (torch.arange(length) == length - 1).unsqueeze(-1)
            steps["stream"] = torch.full((length, 1), 10**15 - row)  # ids in an order of their own
            pieces.append(steps)
        batch.append(torch.cat(pieces))
        assert len(batch[-1]) == total
    return torch.stack(batch), tasks


def tasks_of(store):
    bounds = [*store.task_starts.tolist(), len(store)]
    return [store[a:b] for a, b in itertools.pairwise(bounds)]


def assert_task(steps, records):
    n = len(records["action"])
    assert len(steps) == n
    torch.testing.assert_close(steps["previous", "action"], records["action"])
    torch.testing.assert_close(steps["previous", "reward"].squeeze(-1), records["reward"])
    torch.testing.assert_close(steps["observation"], records["observation"])
    torch.testing.assert_close(steps["episode_step"].squeeze(-1), records["episode_step"])
    torch.testing.assert_close(
        schema.done_code(steps["previous", "terminated"], steps["previous", "truncated"]).squeeze(-1), records["done"]
    )
    assert steps["is_init"].squeeze(-1).tolist() == [True] + [False] * (n - 1)


SIZE = (4, 2, 3)  # height, width, channels
PIXELS = 24
ARRAYS = [datasets.Array3D(SIZE, "uint8"), datasets.Array3D(SIZE, "int64"), datasets.Array3D((None, 2, 3), "uint8")]
ARRAYS += [datasets.List(datasets.List(datasets.List(datasets.Value("uint16"), length=3)), length=4)]
ARRAYS += [datasets.List(datasets.List(datasets.List(datasets.Value("uint8"))))]


def make_images(rows, size=SIZE, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (rows, *size), dtype=np.uint8)


def png(array, kind="png"):
    file = io.BytesIO()
    PIL.Image.fromarray(array).save(file, kind)
    return file.getvalue()


def with_images(images, feature, lengths=None):
    """A data set of the given tasks whose image column is of the given type, however it gets its values."""
    images = list(images)
    dataset = make_dataset(make_columns(lengths or [len(images)], task=lengths is not None))
    features = datasets.Features({"observation_image": feature})
    return datasets.concatenate_datasets(
        [dataset, datasets.Dataset.from_dict({"observation_image": images}, features=features)], axis=1
    )


def image_store(**kwargs):
    return make_store(**{"max_obs_image_pixels": PIXELS} | kwargs)


def flat(images):
    return torch.from_numpy(images.reshape(len(images), -1))


def collect_images(lengths, rows, masks=False, dtype=torch.uint8):
    batch, tasks = collect(lengths, rows)
    for at in ((), ("next",)):
        # A frame's image follows from its observation, so that frames that join are equal.
        seen = (batch[(*at, "observation")].abs() * 1e6).long()[..., :1]
        image = (seen + torch.arange(PIXELS)) % 256
        batch[(*at, "pixels")] = (image / 255 if dtype.is_floating_point else image).to(dtype).unflatten(-1, SIZE)
        if masks:
            batch[(*at, "action_mask")] = (seen + torch.arange(3)) % 2 == 0
    return batch, tasks
