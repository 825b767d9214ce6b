"""Processes of their own that begin with the heavy libraries imported: forks of a server that imports them once a session.

The same code runs as in a process started from nothing, with its own signals, output and exit code. That it also starts from nothing is
what tests/launch (each launcher), tests/test_wheel.py and the tests of imports in tests/house hold.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

PRELOADED = (
    "torch", "torchvision", "numpy", "PIL.Image", "transformers", "peft", "bitsandbytes", "deepspeed", "webdataset", "safetensors.torch",
    "transformers.models.llava.modeling_llava", "transformers.models.clip.modeling_clip", "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl", "transformers.models.auto.processing_auto", "vlm_dist.training.train",
    "vlm_dist.models.merge", "vlm_dist.models.patching", "vlm_dist.cli.main", "torch.utils.tensorboard._utils", "torch._dynamo",
)  # fmt: skip


class Warm:
    """One such process, used as subprocess.Popen is. Its output is text.

    Args:
        script: None: `vlm-dist`; a path: that script.
        merged: standard error goes where standard output goes.
    """

    def __init__(self, words: list[str], environment: dict[str, str], *, script: str | None = None, merged: bool = False):
        self._folder = tempfile.TemporaryDirectory(prefix="warm-")
        self._out, err = (os.path.join(self._folder.name, name) for name in ("out", "err"))
        self._err = None if merged else err
        words = [str(word) for word in words]
        context = multiprocessing.get_context("forkserver")
        self._process = context.Process(target=_run, args=(words, environment, script, self._out, self._err))
        self._process.start()
        self.pid: int = self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; what it wrote."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("warm process", timeout or 0, self._read(self._out), self._read(self._err))
        return self._read(self._out), self._read(self._err)

    def _read(self, path: str | None) -> str:
        return Path(path).read_text(errors="replace") if path and os.path.exists(path) else ""


def warm_ranks(number: int, script: str, *words: str, environment: dict[str, str]) -> list[Warm]:
    """The ranks of one group on this machine, each running the script."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]
    return [Warm(list(words), environment | group | place, script=script, merged=True) for place in places]


def prepare() -> None:
    """Before any process pool of the code under test starts the server."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(PRELOADED))


def _run(words: list[str], environment: dict[str, str], script: str | None, out: str, err: str | None) -> None:
    """In the new process."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    sys.stdout.flush()
    for path, numbers in ((out, (1,) if err else (1, 2)), (err, (2,))):
        if path:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for number in numbers:
                os.dup2(file, number)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code: int | str | None = 1
    try:
        if script is None:
            from vlm_dist.cli.main import main

            code = main(words)
        else:
            sys.argv = [script, *words]
            runpy.run_path(script, run_name="__main__")
            code = 0
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    atexit._run_exitfuncs()  # a fork of the server ends without them
    sys.exit(code)
