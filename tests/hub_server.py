"""A hub on loopback: folders served in the hub's own protocol to the real ``huggingface_hub`` and ``datasets``.

    with serving() as hub:
        hub.add("models", "ORG/NAME", folder)                # the first commit of main
        hub.add("datasets", "ORG/DATA", folder)              # Parquet, JSONL or CSV files and a README.md with its YAML
        hub.add("models", "ORG/NAME", another)               # main moves on; returns the new commit
        run(["trace-ds", "fetch", CONFIG], env=hub.environment(home))             # home: the caches
    run(["trace-ds", "run", CONFIG], env=hub.environment(home, offline=True))     # and nothing is served any more

What the real hub does and the clients rely on: large files (``LARGE``) redirect to a "CDN" with their size and SHA-256
in X-Linked-*, small ones to a resolve-cache on the same host; ETag, X-Repo-Commit; listings in pages; 401
RepoNotFound for what is not there or not yours without a token, and 404 with one; 401 or 403 GatedRepo for files of
gated repositories, whose listings are public; RevisionNotFound, EntryNotFound. A process that imported
``huggingface_hub`` before has read its environment already: start clients as processes of their own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from command import environment

LARGE = (".safetensors", ".bin", ".pt", ".parquet", ".arrow", ".gz", ".zst")  # as in the hub's own .gitattributes
PAGE_ENTRIES = 5  # of a listing; the hub's 1,000 would never turn a page here
DATE = "2026-01-01T00:00:00.000Z"
API = re.compile(
    r"/api/(models|datasets)/([^/]+(?:/[^/]+)??)(?:/(revision|tree|paths-info|refs)(?:/([^/]+)(?:/(.*))?)?)?"
)
RESOLVE = re.compile(r"/(datasets/)?([^/]+(?:/[^/]+)?)/resolve/([^/]+)/(.+)")
CONTENT = re.compile(r"/(?:api/resolve-cache|cdn)/(models|datasets)/([^/]+(?:/[^/]+)?)/-/([0-9a-f]{40})/(.+)")


@dataclass(frozen=True)
class Blob:
    """A file of a commit; its bytes stay where the test put them."""

    path: Path
    size: int
    oid: str  # git's own name of the content
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Blob:
        content = path.read_bytes()
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return cls(path, len(content), git, hashlib.sha256(content).hexdigest())

    @property
    def is_large(self) -> bool:
        return self.path.name.endswith(LARGE)

    def entry(self, name: str) -> dict[str, Any]:
        lfs = {"oid": self.sha256, "size": self.size, "pointerSize": 130}
        result = {"type": "file", "oid": self.oid, "size": self.size, "path": name}
        return result | ({"lfs": lfs} if self.is_large else {})


@dataclass
class Repository:
    """``refs``: branch or tag → commit; ``readers``: tokens that may read the files (private or gated: no other)."""

    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    readers: tuple[str, ...] = ()

    def commit_of(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


class Hub(ThreadingHTTPServer):
    """See the module's docstring. ``requests`` holds every request so far, ``METHOD path``."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[str] = []
        self.answers: dict[str, bytes | None] = {}  # by repository: what is said of it instead; None: nothing, ever
        self.closing = threading.Event()

    def add(self, kind: str, name: str, folder: Path, *, ref: str = "main", **access: Any) -> str:
        """A commit of all files of ``folder`` (which must stay as it is), to which ``ref`` now points.

        Args:
            kind: ``models`` or ``datasets``.
            access: ``private``, ``gated``, ``readers`` of the repository.
        """
        repository = self.repositories.setdefault((kind, name), Repository())
        for key, value in access.items():
            setattr(repository, key, value)
        files = {str(path.relative_to(folder)): Blob.of(path) for path in sorted(folder.rglob("*")) if path.is_file()}
        content = json.dumps([kind, name, len(repository.commits), {key: blob.oid for key, blob in files.items()}])
        commit = hashlib.sha1(content.encode()).hexdigest()
        repository.commits[commit] = files
        repository.refs[ref] = commit
        return commit

    def environment(self, home: Path, *, offline: bool = False, token: str | None = None) -> dict[str, str]:
        """The variables of a client whose hub is this one and whose caches are in ``home``."""
        kept = {key: value for key, value in environment().items() if not key.startswith(("HF_", "HUGGING"))}
        kept |= {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
        kept |= {"HF_HUB_OFFLINE": "1"} if offline else {}
        return kept | ({"HF_TOKEN": token} if token else {})


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Refused(Exception):
    """(status, X-Error-Code, X-Error-Message, further headers)"""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path != "/api/agent-harnesses":  # the client asks this by itself, depending on who started it
            self.server.requests.append(f"{self.command} {self.path}")
        url = urlsplit(self.path)
        try:
            if match := CONTENT.fullmatch(url.path):
                self._content(*match.groups())
            elif match := API.fullmatch(url.path):
                self._api(*match.groups(), parse_qs(url.query), parse_qs(body.decode()))
            elif match := RESOLVE.fullmatch(url.path):
                self._resolve("datasets" if match[1] else "models", *match.groups()[1:])
            else:
                raise _Refused(404, "", "Sorry, we can't find the page you are looking for.")
        except _Refused as refused:
            status, code, message, *more = refused.args
            headers = {"X-Error-Code": code, "X-Error-Message": message} | (more[0] if more else {})
            self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in ({"Content-Type": "application/json"} | headers).items():
            if value:
                self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _repository(self, kind: str, name: str, *, files: bool = False) -> Repository:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        result = self.server.repositories.get((kind, name))
        if result is None or (result.private and token not in result.readers):
            missing = (404, "RepoNotFound", "Repository not found")
            raise _Refused(*(missing if token else (401, "RepoNotFound", "Invalid username or password.")))
        if files and result.gated and token not in result.readers:
            label = f"Access to {kind[:-1]} {name} is restricted and you are not in the authorized list."
            raise _Refused(403 if token else 401, "GatedRepo", label)
        return result

    def _commit(self, repository: Repository, revision: str) -> str:
        commit = repository.commit_of(unquote(revision))
        if commit is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {unquote(revision)}")
        return commit

    def _api(
        self, kind: str, name: str, verb: str | None, revision: str, path: str | None, query: Any, body: Any
    ) -> None:
        if name in self.server.answers:
            answer = self.server.answers[name]
            return self._send(200, answer, {}) if answer is not None else self.server.closing.wait() and None
        repository = self._repository(kind, name)
        commit = self._commit(repository, revision or "main")
        files = repository.commits[commit]
        if verb == "refs":
            refs = [
                {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": at} for ref, at in repository.refs.items()
            ]
            return self._send(200, json.dumps({"branches": refs, "tags": [], "converts": []}).encode(), {})
        if verb == "tree":
            return self._tree(files, unquote(path or ""), commit, query)
        if verb == "paths-info":
            entries = [entry for one in body.get("paths", []) for entry in _entries(files, one, commit)]
            return self._send(200, json.dumps(entries).encode(), {})
        summary = {"id": name, "sha": commit, "private": repository.private, "gated": repository.gated and "manual"}
        summary |= {"siblings": [{"rfilename": file} for file in files], "lastModified": DATE, "createdAt": DATE}
        summary |= {"disabled": False, "downloads": 0, "likes": 0, "tags": [], "author": name.partition("/")[0]}
        return self._send(200, json.dumps(summary).encode(), {})

    def _tree(self, files: dict[str, Blob], below: str, commit: str, query: Any) -> None:
        prefix = f"{below}/" if below else ""
        inside = [name for name in files if name.startswith(prefix)]
        if below and not inside:
            raise _Refused(404, "EntryNotFound", f"{below} does not exist on {commit}")
        parts = [name.removeprefix(prefix).split("/") for name in inside]
        names = {prefix + "/".join(one[:depth]) for one in parts for depth in range(1, len(one) + 1)}
        if query.get("recursive", ["false"])[0].lower() != "true":
            names = {name for name in names if "/" not in name.removeprefix(prefix)}
        entries = [entry for name in sorted(names) for entry in _entries(files, name, commit)]
        start = int(query.get("cursor", ["0"])[0])
        link, end = "", start + PAGE_ENTRIES
        if end < len(entries):
            kept = "&".join(f"{key}={quote(value[0])}" for key, value in query.items() if key != "cursor")
            link = f'<{self.server.endpoint}{urlsplit(self.path).path}?{kept}&cursor={end}>; rel="next"'
        self._send(200, json.dumps(entries[start:end]).encode(), {"Link": link})

    def _resolve(self, kind: str, name: str, revision: str, path: str) -> None:
        repository = self._repository(kind, name, files=True)
        commit = self._commit(repository, revision)
        blob = repository.commits[commit].get(unquote(path))
        headers = {"X-Repo-Commit": commit}
        if blob is None:
            raise _Refused(404, "EntryNotFound", "Entry not found", headers)
        place = f"{kind}/{name}/-/{commit}/{path}"
        if blob.is_large:
            headers |= {"X-Linked-Size": str(blob.size), "X-Linked-Etag": f'"{blob.sha256}"'}
            headers["Location"] = f"http://localhost:{self.server.server_port}/cdn/{place}"
            self._send(302, b"", headers)
        else:
            self._send(307, b"", headers | {"Location": f"/api/resolve-cache/{place}"})

    def _content(self, kind: str, name: str, commit: str, path: str) -> None:
        repository = self.server.repositories[kind, name]
        blob = repository.commits[commit][unquote(path)]
        content = blob.path.read_bytes()
        headers = {"ETag": f'"{blob.sha256 if blob.is_large else blob.oid}"'}
        headers |= {"Content-Type": "application/octet-stream"}
        headers |= {} if blob.is_large else {"X-Repo-Commit": commit}  # a CDN knows nothing of commits
        self._send(200, content, headers)


def _entries(files: dict[str, Blob], name: str, commit: str) -> list[dict[str, Any]]:
    """What a listing says of a file or folder, nothing where there is none."""
    commit_entry = {"lastCommit": {"id": commit, "title": "commit", "date": DATE}}
    if name in files:
        return [files[name].entry(name) | commit_entry]
    if any(file.startswith(f"{name}/") for file in files):
        oid = hashlib.sha1(name.encode()).hexdigest()
        return [{"type": "directory", "oid": oid, "size": 0, "path": name} | commit_entry]
    return []
