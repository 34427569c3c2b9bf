"""Downloads from a server on this machine: each failure has its own message, the cache holds whole files only."""

import contextlib
import gzip
import hashlib
import http.server
import json
import socket
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from partialtune.errors import TextError
from partialtune.net.download import Limits, cache_folder, fetch
from partialtune.text.reading import read_texts

TEXT = ("Call me Ishmael. Some years ago, never mind how long precisely.\n" * 400).encode()
QUICK = Limits(connect_seconds=2, read_seconds=0.3, tries=2, first_wait_seconds=0.01, longest_wait_seconds=1)


class Server:
    """Answers each path with a function `answer(handler)`; counts the requests."""

    def __init__(self):
        self.answers = {}
        self.requests = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.requests.append(self.path)
                server.answers[self.path](self)

            def log_message(self, *arguments):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def serve(self, path, body=b"", status=200, **headers):
        """Answer a path with a body; headers are given with underscores."""
        self.answers[path] = lambda handler: send(handler, body, status, **headers)
        return self.url + path


def send(handler, body, status=200, announced=None, **headers):
    """Send a response; `announced` is a Content-Length other than the true one."""
    handler.send_response(status)
    for name, value in {"Content_Type": "text/plain", **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(body) if announced is None else announced))
    handler.end_headers()
    handler.wfile.write(body)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()


def cached_files(folder):
    """What lies in the cache, without the locks."""
    return sorted(path.suffix for path in folder.iterdir() if path.suffix != ".lock") if folder.exists() else []


def refuse(url, folder, limits=QUICK):
    """The message of a fetch that fails, after which nothing may lie in the cache."""
    with pytest.raises(TextError) as error:
        fetch(url, folder, limits)
    assert cached_files(folder) == []
    return str(error.value)


def test_a_text_arrives_whole_and_its_record_says_where_it_came_from(server, tmp_path):
    url = server.serve("/book.txt", TEXT, Content_Type="text/plain; charset=ISO-8859-1")
    download = fetch(url, tmp_path, QUICK)
    assert download.path.read_bytes() == TEXT
    assert (download.size, download.charset) == (len(TEXT), "ISO-8859-1")
    record = json.loads(download.path.with_suffix(".json").read_text())
    assert record["url"] == url
    assert record["sha256"] == download.sha256 == hashlib.sha256(TEXT).hexdigest()
    assert record["bytes"] == len(TEXT)
    assert record["content_type"] == "text/plain; charset=ISO-8859-1"
    assert datetime.fromisoformat(record["fetched"]).tzinfo is not None
    assert cached_files(tmp_path) == [".json", ".txt"]


def test_no_charset_is_made_up_where_the_server_names_none(server, tmp_path):
    assert fetch(server.serve("/book.txt", TEXT), tmp_path, QUICK).charset is None


def test_a_second_fetch_needs_no_network(server, tmp_path):
    url = server.serve("/book.txt", TEXT)
    first = fetch(url, tmp_path, QUICK)
    server.http.shutdown()
    server.http.server_close()
    assert fetch(url + "#chapter-1", tmp_path, QUICK) == first
    assert server.requests == ["/book.txt"]


def test_a_cache_that_cannot_be_written_still_gives_what_it_holds(server, tmp_path, monkeypatch):
    url = server.serve("/book.txt", TEXT)
    first = fetch(url, tmp_path, QUICK)
    monkeypatch.setattr("partialtune.cache.lock", lambda *_: pytest.fail("a lock file was written"))
    assert fetch(url, tmp_path, QUICK) == first


@pytest.mark.parametrize("damage", ["changed text", "no text", "broken record"])
def test_a_damaged_cache_entry_is_fetched_again_with_a_warning(server, tmp_path, caplog, damage):
    url = server.serve("/book.txt", TEXT)
    path = fetch(url, tmp_path, QUICK).path
    if damage == "changed text":
        path.write_bytes(TEXT[:-1])
    elif damage == "no text":
        path.unlink()
    else:
        path.with_suffix(".json").write_text('{"sha')
    assert fetch(url, tmp_path, QUICK).path.read_bytes() == TEXT
    assert server.requests == ["/book.txt", "/book.txt"]
    assert "fetching it again" in caplog.text


