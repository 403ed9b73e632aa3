"""One deadline for all that a request waits for: connecting, TLS, status line, headers, body.

A socket's own timeout starts anew with every byte, so a server that drips a status line, a header, `100 Continue` or a
line of its stream would keep a caller for ever. Here a timer shuts the connection down, which ends any wait.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from typing import Self


class Deadline:
    """As a context manager: the connection that `connect` makes in it is shut down after so many seconds.

    `silence_s`: how long the other side may say nothing. Looking up a name is left to the system's own limits.
    """

    def __init__(self, seconds: float, silence_s: float) -> None:
        self._ends = time.monotonic() + seconds
        self._silence_s = silence_s
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None  # a duplicate: TLS takes the socket itself over
        self._timer = threading.Timer(seconds, self.end)
        self._timer.daemon = True
        self.passed = False

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def connect(self, host: str, port: int, tls: ssl.SSLContext | None) -> socket.socket:
        """The first address that answers. Raises OSError, and UnicodeError for what is no name of a host."""
        problem: OSError = TimeoutError("timed out")
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            made = socket.socket(family, kind, protocol)
            try:
                made.settimeout(min(self._silence_s, max(0.001, self._ends - time.monotonic())))
                made.connect(address)
                self._watch(made)
                made.settimeout(self._silence_s)
                return tls.wrap_socket(made, server_hostname=host) if tls else made
            except OSError as error:
                made.close()
                problem = error
            if self.passed:
                break
        raise problem

    def _watch(self, made: socket.socket) -> None:
        with self._lock:
            if self.passed:
                raise TimeoutError("timed out")
            if self._connection is not None:
                self._connection.close()
            self._connection = made.dup()

    def end(self) -> None:
        """Shut the connection down now. May be called by any thread."""
        with self._lock:
            self.passed = True
            if self._connection is not None:
                with contextlib.suppress(OSError):
                    self._connection.shutdown(socket.SHUT_RDWR)
