"""Signs that a robust accuracy is not there: each is a flag with its evidence, and a raised flag withholds the number.

Every threshold is one of five tests at the level of 1 % (`LEVEL`), on images of different patients, which are
independent:

- *More than a point.* Two attacks that are both good still differ on a few images, and so do a model and its int8
  twin, so the null hypothesis is not "never" but "on at most 1 % of images" (`TOLERANCE`): of n images k are too many
  where a binomial of n and 1 % reaches k with a probability (the p of the evidence) below 1 %: 3 of 32, 4 of 64, 8 of
  256. What the second attack leaves of what the first one broke does not enter: a good attack breaks what any other
  breaks, so that one that leaves 8 images to another is not good, however many the other leaves to it. Where a model
  has nothing left to break, k is 0 and nothing is raised.
- *More than a tenth.* Of the images that an attack may change at will, one that works leaves a tenth at the most; of
  trained models it left none. No test: that many were left.
- *Farther than noise.* If a batch's composition mattered no more than noise of half a grey level, the distances of m
  answers from the first ones would be exchangeable with those that the noise causes, and the k largest of all 2 m would
  all be due to the composition with a probability of about 2^-k only.
- *Beyond rounding.* Two answers to the same question may differ by float rounding only: 1e-4 of the largest logit, once
  what an image's logits have in common is taken away.
- *Sign test.* Where two attacks of equal cost are compared that may each win by chance (Dixon and Mood, 1946).

Where more images stand than are followed, the test of a point is also made of those among them that were drawn, of
which 3 of 32 are too many: they stand for all that are left, of which an attack that works leaves 1 % to another. Ten
flags are raised by up to three tests each; honest models are far from the edges of all of them.

References: Carlini et al. (2019), "On Evaluating Adversarial Robustness"; Athalye, Carlini and Wagner (2018); Tramèr et
al. (2020).
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtrc as binomial_sf

from trilemma.attacks.budget import Budget
from trilemma.data.records import Records
from trilemma.evaluation.evidence import STEPS, THOROUGH_STEPS, Evidence, gather, independent_sample, worth
from trilemma.evaluation.flags import Flag
from trilemma.evaluation.harness import Target, clean_logits
from trilemma.evaluation.intervals import wilson
from trilemma.evaluation.metrics import Floats, Integers, majority_class, predictions
from trilemma.evaluation.repeats import Repeats
from trilemma.evaluation.significance import LEVEL, TOLERANCE, all_from_one, beyond_a_point, p_value

#: Share of the images that an attack without any bound may leave and still work.
BOUNDLESS = 0.1


class Tried(NamedTuple):
    """What else was tried on a model within the budget: name of an attack -> logits on the whole test split.

    Attributes:
        white: Under attacks that follow its gradients.
        elsewhere: Under black boxes, and on images made on other models.
    """

    white: Mapping[str, Floats]
    elsewhere: Mapping[str, Floats]


#: The diagnostics stand alone.
NOTHING_ELSE = Tried({}, {})


def diagnose(
    target: Target,
    test: Records,
    budget: Budget,
    seed: int,
    *,
    num_images: int = 256,
    tried: Tried = NOTHING_ELSE,
) -> list[Flag]:
    """Returns all flags of one model within one budget, raised or not; none without a test record.

    The arguments are those of `examined`.
    """
    evidence = examined(target, test, budget, seed, num_images=num_images, tried=tried)
    return [] if evidence is None else judged(evidence)


def examined(
    target: Target,
    test: Records,
    budget: Budget,
    seed: int,
    *,
    num_images: int = 256,
    tried: Tried = NOTHING_ELSE,
) -> Evidence | None:
    """Returns the evidence of one model within one budget, or None without a test record.

    Args:
        target: The model as it ships, its twin and its surrogates.
        test: The test split.
        budget: The ball in which robustness is claimed.
        seed: Seed of the sample and of the attacks.
        num_images: Images that are looked at, at most; one of each patient, drawn without regard to their labels.
        tried: What else was tried within this budget, as further evidence.
    """
    if budget.radius <= 0:
        raise ValueError(f"diagnostics need a radius above 0, not {budget.radius:g}")
    positions_M = independent_sample(test, num_images, seed)
    if not len(positions_M):
        return None
    evidence = gather(target, test.subset(positions_M), budget, seed)
    white_M, elsewhere_M = (_any_errs(evidence, logits.values(), positions_M) for logits in tried)
    whole = worth(clean_logits(target, test), test)
    evidence = evidence._replace(tried_white_N=white_M, tried_N=white_M | elsewhere_M, whole=whole)
    if tried.elsewhere:
        missed_M = elsewhere_M & ~evidence.white_N & ~white_M
        evidence = evidence._replace(black_boxes=evidence.black_boxes | {"what else was tried": missed_M})
    return evidence


def _any_errs(evidence: Evidence, logits: Iterable[Floats], positions_M: Integers) -> NDArray[np.bool_]:
    """Returns on which of the evidence's images the model errs under any of some attacks on the whole split."""
    found_M = np.zeros(len(positions_M), dtype=bool)
    for logits_NK in logits:
        found_M |= evidence.errors(logits_NK[positions_M])
    return found_M


