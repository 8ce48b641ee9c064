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
from trilemma.models.classifier import Classifier
from trilemma.models.vector import get_buffers, get_params, set_buffers, set_params
from trilemma.randomness import generator, global_seed
from trilemma.robustness.objective import Objective


class LocalResult(NamedTuple):
    """What a client sends, and what it keeps.

    Attributes:
        update_P: Change of the trainable parameters.
        buffers_Q: Its floating-point buffers after training.
        loss: Mean training loss over the records that it saw; not a number where it saw none.
        optimizer_state: Kept by the client where its optimizer outlives the round.
    """

    update_P: Tensor
    buffers_Q: Tensor
    loss: float
    optimizer_state: State


def local_train(
    spec: TrainSpec,
    client: Client,
    classifier: Classifier,
    records: Records,
    round_index: int,
    optimizer_state: State | None = None,
) -> LocalResult:
    """Trains from the weights in `classifier`, which hold the round's model, and leaves the result in it.

    Args:
        spec: The training.
        client: Whose steps, privacy and random streams these are.
        classifier: The workspace.
        records: What the client trains on in this round.
        round_index: From 0.
        optimizer_state: To go on with; None starts afresh.
    """
    device = classifier.device
    optimizer = spec.local.make()
    params_P = start_P = get_params(classifier)
    state = optimizer_state if optimizer_state is not None else optimizer.init(params_P)
    changes = generator(spec.seed, "augmentation", round_index, client.number)
    crafting = generator(spec.seed, "defence", round_index, client.number, device=device)
    noise = private_generator(spec, "noise", round_index, client)
    total_loss, seen = 0.0, 0
    classifier.train()
    with global_seed(spec.seed, "dropout", round_index, client.number):
        for step, index in enumerate(batches(spec, client, len(records), round_index)):
            time = round_index + step / client.steps  # in rounds
            objective = spec.defence.make(time / spec.rounds)
            x_BCHW, y_B = records.x(index).to(device), records.y(index).to(device)
            if index:  # a Poisson-sampled batch may be empty
                x_BCHW = augment(x_BCHW, spec.local.augmentation.shift, spec.local.augmentation.flip, changes)
            if client.plan is None:
                gradient_P, loss_B = mean_gradient(classifier, objective, x_BCHW, y_B, crafting)
            else:
                x_BVCHW = objective.views(classifier, x_BCHW, y_B, crafting) if index else x_BCHW[:, None]
                clipped = client.plan.gradient_sum(classifier, objective.loss, x_BVCHW, y_B)
                gradient_P, loss_B = client.plan.noised_mean(clipped.sum_P, noise), clipped.losses_B
            if isinstance(spec.algorithm, FedProx):
                gradient_P = gradient_P + spec.algorithm.mu * (params_P - start_P)
            rate = learning_rate(spec, time)
            params_P, state = optimizer.step(params_P, gradient_P, state, rate)
            set_params(classifier, params_P)
            total_loss, seen = total_loss + float(loss_B.sum()), seen + len(loss_B)
    return LocalResult(params_P - start_P, get_buffers(classifier), total_loss / seen if seen else math.nan, state)


def batches(spec: TrainSpec, client: Client, num_records: int, round_index: int) -> Iterator[list[int]]:
    """Yields the positions of each step's records: Poisson-sampled under DP, otherwise shuffled passes."""
    if client.plan is not None:
        draws = private_generator(spec, "poisson", round_index, client)
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


def private_generator(spec: TrainSpec, role: str, round_index: int, client: Client) -> torch.Generator:
    """Returns the stream of a draw that privacy rests on; it is each training's own.

    If two trainings of one seed shared their noise, the difference of the two released models would be free of it.
    """
    return generator(spec.seed, role, spec.key, round_index, client.number)


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
