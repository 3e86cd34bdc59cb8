"""The fixtures of bridgekit's own tests, and the toy encoders with this plugin beside them."""

from __future__ import annotations

from collections.abc import Iterator

import bridgekit_subset
import pytest

from bridgekit.plugins import forget_plugins
from tests.conftest import no_reports, own_cache, run  # noqa: F401
from tests.toys import ToyPlugin, install


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The toy encoders and this plugin are all that is installed."""
    install(monkeypatch, ToyPlugin(), bridgekit_subset, names=["toy", "subset"])
    yield
    forget_plugins()
