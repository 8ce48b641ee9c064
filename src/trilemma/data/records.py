"""What every source yields and everything else reads: labelled images with their patients and sites."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Records:
    """Images of one split, held as they are stored (uint8 or float32, perhaps memory-mapped).

    Attributes:
        images_NCHW: uint8 in 0..255 or float32 in [0, 1].
        labels_N: int64 class indices.
        patients_N: int64 patient codes, unique within the data set; -1 where no patient is known.
        sites_N: int64 index into the data set's `sites`; 0 everywhere where only one is known.
        names_N: what to call a record in a message: a relative path or an index.
    """

    images_NCHW: np.ndarray
    labels_N: np.ndarray
    patients_N: np.ndarray
    sites_N: np.ndarray
    names_N: np.ndarray

    def __len__(self) -> int:
        return len(self.labels_N)

    def x(self, index: Sequence[int] | np.ndarray | slice = slice(None)) -> Tensor:
        """Returns images as float32 in [0, 1], shape (B, C, H, W)."""
        chosen = np.ascontiguousarray(self.images_NCHW[index])
        if chosen.dtype == np.uint8:
            return torch.from_numpy(chosen).to(torch.float32).div_(255.0)
        return torch.from_numpy(chosen.astype(np.float32, copy=chosen.base is not None))

    def y(self, index: Sequence[int] | np.ndarray | slice = slice(None)) -> Tensor:
        """Returns labels as int64, shape (B,)."""
        return torch.from_numpy(np.ascontiguousarray(self.labels_N[index]))

    def subset(self, index: np.ndarray) -> "Records":
        """Returns the records at integer positions `index`, in that order."""
        return Records(
            self.images_NCHW[index],
            self.labels_N[index],
            self.patients_N[index],
            self.sites_N[index],
            self.names_N[index],
        )

    def units(self) -> np.ndarray:
        """Returns one int64 code per record: its patient, or a code of its own where the patient is unknown."""
        own = self.patients_N.max(initial=-1) + 1 + np.arange(len(self))
        return np.where(self.patients_N >= 0, self.patients_N, own)


def concatenate(parts: Sequence[Records]) -> Records:
    """Returns the records of all parts in order; uint8 and float32 images mix as float32."""
    if len(parts) == 1:
        return parts[0]
    images = [part.images_NCHW for part in parts]
    if len({part.dtype for part in images}) > 1:
        images = [part.x().numpy() for part in parts]
    return Records(
        np.concatenate(images),
        np.concatenate([part.labels_N for part in parts]),
        np.concatenate([part.patients_N for part in parts]),
        np.concatenate([part.sites_N for part in parts]),
        np.concatenate([part.names_N for part in parts]),
    )


#: Said of a data set whose validation images stand in for its test images.
ON_VALIDATION = "measured on validation"


@dataclass(frozen=True)
class Dataset:
    """Three splits of labelled images, as a source yields them.

    Attributes:
        name: Short name for titles, such as "pneumoniamnist 28".
        classes: Class names in label order.
        sites: Site names in code order; one name where sites are unknown.
        synthetic: True for generated images; said wherever they are shown.
        source: Where the images come from and their licence, one sentence.
        fingerprint: Hash of every image and label; a store refuses to mix two.
        warnings: What the user should know (duplicates across splits ...), one sentence each.
        unseen: The test images where the validation images are measured on in their place: not to be looked at, and
            nothing that is called public may hold one of them. None where `test` is the test split.
    """

    name: str
    classes: tuple[str, ...]
    sites: tuple[str, ...]
    train: Records
    val: Records
    test: Records
    synthetic: bool
    source: str
    fingerprint: str
    warnings: tuple[str, ...] = ()
    unseen: Records | None = None

    @property
    def channels(self) -> int:
        """Returns the number of image channels: 1 or 3."""
        return int(self.train.images_NCHW.shape[1])

    @property
    def image_size(self) -> int:
        """Returns the height, which is the width."""
        return int(self.train.images_NCHW.shape[2])

    def evaluated_on_validation(self) -> "Dataset":
        """Returns the data set with its validation images in the place of its test images, and says so."""
        return replace(
            self,
            name=f"{self.name}, {ON_VALIDATION}",
            test=self.val,
            unseen=self.test,
            warnings=(
                *self.warnings,
                "Measured on the validation images, which are called test here; other notes on test are about images "
                "not used.",
            ),
        )


@dataclass(frozen=True)
class Partition:
    """Which client holds which record.

    Attributes:
        clients: Client names.
        train: For each client the positions in `Dataset.train`, ascending; disjoint, and so are their patients.
        test_client_N: For each test record the client whose patients it is like, for per-client metrics.
    """

    clients: tuple[str, ...]
    train: tuple[np.ndarray, ...]
    test_client_N: np.ndarray
