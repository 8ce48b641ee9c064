"""What the server lets into the aggregation: updates of the right shape, finite, of a plausible length, and new."""

import hashlib
import math

import torch
from torch import Tensor

from trilemma.federation.local_training import LocalResult
from trilemma.federation.state import TrainingState

#: An update may be so many times as long as the model's parameters; training never moves them so far in a round.
PLAUSIBLE = 10.0
#: The same of batch norm's statistics, which start at 0 and 1 and may have to go far.
PLAUSIBLE_BUFFERS = 1e4
#: No hospital holds more images than this.
MOST_RECORDS = 1e9
#: The noise of a sum of counts may be so many standard deviations out, which chance does not reach.
FAR_OUT = 10.0


def why_malformed(result: LocalResult, state: TrainingState) -> str:
    """Returns what is wrong with an update's form, or "" where it is of the right shape and finite."""
    if result.damaged:
        return result.damaged
    for sent, expected in ((result.update_P, state.params_P), (result.buffers_Q, state.buffers_Q)):
        if not isinstance(sent, Tensor) or sent.layout != torch.strided or sent.device.type == "meta":
            return "is no dense array of numbers"
        if sent.requires_grad:
            return "comes with a graph of gradients"
        if sent.shape != expected.shape:
            return f"has the shape {tuple(sent.shape)} and not {tuple(expected.shape)}"
        if sent.dtype != expected.dtype:
            return f"holds numbers of the type {str(sent.dtype).removeprefix('torch.')}"
        if not bool(sent.isfinite().all()):
            return "holds numbers that are not finite"
    if result.noised_count is not None and not math.isfinite(result.noised_count):
        return "comes with a count that is no finite number"
    return ""


def why_implausible(result: LocalResult, state: TrainingState, variances_Q: Tensor) -> str:
    """Returns why a well-formed update can come from no training, or "" where it can.

    Args:
        result: What a client sent.
        state: Before the round.
        variances_Q: Which of the statistics are variances.
    """
    if bool((result.buffers_Q[variances_Q] < 0).any()):
        return "holds a negative variance"
    if is_too_long(result.update_P, state):
        return f"is {_length(result.update_P):.3g} long, and the model's parameters are {_length(state.params_P):.3g}"
    if _length(result.buffers_Q) > PLAUSIBLE_BUFFERS * max(1.0, _length(state.buffers_Q)):
        return "holds statistics of batch norm that are too large"
    return ""


def why_old(result: LocalResult, state: TrainingState) -> str:
    """Returns why an update is none of this round, or "" where nobody has sent it before; nothing is often sent."""
    if bool(result.update_P.any()) and digest(result.update_P) in state.seen:
        return "is an earlier update again"
    return ""


def why_no_count(told: float) -> str:
    """Returns why a client cannot hold as many images as it says, or ""."""
    return "" if told <= MOST_RECORDS else f"is from a hospital that says that it holds {told:.3g} images"


def why_no_sum_of_counts(total: float, expected: float, deviation: float) -> str:
    """Returns why a secure sum of centred counts can come from no honest clients, or "" where it can.

    Args:
        total: Of the counts of norms below the clip less those above it, halved, with noise.
        expected: How many units the clients sample together, in the mean.
        deviation: Of the noise of all clients together, at most.
    """
    most = (expected + FAR_OUT * expected**0.5) / 2 + FAR_OUT * deviation
    if abs(total) <= most:
        return ""
    return f"holds a count for the common clip of {total:.3g}, and honest ones come to {most:.3g} at most"


def is_too_long(update_P: Tensor, state: TrainingState) -> bool:
    """Returns whether an update is longer than a multiple of the parameters' length, which no training does at once."""
    return _length(update_P) > PLAUSIBLE * max(1.0, _length(state.params_P))


def digest(update_P: Tensor) -> str:
    """Returns what tells an update from any other, bit for bit."""
    return hashlib.blake2b(update_P.detach().cpu().contiguous().numpy().tobytes(), digest_size=16).hexdigest()


def _length(vector_P: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector_P.double()))
