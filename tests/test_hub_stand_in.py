"""The stand-in for the Hub, through the real clients: what they push arrives, what they may not see stays hidden."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from hub import hub_fixture  # noqa: F401
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    close_session,
    constants,
    get_session,
    hf_hub_download,
    hf_hub_url,
    repo_exists,
    snapshot_download,
    whoami,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoConfig, LlamaConfig

REPO = "user/model"
CONFIG, WEIGHTS = b'{"hidden_dim": 2}', bytes(range(256)) * 64
CARD = b"---\nlicense: mit\n---\n# A model\n"
BOTH = {"config.json": CONFIG, "model.safetensors": WEIGHTS}


@pytest.fixture
def api(hub):
    return HfApi(token=hub.token)


@pytest.fixture
def push(api):
    """Pushes files by path in one commit; ``None`` deletes."""

    def push(files, repo_type="model", private=False, message="Upload", **options):
        api.create_repo(REPO, repo_type=repo_type, private=private, exist_ok=True)
        operations = [
            CommitOperationDelete(path) if content is None else CommitOperationAdd(path, content)
            for path, content in files.items()
        ]
        return api.create_commit(REPO, operations, commit_message=message, repo_type=repo_type, **options).oid

    return push


def read(folder):
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def kept(hub, **where):
    """The repository's files, without the one that it begins with."""
    return {path: content for path, content in hub.files(REPO, **where).items() if path != ".gitattributes"}


def sent(hub, pattern):
    return [str(request) for request in hub.requests if re.search(pattern, str(request))]


@pytest.mark.parametrize("repo_type", ["model", "dataset"])
def test_round_trip_of_regular_and_lfs_files(hub, api, push, tmp_path, repo_type):
    files = {"README.md": CARD, "config.json": CONFIG, "data/sub/model.safetensors": WEIGHTS, "empty.bin": b""}
    oid = push(files, repo_type)
    assert kept(hub, repo_type=repo_type) == files
    assert [commit.message for commit in hub.commits(REPO, repo_type)] == ["initial commit", "Upload"]
    assert push(files, repo_type) == oid, "nothing has changed"
    assert len(sent(hub, "^PUT /lfs/")) == len(sent(hub, "/commit/main$")) == 1

    info = api.repo_info(REPO, repo_type=repo_type)
    assert (info.id, info.sha, info.private) == (REPO, oid, False)
    assert set(api.list_repo_files(REPO, repo_type=repo_type)) == {".gitattributes", *files}
    sizes = {entry.path: getattr(entry, "size", None) for entry in api.list_repo_tree(REPO, repo_type=repo_type)}
    sizes.pop(".gitattributes")
    assert sizes == {"README.md": len(CARD), "config.json": len(CONFIG), "data": None, "empty.bin": 0}
    folder, weights = api.list_repo_tree(REPO, "data", recursive=True, repo_type=repo_type)
    assert {folder.path, weights.path} == {"data/sub", "data/sub/model.safetensors"}

    assert read(snapshot_download(REPO, repo_type=repo_type, ignore_patterns=".gitattributes")) == files
    name = "model.safetensors"
    local = hf_hub_download(REPO, name, subfolder="data/sub", repo_type=repo_type, local_dir=tmp_path)
    assert Path(local).read_bytes() == WEIGHTS


