"""What is known of a study's data before anything is trained on them."""

from typing import Any

from trilemma.attacks.evasion.attack import Attack
from trilemma.data.records import Dataset
from trilemma.data.specs import DataSpec
from trilemma.data.summary import client_rows
from trilemma.errors import Failure, UserError
from trilemma.evaluation.metrics import majority_class
from trilemma.evaluation.specs import Backdoor, Transfer
from trilemma.federation.early_stopping import looks_at_public
from trilemma.federation.pretraining import refuse_unfit
from trilemma.federation.root import root_images, root_spec
from trilemma.federation.specs import TrainSpec
from trilemma.federation.training import prepare
from trilemma.results import DataFacts
from trilemma.robustness.specs import AdversarialTraining
from trilemma.spec import content_key
from trilemma.study.compress_job import refuse_unfit as refuse_unfit_for_compression
from trilemma.study.plan import Cell, Plan, Training
from trilemma.study.store import Store
from trilemma.study.workplace import Workplace


def preflight(plan: Plan, store: Store, place: Workplace) -> None:
    """Prepares every training once without training it, and notes what the data are.

    Raises:
        UserError: If data, model and settings do not go together.
        Failure: If the data have changed since the store's trainings.
    """
    prepare_all(plan, place)
    for training in plan.trainings:
        dataset = place.dataset(training.spec.data)
        _note(store, facts_key(training), data_facts(training, dataset), dataset, training.spec.data)
    for public, purpose in public_data(plan).items():
        dataset = public.load(place.roots)
        _note(store, public_key(public), public_facts(dataset, purpose), dataset, public)


def prepare_all(plan: Plan, place: Workplace) -> None:
    """Prepares every training: the hospitals of another seed's partition may not suit a privacy setting.

    Pretraining is not done, only its images are looked at.

    Raises:
        UserError: If data, model and settings do not go together.
    """
    for training in plan.trainings:
        dataset = place.dataset(training.spec.data)
        prepare(training.spec, dataset, place.torch_device)
        for attack in (*_evaluated_attacks(plan), *_training_attacks(training.spec)):
            attack.check(len(dataset.classes))
        for backdoor in (spec for spec in plan.evaluations if isinstance(spec, Backdoor)):
            _refuse_unfit_backdoor(backdoor, dataset)
    for cell in plan.cells:
        _refuse_calibration_on_measured(cell)
    uses = dict.fromkeys(
        (t.spec.data, t.spec.pretraining.data, looks_at_public(t.spec)) for t in plan.trainings if t.spec.pretraining
    )
    for data, public, looked_at in uses:
        refuse_unfit(place.dataset(data), public.load(place.roots), looked_at)
    seen = dict.fromkeys((cell.training.spec.data, public) for cell in plan.cells for public in _seen(cell))
    for data, public in seen:
        refuse_unfit_for_compression(place.dataset(data), public.load(place.roots))
    rooted = {(t.spec.data, rule): t.spec for t in plan.trainings if (rule := root_spec(t.spec)) and rule.data}
    for (data, rule), spec in rooted.items():
        root_images(spec, place.dataset(data), rule.data.load(place.roots) if rule.data else None)


def _evaluated_attacks(plan: Plan) -> list[Attack]:
    """Returns the attacks that are made on finished models."""
    made = [spec.attack if isinstance(spec, Transfer) else spec for spec in plan.evaluations]
    return [spec for spec in made if isinstance(spec, Attack)]


def _training_attacks(spec: TrainSpec) -> list[Attack]:
    """Returns the attacks that are made while a model is trained."""
    defences = [spec.defence, *([spec.pretraining.defence] if spec.pretraining else [])]
    attacks: list[Attack] = [defence.attack for defence in defences if isinstance(defence, AdversarialTraining)]
    looks = spec.early_stopping.attack if spec.early_stopping else None
    return attacks + ([looks] if looks is not None else [])


