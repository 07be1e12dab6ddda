"""An object store: S3, whatever speaks like it, Google's or Azure's. An object per segment.

obstore talks to it. Bytes leave the arena as they lie there, and come back with one copy, which
also hashes them. Objects are made only where there are none; nothing is ever listed.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Annotated, Any, Final

import numpy as np
import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotSupportedError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import from_url
from pydantic import Field

from kvstore._native import Xxh3Stream, xxh3_64
from kvstore.errors import ConfigError, TierUnavailable
from kvstore.memory.bounce import memory_at
from kvstore.memory.slots import ALIGNMENT, align
from kvstore.sections import Count, MaybeFolder, Seconds
from kvstore.tiers.base import Host, Job
from kvstore.tiers.options import TierOptions, checked
from kvstore.tiers.segments.put import Put
from kvstore.tiers.segments.tier import SegmentTier

_URL: Final = r"^(s3|s3a|gs|az|azure|abfs|abfss)://[^\s?#@]+$"
_QUICK_SECONDS: Final = 5.0
"""That a small request may take at most."""
_WRITERS: Final = 2
_RUNNERS: Final = 16
_NOWHERE: Final = "v1/nothing"
"""What is asked for to see whether anybody answers."""


class S3Options(TierOptions):
    """`options` of a tier of this kind. `config` goes to obstore as it is."""

    url: str = Field(pattern=_URL)
    endpoint: Annotated[str | None, Field(pattern=r"^https?://[^\s?#@]+$")] = None
    region: str | None = None
    credentials_file: MaybeFolder = None
    config: dict[str, str] = Field(default_factory=dict, repr=False)
    threads: Count = Field(8, ge=1, le=64)
    timeout: Seconds = 30.0


class S3Tier(SegmentTier):
    """A `Tier` of objects in a bucket that others write to, too; `OpenTier` says what is raised."""

    def __init__(self, name: str, host: Host, options: S3Options) -> None:
        self._options = options
        self._creates = True
        self._connect()
        threads = options.threads, _WRITERS, _RUNNERS
        # An upload may take what one request may; nobody waits for it.
        super().__init__(name, host, options.url, options, threads, 2 * options.timeout)

    def _connect(self) -> None:
        """Read the credentials, and make clients with them; nothing is said to the server."""
        options = self._options
        config = {**_credentials(options), **options.config}
        config |= {"endpoint": options.endpoint} if options.endpoint else {}
        config |= {"region": options.region} if options.region else {}
        if options.url.startswith("s3"):
            config.setdefault("unsigned_payload", "true")  # Blocks have sums of their own.

        def client(seconds: float) -> Any:
            return from_url(
                options.url,
                config=config,
                client_options={
                    "timeout": f"{seconds:g}s",
                    "connect_timeout": f"{min(seconds, _QUICK_SECONDS):g}s",
                    "allow_http": bool(options.endpoint and options.endpoint.startswith("http:")),
                },
                retry_config={"max_retries": 2, "retry_timeout": timedelta(seconds=seconds)},
            )

        try:
            self._client = client(options.timeout)
            self._quick = client(min(options.timeout, _QUICK_SECONDS))
        except (BaseError, ValueError, TypeError) as e:
            raise ConfigError(f"options: {_plain(e)}") from None

    # --- The medium -------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._breaker.reason is not None and self._options.credentials_file is not None:
            try:
                self._connect()  # They may have changed.
            except ConfigError as e:
                raise OSError(errno.EIO, str(e)) from e
        try:
            self._head(_NOWHERE, 1)
        except FileNotFoundError:
            return

    def _head(self, path: str, nbytes: int) -> bytes:
        with _translated():
            return bytes(_range(self._quick, path, 0, nbytes))

    def _store(self, path: str, put: Put) -> bool:
        jobs = put.jobs
        header = put.seal([xxh3_64(job.address, job.nbytes) for job in jobs])
        gap, parts = bytes(-jobs[0].nbytes % ALIGNMENT), list[Any]([header])
        for job in jobs:
            parts += [memory_at(job.address, job.nbytes), gap]
        try:
            with _translated():
                self._create(path, parts)
        except FileExistsError:
            return False
        except FileNotFoundError as e:
            raise OSError(errno.EIO, "there is no such bucket") from e
        return True

    def _create(self, path: str, parts: list[Any]) -> None:
        mode = "create" if self._creates else "overwrite"
        try:
            obstore.put(self._client, path, parts, mode=mode, use_multipart=False)
        except BaseError as e:
            missing = isinstance(e, NotSupportedError) or "NotImplemented" in str(e)
            if not (self._creates and missing):
                raise
            self._creates = False
            self._logger.warning(
                "%s: the store cannot make objects only where there are none (If-None-Match), so "
                "nodes that put a segment at once may do so twice", self.name,
            )  # fmt: skip
            self._create(path, parts)

    def _load(self, path: str, offset: int, jobs: Sequence[Job]) -> Sequence[int | None]:
        stride = align(jobs[0].nbytes)
        with _translated():
            data = _range(self._client, path, offset, (len(jobs) - 1) * stride + jobs[-1].nbytes)
        source = np.frombuffer(data, np.uint8)
        sums: list[int | None] = []
        for number, job in enumerate(jobs):
            at, stream = number * stride, Xxh3Stream()
            if at + job.nbytes > len(source):
                sums.append(None)
                continue
            stream.update(source.ctypes.data + at, job.nbytes, job.address)
            sums.append(stream.digest())
        return sums

    def _remove(self, path: str) -> None:
        try:
            with _translated():
                obstore.delete(self._quick, path)
        except FileNotFoundError:
            return


def _range(client: Any, path: str, start: int, nbytes: int) -> Any:
    """Bytes of an object, fewer where it ends."""
    try:
        return obstore.get_range(client, path, start=start, length=nbytes)
    except BaseError as e:
        if "InvalidRange" in str(e) or " 416 " in str(e):
            return b""
        raise


@contextmanager
def _translated() -> Iterator[None]:
    """Errors as those of the operating system."""
    try:
        yield
    except AlreadyExistsError as e:
        raise FileExistsError(errno.EEXIST, "there is one") from e
    except (PermissionDeniedError, UnauthenticatedError) as e:
        raise OSError(
            errno.EACCES, f"access is refused, check the credentials: {_plain(e)}"
        ) from None
    except FileNotFoundError as e:
        if "NoSuchBucket" in str(e):
            raise OSError(errno.EIO, "there is no such bucket") from None
        raise
    except BaseError as e:
        raise OSError(errno.EIO, _plain(e)) from None


def _plain(error: Exception) -> str:
    """What went wrong, without the rest of URLs, which may carry credentials."""
    return re.sub(r"(https?://[^/\s]*)\S*", r"\1", str(error).strip().partition("\n")[0])[:300]


def _credentials(options: S3Options) -> dict[str, str]:
    """What the file says, in lines of NAME=value as in the environment.

    Raises:
        TierUnavailable: it cannot be read.
        ConfigError: a line is none.
    """
    if options.credentials_file is None:
        return {}
    try:
        lines = options.credentials_file.read_text().splitlines()
    except OSError as e:
        text = f"credentials_file {options.credentials_file}: {e.strerror}; check the path"
        raise TierUnavailable(text) from e
    pairs = [line.partition("=") for line in lines if line.strip() and not line.startswith("#")]
    if not all(name.strip() and value.strip() for name, _, value in pairs):
        text = f"credentials_file {options.credentials_file}: a line is not NAME=value"
        raise ConfigError(text)
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


def open_s3(name: str, host: Host, options: Mapping[str, Any]) -> S3Tier:
    """Open a tier of objects, as `OpenTier` says."""
    return S3Tier(name, host, checked(S3Options, name, options))
