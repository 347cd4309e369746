"""A small Hub on 127.0.0.1 that speaks as much of the protocol as huggingface_hub uses to push and to download.

Repositories live in memory: commits are trees of {path: bytes}, safetensors go through the LFS batch API as on the Hub.
Every request is noted in `log`, so that a test can say what was not asked for.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS = (".safetensors", ".model")
WRITER, READER = "hf_" + "w" * 34, "hf_" + "r" * 34
"""Tokens of `me`, who may write under `me/`, and of somebody who may only read what is public."""


@dataclass
class Repo:
    """One repository: its commits, oldest first, and where branches and tags point."""

    kind: str
    private: bool
    trees: dict[str, dict[str, bytes]] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, changes: dict[str, bytes], title: str, ref: str = "main", parent: str | None = None) -> str:
        """A commit on top of `parent` (None: where `ref` points); returns its id."""
        before = self.trees.get(parent or self.refs.get(ref, ""), {})
        oid = hashlib.sha1(f"{title}{len(self.trees)}".encode()).hexdigest()
        self.trees[oid] = {**before, **changes}
        self.titles[oid] = title
        self.refs[ref] = oid
        return oid

    def find(self, revision: str) -> str | None:
        """The commit of a branch, a tag or a commit id."""
        return self.refs.get(revision, revision if revision in self.trees else None)

    @property
    def files(self) -> dict[str, bytes]:
        """What main holds."""
        return self.trees[self.refs["main"]]


@dataclass
class Hub:
    """The state of the server; a test may look at it and change it."""

    url: str = ""
    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    faults: dict[str, tuple[int, str]] = field(default_factory=dict)
    """{part of "METHOD /path": (status, message)}: answered instead."""
    before_commit: Any = None
    """Called with the repository right before a commit is looked at."""

    def make(
        self, name: str, files: dict[str, bytes] | None = None, *, kind: str = "model", private: bool = False
    ) -> Repo:
        """A repository that is there already."""
        repo = Repo(kind=kind, private=private)
        repo.commit(
            {".gitattributes": b"*.safetensors filter=lfs\n", **(files or {})}, f"initial commit of {kind} {name}"
        )
        self.repos[kind, name] = repo
        return repo

    def writes(self) -> list[str]:
        """The requests so far that change something or send content."""
        return [line for line in self.log if not line.startswith(("GET ", "HEAD ")) and "/paths-info/" not in line]


@contextmanager
def serve() -> Iterator[Hub]:
    """A running server; it ends with the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def blob_id(data: bytes) -> str:
    """What git calls a file of these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._route("GET")

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def _route(self, method: str) -> None:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            self.body = self._chunks()
        else:
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        path, self.query = parts.path, parse_qs(parts.query)
        line = f"{method} {unquote(path)}"
        self.hub.log.append(line)
        for mark, (status, message) in self.hub.faults.items():
            if mark in line:
                return self._send(status, {"error": message})
        for verb, pattern, name in _ROUTES:
            if verb == method and (match := re.fullmatch(pattern, path)):
                return getattr(self, name)(*(unquote(group) for group in match.groups()))
        self._send(404, {"error": "no such page"})

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    # who

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _repo(self, kinds: str, name: str, *, write: bool = False) -> Repo | None:
        """The repository if it is there and may be read (or written to); else an answer has been sent."""
        repo = self.hub.repos.get((kinds.removesuffix("s"), name))
        token = self._token()
        if token not in (None, WRITER, READER):
            self._send(401, {"error": "Invalid credentials in Authorization header"})
            return None
        mine = token == WRITER and name.startswith("me/")
        if repo is None or (repo.private and not mine):
            status = 401 if token is None else 404
            self._send(status, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        if write and not mine:
            self._send(403, {"error": "You don't have the required permissions"})
            return None
        return repo

    # repositories

    def whoami(self) -> None:
        self._send(200, {"name": "me", "type": "user"} if self._token() == WRITER else {"name": "you", "type": "user"})

    def create(self) -> None:
        asked = json.loads(self.body)
        name, kind = f"{asked.get('organization') or 'me'}/{asked['name']}", asked.get("type", "model")
        if self._token() not in (WRITER, READER):
            return self._send(401, {"error": "Invalid credentials in Authorization header"})
        if self._token() != WRITER or not name.startswith("me/"):
            return self._send(403, {"error": "You don't have the rights to create a model under this namespace"})
        if (kind, name) in self.hub.repos:
            return self._send(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        self.hub.make(name, kind=kind, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        self._send(200, {"url": f"{self.hub.url}/{name}", "name": name, "id": "0"})

    def info(self, kinds: str, name: str, revision: str = "main") -> None:
        if (repo := self._repo(kinds, name)) is None:
            return
        if (oid := repo.find(revision)) is None:
            return self._send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": path} for path in repo.trees[oid]]
        self._send(
            200, {"id": name, "modelId": name, "sha": oid, "private": repo.private, "siblings": siblings, "tags": []}
        )

    def tree(self, kinds: str, name: str, revision: str) -> None:
        if (repo := self._repo(kinds, name)) is not None:
            self._send(200, [_entry(path, data) for path, data in repo.trees[repo.find(revision) or ""].items()])

    def paths_info(self, kinds: str, name: str, revision: str) -> None:
        if (repo := self._repo(kinds, name)) is None:
            return
        if self.headers.get("Content-Type", "").startswith("application/json"):
            wanted = json.loads(self.body)["paths"]
        else:
            wanted = parse_qs(self.body.decode())["paths"]
        tree = repo.trees[repo.find(revision) or ""]
        self._send(200, [_entry(path, tree[path]) for path in wanted if path in tree])

    def resolve(self, name: str, revision: str, path: str) -> None:
        if (repo := self._repo("models", name)) is None:
            return
        oid = repo.find(revision)
        if oid is None:
            return self._send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        if path not in repo.trees[oid]:
            return self._send(
                404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid}
            )
        data = repo.trees[oid][path]
        about = {"X-Repo-Commit": oid}
        if not path.endswith(LFS):
            return self._send(200, data, {**about, "ETag": f'"{blob_id(data)}"'})
        digest = hashlib.sha256(data).hexdigest()
        linked = {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{digest}"'}
        self._send(
            302,
            b"",
            {
                **about,
                **linked,
                "Location": f"{self.hub.url.replace('127.0.0.1', 'localhost')}/cdn/{digest}",
                "ETag": f'"{blob_id(data)}"',
            },
        )

    def cdn(self, digest: str) -> None:
        stored = {
            hashlib.sha256(d).hexdigest(): d
            for r in self.hub.repos.values()
            for t in r.trees.values()
            for d in t.values()
        }
        self._send(200, stored[digest], {"ETag": f'"{digest}"'})

    # commits

    def validate_yaml(self) -> None:
        content = json.loads(self.body)["content"]
        bad = "license: not-a-licence\n" in content
        errors = [{"message": '"license" must be one of [apache-2.0, mit, other]'}] if bad else []
        self._send(400 if bad else 200, {"errors": errors, "warnings": []})

    def preupload(self, kinds: str, name: str, revision: str) -> None:
        if (repo := self._repo(kinds, name, write="create_pr" not in self.query)) is None:
            return
        tree = repo.files
        rows = [
            {
                "path": item["path"],
                "uploadMode": "lfs" if item["path"].endswith(LFS) else "regular",
                "shouldIgnore": False,
                "oid": _entry(item["path"], tree[item["path"]])["oid"] if item["path"] in tree else None,
            }
            for item in json.loads(self.body)["files"]
        ]
        self._send(200, {"files": rows})

    def lfs_batch(self, name: str) -> None:
        if self._repo("models", name) is None:
            return
        objects = []
        for item in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.hub.url}/lfs/{item['oid']}"}
            wanted = {} if item["oid"] in self.hub.lfs else {"actions": {"upload": upload}}
            objects.append({"oid": item["oid"], "size": item["size"], **wanted})
        self._send(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._send(400, {"error": "the content is not what was announced"})
        self.hub.lfs[oid] = self.body
        self._send(200, {})

    def commit(self, kinds: str, name: str, revision: str) -> None:
        pull = "create_pr" in self.query
        if (repo := self._repo(kinds, name, write=not pull)) is None:
            return
        if self.hub.before_commit is not None:
            self.hub.before_commit(repo)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        parent = header.get("parentCommit")
        if not pull and parent is not None and parent != repo.refs[revision]:
            return self._send(412, {"error": "A commit has happened since. Please refresh and try again."})
        changes: dict[str, bytes] = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changes[value["path"]] = self.hub.lfs[value["oid"]]
            else:
                return self._send(400, {"error": f"a push deletes nothing, and here is a {line['key']}"})
        ref = f"refs/pr/{1 + sum(r.startswith('refs/pr/') for r in repo.refs)}" if pull else revision
        oid = repo.commit(changes, header["summary"], ref, parent or repo.refs[revision])
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"}
        self._send(200, answer | ({"pullRequestUrl": f"{self.hub.url}/{name}/discussions/1"} if pull else {}))

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        found = {"Content-Type": "application/json"} if not isinstance(content, bytes) else {}
        if isinstance(content, dict) and "error" in content:
            found["X-Error-Message"] = content["error"]
        self.send_response(status)
        for key, value in {**found, **(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _entry(path: str, data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": blob_id(data)}
    if path.endswith(LFS):
        digest = hashlib.sha256(data).hexdigest()
        found |= {"oid": digest, "lfs": {"oid": digest, "size": len(data), "pointerSize": 134}}
    return found


_KINDS, _NAME, _REV = r"(models|datasets|spaces)", r"([^/]+/[^/]+)", r"([^/]+)"
_ROUTES = (
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("GET", rf"/api/{_KINDS}/{_NAME}", "info"),
    ("GET", rf"/api/{_KINDS}/{_NAME}/revision/{_REV}", "info"),
    ("GET", rf"/api/{_KINDS}/{_NAME}/tree/{_REV}", "tree"),
    ("POST", rf"/api/{_KINDS}/{_NAME}/paths-info/{_REV}", "paths_info"),
    ("POST", rf"/api/{_KINDS}/{_NAME}/preupload/{_REV}", "preupload"),
    ("POST", rf"/api/{_KINDS}/{_NAME}/commit/{_REV}", "commit"),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/([0-9a-f]{64})", "lfs_put"),
    ("GET", rf"/{_NAME}/resolve/{_REV}/(.+)", "resolve"),
    ("HEAD", rf"/{_NAME}/resolve/{_REV}/(.+)", "resolve"),
    ("GET", r"/cdn/([0-9a-f]{64})", "cdn"),
    ("HEAD", r"/cdn/([0-9a-f]{64})", "cdn"),
)
