"""What is known of a study's data before anything is trained on them."""

from trilemma.data.records import Dataset
from trilemma.data.summary import client_rows
from trilemma.errors import Failure
from trilemma.evaluation.metrics import majority_class
from trilemma.federation.training import prepare
from trilemma.results import DataFacts
from trilemma.spec import content_key
from trilemma.study.plan import Plan, Training
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
        _note_facts(training, store, place)


def prepare_all(plan: Plan, place: Workplace) -> None:
    """Prepares every training: the hospitals of another seed's partition may not suit a privacy setting.

    Raises:
        UserError: If data, model and settings do not go together.
    """
    for training in plan.trainings:
        prepare(training.spec, place.dataset(training.spec.data), place.torch_device)


def facts_key(training: Training) -> str:
    """Returns the key of what is known of a training's data: its source, its partition, and the seed."""
    spec = training.spec
    return content_key(spec.data.model_dump(mode="json"), spec.partition.model_dump(mode="json"), spec.seed)


def _note_facts(training: Training, store: Store, place: Workplace) -> None:
    key = facts_key(training)
    dataset = place.dataset(training.spec.data)
    known = store.facts(key)
    seen = {known[1] if known else None, store.data_fingerprint(training.spec.data.model_dump(mode="json"))}
    if seen - {None, dataset.fingerprint}:
        raise Failure(
            dataset.name,
            "the images or labels have changed since this store was made, so old and new numbers would not compare",
            "Put the data back, or name another folder with --store",
        )
    if known is None:
        store.add_facts(key, data_facts(training, dataset), dataset.fingerprint)


def data_facts(training: Training, dataset: Dataset) -> DataFacts:
    """Returns what a report says about a training's data."""
    partition = training.spec.partition.make()(dataset, training.spec.seed)
    labels_N = dataset.test.labels_N
    return DataFacts(
        name=f"{dataset.name}, {training.spec.partition.label}, seed {training.spec.seed}",
        source=dataset.source,
        synthetic=dataset.synthetic,
        classes=dataset.classes,
        positive_class=dataset.classes[1] if len(dataset.classes) == 2 else "",
        num_records={"train": len(dataset.train), "val": len(dataset.val), "test": len(dataset.test)},
        majority_accuracy=float((labels_N == majority_class(labels_N)).mean()) if len(labels_N) else 0.0,
        clients=client_rows(dataset, partition),
        warnings=dataset.warnings,
    )