def test_a_folder_is_one_commit_and_only_what_changed_is_sent(hub, api, push, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
    api.create_repo(REPO)
    for message, config in (("First", b"1"), ("Same", b"1"), ("Other", b"2")):
        (tmp_path / "config.json").write_bytes(config)
        api.upload_folder(repo_id=REPO, folder_path=tmp_path, commit_message=message)
    assert [commit.message for commit in hub.commits(REPO)] == ["initial commit", "First", "Other"]
    assert kept(hub) == {"config.json": b"2", "model.safetensors": WEIGHTS}
    push({"copy.safetensors": WEIGHTS})
    assert kept(hub)["copy.safetensors"] == WEIGHTS
    assert len(sent(hub, "^PUT /lfs/")) == 1


def test_files_are_deleted(hub, push):
    push({"a.json": b"1", "b.json": b"2", "folder/c.json": b"3", "folder/d.json": b"4"})
    push({"a.json": None, "folder/c.json": None, "b.json": b"5"})
    assert kept(hub) == {"b.json": b"5", "folder/d.json": b"4"}
    push({"folder/": None})
    assert kept(hub) == {"b.json": b"5"}
    with pytest.raises(EntryNotFoundError, match=r"doesn't exist: a\.json"):
        push({"b.json": b"6", "a.json": None})
    assert kept(hub) == {"b.json": b"5"}


def test_older_revisions_stay(hub, api, push):
    first = push({"config.json": b"1"})
    api.create_branch(REPO, branch="old/one")
    push({"config.json": b"2"})
    api.create_branch(REPO, branch="first", revision=first)
    last = push({"config.json": b"3"}, revision="first")
    for revision, content in {
        first: b"1",
        "old/one": b"1",
        "main": b"2",
        None: b"2",
        "first": b"3",
        last: b"3",
    }.items():
        assert Path(hf_hub_download(REPO, "config.json", revision=revision)).read_bytes() == content
        assert read(snapshot_download(REPO, revision=revision, allow_patterns="*.json")) == {"config.json": content}
        assert kept(hub, revision=revision or "main") == {"config.json": content}
    assert api.model_info(REPO, revision="first").sha == last
    assert [commit.files.get("config.json") for commit in hub.commits(REPO, revision="first")] == [None, b"1", b"3"]
    with pytest.raises(HfHubHTTPError, match="Reference already exists: first"):
        api.create_branch(REPO, branch="first")


def test_what_is_missing_is_missing(api, push):
    with pytest.raises(RepositoryNotFoundError, match="401 Client Error"):
        snapshot_download(REPO)
    with pytest.raises(RepositoryNotFoundError, match="404 Client Error"):
        api.list_repo_files(REPO)
    push(BOTH)
    assert repo_exists(REPO)
    assert not repo_exists(REPO, repo_type="dataset")
    assert not api.file_exists(REPO, "other.json")
    with pytest.raises(EntryNotFoundError, match=r"Entry Not Found for url: .*other\.json"):
        hf_hub_download(REPO, "other.json")
    with pytest.raises(EntryNotFoundError, match=r"config\.json does not exist on 'main'"):
        list(api.list_repo_tree(REPO, "config.json"))
    for call in (snapshot_download, api.model_info, api.list_repo_files):
        with pytest.raises(RevisionNotFoundError, match="Revision Not Found"):
            call(REPO, revision="other")
    with pytest.raises(RevisionNotFoundError, match="Revision Not Found"):
        push({"config.json": b"1"}, revision="other")


@pytest.mark.parametrize("repo_type", ["model", "dataset"])
def test_private_repositories_are_hidden(hub, api, push, repo_type):
    push(BOTH, repo_type, private=True)
    assert hub.repos[repo_type, REPO].private
    assert api.repo_info(REPO, repo_type=repo_type).private
    for token, error in (
        (False, "401 Client Error.*Repository Not Found"),
        ("hf_other", "404 Client Error.*Repository Not Found"),
        ("hf_wrong", "Invalid credentials in Authorization header"),
    ):
        with pytest.raises(HfHubHTTPError, match=f"(?s){error}"):
            snapshot_download(REPO, repo_type=repo_type, token=token)
        with pytest.raises(HfHubHTTPError, match=f"(?s){error}" if token != "hf_wrong" else "401 Unauthorized"):
            hf_hub_download(REPO, "config.json", repo_type=repo_type, token=token)
    folder = snapshot_download(REPO, repo_type=repo_type, token=hub.token, ignore_patterns=".gitattributes")
    assert read(folder) == BOTH
    assert hub.requests[-1].authorization == f"Bearer {hub.token}"


@pytest.mark.parametrize(
    ("token", "create", "write"),
    [
        (False, "Invalid credentials", "Repository Not Found"),
        ("hf_other", "rights to create a model under the namespace 'user'", "rights to write to this repository"),
        ("hf_wrong", "Invalid credentials", "Invalid credentials"),
    ],
)
def test_only_the_owner_writes(hub, push, token, create, write):
    push(BOTH)
    before = hub.commits(REPO)
    with pytest.raises(HfHubHTTPError, match=create):
        HfApi(token=token).create_repo("user/second")
    with pytest.raises(HfHubHTTPError, match=write):
        HfApi(token=token).upload_file(path_or_fileobj=b"1", path_in_repo="config.json", repo_id=REPO)
    assert hub.commits(REPO) == before
    assert list(hub.repos) == [("model", REPO)]


def test_a_repository_is_created_once(hub, api, push):
    push(BOTH)
    with pytest.raises(HfHubHTTPError, match="already created this repo"):
        api.create_repo(REPO)
    again, other = api.create_repo(REPO, exist_ok=True), api.create_repo(REPO, repo_type="dataset")
    assert [(url.repo_type, url.repo_id) for url in (again, other)] == [("model", REPO), ("dataset", REPO)]
    assert kept(hub) == BOTH
    assert kept(hub, repo_type="dataset") == {}


def test_the_user_of_a_token(hub):
    assert whoami(token=hub.token)["name"] == "user"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        whoami(token="hf_wrong")


@pytest.mark.parametrize(
    ("fail_on", "error"),
    [
        ("POST /api/models/user/model/preupload/", "Simulated failure"),
        (".git/info/lfs/objects/batch", "Simulated failure"),
        ("PUT /lfs/", r"Error while uploading 'model\.safetensors'"),
        ("/commit/main", "Simulated failure"),
    ],
)
@pytest.mark.parametrize("as_function", [False, True])
def test_a_failure_leaves_the_old_version(hub, push, fail_on, error, as_function):
    push(BOTH)
    before, new = hub.commits(REPO), {"config.json": b"1", "model.safetensors": WEIGHTS[1:]}
    hub.fail_on = (lambda request: fail_on in str(request)) if as_function else fail_on
    requests = len(sent(hub, fail_on))
    with pytest.raises((HfHubHTTPError, RuntimeError), match=error):
        push(new)
    assert len(sent(hub, fail_on)) > requests
    assert hub.commits(REPO) == before
    hub.fail_on = None
    push(new)
    assert kept(hub) == new


@pytest.mark.parametrize("drop_on", ["PUT /lfs/", "/commit/main"])
def test_a_dropped_connection_leaves_the_old_version(hub, push, drop_on):
    push(BOTH)
    before = hub.commits(REPO)
    hub.drop_on = drop_on
    with pytest.raises((RuntimeError, HTTPError), match=r"uploading|disconnected"):
        push({"model.safetensors": WEIGHTS[1:]})
    assert hub.commits(REPO) == before
    hub.drop_on = None
    push({"model.safetensors": WEIGHTS[1:]})
    assert kept(hub) == {**BOTH, "model.safetensors": WEIGHTS[1:]}


def test_one_request_in_the_middle_can_fail(hub, push):
    push({"config.json": b"1"})
    hub.fail_on = lambda request: len(sent(hub, "/commit/")) > 2
    push({"config.json": b"2"})
    with pytest.raises(HfHubHTTPError, match="Simulated failure"):
        push({"config.json": b"3"})
    assert kept(hub) == {"config.json": b"2"}


def test_a_commit_needs_the_parent_that_it_names(hub, push):
    first = push({"config.json": b"1"})
    second = push({"config.json": b"2"}, parent_commit=first)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        push({"config.json": b"3"}, parent_commit=first)
    assert [commit.oid for commit in hub.commits(REPO)][1:] == [first, second]


def test_a_commit_needs_the_lfs_content(hub, api, push):
    push(BOTH)
    operation = CommitOperationAdd("model.safetensors", WEIGHTS[1:])
    operation._upload_mode, operation._is_uploaded = "lfs", True  # what the client believes
    with pytest.raises(HfHubHTTPError, match=r"of model\.safetensors was not uploaded"):
        api.create_commit(REPO, [CommitOperationAdd("config.json", b"1"), operation], commit_message="Upload")
    assert kept(hub) == BOTH


def test_lfs_content_needs_its_own_hash(hub):
    answer = get_session().put(f"{hub.endpoint}/lfs/{64 * '0'}", content=WEIGHTS)
    assert (answer.status_code, answer.json()["error"]) == (400, f"The content's hash must be {64 * '0'}")


def test_a_card_without_metadata_warns(push):
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        push({"README.md": b"# A model\n"})


def test_a_range_of_a_file(hub, push):
    push(BOTH)
    with HfFileSystem().open(f"{REPO}/model.safetensors", block_size=64, cache_type="none") as file:
        file.seek(100)
        assert file.read(20) == WEIGHTS[100:120]
    assert hub.requests[-1].headers["Range"] == "bytes=100-119"
    url = hf_hub_url(REPO, "model.safetensors")
    rest = get_session().get(url, headers={"Range": f"bytes={len(WEIGHTS) - 3}-"})
    assert (rest.status_code, rest.content) == (206, WEIGHTS[-3:])
    assert rest.headers["Content-Range"] == f"bytes {len(WEIGHTS) - 3}-{len(WEIGHTS) - 1}/{len(WEIGHTS)}"


@pytest.mark.parametrize("private", [False, True])
def test_round_trip_of_a_data_set(hub, private):
    data = datasets.Dataset.from_dict({"reward": [0.0, 0.5, 1.0], "done": [0, 0, 1]})
    options = {"token": hub.token, "private": private}
    first = data.push_to_hub("user/data", commit_message="First", **options).oid
    data.select([2]).push_to_hub("user/data", commit_message="Second", **options)
    data.select([0]).push_to_hub("user/data", split="test", revision="other", **options)
    assert [commit.message for commit in hub.commits("user/data", "dataset")] == ["initial commit", "First", "Second"]
    if private:  # Asked first: what is in the cache needs no token.
        with pytest.raises(datasets.exceptions.DatasetNotFoundError, match="'user/data' doesn't exist on the Hub"):
            datasets.load_dataset("user/data")
    token = hub.token if private else None
    for split, revision, expected in (
        ("train", first, data[:]),
        ("train", None, data[2:]),
        ("test", "other", data[:1]),
    ):
        assert datasets.load_dataset("user/data", split=split, revision=revision, token=token)[:] == expected


@pytest.mark.parametrize(
    ("fail_on", "error"), [("/commit/", "Simulated failure"), ("PUT /lfs/", "Error while uploading")]
)
def test_a_failure_leaves_the_old_data_set(hub, fail_on, error):
    data = datasets.Dataset.from_dict({"reward": [0.0, 1.0]})
    data.push_to_hub("user/data", token=hub.token)
    hub.fail_on = fail_on
    with pytest.raises((HfHubHTTPError, RuntimeError), match=error):
        data.select([0]).push_to_hub("user/data", token=hub.token)
    hub.fail_on = None
    assert datasets.load_dataset("user/data", split="train")[:] == data[:]


@pytest.mark.parametrize("private", [False, True])
def test_transformers_loads_from_it(hub, private):
    LlamaConfig(hidden_size=12, num_attention_heads=2).push_to_hub(REPO, token=hub.token, private=private)
    if private:
        with pytest.raises(OSError, match="not a valid model identifier"):
            AutoConfig.from_pretrained(REPO)
    assert AutoConfig.from_pretrained(REPO, token=hub.token).hidden_size == 12


def test_nothing_of_the_user_is_used(monkeypatch, request):
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_user")
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    close_session()
    get_session()  # has the proxies
    users_home = constants.HF_HOME
    hub, push = request.getfixturevalue("hub"), request.getfixturevalue("push")
    push({"config.json": CONFIG})
    assert whoami(token=hub.token)["name"] == "user"

    home = constants.HF_HOME
    assert home != users_home
    assert datasets.config.HF_DATASETS_CACHE.is_relative_to(home)
    program = f"from huggingface_hub import hf_hub_download; print(hf_hub_download({REPO!r}, 'config.json'))"
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert child.stdout.startswith(home)
    assert hf_hub_download(REPO, "config.json") == child.stdout.strip()
    downloads = [request for request in hub.requests if "/resolve/" in request.path]
    assert downloads
    assert all(request.authorization is None for request in downloads)


def test_what_it_does_not_speak_is_an_error(api, push):
    push(BOTH)
    with pytest.raises(HfHubHTTPError, match="has no answer to GET /api/models/user/model/refs"):
        api.list_repo_refs(REPO)
    with pytest.raises(HfHubHTTPError, match="has no pull requests"):
        push({"config.json": b"1"}, create_pr=True)
