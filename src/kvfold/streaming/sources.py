"""Where the parts of a context lie: a folder, or a place on the web. Neither is trusted."""

import hashlib
import os
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Protocol, runtime_checkable
from urllib.parse import quote, urlsplit
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
)

from kvfold.files import check_regular
from kvfold.options import shown

TIMEOUT = 30.0
"""Seconds without a byte after which a server is taken for gone."""


@runtime_checkable
class Origin(Protocol):
    """Files by name."""

    def read(self, name: str, limit: int) -> bytes:
        """A file's bytes. Raises ValueError where there are more than `limit`, OSError where it can't be read."""
        ...


class Folder:
    """Files of a folder."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)

    def read(self, name: str, limit: int) -> bytes:
        check_regular(self.path / name, "source")
        with (self.path / name).open("rb") as file:
            return _within(file.read(limit + 1), name, limit)


class Web:
    """Files below an http or https address; no redirect is followed."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.opener = OpenerDirector()  # without handlers of files, ftp and redirects
        for handler in (ProxyHandler, HTTPHandler, HTTPSHandler, HTTPDefaultErrorHandler, HTTPErrorProcessor):
            self.opener.add_handler(handler())

    def read(self, name: str, limit: int) -> bytes:
        try:
            response = self.opener.open(f"{self.url}/{quote(name)}", timeout=TIMEOUT)
            assert isinstance(response, HTTPResponse)
            with response:
                said = response.headers.get("Content-Length", "0")
                if not said.isdecimal() or int(said) > limit:
                    raise ValueError(f"{name}: the server says {shown(said)} bytes, of which at most {limit} are read")
                return _within(response.read(limit + 1), name, limit)
        except HTTPException as error:  # a line that is none of the protocol, an end before its time
            raise OSError(f"{self.url}/{name}: {type(error).__name__}: {error}") from error


def source_of(source: str | os.PathLike[str]) -> Origin:
    """A folder by its path, or a place on the web by its address. Raises ValueError for other schemes."""
    if isinstance(source, str) and "://" in source:
        if urlsplit(source).scheme not in ("http", "https"):
            raise ValueError(f"source={source!r} must be a folder or an http or https address")
        return Web(source)
    return Folder(source)


def check_digest(content: bytes, wanted: str, name: str) -> bytes:
    """The bytes. Raises ValueError where their SHA-256 is another one."""
    if hashlib.sha256(content).hexdigest() != wanted:
        raise ValueError(f"{name} is damaged: its SHA-256 is another than was said")
    return content


def _within(content: bytes, name: str, limit: int) -> bytes:
    if len(content) > limit:
        raise ValueError(f"{name} has more than the {limit} bytes that are read")
    return content
