"""Models on the Hub: what is pushed is what is loaded, in one commit, with a card whose snippet runs."""

from __future__ import annotations

import re

import pytest
import torch
from hub import hub_fixture  # noqa: F401
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from torchrl_mouse.models import MouseConfig, MouseModel, load_model, push_model_to_hub

REPO = "user/agent"
FILES = ["README.md", "config.json", "model.safetensors"]


def make_model(seed=0, **options):
    torch.manual_seed(seed)
    embedding = {"max_num_actions": 3, "max_num_obs_continuous": 2}
    config = {"hidden_dim": 16, "window": 24, "embedding_kwargs": embedding, "dqn_head_kwargs": {"hidden_dim": 8}}
    backbone = {"num_layers": 1, "num_heads": 2}
    return MouseModel(MouseConfig(**{**config, "backbone_kwargs": backbone, **options}))


def same(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    assert set(ours) == set(theirs)
    return one.config == other.config and all(
        torch.equal(ours[name], theirs[name]) for name in ours if name != "trunk.weight_version"
    )


def uploaded(hub, **where):
    return sorted(path for path in hub.files(REPO, **where) if path != ".gitattributes")


@pytest.fixture
def push(hub):
    def push(model, **options):
        return push_model_to_hub(model, REPO, **{"token": hub.token, **options})

    return push


def test_what_is_pushed_is_what_is_loaded(hub, push):
    model = make_model()
    commit = push(model, commit_message="First agent")
    assert uploaded(hub) == FILES
    assert [commit.message for commit in hub.commits(REPO)] == ["initial commit", "First agent"]
    assert commit.oid == hub.commits(REPO)[-1].oid
    assert same(load_model(REPO), model)


def test_every_version_can_be_loaded(hub, push):
    first, second, branched = make_model(0), make_model(1), make_model(2)
    old = push(first).oid
    push(second)
    push(branched, revision="experiment")
    assert same(load_model(REPO), second)
    assert same(load_model(REPO, revision=old), first)
    assert same(load_model(REPO, revision="experiment"), branched)
    assert len(hub.commits(REPO)) == 3
    with pytest.raises(RevisionNotFoundError):
        load_model(REPO, revision="nowhere")


def test_private_models_need_their_token(hub, push):
    model = make_model()
    push(model, private=True)
    assert hub.repos["model", REPO].private
    with pytest.raises(RepositoryNotFoundError):
        load_model(REPO)
    with pytest.raises(HfHubHTTPError):
        load_model(REPO, token="hf_wrong")
    assert same(load_model(REPO, token=hub.token), model)


def test_a_public_repository_does_not_become_private_unseen(hub, push):
    push(make_model(0))
    with pytest.raises(ValueError, match=f"repository {REPO} must be private, got one that is public already"):
        push(make_model(1), private=True)
    assert same(load_model(REPO), make_model(0))


@pytest.mark.parametrize("where", ["/commit/main", "/lfs/", "preupload"])
def test_a_failure_in_the_middle_leaves_the_old_version(hub, push, where):
    push(make_model(0))
    hub.fail_on = where
    with pytest.raises(HfHubHTTPError):
        push(make_model(1))
    hub.fail_on = None
    assert len(hub.commits(REPO)) == 2
    assert same(load_model(REPO, force_download=True), make_model(0))
    push(make_model(1))
    assert same(load_model(REPO), make_model(1))


def test_downloads_are_cached_forced_and_put_where_asked(hub, push, tmp_path):
    push(make_model())

    def downloads():
        return sum(str(request).startswith("GET") and "/resolve/" in str(request) for request in hub.requests)

    load_model(REPO)
    first = downloads()
    assert first == 2  # the card is not downloaded
    load_model(REPO)
    assert downloads() == first
    load_model(REPO, True, tmp_path / "here")
    assert downloads() > first
    assert {"config.json", "model.safetensors"} <= {file.name for file in (tmp_path / "here").iterdir()}
    assert same(load_model(tmp_path / "here"), make_model())


def test_map_location(hub, push):
    push(make_model())
    assert {weight.device.type for weight in load_model(REPO, map_location="cpu").parameters()} == {"cpu"}
    assert {weight.device.type for weight in load_model(REPO, map_location="meta").parameters()} == {"meta"}


def test_a_repository_that_is_none(hub):
    with pytest.raises(RepositoryNotFoundError):
        load_model("user/nothing")


def snippet(card):
    return re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"action_head": "sp", "sp_head_kwargs": {}},
        {"dqn_head_kwargs": None},
        {
            "dqn_head_kwargs": None,
            "gaussian_head_kwargs": {},
            "embedding_kwargs": {"max_num_action_continuous": 2, "max_num_obs_continuous": 2},
        },
        {"backbone_kwargs": None},
    ],
    ids=["dqn", "two heads", "no head", "gaussian", "no backbone"],
)
@pytest.mark.parametrize("revision", [None, "experiment"])
def test_the_cards_snippet_runs(hub, push, options, revision):
    model = make_model(**options)
    push(model, revision=revision)
    card = hub.files(REPO, revision=revision or "main")["README.md"].decode()
    scope = {}
    exec(snippet(card), scope)
    assert same(scope["model"], model)
    assert ("actor" in scope) == bool(model.config.heads)


def test_the_card_says_what_the_model_is(hub, push):
    held_out = {"nauc": torch.tensor(0.91, dtype=torch.float64), "last ten": 1.0}
    push(make_model(), results={"held-out goals": held_out, "training goals": {"nauc": 0.93}})
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert card.data.library_name == "torchrl_mouse"
    assert {"reinforcement-learning", "in-context-learning"} <= set(card.data.tags)
    measured = {(result.dataset_name, result.metric_type): result.metric_value for result in card.data.eval_results}
    assert measured == {
        ("held-out goals", "nauc"): 0.91,
        ("held-out goals", "last ten"): 1.0,
        ("training goals", "nauc"): 0.93,
    }
    for text in ("action, continuous, reward, done", "24 steps", "llama, 1 layers of width 16", "| dqn |", "| 0.91 |"):
        assert text in card.content
    without = ModelCard(make_model().card(REPO))
    assert without.data.eval_results is None
    assert "metric" not in without.content


def test_the_card_is_valid_for_the_hub(hub, push):
    push(make_model())
    assert any("validate-yaml" in str(request) for request in hub.requests)
