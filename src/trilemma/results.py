"""What the store hands out and the report reads: frozen records of one study, and nothing else.

The report never sees the store, so that either can change without the other.
"""

from dataclasses import dataclass, field
from typing import Any

from trilemma.compression.step import Looks
from trilemma.compression.trial import Agreement
from trilemma.evaluation.measurement import Measurement
from trilemma.privacy.guarantee import Guarantee


@dataclass(frozen=True)
class Run:
    """One training that ended.

    Attributes:
        key: The training's key.
        configuration: Label of its configuration, shared by its seeds, such as "DP epsilon 8 + PGD 4/255".
        varied: Grid field -> label of its value, such as {"privacy": "DP epsilon 8", "defence": "none"}.
        seed: The study's seed.
        spec: The resolved TrainSpec as JSON.
        history: One dict per round: {"round", "loss", "val_accuracy", "bytes_up", "bytes_down", "seconds"} and others;
            docs/store.md has them all. Rounds of earlier versions lack some.
        guarantee: What may be claimed of its model.
        provenance: Versions, git revision, CPU flags, device, threads, as JSON.
        seconds: Wall time of the training, over all its resumptions; None where it would tell how many hospitals were
            drawn, which the guarantee of unit "client" takes for secret.
        peak_memory_bytes: Largest resident set of the process while it trained (on Linux; elsewhere since it
            began); None like `seconds`.
        num_parameters: Trainable parameters.
        chosen_round: The round that early stopping chose, counted from 1; None where none was chosen.
        labels: Field of the training -> label of its value, for what a report names: {"aggregation": "median"}.
        doubts: What its rule of aggregation cannot do in this training, a sentence each.
    """

    key: str
    configuration: str
    varied: dict[str, str]
    seed: int
    spec: dict[str, Any]
    history: list[dict[str, Any]]
    guarantee: Guarantee
    provenance: dict[str, Any]
    seconds: float | None
    peak_memory_bytes: int | None
    num_parameters: int
    chosen_round: int | None = None
    labels: dict[str, str] = field(default_factory=dict)
    doubts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Artefact:
    """A model as it would be shipped.

    Attributes:
        key: The artefact's key.
        run_key: The training it came from.
        compression: Label, such as "fp32" or "int8 (public calibration)".
        file_bytes: Size of the ONNX file.
        sparsity: Fraction of weights that are exactly zero, as achieved.
        guarantee: Inherited from the run, or void with the reason.
    """

    key: str
    run_key: str
    compression: str
    file_bytes: int
    sparsity: float
    guarantee: Guarantee


@dataclass(frozen=True)
class Evaluated:
    """The measurements of one artefact under one evaluation.

    Attributes:
        artefact_key: The artefact.
        evaluation: Label, such as "PGD-10 Linf".
        kind: As in the study file: "clean", "pgd" or another attack, "transfer", "all_at_once", "diagnostics", "cost".
        measurements: Every number.
        seconds: How long it took.
        strength: Of an attack, as in `evaluation.strength`: models are judged by the strongest; None for the others.
    """

    artefact_key: str
    evaluation: str
    kind: str
    measurements: tuple[Measurement, ...]
    seconds: float
    strength: int | None = None


@dataclass(frozen=True)
class Example:
    """One test image under attack, for the report: all images float32 in [0, 1], shape (C, H, W) as nested bytes.

    Attributes:
        artefact_key: The attacked artefact.
        title: Such as "PGD-10 Linf 4/255".
        clean_png: The clean image as PNG bytes.
        perturbation_png: The perturbation, scaled to be visible, as PNG bytes.
        adversarial_png: The adversarial image as PNG bytes.
        scale: By how much the perturbation was multiplied.
        truth: Name of the true class.
        clean_prediction: Predicted class and confidence on the clean image.
        adversarial_prediction: The same on the adversarial image.
    """

    artefact_key: str
    title: str
    clean_png: bytes
    perturbation_png: bytes
    adversarial_png: bytes
    scale: float
    truth: str
    clean_prediction: tuple[str, float]
    adversarial_prediction: tuple[str, float]


@dataclass(frozen=True)
class DataFacts:
    """What the study was run on.

    Attributes:
        name: The data set's name.
        source: Where it comes from and its licence.
        synthetic: True for generated images.
        classes: Class names in label order.
        positive_class: The class whose presence is 'disease' in two-class tables, or "" for more classes.
        num_records: Split -> number of records.
        majority_accuracy: Accuracy on the test split of always answering its most frequent class.
        clients: One row per client: {"client", "records", "patients", "classes": {name: count}}.
        warnings: What the user should know.
    """

    name: str
    source: str
    synthetic: bool
    classes: tuple[str, ...]
    positive_class: str
    num_records: dict[str, int]
    majority_accuracy: float
    clients: list[dict[str, Any]]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Results:
    """Everything that a report of one study needs.

    Attributes:
        name: The study's name.
        question: The question it asks.
        study_toml: The study file's text.
        seeds: The study's seeds.
        data: One entry per data set and partition that the study uses.
        runs: Every training of the study that ended.
        artefacts: Every artefact of those runs.
        evaluated: Every evaluation of those artefacts.
        examples: Images for the gallery.
        missing: Cells of the study that are not in the store yet, one phrase each.
        command: The command that reproduces it.
        environment: What the report was made on.
        public: One entry per data set that the study pretrains on.
    """

    name: str
    question: str
    study_toml: str
    seeds: tuple[int, ...]
    data: tuple[DataFacts, ...]
    runs: tuple[Run, ...]
    artefacts: tuple[Artefact, ...]
    evaluated: tuple[Evaluated, ...]
    examples: tuple[Example, ...] = ()
    missing: tuple[str, ...] = ()
    command: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    public: tuple[DataFacts, ...] = ()


@dataclass(frozen=True)
class Shipment:
    """Everything that a store tells of one artefact that ships.

    Attributes:
        results: Of its training, of itself and of whatever the store measured of it; its name is that of a study that
            asked for it, or "" where none that the store knows did.
        settings: What the training was made of, in the words of its specs: {"data": "phantom 64", ...}.
        compression: The resolved compression as JSON.
        studies: Names of the stored studies that ask for the artefact as they were last run.
        split: What it was measured on, "test" or "val".
        from_files: Whether the training's images came from image files by the loader whose resizing the shipped file
            repeats; else they had the model's size already.
        channels: Of the model's images, 1 or 3.
        image_size: Their height and width in pixels.
        classes: Class names in the order of the answers.
        preprocessing: What the shipped file does before the model, a sentence each.
        agreement: Of the shipped file with loader and artefact.
        file_bytes: Size of the shipped file.
        sent_bytes: Of the same as a zstandard file.
        measured_on: Label of an evaluation -> versions and machine, as JSON.
        looks: The images that the compression looked at.
    """

    results: Results
    settings: dict[str, str]
    compression: dict[str, Any]
    studies: tuple[str, ...]
    split: str
    from_files: bool
    channels: int
    image_size: int
    classes: tuple[str, ...]
    preprocessing: tuple[str, ...]
    agreement: Agreement
    file_bytes: int
    sent_bytes: int
    measured_on: dict[str, dict[str, Any]] = field(default_factory=dict)
    looks: tuple[Looks, ...] = ()
