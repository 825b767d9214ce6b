"""A server of files, with ranges, that can fail as servers do."""

from __future__ import annotations

import http.server
import re
import time
from pathlib import Path

RANGE = re.compile(r"bytes=(\d+)-(\d*)")


class FileHandler(http.server.SimpleHTTPRequestHandler):
    """HTTP/1.1 without words on the screen; a subclass says in `do_GET` what is sent, by `send_file`."""

    protocol_version = "HTTP/1.1"

    def send_file(self, path: Path, fault: object = None, slow_s: float = 1.0) -> tuple[int, int]:
        """A file, or what was asked of it; returns (status, bytes).

        Args:
            fault: "whole": ranges are not known; "slow": `slow_s` seconds before the first byte; "cut": half of it, and an end.
        """
        content, status = path.read_bytes(), 200
        found = RANGE.fullmatch(self.headers.get("Range", ""))
        if found and fault != "whole":
            content, status = content[int(found[1]) : int(found[2] or len(content) - 1) + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        if fault != "whole":
            self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if fault == "slow":
            time.sleep(slow_s)
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)
        self.close_connection = self.close_connection or fault == "cut"
        return status, len(content)

    def log_message(self, *_: object) -> None:
        return None
