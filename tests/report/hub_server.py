"""A stand-in of the hub: the part of its HTTP API that a push uses, repositories in memory, failures on order.

Speaks both ways of storing large files, LFS and xet. Files of xet are kept as the blobs that arrive; that the content
of a commit has arrived is seen from the sha256 in their shards.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

STORAGE_KEY = "signature-of-the-storage"  # stands for what the real hub puts into the addresses of uploads
_READ_BYTES = 1 << 16


@dataclass
class Fault:
    """What goes wrong with the next `times` requests that fit."""

    method: str
    path: str  # pattern, searched in the path
    times: int = 1
    spare: int = 0  # fitting requests that go well before
    status: int = 0  # answered instead of the right answer; 0 = the connection breaks
    headers: dict[str, str] = field(default_factory=dict)
    after_bytes: int = 0  # of the body, that are read before the connection breaks
    after_answering: bool = False  # the request takes effect, its answer is lost
    silent: bool = False  # the connection stays open for a minute without an answer
    meanwhile: Callable[[], None] | None = None  # what somebody else does before the request is dealt with as usual
    body: str = "{}"


@dataclass
class Repository:
    """Files and commits of one model."""

    private: bool
    files: dict[str, str] = field(default_factory=dict)  # path: sha256 of large files, git's own id of others
    contents: dict[str, bytes] = field(default_factory=dict)  # of the small ones
    commits: list[str] = field(default_factory=lambda: ["0" * 40])
    messages: list[str] = field(default_factory=list)


@dataclass
class Received:
    """One request as it came in."""

    method: str
    path: str
    bytes_read: int
    token: str


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, words: str, **more: str):
        super().__init__(words)
        self.status = status
        self.body = {"error": words} | more


class Hub:
    """State of the stand-in, looked at and changed by tests."""

    def __init__(self, *, large_bytes: int = 1000) -> None:
        self.tokens: dict[str, str] = {}  # token: read or write
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # LFS: sha256: content
        self.xorbs: dict[str, int] = {}  # xet: hash: bytes
        self.shards: list[bytes] = []
        self.received: list[Received] = []
        self.faults: list[Fault] = []
        self.large_bytes = large_bytes
        self.ignored: tuple[str, ...] = ()  # paths that a .gitignore of the repository leaves out
        self.url = ""
        self.lock = threading.Lock()
        self.closing = threading.Event()

    def bytes_stored(self) -> int:
        """Bytes of large files that came in, also of those whose upload broke."""
        return sum(one.bytes_read for one in self.received if re.search("^/storage/|/xorbs/", one.path))

    def requests(self, method: str, path: str) -> list[Received]:
        """Requests whose path has a pattern in it."""
        return [one for one in self.received if one.method == method and re.search(path, one.path)]

    def take_fault(self, method: str, path: str) -> Fault | None:
        """The fault of a request, one time less from now on."""
        with self.lock:
            for fault in self.faults:
                if not fault.times or fault.method != method or not re.search(fault.path, path):
                    continue
                if not fault.spare:
                    fault.times -= 1
                    return fault
                fault.spare -= 1
        return None


@contextmanager
def running_hub(**options: Any) -> Iterator[Hub]:
    """A hub that answers on 127.0.0.1 until the block ends."""
    hub = Hub(**options)

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: what was asked is in Hub.received."""

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        path = urlsplit(self.path).path
        fault = self.state.take_fault(method, path)
        if fault and fault.meanwhile:
            fault.meanwhile()
            fault = None
        breaks = fault is not None and not fault.status and not fault.after_answering and not fault.silent
        body = self._read(fault.after_bytes if fault and breaks else None)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.state.received.append(Received(method, path, len(body), token))
        if fault and fault.silent:
            self.state.closing.wait(60)
        if breaks or (fault and fault.silent):
            self._break()
            return
        if fault and fault.status:
            self._send(fault.status, fault.body.encode(), fault.headers)
            return
        try:
            with self.state.lock:
                answer, headers = _answer_of(self.state, method, path, token, body)
        except Refused as refused:
            self._send(refused.status, json.dumps(refused.body).encode(), {})
            return
        if fault:
            self._break()
        else:
            self._send(200, json.dumps(answer).encode(), headers)

    def _read(self, at_most: int | None) -> bytes:
        """The body, or its first bytes."""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)[:at_most]
        length = int(self.headers.get("Content-Length", 0))
        return self.rfile.read(length if at_most is None else min(at_most, length))

    def _break(self) -> None:
        # With this option closing a connection resets it: the other side sees it break, not end.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


Answer = tuple[Any, dict[str, str]]


def _answer_of(hub: Hub, method: str, path: str, token: str, body: bytes) -> Answer:
    for wanted, pattern, answer in _ROUTES:
        found = re.fullmatch(pattern, path)
        if found and wanted == method:
            if not path.startswith(("/storage/", "/cas/")):
                _check_token(hub, token, writes=method == "POST" or "xet-write" in path)
            return answer(hub, body, **found.groupdict())
    raise Refused(404, f"the stand-in has no {method} {path}")


def _check_token(hub: Hub, token: str, *, writes: bool) -> None:
    if token not in hub.tokens:
        raise Refused(401, "Invalid username or password.")
    if writes and hub.tokens[token] != "write":
        raise Refused(403, f"Forbidden: the token {token} must have write permission.")


def _repository(hub: Hub, name: str) -> Repository:
    if name not in hub.repositories:
        raise Refused(404, "Repository not found")
    return hub.repositories[name]


