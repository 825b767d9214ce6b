"""`vlm-dist chat`."""

from __future__ import annotations

import argparse
import secrets
import sys
from pathlib import Path
from typing import Any

from vlm_dist.cli.parsers import add_base_model, add_system, new_parser
from vlm_dist.errors import ConfigError, DataError

HELP = """/image FILE   a picture or video for the next question (several: one after another)
/compare      on or off: after each answer, what the base would have said
/forget       begin anew
/quit         or Ctrl-D"""


def add_parser(commands: Any) -> None:
    parser = new_parser(
        commands,
        "chat",
        "Talk with a trained model about pictures and videos: on a page in the browser, or in the terminal.",
        "vlm-dist chat runs/quickstart",
    )
    parser.add_argument("source", metavar="RUN_OR_MODEL", help="a run directory, an adapter folder, a checkpoint folder or a hub id")
    add_base_model(parser)
    add_system(parser)
    parser.add_argument("--terminal", action="store_true", help="talk here, without a page")
    parser.add_argument(
        "--host", default="127.0.0.1", help="of the page, which asks for the token of the printed address (default 127.0.0.1)"
    )
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="of the page (default 7860)")
    parser.add_argument(
        "--image", type=Path, action="append", default=[], metavar="FILE", help="in the terminal, a picture or video for the first question"
    )
    parser.add_argument("--compare", action="store_true", help="in the terminal, after each answer what the base would have said")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): the likeliest word each time")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest words of this share (default 1)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from vlm_dist.serving.answer import is_video, open_picture, open_video
    from vlm_dist.serving.chat import Chat

    if arguments.temperature < 0 or not 0 < arguments.top_p <= 1 or arguments.max_new_tokens < 1:
        raise ConfigError("chat: expected --temperature of 0 or more, --top-p between 0 and 1, --max-new-tokens of 1 or more")
    for path in arguments.image:  # before the model is loaded
        open_video(path) if is_video(path) else open_picture(path)
    drawn = {"do_sample": True, "temperature": arguments.temperature, "top_p": arguments.top_p} if arguments.temperature else {}
    opened = {"base_model": arguments.base_model, "system": arguments.system, "reasoning": arguments.reasoning}
    chat = Chat(arguments.source, arguments.max_new_tokens, **opened, **drawn)
    return _in_terminal(chat, arguments) if arguments.terminal else _on_page(chat, arguments)


def _on_page(chat: Any, arguments: argparse.Namespace) -> int:
    from vlm_dist.serving.chat_page import serve_page

    token = secrets.token_urlsafe(16)
    page = serve_page(chat, Path(arguments.source).name, host=arguments.host, port=arguments.port, token=token)
    print(f"http://{arguments.host}:{page.server_port}/?token={token}  (Ctrl-C ends it)", flush=True)
    page.block_thread()
    return 0


def _in_terminal(chat: Any, arguments: argparse.Namespace) -> int:
    for path in arguments.image:
        chat.show(path)
    compare = arguments.compare
    if compare and not chat.has_base:
        raise ConfigError(f"chat --compare: '{arguments.source}' has no adapter and is no run, so there is no base to compare with")
    if sys.stdin.isatty():
        print(HELP)
        if chat.system:
            print(f"system prompt: {chat.system}")
    while (line := _read()) is not None:
        command, _, rest = line.partition(" ")
        if command == "/quit":
            break
        if command == "/forget":
            chat.forget()
        elif command == "/image":
            try:
                chat.show(Path(rest.strip()).expanduser())
            except DataError as problem:
                print(problem)
        elif command == "/compare":
            compare = not compare and chat.has_base
            print(f"comparing with the base: {'on' if compare else 'off'}")
        elif line.startswith("/"):
            print(HELP)
        elif line:
            _say("", chat.ask(line))
            if compare:
                _say("base: ", chat.of_base())
    return 0


def _read() -> str | None:
    """A line; None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _say(before: str, pieces: Any) -> None:
    print(before, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
