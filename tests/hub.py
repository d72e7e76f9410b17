"""A stand-in for the Hugging Face Hub: a server on this machine that keeps its repositories in memory.

The real client libraries talk to it, so that tests see what they would leave on the Hub, and what they say when it
refuses. It speaks the part of the protocol that models and data sets need: repositories, branches, commits with regular
and LFS files, listings, downloads. What it does not speak, it answers with 501.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import os
import re
import secrets
import threading
import warnings
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, unquote

import datasets
import huggingface_hub
import pytest
from huggingface_hub import constants, hf_api
from transformers.utils import hub as transformers_hub

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from email.message import Message
    from pathlib import Path

LFS_SUFFIXES = (".arrow", ".bin", ".npz", ".parquet", ".pt", ".safetensors")
LFS_SIZE = 10 * 2**20
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


@dataclass(frozen=True)
class Commit:
    """All files of a version, by path."""

    message: str
    files: dict[str, bytes]
    oid: str = field(default_factory=lambda: secrets.token_hex(20))


@dataclass
class Repo:
    """The commits of each branch, oldest first."""

    private: bool
    branches: dict[str, list[Commit]]

    def history(self, revision: str) -> list[Commit]:
        """Returns the commits up to a branch's last one, or up to the one with a hash."""
        if revision in self.branches:
            return list(self.branches[revision])
        for commits in self.branches.values():
            for index, commit in enumerate(commits):
                if commit.oid == revision:
                    return commits[: index + 1]
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")


@dataclass(frozen=True)
class Request:
    """What a client sent; as a string, its method and path."""

    method: str
    path: str  # quoted, without the query
    query: dict[str, list[str]]
    headers: Message
    body: bytes

    @property
    def authorization(self) -> str | None:
        return self.headers["Authorization"]

    def json(self) -> Any:
        return json.loads(self.body)

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


def chosen(choice: str | Callable[[Request], bool] | None, request: Request) -> bool:
    return choice in str(request) if isinstance(choice, str) else choice is not None and choice(request)


class Answer(NamedTuple):
    """What the server sends back."""

    status: int
    headers: dict[str, str]
    body: bytes


def as_json(value: Any, status: int = 200, **headers: str) -> Answer:
    return Answer(status, {"Content-Type": "application/json", **headers}, json.dumps(value).encode())


class Refused(Exception):  # noqa: N818 (an answer, not an error of this program)
    """An error as the Hub sends it: the client picks its exception by the code, or else by the status."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        headers = {"X-Error-Message": message, "X-Error-Code": code, **headers}
        self.answer = as_json({"error": message}, status, **headers)


def is_lfs(path: str, size: int) -> bool:
    return size > LFS_SIZE or (size > 0 and path.endswith(LFS_SUFFIXES))


def oid(path: str, content: bytes) -> str:
    """The hash by which the Hub knows a file: of its content for LFS, else of git's blob."""
    if is_lfs(path, len(content)):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def listing(commit: Commit) -> dict[str, dict[str, Any]]:
    """Returns the entries of all files and folders, by path."""
    entries = {}
    for path, content in commit.files.items():
        digest, size = oid(path, content), len(content)
        lfs = {"oid": digest, "size": size, "pointerSize": 134} if is_lfs(path, size) else None
        entries[path] = {"type": "file", "path": path, "size": size, "oid": digest, "lfs": lfs}
        while path := path.rpartition("/")[0]:
            entries[path] = {"type": "directory", "path": path, "size": 0, "oid": 40 * "0"}
    return entries


ROUTES: list[tuple[re.Pattern[str], Callable[..., Answer]]] = []
API = r"/api/(?P<kind>models|datasets)/(?P<repo_id>[^/]+/[^/]+)"
SITE = r"/(?:(?P<kind>datasets)/)?(?P<repo_id>[^/]+/[^/]+?)"


def route(pattern: str) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """Has a method of `Hub` answer the requests that match; it gets the pattern's groups."""

    def register(method: Callable[..., Answer]) -> Callable[..., Answer]:
        ROUTES.append((re.compile(pattern), method))
        return method

    return register


