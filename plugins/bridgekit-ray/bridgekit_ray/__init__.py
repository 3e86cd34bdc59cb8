"""Encoding on a Ray cluster: `bridgekit encode --ray`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bridgekit_ray.encoding import OnCluster


def cluster() -> AbstractContextManager[OnCluster]:
    """See `bridgekit_ray.encoding.cluster`. Imported lazily because every run of `bridgekit` imports this module."""
    from bridgekit_ray import encoding

    return encoding.cluster()