def judged(evidence: Evidence) -> list[Flag]:
    """Returns all flags that some evidence speaks of."""
    return [
        zero_gradient(evidence),
        fgsm_beats_pgd(evidence),
        black_box_beats_white_box(evidence),
        large_radius_survives(evidence),
        rises_with_radius(evidence),
        not_converged(evidence),
        logit_scaling(evidence),
        randomised(evidence),
        constant(evidence),
        twin_disagrees(evidence),
    ]


def zero_gradient(evidence: Evidence) -> Flag:
    """Raised where the twin's margin has no gradient with respect to more than a point of the images.

    No attack can follow a gradient that is zero, infinite or not a number; also that of a network whose graph is cut.
    """
    count, n = int(evidence.no_gradient_N.sum()), len(evidence.labels_N)
    seen = f"on {count} of {n} images the gradient of the twin's margin is zero or not finite"
    return _beyond_a_point(evidence, "zero_gradient", count, n, seen, "attacks that follow it go nowhere")


def fgsm_beats_pgd(evidence: Evidence) -> Flag:
    """Raised where one step breaks more than a point of images that the white box leaves.

    PGD, on the worse of two losses, is then not stronger than FGSM.
    """
    single_N, white_N = evidence.errors(evidence.fgsm_NK), evidence.white_N
    count, n = int((single_N & ~white_N).sum()), len(white_N)
    reverse = int((white_N & ~single_N).sum())
    seen = f"FGSM breaks {count} of {n} images that the white box leaves, and the white box {reverse} that FGSM leaves"
    return _beyond_a_point(evidence, "fgsm_beats_pgd", count, n, seen, "PGD's gradients lead astray")


def black_box_beats_white_box(evidence: Evidence) -> Flag:
    """Raised where an attack without this model's gradients breaks more than a point of images that PGD leaves.

    The black boxes are Square on the answers of the model that ships, the images of surrogates, and what else was tried
    without the model's gradients.
    """
    counts = {name: int(errors_N.sum()) for name, errors_N in evidence.black_boxes.items()}
    broken_N = np.any(list(evidence.black_boxes.values()), axis=0)
    each = " and ".join(f"{name} breaks {number}" for name, number in counts.items())
    seen = f"{each} of {_chosen(evidence)}"
    meaning = "whoever does not know the gradients does better than who knows them"
    return _of_followed(evidence, "black_box_beats_white_box", broken_N, seen, meaning)


def large_radius_survives(evidence: Evidence) -> Flag:
    """Raised where more than a tenth of the images withstands an attack that may draw any image at all.

    Every class that a model ever answers is then within reach, so that an attack that works leaves next to nothing:
    far less than the chance of 1 / classes, which one that works on every other image would reach. It starts at the
    clean image: a random one would be an image of nothing, and fool many a model without a gradient.
    """
    n = len(evidence.anything_MK)
    stands = int((predictions(evidence.anything_MK) == evidence.labels_N[:n]).sum())
    seen = (
        f"where every image is allowed, {stands} of {n} still withstand PGD-{STEPS} from the clean image, and one that "
        f"works leaves no more than {n * BOUNDLESS:.0f}"
    )
    raised = stands > n * BOUNDLESS
    return _flag(evidence, "large_radius_survives", raised, stands, n, seen, "the attack does not work")


def rises_with_radius(evidence: Evidence) -> Flag:
    """Raised where more than a point of images break within a radius and stand within twice that radius.

    A larger ball holds the smaller one, so that a working attack does not lose an image. Looked at from half the
    radius to the radius, and from the radius to twice the radius, each by itself.
    """
    half, twice, tried = int(evidence.smaller_N.sum()), int(evidence.larger_stands_N.sum()), evidence.num_larger
    seen = (
        f"{half} of {_chosen(evidence)} break within half the radius, and {twice} of {tried} that break within the "
        f"radius stand within twice the radius"
    )
    meaning = "the attack loses its way where it may go farther"
    if tried and beyond_a_point(twice, tried):
        return _beyond_a_point(evidence, "rises_with_radius", twice, tried, seen, meaning)
    return _of_followed(evidence, "rises_with_radius", evidence.smaller_N, seen, meaning)


