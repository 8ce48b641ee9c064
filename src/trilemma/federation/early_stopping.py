"""Which round's weights become the model, and when a training may end before its last round: by looks under attack.

A look attacks the model as it is after a round on images that nothing is trained on. All that it decides follows from
the rows of the history, so a resumed training decides the same.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.frozen import frozen
from trilemma.attacks.evasion.search import errs
from trilemma.attacks.evasion.specs import Pgd
from trilemma.attacks.evasion.types import Evasion
from trilemma.data.records import Dataset, Records
from trilemma.errors import UserError
from trilemma.federation.specs import TrainSpec
from trilemma.federation.state import TrainingState
from trilemma.models.classifier import Classifier
from trilemma.randomness import generator

#: Images that are attacked together in a look. Each batch has a generator of its own, so it is part of the results.
LOOKED_AT_TOGETHER = 128

#: Steps of the attack where a study names none (Rice et al. 2020).
STEPS = 10


class RobustShares(NamedTuple):
    """How many images a model answers rightly, both as they are and under an attack.

    Attributes:
        accuracy: Of all images.
        balanced_accuracy: The mean over the classes that occur.
    """

    accuracy: float
    balanced_accuracy: float


def looks_at_public(spec: TrainSpec) -> bool:
    """Returns whether the validation images of `pretraining.data` choose the round."""
    return spec.early_stopping is not None and spec.early_stopping.split == "public"


def images_to_look_at(spec: TrainSpec, dataset: Dataset, public: Dataset | None) -> Records | None:
    """Returns the images that choose the round; None where none do, or where they are public and not loaded.

    Raises:
        UserError: If there is no such image.
    """
    if spec.early_stopping is None or (looks_at_public(spec) and public is None):
        return None
    source = public if looks_at_public(spec) and public is not None else dataset
    if not len(source.val):
        raise UserError(
            "early_stopping.split",
            f"{source.name} has no validation images to look at",
            "Use data that have some, or leave early_stopping out",
        )
    return source.val


def look(spec: TrainSpec, classifier: Classifier, records: Records | None, rounds: int) -> dict[str, Any]:
    """Returns what a look after `rounds` rounds sees, for the round's row; nothing where none is due.

    Args:
        spec: The training.
        classifier: With the weights that the model would have if this round were the best.
        records: What `images_to_look_at` returned.
        rounds: Rounds that have ended.
    """
    if spec.early_stopping is None or (rounds % spec.early_stopping.every and rounds < spec.rounds):
        return {}
    if records is None:
        raise ValueError("early stopping on public images needs them: prepare(spec, dataset, device, public)")
    evasion, budget = look_attack(spec)
    shares = robust_shares(classifier, records, evasion, budget, spec.seed)
    return {f"robust_val_{measure}": value for measure, value in shares._asdict().items()}


def look_attack(spec: TrainSpec) -> tuple[Evasion, Budget]:
    """Returns the attack of every look, by default on the defence's whole radius."""
    assert spec.early_stopping is not None
    attack = spec.early_stopping.attack
    if attack is not None:
        return attack.make(), attack.budgets[0]
    budget = spec.defence.budget
    assert budget is not None and budget.radius  # the spec refuses others
    return Pgd(norm=budget.norm, radii=(budget.radius,), steps=STEPS).make(), budget


def robust_shares(
    classifier: Classifier, records: Records, evasion: Evasion, budget: Budget, seed: int
) -> RobustShares:
    """Returns the robust accuracies of a classifier; the draws depend on the seed and the positions alone.

    Every look draws the same, so that two looks differ by the weights and not by luck.
    """
    held = []
    for start in range(0, len(records), LOOKED_AT_TOGETHER):
        chosen = slice(start, start + LOOKED_AT_TOGETHER)
        x_BCHW, y_B = records.x(chosen).to(classifier.device), records.y(chosen).to(classifier.device)
        draws = generator(seed, "early stopping", start)
        x_adv_BCHW = evasion(classifier, x_BCHW, y_B, budget, draws)
        with frozen(classifier), torch.no_grad():
            wrong_B = errs(classifier(x_BCHW), y_B) | errs(classifier(x_adv_BCHW), y_B)
        held.append(~wrong_B.cpu())
    held_N, labels_N = torch.cat(held).double(), records.y()
    by_class = [float(held_N[labels_N == label].mean()) for label in labels_N.unique()]
    return RobustShares(float(held_N.mean()), sum(by_class) / len(by_class))


def best_so_far(
    spec: TrainSpec, state: TrainingState, row: dict[str, Any], latest_P: Tensor, latest_Q: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the weights of the best look, that of a round which has just ended included; of equal ones the later.

    Args:
        spec: The training.
        state: Before the round.
        row: The round's, with what its look saw.
        latest_P: The model's parameters after the round.
        latest_Q: Its buffers.
    """
    seen, now = _values(spec, state), _value(spec, row)
    if now is None or now < max(seen, default=0.0):
        return state.best_P, state.best_Q
    return latest_P.clone(), latest_Q.clone()  # a checkpoint's tensors may not share memory


def best_round(spec: TrainSpec, history: Sequence[dict[str, Any]]) -> int | None:
    """Returns the round whose weights are the model, counted from 1; None where no look chose it."""
    values = [(value, row["round"]) for row in history if (value := _value(spec, row)) is not None]
    return max(values)[1] if values else None  # of equal ones the later, as in `best_so_far`


def ended(spec: TrainSpec, state: TrainingState) -> bool:
    """Returns whether a training is over: all rounds are done, or as many looks as it has patience saw no higher value.

    A value as high as the highest keeps its weights, but is no reason to wait for more.
    """
    if state.round >= spec.rounds:
        return True
    values = _values(spec, state)
    if spec.early_stopping is None or spec.early_stopping.patience is None or not values:
        return False
    return len(values) - 1 - values.index(max(values)) >= spec.early_stopping.patience


def _values(spec: TrainSpec, state: TrainingState) -> list[float]:
    values = [_value(spec, row) for row in state.history]
    return [value for value in values if value is not None]


def _value(spec: TrainSpec, row: dict[str, Any]) -> float | None:
    return row.get(f"robust_val_{spec.early_stopping.measure}") if spec.early_stopping is not None else None
