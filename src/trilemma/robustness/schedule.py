"""How the radius of a defence grows while a model learns, as a share of the radius that it is named after."""

from typing import Annotated

from pydantic import AfterValidator, Field

#: A number from 0 to 1.
Share = Annotated[float, Field(ge=0, le=1)]


def _rises_to_all(points: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
    moments = [moment for moment, _ in points]
    if not points or any(now >= then for now, then in zip(moments, moments[1:], strict=False)):
        raise ValueError(
            "a schedule is a list of points [share of the training, share of the radius] whose first numbers ascend, "
            "such as [[0, 0], [0.3, 0.5], [0.6, 1]]"
        )
    if not any(share == 1 and moment < 1 for moment, share in points):
        raise ValueError(
            "a schedule must reach the whole radius, a share of 1, before the training ends, at a moment below 1; for "
            "less, give the smaller radius"
        )
    return points


#: Share of a training that ends before it does: otherwise what grows would never be grown.
Warmup = Annotated[float, Field(ge=0, lt=1)]

#: Points (share of the training that is done, share of the radius), joined by straight lines; level outside of them.
Schedule = Annotated[tuple[tuple[Share, Share], ...], AfterValidator(_rises_to_all)]


def radius_share(warmup: float, schedule: Schedule | None, progress: float) -> float:
    """Returns the share of the radius at a moment of the training.

    Args:
        warmup: Share of the training over which the radius grows in proportion from 0; for where there is no schedule.
        schedule: Points that the share passes through, or None.
        progress: Share of the training that is done.
    """
    if schedule is None:
        return 1.0 if progress >= warmup else progress / warmup
    before, share_before = schedule[0]
    if progress <= before:
        return share_before
    for moment, share in schedule[1:]:
        if progress <= moment:
            return share_before + (share - share_before) * (progress - before) / (moment - before)
        before, share_before = moment, share
    return share_before


def check_one_growth(warmup: float, schedule: Schedule | None) -> None:
    """Raises ValueError where both say how the radius grows."""
    if warmup and schedule is not None:
        raise ValueError(
            f"give either warmup or schedule, not both: warmup = {warmup:g} is schedule = [[0, 0], [{warmup:g}, 1]]"
        )


def growth_label(warmup: float, schedule: Schedule | None) -> str:
    """Returns the text for tables, empty where the radius does not change."""
    if schedule is not None:
        return ", radius schedule " + " ".join(f"{moment:g}:{share:g}" for moment, share in schedule)
    return "" if warmup == 0 else f", warm-up {100 * warmup:g} %"