def not_converged(evidence: Evidence) -> Flag:
    """Raised where more steps, or the study's own attacks with gradients, break more than a point that it leaves.

    No attack on a network converges to the last image; one that would still take a point away has not converged. Both
    count on the images that the thorough attack was made on. Of the study's attacks AutoAttack counts whole, although
    it breaks some images without gradients.
    """
    followed_N = np.isin(np.arange(len(evidence.labels_N)), evidence.chosen_M)
    tried_N = evidence.tried_white_N & followed_N
    seen = (
        f"APGD-{2 * THOROUGH_STEPS} from other starts breaks {int(evidence.longer_N.sum())} of {_chosen(evidence)}, "
        f"and the study's own attacks break {int(tried_N.sum())} of them"
    )
    meaning = "more attacks would break still more"
    return _of_followed(evidence, "not_converged", evidence.longer_N | tried_N, seen, meaning)


def logit_scaling(evidence: Evidence) -> Flag:
    """Raised where PGD on the cross entropy breaks more once each image's logits are divided by their spread.

    Large logits saturate the softmax, and the gradient of the cross entropy underflows; that of the margin does not.
    Steps along the margin's gradient are the same whatever the logits are divided by, so nothing needs to be repeated
    with it. Compared from the same random starts; with more than two classes the scale also decides which class the
    cross entropy aims at, for better or for worse, so that the rescaled attack must break more than a point of images
    that the other leaves and, by the sign test, significantly more than the other way round.
    """
    gained = int((evidence.rescaled_N & ~evidence.unscaled_N).sum())
    lost = int((evidence.unscaled_N & ~evidence.rescaled_N).sum())
    n, by_margin = len(evidence.labels_N), int(evidence.margin_N[evidence.entropy_left_M].sum())
    seen = (
        f"of {len(evidence.entropy_left_M)} images that PGD on the cross entropy left, it breaks {gained} only with "
        f"logits divided by their spread and {lost} only with the logits as they are, and PGD on the margin, which no "
        f"scale changes, breaks {by_margin}"
    )
    signs = float(binomial_sf(gained - 1, gained + lost, 0.5))
    raised = beyond_a_point(gained, n) and signs < LEVEL
    return _flag(
        evidence, "logit_scaling", raised, gained, n, f"{seen} ({p_value(signs)})", "the cross entropy is saturated"
    )


def randomised(evidence: Evidence) -> Flag:
    """Raised where two answers to the same images differ, in the model that ships or in its twin.

    Asked again in the same way they must agree up to rounding, and so must the answers to all other images of a batch
    when one of them is replaced: noise that is seeded by what is asked repeats itself and is noise all the same. In
    another order and in smaller batches rounding may be another, and an int8 model may round up what it rounded down:
    there the answers must differ no more than noise of half a grey level makes them differ.
    """
    parts = {"the model": evidence.session, "its twin": evidence.twin}
    n = len(evidence.session.again_M)
    again = {name: _beyond_rounding(repeats.again_M, repeats) for name, repeats in parts.items()}
    beside = {name: _beyond_rounding(repeats.beside_M, repeats) for name, repeats in parts.items()}
    regrouped = {name: _farther_than_noise(repeats) for name, repeats in parts.items()}
    raised = any(again.values()) or any(beside.values()) or any(all_from_one(n, k) < LEVEL for k in regrouped.values())
    seen = "; ".join(
        f"asked again, {name} answers differently to {again[name]} of {n} images, beside another first image to "
        f"{beside[name]} of the rest, and in another batch to {regrouped[name]} by more than half a grey level of "
        "noise would do"
        for name in parts
    )
    count = max(*again.values(), *beside.values(), *regrouped.values())
    return _flag(evidence, "randomised", raised, count, n, seen, "one attack and one answer say little about the next")


def constant(evidence: Evidence) -> Flag:
    """Raised where the model hardly answers anything but one class, clean or attacked.

    That is: accuracy on the whole test split at or below the majority class; or no evidence that more than a point of
    the answers differ from the most frequent one; or both under attack, in a model that leans to its most frequent
    answer already when clean: by the sign test it gives it wrongly more often than it withholds it wrongly. A model
    without that lean which an attack drives to one answer is no constant, it is broken, and its robust accuracy says
    so. Accuracy and majority class are compared as they are: it is on the model to be better than a constant.
    """
    labels_N, answers_N, n = evidence.labels_N, predictions(evidence.clean_NK), len(evidence.labels_N)
    majority, robust = int((labels_N == majority_class(labels_N)).sum()), n - int(evidence.white_N.sum())
    accuracy, always = evidence.whole
    others, attacked = _other_answers(answers_N), _other_answers(predictions(evidence.white_NK))
    collapses = robust <= majority and not beyond_a_point(attacked, n) and _leans(answers_N, labels_N)
    raised = accuracy <= always or not beyond_a_point(others, n) or collapses
    seen = (
        f"the accuracy is {accuracy:.3f} where always answering the most frequent class would reach {always:.3f}; "
        f"{robust} of {n} images withstand the white box, of which that class has {majority}; {others} have another "
        f"answer than the most frequent one, {attacked} under attack"
    )
    useless = accuracy <= always and beyond_a_point(others, n)
    meaning = "it is of no more use than a constant" if useless else "a constant cannot be moved, nor is it of use"
    return _flag(evidence, "constant", raised, n - others, n, seen, meaning)


