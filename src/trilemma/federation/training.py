"""A whole training: prepare it, advance it round by round, and say what may be claimed of the result.

The rounds are the caller's loop, so that whoever runs them can store every state without a callback:

    federation = prepare(spec, dataset, device)
    state = initial_state(federation)
    while state.round < spec.rounds:
        state = run_round(federation, state)
"""

from collections.abc import Sequence

import numpy as np
import torch

from trilemma.data.records import Dataset
from trilemma.errors import UserError
from trilemma.federation.clients import Client, make_clients
from trilemma.federation.local_training import load_model
from trilemma.federation.round import Federation, server_optimizer
from trilemma.federation.specs import Centralised, TrainSpec
from trilemma.federation.state import TrainingState
from trilemma.models.classifier import Classifier
from trilemma.models.norms import batch_norm_layers
from trilemma.models.vector import get_buffers, get_params, set_buffers
from trilemma.privacy.accounting import accountant_name, epsilon
from trilemma.privacy.guarantee import NO_PRIVACY, Guarantee
from trilemma.privacy.specs import DpSgd


def prepare(spec: TrainSpec, dataset: Dataset, device: torch.device) -> Federation:
    """Returns a federation that is ready for its first round.

    Raises:
        UserError: If model, privacy and data do not go together.
    """
    classifier = spec.model.make(dataset.channels, dataset.image_size, len(dataset.classes), spec.seed)
    refuse_batch_norm_under_dp(spec, classifier)
    partition = spec.partition.make()(dataset, spec.seed)
    clients = make_clients(spec, dataset, partition)
    refuse_lone_records(spec, clients, classifier)
    return Federation(spec, clients, dataset.val, classifier.to(device))


def initial_state(federation: Federation) -> TrainingState:
    """Returns the state before the first round: the weights in the workspace, so ask before any round has used it."""
    params_P = get_params(federation.classifier)
    server = server_optimizer(federation.spec)
    return TrainingState(0, params_P, get_buffers(federation.classifier), server.init(params_P) if server else {})


def trained_model(federation: Federation, state: TrainingState) -> Classifier:
    """Returns the workspace with the state's weights in it, in evaluation mode."""
    load_model(federation.classifier, state.params_P, state.buffers_Q)
    return federation.classifier.eval()


def guarantee(federation: Federation, state: TrainingState) -> Guarantee:
    """Returns what may be claimed of the state's model, from the steps that ran."""
    spec = federation.spec
    if not isinstance(spec.privacy, DpSgd):
        return NO_PRIVACY
    plans = {client.name: client.plan for client in federation.clients if client.plan is not None}
    events = {name: (plan.event(state.private_steps.get(name, 0)),) for name, plan in plans.items()}
    outside = [
        "the number of records of each hospital (published: it sets the sampling rate)",
        "the curves of training and validation, shown to whoever runs the study",
        "what a report tells of the data: counts of classes and patients, test images and test accuracies",
        "other models trained on the same images: where several are released, their epsilons add up",
        "the choice of settings, if they were chosen by looking at private results",
    ]
    outside += patients_outside(federation)
    epsilon_by_client = {name: epsilon(steps, spec.privacy.delta) for name, steps in events.items()}
    return Guarantee(
        unit=spec.privacy.unit,
        trust="central" if isinstance(spec.algorithm, Centralised) else spec.privacy.trust,
        delta=spec.privacy.delta,
        epsilon_by_client=epsilon_by_client,
        events_by_client=events,
        clip=spec.privacy.clip,
        accountant=accountant_name(max(epsilon_by_client.values())),
        noise_source="seeded noise, for research only: whoever knows the seed can take it away",
        outside=tuple(outside),
    )


def patients_outside(federation: Federation) -> list[str]:
    """Returns what protecting single images leaves open for patients who have several."""
    patients = [shard.records.patients_N for client in federation.clients for shard in client.shards]
    if any((patients_N < 0).any() for patients_N in patients):
        return ["a patient with several images: k images have k times this epsilon; which belong together is not known"]
    most = max(int(np.unique(patients_N, return_counts=True)[1].max(initial=0)) for patients_N in patients)
    if most <= 1:
        return []
    return [f"a patient with several images: k images have k times this epsilon, and here some have up to {most}"]


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
            'Use norm = "group" (resnet9, resnet18), or for a MONAI network arguments = '
            '{ norm = ["group", { num_groups = 8 }] } or norm = "instance"',
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
            'Choose another size, or norm = "group"',
        ) from None
    finally:
        set_buffers(classifier, buffers_Q)
