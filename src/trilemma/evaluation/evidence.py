"""What `diagnostics` judges: every answer of a model that can show that its robustness is not there.

The white box is the worst case, image by image, of PGD-20 on the cross entropy, APGD-40 on the margin and, on 64 of the
images that these left, APGD-100 on the margin towards the two likeliest wrong classes: steps that halve themselves find
on a steep model what steps of one length do not. What goes on from there (longer runs, black boxes) is tried on those
of the 64 that still stand: what it finds is a lower bound for all images. Half of the 64 are those nearest to an error,
by the model's own answers; the other half are drawn, for a model that hides a way makes what lies beyond it look far.

All images are made legal again and judged by the model that ships. Of each patient one image is used, so that images
are independent and exact binomial tests apply.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.apgd import apgd
from trilemma.attacks.evasion.fgsm import fgsm
from trilemma.attacks.evasion.frozen import frozen, logits_and_gradient
from trilemma.attacks.evasion.losses import LossName, margin
from trilemma.attacks.evasion.pgd import climb, pgd
from trilemma.attacks.evasion.square import square
from trilemma.attacks.evasion.types import Evasion
from trilemma.data.records import Records
from trilemma.evaluation.harness import (
    BATCH_SIZE,
    Target,
    attacked_batches,
    attacked_logits,
    clean_logits,
    judge,
    legal,
)
from trilemma.evaluation.metrics import Floats, majority_class, predictions
from trilemma.evaluation.repeats import Repeats, repeated
from trilemma.models.classifier import Classifier
from trilemma.randomness import derive_seed, numpy_generator

#: Gradient steps of the white box.
STEPS = 20
#: Steps of APGD on all images.
QUICK_STEPS = 40
#: Steps of APGD where these gave up, with which it no longer depends on their number.
THOROUGH_STEPS = 100
#: Wrong classes that APGD aims at, at most.
TARGETS = 2
#: Questions per image of the black box.
QUERIES = 300
#: Images that go on where the first two attacks gave up, that are asked twice, and that may be changed at will.
CHOSEN = 64
Flags = NDArray[np.bool_]


class Evidence(NamedTuple):
    """What was seen of one model within one budget, on N images.

    Every `..._N` of bool says on which images the model that ships errs, a clean error included; those of the runs
    that went on from the white box are False where they were not tried.

    Attributes:
        budget: What the attacks could change.
        labels_N: True classes.
        num_classes: K.
        clean_NK: The shipped model's logits on clean images.
        twin_clean_NK: The twin's.
        fgsm_NK: The shipped model's logits on FGSM's images.
        twin_fgsm_NK: The twin's on the same images.
        no_gradient_N: Where the gradient of the twin's margin with respect to the image is zero or not finite.
        white_NK: The shipped model's logits under the white box.
        chosen_M: Positions of the images that went on from the white box.
        drawn_M: Of these the ones that were drawn, and stand for all that the white box leaves; none where all went on.
        entropy_left_M: Positions of chosen images that the cross entropy left.
        rescaled_N: Errors on these under PGD on the cross entropy of rescaled logits.
        unscaled_N: Errors on these under PGD on the cross entropy again, from the same starts as with rescaled logits.
        margin_N: Errors under APGD-40 on the margin, on the images that PGD-20 on the cross entropy left.
        longer_N: Errors under APGD-200 from other starts, on the chosen.
        black_boxes: Name of a black box -> errors under it where the white box leaves the image: on the chosen, and of
            what else was tried on the model on all images.
        whole: Accuracy of the model on the whole test split as far as is known, and what always answering its most
            frequent class reaches.
        tried_white_N: Of the next, those under attacks that follow gradients.
        tried_N: Errors under what else the study tried on the model within the budget; False where nothing was.
        smaller_N: Errors under PGD-20 on the margin within half the radius, on the chosen.
        larger_stands_N: Images, right when clean, that PGD-20 breaks within the radius and not within twice the radius.
        num_larger: Images on which that was tried.
        anything_MK: The shipped model's logits on what the first images become where every image is allowed.
        twin_anything_MK: The twin's on the same images.
        session: Repeated answers of the shipped model.
        twin: Repeated answers of the twin.
    """

    budget: Budget
    labels_N: NDArray[np.integer]
    num_classes: int
    clean_NK: Floats
    twin_clean_NK: Floats
    fgsm_NK: Floats
    twin_fgsm_NK: Floats
    no_gradient_N: Flags
    margin_N: Flags
    white_NK: Floats
    chosen_M: NDArray[np.integer]
    drawn_M: NDArray[np.integer]
    entropy_left_M: NDArray[np.integer]
    rescaled_N: Flags
    unscaled_N: Flags
    longer_N: Flags
    black_boxes: dict[str, Flags]
    whole: tuple[float, float]
    tried_white_N: Flags
    tried_N: Flags
    smaller_N: Flags
    larger_stands_N: Flags
    num_larger: int
    anything_MK: Floats
    twin_anything_MK: Floats
    session: Repeats
    twin: Repeats

    def errors(self, logits_NK: Floats) -> Flags:
        """Returns on which images some logits are wrong."""
        return predictions(logits_NK) != self.labels_N

    @property
    def white_N(self) -> Flags:
        """Returns on which images the model errs, clean or under the white box."""
        return self.errors(self.white_NK) | self.errors(self.clean_NK)

    @property
    def left_N(self) -> Flags:
        """Returns which images the model answers rightly under everything that was tried within the budget."""
        within = (self.errors(self.fgsm_NK), self.rescaled_N, self.unscaled_N, self.longer_N, self.smaller_N)
        return ~np.any([self.white_N, self.tried_N, *within, *self.black_boxes.values()], axis=0)


def independent_sample(test: Records, num_images: int, seed: int) -> NDArray[np.integer]:
    """Returns the positions of at most `num_images` records, one of each patient, drawn without regard to labels."""
    order_N = numpy_generator(seed, "diagnosed images").permutation(len(test))
    _, first_U = np.unique(test.units()[order_N], return_index=True)
    return np.sort(order_N[np.sort(first_U)[:num_images]])


def worth(clean_NK: Floats, records: Records) -> tuple[float, float]:
    """Returns the accuracy of clean answers, and that of always answering the most frequent class."""
    majority = records.labels_N == majority_class(records.labels_N)
    return float((predictions(clean_NK) == records.labels_N).mean()), float(majority.mean())


def gather(target: Target, records: Records, budget: Budget, seed: int) -> Evidence:
    """Returns the evidence.

    Cost: for N images at most 60 N + 32000 gradient steps of one image (from three classes on 60 N + 58000), 300 * 64
    questions to the shipped model, and 1300 steps for each surrogate; less where images break.

    Args:
        target: The model.
        records: Images of different patients, at least one.
        budget: What the attacks may change; its radius above 0.
        seed: Seed of everything random.
    """
    twin = _with_gradient(target.twin)
    clean_NK, twin_clean_NK = clean_logits(target, records), _twin_logits(twin, records.x())
    fgsm_NK, twin_fgsm_NK = _both_logits(target, twin, fgsm, budget, records, seed)
    entropy_NK = _logits(target, twin, _pgd(target), budget, records, seed)
    entropy_N = predictions(entropy_NK) != records.labels_N
    choose = partial(_chosen, labels_N=records.labels_N, seed=seed)
    entropy_left_M, _ = choose(entropy_NK, ~entropy_N, CHOSEN)
    quick_NK, white_NK = _white_box(target, twin, records, budget, entropy_NK, seed)
    quick_N, white_N = (predictions(logits_NK) != records.labels_N for logits_NK in (quick_NK, white_NK))
    chosen_M, drawn_M = (index_M[~white_N[index_M]] for index_M in choose(quick_NK, ~quick_N, CHOSEN))
    further = partial(_errors_at, target, records=records, seed=derive_seed(seed, "further"))
    first = records.subset(np.arange(min(len(records), CHOSEN)))
    anything_MK, twin_anything_MK = _both_logits(target, twin, _from_clean, _everything(budget, records), first, seed)
    larger_stands_N, num_larger = _stands_in_larger(target, twin, records, budget, quick_N, clean_NK, seed)
    return Evidence(
        budget=budget,
        labels_N=records.labels_N,
        num_classes=clean_NK.shape[1],
        clean_NK=clean_NK,
        twin_clean_NK=twin_clean_NK,
        fgsm_NK=fgsm_NK,
        twin_fgsm_NK=twin_fgsm_NK,
        no_gradient_N=_no_gradient(twin, records),
        margin_N=quick_N & ~entropy_N,
        white_NK=white_NK,
        chosen_M=chosen_M,
        drawn_M=drawn_M,
        entropy_left_M=entropy_left_M,
        rescaled_N=further(_rescaled(twin), _pgd(target), budget, entropy_left_M),
        unscaled_N=further(twin, _pgd(target), budget, entropy_left_M),
        longer_N=further(twin, _apgd(target, steps=2 * THOROUGH_STEPS), budget, chosen_M),
        black_boxes=_black_boxes(target, twin, records, budget, chosen_M, seed),
        whole=worth(clean_NK, records),
        tried_white_N=np.zeros(len(records), dtype=bool),
        tried_N=np.zeros(len(records), dtype=bool),
        smaller_N=further(twin, _pgd(target, loss="margin"), Budget(budget.norm, budget.radius / 2), chosen_M),
        larger_stands_N=larger_stands_N,
        num_larger=num_larger,
        anything_MK=anything_MK,
        twin_anything_MK=twin_anything_MK,
        session=repeated(target.predict, first.x(), seed),
        twin=repeated(lambda x: torch.from_numpy(_twin_logits(twin, x, batch_size=len(x))), first.x(), seed),
    )


class _Differentiable(nn.Module):
    """Adds nothing, and lets a gradient of zero exist where a network has none: its graph is cut or was never made."""

    def __init__(self, twin: Classifier):
        super().__init__()
        self.twin = twin

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.twin(x_BCHW) + 0.0 * x_BCHW.flatten(1).sum(1, keepdim=True)


class _Rescaled(nn.Module):
    """Divides each image's logits by their own spread, as a constant: no cross entropy saturates on them."""

    def __init__(self, twin: Classifier):
        super().__init__()
        self.twin = twin

    def forward(self, x_BCHW: Tensor) -> Tensor:
        logits_BK = self.twin(x_BCHW)
        low_B1, high_B1 = logits_BK.detach().aminmax(dim=1, keepdim=True)
        return logits_BK / (high_B1 - low_B1).clamp(min=torch.finfo(logits_BK.dtype).tiny)


