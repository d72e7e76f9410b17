"""Stores joined and rows encoded: the steps stay what they are, the task ids distinct."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from torchrl_mouse.data import DatasetStore, rows
from torchrl_mouse.data.images import IMAGE
from torchrl_mouse.data.merging import encode_hf_rows, merge_stores_to_dataset
from torchrl_mouse.schema import from_mouse_records, to_mouse_records

ACTIONS, CONTINUOUS, IDS = 6, 4, 7
OPTIONAL = ("observation", "observation_discrete", "xformed_reward", "metadata_q_star")


def make_store(lengths=(3, 5), *, seed=0, columns=OPTIONAL, width=3, teacher=4):
    """A store of random tasks; some rows of a list column are shorter than ``width`` or ``teacher``."""
    rng = np.random.default_rng(seed)
    store = DatasetStore(ACTIONS, CONTINUOUS, IDS)
    for task, length in enumerate(lengths):
        for step in range(length):
            values = {
                "observation": rng.standard_normal(width - step % 2).tolist(),
                "observation_discrete": int(rng.integers(IDS)),
                "xformed_reward": float(rng.standard_normal()),
                "metadata_q_star": rng.standard_normal(teacher - step % 2).tolist(),
            }
            store.append(
                {
                    "action": int(rng.integers(ACTIONS)),
                    "reward": float(rng.standard_normal()),
                    "done": int(rng.integers(3)),
                    "episode_step": step,
                    "task": task,
                    **{name: values[name] for name in columns},
                }
            )
    return store


def read(dataset):
    return DatasetStore(ACTIONS, CONTINUOUS, IDS).from_dataset(dataset)


def assert_same(loaded, *stores, without_teacher=False):
    """The steps of a store are those of others, one after the other."""
    assert loaded.num_tasks == sum(store.num_tasks for store in stores)
    ours, theirs = loaded[:], [store[:] for store in stores]
    if without_teacher:
        assert (ours["q_star"] == -torch.inf).all()
        ours = ours.exclude("q_star")
    expected = torch.cat(theirs)
    assert set(ours.keys(True, True)) == set(expected.keys(True, True))
    for key in expected.keys(True, True):
        assert ours[key].dtype == expected[key].dtype, key
        assert torch.equal(ours[key], expected[key]), key


@given(
    lengths=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=3),
    columns=st.sets(st.sampled_from(OPTIONAL[:3])),
    widths=st.lists(st.tuples(st.integers(2, CONTINUOUS), st.integers(1, ACTIONS)), min_size=3, max_size=3),
    teachers=st.lists(st.booleans(), min_size=3, max_size=3),
)
@settings(deadline=None, max_examples=25)
def test_merged_stores_are_one_after_the_other(lengths, columns, widths, teachers):
    stores = []
    for seed, (tasks, (width, teacher), has_teacher) in enumerate(zip(lengths, widths, teachers, strict=False)):
        names = [*sorted(columns), *(["metadata_q_star"] if has_teacher else [])]
        stores.append(make_store(tasks, seed=seed, columns=names, width=width, teacher=teacher))
    dataset = merge_stores_to_dataset(stores)
    ids = dataset["task"][:]
    runs = [task for index, task in enumerate(ids) if index == 0 or ids[index - 1] != task]
    assert runs == list(range(sum(store.num_tasks for store in stores)))
    merged = read(dataset)[:]
    assert ("q_star" in merged) == any(teachers[: len(stores)])
    low = 0
    for store, has_teacher in zip(stores, teachers, strict=False):
        steps, part = store[:], merged[low : low + len(store)]
        low += len(store)
        if not has_teacher and "q_star" in part:
            assert (part.pop("q_star") == -torch.inf).all()
        for key in steps.keys(True, True):
            assert torch.equal(part[key], steps[key]), key
        assert set(part.keys(True, True)) == set(steps.keys(True, True))


def test_the_rows_are_never_in_memory_at_once(monkeypatch):
    store = make_store((40,))
    monkeypatch.setattr(rows, "CHUNK_VALUES", 5 * (ACTIONS + CONTINUOUS))
    sizes, original = [], store._read
    monkeypatch.setattr(store, "_read", lambda index, names: sizes.append(len(index)) or original(index, names))
    assert_same(read(merge_stores_to_dataset([store])), store)
    assert sizes[:8] == 8 * [5]


def test_merging_checks_its_stores():
    with pytest.raises(ValueError, match="merge_stores_to_dataset: stores must be at least one"):
        merge_stores_to_dataset([])
    with pytest.raises(KeyError, match=r"merge_stores_to_dataset: .* in xformed_reward between stores 0 and 1"):
        merge_stores_to_dataset([make_store(columns=()), make_store(columns=("xformed_reward",))])


ROWS = Path(__file__).parent / "reference_rows"


def test_rows_are_encoded_as_by_mouse():
    case, expected = json.loads((ROWS / "rows.json").read_text()), load_file(ROWS / "encoded.safetensors")
    sizes = {**case["store"], "max_obs_discrete_dim": 10}  # here the number of ids
    columns = {name: [row[name] for row in case["rows"]] for name in case["rows"][0]}
    encoded = encode_hf_rows(DatasetStore(**sizes), columns)
    assert set(encoded.keys()) == set(expected)
    for name, value in expected.items():
        assert encoded[name].shape == value.shape
        assert name == "obs_continuous" or encoded[name].dtype == value.dtype
        torch.testing.assert_close(encoded[name], value.to(encoded[name].dtype), rtol=0, atol=1e-6)


def test_encoding_what_a_data_set_gives():
    store = make_store()
    encoded = encode_hf_rows(store, store.to_dataset()[:5])
    steps = store[:5]
    assert encoded.shape == (5,)
    assert torch.equal(encoded["obs_continuous"], steps["observation"])
    assert torch.equal(encoded["q_star"], steps["q_star"])
    assert torch.equal(encoded["action"], steps["previous", "action"])
    one, listed = ({"observation_discrete": ids} for ids in ([3, 1], [[3], [1]]))
    assert torch.equal(encode_hf_rows(store, one)["obs_discrete"], encode_hf_rows(store, listed)["obs_discrete"])
    assert set(encode_hf_rows(store, {"action": [1], "xformed_reward": [None], "text": ["a"]}).keys()) == {"action"}


def test_encoded_masks_are_masks_of_steps_and_back():
    rows = {"action": [0, 3], "reward": [0.0, 1.0], "done": [0, 1], "episode_step": [0, 1]}
    encoded = encode_hf_rows(DatasetStore(4), {**rows, "action_mask": [[True, False], [True] * 4]})
    steps = from_mouse_records(encoded)
    assert steps["action_mask"].tolist() == [[True, False, False, False], [True] * 4]
    assert steps["next", "action_mask"][0].all()
    assert torch.equal(to_mouse_records(steps)["action_mask"], encoded["action_mask"])


@pytest.mark.parametrize(
    ("given_rows", "error", "match"),
    [
        ({}, ValueError, "encode_hf_rows: rows must hold columns of one length, got no values"),
        ({"action": [], "text": ["a"]}, ValueError, "got no values"),
        ({"action": [1], "done": [0, 0]}, ValueError, r"got \{'action': 1, 'done': 2\}"),
        ({"action": [6]}, ValueError, r"encode_hf_rows: column 'action' must lie in \[0, 6\), got 6 in row 0"),
        ({"action": [1, None]}, ValueError, "encode_hf_rows: column 'action' must hold no nulls"),
        ({"action": [0.5]}, TypeError, "encode_hf_rows: column 'action' must hold integers"),
        ({"reward": [1.0, "a"]}, TypeError, "encode_hf_rows: the values of a column must be of one type"),
        (
            {"metadata_q_star": [[0.0] * 7]},
            ValueError,
            "encode_hf_rows: .* at most max_action_dim=6 .*, got 7",
        ),
        ({IMAGE: [[0, 255], [256, 0]]}, ValueError, rf"column {IMAGE!r} must lie in \[0, 255\] .* got 256 in row 1"),
        ({IMAGE: [[0.0], [-0.5]]}, ValueError, rf"column {IMAGE!r} must lie in \[0, 1\] .* got -0.5 in row 1"),
        ({IMAGE: [[0] * 13]}, ValueError, "encode_hf_rows: .* at most max_obs_image_pixels=12 .*, got 13"),
        ({IMAGE: [PIL.Image.new("RGB", (3, 2))]}, ValueError, "encode_hf_rows: .* max_obs_image_pixels=12 .*, got 18"),
        ({IMAGE: [{"bytes": b"no image"}]}, ValueError, "encode_hf_rows: .* readable images, .* in row 0"),
        ({IMAGE: [PIL.Image.new("RGB", (1, 1)), None]}, ValueError, "encode_hf_rows: .* be an image, .* is row 1"),
        ({IMAGE: ["a.png"]}, TypeError, f"encode_hf_rows: column {IMAGE!r} must hold images or numbers, got string"),
    ],
)
def test_rows_that_cannot_be_encoded(given_rows, error, match):
    store = DatasetStore(ACTIONS, CONTINUOUS, IDS, max_obs_image_pixels=12)
    with pytest.raises(error, match=match):
        encode_hf_rows(store, given_rows)


@pytest.mark.parametrize("form", ["images", "decoded", "files", "paths", "arrays", "lists", "floats"])
def test_images_are_encoded_as_they_are_loaded(form, tmp_path):
    arrays = [np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8) for seed in range(3)]
    images = [PIL.Image.fromarray(array) for array in arrays]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    paths = [str(tmp_path / f"{number}.png") for number in range(3)]
    read = [{"bytes": Path(path).read_bytes()} for path in paths]
    values = {
        "images": images,
        "decoded": datasets.Dataset.from_dict({IMAGE: images})[:][IMAGE],
        "files": read,
        "paths": [{"bytes": None, "path": path} for path in paths],  # as the Image feature gives them undecoded
        "arrays": arrays,
        "lists": [array.tolist() for array in arrays],
        "floats": [array / 255 for array in arrays],
    }[form]
    columns = {name: [0, 1, 2] for name in ("action", "done", "episode_step")} | {"reward": [0.0] * 3, IMAGE: values}
    store = DatasetStore(ACTIONS, max_obs_image_pixels=14)
    encoded = encode_hf_rows(store, columns)["obs_image"]
    assert encoded.dtype == torch.uint8
    assert encoded.tolist() == [[*array.reshape(-1).tolist(), 0, 0] for array in arrays]
    loaded = store.from_dataset(datasets.Dataset.from_dict(columns))
    assert torch.equal(encoded, loaded[:]["pixels"])


def test_images_are_encoded_and_merged():
    pixels = [[0, 1, 2, 3], [4, 5, 6, 255]]
    records = {"action": [0, 1], "reward": [0.0, 1.0], "done": [0, 1], "episode_step": [0, 1]}
    stores = []
    for _ in range(2):
        store = DatasetStore(max_action_dim=ACTIONS, max_obs_image_pixels=6)
        for row, image in enumerate(pixels):
            record = {name: value[row] for name, value in records.items()}
            store.append({**record, "observation_image": torch.tensor(image, dtype=torch.uint8)})
        stores.append(store)
    encoded = encode_hf_rows(stores[0], {"observation_image": pixels})
    assert encoded["obs_image"].tolist() == [[*image, 0, 0] for image in pixels]
    merged = DatasetStore(max_action_dim=ACTIONS, max_obs_image_pixels=6).from_dataset(merge_stores_to_dataset(stores))
    assert_same(merged, *stores)
