"""`bridgekit index` in processes that start at once and can be killed: forks of one that has only imported what they need.

The tests' own process is not forked: it has used LanceDB, and a fork has its locks but not the threads that hold them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import bridgekit_index
import pytest
from bridgekit_index import index as module

from bridgekit.cli import main
from tests.shared import PATIENCE
from tests.toys import ToyPlugin, install

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["bridgekit.cli", "bridgekit_index.index", "lancedb"])


def start(arguments: Sequence[object], home: Path, log: Path, before: str | None = None) -> BaseProcess:
    """Run the command line with the toy encoders, in blocks of 16 texts that are written one by one.

    Arguments:
        arguments: of `bridgekit`.
        home: its latent store.
        log: the file that it prints to.
        before: a text before which it stops until it is killed or interrupted.
    """
    process = _context.Process(target=_run, args=(list(map(str, arguments)), str(home), str(log), before))
    process.start()
    return process


def stop_forking() -> None:
    """End the process that they are forks of, and wait for it, so that its time is counted as the tests' own."""
    from multiprocessing import forkserver

    forkserver._forkserver._stop()  # type: ignore[attr-defined]


def _run(arguments: list[str], home: str, log: str, before: str | None) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["BRIDGEKIT_HOME"] = home
    install(pytest.MonkeyPatch(), ToyPlugin(), bridgekit_index, names=["toy", "index"])
    module.BLOCK, module.COMMIT_SECONDS = {"text": 16}, 0.0
    encode = module.encode_items

    def encode_items(encoder: Any, items: Sequence[Any], **options: Any) -> Any:
        if before in items:
            time.sleep(PATIENCE)
        return encode(encoder, items, **options)

    module.encode_items = encode_items
    sys.argv = ["bridgekit", *arguments]
    main()
