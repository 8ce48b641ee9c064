"""The job that trains: from a spec to weights on disk and a row for the store, resuming where it was killed."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trilemma.atomic import atomic_write
from trilemma.data.records import Dataset
from trilemma.errors import Failure
from trilemma.federation.admission import digest
from trilemma.federation.downlink import about_teacher
from trilemma.federation.early_stopping import ended, looks_at_public
from trilemma.federation.pretraining import refuse_unfit
from trilemma.federation.root import root_spec
from trilemma.federation.round import Federation, run_round
from trilemma.federation.state import TrainingState
from trilemma.federation.training import guarantee, initial_state, prepare, taught
from trilemma.models.vector import get_buffers, num_params
from trilemma.study.files import load_tensors, save_tensors
from trilemma.study.ledgers import book_training, lineage_so_far
from trilemma.study.lineage import Lineage, Payment
from trilemma.study.plan import Training
from trilemma.study.provenance import peak_memory_bytes, provenance, reset_peak_memory
from trilemma.study.rows import RunRow
from trilemma.study.workplace import Workplace


@dataclass(frozen=True)
class _Phase:
    """One federation of a training, its teacher's or its own, and where its states are kept.

    Attributes:
        place: Of the job.
        training: The whole.
        federation: This one.
        dataset: Its images.
        path: Of its checkpoint.
        rounds_before: Rounds of the training that ended before its first.
        teacher: Tells the teacher whose answers it learns from any other; "" without one.
    """

    place: Workplace
    training: Training
    federation: Federation
    dataset: Dataset
    path: Path
    rounds_before: int = 0
    teacher: str = ""

    def resumed(self) -> TrainingState | None:
        """Returns the state after the last round that ended, or None where none is kept."""
        path = self.path
        if not path.exists():
            return None
        try:
            tensors, texts = load_tensors(path)
        except Failure as error:
            raise Failure(str(path), error.problem, "Delete this file to start this training anew") from error
        if texts.get("fingerprint") != self.dataset.fingerprint:
            raise Failure(
                str(path),
                "was made on other images than the data now hold",
                "Put the data back, or delete this file to start anew",
            )
        if texts.get("teacher", "") != self.teacher:
            raise Failure(
                str(path),
                "learnt from another teacher than the one that is now kept beside it",
                f"Put {self.place.files.teacher(self.training.key).name} back, or delete this file: the student "
                "starts anew",
            )
        try:
            state = TrainingState.unpack(tensors, texts, self.federation.classifier.device)
            self._refuse_unfit(state)
        except (KeyError, ValueError) as error:
            raise Failure(
                str(path), f"is no checkpoint of this training ({error})", "Delete it to start anew"
            ) from error
        return state

    def _refuse_unfit(self, state: TrainingState) -> None:
        classifier = self.federation.classifier
        sizes = (num_params(classifier),), get_buffers(classifier).shape
        if (state.params_P.shape, state.buffers_Q.shape) != sizes:
            raise ValueError(f"it holds {state.params_P.numel()} weights, and the network has {sizes[0][0]}")
        if not 0 <= state.round <= self.federation.spec.rounds:
            raise ValueError(f"it speaks of round {state.round} of {self.federation.spec.rounds}")

    def begun(self, lineage: Lineage) -> TrainingState:
        """Returns the state before the first round; what a pretraining came to is kept like a round."""
        public = _public(self.place, self.training)
        if public is None:
            return initial_state(self.federation)
        refuse_unfit(self.dataset, public, looks_at_public(self.training.spec))
        state = initial_state(self.federation, public)
        self._keep(state, lineage)
        return state

    def run(self, state: TrainingState, before: Lineage, payments: tuple[Payment, ...]) -> TrainingState:
        """Returns the state after the last round, each kept with what paid for it."""
        while not ended(self.federation.spec, state):
            state = run_round(self.federation, state)
            self._keep(state, before.after(payments, state.private_steps))
        return state

    def _keep(self, state: TrainingState, lineage: Lineage) -> None:
        tensors, texts = state.pack()
        texts |= {"fingerprint": self.dataset.fingerprint, "lineage": lineage.text()}
        save_tensors(self.path, tensors, texts | ({"teacher": self.teacher} if self.teacher else {}))
        rounds = self.rounds_before + state.round
        atomic_write(self.place.files.progress(self.training.key), str(rounds).encode())


def train_job(place: Workplace, training: Training) -> RunRow:
    """Trains what is left to train, round by round with a checkpoint after each, and stores the weights.

    A teacher is trained first, with checkpoints of its own; its last one stays until the training is stored.
    """
    place.enter()
    reset_peak_memory()
    dataset = place.dataset(training.spec.data)
    federation = _prepared(place, training, dataset)
    before = lineage_so_far(place, training)
    teacher, learnt = _teacher(place, training, federation, dataset)
    state = _own(place, training, federation, dataset, learnt).resumed()
    # Whichever comes first pretrains now: on public images, so before anything is booked.
    if teacher is not None:
        learnt = learnt or teacher.begun(before)
    elif state is None:
        state = _own(place, training, federation, dataset, None).begun(before)
    # Before anything is computed from the images.
    payments = book_training(place, training, federation, before) if place.books is not None else ()
    if teacher is not None and learnt is not None:
        learnt = teacher.run(learnt, before, payments)
        federation = taught(federation, learnt)
    own = _own(place, training, federation, dataset, learnt)
    if state is None:
        state = own.begun(before.after(payments, learnt.private_steps if learnt is not None else {}))
    started, spent = time.perf_counter(), state.seconds
    state = own.run(state, before, payments)
    tensors = {"params": state.model_P, "buffers": state.model_Q}
    save_tensors(place.files.weights(training.key), tensors)
    return RunRow(
        key=training.key,
        spec=training.spec.model_dump(mode="json"),
        history=_history(federation, state, learnt),
        guarantee=guarantee(federation, state),
        provenance=provenance(place.torch_device),
        fingerprint=dataset.fingerprint,
        seconds=spent + time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(),
        num_parameters=num_params(federation.classifier),
        lineage=before.after(payments, state.private_steps),
    )


def _prepared(place: Workplace, training: Training, dataset: Dataset) -> Federation:
    public = _public(place, training) if looks_at_public(training.spec) else None
    root = root_spec(training.spec)
    own = root.data.load(place.roots) if root is not None and root.data is not None else None
    return prepare(training.spec, dataset, place.torch_device, public, own)


def _teacher(
    place: Workplace, training: Training, federation: Federation, dataset: Dataset
) -> tuple[_Phase | None, TrainingState | None]:
    """Returns the federation of the teacher and its last kept state; nothing where there is no teacher."""
    if federation.teacher is None:
        return None, None
    phase = _Phase(place, training, federation.teacher, dataset, place.files.teacher(training.key))
    return phase, phase.resumed()


def _own(
    place: Workplace, training: Training, federation: Federation, dataset: Dataset, learnt: TrainingState | None
) -> _Phase:
    """Returns the federation of the training's own model, which `learnt`, a teacher that is done, belongs to."""
    path, teacher = place.files.checkpoint(training.key), federation.teacher
    if teacher is None:
        return _Phase(place, training, federation, dataset, path)
    done = learnt is not None and learnt.round == teacher.spec.rounds
    name = digest(torch.cat([learnt.model_P, learnt.model_Q])) if learnt is not None and done else ""
    return _Phase(place, training, federation, dataset, path, teacher.spec.rounds, name)


def _history(federation: Federation, state: TrainingState, learnt: TrainingState | None) -> list[dict[str, Any]]:
    """Returns the rounds of the training's own model, the first of them with a word on its teacher."""
    if learnt is None or not state.history:
        return list(state.history)
    first, *others = state.history
    return [{**first, "teacher": about_teacher(federation, learnt, state)}, *others]


def _public(place: Workplace, training: Training) -> Dataset | None:
    """Returns what a training pretrains on, if it does; used once, so the process need not hold it."""
    pretraining = training.spec.pretraining
    return pretraining.data.load(place.roots) if pretraining is not None else None
