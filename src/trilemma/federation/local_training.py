"""What a client does within a round: from the server's model to an update."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from trilemma.data.records import Records
from trilemma.federation.augmentation import augment
from trilemma.federation.clients import Client
from trilemma.federation.optimizers import State
from trilemma.federation.specs import FedProx, TrainSpec
from trilemma.federation.units import unit_gradient_sum
from trilemma.models.classifier import Classifier
from trilemma.models.vector import get_buffers, get_params, set_buffers, set_params
from trilemma.privacy.noise import AddNoise, seeded_noise
from trilemma.privacy.plan import PrivacyPlan
from trilemma.privacy.specs import DpSgd
from trilemma.randomness import generator, global_seed
from trilemma.robustness.objective import Objective


class LocalResult(NamedTuple):
    """What a client sends, and what it keeps.

    Attributes:
        update_P: Change of the trainable parameters.
        buffers_Q: Its floating-point buffers after training.
        loss: Mean training loss over the records that it saw; not a number where it saw none.
        optimizer_state: Kept by the client where its optimizer outlives the round.
        clip: Where the clipping norm adapts: kept by the client for its next round.
        noised_count: Where one clipping norm adapts for all: the client's part of the count that moves it, with its
            share of the noise; for the secure sum only.
    """

    update_P: Tensor
    buffers_Q: Tensor
    loss: float
    optimizer_state: State
    clip: float | None = None
    noised_count: float | None = None


def local_train(
    spec: TrainSpec,
    client: Client,
    classifier: Classifier,
    records: Records,
    round_index: int,
    optimizer_state: State | None = None,
    clip: float | None = None,
) -> LocalResult:
    """Trains from the weights in `classifier`, which hold the round's model, and leaves the result in it.

    Args:
        spec: The training.
        client: Whose steps, privacy and random streams these are.
        classifier: The workspace.
        records: What the client trains on in this round.
        round_index: From 0.
        optimizer_state: To go on with; None starts afresh.
        clip: The clipping norm to start with, where it adapts; None for the plan's first.
    """
    optimizer = spec.local.make()
    params_P = start_P = get_params(classifier)
    state = optimizer_state if optimizer_state is not None else optimizer.init(params_P)
    draws = _draws(spec, client, round_index, classifier.device)
    total_loss, seen, noised_count = 0.0, 0, None
    classifier.train()
    with global_seed(spec.seed, "dropout", round_index, client.number):
        for step, drawn in enumerate(batches(spec, client, len(records), round_index)):
            time = round_index + step / client.steps  # in rounds
            objective = spec.defence.make(time / spec.rounds)
            if client.plan is None:
                x_BCHW, y_B = load_batch(spec, records, drawn, draws)
                gradient_P, loss_B = mean_gradient(classifier, objective, x_BCHW, y_B, draws.crafting)
            else:
                index, sizes_U = client.records_of(drawn)
                x_ICHW, y_I = load_batch(spec, records, index, draws)
                x_IVCHW = objective.views(classifier, x_ICHW, y_I, draws.crafting) if index else x_ICHW[:, None]
                summed = unit_gradient_sum(client.plan, classifier, objective.loss, (x_IVCHW, y_I), sizes_U, clip)
                gradient_P, loss_B = client.plan.noised_mean(summed.sum_P, draws.noise, clip), summed.losses_B
                clip, noised_count = _adapted(spec, client.plan, summed.norms_B, draws.noise, clip)
            if isinstance(spec.algorithm, FedProx):
                gradient_P = gradient_P + spec.algorithm.mu * (params_P - start_P)
            params_P, state = optimizer.step(params_P, gradient_P, state, learning_rate(spec, time))
            set_params(classifier, params_P)
            total_loss, seen = total_loss + float(loss_B.sum()), seen + len(loss_B)
    loss = total_loss / seen if seen else math.nan
    return LocalResult(params_P - start_P, get_buffers(classifier), loss, state, clip, noised_count)


class Draws(NamedTuple):
    """The random streams of a client's round, beside its batches.

    Attributes:
        changes: Of augmentation.
        crafting: Of the defence; on the model's device.
        noise: Adds the noise of privacy; used by private clients only.
    """

    changes: torch.Generator
    crafting: torch.Generator
    noise: AddNoise


def _draws(spec: TrainSpec, client: Client, round_index: int, device: torch.device) -> Draws:
    draws = private_generator(spec, "noise", round_index, client.number)
    return Draws(
        generator(spec.seed, "augmentation", round_index, client.number),
        generator(spec.seed, "defence", round_index, client.number, device=device),
        client.plan.noise_source(draws) if client.plan is not None else seeded_noise(draws),
    )


def load_batch(spec: TrainSpec, records: Records, index: list[int], draws: Draws) -> tuple[Tensor, Tensor]:
    """Returns a step's augmented images and labels, on the model's device; a Poisson-sampled batch may be empty."""
    device = draws.crafting.device
    x_BCHW, y_B = records.x(index).to(device), records.y(index).to(device)
    if index:
        x_BCHW = augment(x_BCHW, spec.local.augmentation.shift, spec.local.augmentation.flip, draws.changes)
    return x_BCHW, y_B


def _adapted(
    spec: TrainSpec, plan: PrivacyPlan, norms_B: Tensor, add_noise: AddNoise, clip: float | None
) -> tuple[float | None, float | None]:
    """Returns the clip for the next step and, where the server moves it after the round, the count for that."""
    if plan.adaptation is None:
        return None, None
    clip = plan.adaptation.first_clip if clip is None else clip
    noised_count = plan.noised_count(norms_B, add_noise, clip)
    if isinstance(spec.privacy, DpSgd) and spec.privacy.trust == "distributed":
        return clip, noised_count
    return plan.adaptation.moved(clip, noised_count, plan.denominator), None


def batches(spec: TrainSpec, client: Client, num_records: int, round_index: int) -> Iterator[list[int]]:
    """Yields the positions of each step's records, from shuffled passes; under DP its units, Poisson-sampled."""
    if client.plan is not None:
        draws = private_generator(spec, "poisson", round_index, client.number)
        for _ in range(client.steps):
            yield client.plan.sample(draws).tolist()
        return
    draws = generator(spec.seed, "batches", round_index, client.number)
    done = 0
    while done < client.steps:
        order = torch.randperm(num_records, generator=draws).tolist()
        for start in range(0, num_records, spec.local.batch_size):
            if done == client.steps:
                return
            yield order[start : start + spec.local.batch_size]
            done += 1


