"""Encoding on a Ray cluster: `bridgekit encode --ray`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridgekit_ray.encoding import OnCluster
    from bridgekit_ray.streaming import ClusterTable


def cluster() -> AbstractContextManager[OnCluster]:
    """See `bridgekit_ray.encoding.cluster`. Imported lazily because every run of `bridgekit` imports this module."""
    from bridgekit_ray import encoding

    return encoding.cluster()


def open_on_cluster(source: object, columns: Mapping[str, str]) -> ClusterTable | None:
    """See `bridgekit_ray.streaming.open_on_cluster`."""
    from bridgekit_ray import streaming

    return streaming.open_on_cluster(source, columns)


def encode_on_cluster(*arguments: Any) -> Any:
    """See `bridgekit_ray.streaming.encode_on_cluster`."""
    from bridgekit_ray import streaming

    return streaming.encode_on_cluster(*arguments)
