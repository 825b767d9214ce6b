"""Pictures at http(s) addresses: bounded in size and time, tried again, and never from addresses inside a network."""

from __future__ import annotations

import http.client
import socket
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import Any

from vlm_dist.data.addresses import is_inside
from vlm_dist.errors import BadSample

AGAIN = (408, 425, 429, 500, 502, 503, 504)  # answers that may pass
CHUNK = 2**16


@dataclass(frozen=True)
class Fetcher:
    """What may be fetched, and how."""

    allow_private: bool = False
    """Also from this machine, from private and from link-local networks: for tests, and servers of one's own."""
    timeout_s: float = 20.0
    """Longest wait for an answer."""
    whole_s: float = 120.0
    """Longest time for one picture."""
    most_bytes: int = 64 * 2**20
    attempts: int = 3
    pause_s: float = 0.5
    """Before the second attempt; doubled before each later one."""

    def read(self, address: str) -> bytes:
        """All bytes at an address.

        Raises:
            BadSample: it cannot be fetched, or may not be.
        """
        end, reason = time.monotonic() + self.whole_s, ""
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.pause_s * 2 ** (attempt - 1))
            try:
                return self._once(address, end)
            except urllib.error.HTTPError as error:
                reason = f"the server answers {error.code}"
                error.close()
                if error.code not in AGAIN:
                    break
            except _Refused as error:
                reason = str(error)
                break
            except (OSError, http.client.HTTPException, ValueError) as error:
                if isinstance(cause := getattr(error, "reason", None), _Refused):
                    reason = str(cause)
                    break
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            if time.monotonic() > end:
                break
        raise BadSample(f"a picture cannot be fetched: {address[:200]!r} ({reason})")

    def _once(self, address: str, end: float) -> bytes:
        opener = urllib.request.build_opener(_Redirects(self), _Http(self), _Https(self))
        self.check(address)
        request = urllib.request.Request(_quoted(address), headers={"User-Agent": "vlm_dist", "Accept": "image/*,*/*;q=0.5"})
        with opener.open(request, timeout=self.timeout_s) as answer:
            length, data = answer.headers.get("Content-Length"), bytearray()
            if length is not None and length.isdecimal() and int(length) > self.most_bytes:
                raise _Refused(f"{int(length):,} bytes, more than {self.most_bytes:,}")
            while chunk := answer.read(CHUNK):
                data += chunk
                if len(data) > self.most_bytes:
                    raise _Refused(f"more than {self.most_bytes:,} bytes")
                if time.monotonic() > end:
                    raise _Refused(f"not whole after {self.whole_s:.0f} s")
            if length is not None and length.isdecimal() and len(data) < int(length):
                raise ConnectionError(f"{len(data):,} of {int(length):,} bytes came")
            return bytes(data)

    def check(self, address: str) -> None:
        """Refuse an address that is not http(s), or whose host lies inside a network."""
        parts = urllib.parse.urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise _Refused(f"'{address[:100]}' is no http(s) address")
        if not self.allow_private:
            for found in socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM):
                self.check_peer(str(found[4][0]))

    def check_peer(self, peer: str) -> None:
        """Refuse the IP address of a host inside a network."""
        if not self.allow_private and is_inside(peer):
            raise _Refused(f"it leads to {peer}, inside a network; `--fetch-private` allows that")


class _Refused(OSError):
    """Trying again does not help."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = 5

    def __init__(self, fetcher: Fetcher):
        self.fetcher = fetcher

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        self.fetcher.check(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Http(urllib.request.HTTPHandler):
    """Looks at whom a connection really leads to, since a name may lead elsewhere the second time it is asked."""

    def __init__(self, fetcher: Fetcher):
        super().__init__()
        self.fetcher = fetcher

    def http_open(self, req: Any) -> Any:
        fetcher, is_direct = self.fetcher, not req.has_proxy()

        class Connection(http.client.HTTPConnection):
            def connect(self) -> None:
                super().connect()
                if is_direct:
                    fetcher.check_peer(self.sock.getpeername()[0])

        return self.do_open(Connection, req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, fetcher: Fetcher):
        super().__init__()
        self.fetcher = fetcher

    def https_open(self, req: Any) -> Any:
        fetcher, is_direct, context = self.fetcher, not req.has_proxy(), ssl.create_default_context()
        is_tunnel = bool(getattr(req, "_tunnel_host", None))

        class Connection(http.client.HTTPSConnection):
            def connect(self) -> None:
                if not is_direct or is_tunnel:
                    return super().connect()
                http.client.HTTPConnection.connect(self)
                fetcher.check_peer(self.sock.getpeername()[0])
                self.sock = context.wrap_socket(self.sock, server_hostname=self.host)
                return None

        return self.do_open(Connection, req)


def _quoted(address: str) -> str:
    """Spaces and letters beyond ASCII, as browsers write them; what is quoted already stays."""
    return urllib.parse.quote(address, safe="%/:=&?~#+!$,;'@()*[]")
