"""HTTP servers on 127.0.0.1 that go wrong on demand: dropped, stalled and lost answers, error statuses, cut bodies."""

import json
import re
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs


@dataclass
class Fault:
    """What goes wrong with requests of `method` whose path matches `path`: `times` of them, after the first `skip`.

    Kinds: `status` answers with `status` and `headers`; `drop` closes the connection without an answer; `stall` says
    nothing for `seconds`; `late` does what was asked only after `seconds`; `lost` does it and closes the connection;
    `truncate` sends half of the body; `html` answers 200 with a web page.
    """

    method: str
    path: str
    kind: str
    times: int = 1
    skip: int = 0
    status: int = 500
    headers: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 600.0


@dataclass(frozen=True)
class Seen:
    """A request that came in: `origin` is `hub` or `storage`."""

    origin: str
    method: str
    path: str
    authorized: bool
    size: int


class Refusal(Exception):
    """An answer other than 2xx: status, X-Error-Code, X-Error-Message."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}


class FaultyServer:
    """One server for each handler class, all on ports of their own. They share `faults` and what was `seen`."""

    def __init__(self, *handlers: "type[FaultyHandler]") -> None:
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self.lock = threading.RLock()
        self.over = threading.Event()
        self.stalled = threading.Event()
        self._servers = [self._serve(handler) for handler in handlers]
        self.addresses = [f"http://127.0.0.1:{server.server_port}" for server in self._servers]

    def _serve(self, handler: "type[FaultyHandler]") -> ThreadingHTTPServer:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type(handler.__name__, (handler,), {"hub": self}))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return server

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def count(self, method: str, path: str) -> int:
        """How many requests of this kind came in."""
        return sum(seen.method == method and re.search(path, seen.path) is not None for seen in self.seen)

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    if fault.skip:
                        fault.skip -= 1
                        return None
                    fault.times -= 1
                    return fault
        return None


class FaultyHandler(BaseHTTPRequestHandler):
    """Reads a request whole, lets a fault happen, and writes what `answer` returns: (status, headers, body)."""

    hub: Any
    origin: str
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def handle_one_request(self) -> None:
        with suppress(ConnectionError):  # a client that was killed
            super().handle_one_request()

    def do_GET(self) -> None:
        self.path, _, query = self.path.partition("?")
        self.query = parse_qs(query)
        fault = self.hub.fault_for(self.command, self.path)
        unread = fault is not None and fault.kind in ("stall", "drop")
        body = b"" if unread else self._read_body()
        self.hub.seen.append(Seen(self.origin, self.command, self.path, "Authorization" in self.headers, len(body)))
        if unread:
            if fault.kind == "stall":
                self.hub.stalled.set()
                self.hub.over.wait(fault.seconds)
            self.close_connection = True
            return
        if fault and fault.kind in ("status", "html"):
            status, kind = (fault.status, "text/plain") if fault.kind == "status" else (200, "text/html")
            self._write(status, {"Content-Type": kind, **fault.headers}, b"<html>It went wrong.</html>")
            return
        if fault and fault.kind == "late":
            self.hub.over.wait(fault.seconds)
        try:
            with self.hub.lock:
                status, headers, content = self.answer(body)
        except Refusal as refusal:
            status, headers, content = refusal.status, refusal.headers, json.dumps({"error": refusal.message}).encode()
        if fault and fault.kind == "lost":
            self.close_connection = True
            return
        self._write(status, headers, content, cut=fault is not None and fault.kind == "truncate")

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        raise NotImplementedError

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _write(self, status: int, headers: Mapping[str, str], content: bytes, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = self.close_connection or cut


def as_json(content: Any, status: int = 200, **headers: str) -> tuple[int, dict[str, str], bytes]:
    return status, {"Content-Type": "application/json", **headers}, json.dumps(content).encode()
