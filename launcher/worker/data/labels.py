"""Which number each class of a classification set has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from decompft.launcher.errors import DataError


def label_ids(
    train: Mapping[int | str, str], others: Mapping[int | str, str], num_labels: int
) -> tuple[dict[int | str, int], list[str] | None]:
    """(label as written -> class, names of the classes in order or None when they are numbers).

    Args:
        train: labels of the training sets -> where each was seen first; names are numbered in sorted order.
        others: the same of evaluation sets, which must bring no new one.

    Raises:
        DataError: numbers and names mixed, more classes than num_labels, or a label out of range.
    """
    numbers = [label for label in train if isinstance(label, int)]
    if numbers and len(numbers) < len(train):
        name = next(label for label in train if isinstance(label, str))
        raise DataError(
            f"{train[name]}: label {name!r} is a name, but other labels are numbers",
            "write all labels one way",
        )
    if numbers:
        for label, where in {**others, **train}.items():
            if not isinstance(label, int) or not 0 <= label < num_labels:
                raise DataError(
                    f"{where}: label {label!r} is outside 0..{num_labels - 1}",
                    "set model.num_labels to the number of classes",
                )
        return {label: int(label) for label in (*train, *others)}, None
    names = sorted(str(label) for label in train)
    if len(names) > num_labels:
        raise DataError(
            f"the training sets have {len(names)} classes ({_some(names)}), model.num_labels is {num_labels}",
            f"set model.num_labels: {len(names)}",
        )
    for label, where in others.items():
        if label not in train:
            raise DataError(f"{where}: label {label!r} does not occur in training", f"known: {_some(names)}")
    return {name: number for number, name in enumerate(names)}, names


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
