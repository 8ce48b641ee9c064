"""The job that trains: from a spec to weights on disk and a row for the store, resuming where it was killed."""

import time

from trilemma.atomic import atomic_write
from trilemma.data.records import Dataset
from trilemma.errors import Failure
from trilemma.federation.early_stopping import ended, looks_at_public
from trilemma.federation.pretraining import refuse_unfit
from trilemma.federation.root import root_spec
from trilemma.federation.round import Federation, run_round
from trilemma.federation.state import TrainingState
from trilemma.federation.training import guarantee, initial_state, prepare
from trilemma.models.vector import num_params
from trilemma.study.files import load_tensors, save_tensors
from trilemma.study.ledgers import book_training, lineage_so_far
from trilemma.study.lineage import Lineage
from trilemma.study.plan import Training
from trilemma.study.provenance import peak_memory_bytes, provenance, reset_peak_memory
from trilemma.study.rows import RunRow
from trilemma.study.workplace import Workplace


def train_job(place: Workplace, training: Training) -> RunRow:
    """Trains what is left to train, round by round with a checkpoint after each, and stores the weights."""
    place.enter()
    reset_peak_memory()
    dataset = place.dataset(training.spec.data)
    public = _public(place, training) if looks_at_public(training.spec) else None
    root = root_spec(training.spec)
    own = root.data.load(place.roots) if root is not None and root.data is not None else None
    federation = prepare(training.spec, dataset, place.torch_device, public, own)
    before = lineage_so_far(place, training)
    state = _resume(place, training, federation, dataset.fingerprint)
    state = state or _begin(place, training, federation, dataset, before)
    # Before anything is computed from the images.
    payments = book_training(place, training, federation, before) if place.books is not None else ()
    started = time.perf_counter()
    spent = state.seconds
    while not ended(training.spec, state):
        state = run_round(federation, state)
        _checkpoint(place, training, state, dataset.fingerprint, before.after(payments, state.private_steps))
    tensors = {"params": state.model_P, "buffers": state.model_Q}
    save_tensors(place.files.weights(training.key), tensors)
    return RunRow(
        key=training.key,
        spec=training.spec.model_dump(mode="json"),
        history=list(state.history),
        guarantee=guarantee(federation, state),
        provenance=provenance(place.torch_device),
        fingerprint=dataset.fingerprint,
        seconds=spent + time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(),
        num_parameters=num_params(federation.classifier),
        lineage=before.after(payments, state.private_steps),
    )


def _begin(
    place: Workplace, training: Training, federation: Federation, dataset: Dataset, lineage: Lineage
) -> TrainingState:
    """Returns the state before the first round; what a pretraining came to is kept like a round."""
    public = _public(place, training)
    if public is None:
        return initial_state(federation)
    refuse_unfit(dataset, public, looks_at_public(training.spec))
    state = initial_state(federation, public)
    _checkpoint(place, training, state, dataset.fingerprint, lineage)
    return state


def _public(place: Workplace, training: Training) -> Dataset | None:
    """Returns what a training pretrains on, if it does; used once, so the process need not hold it."""
    pretraining = training.spec.pretraining
    return pretraining.data.load(place.roots) if pretraining is not None else None


def _checkpoint(place: Workplace, training: Training, state: TrainingState, fingerprint: str, lineage: Lineage) -> None:
    tensors, texts = state.pack()
    save_tensors(
        place.files.checkpoint(training.key), tensors, {**texts, "fingerprint": fingerprint, "lineage": lineage.text()}
    )
    atomic_write(place.files.progress(training.key), str(state.round).encode())


def _resume(place: Workplace, training: Training, federation: Federation, fingerprint: str) -> TrainingState | None:
    path = place.files.checkpoint(training.key)
    if not path.exists():
        return None
    try:
        tensors, texts = load_tensors(path)
    except Failure as error:
        raise Failure(str(path), error.problem, "Delete this file to start this training anew") from error
    if texts.get("fingerprint") != fingerprint:
        raise Failure(
            str(path),
            "was made on other images than the data now hold",
            "Put the data back, or delete this file to start anew",
        )
    try:
        state = TrainingState.unpack(tensors, texts, federation.classifier.device)
    except (KeyError, ValueError) as error:
        raise Failure(str(path), f"is no checkpoint of this training ({error})", "Delete it to start anew") from error
    return state