@pytest.mark.parametrize("planted", ["lock", "part", "json.part", "txt", "json"])
def test_links_in_the_cache_are_not_followed(server, tmp_path, planted):
    """Who else may write there could have our writing go to a file of ours, or our reading to another text."""
    cache, mine = tmp_path / "cache", tmp_path / "mine"
    cache.mkdir()
    mine.write_bytes(b"mine")
    url = server.serve("/book.txt", TEXT)
    name = hashlib.sha256(url.encode()).hexdigest()
    if planted in ("txt", "json"):
        fetch(url, cache, QUICK)
        mine.write_bytes((cache / f"{name}.{planted}").read_bytes())
        (cache / f"{name}.{planted}").unlink()
    (cache / f"{name}.{planted}").symlink_to(mine)
    before = mine.read_bytes()
    if planted == "lock":
        with pytest.raises(TextError, match="cannot be used"):
            fetch(url, cache, QUICK)
    else:
        assert fetch(url, cache, QUICK).path.read_bytes() == TEXT
        assert not [path for path in cache.iterdir() if path.is_symlink()]
        assert len(server.requests) == (2 if planted in ("txt", "json") else 1)
    assert mine.read_bytes() == before


def test_the_cache_folder_follows_its_variable(server, tmp_path, monkeypatch):
    monkeypatch.setenv("PARTIALTUNE_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine" / "texts"
    assert fetch(server.serve("/book.txt", TEXT), limits=QUICK).path.parent == cache_folder()


def test_a_redirect_is_followed(server, tmp_path):
    server.serve("/new.txt", TEXT)
    url = server.serve("/old.txt", status=302, Location="/new.txt")
    assert fetch(url, tmp_path, QUICK).path.read_bytes() == TEXT
    assert server.requests == ["/old.txt", "/new.txt"]


def test_redirects_in_a_circle_are_an_error(server, tmp_path):
    assert "redirects in a circle" in refuse(server.serve("/a", status=302, Location="/a"), tmp_path)


def test_a_redirect_away_from_http_is_an_error(server, tmp_path):
    message = refuse(server.serve("/a", status=302, Location="file:///etc/passwd"), tmp_path)
    assert "cannot be fetched" in message


def test_gzip_in_transfer_is_unpacked(server, tmp_path):
    url = server.serve("/book.txt", gzip.compress(TEXT), Content_Encoding="gzip")
    download = fetch(url, tmp_path, QUICK)
    assert download.path.read_bytes() == TEXT
    assert download.sha256 == hashlib.sha256(TEXT).hexdigest()


def test_a_gzip_without_its_end_is_an_error(server, tmp_path):
    url = server.serve("/book.txt", gzip.compress(TEXT)[:-20], Content_Encoding="gzip")
    assert "gzip data has no end" in refuse(url, tmp_path)


@pytest.mark.parametrize("between", [b"", b"\0" * 700])
def test_all_members_of_a_gzip_are_read(server, tmp_path, between):
    """gzip files may be joined, and padded with zeros; zlib stops at the end of the first one."""
    parts = [TEXT[:5000], b"", TEXT[5000:5001], TEXT[5001:]]
    body = between.join(gzip.compress(part) for part in parts) + between
    url = server.serve("/book.txt", body, Content_Encoding="gzip")
    assert fetch(url, tmp_path, QUICK).path.read_bytes() == TEXT


def test_what_is_no_gzip_behind_the_end_of_one_is_an_error(server, tmp_path):
    url = server.serve("/book.txt", gzip.compress(TEXT) + b"and more", Content_Encoding="gzip")
    assert "damaged behind the end of its part 1" in refuse(url, tmp_path)
    url = server.serve("/cut.txt", gzip.compress(TEXT) + gzip.compress(TEXT)[:-20], Content_Encoding="gzip")
    assert "gzip data has no end" in refuse(url, tmp_path)


@pytest.mark.parametrize("endless", ["empty blocks", "zeros behind the end", "empty members"])
def test_packed_data_that_goes_on_for_ever_and_unpacks_to_nothing_meets_the_size_limit(server, tmp_path, endless):
    start, more = {
        "empty blocks": (gzip.compress(TEXT)[:10], b"\0\0\0\xff\xff"),  # the header, then stored blocks of 0 bytes
        "zeros behind the end": (gzip.compress(TEXT), b"\0" * 1000),
        "empty members": (gzip.compress(TEXT), gzip.compress(b"")),
    }[endless]

    def answer(handler):
        handler.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\nContent-Encoding: gzip\r\n\r\n" + start)
        with contextlib.suppress(ConnectionError):
            for _ in range(20_000):
                handler.wfile.write(more * 10)

    server.answers["/book.txt"] = answer
    message = refuse(server.url + "/book.txt", tmp_path, Limits(read_seconds=1, tries=1, max_bytes=100_000))
    assert "too large" in message


HOSTILE = [
    {"Content-Length": "\u00b2"},
    {"Content-Length": "9" * 5000},
    {"Content-Length": "-1"},
    {"Content-Length": "12, 13"},
    {"Content-Encoding": "gzip, gzip"},
    {"Content-Encoding": "\u00b2"},
    {"Content-Type": "text/plain; charset=" + "x" * 5000},
    {"Transfer-Encoding": "chunked"},
    {"Transfer-Encoding": "\u00b2"},
    *({"Content-Type": f"text/plain; charset={name}"} for name in ("idna", "punycode", "undefined", "utf-16", ".")),
    *(
        {"status": 503, "Retry-After": value}
        for value in ("\u00b2", "9" * 5000, "-1", "Mon, 99 Foo 99999999", "1e9", "")
    ),
    *(
        {"status": 302, "Location": value}
        for value in (
            "http://u:p@[::1",
            "http://[",
            "http://",
            "//",
            "http://a:b:c/",
            "http://h:99999999/",
            "\u00b2://",
        )
    ),
    {"status": 302},
    {"status": 401, "WWW-Authenticate": "Digest " + "x" * 5000},
    {"Set-Cookie": "a=b; expires=\u00b2; max-age=" + "9" * 5000},
    {str(number): "x" for number in range(150)},
]


@pytest.mark.parametrize("headers", HOSTILE, ids=lambda headers: str(headers)[:50])
def test_headers_that_no_server_should_send_are_taken_or_refused_in_words(server, tmp_path, monkeypatch, headers):
    headers = dict(headers)

    def answer(handler):
        lines = [f"HTTP/1.1 {headers.pop('status', 200)} OK", *(f"{name}: {value}" for name, value in headers.items())]
        handler.wfile.write("\r\n".join([*lines, "", ""]).encode("latin-1") + TEXT)

    server.answers["/book.txt"] = answer
    monkeypatch.setenv("PARTIALTUNE_CACHE", str(tmp_path))
    monkeypatch.setattr("partialtune.net.download.Limits", lambda: Limits(connect_seconds=2, read_seconds=0.3, tries=1))
    with contextlib.suppress(TextError):
        assert read_texts([server.url + "/book.txt"])[0].text.startswith("Call me Ishmael.")


def test_damaged_gzip_is_an_error(server, tmp_path):
    url = server.serve("/book.txt", b"\x1f\x8b\x08\x00" + TEXT, Content_Encoding="gzip")
    assert "is damaged" in refuse(url, tmp_path)


def test_an_unknown_packing_is_an_error(server, tmp_path):
    assert "'br'" in refuse(server.serve("/book.txt", TEXT, Content_Encoding="br"), tmp_path)


def test_a_body_shorter_than_announced_is_an_error(server, tmp_path):
    message = refuse(server.serve("/book.txt", TEXT, announced=len(TEXT) + 10), tmp_path)
    assert f"broke off after {len(TEXT):,} bytes" in message
    assert "Tried 2 times" in message


def test_a_text_that_came_short_once_is_fetched_whole_the_second_time(server, tmp_path):
    lengths = iter([len(TEXT) + 10, len(TEXT)])
    server.answers["/book.txt"] = lambda handler: send(handler, TEXT, announced=next(lengths))
    assert fetch(server.url + "/book.txt", tmp_path, QUICK).path.read_bytes() == TEXT


def test_a_chunked_text_arrives_whole(server, tmp_path):
    def chunked(handler):
        handler.protocol_version = "HTTP/1.1"
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for start in range(0, len(TEXT), 5000):
            chunk = TEXT[start : start + 5000]
            handler.wfile.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
        handler.wfile.write(b"0\r\n\r\n")

    server.answers["/book.txt"] = chunked
    assert fetch(server.url + "/book.txt", tmp_path, QUICK).path.read_bytes() == TEXT


@pytest.mark.parametrize("content_type", ["text/html; charset=utf-8", "application/xhtml+xml"])
def test_a_page_that_says_it_is_html_is_an_error(server, tmp_path, content_type):
    message = refuse(server.serve("/829", TEXT, Content_Type=content_type), tmp_path)
    assert "HTML page, not plain text" in message
    assert "Plain Text UTF-8" in message


def test_a_page_that_claims_to_be_plain_text_is_an_error(server, tmp_path):
    page = b"\n<!-- hello -->\n<!DOCTYPE html>\n<html><body>Please sign in</body></html>"
    assert "HTML page, not plain text" in refuse(server.serve("/book.txt", page), tmp_path)
    assert "HTML page, not plain text" in refuse(server.serve("/long.txt", page + TEXT), tmp_path)


def test_an_archive_is_an_error(server, tmp_path):
    assert "gzip archive" in refuse(server.serve("/book.gz", gzip.compress(TEXT)), tmp_path)


@pytest.mark.parametrize("body", [b"", b" \r\n\r\n"])
def test_an_empty_text_is_an_error(server, tmp_path, body):
    assert "is empty" in refuse(server.serve("/book.txt", body), tmp_path)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (404, "no such text"),
        (410, "no such text"),
        (403, "denies access"),
        (401, "denies access"),
        (418, "answers 418"),
    ],
)
def test_a_refusal_is_not_tried_again(server, tmp_path, status, words):
    message = refuse(server.serve("/book.txt", b"no", status=status), tmp_path)
    assert words in message
    assert str(status) in message
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_tried_again(server, tmp_path, status):
    statuses = iter([status, 200])
    server.answers["/book.txt"] = lambda handler: send(handler, TEXT, status=next(statuses))
    assert fetch(server.url + "/book.txt", tmp_path, QUICK).size == len(TEXT)
    assert len(server.requests) == 2


