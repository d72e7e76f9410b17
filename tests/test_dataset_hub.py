"""Data sets on the Hub: what is pushed is what is loaded, in one commit, with a card whose snippet runs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hub import hub_fixture  # noqa: F401
from huggingface_hub import DatasetCard, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from test_merging import ACTIONS, CONTINUOUS, OPTIONAL, assert_same, make_store, read

from torchrl_mouse.data import DatasetStore
from torchrl_mouse.data import hub as data_hub
from torchrl_mouse.data import rows as store_rows
from torchrl_mouse.data.hub import push_stores_to_hub, push_to_hub

REPO = "user/data"


def load(split="train", repo=REPO, **options):
    return read(datasets.load_dataset(repo, split=split, **options))


def shards(hub, **where):
    return sorted(path for path in hub.files(REPO, "dataset", **where) if path.endswith(".parquet"))


def messages(hub):
    return [commit.message for commit in hub.commits(REPO, "dataset")]


@pytest.fixture
def push(hub):
    def push(splits, **options):
        return push_to_hub(splits, REPO, **{"token": hub.token, **options})

    return push


@pytest.fixture
def push_split(hub):
    def push_split(stores, split, **options):
        return push_stores_to_hub(stores, REPO, split, **{"token": hub.token, **options})

    return push_split


def test_what_is_pushed_is_what_is_loaded(hub, push):
    train, held_out = [make_store(seed=1), make_store((4,), seed=2, width=4, teacher=6)], [make_store((2,), seed=3)]
    commit = push({"train": train, "eval": held_out}, commit_message="First data")
    assert messages(hub) == ["initial commit", "First data"]
    assert commit.oid == hub.commits(REPO, "dataset")[-1].oid
    assert shards(hub) == ["data/eval-00000-of-00001.parquet", "data/train-00000-of-00001.parquet"]
    assert_same(load(), *train)
    assert_same(load("eval"), *held_out)
    both = datasets.load_dataset(REPO)
    assert list(both) == ["train", "eval"]
    assert both["train"].features == both["eval"].features
    assert_same(read(both), *train, *held_out)


def test_images_are_pushed_as_pixels(hub, push):
    stores = []
    for seed, size in enumerate((12, 27)):
        store, drawn = DatasetStore(ACTIONS, max_obs_image_pixels=27), np.random.default_rng(seed)
        for step in range(4):
            image = drawn.integers(0, 256, size, dtype=np.uint8)
            record = {"action": 1, "reward": 0.5, "done": 0, "episode_step": step, "observation_image": image}
            store.append(record)
        stores.append(store)
    push({"train": stores, "eval": stores[:1]})
    for split, parts in (("train", stores), ("eval", stores[:1])):
        rows = datasets.load_dataset(REPO, split=split)
        assert rows.features["observation_image"] == datasets.List(datasets.Value("uint8"), length=27)
        assert_same(DatasetStore(ACTIONS, max_obs_image_pixels=27).from_dataset(rows), *parts)
    assert "| `observation_image` | uint8 [27] |" in card_of(hub).content
    assert "max_obs_image_pixels=27" in card_of(hub).content


def test_pieces_and_shards_do_not_change_the_rows(hub, push, monkeypatch, tmp_path):
    stores = [make_store((3, 4, 6), seed=1), make_store((5,), seed=2)]
    push({"train": stores})
    monkeypatch.setattr(store_rows, "CHUNK", 3)
    monkeypatch.setattr(data_hub, "SHARD_BYTES", 2_000)
    push({"train": stores})
    assert 2 < len(shards(hub)) < 8
    assert shards(hub)[-1] == f"data/train-{len(shards(hub)) - 1:05}-of-{len(shards(hub)):05}.parquet"
    assert_same(load(), *stores)
    (tmp_path / "shard").write_bytes(hub.files(REPO, "dataset")[shards(hub)[0]])
    assert pq.ParquetFile(tmp_path / "shard").num_row_groups > 1


def test_a_folder_of_the_same_layout_loads(push, tmp_path):
    store, other = make_store(), make_store(seed=1, columns=())
    push({"train": [store], "eval": [other]})
    snapshot_download(REPO, repo_type="dataset", local_dir=tmp_path)
    assert_same(load(repo=str(tmp_path)), store)


def test_a_column_that_a_split_lacks_reads_as_absent(push):
    full, bare = make_store(seed=1), make_store(seed=2, columns=())
    push({"train": [full], "eval": [bare]})
    rows = datasets.load_dataset(REPO, split="eval")
    assert rows.features == datasets.load_dataset(REPO, split="train").features
    for name in OPTIONAL:
        assert set(rows[name]) == {None}
    assert_same(load("eval"), bare)
    assert_same(load(), full)


def test_a_teacher_that_some_stores_of_a_split_lack_is_padding(push):
    bare = make_store((3,), columns=("observation",))
    taught = make_store((2,), seed=1, columns=("observation", "metadata_q_star"))
    push({"train": [bare, taught]})
    assert_same(read(datasets.load_dataset(REPO, split="train[:3]")), bare, without_teacher=True)
    assert_same(read(datasets.load_dataset(REPO, split="train[3:]")), taught)


def test_lists_of_no_length_are_padding(push):
    store = DatasetStore(ACTIONS, CONTINUOUS)
    store.append({"action": 0, "reward": 0.0, "done": 0, "episode_step": 0, "metadata_q_star": []})
    push({"train": [store]})
    assert_same(load(), store)


def test_a_push_of_the_set_replaces_it(hub, push, monkeypatch):
    first = push({"train": [make_store(seed=1)], "old": [make_store(seed=2)]}).oid
    monkeypatch.setattr(data_hub, "SHARD_BYTES", 0)
    monkeypatch.setattr(store_rows, "CHUNK", 1)
    new = make_store((2,), seed=3)
    push({"train": [new], "eval": [new]})
    names = [f"data/{split}-0000{number}-of-00002.parquet" for split in ("eval", "train") for number in (0, 1)]
    assert shards(hub) == names
    assert_same(load(), new)
    assert set(datasets.load_dataset(REPO)) == {"train", "eval"}
    assert_same(load("old", revision=first), make_store(seed=2))
    assert len(messages(hub)) == 3


def test_a_push_of_a_split_keeps_the_others(hub, push_split, monkeypatch):
    train, held_out = make_store(seed=1), make_store(seed=2, columns=("observation",))
    push_split([train], "train")
    kept = hub.files(REPO, "dataset")["data/train-00000-of-00001.parquet"]
    monkeypatch.setattr(data_hub, "SHARD_BYTES", 0)
    monkeypatch.setattr(store_rows, "CHUNK", 1)
    push_split([make_store((2,), seed=4)], "eval")
    assert len(shards(hub)) == 3
    monkeypatch.setattr(data_hub, "SHARD_BYTES", 10**6)
    push_split([held_out], "eval")
    assert shards(hub) == ["data/eval-00000-of-00001.parquet", "data/train-00000-of-00001.parquet"]
    assert hub.files(REPO, "dataset")["data/train-00000-of-00001.parquet"] == kept
    assert_same(load(), train)
    assert_same(load("eval"), held_out)
    assert datasets.load_dataset(REPO)["eval"].features == datasets.load_dataset(REPO)["train"].features


def test_a_split_keeps_to_the_columns_of_those_that_stay(hub, push, push_split):
    push({"train": [make_store(columns=("observation",), width=2)]})
    before = hub.commits(REPO, "dataset")
    for store in (make_store(columns=("observation",), width=3), make_store(width=2), make_store()):
        with pytest.raises(ValueError, match=r"must have the columns of the new one, .* in split 'train'\. Push all"):
            push_split([store], "eval")
    datasets.Dataset.from_dict({"text": ["a"]}).push_to_hub(REPO, split="words", token=hub.token, revision="other")
    with pytest.raises(ValueError, match=r"got \{.*'text': None"):
        push_split([make_store(columns=("observation",), width=2)], "eval", revision="other")
    assert hub.commits(REPO, "dataset") == before


def test_only_shards_are_replaced(hub, push):
    push({"train": [make_store()]})
    files = hub.commits(REPO, "dataset")[-1].files
    others = {"notes.txt": b"1", "data/notes.txt": b"2", "data/deep/train-0.parquet": b"3", "train-0.parquet": b"4"}
    files.update({**others, "data/train-old.parquet": b"5", "data/gone-00000-of-00001-0a1b.parquet": b"6"})
    push({"train": [make_store(seed=1)]})
    left = {path: content for path, content in hub.files(REPO, "dataset").items() if path in files}
    assert set(left) == {*others, ".gitattributes", "README.md", "data/train-00000-of-00001.parquet"}
    assert {path: left[path] for path in others} == others
    assert_same(load(), make_store(seed=1))


def test_the_same_data_are_the_same_files(hub, push):
    push({"train": [make_store()]})
    push({"train": [make_store()]})
    assert len(messages(hub)) == 2


def test_every_version_can_be_loaded(hub, push):
    first, second, branched = (make_store(seed=seed) for seed in range(3))
    old = push({"train": [first]}).oid
    push({"train": [second]})
    push({"train": [branched]}, revision="experiment")
    assert_same(load(), second)
    assert_same(load(revision=old), first)
    assert_same(load(revision="experiment"), branched)
    assert len(messages(hub)) == 3


def test_private_data_need_their_token(hub, push):
    push({"train": [make_store()]}, private=True)
    assert hub.repos["dataset", REPO].private
    with pytest.raises(datasets.exceptions.DatasetNotFoundError):
        load()
    assert_same(load(token=hub.token), make_store())


def test_a_public_repository_does_not_become_private_unseen(push):
    push({"train": [make_store()]})
    with pytest.raises(ValueError, match=f"push_to_hub: repository {REPO} must be private, got one that is public"):
        push({"train": [make_store(seed=1)]}, private=True)
    assert_same(load(), make_store())


FAILURES = ["/preupload/", "/lfs/objects/batch", "PUT /lfs/", "/commit/main"]


def second(part):
    """Says yes from the second request on whose text holds a part."""
    seen = []

    def choose(request):
        seen.extend([part] if part in str(request) else [])
        return part in str(request) and len(seen) > 1

    return choose


@pytest.mark.parametrize("how", ["fail_on", "drop_on"])
@pytest.mark.parametrize("where", [*FAILURES, second("PUT /lfs/")], ids=[*FAILURES, "second PUT"])
def test_a_failure_in_the_middle_leaves_the_old_version(hub, push, push_split, where, how):
    old = {"train": [make_store(seed=1)], "eval": [make_store((2,), seed=2)]}
    push(old)
    before = hub.commits(REPO, "dataset")
    for again, argument in ((push, {"train": [make_store(seed=3)], "new": [make_store(seed=4)]}), (push_split, None)):
        setattr(hub, how, where)
        with pytest.raises((HfHubHTTPError, RuntimeError, ConnectionError), match=r"Simulated|uploading|Hub at http"):
            again(argument) if argument else again([make_store(seed=5)], "train")
        setattr(hub, how, None)
    assert hub.commits(REPO, "dataset") == before
    assert_same(load(), *old["train"])
    assert_same(load("eval"), *old["eval"])
    push({"train": [make_store(seed=3)]})
    assert_same(load(), make_store(seed=3))


PUSH = """
import sys
sys.path.insert(0, {tests!r})
from test_merging import make_store
from torchrl_mouse.data.hub import push_to_hub
push_to_hub({{"train": [make_store(seed=3)], "new": [make_store(seed=4)]}}, "user/data", token={token!r})
"""


@pytest.mark.parametrize("lands", [False, True])
@pytest.mark.parametrize("where", ["/preupload/", "PUT /lfs/", "/commit/main"])
def test_a_killed_push_lands_whole_or_not_at_all(hub, push, where, lands):
    old = {"train": [make_store(seed=1)], "eval": [make_store((2,), seed=2)]}
    push(old)
    children = []

    def kill(request):
        if children and where in str(request):
            os.kill(children[0].pid, signal.SIGKILL)
            return not lands
        return False

    hub.drop_on = kill
    program = PUSH.format(tests=str(Path(__file__).parent), token=hub.token)
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE) as child:
        children.append(child)
        child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL
    if lands and where == "/commit/main":
        assert_same(load(), make_store(seed=3))
        assert set(datasets.load_dataset(REPO)) == {"train", "new"}
    else:
        assert len(messages(hub)) == 2
        assert_same(load(), *old["train"])
        assert_same(load("eval"), *old["eval"])


def test_what_somebody_else_commits_meanwhile_is_not_lost(hub, push, monkeypatch):
    push({"train": [make_store(seed=1)]})
    original = data_hub._write

    def write(*arguments):
        monkeypatch.setattr(data_hub, "_write", original)
        push({"train": [make_store(seed=2)], "new": [make_store(seed=3)]})
        return original(*arguments)

    monkeypatch.setattr(data_hub, "_write", write)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        push({"train": [make_store(seed=4)]})
    assert_same(load(), make_store(seed=2))
    assert_same(load("new"), make_store(seed=3))


@pytest.mark.parametrize(
    ("token", "repo"), [(False, REPO), ("hf_other", REPO), ("hf_wrong", REPO), ("hf_user", "other/data")]
)
@pytest.mark.parametrize("exists", [False, True])
def test_who_may_not_write_is_told_so(hub, push, exists, token, repo):
    if exists:
        push({"train": [make_store()]})
    with pytest.raises(PermissionError, match=r"push_to_hub: the Hub must let .* got 40[13]: .* Log in with `hf auth"):
        push_to_hub({"train": [make_store(seed=1)]}, repo, token=token)
    assert list(hub.repos) == [("dataset", REPO)] * exists


def test_without_a_network_the_error_says_so(hub, push):
    hub.close()
    with pytest.raises(ConnectionError, match=rf"push_to_hub: the Hub at {hub.endpoint} must be reachable, got: .*"):
        push({"train": [make_store()]})


@pytest.mark.parametrize("repo", ["a/b/c", "user/da ta", "user/a--b", ""])
def test_repository_ids_are_checked(hub, repo):
    with pytest.raises((HFValidationError, ValueError), match=r"Repo id|Cannot have"):
        push_to_hub({"train": [make_store()]}, repo, token=hub.token)
    assert not hub.requests


@pytest.mark.parametrize("split", ["train.v1", "_x", "train_2", "été"])
def test_split_names_that_datasets_takes(push, split):
    push({split: [make_store()]})
    assert_same(load(split), make_store())


@pytest.mark.parametrize(
    "split", ["", "a-b", "a b", "a/b", "../a", "a..b", ".a", "a.", "train\n", "all", "train[:1]", 1]
)
def test_split_names_are_checked(hub, push, split):
    with pytest.raises(ValueError, match=rf"push_to_hub: a split's name must be .* got {re.escape(repr(split))}\."):
        push({"train": [make_store()], split: [make_store()]})
    assert not hub.requests


@pytest.mark.parametrize(
    ("splits", "error", "match"),
    [
        ([make_store()], TypeError, r"push_to_hub: splits must be a mapping .*, got list\. Give \{'train'"),
        ({}, ValueError, "push_to_hub: splits must be at least one, got none"),
        ({"eval": []}, ValueError, "push_to_hub: split 'eval': stores must be at least one, got none"),
        ({"eval": make_store()}, TypeError, r"must be a list of DatasetStore, got DatasetStore\. Write \[store\]"),
        ({"eval": "train"}, TypeError, "must be a list of DatasetStore, got str"),
        ({"eval": [make_store(), DatasetStore()]}, RuntimeError, "must have rows, got 0 and 0 unfinished .* store 1"),
        ({"eval": [make_store(), make_store(columns=())]}, KeyError, "difference in observation, observation_discrete"),
    ],
)
def test_what_cannot_be_pushed(hub, push, splits, error, match):
    with pytest.raises(error, match=match):
        push(splits)
    assert not hub.requests


def card_of(hub, revision="main"):
    return DatasetCard(hub.files(REPO, "dataset", revision)["README.md"].decode())


@pytest.mark.parametrize("revision", [None, "experiment"])
@pytest.mark.parametrize("columns", [(), OPTIONAL])
def test_the_cards_snippet_runs(hub, push, columns, revision):
    store = make_store((3, 5), columns=columns)
    push({"eval": [store], "train": [make_store(seed=1)]}, revision=revision)
    (snippet,) = re.findall(r"```python\n(.*?)```", card_of(hub, revision or "main").content, re.DOTALL)
    scope = {}
    exec(snippet, scope)
    assert len(scope["steps"]) == 8
    assert_same(read(scope["rows"]), store)
    for key in ("action", ("next", "reward")):
        assert torch.equal(scope["steps"][key], store[:][key])


def brute_force(store):
    """The episodes' returns and the number of decisions, record by record."""
    rows = store.to_dataset()
    returns, steps, running, before = [], 0, 0.0, None
    for index, row in enumerate(rows):
        if before is None or before["task"] != row["task"] or before["done"]:
            running = 0.0
        running += row["reward"]
        returns.extend([running] if row["done"] else [])
        following = rows[index + 1]["task"] if index + 1 < len(rows) else None
        steps += not row["done"] and following == row["task"]
        before = row
    return returns, steps


