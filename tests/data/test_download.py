"""Downloads from a real server on the loopback: resume, wrong checksum, interruption, no network."""

import hashlib
import http.server
import socket
import threading
from contextlib import contextmanager

import numpy as np
import pytest

from trilemma.data.download import download
from trilemma.errors import Failure, UserError

CONTENT = np.random.default_rng(0).integers(0, 256, 700_000).astype(np.uint8).tobytes()
MD5 = hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT; the server's attributes say how well."""

    def do_GET(self):
        self.server.ranges.append(self.headers.get("Range"))
        start = 0
        if self.server.status != 200:
            self.send_error(self.server.status)
            return
        if self.server.with_ranges and self.headers.get("Range"):
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(CONTENT):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        self.wfile.write(CONTENT[start : start + self.server.at_most])

    def log_message(self, format, *args):
        pass


@contextmanager
def serving(with_ranges=True, at_most=10**9, status=200):
    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    server.with_ranges, server.at_most, server.status, server.ranges = with_ranges, at_most, status, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{server.server_port}/file.npz"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


@pytest.fixture
def target(tmp_path):
    return tmp_path / "medmnist" / "file.npz"


def part_of(target):
    return target.with_name(target.name + ".part")


def test_a_whole_file_arrives(target):
    with serving() as (server, url):
        download(url, target, MD5, "Get it")
        download(url, target, MD5, "Get it")  # it is there: nothing is asked for
    assert target.read_bytes() == CONTENT and not part_of(target).exists()
    assert server.ranges == [None]


def test_an_interrupted_download_goes_on_where_it_stopped(target):
    with serving(at_most=250_000) as (_, url), pytest.raises(UserError, match="250000 of 700000 bytes.*Put it there"):
        download(url, target, MD5, "Put it there")
    assert not target.exists() and part_of(target).stat().st_size == 250_000
    with serving() as (server, url):
        download(url, target, MD5, "Put it there")
    assert server.ranges == ["bytes=250000-"] and target.read_bytes() == CONTENT


def test_a_server_without_ranges_starts_again(target):
    target.parent.mkdir()
    part_of(target).write_bytes(CONTENT[:1000])
    with serving(with_ranges=False) as (_, url):
        download(url, target, MD5, "Get it")
    assert target.read_bytes() == CONTENT


def test_a_complete_part_is_only_checked(target):
    target.parent.mkdir()
    part_of(target).write_bytes(CONTENT)
    with serving() as (_, url):
        download(url, target, MD5, "Get it")
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("junk", [b"x" * 1000, b"x" * (len(CONTENT) + 5)])
def test_a_part_of_another_file_is_fetched_anew(target, junk):
    target.parent.mkdir()
    part_of(target).write_bytes(junk)
    with serving() as (server, url):
        download(url, target, MD5, "Get it")
    assert target.read_bytes() == CONTENT and server.ranges == [f"bytes={len(junk)}-", None]


def test_a_wrong_checksum_is_a_failure_and_leaves_nothing(target):
    with serving() as (_, url), pytest.raises(Failure, match=f"MD5 {MD5}, expected 0000"):
        download(url, target, "0000", "Get it")
    assert not target.exists() and not part_of(target).exists()


def test_a_refusal_names_the_status(target):
    with serving(status=404) as (_, url), pytest.raises(UserError, match="answers 404.*Put it there"):
        download(url, target, MD5, "Put it there")


def test_without_a_network_the_error_says_what_to_do(target):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/file.npz"
        with pytest.raises(UserError, match="cannot be downloaded.*refused.*Put it there"):
            download(url, target, MD5, "Put it there")


def test_of_two_downloads_at_once_one_fetches(target):
    with serving() as (server, url):
        threads = [threading.Thread(target=download, args=(url, target, MD5, "Get it")) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert target.read_bytes() == CONTENT and server.ranges == [None]


def test_a_folder_that_cannot_be_made_is_a_failure(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Failure, match="TRILEMMA_CACHE"):
        download("http://127.0.0.1:1/x", tmp_path / "file" / "x.npz", MD5, "Get it")
