"""The fixtures of bridgekit's own tests."""

from tests.conftest import esc10, own_cache, run  # noqa: F401