@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_statistics(monkeypatch, seed, chunk):
    monkeypatch.setattr(store_rows, "CHUNK", chunk)
    stores = [make_store((4, 1, 9, 6), seed=seed), make_store((5, 3), seed=seed + 10)]
    (first, first_steps), (second, second_steps) = map(brute_force, stores)
    returns, steps = first + second, first_steps + second_steps
    expected = {"tasks": 6, "episodes": len(returns), "steps": steps, "rows": 28}
    expected |= {"mean": np.mean(returns), "std": np.std(returns), "min": min(returns), "max": max(returns)}
    assert data_hub._statistics(stores) == pytest.approx(expected)


def test_without_a_finished_episode_there_is_no_return(hub, push):
    store = DatasetStore(ACTIONS)
    for step in range(3):
        store.append({"action": 0, "reward": 1.0, "done": 0, "episode_step": step})
    assert data_hub._statistics([store]) == {"tasks": 1, "episodes": 0, "steps": 2, "rows": 3}
    push({"train": [store]})
    assert "| train | 1 | 0 | 2 | 3 | ? | ? | ? | ? |" in card_of(hub).content


def known_store():
    """Two episodes, of returns 3 and 1, in one task."""
    store = DatasetStore(ACTIONS, CONTINUOUS)
    for step, (reward, done) in enumerate([(0, 0), (1, 0), (2, 1), (0, 0), (1, 2)]):
        record = {"action": 0, "reward": float(reward), "done": done, "episode_step": step % 3}
        store.append({**record, "observation": [0.0, 1.0]})
    return store