def test_a_server_that_stays_busy_is_an_error(server, tmp_path):
    message = refuse(server.serve("/book.txt", status=503), tmp_path)
    assert "503" in message
    assert "Tried 2 times" in message
    assert len(server.requests) == 2


def test_retry_after_is_obeyed(server, tmp_path):
    times = []

    def busy_once(handler):
        times.append(time.monotonic())
        if len(times) == 1:
            send(handler, b"", status=429, Retry_After="1")
        else:
            send(handler, TEXT)

    server.answers["/book.txt"] = busy_once
    fetch(server.url + "/book.txt", tmp_path, QUICK)
    assert times[1] - times[0] >= 1.0


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_a_retry_after_beyond_patience_is_an_error(server, tmp_path, form):
    later = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    url = server.serve("/book.txt", status=429, Retry_After="3600" if form == "seconds" else later)
    message = refuse(url, tmp_path)
    assert "too many requests" in message
    assert "asks to wait 3,6" in message or "asks to wait 3,59" in message
    assert len(server.requests) == 1


def test_a_server_that_never_answers_is_an_error(server, tmp_path):
    server.answers["/book.txt"] = lambda handler: time.sleep(1)
    message = refuse(server.url + "/book.txt", tmp_path)
    assert "stalled: no answer within 0.3 s" in message


