"""What a client does within a round: from the server's model to an update."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trilemma.data.records import Records
from trilemma.federation.augmentation import augment
from trilemma.federation.clients import Client
from trilemma.federation.gradual_pruning import kept
from trilemma.federation.optimizers import State
from trilemma.federation.quantised_training import Rounding, set_rounded
from trilemma.federation.specs import Augmentation, FedProx, TrainSpec
from trilemma.federation.streams import client_stream, private_generator
from trilemma.federation.teaching import phase_name, with_teacher
from trilemma.federation.units import added, unit_gradient_sum, whole_units
from trilemma.models.classifier import Classifier
from trilemma.models.vector import get_buffers, get_params, set_buffers, set_params
from trilemma.privacy.noise import AddNoise, seeded_noise
from trilemma.privacy.plan import PrivacyPlan
from trilemma.privacy.specs import DpSgd
from trilemma.randomness import generator, global_seed
from trilemma.robustness.objective import Objective

#: Images, copies counted, that a private step loads, changes and attacks at once: it may draw many more. One unit with
#: more of them is loaded alone, as a whole.
CRAFTED_TOGETHER = 256


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
        damaged: Why the server could not read what arrived, or "".
    """

    update_P: Tensor
    buffers_Q: Tensor
    loss: float
    optimizer_state: State
    clip: float | None = None
    noised_count: float | None = None
    damaged: str = ""