def _refuse_unfit_backdoor(spec: Backdoor, dataset: Dataset) -> None:
    if spec.target >= len(dataset.classes):
        raise UserError(
            "evaluations.target",
            f"{spec.target} is no class of {dataset.name}, which has {len(dataset.classes)}, numbered from 0",
            f"Choose one of {', '.join(dataset.classes)} by its number",
        )
    try:
        spec.trigger.mark(dataset.image_size)
    except ValueError as error:
        raise UserError("evaluations.trigger", str(error), "Use a smaller trigger") from None


def _refuse_calibration_on_measured(cell: Cell) -> None:
    chosen = {looks.source for looks in cell.compression.looks}
    if "val" in chosen and cell.training.spec.data.evaluate_on == "val":
        raise UserError(
            f"compressions, {cell.compression.label}",
            "'val' chooses numbers of the model on the very images that evaluate_on = 'val' measures",
            "Use 'public' or 'train' images, or measure on the test images",
        )


def public_data(plan: Plan) -> dict[DataSpec, str]:
    """Returns the public images that a study uses, each source once, and what for."""
    purposes: dict[DataSpec, list[str]] = {}
    for spec in (training.spec for training in plan.trainings):
        if spec.pretraining is not None:
            purposes.setdefault(spec.pretraining.data, []).append("for pretraining")
        rule = root_spec(spec)
        if rule is not None and rule.data is not None:
            purposes.setdefault(rule.data, []).append("for the server's own update")
    for data in (data for cell in plan.cells for data in _seen(cell)):
        purposes.setdefault(data, []).append("for compression")
    return {data: " and ".join(dict.fromkeys(named)) for data, named in purposes.items()}


def _seen(cell: Cell) -> list[DataSpec]:
    """Returns the public images that a compression names."""
    return [looks.data for looks in cell.compression.looks if looks.data is not None]


def facts_key(training: Training) -> str:
    """Returns the key of what is known of a training's data: its source, its partition, and the seed."""
    spec = training.spec
    return content_key(spec.data.model_dump(mode="json"), spec.partition.model_dump(mode="json"), spec.seed)


def public_key(data: DataSpec) -> str:
    """Returns the key of what is known of public images."""
    return content_key("pretraining", data.model_dump(mode="json"))


def _note(store: Store, key: str, facts: DataFacts, dataset: Dataset, spec: DataSpec) -> None:
    """Stores what is known of a data set, or refuses one that is not what it was."""
    known = store.facts(key)
    seen = {known[1] if known else None, store.data_fingerprint(spec.model_dump(mode="json"))}
    if seen - {None, dataset.fingerprint}:
        raise Failure(
            dataset.name,
            "the images or labels have changed since this store was made, so old and new numbers would not compare",
            "Put the data back, or name another folder with --store",
        )
    if known is None:
        store.add_facts(key, facts, dataset.fingerprint)


def data_facts(training: Training, dataset: Dataset) -> DataFacts:
    """Returns what a report says about a training's data."""
    partition = training.spec.partition.make()(dataset, training.spec.seed)
    name = f"{dataset.name}, {training.spec.partition.label}, seed {training.spec.seed}"
    return _facts(dataset, name, client_rows(dataset, partition))


def public_facts(dataset: Dataset, purpose: str) -> DataFacts:
    """Returns what the store notes about public images, which no hospital holds."""
    return _facts(dataset, f"{dataset.name}, {purpose}", [])


def _facts(dataset: Dataset, name: str, clients: list[dict[str, Any]]) -> DataFacts:
    labels_N = dataset.test.labels_N
    return DataFacts(
        name=name,
        source=dataset.source,
        synthetic=dataset.synthetic,
        classes=dataset.classes,
        positive_class=dataset.classes[1] if len(dataset.classes) == 2 else "",
        num_records={"train": len(dataset.train), "val": len(dataset.val), "test": len(dataset.test)},
        majority_accuracy=float((labels_N == majority_class(labels_N)).mean()) if len(labels_N) else 0.0,
        clients=clients,
        warnings=dataset.warnings,
    )
