"""The page of `vlm-dist chat`: pictures and videos, questions, and the trained model's answers beside its base's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm_dist.errors import DataError, MachineError
from vlm_dist.hosts import host_check
from vlm_dist.serving.chat import Chat
from vlm_dist.serving.guard import Guard

FILES = [".jpg", ".jpeg", ".png", ".webp", ".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif"]
LARGEST_UPLOAD = "200mb"
MOST_WAITING = 16
LONGEST_ANSWER = 2048  # tokens that the slider goes up to
CSS = """.gradio-container {max-width: min(1500px, 100%) !important; width: 100%; margin: 0 auto}
button[title="Share"], button[aria-label="Share"] {display: none !important}"""  # it would send the picture to a public site


def build_page(chat: Chat, name: str) -> Any:
    """A Gradio page. Each visitor has a conversation of their own; answers are generated one after another.

    Raises:
        MachineError: Gradio is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError:
        raise MachineError("chat: the page needs Gradio (pip install 'vlm_dist[chat]'); --terminal needs nothing") from None

    drawn = chat.options.get("temperature", 0.0)
    with gradio.Blocks(title=f"{name} - vlm_dist", analytics_enabled=False) as page:
        gradio.Markdown(f"## {name}")
        with gradio.Row():
            look = {"height": 460, "buttons": ["copy"], "scale": 1, "min_width": 300}
            trained = gradio.Chatbot(label="trained" if chat.has_base else "answers", elem_id="trained", **look)
            base = gradio.Chatbot(label="base", visible=False, elem_id="base", **look)
        question = gradio.MultimodalTextbox(
            file_types=FILES, file_count="multiple", sources=["upload"], show_label=False, elem_id="question",
            placeholder="A question; add pictures and videos with the button on the left", stop_btn=True,
        )  # fmt: skip
        with gradio.Row():
            compare = gradio.Checkbox(label="beside the base", value=False, visible=chat.has_base, elem_id="compare")
            forget = gradio.Button("New conversation", size="sm", elem_id="forget")
        with gradio.Accordion("Settings", open=False):
            temperature = gradio.Slider(0, 2, value=drawn, step=0.05, label="temperature", info="0: the likeliest word each time")
            top_p = gradio.Slider(0.05, 1, value=chat.options.get("top_p", 1.0), step=0.05, label="top p")
            longest = gradio.Slider(
                1, LONGEST_ANSWER, value=min(chat.max_new_tokens, LONGEST_ANSWER), step=1, label="longest answer, tokens"
            )
            system = gradio.Textbox(chat.system, label="system prompt", info="said before every conversation", lines=2, elem_id="system")
        session = gradio.State(None)
        answering = question.submit(
            _answer_of(chat), [question, trained, base, session, compare, temperature, top_p, longest, system],
            [trained, base, question, session],
            concurrency_limit=1, concurrency_id="model",
        )  # fmt: skip
        question.stop(None, cancels=[answering])
        for anew in (forget.click, trained.clear, base.clear):
            anew(lambda: ([], [], None), None, [trained, base, session], cancels=[answering])
        compare.change(lambda wanted: gradio.update(visible=wanted), compare, base)
    return page


def serve_page(chat: Chat, name: str, *, host: str, port: int, token: str | None = None) -> Any:
    """Start serving, and return the page; `page.block_thread()` waits for Ctrl-C. Requests that name another host are refused.

    Args:
        token: refuse requests without it, see `Guard`; None: none is asked for.

    Raises:
        MachineError: Gradio is not installed, or the port is taken.
    """
    page = build_page(chat, name)
    from starlette.middleware import Middleware

    guard = Middleware(Guard, is_ours=host_check(host), token=token)
    try:
        page.queue(max_size=MOST_WAITING, api_open=False).launch(
            server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, max_file_size=LARGEST_UPLOAD,
            footer_links=[], css=CSS, ssr_mode=False, mcp_server=False, enable_monitoring=False,
            app_kwargs={"middleware": [guard]},
        )  # fmt: skip
    except OSError:
        raise MachineError(f"chat: {host}:{port} cannot be listened on; give another --port") from None
    return page


def _answer_of(chat: Chat) -> Any:
    """The page's handler, on this model."""

    def answer(
        question: dict[str, Any], trained: list, base: list, session: Chat | None, compare: bool, temperature: float, top_p: float,
        longest: int, system: str | None = None,
    ) -> Iterator[tuple]:  # fmt: skip
        session = session or chat.another()
        session.max_new_tokens = int(longest)
        if system is not None:
            session.system = system.strip()
        session.options = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {}
        text, files = (question.get("text") or "").strip(), question.get("files") or []
        asked = [{"role": "user", "content": content} for content in [*({"path": file} for file in files), text]]
        cleared = {"text": "", "files": []}
        try:
            for file in files:
                session.show(Path(file))
        except DataError as problem:
            session.drop()
            yield [*trained, *asked, {"role": "assistant", "content": str(problem)}], base, cleared, session
            return
        if not text:
            session.drop()
            yield trained, base, question, session
            return
        said = ""
        for piece in session.ask(text):
            said += piece
            yield [*trained, *asked, {"role": "assistant", "content": said}], base, cleared, session
        trained = [*trained, *asked, {"role": "assistant", "content": said.strip() or "(nothing)"}]
        yield trained, base, cleared, session
        if compare:
            said = ""
            for piece in session.of_base():
                said += piece
                yield trained, [*base, *asked, {"role": "assistant", "content": said}], cleared, session
            yield trained, [*base, *asked, {"role": "assistant", "content": said.strip() or "(nothing)"}], cleared, session

    return answer