def local_train(
    spec: TrainSpec,
    client: Client,
    classifier: Classifier,
    records: Records,
    round_index: int,
    optimizer_state: State | None = None,
    clip: float | None = None,
    rounding: Rounding | None = None,
    teacher: Classifier | None = None,
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
        rounding: How the network that it trains is rounded; None: not at all.
        teacher: Whose answers it learns beside the labels; None: the labels alone.
    """
    optimizer, augmentation = spec.local.make(), spec.local.augmentation
    params_P = start_P = get_params(classifier)
    state = optimizer_state if optimizer_state is not None else optimizer.init(params_P)
    draws = _draws(spec, client, round_index, classifier.device)
    total_loss, seen, noised_count = 0.0, 0, None
    classifier.train()
    dropout, keep_P = client_stream(spec, client, "dropout", round_index), kept(spec, classifier, start_P)
    put = set_params if rounding is None else set_rounded
    put(classifier, params_P)
    with global_seed(*dropout), classifier.computing_in(spec.local.dtype), _rounded(rounding):
        for step, drawn in enumerate(batches(spec, client, len(records), round_index)):
            time = round_index + step / client.steps  # in rounds
            objective = with_teacher(spec, spec.local.adjusted(spec.defence.make(time / spec.rounds)), teacher)
            if client.plan is None:
                batch = load_batch(augmentation, records, drawn, draws.changes, classifier.device)
                gradient_P, loss_B = mean_gradient(classifier, objective, *batch, draws.crafting)
            else:
                parts = private_parts(augmentation, client, records, drawn, classifier, objective, draws)
                summed = added(
                    unit_gradient_sum(client.plan, classifier, objective.loss, views, sizes_U, clip)
                    for views, sizes_U in parts
                )
                gradient_P, loss_B = client.plan.noised_mean(summed.sum_P, draws.noise, clip), summed.losses_B
                clip, noised_count = _adapted(spec, client.plan, summed.norms_B, draws.noise, clip)
            if isinstance(spec.algorithm, FedProx):
                gradient_P = gradient_P + spec.algorithm.mu * (params_P - start_P)
            params_P, state = optimizer.step(params_P, gradient_P, state, learning_rate(spec, time))
            params_P = params_P if keep_P is None else params_P.masked_fill(~keep_P, 0.0)
            put(classifier, params_P)
            total_loss, seen = total_loss + float(loss_B.sum()), seen + len(loss_B)
    set_params(classifier, params_P)
    loss = total_loss / seen if seen else math.nan
    return LocalResult(params_P - start_P, get_buffers(classifier), loss, state, clip, noised_count)


def _rounded(rounding: Rounding | None) -> AbstractContextManager[None]:
    return nullcontext() if rounding is None else rounding.activations()


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
    draws = private_generator(spec, client.fingerprint, "noise", round_index, client.number)
    return Draws(
        generator(*client_stream(spec, client, "augmentation", round_index)),
        generator(*client_stream(spec, client, "defence", round_index), device=device),
        client.plan.noise_source(draws) if client.plan is not None else seeded_noise(draws),
    )


def load_batch(
    augmentation: Augmentation, records: Records, index: list[int], changes: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Returns augmented images and labels, copies side by side; a Poisson-sampled batch may be empty."""
    x_BCHW, y_B = (
        whole.to(device).repeat_interleave(augmentation.multiplicity, 0)
        for whole in (records.x(index), records.y(index))
    )
    if index:
        x_BCHW = augment(x_BCHW, augmentation.shift, augmentation.flip, changes)
    return x_BCHW, y_B


def private_parts(
    augmentation: Augmentation,
    client: Client,
    records: Records,
    drawn: list[int],
    classifier: Classifier,
    objective: Objective,
    draws: Draws,
) -> Iterator[tuple[tuple[Tensor, Tensor], list[int]]]:
    """Yields a private step's views and targets, and how many images each unit has, a part of whole units at a time.

    The views are x_IVCHW, the targets labels y_I or, with a teacher, shares of the classes p_IK.

    A unit is never divided, so that it is clipped as one; memory stays bounded however many units are drawn. Where
    nobody is drawn there is one part without images.
    """
    sizes_U = [size * augmentation.multiplicity for size in client.records_of(drawn)[1]]
    for part in whole_units(sizes_U, CRAFTED_TOGETHER):
        index = client.records_of(drawn[part])[0]
        x_BCHW, y_B = load_batch(augmentation, records, index, draws.changes, classifier.device)
        x_BVCHW = crafted(objective, classifier, x_BCHW, y_B, draws.crafting)
        yield (x_BVCHW, objective.targets(x_BCHW, y_B)), sizes_U[part]


def crafted(
    objective: Objective, classifier: Classifier, x_BCHW: Tensor, y_B: Tensor, crafting: torch.Generator
) -> Tensor:
    """Returns the views x_BVCHW of private images, attacked `CRAFTED_TOGETHER` at a time; of none, none."""
    if not len(y_B):
        return x_BCHW[:, None]
    parts = zip(x_BCHW.split(CRAFTED_TOGETHER), y_B.split(CRAFTED_TOGETHER), strict=True)
    return torch.cat([objective.views(classifier, x, y, crafting) for x, y in parts])


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
        draws = private_generator(spec, client.fingerprint, "poisson", round_index, client.number)
        for _ in range(client.steps):
            yield client.plan.sample(draws).tolist()
        return
    draws = generator(spec.seed, "batches", *phase_name(spec), round_index, client.number)
    done = 0
    while done < client.steps:
        order = torch.randperm(num_records, generator=draws).tolist()
        for start in range(0, num_records, spec.local.batch_size):
            if done == client.steps:
                return
            yield order[start : start + spec.local.batch_size]
            done += 1


def drawn_records(spec: TrainSpec, client: Client, round_index: int) -> np.ndarray | None:
    """Returns the positions of all records that a round's steps look at, ascending; None where only the steps know."""
    if client.plan is None or client.plan.noise == "system":  # whole passes; or draws that nothing can repeat
        return None
    steps = batches(spec, client, client.num_records, round_index)
    return np.unique([record for drawn in steps for record in client.records_of(drawn)[0]]).astype(np.int64)


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
    loss_B = objective.loss(logits_BVK, objective.targets(x_BCHW, y_B))
    trainable = [p for p in classifier.parameters() if p.requires_grad]
    # A network may hold parameters that its output does not depend on.
    gradients = torch.autograd.grad(loss_B.mean(), trainable, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients]), loss_B.detach()


def load_model(classifier: Classifier, params_P: Tensor, buffers_Q: Tensor) -> None:
    """Puts the server's weights into the workspace."""
    set_params(classifier, params_P)
    set_buffers(classifier, buffers_Q)
