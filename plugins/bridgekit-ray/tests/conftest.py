"""The fixtures of bridgekit's own tests."""

from tests.conftest import own_cache, run  # noqa: F401