def private_generator(spec: TrainSpec, role: str, round_index: int, *who: str | int) -> torch.Generator:
    """Returns the stream of a draw that privacy rests on; it is each training's own.

    If two trainings of one seed shared their noise, the difference of the two released models would be free of it.
    """
    return generator(spec.seed, role, spec.key, round_index, *who)


def learning_rate(spec: TrainSpec, time: float) -> float:
    """Returns the learning rate at `time`, counted in rounds."""
    if spec.local.schedule == "constant":
        return spec.local.learning_rate
    return spec.local.learning_rate * 0.5 * (1 + math.cos(math.pi * time / spec.rounds))


def mean_gradient(
    classifier: Classifier, objective: Objective, x_BCHW: Tensor, y_B: Tensor, crafting: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Returns the gradient of the mean loss, flat over trainable parameters, and each record's loss."""
    x_BVCHW = objective.views(classifier, x_BCHW, y_B, crafting)
    logits_BVK = classifier(x_BVCHW.flatten(0, 1)).unflatten(0, x_BVCHW.shape[:2])
    loss_B = objective.loss(logits_BVK, y_B)
    trainable = [p for p in classifier.parameters() if p.requires_grad]
    # A network may hold parameters that its output does not depend on.
    gradients = torch.autograd.grad(loss_B.mean(), trainable, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients]), loss_B.detach()


def load_model(classifier: Classifier, params_P: Tensor, buffers_Q: Tensor) -> None:
    """Puts the server's weights into the workspace."""
    set_params(classifier, params_P)
    set_buffers(classifier, buffers_Q)
