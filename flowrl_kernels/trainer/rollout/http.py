"""JSON over HTTP to a server of this project's own machines: the standard library, connections kept, one a thread."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from flowrl_kernels.trainer.rollout.faults import EngineError, Fault


def check_address(address: str, field: str) -> None:
    """Refuses what is no http address of a host. Raises ValueError naming `field`."""
    try:
        parts = urlsplit(address)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        good = good and not parts.path.strip("/") and not parts.query
    except ValueError:  # a port that is no number
        good = False
    if not good:
        raise ValueError(f"{field}: wanted addresses like 'http://127.0.0.1:8000'; got {address!r}")


class Http:
    """One server. Safe to use from several threads."""

    def __init__(
        self, address: str, timeout: float, headers: Mapping[str, str] | None = None, field: str = "rollout.servers"
    ):
        self.address, self.timeout, self.field = address.rstrip("/"), timeout, field
        self.headers = dict(headers or {})
        self._parts = urlsplit(self.address)
        self._local = threading.local()
        self._open: set[http.client.HTTPConnection] = set()
        self._closed = False

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON that comes back (None for an empty answer).

        Raises:
            OSError: no connection, or no answer within `timeout` seconds.
            Fault: an answer with a status of 500 or above, or one that is no JSON.
            EngineError: the server refuses what is asked (a status of 400 to 499): asking again would not help.
        """
        data = None if body is None else json.dumps(body).encode()
        fresh = getattr(self._local, "connection", None) is None
        try:
            status, text = self._once(method, path, data)
        except (ConnectionError, http.client.HTTPException) as error:
            self.drop()
            if fresh:
                raise ConnectionError(f"{type(error).__name__}: {error}") from error
            status, text = self._first(method, path, data)  # a kept connection that the server had closed
        except OSError:
            self.drop()
            raise
        if status != 200:
            said = f"{method} {path} answered {status}: {text[:300].decode(errors='replace')}"
            if 400 <= status < 500:
                hint = "; `make serve` starts one that takes it" if self.field == "rollout.servers" else ""
                raise EngineError(f"{self.field}: {self.address}: {said}{hint}")
            raise Fault(said)
        if not text:
            return None
        try:
            return json.loads(text)
        except ValueError:
            raise Fault(f"{method} {path} answered what is no JSON: {text[:60]!r}") from None

    def drop(self) -> None:
        """Closes this thread's connection."""
        connection = getattr(self._local, "connection", None)
        if connection is not None:
            self._open.discard(connection)
            connection.close()
        self._local.connection = None

    def close(self) -> None:
        """Cuts every thread's connection; who waits for an answer gets a ConnectionError."""
        self._closed = True
        for connection in list(self._open):
            with contextlib.suppress(OSError, AttributeError):  # gone already
                connection.sock.shutdown(socket.SHUT_RDWR)

    def _first(self, method: str, path: str, data: bytes | None) -> tuple[int, bytes]:
        try:
            return self._once(method, path, data)
        except http.client.HTTPException as error:
            self.drop()
            raise ConnectionError(f"{type(error).__name__}: {error}") from error
        except OSError:
            self.drop()
            raise

    def _once(self, method: str, path: str, data: bytes | None) -> tuple[int, bytes]:
        connection = getattr(self._local, "connection", None)
        if self._closed:
            raise ConnectionError("closed by the trainer")
        if connection is None:
            kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
            connection = kind(self._parts.hostname or "", self._parts.port, timeout=self.timeout)
            self._local.connection = connection
            self._open.add(connection)
        headers = {"Content-Type": "application/json", **self.headers} if data else self.headers
        connection.request(method, path, data, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
