"""The store: images in every form, read from data sets, and what is refused."""

import io
import pickle
import sys

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from store_data import (
    ARRAYS,
    PIXELS,
    SIZE,
    collect_images,
    flat,
    image_store,
    make_columns,
    make_dataset,
    make_images,
    make_store,
    png,
    with_images,
)
from torchrl.data import Bounded

from torchrl_mouse.data import DatasetStore
from torchrl_mouse.data.arrow import ragged_rows
from torchrl_mouse.modules import StepEmbedder

RECORD = make_dataset(make_columns([1])).remove_columns("observation_discrete")[0]


class TestFromDataset:
    @pytest.mark.parametrize("feature", [datasets.Image(), *ARRAYS], ids=str)
    def test_kinds(self, feature):
        images = make_images(6)
        values = map(PIL.Image.fromarray, images) if isinstance(feature, datasets.Image) else images.tolist()
        steps = image_store().from_dataset(with_images(values, feature))[:]
        assert steps["pixels"].dtype == torch.uint8
        assert torch.equal(steps["pixels"], flat(images))
        assert torch.equal(steps["next", "pixels"], flat(images)[[1, 2, 3, 4, 5, 5]])

    @pytest.mark.parametrize("fields", [["bytes"], ["path"], ["bytes", "path"], ["path", "bytes", "other"]], ids=str)
    def test_structs(self, fields, tmp_path):
        images = make_images(3)
        paths = [tmp_path / f"{row}.png" for row in range(3)]
        for path, image in zip(paths, images, strict=True):
            path.write_bytes(png(image))
        whole = [
            {"bytes": png(image), "path": str(path), "other": 1} for image, path in zip(images, paths, strict=True)
        ]
        if len(fields) == 2:  # each image has either
            whole = [{**value, ("bytes", "path")[row % 2]: None} for row, value in enumerate(whole)]
        types = {"bytes": "binary", "path": "string", "other": "int64"}
        feature = {name: datasets.Value(types[name]) for name in fields}
        dataset = with_images([{name: value[name] for name in fields} for value in whole], feature)
        assert torch.equal(image_store().from_dataset(dataset)[:]["pixels"], flat(images))

    @pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
    def test_floats_are_scaled(self, kind):
        images = np.arange(240, dtype=np.uint8).reshape(10, *SIZE)
        feature = datasets.Array3D(SIZE, kind) if kind != "float16" else datasets.List(datasets.Value(kind))
        values = (images / 255).tolist() if kind != "float16" else (images / 255).reshape(10, -1).tolist()
        assert torch.equal(image_store().from_dataset(with_images(values, feature))[:]["pixels"], flat(images))

    @pytest.mark.parametrize("kind", ["uint8", "int32", "uint16", "float32"])
    def test_images_of_several_sizes_are_padded(self, kind):
        images = [np.full(size, 1) for size in [(4, 2), (1, 2), (3, 3), (2, 2)]]
        feature = datasets.List(datasets.List(datasets.Value(kind)))
        got = image_store().from_dataset(with_images([image.tolist() for image in images], feature))[:]["pixels"]
        assert got.shape == (4, PIXELS)
        value = 255 if kind == "float32" else 1
        assert got.sum(-1).tolist() == [value * image.size for image in images]
        assert got[1].tolist() == [value] * 2 + [0] * 22

    def test_encoded_images_of_several_sizes_are_padded(self):
        images = [PIL.Image.new("L", size, 9) for size in [(4, 2), (1, 1), (6, 4)]]
        got = image_store().from_dataset(with_images(images, datasets.Image()))[torch.tensor([1, 0, 1, 2])]["pixels"]
        assert got.count_nonzero(-1).tolist() == [1, 8, 1, 24]

    @pytest.mark.parametrize(
        ("mode", "values"),
        [
            ("L", [100]),
            ("LA", [100, 7]),
            ("RGB", [100, 0, 7]),
            ("RGBA", [100, 0, 7, 9]),
            ("P", [100, 0, 7]),
            ("1", [255]),
        ],
    )
    def test_modes(self, mode, values):
        image = PIL.Image.new(mode, (1, 1), tuple(values) if mode not in "1P" else 1)
        if mode == "P":
            image.putpalette([0, 0, 0, *values])
        store = image_store(max_obs_image_pixels=len(values))
        store.from_dataset(with_images([image], datasets.Image()))
        assert store[0]["pixels"].tolist() == values

    def test_mode_of_the_feature(self):
        dataset = with_images([PIL.Image.new("RGB", (2, 2), (9, 9, 9))], datasets.Image(mode="L"))
        assert image_store(max_obs_image_pixels=4).from_dataset(dataset)[0]["pixels"].tolist() == [9] * 4

    def test_images_are_turned_upright(self):
        exif = PIL.Image.Exif()
        exif[0x0112] = 3  # upside down
        file = io.BytesIO()
        PIL.Image.fromarray(np.array([[1, 2]], np.uint8)).save(file, "png", exif=exif)
        dataset = with_images([{"bytes": file.getvalue()}], {"bytes": datasets.Value("binary")})
        assert image_store(max_obs_image_pixels=2).from_dataset(dataset)[0]["pixels"].tolist() == [2, 1]

    @pytest.mark.parametrize("feature", [datasets.Image(), *ARRAYS], ids=str)
    def test_chunks_slices_and_orders(self, feature):
        images = make_images(12)
        values = list(map(PIL.Image.fromarray, images)) if isinstance(feature, datasets.Image) else images.tolist()
        parts = [
            with_images(values[a:b], feature).select(range(c, d))
            for a, b, c, d in [(0, 5, 1, 4), (5, 6, 0, 1), (6, 12, 2, 6)]
        ]
        dataset = datasets.concatenate_datasets([datasets.Dataset(p.data, info=p.info) for p in parts])
        rows = [1, 2, 3, 5, 8, 9, 10, 11]
        assert torch.equal(image_store().from_dataset(dataset)[:]["pixels"], flat(images[rows]))
        order = [6, 0, 3, 3]
        assert torch.equal(image_store().from_dataset(dataset.select(order))[:]["pixels"], flat(images[rows][order]))

    @pytest.mark.parametrize("feature", [datasets.Image(), datasets.Array3D(SIZE, "uint8")], ids=str)
    def test_on_disk_and_pickled(self, feature, tmp_path):
        images = make_images(9)
        values = map(PIL.Image.fromarray, images) if isinstance(feature, datasets.Image) else images.tolist()
        with_images(values, feature).save_to_disk(tmp_path / "rows", num_shards=2)
        store = image_store().from_dataset(datasets.load_from_disk(tmp_path / "rows"))
        for one in (store, pickle.loads(pickle.dumps(store))):
            assert torch.equal(one[:]["pixels"], flat(images))

    def test_raw_images_stay_in_the_file(self, tmp_path):
        with_images(make_images(200).tolist(), datasets.Array3D(SIZE, "uint8")).save_to_disk(tmp_path / "rows")
        before = pa.total_allocated_bytes()
        image_store().from_dataset(datasets.load_from_disk(tmp_path / "rows"))[:]
        assert pa.total_allocated_bytes() <= before

    def test_each_image_is_decoded_once(self, monkeypatch):
        import torchrl_mouse.data.images as module

        dataset = with_images(map(PIL.Image.fromarray, make_images(20)), datasets.Image())
        store, opened = image_store().from_dataset(dataset), []
        opener = module._open
        monkeypatch.setattr(module, "_open", lambda file, read, row: opened.append(row) or opener(file, read, row))
        store[torch.tensor([[3, 4, 5], [4, 5, 6]])]
        assert opened == [3, 4, 5, 6, 7]
        opened.clear()
        store.select(["observation"])[:]
        assert not opened

    def test_unread_images_are_left_alone(self):
        dataset = with_images([{"bytes": b"broken"}], {"bytes": datasets.Value("binary")})
        assert "pixels" not in make_store().from_dataset(dataset)[0]

    def test_embedder_takes_them(self):
        dataset = with_images(make_images(4).tolist(), ARRAYS[0])
        steps = image_store().from_dataset(dataset)[:]
        embedder = StepEmbedder(8, max_num_obs_image=PIXELS, include_reward_token=False, include_done_token=False)
        assert embedder({"image": steps["pixels"]}).shape == (4, 1, 8)
        assert Bounded(0, 255, (4, PIXELS), dtype=torch.uint8).is_in(steps["pixels"])

    def test_without_pillow(self, monkeypatch):
        dataset = with_images(map(PIL.Image.fromarray, make_images(2)), datasets.Image())
        arrays = with_images(make_images(2).tolist(), ARRAYS[0])
        monkeypatch.setitem(sys.modules, "PIL", None)
        monkeypatch.setitem(sys.modules, "PIL.Image", None)
        with pytest.raises(ImportError, match=r"image files must be read by Pillow, which is not installed\. Run `pip"):
            image_store().from_dataset(dataset)
        assert len(image_store().from_dataset(arrays)) == 2

    @given(st.lists(st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=3), min_size=1, max_size=5))
    @settings(max_examples=80, deadline=None)
    def test_ragged_rows(self, rows):
        kind = pa.list_(pa.list_(pa.int64()))
        expected = [len({len(line) for line in row}) > 1 for row in rows]
        assert ragged_rows(pa.array(rows, kind)).tolist() == expected
        assert ragged_rows(pa.array([[], *rows], kind)[1:]).tolist() == expected


