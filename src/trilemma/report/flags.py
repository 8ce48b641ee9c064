"""The diagnostics of a row: which signs of robustness that is not there were seen, in which of its trainings."""

from collections.abc import Sequence
from typing import NamedTuple

from trilemma.report.cells import Cell, hospitals, owner
from trilemma.report.estimates import Estimate

#: Flag -> what it says, for a reader who has not met it; in the order in which they are shown.
FLAG_TITLES = {
    "zero_gradient": "zero gradient",
    "fgsm_beats_pgd": "one step beats many",
    "black_box_beats_white_box": "black box beats white box",
    "large_radius_survives": "a boundless attack fails",
    "rises_with_radius": "more radius breaks less",
    "not_converged": "more steps break more",
    "logit_scaling": "saturated logits",
    "randomised": "random answers",
    "constant": "constant answer",
    "twin_disagrees": "the twin disagrees",
}

_PREFIX = "flag_"


class Flag(NamedTuple):
    """One sign, looked for in one artefact.

    Attributes:
        name: Such as "zero_gradient".
        evaluation: The label of the diagnostics, such as "diagnostics Linf 4/255".
        where: The training, such as "seed 0".
        raised: Whether it was seen; None where that is undefined.
        evidence: What was seen, or why it is undefined.
        n: Images that were looked at.
    """

    name: str
    evaluation: str
    where: str
    raised: bool | None
    evidence: str
    n: int = 0

    @property
    def title(self) -> str:
        """Returns the flag in words."""
        return title_of(self.name)

    @property
    def phrase(self) -> str:
        """Returns the flag in words, its evidence and its training."""
        return f"{self.title} ({self.where}): {self.evidence}"

    @property
    def at(self) -> str:
        """Returns the norm and the radius that were looked at, "Linf 4/255"."""
        return self.evaluation.removeprefix("diagnostics ")


def title_of(name: str) -> str:
    """Returns a flag in words."""
    return FLAG_TITLES.get(name, name.replace("_", " "))


def flag_names(flags: Sequence[Flag]) -> list[str]:
    """Returns which flags were looked for, in the order in which they are shown."""
    order = list(FLAG_TITLES)
    found = dict.fromkeys(flag.name for flag in flags)
    return sorted(found, key=lambda name: order.index(name) if name in order else len(order))


def flags_of(cells: Sequence[Cell]) -> tuple[Flag, ...]:
    """Returns every flag that was looked for in some cells of one configuration, raised or not."""
    names = hospitals(cells)
    found = []
    for cell in cells:
        mine = owner(cell, names)
        where = f"seed {cell.run.seed}{f', {mine}’s own model' if mine else ''}"
        for evaluated in cell.evaluated:
            for m in evaluated.measurements if evaluated.kind == "diagnostics" else ():
                if m.metric.startswith(_PREFIX):
                    raised = None if m.value is None else m.value != 0
                    name = m.metric.removeprefix(_PREFIX)
                    found.append(Flag(name, evaluated.evaluation, where, raised, m.reason or m.status, m.n))
    return tuple(found)


def raised_in_words(flags: Sequence[Flag]) -> str:
    """Returns the raised flags by their titles, "zero gradient, constant answer", or ""."""
    return ", ".join(title_of(name) for name in flag_names([flag for flag in flags if flag.raised]))


def in_words(reason: str) -> str:
    """Returns why a number is withheld, every flag's name in words."""
    for name, title in FLAG_TITLES.items():
        reason = reason.replace(f"{name}: ", f"{title}: ")
    return reason


def why_withheld(robust: Estimate, flags: Sequence[Flag]) -> str:
    """Returns in a few words why a robust accuracy is withheld: its flags, or else the reason that it bears."""
    return raised_in_words([flag for flag in flags if f"{flag.name}: " in robust.reason]) or in_words(robust.reason)