def twin_disagrees(evidence: Evidence) -> Flag:
    """Raised where the twin answers other classes than the model that ships to more than a point of the images.

    Compared on clean images, on FGSM's and on those of `large_radius_survives`, all made on the twin: two models that
    agree on what they learned agree less on what was made to fool one of them.
    """
    clean_N = predictions(evidence.clean_NK) != predictions(evidence.twin_clean_NK)
    moved_N = predictions(evidence.fgsm_NK) != predictions(evidence.twin_fgsm_NK)
    far_M = predictions(evidence.anything_MK) != predictions(evidence.twin_anything_MK)
    either, far, n, m = int((clean_N | moved_N).sum()), int(far_M.sum()), len(clean_N), len(far_M)
    seen = (
        f"the twin and the model that ships answer differently to {int(clean_N.sum())} of {n} clean images, to "
        f"{int(moved_N.sum())} after FGSM, and to {far} of {m} where every image is allowed"
    )
    raised = beyond_a_point(either, n) or beyond_a_point(far, m)
    return _flag(evidence, "twin_disagrees", raised, either, n, seen, "attacks on the twin say little about the model")


def _beyond_a_point(evidence: Evidence, name: str, count: int, n: int, seen: str, meaning: str) -> Flag:
    probability = float(binomial_sf(count - 1, n, TOLERANCE))
    return _flag(evidence, name, beyond_a_point(count, n), count, n, f"{seen} ({p_value(probability)})", meaning)


def _of_followed(evidence: Evidence, name: str, found_N: NDArray[np.bool_], seen: str, meaning: str) -> Flag:
    """Raises a flag where more than a point of all images was found, or of those that were drawn and stand for more."""
    count, n = int(found_N.sum()), len(found_N)
    of_drawn, drawn = int(found_N[evidence.drawn_M].sum()), len(evidence.drawn_M)
    if not drawn or beyond_a_point(count, n) or not beyond_a_point(of_drawn, drawn):
        return _beyond_a_point(evidence, name, count, n, seen, meaning)
    probability = p_value(float(binomial_sf(of_drawn - 1, drawn, TOLERANCE)))
    seen = f"{seen}, {of_drawn} of them among the {drawn} drawn ({probability})"
    return _flag(evidence, name, True, of_drawn, drawn, seen, meaning)


def _flag(evidence: Evidence, name: str, raised: bool, count: int, n: int, seen: str, meaning: str) -> Flag:
    low, high = wilson(count, n)
    text = f"{seen}: {meaning}" if raised else seen
    return Flag(name, raised, text, count / n, low, high, n, evidence.budget.radius)


def _beyond_rounding(moved_M: Floats, repeats: Repeats) -> int:
    """Returns how many answers moved by more than rounding explains."""
    return int((moved_M > repeats.rounding).sum())


def _farther_than_noise(repeats: Repeats) -> int:
    """Returns how many answers moved farther in another batch than any did under noise, and than rounding explains."""
    limit = max(float(repeats.nudged_M.max()), repeats.rounding)
    return int((repeats.regrouped_M > limit).sum())


def _other_answers(answers_N: Integers) -> int:
    """Returns how many answers are not the most frequent one."""
    return len(answers_N) - int(np.bincount(answers_N).max())


def _leans(answers_N: Integers, labels_N: Integers) -> bool:
    """Returns whether the most frequent answer is wrong significantly more often than it is missing."""
    usual = int(np.bincount(answers_N).argmax())
    given = int(((answers_N == usual) & (labels_N != usual)).sum())
    missed = int(((answers_N != usual) & (labels_N == usual)).sum())
    return bool(binomial_sf(given - 1, given + missed, 0.5) < LEVEL)


def _chosen(evidence: Evidence) -> str:
    left, chosen = int((~evidence.white_N).sum()), len(evidence.chosen_M)
    remaining = f"the {left} among {len(evidence.labels_N)} images that the white box leaves"
    return remaining if left == chosen else f"{chosen} (half of them drawn, half nearest to an error) of {remaining}"
