"""What each hospital of a study holds, and what makes two runs of a training one release: what a budget is spent on."""

import hashlib
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

import trilemma
from trilemma.data.records import Dataset, Records
from trilemma.data.specs import DataSpec
from trilemma.errors import UserError
from trilemma.federation.clients import refuse_unknown_patients
from trilemma.federation.root import root_spec
from trilemma.privacy.guarantee import Unit
from trilemma.privacy.specs import DpSgd
from trilemma.spec import content_key
from trilemma.study.plan import Plan, Training
from trilemma.study.provenance import provenance
from trilemma.study.workplace import Workplace

#: (data set, positions of a hospital's records, unit) -> their fingerprint, and (key of a data spec, root) -> that of
#: all its images: a study asks for each many times.
_FINGERPRINTS: dict[tuple[str | bytes, ...], str] = {}

#: Beginnings of the environment variables by which PyTorch's libraries choose how they add up on a CPU.
_KERNEL_SETTINGS = ("ATEN_", "DNNL_", "MKL_", "ONEDNN_", "OPENBLAS_")


@dataclass(frozen=True)
class Holding:
    """What a hospital holds for a training.

    Attributes:
        owner: The hospital.
        fingerprint: Of its training images and their labels, in whatever order; for unit "patient" also of which of
            them are one patient's.
        num_units: How many units of the training's kind they are.
    """

    owner: str
    fingerprint: str
    num_units: int


def study_holdings(plan: Plan, place: Workplace) -> tuple[Unit, list[Holding]]:
    """Returns the unit of a study's private trainings and what each hospital holds, the same in all of them.

    Raises:
        UserError: If it protects no unit or several, or a hospital holds other images from one training to the next.
    """
    private = [training for training in plan.trainings if isinstance(training.spec.privacy, DpSgd)]
    privacies = [training.spec.privacy for training in private]
    units: set[Unit] = {privacy.unit for privacy in privacies if isinstance(privacy, DpSgd)}
    if len(units) != 1:
        problem = f"protects several units ({', '.join(sorted(units))})" if units else "trains nothing with privacy"
        raise UserError(plan.study.name, problem, "A book counts for one unit: keep to the trainings of one")
    first: dict[str, tuple[Holding, Training]] = {}
    for training in private:
        for holding in training_holdings(training, place.dataset(training.spec.data)):
            known, earlier = first.setdefault(holding.owner, (holding, training))
            if known.fingerprint != holding.fingerprint:
                raise UserError(
                    f"'{holding.owner}'",
                    f"holds other images in '{training.title}' than in '{earlier.title}', and a book counts for a "
                    "hospital whose images are its own",
                    'Use one seed and one data set, or a partition that no seed deals anew: { kind = "by_site" }',
                )
    return units.pop(), [holding for holding, _ in first.values()]


def training_holdings(training: Training, dataset: Dataset) -> list[Holding]:
    """Returns what each hospital of a private training holds, in the partition's order.

    Raises:
        UserError: If patients are to be protected that the data do not name.
    """
    spec = training.spec
    assert isinstance(spec.privacy, DpSgd)
    if spec.privacy.unit == "patient":
        refuse_unknown_patients(dataset)
    partition = spec.partition.make()(dataset, spec.seed)
    held = []
    for owner, index in zip(partition.clients, partition.train, strict=True):
        numbers = {
            "example": len(index),
            "patient": len(np.unique(dataset.train.patients_N[index])),
            "client": len(partition.clients),
        }
        held.append(Holding(owner, _fingerprint(dataset, index, spec.privacy.unit), numbers[spec.privacy.unit]))
    return held


def _fingerprint(dataset: Dataset, index: np.ndarray, unit: Unit) -> str:
    name = (dataset.fingerprint, index.tobytes(), unit)
    if name not in _FINGERPRINTS:
        _FINGERPRINTS[name] = records_fingerprint(dataset.train.subset(index), unit)
    return _FINGERPRINTS[name]


def records_fingerprint(records: Records, unit: Unit) -> str:
    """Returns a hash of images and labels that does not depend on the records' order.

    For unit "patient" it tells also which records are one patient's, whatever the patients' codes: a book that counts
    patients counts for other ones where images are grouped anew.
    """
    kind = f"{records.images_NCHW.dtype} {records.images_NCHW.shape[1:]}"
    hashes = [
        _digest(np.ascontiguousarray(image).tobytes() + str(label).encode())
        for image, label in zip(records.images_NCHW, records.labels_N.tolist(), strict=True)
    ]
    if unit == "patient":
        kind += " by patient"
        groups: dict[int, list[bytes]] = {}
        for code, record in zip(records.patients_N.tolist(), hashes, strict=True):
            groups.setdefault(code, []).append(record)
        hashes = [_digest(b"".join(sorted(group))) for group in groups.values()]
    return _digest(kind.encode() + b"".join(sorted(hashes))).hex()


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def release_of(place: Workplace, training: Training, dataset: Dataset) -> str | None:
    """Returns what two runs with seeded noise have in common whose results are equal to the last bit.

    Without that they would be two releases with the same noise, whose difference has none. On CUDA it is None, for
    nothing makes sure that results repeat themselves: where an operation has no deterministic form, it runs all the
    same.
    """
    if place.torch_device.type == "cuda":
        return None
    machine = {**provenance(place.torch_device), "threads": place.threads, "git_revision": "", "cores": 0}
    public = _public_fingerprint(place, training)
    return content_key(training.key, dataset.fingerprint, public, _code(), machine, _kernels())


def _kernels() -> dict[str, str]:
    """Returns what decides, beside the machine and the number of threads, in which order PyTorch adds up on a CPU.

    Two runs that differ in this get other weights from the same noise.
    """
    chosen = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(_KERNEL_SETTINGS) and not name.endswith("_NUM_THREADS")
    }
    return {**chosen, "capability": torch.backends.cpu.get_cpu_capability(), "build": torch.__config__.show()}


def _public_fingerprint(place: Workplace, training: Training) -> str:
    """Returns that of the public images that a training uses: other ones give another model."""
    spec, rule = training.spec, root_spec(training.spec)
    sources = [spec.pretraining.data if spec.pretraining else None, rule.data if rule else None]
    return " ".join(_data_fingerprint(place, data) for data in sources if data is not None)


def _data_fingerprint(place: Workplace, data: DataSpec) -> str:
    name = (data.key, str(place.roots.data).encode())
    if name not in _FINGERPRINTS:
        _FINGERPRINTS[name] = data.load(place.roots).fingerprint
    return _FINGERPRINTS[name]


@lru_cache(maxsize=1)
def _code() -> str:
    folder, digest = Path(trilemma.__file__).parent, hashlib.blake2b(digest_size=16)
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
