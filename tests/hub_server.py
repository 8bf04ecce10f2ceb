"""A server on this machine that speaks the Hub's API, for the Hub's own client.

Tests set HF_ENDPOINT to its address. It keeps repositories in memory, records the requests,
and can break a transfer, refuse access or hide a repository.
"""

import base64
import contextlib
import functools
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_KINDS = "models|datasets"
_ROUTES = {
    ("GET", rf"/api/(?P<kind>{_KINDS})/(?P<id>[^/]+/[^/]+)"): "info",
    ("GET", rf"/api/(?P<kind>{_KINDS})/(?P<id>[^/]+/[^/]+)/revision/(?P<rev>.+)"): "info",
    ("GET", rf"/api/(?P<kind>{_KINDS})/(?P<id>[^/]+/[^/]+)/tree/(?P<rev>[^/]+)"): "tree",
    ("POST", rf"/api/(?P<kind>{_KINDS})/(?P<id>[^/]+/[^/]+)/preupload/.+"): "preupload",
    ("POST", rf"/api/(?P<kind>{_KINDS})/(?P<id>[^/]+/[^/]+)/commit/.+"): "commit",
    ("POST", "/api/repos/create"): "create",
    ("POST", "/api/validate-yaml"): "validate",
    ("POST", r"/(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch"): "batch",
    ("PUT", r"/lfs/(?P<oid>\w+)"): "put",
    (
        "GET",
        "/(?P<prefix>datasets/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<file>.+)",
    ): "file",
}  # fmt: skip


@contextlib.contextmanager
def serving() -> Iterator["HubServer"]:
    """A server that ends with the block."""
    server = HubServer()
    try:
        yield server
    finally:
        server.release()
        server.close()


class Request(NamedTuple):
    """A request that the server has answered."""

    method: str
    path: str
    range: str


