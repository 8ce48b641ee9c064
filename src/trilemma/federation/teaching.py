"""A training with a teacher: the two federations that it consists of, one after the other, and what the first gives.

The first trains the teacher. It is an ordinary federation of the same hospitals under the same plans of privacy, whose
noise is calibrated for the rounds of both. What protects anybody, noise and who is sampled, is drawn with a key of its
own, so that neither the two nor any other training share it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from trilemma.federation.specs import TrainSpec
from trilemma.models.classifier import Classifier
from trilemma.robustness.objective import Objective
from trilemma.robustness.objectives import taught

#: Images that the teacher answers at once.
ANSWERED_TOGETHER = 256


class TeacherTraining(TrainSpec):
    """The training of a teacher, derived and never written in a study.

    Attributes:
        student: Key of the training that it belongs to: a teacher's noise depends on the student's rounds, so that two
            students' teachers must not draw the same.
    """

    student: str


class Lessons(NamedTuple):
    """What a finished teacher gives.

    Attributes:
        classifier: Answers: in evaluation mode, and nothing changes it.
        private_steps: Client name -> DP steps behind it.
        seconds: Wall time that it took.
    """

    classifier: Classifier
    private_steps: dict[str, int]
    seconds: float


def teacher_spec(spec: TrainSpec) -> TeacherTraining:
    """Returns the training of a student's teacher: its own network and rounds, and no means to make it small."""
    assert spec.teacher is not None  # whoever asks has one
    own = {"model": spec.teacher.model, "rounds": spec.teacher.rounds, "student": spec.key}
    none = dict.fromkeys(("teacher", "early_stopping", "downlink", "pruning", "quantisation"))
    return TeacherTraining(**{**dict(spec), **none, **own})


def phases(spec: TrainSpec) -> tuple[TrainSpec, ...]:
    """Returns the trainings that a training consists of, in their order: a teacher's, if it has one, and its own."""
    return (spec,) if spec.teacher is None else (teacher_spec(spec), spec)


def total_rounds(spec: TrainSpec) -> int:
    """Returns the rounds of a training and of its teacher's."""
    return spec.rounds + (spec.teacher.rounds if spec.teacher is not None else 0)


def phase_name(spec: TrainSpec) -> tuple[str, ...]:
    """Returns what is added to the names of public random streams, so that teacher and student draw differently."""
    return ("teacher",) if isinstance(spec, TeacherTraining) else ()


def with_teacher(spec: TrainSpec, objective: Objective, teacher: Classifier | None) -> Objective:
    """Returns a student's objective; that of a training without a teacher is left as it is.

    With public class shares the student's logits are adjusted, and the teacher's, which was trained so too, alike: both
    then speak of the training images' frequencies.
    """
    if spec.teacher is None or teacher is None:
        return objective
    return taught(objective, _answers(teacher, spec.local.class_shares), spec.teacher.share)


def _answers(teacher: Classifier, class_shares: tuple[float, ...] | None) -> Callable[[Tensor], Tensor]:
    @torch.no_grad()
    def answers(x_BCHW: Tensor) -> Tensor:
        if not len(x_BCHW):
            return x_BCHW.new_zeros(0, teacher.num_classes)
        logits_BK = torch.cat([teacher(x) for x in x_BCHW.split(ANSWERED_TOGETHER)])
        return logits_BK if class_shares is None else logits_BK + logits_BK.new_tensor(class_shares).log()

    return answers