BROKEN = png(make_images(1)[0])[:-40] + bytes(40)


class TestErrors:
    def encoded(self, values):
        return with_images(values, {"bytes": datasets.Value("binary"), "path": datasets.Value("string")})

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (
                {"bytes": b"no image", "path": None},
                "UnidentifiedImageError: .* in row 2 of a data set in memory. Replace",
            ),
            ({"bytes": None, "path": "/no/such.png"}, "FileNotFoundError: .*/no/such.png' in row 2"),
            ({"bytes": png(np.zeros((2, 2), np.uint16)), "path": None}, "mode 'I;16', which has more than 8 bits"),
        ],
    )
    def test_unreadable(self, value, message):
        good = {"bytes": png(make_images(1)[0]), "path": None}
        store = image_store().from_dataset(self.encoded([good, good]))
        message = f"column 'observation_image' must hold readable images, got .*{message}"
        with pytest.raises(ValueError, match=f"from_dataset: {message}"):
            store.from_dataset(self.encoded([good, good, value, good]))
        with pytest.raises(ValueError, match=f"append: {message.replace(' of a data set in memory', '')}"):
            store.append({**RECORD, "observation_image": value})
        assert len(store) == 2
        assert torch.equal(store[:]["pixels"], flat(make_images(1)).expand(2, -1))
        # An order, and rows that it leaves out.
        dataset = self.encoded([value, good, good, good])
        with pytest.raises(ValueError, match="row 3"):
            store.from_dataset(dataset.select([3, 2, 1, 0]))
        assert len(image_store().from_dataset(dataset.select([3, 2, 1]))) == 3

    def test_damage_behind_the_header(self):
        good = {"bytes": png(make_images(1)[0]), "path": None}
        dataset = self.encoded([good, good, {"bytes": BROKEN, "path": None}, good])
        store = image_store().from_dataset(dataset.select([1, 0, 2, 3]))
        for index in (2, slice(1, 3), 1):  # row 1's next frame
            with pytest.raises(ValueError, match=r"get: column 'observation_image' must hold readable .* in row 2 of"):
                store[index]
        assert store[0]["pixels"].shape == store[3]["pixels"].shape == (PIXELS,)
        with pytest.raises(ValueError, match=r"append: column 'observation_image' must hold readable images"):
            store.append({**RECORD, "observation_image": {"bytes": BROKEN}})

    def test_nulls(self):
        good = {"bytes": png(make_images(1)[0]), "path": None}
        for null in (None, {"bytes": None, "path": None}):
            dataset = self.encoded([good, good, null, null])
            message = "'observation_image' must be an image, got 2 bad rows, the first is row 2. Fill"
            with pytest.raises(ValueError, match=message):
                image_store().from_dataset(dataset)
            assert len(image_store().from_dataset(dataset.select([1, 0]))) == 2
        arrays = [[[1, 2], [3, 4]], [[1, 2], None], None, [[1, None], [3, 4]]]
        dataset = with_images(arrays, datasets.List(datasets.List(datasets.Value("uint8"))))
        with pytest.raises(
            ValueError, match="'observation_image' must hold no nulls, got 3 bad rows, the first is row 1"
        ):
            image_store().from_dataset(dataset)

    def test_ragged(self):
        arrays = [[[1, 2], [3, 4]], [[1, 2, 3]], [[1, 2], [3]]]
        dataset = with_images(arrays, datasets.List(datasets.List(datasets.Value("uint8"))))
        with pytest.raises(
            ValueError, match="'observation_image' must hold rectangles, got 1 bad rows, the first is row 2"
        ):
            image_store().from_dataset(dataset)
        store = image_store()
        with pytest.raises(TypeError, match=r"append: column 'observation_image' must hold .*inhomogeneous.* in row 0"):
            store.append({**RECORD, "observation_image": arrays[2]})

    @pytest.mark.parametrize(
        ("kind", "value", "message"),
        [
            ("int64", 256, r"\[0, 255\] where its numbers are integers, got 256 in row 1"),
            ("int64", -1, r"\[0, 255\] where its numbers are integers, got -1 in row 1"),
            ("float32", 1.5, r"\[0, 1\] where its numbers are floats, got 1.5 in row 1"),
            ("float32", float("nan"), r"\[0, 1\] where its numbers are floats, got nan in row 1"),
        ],
    )
    def test_values(self, kind, value, message, monkeypatch):
        monkeypatch.setattr("torchrl_mouse.data.rows.CHUNK_VALUES", 2)
        dataset = with_images([[0, 1], [1, value]], datasets.List(datasets.Value(kind)))
        store = image_store()
        with pytest.raises(ValueError, match=f"from_dataset: column 'observation_image' must lie in {message}"):
            store.from_dataset(dataset)
        record = {**RECORD, "observation_image": [0, 1]}
        store.append(record)
        value = float(value) if kind == "float32" else value
        with pytest.raises(ValueError, match=f"append: column 'observation_image' must lie in {message}"):
            store.append({**record, "observation_image": [0, value]})
        assert len(store) == 1
        batch, _ = collect_images([4], rows=1, dtype=torch.float32 if kind == "float32" else torch.int64)
        batch["next", "pixels"][0, 1, 0, 0, 1] = value
        with pytest.raises(ValueError, match=f"extend: column 'observation_image' must lie in {message} under 'next'"):
            image_store().extend(batch)

    def test_too_large(self):
        message = "'observation_image' must have at most max_obs_image_pixels=20 values a row, got 24"
        store = image_store(max_obs_image_pixels=20)
        with pytest.raises(ValueError, match=f"from_dataset: column {message}. Raise max_obs_image_pixels"):
            store.from_dataset(with_images(make_images(2).tolist(), ARRAYS[0]))
        small = PIL.Image.new("L", (1, 1))
        with pytest.raises(ValueError, match=f"from_dataset: column {message} in row 1. Raise"):
            store.from_dataset(with_images([small, PIL.Image.fromarray(make_images(1)[0])], datasets.Image()))
        with pytest.raises(ValueError, match=f"append: column {message}"):
            store.append({**RECORD, "observation_image": make_images(1)[0]})
        with pytest.raises(ValueError, match=f"extend: column {message}"):
            store.extend(collect_images([4], rows=1)[0])
        assert not len(store)

    @pytest.mark.parametrize(
        ("value", "feature", "message"),
        [
            ("x", datasets.Value("string"), "images or numbers, got string"),
            (3, datasets.Value("uint8"), "images or numbers, got uint8"),
            ({"a": 1}, {"a": datasets.Value("int64")}, "images or numbers, got struct<a: int64>"),
            ([True], datasets.List(datasets.Value("bool")), "images or numbers, got list<.*bool>"),
        ],
        ids=str,
    )
    def test_types(self, value, feature, message):
        with pytest.raises(TypeError, match=f"column 'observation_image' must hold {message}"):
            image_store().from_dataset(with_images([value], feature))
        error = ValueError if isinstance(value, dict) else TypeError
        with pytest.raises(
            error, match=r"append: column 'observation_image' must hold .* in row 0. (Convert|Replace) it"
        ):
            image_store().append({**RECORD, "observation_image": value})

    def test_action_mask_type(self):
        features = datasets.Features({"action_mask": datasets.List(datasets.Value("int64"))})
        extra = datasets.Dataset.from_dict({"action_mask": [[1, 0]]}, features)
        dataset = datasets.concatenate_datasets([make_dataset(make_columns([1])), extra], axis=1)
        with pytest.raises(TypeError, match="column 'action_mask' must hold lists of booleans, got list<"):
            make_store().from_dataset(dataset)
        with pytest.raises(
            TypeError, match=r"append: column 'action_mask' must hold booleans, got torch.int64 in row 0"
        ):
            make_store(max_obs_discrete_dim=7).append(dataset[0])
        batch, _ = collect_images([3], rows=1, masks=True)
        batch["action_mask"] = batch["action_mask"].float()
        with pytest.raises(TypeError, match=r"entry 'action_mask' must hold booleans, got torch.float32"):
            image_store().extend(batch)

    def test_unread_pixels(self):
        batch, _ = collect_images([3], rows=1)
        with pytest.raises(
            ValueError, match="'observation_image' must be one that the store reads, got max_obs_image_p"
        ):
            make_store().extend(batch)
        with pytest.raises(ValueError, match="sizes must be at least 1, 0, 0 and 0, got 1000, 0, 0, -1"):
            DatasetStore(max_obs_image_pixels=-1)

    @pytest.mark.parametrize("at", [(), ("next",)], ids=str)
    def test_pixels_on_one_side(self, at):
        batch, _ = collect_images([3], rows=1)
        with pytest.raises(KeyError, match=r"the same entries at the root and under 'next', .* in observation_image"):
            image_store().extend(batch.exclude((*at, "pixels")))