class Hub:
    """The server; it runs until `close`.

    Attributes:
        endpoint: the address, in place of ``https://huggingface.co``.
        users: name by token. Who reads needs a token for private repositories only; who writes must be the owner.
        token: of the user ``"user"``, who owns ``"user/..."``.
        repos: by ``("model" or "dataset", "owner/name")``.
        requests: all, in order.
        fail_on: requests that are answered with error 500: those whose method and path contain this string (for
            example ``"PUT /lfs"``), or for which this function is true.
        drop_on: requests, chosen likewise, whose connection is closed without an answer.
    """

    def __init__(self) -> None:
        self.token = "hf_user"
        self.users = {self.token: "user", "hf_other": "other"}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[Request] = []
        self.fail_on: str | Callable[[Request], bool] | None = None
        self.drop_on: str | Callable[[Request], bool] | None = None
        self._uploads: dict[str, bytes] = {}  # LFS contents by hash, with or without a commit that has them
        self._lock = threading.Lock()  # the client uploads and downloads in several threads
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def commits(self, repo_id: str, repo_type: str = "model", revision: str = "main") -> list[Commit]:
        """Returns the commits up to a revision, oldest first; like on the Hub, the first one is no user's."""
        return self.repos[repo_type, repo_id].history(revision)

    def files(self, repo_id: str, repo_type: str = "model", revision: str = "main") -> dict[str, bytes]:
        """Returns the content of each file at a revision, by path."""
        return self.commits(repo_id, repo_type, revision)[-1].files

    def answer(self, request: Request) -> Answer | None:
        with self._lock:
            self.requests.append(request)
            if chosen(self.drop_on, request):
                return None
            try:
                return self._answer(request)
            except Refused as refused:
                return refused.answer

    def _answer(self, request: Request) -> Answer:
        if chosen(self.fail_on, request):
            raise Refused(500, "Simulated failure")
        for pattern, method in ROUTES:
            if match := pattern.fullmatch(str(request)):
                groups = {name: unquote(value or "") for name, value in match.groupdict().items()}
                if "kind" in groups:
                    groups["kind"] = groups["kind"].removesuffix("s") or "model"
                return method(self, request, **groups)
        raise Refused(501, f"The stand-in has no answer to {request}")

    def _user(self, request: Request) -> str:
        user = self.users.get((request.authorization or "").removeprefix("Bearer "))
        if user is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return user

    def _repo(self, request: Request, kind: str, repo_id: str, write: bool = False) -> Repo:
        user = self._user(request) if request.authorization else None
        repo = self.repos.get((kind, repo_id))
        is_owner = user == repo_id.split("/")[0]
        if repo is None or (repo.private and not is_owner) or (write and user is None):
            # The Hub tells strangers no more. The client knows a 401 without this code only with https.
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and not is_owner:
            raise Refused(403, "You don't have the rights to write to this repository")
        return repo

    def _url(self, kind: str, repo_id: str) -> str:
        return f"{self.endpoint}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"

    @route("GET /api/whoami-v2")
    def _whoami(self, request: Request) -> Answer:
        user = self._user(request)
        return as_json({"type": "user", "name": user, "fullname": user, "orgs": [], "auth": {"type": "access_token"}})

    @route("POST /api/validate-yaml")
    def _validate_yaml(self, request: Request) -> Answer:
        has_metadata = request.json()["content"].startswith("---")
        missing = [] if has_metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        return as_json({"errors": [], "warnings": missing})

    @route("POST /api/repos/create")
    def _create_repo(self, request: Request) -> Answer:
        user = self._user(request)
        wanted = request.json()
        kind, owner = wanted.get("type") or "model", wanted.get("organization") or user
        if owner != user:
            raise Refused(403, f"You don't have the rights to create a {kind} under the namespace {owner!r}")
        key = kind, f"{owner}/{wanted['name']}"
        if key in self.repos:
            return as_json({"url": self._url(*key), "error": "You already created this repo"}, 409)
        private = wanted.get("visibility") == "private"
        self.repos[key] = Repo(private, {"main": [Commit("initial commit", {".gitattributes": GITATTRIBUTES})]})
        return as_json({"url": self._url(*key)})

    @route(rf"GET {API}(?:/revision/(?P<revision>[^/]+))?")
    def _repo_info(self, request: Request, kind: str, repo_id: str, revision: str) -> Answer:
        repo = self._repo(request, kind, repo_id)
        commit = repo.history(revision or "main")[-1]
        info = {"id": repo_id, "author": repo_id.split("/")[0], "sha": commit.oid, "private": repo.private}
        return as_json({**info, "tags": [], "siblings": [{"rfilename": path} for path in commit.files]})

    @route(rf"GET {API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?")
    def _tree(self, request: Request, kind: str, repo_id: str, revision: str, path: str) -> Answer:
        entries = listing(self._repo(request, kind, repo_id).history(revision)[-1])
        if path and entries.get(path, {}).get("type") != "directory":
            raise Refused(404, f"{path} does not exist on {revision!r}", "EntryNotFound")
        recursive = request.query.get("recursive", ["false"])[0].lower() == "true"
        folder = f"{path}/" if path else ""
        inside = [entry for name, entry in entries.items() if name.startswith(folder)]
        return as_json([entry for entry in inside if recursive or "/" not in entry["path"].removeprefix(folder)])

    @route(rf"POST {API}/branch/(?P<branch>[^/]+)")
    def _create_branch(self, request: Request, kind: str, repo_id: str, branch: str) -> Answer:
        repo = self._repo(request, kind, repo_id, write=True)
        if branch in repo.branches:
            raise Refused(409, f"Reference already exists: {branch}")
        repo.branches[branch] = repo.history(request.json().get("startingPoint", "main"))
        return as_json({})

    @route(rf"POST {API}/preupload/(?P<revision>[^/]+)")
    def _preupload(self, request: Request, kind: str, repo_id: str, revision: str) -> Answer:
        """Tells the client how to upload each file, and what the repository has in its place."""
        old = self._repo(request, kind, repo_id, write=True).history(revision)[-1].files
        files = []
        for file in request.json()["files"]:
            path, mode = file["path"], "lfs" if is_lfs(file["path"], file["size"]) else "regular"
            remote = oid(path, old[path]) if path in old else None
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": remote})
        return as_json({"files": files})

    @route(rf"POST {SITE}\.git/info/lfs/objects/batch")
    def _lfs_batch(self, request: Request, kind: str, repo_id: str) -> Answer:
        """Tells the client where to upload each content; one that is there already needs no upload."""
        self._repo(request, kind, repo_id, write=True)
        objects = request.json()["objects"]
        for content in objects:
            if content["oid"] not in self._uploads:
                content["actions"] = {"upload": {"href": f"{self.endpoint}/lfs/{content['oid']}"}}
        return as_json({"transfer": "basic", "objects": objects})

    @route("PUT /lfs/(?P<digest>[0-9a-f]{64})")
    def _lfs_upload(self, request: Request, digest: str) -> Answer:
        if hashlib.sha256(request.body).hexdigest() != digest:
            raise Refused(400, f"The content's hash must be {digest}")
        self._uploads[digest] = request.body
        return Answer(200, {}, b"")

    @route(rf"POST {API}/commit/(?P<revision>[^/]+)")
    def _commit(self, request: Request, kind: str, repo_id: str, revision: str) -> Answer:
        """Adds a commit to a branch; the old version stays until the last operation has succeeded."""
        repo = self._repo(request, kind, repo_id, write=True)
        if "create_pr" in request.query:
            raise Refused(501, "The stand-in has no pull requests")
        if revision not in repo.branches:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        last = repo.branches[revision][-1]
        header, *operations = (json.loads(line) for line in request.body.splitlines())
        if not last.oid.startswith(header["value"].get("parentCommit", "")):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(last.files)
        for operation in operations:
            self._apply(operation["key"], operation["value"], files)
        commit = Commit(header["value"]["summary"], files)
        repo.branches[revision].append(commit)
        return as_json({"commitOid": commit.oid, "commitUrl": f"{self._url(kind, repo_id)}/commit/{commit.oid}"})

    def _apply(self, key: str, value: dict[str, Any], files: dict[str, bytes]) -> None:
        path = value["path"]
        if key == "file":
            files[path] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            if value["oid"] not in self._uploads:
                raise Refused(400, f"LFS content {value['oid']} of {path} was not uploaded")
            files[path] = self._uploads[value["oid"]]
        elif key in ("deletedFile", "deletedFolder"):
            folder = path.rstrip("/") + "/"
            gone = [name for name in files if (name == path if key == "deletedFile" else name.startswith(folder))]
            if not gone:
                raise Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise Refused(501, f"The stand-in has no operation {key}")

    @route(rf"(?:GET|HEAD) {SITE}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def _resolve(self, request: Request, kind: str, repo_id: str, revision: str, path: str) -> Answer:
        """Sends a file, or a range of its bytes."""
        commit = self._repo(request, kind, repo_id).history(revision)[-1]
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            raise Refused(404, f"Entry not found: {path}", "EntryNotFound", **headers)
        content = commit.files[path]
        headers |= {"ETag": f'"{oid(path, content)}"', "Accept-Ranges": "bytes"}
        if (span := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers["Range"] or "")) is None:
            return Answer(200, headers, content)
        start, stop = int(span[1]), min(int(span[2] or len(content)) + 1, len(content))
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return Answer(206, headers, content[start:stop])


