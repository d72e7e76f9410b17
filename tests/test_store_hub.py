"""The store and the Hub: a card whose snippet loads every split, and columns of splits that stay."""

from __future__ import annotations

import re

import datasets
import pytest
from hub import hub_fixture  # noqa: F401
from huggingface_hub import DatasetCard

from torchrl_mouse.data import DatasetStore
from torchrl_mouse.data import hub as data_hub
from torchrl_mouse.data.hub import push_stores_to_hub

REPO = "user/data"


def one_task(actions, ids, *, action=0, teacher=None):
    store = DatasetStore(actions, max_obs_discrete_dim=ids)
    for step in range(3):
        record = {"action": action, "reward": 0.0, "done": 0, "episode_step": step, "observation_discrete": ids - 1}
        store.append({**record, "metadata_q_star": teacher})
    return store


def sizes_of(hub):
    """The arguments of the store in the card's snippet."""
    card = DatasetCard(hub.files(REPO, "dataset", "main")["README.md"].decode())
    (arguments,) = re.findall(r"DatasetStore\((.*?)\)\.from_dataset", card.content)
    return eval(f"dict({arguments})")


def load(split, **sizes):
    return DatasetStore(**sizes).from_dataset(datasets.load_dataset(REPO, split=split))


def test_the_cards_sizes_fit_the_splits_that_stay(hub):
    large, small = one_task(40, 90, action=39), one_task(4, 70)
    push_stores_to_hub([one_task(4, 5), large], REPO, "train", token=hub.token)
    assert sizes_of(hub) == {"max_action_dim": 40, "max_obs_discrete_dim": 90}
    for _ in range(2):  # the second time from what the first one wrote
        push_stores_to_hub([small], REPO, "eval", token=hub.token)
        assert sizes_of(hub) == {"max_action_dim": 40, "max_obs_discrete_dim": 90}
    assert load("train", **sizes_of(hub))[:]["previous", "action"].tolist() == [0, 0, 0, 39, 39, 39]
    push_stores_to_hub([small], REPO, "train", token=hub.token)
    assert sizes_of(hub) == {"max_action_dim": 4, "max_obs_discrete_dim": 70}


def test_the_cards_sizes_fit_the_lists_of_splits_of_another_origin(hub):
    theirs = one_task(9, 5, teacher=[0.0] * 9).to_dataset()
    datasets.DatasetDict({"train": theirs}).push_to_hub(REPO, token=hub.token)
    push_stores_to_hub([one_task(4, 5, teacher=[0.0] * 4)], REPO, "eval", token=hub.token)
    assert sizes_of(hub) == {"max_action_dim": 9, "max_obs_discrete_dim": 5}
    assert load("train", **sizes_of(hub)).num_tasks == 1


def test_a_split_that_stays_may_have_no_column_of_its_own(hub):
    store = one_task(4, 5)
    theirs = store.to_dataset().add_column("note", ["a"] * 3)
    datasets.DatasetDict({"train": theirs}).push_to_hub(REPO, token=hub.token)
    before = hub.commits(REPO, "dataset")
    with pytest.raises(
        ValueError, match=r"must have the columns of the new one, got \{'note': .*'note'.* in split 'train'"
    ):
        push_stores_to_hub([store], REPO, "eval", token=hub.token)
    assert hub.commits(REPO, "dataset") == before


def test_sizes_are_those_of_the_largest_store():
    stores = [one_task(4, 90), one_task(40, 5)]
    assert data_hub._sizes(stores) == {"max_action_dim": 40, "max_obs_discrete_dim": 90}
