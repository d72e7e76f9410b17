"""The store: images and action masks beside all other rows, however they were added."""

import itertools

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from store_data import (
    ACTIONS,
    ARRAYS,
    PIXELS,
    SIZE,
    assert_equal,
    collect_images,
    flat,
    image_store,
    make_columns,
    make_dataset,
    make_images,
    make_store,
    png,
    tasks_of,
    with_images,
)

from torchrl_mouse.data import replay_buffer


class TestWriting:
    @pytest.mark.parametrize("kind", ["pil", "bytes", "path", "array", "floats", "tensor", "list"])
    def test_append(self, kind, tmp_path):
        images, store = make_images(3), image_store(max_obs_discrete_dim=7)
        (tmp_path / "image.png").write_bytes(b"")
        for image, record in zip(images, make_dataset(make_columns([3], task=False)), strict=True):
            (tmp_path / "image.png").write_bytes(png(image))
            value = {
                "pil": PIL.Image.fromarray(image),
                "bytes": {"bytes": png(image), "path": None},
                "path": {"path": str(tmp_path / "image.png")},
                "array": image,
                "floats": image / 255,
                "tensor": torch.from_numpy(image),
                "list": image.tolist(),
            }[kind]
            store.append({**record, "observation_image": value})
        assert torch.equal(store[:]["pixels"], flat(images))

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
    def test_extend(self, dtype):
        batch, _ = collect_images([4, 1, 3], rows=2, masks=True, dtype=dtype)
        store = image_store()
        for low in range(0, 8, 3):
            store.extend(batch[:, low : low + 3])
        assert store.num_tasks == 6
        expected, _ = collect_images([4, 1, 3], rows=2, masks=True)
        frames = expected.reshape(-1)
        rows = {float(frame["observation"][0]): frame["pixels"] for frame in frames.unbind(0)}
        steps = store[:]
        decided = steps["collector", "mask"]
        for observation, got in zip(steps["observation"][decided], steps["pixels"][decided], strict=True):
            assert torch.equal(got, rows[float(observation[0])].flatten())
        whole = image_store()
        whole.extend(expected)
        assert len(whole) == len(store) == 22
        images = {task["pixels"].numpy().tobytes() for task in tasks_of(store)}
        assert images == {task["pixels"].numpy().tobytes() for task in tasks_of(whole)}

    def test_joins_are_checked(self):
        for key in ("pixels", "action_mask"):
            batch, _ = collect_images([6], rows=2, masks=True)
            batch[key][1, 3] = ~batch[key][1, 3]
            with pytest.raises(ValueError, match=f"stream {10**15 - 1}: a batch is missing or repeated"):
                image_store().extend(batch)

    @pytest.mark.parametrize("feature", [datasets.Image(), ARRAYS[0], datasets.Array3D(SIZE, "float32")], ids=str)
    def test_mixed_rows_in_every_round(self, feature, tmp_path):
        """Loaded, appended and collected images are one sequence, and stay it on disk and in a saved state."""
        images = make_images(8)
        encoded = isinstance(feature, datasets.Image)
        scale = 255 if feature.dtype == "float32" else 1
        values = list(map(PIL.Image.fromarray, images)) if encoded else (images / scale).tolist()
        dataset = with_images(values, feature, [5, 3])
        dataset = dataset.remove_columns(["observation_discrete", "xformed_reward"])
        store = image_store().from_dataset(dataset).from_dataset(dataset.select(range(5)))
        batch, _ = collect_images([3, 4], rows=1)
        store.extend(batch[:, :5])
        store.append({**dataset[0], "observation_image": images[0], "task": 4})
        store.append({**dataset[1], "observation_image": images[1], "task": 4})
        store.from_dataset(dataset)
        assert store.task_starts.tolist() == [0, 5, 8, 13, 17, 19, 24]
        steps = store[:]
        shown = flat(np.concatenate([images, images[:5]]))
        assert torch.equal(steps["pixels"][:13], shown)
        assert torch.equal(steps["pixels"][13:16], batch["pixels"][0, :3].flatten(1))
        assert torch.equal(steps["pixels"][16], batch["next", "pixels"][0, 2].flatten())
        assert torch.equal(steps["pixels"][17:], flat(np.concatenate([images[:2], images])))
        rows = torch.tensor([[26, 17, 2], [13, 2, 12]])
        assert_equal(store[rows], steps[rows])

        store.to_dataset().save_to_disk(tmp_path / "rows")
        back = image_store().from_dataset(datasets.load_from_disk(tmp_path / "rows"))
        assert back.task_starts.tolist() == store.task_starts.tolist()
        assert_equal(back[:], steps)
        kind = datasets.List(datasets.Value("uint8"), length=PIXELS)
        assert back.to_dataset().features["observation_image"] == kind

        other = image_store().from_dataset(dataset).from_dataset(dataset.select(range(5))).from_dataset(dataset)
        other.load_state_dict(store.state_dict())
        assert other.task_starts.tolist() == store.task_starts.tolist()
        for one in (store, other):
            one.extend(batch[:, 5:])
            one.append({**dataset[0], "observation_image": images[0], "task": 4})
        assert other.num_tasks == store.num_tasks == 9
        assert_equal(other[:], store[:])
        buffers = [replay_buffer(one, window=3, batch_size=4, seed=5) for one in (store, other)]
        assert_equal(buffers[0].sample(), buffers[1].sample())

    def test_action_masks(self, tmp_path):
        masks = [[True, False, True], [False, False, True], [True, True, True], [False, True, False]]
        columns = make_columns([4])
        for length in (3, -1):
            feature = datasets.List(datasets.Value("bool"), length=length)
            extra = datasets.Dataset.from_dict({"action_mask": masks}, datasets.Features({"action_mask": feature}))
            dataset = datasets.concatenate_datasets([make_dataset(columns), extra], axis=1)
            several = datasets.concatenate_datasets([dataset.select([1, 2]), dataset.select([0, 3, 1])])
            for chosen, rows in ((dataset, [0, 1, 2, 3]), (several, [1, 2, 0, 3, 1]), (dataset.select([2, 0]), [2, 0])):
                store = make_store().from_dataset(chosen)
                for mask in (store[:]["action_mask"], make_store().from_dataset(store.to_dataset())[:]["action_mask"]):
                    assert mask.dtype == torch.bool
                    assert mask.tolist() == [[*masks[row], False, False] for row in rows]
        following = make_store().from_dataset(dataset)[:]["next", "action_mask"]
        assert following[:, :3].tolist() == [*masks[1:], masks[3]]
        store = make_store(max_obs_discrete_dim=7)
        for record in dataset:
            store.append(record)
        assert_equal(store[:], make_store(max_obs_discrete_dim=7).from_dataset(dataset)[:])

    @given(st.lists(st.lists(st.booleans(), max_size=ACTIONS), min_size=1, max_size=20), st.data())
    @settings(max_examples=60, deadline=None)
    def test_bits_of_ragged_masks(self, masks, data):
        feature = {"action_mask": datasets.List(datasets.Value("bool"))}
        extra = datasets.Dataset.from_dict({"action_mask": masks}, datasets.Features(feature))
        dataset = datasets.concatenate_datasets([make_dataset(make_columns([len(masks)])), extra], axis=1)
        low = data.draw(st.integers(0, len(masks) - 1))
        steps = make_store().from_dataset(dataset.select(range(low, len(masks))))[:]
        assert steps["action_mask"].tolist() == [m + [False] * (ACTIONS - len(m)) for m in masks[low:]]


