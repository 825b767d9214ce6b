"""`vlm-dist report`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vlm_dist.cli.parsers import new_parser


def add_parser(commands: Any) -> None:
    parser = new_parser(
        commands,
        "report",
        "Write one self-contained page about a run: curves, and held-out answers before and after; or one that compares several.",
        "vlm-dist report runs/quickstart runs/other --out compared.html",
    )
    parser.add_argument("run_dirs", metavar="RUN", type=Path, nargs="+", help="a run directory; several are compared")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (default: RUN/report.html, or compared.html beside the first)")
    parser.add_argument("--watch", action="store_true", help="serve the page while the run goes on, made anew for each visit")
    parser.add_argument("--port", type=int, default=8008, metavar="N", help="with --watch (default 8008)")
    parser.add_argument("--host", default="127.0.0.1", help="with --watch; whoever reaches it sees the run (default 127.0.0.1)")
    parser.add_argument("--every", type=int, default=10, metavar="SECONDS", help="with --watch: load again so often (default 10)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from vlm_dist.errors import ConfigError
    from vlm_dist.reporting.compare import write_comparison
    from vlm_dist.reporting.report import write_report
    from vlm_dist.reporting.watch import serve_report

    first, *others = arguments.run_dirs
    if others and arguments.watch:
        raise ConfigError("report --watch: shows one run; name one")
    if others:
        print(write_comparison(arguments.run_dirs, arguments.out or first.parent / "compared.html"))
        return 0
    if arguments.watch:
        with serve_report(first, host=arguments.host, port=arguments.port, every=arguments.every) as server:
            print(f"http://{arguments.host}:{server.server_port}  (Ctrl-C ends it)", flush=True)
            server.serve_forever()
    print(write_report(first, arguments.out))
    return 0
