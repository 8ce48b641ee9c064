"""A whole training: prepare it, advance it round by round, and say what may be claimed of the result.

The rounds are the caller's loop, so that whoever runs them can store every state without a callback:

    federation = prepare(spec, dataset, device)
    state = initial_state(federation)  # with `pretraining`: initial_state(federation, public)
    while not ended(spec, state):
        state = run_round(federation, state)

Where early stopping looks at public images, `prepare` needs these too: prepare(spec, dataset, device, public).

A training with a teacher trains that one first, by the same loop on `federation.teacher`, and goes on with
`federation = taught(federation, state)`.
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from trilemma.data.records import Dataset
from trilemma.errors import UserError
from trilemma.federation.clients import Client, make_clients, planned_rounds, server_plan
from trilemma.federation.early_stopping import images_to_look_at
from trilemma.federation.local_training import load_model
from trilemma.federation.outside import malicious_outside, outside_phrases, unpromised
from trilemma.federation.pretraining import pretrain
from trilemma.federation.quantised_training import phantoms_for, refuse_unfoldable
from trilemma.federation.root import root_images
from trilemma.federation.server import Federation, server_optimizer
from trilemma.federation.specs import Centralised, TrainSpec
from trilemma.federation.state import TrainingState
from trilemma.federation.teaching import Lessons, teacher_spec, total_rounds
from trilemma.models.classifier import Classifier
from trilemma.models.norms import batch_norm_layers
from trilemma.models.vector import get_buffers, get_params, set_buffers
from trilemma.privacy.accounting import accountant_name, epsilon
from trilemma.privacy.guarantee import NO_PRIVACY, DpEvent, Guarantee, Trust
from trilemma.privacy.noise import noise_source_in_words
from trilemma.privacy.specs import DpSgd


def prepare(
    spec: TrainSpec,
    dataset: Dataset,
    device: torch.device,
    public: Dataset | None = None,
    root: Dataset | None = None,
) -> Federation:
    """Returns a federation that is ready for its first round.

    Args:
        spec: The training.
        dataset: What `spec.data` names.
        device: Where it trains.
        public: What `spec.pretraining` names, where early stopping looks at its validation images: no round can be run
            without them.
        root: What `spec.aggregation.data` names, where the rule has a root set of public images: neither.

    Raises:
        UserError: If model, privacy and data do not go together.
    """
    looked_at = images_to_look_at(spec, dataset, public)
    classifier = spec.model.make(dataset.channels, dataset.image_size, len(dataset.classes), spec.seed)
    refuse_other_classes(spec, dataset)
    refuse_unfit_threat(spec, dataset)
    refuse_batch_norm_under_dp(spec, classifier)
    refuse_unfoldable(spec, classifier)
    partition = spec.partition.make()(dataset, spec.seed)
    clients = make_clients(spec, dataset, partition)
    refuse_idle_threat(spec, clients)
    refuse_lone_records(spec, clients, classifier)
    plan = server_plan(spec, len(clients))
    own, phantoms = root_images(spec, dataset, root), phantoms_for(spec, dataset)
    federation = Federation(
        spec, clients, dataset.val, classifier.to(device), plan, dataset.fingerprint, looked_at, own, phantoms
    )
    return federation if spec.teacher is None else replace(federation, teacher=_of_the_teacher(federation, dataset))


def _of_the_teacher(student: Federation, dataset: Dataset) -> Federation:
    """Returns the federation that trains a student's teacher: the same clients, under plans that know of both."""
    spec = teacher_spec(student.spec)
    try:
        classifier = spec.model.make(dataset.channels, dataset.image_size, len(dataset.classes), spec.seed)
        refuse_batch_norm_under_dp(spec, classifier)
        refuse_lone_records(spec, student.clients, classifier)
    except UserError as error:
        where = f"teacher.{error.where}" if error.where.startswith("model") else error.where
        raise UserError(where, error.problem, error.remedy) from None
    network = classifier.to(student.classifier.device)
    return replace(student, spec=spec, classifier=network, looked_at=None, phantoms_NCHW=None)