def test_a_body_that_stops_is_an_error(server, tmp_path):
    def stop(handler):
        send(handler, TEXT[:5000], announced=len(TEXT))
        handler.wfile.flush()
        time.sleep(1)

    server.answers["/book.txt"] = stop
    assert "stalled after 5,000 bytes" in refuse(server.url + "/book.txt", tmp_path)


def test_a_body_that_trickles_is_an_error(server, tmp_path):
    def trickle(handler):
        send(handler, b"", announced=1000)
        for _ in range(1000):  # 50 seconds
            handler.wfile.write(b"x")
            handler.wfile.flush()
            time.sleep(0.05)

    server.answers["/book.txt"] = trickle
    limits = Limits(read_seconds=5, tries=1, slow_after_seconds=0.2, slowest_bytes_per_second=1000)
    start = time.monotonic()
    assert "trickles" in refuse(server.url + "/book.txt", tmp_path, limits)
    assert time.monotonic() - start < 20


def test_no_connection_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    assert "refuses the connection" in refuse(f"http://127.0.0.1:{port}/book.txt", tmp_path)


def test_no_network_is_an_error(tmp_path, monkeypatch):
    def no_name(*arguments, **keywords):
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(socket, "getaddrinfo", no_name)
    assert "no network, or there is no host called www.gutenberg.org" in refuse(
        "https://www.gutenberg.org/a.txt", tmp_path
    )