def _with_gradient(twin: Classifier) -> Classifier:
    return Classifier(_Differentiable(twin), twin.num_classes, mean=0.0, std=1.0)


def _rescaled(twin: Classifier) -> Classifier:
    return Classifier(_Rescaled(twin), twin.num_classes, mean=0.0, std=1.0)


def _pgd(target: Target, *, steps: int = STEPS, restarts: int = 1, loss: LossName = "cross_entropy") -> Evasion:
    return partial(pgd, steps=steps, restarts=restarts, loss=loss, answers=target.predict)


def _apgd(target: Target, *, steps: int) -> Evasion:
    targets = min(TARGETS, target.twin.num_classes - 1)
    return partial(apgd, steps=steps, loss="margin", num_targets=targets, answers=target.predict)


def _logits(
    target: Target, source: Classifier, evasion: Evasion, budget: Budget, records: Records, seed: int
) -> np.ndarray:
    (logits_NK,) = attacked_logits(source, [target], evasion, budget, records, seed)
    return logits_NK


def _errors_at(
    target: Target,
    source: Classifier,
    evasion: Evasion,
    budget: Budget,
    index_M: NDArray[np.integer],
    *,
    records: Records,
    seed: int,
) -> Flags:
    """Returns on which of all images the shipped model errs under an attack that is made on some of them."""
    chosen, errors_N = records.subset(index_M), np.zeros(len(records), dtype=bool)
    errors_N[index_M] = predictions(_logits(target, source, evasion, budget, chosen, seed)) != chosen.labels_N
    return errors_N