class HubServer:
    """Repositories by kind and name, each a list of commits.

    Attributes:
      requests: all requests, in order.
      gated: names of repositories that refuse access without a token.
      cut: name of a file -> bytes after which its next transfer breaks.
    """

    def __init__(self):
        self.requests: list[Request] = []
        self.gated: set[str] = set()
        self.cut: dict[str, int] = {}
        self.private: dict[str, bool] = {}
        self._held = ""
        self._reached, self._released = threading.Event(), threading.Event()
        self._commits: dict[tuple[str, str], list[tuple[str, dict[str, bytes]]]] = {}
        self._uploaded: dict[str, bytes] = {}
        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        serve = functools.partial(self._http.serve_forever, poll_interval=0.01)
        threading.Thread(target=serve, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def hold(self, name: str) -> threading.Event:
        """Lets transfers of a file wait for `release`; the event says that one waits."""
        self._held = name
        return self._reached

    def release(self) -> None:
        self._released.set()

    def commit(self, kind: str, name: str, files: Mapping[str, bytes]) -> str:
        """Adds a commit that has these files besides those before; returns its hash."""
        commits = self._commits.setdefault((kind, name), [])
        whole = (dict(commits[-1][1]) if commits else {}) | dict(files)
        whole.setdefault(".gitattributes", b"")
        digest = hashlib.sha1(repr((len(commits), sorted(whole.items()))).encode())
        commits.append((digest.hexdigest(), whole))
        return commits[-1][0]

    def files(self, kind: str, name: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a commit; raises KeyError."""
        commits = self._commits[kind, name]
        return dict(commits)[self._resolved(kind, name, revision)]

    def downloads(self) -> list[str]:
        """The names of the files that were transferred, in order."""
        found = (re.search("/resolve/[^/]+/(.+)", r.path) for r in self.requests)
        gets = (r.method == "GET" for r in self.requests)
        return [match[1] for match, is_get in zip(found, gets) if match and is_get]

    def _resolved(self, kind: str, name: str, revision: str) -> str:
        commits = self._commits[kind, name]
        revision = commits[-1][0] if revision == "main" else revision
        if revision not in dict(commits):
            raise LookupError(revision)
        return revision


def _handler(hub: HubServer) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def _answer(self):
            path = urllib.parse.unquote(self.path.partition("?")[0])
            is_head = self.command == "HEAD"
            method = "GET" if is_head else self.command
            given = self.headers.get("Range", "")
            hub.requests.append(Request(self.command, path, given))
            self.content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Transfer-Encoding") == "chunked":
                while size := int(self.rfile.readline(), 16):
                    self.content += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            for (wanted, pattern), name in _ROUTES.items():
                if wanted == method and (found := re.fullmatch(pattern, path)):
                    return getattr(self, f"_{name}")(**found.groupdict())
            return self._fail(404, "EntryNotFound")

        do_GET = do_HEAD = do_POST = do_PUT = _answer

        def _send(self, content, status=200, **headers):
            if not isinstance(content, bytes):
                content = json.dumps(content).encode()
            self.send_response(status)
            headers.setdefault("Content_Length", str(len(content)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def _fail(self, status, code):
            self._send({"error": code}, status, X_Error_Code=code)

        def _may_read(self, kind, name, rev):
            """Answers with an error, or returns the commit."""
            if (kind, name) not in hub._commits:
                return self._fail(401, "RepoNotFound")
            if name in hub.gated and not self.headers.get("Authorization"):
                return self._fail(401, "GatedRepo")
            try:
                return hub._resolved(kind, name, rev)
            except LookupError:
                return self._fail(404, "RevisionNotFound")

        def _info(self, kind, id, rev="main"):
            if commit := self._may_read(kind, id, rev):
                self._send({"id": id, "sha": commit, "private": False, "siblings": []})

        def _tree(self, kind, id, rev):
            if commit := self._may_read(kind, id, rev):
                files = hub.files(kind, id, commit)
                self._send(
                    [
                        {
                            "type": "file",
                            "path": name,
                            "size": len(content),
                            "oid": hashlib.sha1(content).hexdigest(),
                        }
                        for name, content in files.items()
                    ]
                )

        def _file(self, prefix, id, rev, file):
            kind = "datasets" if prefix else "models"
            if not (commit := self._may_read(kind, id, rev)):
                return
            content = hub.files(kind, id, commit).get(file)
            if content is None:
                return self._fail(404, "EntryNotFound")
            begin = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
            begin = int(begin[1]) if begin else 0
            headers = {
                "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
                "X_Repo_Commit": commit,
                "Accept_Ranges": "bytes",
            }
            if self.command == "GET" and file == hub._held:
                hub._reached.set()
                hub._released.wait()
            rest = content[begin:]
            if begin:
                size = len(content)
                headers["Content_Range"] = f"bytes {begin}-{size - 1}/{size}"
            if self.command == "GET" and file in hub.cut:
                headers["Content_Length"] = str(len(rest))
                rest = rest[: hub.cut.pop(file)]
                self.close_connection = True
            self._send(rest, 206 if begin else 200, **headers)

        def _create(self):
            given = json.loads(self.content)
            name = f"{given.get('organization') or 'me'}/{given['name']}"
            kind = given.get("type") or "model"
            if name in hub.gated:
                return self._fail(403, "")
            hub.private[name] = given.get("visibility", given.get("private"))
            hub._commits.setdefault((f"{kind}s", name), [])
            if not hub._commits[f"{kind}s", name]:
                hub.commit(f"{kind}s", name, {})
            self._send({"url": f"{hub.url}/{name}", "name": name, "id": name})

        def _validate(self):
            self._send({"errors": [], "warnings": []})

        def _preupload(self, kind, id):
            modes = [
                {
                    "path": file["path"],
                    "shouldIgnore": False,
                    "uploadMode": "lfs"
                    if file["path"].endswith(".safetensors")
                    else "regular",
                }
                for file in json.loads(self.content)["files"]
            ]
            self._send({"files": modes})

        def _batch(self, id):
            objects = [
                {
                    **entry,
                    "actions": {"upload": {"href": f"{hub.url}/lfs/{entry['oid']}"}},
                }
                for entry in json.loads(self.content)["objects"]
            ]
            self._send({"transfer": "basic", "objects": objects})

        def _put(self, oid):
            assert hashlib.sha256(self.content).hexdigest() == oid
            hub._uploaded[oid] = self.content
            self._send({})

        def _commit(self, kind, id):
            files = {}
            for line in map(json.loads, self.content.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub._uploaded[value["oid"]]
            commit = hub.commit(kind, id, files)
            url = f"{hub.url}/{id}/commit/{commit}"
            self._send({"success": True, "commitOid": commit, "commitUrl": url})

    return Handler
