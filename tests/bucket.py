"""A bucket's server on loopback, `gs://runs/…`, as its own process; with faults, if asked for.

    python tests/bucket.py PORT [FAULTS]

FAULTS is the share of requests that are delayed, dropped before or after they are served, or
answered 429 or 503, each alike. Prints the environment that clients need, for a shell.
"""

import contextlib
import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

BUCKET = "runs"
ROOT = f"gs://{BUCKET}"


@contextlib.contextmanager
def started(faults=0.0):
    """Runs the server for the block; yields the environment that its clients need."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(Path(__file__)), str(port), str(faults)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert process.stdout.readline() == b"ready\n"
        yield environment(port)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@contextlib.contextmanager
def served(faults=0.0):
    """Runs a server, which this process and those that it starts ask in the block."""
    with started(faults) as variables, asked_at(variables):
        yield ROOT


@contextlib.contextmanager
def asked_at(variables):
    """Has this process and those that it starts ask the server with this environment."""
    import pytest
    from gcsfs import GCSFileSystem

    from morer1_jax import stores

    def forget():
        """Clients keep the server that they first asked."""
        GCSFileSystem.clear_instance_cache()
        stores._client.cache_clear()

    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        forget()
        yield
    forget()


def environment(port):
    """What clients need to take the server for the bucket's."""
    address = f"http://127.0.0.1:{port}"
    return {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
        # Else the client asks another server, which is not there, what kind of bucket it is.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }


def tell_generations():
    """Has objects come with their generation, as from the real server; tensorstore needs it."""
    from gcp_storage_emulator import server
    from gcp_storage_emulator.storage import Storage

    asked = threading.local()
    get_file_obj, close = Storage.get_file_obj, server.Response.close

    def remembered(self, *args):
        asked.found = get_file_obj(self, *args)
        return asked.found

    def with_generation(self):
        found, asked.found = getattr(asked, "found", None), None
        if found is not None and self._handler.command == "GET":
            self["x-goog-generation"] = found["generation"]
        close(self)

    Storage.get_file_obj, server.Response.close = remembered, with_generation


def remember_uploads():
    """Has a finished upload's object answered to a client that sends or asks again.

    It does so where the answer was lost; the package's server forgets the upload, and answers 404.
    """
    from gcp_storage_emulator import server
    from gcp_storage_emulator.handlers import objects
    from gcp_storage_emulator.storage import Storage

    finished, create_file, upload = {}, Storage.create_file, objects.upload_partial

    def created(self, bucket, name, content, found, upload_id=None):
        create_file(self, bucket, name, content, found, upload_id)
        if upload_id is not None:
            finished[upload_id] = dict(found)

    def uploaded(request, response, storage, **kwargs):
        found = finished.get(request.query["upload_id"][0])
        if found is None:
            upload(request, response, storage, **kwargs)
        else:
            _ = request.data  # Else the connection's next request would begin with it.
            response.json(found)

    Storage.create_file, objects.upload_partial = created, uploaded
    for _, handlers in server.HANDLERS:
        for method, handle in handlers.items():
            if handle is upload:
                handlers[method] = uploaded


def fail_sometimes(share, seed=0):
    """Delays, drops and refuses a share of the requests."""
    from gcp_storage_emulator import server

    draw, handle = random.Random(seed), server.Router.handle

    def handled(self, method):
        kind = draw.choice(("delay", "before", "after", "429", "503"))
        if draw.random() >= share:
            return handle(self, method)
        handler = self._request_handler
        if kind == "delay":
            time.sleep(draw.uniform(0.05, 0.4))
            return handle(self, method)
        if kind in ("429", "503"):
            length = int(handler.headers.get("content-length") or 0)
            handler.rfile.read(length)
            handler.send_error(int(kind))
            return None
        if kind == "after":
            real, handler.wfile = handler.wfile, _Nowhere()
            handle(self, method)
            handler.wfile = real
        handler.close_connection = True
        with contextlib.suppress(OSError):
            handler.connection.shutdown(socket.SHUT_RDWR)
        return None

    server.Router.handle = handled


class _Nowhere:
    """Takes an answer that is lost."""

    closed = False

    def write(self, data):
        return len(data)

    def flush(self):
        return None


def main():
    from gcp_storage_emulator import server

    tell_generations()
    remember_uploads()
    if len(sys.argv) > 2 and float(sys.argv[2]):
        fail_sometimes(float(sys.argv[2]))
    bucket = server.create_server("127.0.0.1", int(sys.argv[1]), True, default_bucket=BUCKET)
    bucket.start()
    print("ready", flush=True)
    for name, value in environment(sys.argv[1]).items():
        print(f"export {name}={value}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