@pytest.mark.parametrize("announced", ["length", "no length", "gzip"])
def test_a_text_over_the_size_limit_is_an_error(server, tmp_path, announced):
    if announced == "gzip":  # small on the wire
        url = server.serve("/book.txt", gzip.compress(TEXT * 100), Content_Encoding="gzip")
    elif announced == "length":
        url = server.serve("/book.txt", TEXT * 100)
    else:
        server.answers["/book.txt"] = lambda handler: handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + TEXT * 100)
        url = server.url + "/book.txt"
    message = refuse(url, tmp_path, Limits(read_seconds=1, tries=1, max_bytes=100_000))
    assert "too large" in message
    assert "PARTIALTUNE_MAX_DOWNLOAD_MB" in message


def test_the_size_limit_follows_its_variable(server, tmp_path, monkeypatch):
    url = server.serve("/book.txt", TEXT * 50)
    monkeypatch.setenv("PARTIALTUNE_MAX_DOWNLOAD_MB", "1")
    assert "allowed are 1.0 MB" in refuse(url, tmp_path)
    monkeypatch.setenv("PARTIALTUNE_MAX_DOWNLOAD_MB", "lots")
    assert "whole number of MB" in refuse(url, tmp_path)
    monkeypatch.setenv("PARTIALTUNE_MAX_DOWNLOAD_MB", "2")
    assert fetch(url, tmp_path, QUICK).size == len(TEXT) * 50


@pytest.mark.parametrize("url", ["ftp://host/a.txt", "file:///etc/passwd", "http://", "http://[", "book.txt"])
def test_an_address_that_is_not_http_is_an_error(url, tmp_path):
    assert "is no address to fetch a text from" in refuse(url, tmp_path)


def test_a_cache_that_cannot_be_made_is_an_error(server, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TextError, match=r"cannot be used .*PARTIALTUNE_CACHE"):
        fetch(server.serve("/book.txt", TEXT), tmp_path / "file" / "texts", QUICK)


def test_a_password_is_not_written_down(server, tmp_path):
    url = server.serve("/book.txt", TEXT).replace("http://", "http://me:secret@")
    download = fetch(url, tmp_path, QUICK)
    assert "secret" not in download.url
    assert "secret" not in download.path.with_suffix(".json").read_text()


def test_an_interrupted_download_leaves_nothing(server, tmp_path, monkeypatch):
    def interrupt(*arguments, **keywords):
        raise KeyboardInterrupt

    url = server.serve("/book.txt", TEXT)
    monkeypatch.setattr("partialtune.cache.os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch(url, tmp_path, QUICK)
    assert cached_files(tmp_path) == []


FETCH = """
import sys
from pathlib import Path
from partialtune.net.download import fetch
print(fetch(sys.argv[1], Path(sys.argv[2])).sha256)
"""


def fetch_in_a_process(url, folder):
    return subprocess.Popen([sys.executable, "-c", FETCH, url, str(folder)], stdout=subprocess.PIPE, text=True)


def test_processes_at_once_fetch_once(server, tmp_path):
    def slowly(handler):
        time.sleep(0.5)
        send(handler, TEXT)

    server.answers["/book.txt"] = slowly
    processes = [fetch_in_a_process(server.url + "/book.txt", tmp_path) for _ in range(3)]
    outputs = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert outputs == [hashlib.sha256(TEXT).hexdigest()] * 3
    assert server.requests == ["/book.txt"]


def test_a_process_killed_in_mid_download_leaves_no_text_and_no_lock(server, tmp_path):
    started = threading.Event()

    def stop_half_way(handler):
        send(handler, TEXT[:5000], announced=len(TEXT))
        handler.wfile.flush()
        started.set()
        time.sleep(5)

    server.answers["/book.txt"] = stop_half_way
    process = fetch_in_a_process(server.url + "/book.txt", tmp_path)
    assert started.wait(timeout=60)
    process.kill()
    process.communicate()
    assert not {".txt", ".json"} & set(cached_files(tmp_path))
    server.serve("/book.txt", TEXT)
    assert fetch(server.url + "/book.txt", tmp_path, QUICK).path.read_bytes() == TEXT
    assert cached_files(tmp_path) == [".json", ".txt"]
