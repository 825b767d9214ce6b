"""What must not be read by others is left out of all that a run writes or says: the one place that every writer uses.

`...` stands for what was left out: the user and password of an address, the values of its query, tokens by their form, and whatever is
named as a secret. Redacting twice changes nothing, so redacted forms can be compared.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

LEFT_OUT = "..."
_NAME = (
    r"(?:[\w.-]*[_.-])?(?:(?:api|access|account|secret|private|storage|shared)[_-]?key|secret|password|passwd|passphrase|pwd"
    r"|credentials?|signature|connection_?string|(?:access|api|auth|bearer|hf|hub|id|refresh|sas|secret|security|session|user|some)[_-]?token)"
    r"|token|sig|authorization|x-amz-(?:signature|credential|security-token)|aws_?access_?key_?id"
)
_SECRET_NAME = re.compile(rf"(?i)(?:--?)?(?:{_NAME})")
# (pattern, what takes its place), in order.
_FORMS = [
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.S), LEFT_OUT),
    (re.compile(r"(://)[^\s/?#'\"<>]{0,1000}@"), rf"\1{LEFT_OUT}@"),
    (re.compile(r"(://)[^\s/@:]{0,300}:(?!\d+/)[^\s@'\"<>]{0,300}@"), rf"\1{LEFT_OUT}@"),  # a password with / ? or #
    (re.compile(r"(://[^\s?#'\"<>]{0,2000}[?#])([^\s'\"<>`]+)"), lambda found: found[1] + _query(found[2])),
    (re.compile(r"(?i)\b(bearer|basic) [\w.~+/=-]{8,}"), rf"\1 {LEFT_OUT}"),
    (re.compile(rf"(?i)(?<![\w.-])({_NAME})=('[^']*'|\"[^\"]*\"|[^\s'\",;&)}}\]]+)"), rf"\1={LEFT_OUT}"),
    (re.compile(rf"(?i)(['\"])({_NAME})\1(\s*:\s*)(['\"])(?:(?!\4).)*\4"), rf"\1\2\1\3\4{LEFT_OUT}\4"),
    (
        re.compile(r"(?i)\b(password|passwd|passphrase|x-api-key|authorization)(\s*:\s*)(?!bearer |basic )['\"]?[^\s'\",;]+"),
        rf"\1\2{LEFT_OUT}",
    ),
    (
        re.compile(
            r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}|sk-[\w-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
            r"|glpat-[\w-]{16,}|(?:AKIA|ASIA)[A-Z0-9]{16}|xox[abeprs]-[\w-]{10,}|AIza[\w-]{35}|ya29\.[\w-]{20,}|npm_[A-Za-z0-9]{30,}"
            r"|pypi-[\w-]{20,}|dop_v1_[a-f0-9]{40,}|wandb_v\d_\w{20,}|nvapi-[\w-]{20,}|r8_[A-Za-z0-9]{30,}"
            r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)(?![A-Za-z0-9])"
        ),
        LEFT_OUT,
    ),
]
# Their values are left out wherever they stand.
_VARIABLES = (
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_KEY",
    "AZURE_STORAGE_SAS_TOKEN", "GITHUB_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "OPENAI_API_KEY",
    "RAY_AUTH_TOKEN", "WANDB_API_KEY",
)  # fmt: skip
_SHORTEST_VALUE = 12


def redacted(text: str) -> str:
    """The text without what must not be read by others."""
    for name in _VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= _SHORTEST_VALUE:
            text = text.replace(value, LEFT_OUT)
    for pattern, instead in _FORMS:
        text = pattern.sub(instead, text)
    return text


def redacted_tree(value: Any) -> Any:
    """The same of every text in lists and mappings; whatever text a mapping holds under the name of a secret is left out whole."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {
            redacted_tree(key): LEFT_OUT if isinstance(part, str) and part and is_secret_name(key) else redacted_tree(part)
            for key, part in value.items()
        }
    if isinstance(value, list | tuple):
        return [redacted_tree(part) for part in value]
    return value


def redacted_words(words: list[str]) -> list[str]:
    """The same of a command line, where a value may follow its option."""
    after_secret = [False, *(word.startswith("-") and is_secret_name(word) for word in words)]
    return [LEFT_OUT if hidden else redacted(word) for word, hidden in zip(words, after_secret, strict=False)]


def is_secret_name(name: object) -> bool:
    """Whether what has this name is a secret: `api_key`, `hf_token`, `password`; not `key` or `pad_token`."""
    return isinstance(name, str) and _SECRET_NAME.fullmatch(name) is not None


def lacks_secret(address: str) -> bool:
    """Whether something was left out of this address: it cannot be used."""
    return re.search(r"://\.\.\.@|://[^\s?#]*[?#](?:.*&)?[^=&]*=\.\.\.(?:&|$)", address) is not None


def _query(text: str) -> str:
    return re.sub(r"([^&;#=]+=)[^&#]*", rf"\1{LEFT_OUT}", text) if "=" in text else text


class RedactRecords(logging.Filter):
    """For a handler of the log."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redacted(record.getMessage()), ()
        if record.exc_info:
            record.exc_text = redacted("".join(traceback.format_exception(*record.exc_info)).rstrip("\n"))
        return True


class _RedactedStream:
    """A stream of text that writes what it is given redacted; in all else the stream that it stands for."""

    def __init__(self, stream: IO[str]):
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redacted(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stream)


@contextmanager
def redacted_screen() -> Iterator[None]:
    """Within it, what Python prints is redacted; the traceback of an error that leaves it, too."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_RedactedStream(stream) for stream in before)  # pyright: ignore[reportAttributeAccessIssue]
    sys.excepthook, threading.excepthook = _tell_traceback, _tell_thread
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def redact_log() -> None:
    """Whatever the log prints where no handler was set up is redacted. Calling it again changes nothing."""
    if logging.lastResort is not None and not any(isinstance(known, RedactRecords) for known in logging.lastResort.filters):
        logging.lastResort.addFilter(RedactRecords())


def _tell_traceback(kind: Any, error: Any, trace: Any) -> None:
    sys.stderr.write(redacted("".join(traceback.format_exception(kind, error, trace))))


def _tell_thread(told: threading.ExceptHookArgs) -> None:
    if told.exc_type is not SystemExit:
        _tell_traceback(told.exc_type, told.exc_value, told.exc_traceback)