def taught(federation: Federation, state: TrainingState) -> Federation:
    """Returns a federation whose teacher is trained: its first round may run.

    Args:
        federation: With a teacher.
        state: The last one of `federation.teacher`.

    Raises:
        UserError: If the teacher's weights became infinite: it has no answers.
        ValueError: If the teacher is not done.
    """
    teacher = federation.teacher
    if teacher is None or state.round < teacher.spec.rounds:
        raise ValueError("only a teacher that has ended all of its rounds can teach")
    if not (state.model_P.isfinite().all() and state.model_Q.isfinite().all()):
        raise UserError(
            "teacher",
            f"its weights became infinite in {state.round} rounds, so that it has no answers to learn",
            "Use a smaller local.learning_rate, such as a third of it, or another teacher.model",
        )
    answering = copy.deepcopy(trained_model(teacher, state)).requires_grad_(False)
    return replace(federation, lessons=Lessons(answering, dict(state.private_steps), state.seconds))


def initial_state(federation: Federation, public: Dataset | None = None) -> TrainingState:
    """Returns the state before the first round: the weights in the workspace, so ask before any round has used it.

    The steps of a teacher count from the start: whatever is said of the student's privacy is said of both.

    Args:
        federation: The training.
        public: What `spec.pretraining` names, and nothing else: the initial weights are trained on it, here.

    Raises:
        UserError: If that training's weights become infinite, or its images do not fit the network.
        ValueError: If the training has a teacher that was not trained yet, or `public` is not what it asks for.
    """
    started, spec, classifier = time.perf_counter(), federation.spec, federation.classifier
    if (spec.pretraining is None) != (public is None):
        raise ValueError("a training with `pretraining` starts from that data set, and one without from none")
    if public is not None:
        pretrain(spec, public, classifier)
    params_P, server = get_params(classifier), server_optimizer(spec)
    pretraining_seconds = time.perf_counter() - started if public is not None else 0.0
    lessons = federation.lessons if federation.trained_teacher is not None else None
    return TrainingState(
        0,
        params_P,
        get_buffers(classifier),
        server.init(params_P) if server else {},
        private_steps=dict(lessons.private_steps) if lessons is not None else {},
        pretraining_seconds=pretraining_seconds + (lessons.seconds if lessons is not None else 0.0),
    )


def trained_model(federation: Federation, state: TrainingState) -> Classifier:
    """Returns the workspace with the state's weights in it, in evaluation mode."""
    load_model(federation.classifier, state.model_P, state.model_Q)
    return federation.classifier.eval()


def guarantee(federation: Federation, state: TrainingState) -> Guarantee:
    """Returns what may be claimed of the state's model, from the steps that ran."""
    spec = federation.spec
    if not isinstance(spec.privacy, DpSgd):
        return NO_PRIVACY
    events, malicious = _events(federation, state.private_steps), unpromised(federation)
    promised = {name: epsilon(steps, spec.privacy.delta) for name, steps in events.items() if name not in malicious}
    return Guarantee(
        unit=spec.privacy.unit,
        trust=trust_of(spec, spec.privacy),
        delta=spec.privacy.delta,
        epsilon_by_client=promised,
        events_by_client=events,
        clip=spec.privacy.clip,
        clipping=spec.privacy.clipping.label,
        num_colluding=spec.privacy.num_colluding,
        accountant=accountant_name(max(promised.values(), default=0.0)),
        noise_source=noise_source_in_words(spec.privacy.noise),
        outside=outside_phrases(federation, spec.privacy, events, promised),
        void=() if promised else tuple(malicious_outside(federation)),
    )


def trust_of(spec: TrainSpec, privacy: DpSgd) -> Trust:
    """Returns who adds the noise: of pooled images it is whoever pools them."""
    return "central" if isinstance(spec.algorithm, Centralised) else privacy.trust


