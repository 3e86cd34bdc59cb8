"""The fixtures of bridgekit's own tests, and no network."""

from __future__ import annotations

import os

os.environ["HF_DATASETS_OFFLINE"] = "1"

from tests.conftest import no_reports, own_cache, run  # noqa: F401
