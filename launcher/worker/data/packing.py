"""How documents share rows: best-fit-decreasing bins, the same for the same lengths."""

from __future__ import annotations

from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of document indices; no bin holds more than `capacity` tokens.

    Best fit decreasing: the longest document first, each into the fullest bin that still takes it.
    Bins come ordered by their first document, and the documents of a bin by index.

    Args:
        lengths: tokens of each document, each at most capacity.
    """
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # free tokens -> bins, a stack each
    rooms = 0  # bit r is set when by_room[r] is not empty: the tightest fit is a bit trick away
    for document in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[document]
        assert 0 < length <= capacity, (document, length, capacity)
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(document)
        by_room[room - length].append(chosen)
        rooms |= 1 << (room - length)
    for documents in bins:
        documents.sort()
    return sorted(bins)
