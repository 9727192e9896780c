"""A bucket's server on loopback, `gs://runs/…`, as its own process; with faults, if asked for.

    python tests/bucket.py PORT [FAULTS]

FAULTS is the share of requests that are delayed, dropped before or after they are served, or
answered 429 or 503, each alike.
"""

import contextlib
import os
import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

BUCKET = "runs"


@contextlib.contextmanager
def served(faults=0.0):
    """Serves the bucket for the block, to this process and to those that it starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(Path(__file__)), str(port), str(faults)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    before = {name: os.environ.get(name) for name in environment(port)}
    try:
        assert process.stdout.readline() == b"ready\n"
        os.environ.update(environment(port))
        yield f"gs://{BUCKET}"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


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
    if len(sys.argv) > 2 and float(sys.argv[2]):
        fail_sometimes(float(sys.argv[2]))
    bucket = server.create_server("127.0.0.1", int(sys.argv[1]), True, default_bucket=BUCKET)
    bucket.start()
    print("ready", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
