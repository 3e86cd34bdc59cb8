"""The fixtures of bridgekit's own tests."""

from tests.conftest import no_reports, own_cache, run, toy  # noqa: F401
from tests.spoken_words import spoken_words  # noqa: F401