def test_the_card_says_what_the_data_are(hub, push, push_split):
    push({"train": [known_store(), known_store()], "eval": [known_store()]})
    card = card_of(hub)
    assert {"reinforcement-learning", "in-context-learning"} <= set(card.data.tags)
    assert card.data.task_categories == ["reinforcement-learning"]
    assert [file["split"] for file in card.data.configs[0]["data_files"]] == ["train", "eval"]
    row = "| train | 2 | 4 | 6 | 10 | 2 | 1 | 1 | 3 |"
    for text in (
        row,
        "| eval | 1 | 2 | 3 | 5 | 2 | 1 | 1 | 3 |",
        "| `observation` | float32 [2] |",
        "| `task` | int64 |",
    ):
        assert text in card.content
    push_split([known_store()], "new")
    kept = card_of(hub)
    assert [file["split"] for file in kept.data.configs[0]["data_files"]] == ["new", "eval", "train"]
    assert row in kept.content
    assert any("validate-yaml" in str(request) for request in hub.requests)


def test_splits_of_another_origin_stay_too(hub, push_split):
    store = make_store((3, 4), seed=1)
    datasets.DatasetDict({"train": store.to_dataset()}).push_to_hub(REPO, token=hub.token)
    push_split([make_store(seed=2, columns=())], "eval")
    assert_same(load(), store)
    assert "| train | ? | ? | ? | ? | ? | ? | ? | ? |" in card_of(hub).content