class TestIndexing:
    @pytest.mark.parametrize("feature", [datasets.Image(), ARRAYS[0]], ids=str)
    def test_every_index(self, feature):
        images = make_images(14)
        values = map(PIL.Image.fromarray, images) if isinstance(feature, datasets.Image) else images.tolist()
        store = image_store().from_dataset(with_images(values, feature, [5, 1, 8]))
        rb = replay_buffer(store, window=3, batch_size=4)
        assert len(rb) == len(store) == 14
        expected = flat(images)
        tensor = torch.tensor([[1, 2, 3], [8, 9, 10]])
        indices = [
            slice(1, 7),
            slice(None, None, -3),
            range(2, 9, 2),
            [3, 0, 3],
            tensor,
            (torch.tensor([4, 13]),),
            3,
            -1,
        ]
        for index in indices:
            plain = index[0] if isinstance(index, tuple) else index
            rows = torch.tensor(range(14)[plain]) if isinstance(plain, slice) else torch.as_tensor(plain) % 14
            for steps in (store.get(index), store[index], rb[index]):
                assert torch.equal(steps["pixels"], expected[rows])
        first = rb.sample()
        assert torch.equal(first["pixels"], expected[first["index"].reshape(4, 3)])
        assert not any(
            a.data_ptr() == b.data_ptr() for a, b in itertools.pairwise([store[:]["pixels"], store[:]["pixels"]])
        )
