"""What a study may say about its data and how they are divided."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from trilemma.data.cifar10 import load_cifar10
from trilemma.data.folder import load_folder
from trilemma.data.manifest import load_manifest
from trilemma.data.medmnist import load_medmnist
from trilemma.data.partition import by_site, dirichlet, iid, quantity
from trilemma.data.pcam import load_pcam
from trilemma.data.phantom import PhantomPlan, load_phantom
from trilemma.data.pneumonia import load_pneumonia
from trilemma.data.records import ON_VALIDATION, Dataset, Partition
from trilemma.data.roots import DataRoots
from trilemma.spec import Spec

Size = Annotated[int, Field(ge=8, le=1024)]
Mode = Literal["grey", "rgb"]
Fraction = Annotated[float, Field(gt=0, le=0.5)]
NumClients = Annotated[int, Field(ge=1, le=10_000)]
Share = Annotated[float, Field(gt=0, le=1e9)]  # far below where sums overflow, far above where it says anything
Divide = Callable[[Dataset, int], Partition]


class Source(Spec, ABC):
    """Base of every data set that a study may name.

    Attributes:
        evaluate_on: What evaluations measure on: "test", or "val" to choose settings without a look at the test images.
    """

    evaluate_on: Literal["test", "val"] = "test"

    @property
    def label(self) -> str:
        """Returns a short name for tables."""
        return self.title if self.evaluate_on == "test" else f"{self.title}, {ON_VALIDATION}"

    @property
    @abstractmethod
    def title(self) -> str:
        """Returns a short name of the source alone."""

    def load(self, roots: DataRoots) -> Dataset:
        """Returns the data set with the images to be measured on as its test split."""
        dataset = self.read(roots)
        return dataset if self.evaluate_on == "test" else dataset.evaluated_on_validation()

    @abstractmethod
    def read(self, roots: DataRoots) -> Dataset:
        """Returns the data set as its source has it."""


class Phantom(Source):
    """Procedural chest-radiograph phantoms; synthetic, and said to be so wherever they are shown.

    Attributes:
        size: Height and width in pixels.
        train: Number of training images.
        val: Number of validation images.
        test: Number of test images.
        sites: Number of hospitals, each with a scanner of its own.
        classes: 2 (normal, pneumonia) or 3 (normal, bacterial, viral).
        shift: How far the scanners differ: 0 one scanner for all, 1 clearly visible, up to 3.
        images_per_patient: Images of each patient, of equal anatomy and diagnosis.
        seed: Of the phantoms; independent of the study's seeds.
    """

    kind: Literal["phantom"] = "phantom"
    size: Annotated[int, Field(ge=16, le=1024)] = 64
    train: Annotated[int, Field(ge=1, le=1_000_000)] = 900
    val: Annotated[int, Field(ge=1, le=1_000_000)] = 150
    test: Annotated[int, Field(ge=1, le=1_000_000)] = 300
    sites: Annotated[int, Field(ge=1, le=100)] = 3
    classes: Literal[2, 3] = 3
    shift: Annotated[float, Field(ge=0, le=3)] = 1.0
    images_per_patient: Annotated[int, Field(ge=1, le=100)] = 1
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _enough(self) -> "Phantom":
        needed = self.sites * self.classes * self.images_per_patient
        if self.train < needed:
            raise ValueError(
                f"train = {self.train} images leave a site without some class: {self.sites} sites x {self.classes} "
                f"classes x {self.images_per_patient} images per patient need at least {needed}"
            )
        return self

    @property
    def title(self) -> str:
        """Returns a short name."""
        return f"phantom {self.size}"

    def read(self, roots: DataRoots) -> Dataset:
        """Returns the data set, rendered or from the cache."""
        return load_phantom(self.plan(), roots)

    def plan(self) -> PhantomPlan:
        """Returns which phantoms these are, for those who draw some of them."""
        return PhantomPlan(
            size=self.size,
            num_images=(self.train, self.val, self.test),
            num_sites=self.sites,
            num_classes=self.classes,
            shift=self.shift,
            images_per_patient=self.images_per_patient,
            seed=self.seed,
        )


class Medmnist(Source):
    """A 2-D set of MedMNIST v2, from `medmnist/` in the data folder, the cache or Zenodo.

    Attributes:
        name: The set; `chestmnist` is multi-label and read as 'no finding' against 'any finding'.
        size: Height and width in pixels.
    """

    kind: Literal["medmnist"] = "medmnist"
    name: Literal[
        "pathmnist",
        "chestmnist",
        "dermamnist",
        "octmnist",
        "pneumoniamnist",
        "retinamnist",
        "breastmnist",
        "bloodmnist",
        "tissuemnist",
        "organamnist",
        "organcmnist",
        "organsmnist",
    ]
    size: Literal[28, 64, 128, 224] = 28

    @property
    def title(self) -> str:
        """Returns a short name."""
        return f"{self.name} {self.size}"

    def read(self, roots: DataRoots) -> Dataset:
        """Returns the data set, downloaded if need be."""
        return load_medmnist(self.name, self.size, roots)


class Pneumonia(Source):
    """The paediatric chest X-rays of Kermany et al. (2018) in their published folder layout.

    Attributes:
        classes: 2 (normal, pneumonia) or 3 (normal, bacterial, viral).
        size: Height and width in pixels.
        folder: Where `train` and `test` are, relative to the data folder.
        mode: "grey" or "rgb".
        val_fraction: Share of train's patients, of each class, that validation gets.
    """

    kind: Literal["pneumonia"] = "pneumonia"
    classes: Literal[2, 3] = 3
    size: Size = 64
    folder: str = "chest_xray"
    mode: Mode = "grey"
    val_fraction: Fraction = 0.1

    @property
    def title(self) -> str:
        """Returns a short name."""
        return f"chest X-rays {self.size}, {self.classes} classes"

    def read(self, roots: DataRoots) -> Dataset:
        """Returns the data set, decoded or from the cache."""
        return load_pneumonia(self.folder, self.classes, self.size, self.mode, self.val_fraction, roots)


class Folder(Source):
    r"""The user's own images in `train|test/CLASS/*` (or `Training|Testing`), `val` too or made from train.

    Attributes:
        path: The folder, relative to the data folder or absolute.
        size: Height and width in pixels.
        mode: "grey" or "rgb".
        val_fraction: Share of train's patients, of each class, that validation gets where there is no `val`.
        patient: Regular expression with one group that finds the patient in a file's name (without its ending),
            such as "^(person\d+)_"; "" where names do not tell, then each image counts as a patient of its own.
    """

    kind: Literal["folder"] = "folder"
    path: Annotated[str, Field(min_length=1)]
    size: Size = 64
    mode: Mode = "grey"
    val_fraction: Fraction = 0.1
    patient: str = ""

    @field_validator("patient")
    @classmethod
    def _one_group(cls, pattern: str) -> str:
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"'{pattern}' is not a regular expression ({error})") from None
        if pattern and groups != 1:
            raise ValueError(f"'{pattern}' has {groups} groups, write exactly one around the patient: '^(person\\d+)_'")
        return pattern

    @property
    def title(self) -> str:
        """Returns a short name."""
        return f"{Path(self.path).name} {self.size}"

    def read(self, roots: DataRoots) -> Dataset:
        """Returns the data set, decoded or from the cache."""
        return load_folder(self.path, self.size, self.mode, self.val_fraction, self.patient, roots)


class Manifest(Source):
    """The user's own images listed in a CSV file: path, label and, if known, patient, site and split.

    Attributes:
        path: The CSV file, relative to the data folder or absolute; its image paths are relative to its own folder.
        size: Height and width in pixels.
        mode: "grey" or "rgb".
        val_fraction: Share of the patients, of each class, that validation gets where no row is marked `val`.
        test_fraction: The same for test where no row is marked `test`.
    """

    kind: Literal["manifest"] = "manifest"
    path: Annotated[str, Field(min_length=1)]
    size: Size = 64
    mode: Mode = "grey"
    val_fraction: Fraction = 0.1
    test_fraction: Fraction = 0.2

    @property
    def title(self) -> str:
        """Returns a short name."""
        return f"{Path(self.path).stem} {self.size}"

    def read(self, roots: DataRoots) -> Dataset:
        """Returns the data set, decoded or from the cache."""
        return load_manifest(self.path, self.size, self.mode, (self.val_fraction, self.test_fraction), roots)


class Cifar10(Source):
    """CIFAR-10 (Krizhevsky 2009), the published python or binary batches.

    Attributes:
        path: The folder with the batches, relative to the data folder or absolute.
        val_fraction: Share of train, of each class, that validation gets.
    """

    kind: Literal["cifar10"] = "cifar10"
    path: Annotated[str, Field(min_length=1)] = "cifar-10-batches-py"
    val_fraction: Fraction = 0.1

    @property
    def title(self) -> str:
        """Returns a short name."""
        return "CIFAR-10"

    def read(self, roots: DataRoots) -> Dataset:
        """Returns the data set."""
        return load_cifar10(self.path, self.val_fraction, roots)


class Pcam(Source):
    """PatchCamelyon (Veeling et al. 2018), the published HDF5 files.

    Attributes:
        path: The folder with the six files, relative to the data folder or absolute.
        max_records: At most so many records of each split, the first ones; None for all.
    """

    kind: Literal["pcam"] = "pcam"
    path: Annotated[str, Field(min_length=1)] = "pcam"
    max_records: Annotated[int, Field(ge=2)] | None = None

    @property
    def title(self) -> str:
        """Returns a short name."""
        return "PatchCamelyon" if self.max_records is None else f"PatchCamelyon, {self.max_records} per split"

    def read(self, roots: DataRoots) -> Dataset:
        """Returns the data set."""
        return load_pcam(self.path, self.max_records, roots)


DataSpec = Annotated[Phantom | Medmnist | Pneumonia | Folder | Manifest | Cifar10 | Pcam, Field(discriminator="kind")]


class Iid(Spec):
    """Patients dealt at random and evenly.

    Attributes:
        num_clients: Number of clients.
    """

    kind: Literal["iid"] = "iid"
    num_clients: NumClients

    @property
    def label(self) -> str:
        """Returns a short name for tables."""
        return f"iid, {_clients(self.num_clients)}"

    def make(self) -> Divide:
        """Returns the function that divides a data set."""
        return lambda dataset, seed: iid(dataset, self.num_clients, seed)


class Dirichlet(Spec):
    """Label skew: each class divided by shares from a Dirichlet distribution (Hsu et al. 2019).

    Attributes:
        num_clients: Number of clients.
        alpha: Concentration; the smaller, the more skewed.
    """

    kind: Literal["dirichlet"] = "dirichlet"
    num_clients: NumClients
    alpha: Share

    @property
    def label(self) -> str:
        """Returns a short name for tables."""
        return f"Dirichlet {self.alpha:g}, {_clients(self.num_clients)}"

    def make(self) -> Divide:
        """Returns the function that divides a data set."""
        return lambda dataset, seed: dirichlet(dataset, self.num_clients, self.alpha, seed)


class Quantity(Spec):
    """Clients of unlike size and like labels; give either `alpha` or `sizes`.

    Attributes:
        num_clients: Number of clients.
        alpha: Concentration of the Dirichlet distribution that the sizes are drawn from; the smaller, the less alike.
        sizes: Relative sizes, one per client, such as [5, 3, 1].
    """

    kind: Literal["quantity"] = "quantity"
    num_clients: NumClients
    alpha: Share | None = None
    sizes: tuple[Share, ...] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> "Quantity":
        if (self.alpha is None) == (self.sizes is None):
            raise ValueError("give either alpha (sizes are drawn) or sizes (one number per client), not both or none")
        if self.sizes is not None and len(self.sizes) != self.num_clients:
            raise ValueError(f"sizes has {len(self.sizes)} numbers for {self.num_clients} clients; give one per client")
        return self

    @property
    def label(self) -> str:
        """Returns a short name for tables."""
        if self.sizes is not None:
            return f"sizes {':'.join(f'{size:g}' for size in self.sizes)}"
        return f"quantity {self.alpha:g}, {_clients(self.num_clients)}"

    def make(self) -> Divide:
        """Returns the function that divides a data set."""
        return lambda dataset, seed: quantity(dataset, self.num_clients, self.alpha, self.sizes, seed)


class BySite(Spec):
    """One client per site of the data set.

    Attributes:
        num_clients: Number of sites; it must be the data set's, so that a study does not change unnoticed.
    """

    kind: Literal["by_site"] = "by_site"
    num_clients: NumClients

    @property
    def label(self) -> str:
        """Returns a short name for tables."""
        return f"by site, {_clients(self.num_clients)}"

    def make(self) -> Divide:
        """Returns the function that divides a data set; the seed makes no difference."""
        return lambda dataset, seed: by_site(dataset, self.num_clients)


PartitionSpec = Annotated[Iid | Dirichlet | Quantity | BySite, Field(discriminator="kind")]


def _clients(number: int) -> str:
    return "1 client" if number == 1 else f"{number} clients"