class _Handler(BaseHTTPRequestHandler):
    """Speaks HTTP/1.0, one request per connection: no thread or socket outlives its request."""

    def __init__(self, hub: Hub, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def _handle(self) -> None:
        path, _, query = self.path.partition("?")
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        answer = self.hub.answer(Request(self.command, path, parse_qs(query), self.headers, body))
        if answer is not None:
            self.send_response(answer.status)
            for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle  # noqa: N815 (the base class looks for these names)

    def log_message(self, *args: Any) -> None:
        """Prints nothing: the tests have `Hub.requests`."""


def redirect_libraries(endpoint: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the Hub's client libraries, here and in child processes, use this endpoint, empty caches and no token."""
    for name in list(os.environ):
        if re.match(r"(HF|HUGGING_?FACE|TRANSFORMERS)_|\w+_PROXY$", name, re.IGNORECASE):
            monkeypatch.delenv(name)
    # Xet is a protocol of its own, in compiled code; without it the client uploads by plain LFS.
    switches = [f"HF_HUB_DISABLE_{what}" for what in ("XET", "TELEMETRY", "PROGRESS_BARS", "IMPLICIT_TOKEN")]
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
    for name, value in {**environment, **dict.fromkeys(switches, "1")}.items():
        monkeypatch.setenv(name, value)

    # The libraries read the environment when they are imported, which is over.
    settings: dict[Any, dict[str, Any]] = {
        constants: {
            "ENDPOINT": endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
            "HF_HUB_OFFLINE": False,
            **dict.fromkeys(switches, True),
        },
        hf_api.api: {"endpoint": endpoint},
        importlib.import_module("huggingface_hub.utils.tqdm"): {"HF_HUB_DISABLE_PROGRESS_BARS": True},
        # A client that is answered 500 asks again five times, and waits for seconds in between.
        importlib.import_module("huggingface_hub.utils._http"): {"time": SimpleNamespace(sleep=lambda seconds: None)},
        datasets.config: {
            "HF_ENDPOINT": endpoint,
            "HUB_DATASETS_URL": endpoint + "/datasets/{repo_id}/resolve/{revision}/{path}",
            "HF_DATASETS_CACHE": home / "datasets",
            "HF_MODULES_CACHE": home / "modules",
            "DOWNLOADED_DATASETS_PATH": home / "datasets" / "downloads",
            "EXTRACTED_DATASETS_PATH": home / "datasets" / "downloads" / "extracted",
            "HF_HUB_OFFLINE": False,
            # These two would call other servers of Hugging Face.
            "HF_UPDATE_DOWNLOAD_COUNTS": False,
            "USE_PARQUET_EXPORT": False,
        },
        importlib.import_module("datasets.utils.tqdm"): {"_hf_datasets_progress_bars_disabled": True},
        transformers_hub: {"_hf_api": None},  # made anew, with the endpoint of then
    }
    for owner, values in settings.items():
        for name, value in values.items():
            monkeypatch.setattr(owner, name, value)


@pytest.fixture(name="hub")
def hub_fixture(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Runs a Hub without repositories, which all of the client libraries use until the test ends."""
    with closing(Hub()) as hub, warnings.catch_warnings():
        # The client's own upload of LFS files.
        warnings.filterwarnings("ignore", "Use 'content=<...>' to upload raw bytes", DeprecationWarning)
        redirect_libraries(hub.endpoint, tmp_path_factory.mktemp("hugging_face"), monkeypatch)
        huggingface_hub.close_session()  # An older one may use a proxy.
        huggingface_hub.HfFileSystem.clear_instance_cache()  # An older server may have had the same port.
        yield hub
        huggingface_hub.close_session()
