"""Identical images, found by a hash of their pixels: within a split, across splits, and under different labels."""

import hashlib
from collections import defaultdict
from itertools import combinations

from trilemma.data.records import Records


def digests(records: Records) -> list[bytes]:
    """Returns one 16-byte hash per record of its pixels, their shape and type."""
    header = f"{records.images_NCHW.shape[1:]}{records.images_NCHW.dtype.str}".encode()
    key = hashlib.blake2b(header).digest()
    return [hashlib.blake2b(image.tobytes(), digest_size=16, key=key).digest() for image in records.images_NCHW]


def duplicate_warnings(splits: dict[str, Records], digests_by_split: dict[str, list[bytes]]) -> list[str]:
    """Returns one sentence for each kind of duplication found, none for a clean set.

    Args:
        splits: Split name -> records, in the order train, val, test.
        digests_by_split: Split name -> what `digests` returned for it.
    """
    sentences = []
    for name, found in digests_by_split.items():
        if surplus := len(found) - len(set(found)):
            verb = "repeats" if surplus == 1 else "repeat"
            sentences.append(f"{_images(surplus)} of {name} {verb} another one there pixel for pixel.")
    for first, second in combinations(digests_by_split, 2):
        known = set(digests_by_split[first])
        if shared := [i for i, digest in enumerate(digests_by_split[second]) if digest in known]:
            example = splits[second].names_N[shared[0]]
            sentences.append(
                f"{_images(len(shared))} of {second} {'is' if len(shared) == 1 else 'are'} in {first} too, "
                f"pixel for pixel (record {example}): "
                f"results on {second} are a little too good."
            )
    return sentences + _conflicts(splits, digests_by_split)


def _conflicts(splits: dict[str, Records], digests_by_split: dict[str, list[bytes]]) -> list[str]:
    labels: dict[bytes, set[int]] = defaultdict(set)
    names: dict[bytes, list[str]] = defaultdict(list)
    for split, found in digests_by_split.items():
        for digest, label, name in zip(found, splits[split].labels_N, splits[split].names_N, strict=True):
            labels[digest].add(int(label))
            names[digest].append(f"{split} {name}")
    groups = [digest for digest, seen in labels.items() if len(seen) > 1]
    if not groups:
        return []
    example = " and ".join(names[groups[0]][:2])
    verb = (
        "1 group of identical images carries" if len(groups) == 1 else f"{len(groups)} groups of identical images carry"
    )
    return [f"{verb} more than one label ({example})."]


def _images(number: int) -> str:
    return "1 image" if number == 1 else f"{number} images"
