"""Find pictures that occur more than once: identical files, and those that differ by size or compression."""

from collections import defaultdict
from collections.abc import Iterable, Iterator

import numpy as np
import torch

CELLS = 256  # of brightness at the start of a fingerprint; the rest are colours
# How far the fingerprints of the same picture are apart, at most, of 255. Compressed as JPEG of quality 60, 95 % of
# drawings stay below; eyes or hair that differ are above.
MEAN_BRIGHTNESS, ANY_BRIGHTNESS, ANY_COLOUR = 2.5, 9, 8
MOST_SQUARED = 384 * 4.0**2  # of all their differences
BLOCK = 1 << 25  # comparisons at a time

# Shapes: P pictures, F values of a fingerprint


def groups_of(pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Join pairs into groups: sorted lists of at least two numbers, in the order of their first."""
    parent: dict[int, int] = {}

    def root(number: int) -> int:
        while parent.setdefault(number, number) != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    for one, other in pairs:
        parent[max(root(one), root(other))] = min(root(one), root(other))
    members: dict[int, list[int]] = defaultdict(list)
    for number in sorted(parent):
        members[root(number)].append(number)
    return sorted(members.values())


def identical(digests: list[bytes]) -> Iterator[tuple[int, int]]:
    """Pairs of files with the same content, each with the first of its kind; empty digests are left out."""
    first: dict[bytes, int] = {}
    for number, digest in enumerate(digests):
        if digest and first.setdefault(digest, number) != number:
            yield first[digest], number


def similar(fingerprints: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs of pictures that look the same, apart from their size and compression.

    Args:
        fingerprints: (P, F) uint8, from `survey.fingerprint`.

    Returns:
        An iterator over pairs of numbers, the smaller one first.
    """
    brightness = fingerprints[:, :CELLS].mean(axis=1)
    order = np.argsort(brightness, kind="stable")
    brightness, values = brightness[order], torch.from_numpy(fingerprints[order].astype(np.float32))
    squares, first = values.square().sum(dim=1), 0
    while first < len(values):
        # Pictures that look the same are nearly as bright, so only neighbours in this order are compared.
        size = max(1, min(BLOCK // len(values), 2048))
        last = int(
            np.searchsorted(brightness, brightness[min(first + size, len(values)) - 1] + MEAN_BRIGHTNESS, "right")
        )
        block = values[first : first + size]
        distances = squares[first : first + size, None] + squares[None, first:last] - 2 * block @ values[first:last].T
        for one, other in (distances <= MOST_SQUARED).nonzero().tolist():
            numbers = int(order[first + one]), int(order[first + other])
            if one < other and is_same(fingerprints[numbers[0]], fingerprints[numbers[1]]):
                yield min(numbers), max(numbers)
        first += size


def is_same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two fingerprints (F,) are of the same picture."""
    difference = np.abs(one.astype(np.int16) - other)
    bright, colour = difference[:CELLS], difference[CELLS:]
    return bright.mean() <= MEAN_BRIGHTNESS and bright.max() <= ANY_BRIGHTNESS and colour.max() <= ANY_COLOUR
