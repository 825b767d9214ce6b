"""The report of a run that is under way, served on this machine."""

from __future__ import annotations

import http.server
import threading
from pathlib import Path
from typing import Any

from vlm_dist.errors import ConfigError, MachineError
from vlm_dist.hosts import REFUSED, host_check
from vlm_dist.reporting.report import render_report
from vlm_dist.reporting.thinning import Metrics
from vlm_dist.run_dir import RunDir


def serve_report(run_dir: Path, *, host: str, port: int, every: int) -> http.server.ThreadingHTTPServer:
    """A server of the page, made anew for each visit; the page loads itself again every so many seconds. Requests
    that name another host are refused.

    Args:
        port: 0: any that is free.

    Raises:
        MachineError: the port is taken.
    """

    is_ours, metrics, turn = host_check(host), Metrics(RunDir(run_dir).metrics), threading.Lock()

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not is_ours(self.headers.get("Host", "")):
                self.send_error(421, explain=REFUSED)
                return
            if self.path not in ("/", "/index.html"):
                self.send_error(404)
                return
            try:
                with turn:
                    page, code = render_report(run_dir, every, metrics), 200
            except ConfigError as error:  # not one step yet
                page, code = f"<meta http-equiv=refresh content={every}><p>{error}</p>", 503
            body = page.encode()
            self.send_response(code)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Visits are not told on the terminal."""

    try:
        return http.server.ThreadingHTTPServer((host, port), Page)
    except OSError as error:
        raise MachineError(f"report --watch: {host}:{port} cannot be listened on ({error.strerror}); give another --port") from None
