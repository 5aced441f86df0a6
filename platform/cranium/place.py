"""Where files lie: a folder of a (shared) file system, or `s3://bucket/prefix`. A write is there whole or not at all.

Local paths go straight to the operating system. Object stores are spoken to through fsspec, with credentials and
endpoint from the environment alone (`AWS_ENDPOINT_URL`, ...). An object appears when its upload ends, whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cranium.config import UserError

Where = Path | str  # a string with `://` is in an object store
CHUNK = 8 << 20


def is_remote(where: Where) -> bool:
    return "://" in str(where)


def at(folder: Where, *names: str) -> Where:
    """What is called so below a folder."""
    return "/".join((str(folder), *names)) if is_remote(folder) else Path(folder).joinpath(*names)


def _store() -> Any:
    try:
        import fsspec
        import s3fs  # noqa: F401  (fsspec says less clearly what is missing)
    except ImportError:
        raise UserError("NO_S3", "s3:// needs s3fs; install it: pip install 'cranium[s3]'") from None
    return fsspec.filesystem("s3", use_listings_cache=False)


@contextlib.contextmanager
def reachable(where: Where) -> Iterator[None]:
    """Turn an object store's refusal into a `UserError(S3_ACCESS)`; that a file is absent, or there, is no refusal."""
    if not is_remote(where):
        yield
        return
    _store()
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except (OSError, BotoCoreError, ClientError) as error:
        hint = "check the bucket, AWS_ENDPOINT_URL and the credentials in the environment"
        raise UserError("S3_ACCESS", f"{where} cannot be used ({error}); {hint}", 1) from error


# ---- reading --------------------------------------------------------------------------------------------------------


def read(where: Where) -> bytes:
    """The bytes of a file. Raises `FileNotFoundError`."""
    return bytes(_store().cat_file(str(where))) if is_remote(where) else Path(where).read_bytes()


def absent(where: Where) -> bool:
    return not (_store().exists(str(where)) if is_remote(where) else Path(where).exists())


def read_all(wheres: Sequence[Where]) -> list[bytes]:
    """Many small files, in order; from an object store many at a time."""
    if not wheres or not is_remote(wheres[0]):
        return [read(where) for where in wheres]
    found = _store().cat([str(where) for where in wheres])
    return [bytes(found[str(where).removeprefix("s3://")]) for where in wheres]


def names(folder: Where) -> dict[str, tuple[int, str]]:
    """The files of a folder: name -> (bytes, a stamp that changes when the file does). Empty when there is none."""
    if is_remote(folder):
        found = _store().find(str(folder), maxdepth=1, detail=True)
        return {path.rsplit("/", 1)[1]: (i["size"], i["ETag"].strip('"')) for path, i in found.items()}
    try:
        with os.scandir(folder) as entries:
            stats = {entry.name: entry.stat() for entry in entries if entry.is_file()}
    except FileNotFoundError:
        return {}
    return {name: (stat.st_size, str(stat.st_mtime_ns)) for name, stat in stats.items()}


def sha256(where: Where, tell: Callable[[int], None] = lambda count: None) -> str:
    """SHA-256 (hex) of a file; `tell` hears how many more bytes were read."""
    digest = hashlib.sha256()
    with _store().open(str(where), "rb") if is_remote(where) else Path(where).open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            tell(len(chunk))
    return digest.hexdigest()


# ---- writing --------------------------------------------------------------------------------------------------------


def write(where: Where, content: str | bytes, create: bool = False) -> None:
    """Write a small file. With `create` only the first of two writers succeeds, the other gets `FileExistsError`."""
    data = content.encode() if isinstance(content, str) else content
    if is_remote(where):
        try:
            _store().pipe_file(str(where), data, mode="create" if create else "overwrite")
        except FileNotFoundError as error:
            raise UserError(
                "S3_ACCESS", f"{where} cannot be written ({error}); make the bucket first", 1
            ) from error
        return
    Path(where).parent.mkdir(parents=True, exist_ok=True)
    with _beside(where) as beside:
        beside.write_bytes(data)
        _put(beside, where, create)


def publish(where: Where, write: Callable[[Path], Any]) -> int:
    """Let `write` make a file beside (or in a temporary folder), then put it in its place whole; its bytes."""
    with _beside(where) as beside:
        write(beside)
        size = beside.stat().st_size
        _put(beside, where)
    return size


def publish_by_content(folder: Where, suffix: str, write: Callable[[Path], Any]) -> tuple[str, str, int]:
    """Like `publish`, under the first 16 digits of the content's SHA-256: (name, SHA-256, bytes)."""
    with _beside(at(folder, suffix)) as beside:
        write(beside)
        digest, size = sha256(beside), beside.stat().st_size
        name = f"{digest[:16]}{suffix}"
        _put(beside, at(folder, name))
    return name, digest, size


@contextlib.contextmanager
def _beside(where: Where) -> Iterator[Path]:
    """A name for what is not whole yet: hidden in the same folder, or in a temporary one when the place is remote."""
    with contextlib.ExitStack() as stack:
        if is_remote(where):
            yield Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cranium-"))) / "whole"
            return
        beside = Path(where).with_name(f".{Path(where).name}.{secrets.token_hex(6)}")
        stack.callback(beside.unlink, missing_ok=True)
        yield beside


def _put(beside: Path, where: Where, create: bool = False) -> None:
    if is_remote(where):
        _store().put_file(str(beside), str(where))
        return
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    _create(beside, Path(where)) if create else os.replace(beside, where)
    descriptor = os.open(Path(where).parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the name, too
    finally:
        os.close(descriptor)


def _create(beside: Path, path: Path) -> None:
    try:
        os.link(beside, path)
    except OSError:
        if path.exists():
            raise FileExistsError(path) from None
        os.replace(beside, path)  # a file system without links; the store's lock is what keeps others out


def link(source: Where, target: Where) -> None:
    """The same bytes under a second name: a hard link, a copy inside the object store, or else a copy."""
    if is_remote(source) and is_remote(target):
        _store().copy(str(source), str(target))
    elif is_remote(target):
        _store().put_file(str(source), str(target))
    elif is_remote(source):
        publish(target, lambda path: _store().get_file(str(source), str(path)))
    else:
        try:
            os.link(source, target)
        except FileExistsError:
            pass  # named by content: it is the same file
        except OSError:  # another device, or a file system without links
            publish(target, lambda path: shutil.copyfile(source, path))


def remove(wheres: Sequence[Where]) -> None:
    """Remove files; what is absent is no error."""
    for where in wheres:
        if not is_remote(where):
            Path(where).unlink(missing_ok=True)
        else:
            with contextlib.suppress(FileNotFoundError):
                _store().rm_file(str(where))


def remove_folder(folder: Where) -> None:
    """Remove everything below, and the folder; absent is no error."""
    with contextlib.suppress(FileNotFoundError):
        if is_remote(folder):
            _store().rm(str(folder), recursive=True)
        else:
            shutil.rmtree(folder)