def _create(hub: Hub, body: bytes) -> Answer:
    asked = json.loads(body)
    name = f"{asked['organization']}/{asked['name']}"
    if name in hub.repositories:
        raise Refused(409, "You already created this model repo", url=f"{hub.url}/{name}")
    hub.repositories[name] = Repository(private=asked.get("visibility") == "private", files={".gitattributes": "0"})
    return {"url": f"{hub.url}/{name}", "name": name}, {}


def _describe(hub: Hub, body: bytes, repo: str) -> Answer:
    repository = _repository(hub, repo)
    siblings = [{"rfilename": path} for path in repository.files]
    return {"id": repo, "sha": repository.commits[-1], "private": repository.private, "siblings": siblings}, {}


def _validate(hub: Hub, body: bytes) -> Answer:
    return {"errors": [], "warnings": []}, {}


def _preupload(hub: Hub, body: bytes, repo: str) -> Answer:
    repository = _repository(hub, repo)
    files = []
    for file in json.loads(body)["files"]:
        mode = "lfs" if file["size"] >= hub.large_bytes else "regular"
        known = {"oid": repository.files[file["path"]]} if file["path"] in repository.files else {}
        files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": file["path"] in hub.ignored} | known)
    return {"files": files}, {}


def _lfs_batch(hub: Hub, body: bytes, repo: str) -> Answer:
    _repository(hub, repo)
    objects = []
    for one in json.loads(body)["objects"]:
        entry = {"oid": one["oid"], "size": one["size"]}
        if one["oid"] not in hub.objects:
            upload = {"href": f"{hub.url}/storage/{one['oid']}?X-Amz-Signature={STORAGE_KEY}"}
            entry["actions"] = {"upload": upload, "verify": {"href": f"{hub.url}/{repo}.git/verify"}}
        objects.append(entry)
    return {"transfer": "basic", "objects": objects}, {}


def _store(hub: Hub, body: bytes, oid: str) -> Answer:
    if hashlib.sha256(body).hexdigest() != oid:
        raise Refused(400, "the content is not the one that was announced")
    hub.objects[oid] = body
    return {}, {}


def _verify(hub: Hub, body: bytes, repo: str) -> Answer:
    asked = json.loads(body)
    if len(hub.objects.get(asked["oid"], b"")) != asked["size"]:
        raise Refused(404, "nothing of that size was uploaded")
    return {}, {}


def _commit(hub: Hub, body: bytes, repo: str) -> Answer:
    repository = _repository(hub, repo)
    rows = [json.loads(line) for line in body.splitlines()]
    header = rows[0]["value"]
    if header.get("parentCommit", repository.commits[-1]) != repository.commits[-1]:
        raise Refused(412, "A commit has happened since. Please refresh and try again.")
    files, contents = dict(repository.files), dict(repository.contents)
    for row in rows[1:]:
        value = row["value"]
        if row["key"] == "file":
            content = base64.b64decode(value["content"])
            files[value["path"]] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            contents[value["path"]] = content
        elif row["key"] == "lfsFile":
            if value["oid"] not in hub.objects and not _in_a_shard(hub, value["oid"]):
                raise Refused(400, f"{value['path']} was never uploaded")
            files[value["path"]] = value["oid"]
        else:
            assert row["key"] == "deletedFile", row["key"]
            del files[value["path"]]
    repository.files, repository.contents = files, contents
    repository.messages.append(header["summary"])
    repository.commits.append(hashlib.sha1(body).hexdigest())
    oid = repository.commits[-1]
    return {"commitUrl": f"{hub.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True}, {}


def _xet_token(hub: Hub, body: bytes, repo: str) -> Answer:
    _repository(hub, repo)
    until = int(time.time()) + 3600
    url = f"{hub.url}/cas"
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": STORAGE_KEY, "X-Xet-Token-Expiration": str(until)}
    return {"casUrl": url, "accessToken": STORAGE_KEY, "exp": until}, headers


def _xorb(hub: Hub, body: bytes, name: str) -> Answer:
    is_new = name not in hub.xorbs
    hub.xorbs[name] = len(body)
    return {"was_inserted": is_new}, {}


def _shard(hub: Hub, body: bytes) -> Answer:
    hub.shards.append(body)
    return {"result": 1}, {}


def _in_a_shard(hub: Hub, sha256: str) -> bool:
    """Whether a shard tells of a file with this content. Shards hold hashes as four little-endian words of 64 bits."""
    digest = bytes.fromhex(sha256)
    words = b"".join(digest[at : at + 8][::-1] for at in range(0, 32, 8))
    return any(digest in shard or words in shard for shard in hub.shards)


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("POST", "/api/repos/create", _create),
    ("GET", f"/api/models/{_REPO}(/revision/main)?", _describe),
    ("POST", "/api/validate-yaml", _validate),
    ("POST", f"/api/models/{_REPO}/preupload/main", _preupload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _lfs_batch),
    ("POST", rf"/{_REPO}\.git/verify", _verify),
    ("PUT", "/storage/(?P<oid>[0-9a-f]{64})", _store),
    ("POST", f"/api/models/{_REPO}/commit/main", _commit),
    ("GET", f"/api/models/{_REPO}/xet-write-token/main", _xet_token),
    ("POST", "/cas/v1/xorbs/default/(?P<name>[0-9a-f]{64})", _xorb),
    ("POST", "/cas/v1/shards", _shard),
]
