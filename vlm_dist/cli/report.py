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
        "Write one self-contained page about a run: curves, and held-out answers before and after.",
        "vlm-dist report runs/quickstart",
    )
    parser.add_argument("run_dir", metavar="RUN", type=Path)
    parser.add_argument("--watch", action="store_true", help="serve the page while the run goes on, made anew for each visit")
    parser.add_argument("--port", type=int, default=8008, metavar="N", help="with --watch (default 8008)")
    parser.add_argument("--host", default="127.0.0.1", help="with --watch; whoever reaches it sees the run (default 127.0.0.1)")
    parser.add_argument("--every", type=int, default=10, metavar="SECONDS", help="with --watch: load again so often (default 10)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from vlm_dist.reporting.report import write_report
    from vlm_dist.reporting.watch import serve_report

    if arguments.watch:
        with serve_report(arguments.run_dir, host=arguments.host, port=arguments.port, every=arguments.every) as server:
            print(f"http://{arguments.host}:{server.server_port}  (Ctrl-C ends it)", flush=True)
            server.serve_forever()
    print(write_report(arguments.run_dir))
    return 0
