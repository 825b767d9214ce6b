"""pytest -p tests.pretended.plugin: the tests marked gpu on a card that is not there; $LAUNCHED gets what was launched."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from tests.pretended.card import pretended_card
from tests.pretended.launches import Launches, pretended_launches

_open = contextlib.ExitStack()
_launches: list[Launches] = []


def pytest_configure(config) -> None:
    _open.enter_context(pretended_card())
    _launches.append(_open.enter_context(pretended_launches()))


def pytest_unconfigure(config) -> None:
    found = sorted({(launch.kernel, *(kind for _, kind in launch.signature)) for launches in _launches for launch in launches})
    Path(os.environ["LAUNCHED"]).write_text(json.dumps(found))
    _open.close()
