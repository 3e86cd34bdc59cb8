"""Labels of charts: names short enough for their place, and places on the map where none overlaps another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from unicodedata import east_asian_width

import numpy as np
from numpy.typing import NDArray

#: Maximum width of a label on a heat map, in em.
LABEL = 20.0
#: A beginning that all names share is left out if it is at least this long.
SHARED = 8

#: Width and height of a label.
Size = tuple[float, float]


def place_labels(points: NDArray[np.float64], sizes: Mapping[int, Size], most: int, gap: float, side: float) -> dict[int, Size]:
    """Choose points all over a square map and a free place beside each for its label.

    Arguments:
        points: (n, 2), the places of all points, from the left and from the top.
        sizes: index of a point that may have a label to the label's width and height.
        most: maximum number of labels.
        gap: distance between a point and its label.
        side: side of the map, outside which no label may reach.

    Returns:
        index of each chosen point to the left and top of its label.
    """
    boxes = np.empty((0, 4))
    placed: dict[int, Size] = {}
    for index in _spread(points, sorted(sizes)):
        best, fewest = None, len(points) + 1
        for box in _places(points[index], sizes[index], gap):
            inside = box[:2].min() >= 0 and box[2:].max() <= side
            free = inside and not ((boxes[:, :2] < box[2:]) & (boxes[:, 2:] > box[:2])).all(1).any()
            hidden = int(((points > box[:2]) & (points < box[2:])).all(1).sum()) if free else fewest
            if hidden < fewest:
                best, fewest = box, hidden
        if best is not None:
            boxes = np.vstack([boxes, best + np.array([-gap, -gap, gap, gap]) / 2])
            placed[index] = (float(best[0]), float(best[1]))
            if len(placed) == most:
                break
    return placed


def _spread(points: NDArray[np.float64], candidates: list[int]) -> Iterator[int]:
    """The candidates, each as far as possible from all earlier ones. The first is the one nearest to the middle of the map."""
    if not candidates:
        return
    places = points[candidates]
    distance = -np.linalg.norm(places - places.mean(0), axis=1)
    left = np.ones(len(candidates), dtype=bool)
    for number in range(len(candidates)):
        chosen = int(np.where(left, distance, -np.inf).argmax())
        left[chosen] = False
        yield candidates[chosen]
        nearer = np.linalg.norm(places - places[chosen], axis=1)
        distance = nearer if number == 0 else np.minimum(distance, nearer)


def _places(point: NDArray[np.float64], size: Size, gap: float) -> list[NDArray[np.float64]]:
    """Boxes (left, top, right, bottom) to the right of a point, to the left, above and below."""
    (x, y), (width, height) = point.tolist(), size
    corners = [
        (x + gap, y - height / 2),
        (x - gap - width, y - height / 2),
        (x - width / 2, y - gap - height),
        (x - width / 2, y + gap),
    ]
    return [np.array([left, top, left + width, top + height]) for left, top in corners]


def short_labels(names: Sequence[str], width: float = LABEL) -> list[str]:
    """Names cut to a width in em, such that different names stay different where that is possible.

    If some are too long, a beginning that all share is left out. What is still too long loses its end, or its middle if several
    would look the same without their ends.
    """
    distinct = set(names)
    start = _shared_start(min(names), max(names)) if len(distinct) > 1 else 0
    if start >= SHARED and any(text_width(name) > width for name in distinct):
        rest = {name: f"…{name[start:]}" for name in distinct}
    else:
        rest = {name: name for name in distinct}
    short = {name: _cut(rest[name], width, 0) for name in distinct}
    seen = Counter(short.values())
    return [short[name] if seen[short[name]] == 1 else _cut(rest[name], width, len(rest[name])) for name in names]


def _shared_start(one: str, other: str) -> int:
    """The length of the beginning that two names share, to the end of a word."""
    same = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return 1 + max(one.rfind(mark, 0, same) for mark in " _-/.")


def _cut(name: str, width: float, ending: int) -> str:
    """A name without its end, or, with up to `ending` characters of its end, without its middle."""
    if text_width(name) <= width:
        return name
    start = end = 0
    while text_width(name[: start + 1] + "…" + name[len(name) - end :]) <= width:
        start, end = (start, end + 1) if end < min(start, ending) else (start + 1, end)
    return f"{name[:start].rstrip(' ,;')}…{name[len(name) - end :].lstrip()}"


def text_width(text: str) -> float:
    """The approximate width of a text in em, in a wide sans-serif font."""
    return sum(map(_character_width, text))


def _character_width(character: str) -> float:
    if east_asian_width(character) in "WF" or character in "mwMW@%—…":
        return 1
    return 0.36 if character in "iljtf .,:;'|!" else 0.76 if character.isupper() else 0.62
