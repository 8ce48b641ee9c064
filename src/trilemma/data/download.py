"""Downloading one large file: progress, resume, checksum, and the target appears only when it is whole."""

import fcntl
import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from trilemma import __version__
from trilemma.errors import Failure, UserError

_CHUNK_BYTES = 1 << 18
_TIMEOUT_SECONDS = 30.0


def download(url: str, target: Path, md5: str, remedy: str) -> None:
    """Fetches `url` to `target`, going on where an earlier attempt stopped.

    What has arrived lies in `target` + ".part", is compared with the checksum when it is complete and is then renamed.
    Of several processes that want the same file one downloads and the others wait for it.

    Args:
        url: http or https.
        target: Where the file shall be; its folder is made.
        md5: Expected checksum, lower-case hex.
        remedy: What the user can do without a network, one sentence without a full stop.

    Raises:
        UserError: The server cannot be reached or refuses; what has arrived is kept for the next attempt.
        Failure: The disk is full, or what arrived is not the expected file.
    """
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target.with_name(target.name + ".lock")):
            if not target.exists():
                _complete(url, part, md5, remedy)
                part.replace(target)
    except OSError as error:
        raise Failure(
            str(target),
            f"the download cannot be stored ({error.strerror or error})",
            "Free space, or set TRILEMMA_CACHE to a folder with room that you may write to",
        ) from error


def _complete(url: str, part: Path, md5: str, remedy: str) -> None:
    resumed = part.exists() and part.stat().st_size > 0
    _fetch(url, part, remedy)
    if _md5(part) != md5 and resumed:  # the beginning may stem from another version of the file
        part.unlink()
        _fetch(url, part, remedy)
    found = _md5(part)
    if found != md5:
        part.unlink()
        raise Failure(
            url,
            f"what arrived has MD5 {found}, expected {md5}, and was deleted",
            "Try again later; a proxy may interfere",
        )


def _fetch(url: str, part: Path, remedy: str) -> None:
    """Appends to `part` what is missing of it."""
    start = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": f"trilemma/{__version__}", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
            if response.status != 206 or not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                start = 0  # the server sends it all
            length = response.headers.get("Content-Length")
            total = start + int(length) if length and length.isdigit() else None
            _write(_chunks(response), part, start, total)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # nothing is missing: the checksum decides
            return
        raise UserError(url, f"the server answers {error.code} ({error.reason})", remedy) from None
    except _Interrupted as error:
        raise UserError(url, f"cannot be downloaded ({error})", remedy) from None
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(url, f"cannot be downloaded ({reason})", remedy) from None


class _Interrupted(Exception):
    """The connection broke off; kept apart from errors of the disk, which are OSErrors too."""


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    while True:
        try:
            chunk = response.read(_CHUNK_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise _Interrupted(f"the connection broke off: {error}") from None
        if not chunk:
            return
        yield chunk


def _write(chunks: Iterator[bytes], part: Path, start: int, total: int | None) -> None:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with (
        part.open("r+b" if start else "wb") as file,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task(part.stem, total=total, completed=start)
        position = file.seek(start)
        for chunk in chunks:
            file.write(chunk)
            position += len(chunk)
            progress.update(task, completed=position)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())
    if total is not None and position < total:
        raise _Interrupted(f"the connection broke off after {position} of {total} bytes")


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Waits until no other process is in the block; a killed process lets go by itself."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