def planned_events(federation: Federation) -> dict[str, tuple[DpEvent, ...]]:
    """Returns client name -> the events of the whole training and its teacher's, before it runs; empty without DP."""
    spec, num_clients = federation.spec, len(federation.clients)
    if federation.plan is not None:
        return _events(federation, {client.name: total_rounds(spec) for client in federation.clients})
    steps = {
        client.name: client.steps * planned_rounds(spec, num_clients, position)
        for position, client in enumerate(federation.clients)
    }
    return _events(federation, steps)


def _events(federation: Federation, steps: dict[str, int]) -> dict[str, tuple[DpEvent, ...]]:
    plans = {client.name: federation.plan or client.plan for client in federation.clients}
    return {name: (plan.event(steps.get(name, 0)),) for name, plan in plans.items() if plan is not None}


def refuse_other_classes(spec: TrainSpec, dataset: Dataset) -> None:
    """Refuses shares of other than the data's classes.

    Raises:
        UserError: Naming the classes.
    """
    shares = spec.local.class_shares
    if shares is not None and len(shares) != len(dataset.classes):
        raise UserError(
            "local.class_shares",
            f"has {len(shares)} numbers, and {dataset.name} has {len(dataset.classes)} classes",
            f"Give one for each of {', '.join(dataset.classes)}, in this order",
        )


def refuse_unfit_threat(spec: TrainSpec, dataset: Dataset) -> None:
    """Refuses a threat that names a class which the data do not have, or whose trigger their images have no room for.

    Raises:
        UserError: Naming the class or the size.
    """
    try:
        spec.threat.check(len(dataset.classes), dataset.image_size)
    except ValueError as error:
        raise UserError("threat", str(error), f"The classes of {dataset.name}: {', '.join(dataset.classes)}") from None


def refuse_idle_threat(spec: TrainSpec, clients: Sequence[Client]) -> None:
    """Refuses a threat whose clients hold no record that it would change: it would do nothing, and nobody would know.

    Raises:
        UserError: Naming the threat.
    """
    malicious = [shard for client in clients for shard in client.shards if shard.malicious]
    if malicious and not any(spec.threat.may_change(shard.records.labels_N).any() for shard in malicious):
        raise UserError(
            "threat",
            f"{spec.threat.label}: they hold no record that it would change",
            "Name other clients, or another source or target",
        )


def refuse_batch_norm_under_dp(spec: TrainSpec, classifier: Classifier) -> None:
    """Refuses a layer whose statistics mix the records of a batch: no record's influence could be bounded.

    Raises:
        UserError: Naming the layer and the alternatives.
    """
    layers = batch_norm_layers(classifier)
    if layers and isinstance(spec.privacy, DpSgd):
        raise UserError(
            "model.norm",
            f"layer '{layers[0]}' normalises by batch statistics, which DP-SGD cannot bound per record",
            'Use kind = "resnet9" or "resnet18" with norm = "group" or "weight", or of MONAI a DenseNet or '
            'EfficientNetBN with arguments = { norm = ["group", { num_groups = 8 }] } or { norm = "instance" }, or a '
            "ViT, which has none. "
            "MONAI's ResNets and SENets keep batch norm whatever they are told",
        )


def refuse_lone_records(spec: TrainSpec, clients: Sequence[Client], classifier: Classifier) -> None:
    """Refuses a batch of one record where a layer needs the variance of several.

    Raises:
        UserError: Naming the client.
    """
    size = spec.local.batch_size
    lone = [
        client
        for client in clients
        if client.plan is None
        and spec.local.augmentation.multiplicity == 1  # copies are several
        and (size == 1 or client.num_records % size == 1)
        and client.steps * size >= client.num_records  # the last batch of a pass is reached
    ]
    layers = batch_norm_layers(classifier)
    if not lone or not layers:
        return
    buffers_Q = get_buffers(classifier)
    try:
        classifier.train()(lone[0].shards[0].records.x([0]))
    except ValueError:
        raise UserError(
            "local.batch_size",
            f"{size} leaves {lone[0].name}, with {lone[0].num_records} records, a batch of a single one, "
            f"of which a layer such as '{layers[0]}' has no variance",
            'Choose another size, or norm = "group" or "weight"',
        ) from None
    finally:
        set_buffers(classifier, buffers_Q)
