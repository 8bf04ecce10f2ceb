"""A bucket on this machine, and what may go wrong on the way to one."""

import collections
import contextlib
import http
import http.client
import http.server
import random
import threading
import time
from collections.abc import Iterator

import gcsfs
import pytest
from etils import epath
from processes import free_port


@contextlib.contextmanager
def serve(knows_conditions: bool = True) -> Iterator[int]:
    """A server with an empty bucket called "bucket"; gives its port.

    Args:
      knows_conditions: whether it regards `ifGenerationMatch`, as Google Cloud does, and
        as this server by itself does not.
    """
    server_lib = pytest.importorskip("gcp_storage_emulator.server")
    port = free_port()
    server = server_lib.create_server(
        "localhost", port, in_memory=True, default_bucket="bucket"
    )
    with pytest.MonkeyPatch.context() as patch:
        if knows_conditions:
            for _, handlers in server_lib.HANDLERS:
                for method, name in (("POST", "insert"), ("DELETE", "delete")):
                    handler = handlers.get(method)
                    if getattr(handler, "__name__", "") == name:
                        patch.setitem(handlers, method, _with_conditions(handler))
        server.start()
        try:
            yield port
        finally:
            server.stop()


def _with_conditions(handler):
    """Of an operation on an object, which the server does one after the other."""
    from gcp_storage_emulator import exceptions

    def handle(request, response, storage, *args):
        (wanted,) = request.query.get("ifGenerationMatch", [None])
        if wanted is not None and request.path.endswith("/o") == (
            "name" in request.query
        ):
            name = request.params.get("object_id") or request.query["name"][0]
            try:
                found = storage.get_file_obj(request.params["bucket_name"], name)
                generation = found["generation"]
            except exceptions.NotFound:
                generation = "0"
            if generation != wanted:
                response.status = http.HTTPStatus.PRECONDITION_FAILED
                return
        handler(request, response, storage, *args)

    return handle


def environment(port: int) -> dict[str, str]:
    """By which gcsfs and TensorStore find it."""
    address = f"http://localhost:{port}"
    return {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address}


# An answer that says no; one that comes late; a connection cut in the middle of what is
# sent; one cut when the server has done what it was asked to and the answer is lost.
KINDS = ("refused", "slow", "cut", "unanswered")


@contextlib.contextmanager
def reached_by(port: int) -> Iterator[epath.Path]:
    """This process finds the bucket there."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(port).items():
            patch.setenv(name, value)
        # Else the place where an earlier test's was is remembered.
        gcsfs.GCSFileSystem.clear_instance_cache()
        epath.backend.fsspec_backend._get_filesystem.cache_clear()
        yield epath.Path("gs://bucket")


class Faults:
    """What happens to requests, drawn anew for each of them.

    Attributes:
      share: of the requests that something happens to.
      kinds: what may happen.
      counts: how often what has happened.
    """

    def __init__(self, share: float, seed: int = 0, kinds: tuple[str, ...] = KINDS):
        self.share, self.kinds = share, kinds
        self.counts = collections.Counter()
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def draw(self) -> str:
        with self._lock:
            kind = ""
            if self._random.random() < self.share:
                kind = self._random.choice(self.kinds)
            self.counts[kind] += 1
            return kind


@contextlib.contextmanager
def faulty(port: int, faults: Faults) -> Iterator[int]:
    """A way to the server on `port` with faults; gives its own port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_request(self):
            kind = faults.draw()
            size = int(self.headers.get("Content-Length") or 0)
            if kind == "cut":
                self.rfile.read(size // 2)
                self.close_connection = True
                return
            body = self.rfile.read(size)
            if kind == "refused":
                self.answer(503, {}, b"try again")
                return
            if kind == "slow":
                time.sleep(0.5)
            connection = http.client.HTTPConnection("localhost", port)
            connection.request(self.command, self.path, body, dict(self.headers))
            response = connection.getresponse()
            content = response.read()
            # A finished upload that is asked for again Google Cloud confirms; this server
            # knows nothing of it any more.
            if kind == "unanswered" and "/upload/" not in self.path:
                self.close_connection = True
                return
            self.answer(response.status, dict(response.getheaders()), content)

        do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = handle_request

        def answer(self, status, headers, content):
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "transfer-encoding"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_):
            """Clients that go away are what this is about."""

    server = Server(("localhost", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