def _white_box(
    target: Target, twin: Classifier, records: Records, budget: Budget, entropy_NK: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the shipped model's logits under PGD and APGD on all images, and under the whole white box."""
    quick_NK = entropy_NK.copy()
    left_M = np.flatnonzero(predictions(quick_NK) == records.labels_N)
    by_margin = partial(apgd, steps=QUICK_STEPS, loss="margin", answers=target.predict)
    quick_NK[left_M] = _logits(target, twin, by_margin, budget, records.subset(left_M), seed)
    white_NK = quick_NK.copy()
    chosen_M, _ = _chosen(quick_NK, predictions(quick_NK) == records.labels_N, CHOSEN, records.labels_N, seed)
    chosen, thorough = records.subset(chosen_M), _apgd(target, steps=THOROUGH_STEPS)
    white_NK[chosen_M] = _logits(target, twin, thorough, budget, chosen, derive_seed(seed, "thorough"))
    return quick_NK, white_NK


def _chosen(
    logits_NK: Floats, stands_N: Flags, num_images: int, labels_N: NDArray[np.integer], seed: int
) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """Returns positions, ascending, of images that stand, half the nearest to an error, half drawn; and of the latter.

    Where there are no more than are wanted all are there, and none was drawn.
    """
    index_M = np.flatnonzero(stands_N)
    lead_M = -margin(torch.from_numpy(logits_NK[index_M]), torch.from_numpy(labels_N[index_M])).numpy()
    ordered_M = index_M[np.argsort(lead_M, kind="stable")]
    near_M, rest_M = np.split(ordered_M, [min(num_images // 2, len(ordered_M))])
    drawn_M = numpy_generator(seed, "chosen images").permutation(rest_M)[: num_images - len(near_M)]
    some = len(ordered_M) > num_images
    return np.sort(np.concatenate([near_M, drawn_M])), np.sort(drawn_M) if some else drawn_M[:0]


def _both_logits(
    target: Target, twin: Classifier, evasion: Evasion, budget: Budget, records: Records, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the logits of the shipped model and of the twin on images that are made on the twin."""
    shipped, twins = [], []
    for batch in attacked_batches(twin, evasion, budget, records, seed):
        shipped.append(judge(target, batch.x_adv_BCHW, batch.x_BCHW, budget))
        twins.append(_twin_logits(twin, legal(batch.x_adv_BCHW, batch.x_BCHW, budget)))
    return np.concatenate(shipped), np.concatenate(twins)


def _no_gradient(twin: Classifier, records: Records) -> Flags:
    parts = []
    with frozen(twin):
        for start in range(0, len(records), BATCH_SIZE):
            index = slice(start, start + BATCH_SIZE)
            y_B = records.y(index).to(twin.device)
            _, gradient_BCHW = logits_and_gradient(twin, records.x(index).to(twin.device), partial(margin, y_B=y_B))
            flat = gradient_BCHW.flatten(1)
            parts.append(((flat == 0).all(1) | ~flat.isfinite().all(1)).cpu().numpy())
    return np.concatenate(parts)


def _black_boxes(
    target: Target,
    twin: Classifier,
    records: Records,
    budget: Budget,
    chosen_M: NDArray[np.integer],
    seed: int,
) -> dict[str, Flags]:
    run = partial(_errors_at, target, budget=budget, index_M=chosen_M, records=records)
    queries = partial(square, queries=QUERIES, answers=target.predict)
    found = {f"Square-{QUERIES}": run(twin, queries, seed=derive_seed(seed, "square"))}
    if target.surrogates:
        made = partial(pgd, steps=STEPS, loss="margin", stop=False)
        errors = [run(surrogate, made, seed=derive_seed(seed, "transfer")) for surrogate in target.surrogates]
        found["transfer"] = np.any(errors, axis=0)
    return found


def _stands_in_larger(
    target: Target,
    twin: Classifier,
    records: Records,
    budget: Budget,
    quick_N: Flags,
    clean_NK: Floats,
    seed: int,
) -> tuple[Flags, int]:
    """Returns which images that break within the radius stand within twice the radius, and how many were tried."""
    larger = Budget(budget.norm, min(2 * budget.radius, _everything(budget, records).radius))
    broken_M = np.flatnonzero(quick_N & (predictions(clean_NK) == records.labels_N))[:CHOSEN]
    stands_N = np.zeros(len(records), dtype=bool)
    stands_N[broken_M] = True
    # More steps where the ball is larger: only then is the failure the model's.
    for evasion in (_pgd(target), _apgd(target, steps=THOROUGH_STEPS)):
        index_M = np.flatnonzero(stands_N)
        run = partial(_errors_at, target, twin, evasion, larger, index_M, records=records)
        stands_N &= ~run(seed=derive_seed(seed, "larger"))
    return stands_N, len(broken_M)


def _from_clean(
    classifier: Classifier, x_BCHW: Tensor, y_B: Tensor, budget: Budget, generator: torch.Generator
) -> Tensor:
    """PGD on the margin without a random start: in the largest ball that start alone is an image of nothing."""
    return climb(classifier, x_BCHW, x_BCHW, budget, partial(margin, y_B=y_B), steps=STEPS)


def _everything(budget: Budget, records: Records) -> Budget:
    """Returns the smallest ball that holds all images, whatever its centre."""
    return Budget(budget.norm, 1.0 if budget.norm == "linf" else records.images_NCHW[:1].size ** 0.5)


def _twin_logits(twin: Classifier, x_NCHW: Tensor, batch_size: int = BATCH_SIZE) -> np.ndarray:
    with frozen(twin), torch.no_grad():
        parts = [twin(part.to(twin.device)).to("cpu", torch.float32) for part in x_NCHW.split(batch_size)]
    return torch.cat(parts).numpy()
