"""Before the chat's page and its API: only for the host that it listens on, and only with the token that its command printed."""

from __future__ import annotations

import hmac
import http.cookies
import urllib.parse
from collections.abc import Callable
from typing import Any

from vlm_dist.hosts import REFUSED

WITHOUT_TOKEN = "/startup-events"  # what Gradio asks of itself
NO_TOKEN = "a token is needed: open the address that `vlm-dist chat` printed (it ends with ?token=...), or send it as a bearer token"


class Guard:
    """ASGI: answers 421 to another Host header, 401 without the token. The token comes as `?token=` once, which sets a cookie that scripts
    cannot read and other sites do not send; or in each request as `Authorization: Bearer TOKEN`.

    Args:
        is_ours: of a Host header, see `host_check`.
        token: None: none is asked for.
    """

    def __init__(self, app: Any, *, is_ours: Callable[[str], bool], token: str | None):
        self.app, self.is_ours, self.token = app, is_ours, token
        self.cookie = f"vlm_dist_chat_{abs(hash(token)) % 10**8:08d}"  # cookies are shared by the ports of a host

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if not self.is_ours(headers.get("host", "")):
            return await _answer(scope, send, 421, REFUSED)
        if self.token is None or scope["path"].endswith(WITHOUT_TOKEN) or self._is_known(headers):
            return await self.app(scope, receive, send)
        given = urllib.parse.parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if not self._is_token(given):
            return await _answer(scope, send, 401, NO_TOKEN)
        cookie = f"{self.cookie}={self.token}; HttpOnly; SameSite=Lax; Path=/"
        return await _answer(scope, send, 303, "", [(b"location", b"."), (b"set-cookie", cookie.encode())])

    def _is_known(self, headers: dict[str, str]) -> bool:
        kind, _, word = headers.get("authorization", "").partition(" ")
        try:
            cookies = http.cookies.SimpleCookie(headers.get("cookie", ""))
        except http.cookies.CookieError:
            cookies = http.cookies.SimpleCookie()
        by_cookie = cookies[self.cookie].value if self.cookie in cookies else ""
        return self._is_token(by_cookie) or (kind.lower() == "bearer" and self._is_token(word.strip()))

    def _is_token(self, given: str) -> bool:
        return self.token is not None and hmac.compare_digest(given.encode(), self.token.encode())


async def _answer(scope: Any, send: Any, status: int, words: str, more: list[tuple[bytes, bytes]] | None = None) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    body = words.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode()), *(more or [])]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
