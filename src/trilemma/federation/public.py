"""What images that are taken for public must be: of the study's form, and none of the study's own."""

from trilemma.data.duplicates import digests
from trilemma.data.records import Dataset, Records
from trilemma.errors import UserError


def refuse_other_form(where: str, dataset: Dataset, public: Dataset, same_classes: bool = False) -> None:
    """Refuses images of another size or with other channels than the study's own.

    Args:
        where: The field that names the public images.
        dataset: The study's own images.
        public: The public ones.
        same_classes: Whether there must be as many classes, too.

    Raises:
        UserError: Naming the field and both numbers.
    """
    for what, ours, other in (
        ("pixels a side", dataset.image_size, public.image_size),
        ("channels", dataset.channels, public.channels),
    ):
        if ours != other:
            raise UserError(
                where,
                f"the images of {public.name} have {other} {what}, and those of {dataset.name} have {ours}",
                "Use images of the same size and channels for both",
            )
    if same_classes:
        refuse_other_classes(where, dataset, public)


def refuse_other_classes(where: str, dataset: Dataset, public: Dataset) -> None:
    """Refuses images of another number of classes.

    Raises:
        UserError: Naming the field and both numbers.
    """
    if len(dataset.classes) != len(public.classes):
        raise UserError(
            where,
            f"the images of {public.name} have {len(public.classes)} classes, and those of {dataset.name} have "
            f"{len(dataset.classes)}",
            "Use public images with the same classes, or do without",
        )


def refuse_shared(where: str, dataset: Dataset, public: Dataset, what: str, theirs: Records) -> None:
    """Refuses public images of which some are the study's own, pixel for pixel.

    Args:
        where: The field that names the public images.
        dataset: The study's own images.
        public: The public data set.
        what: Which of its images these are, for the message.
        theirs: The images.

    Raises:
        UserError: Naming the field and how many.
    """
    used = digests(theirs)
    unseen = dataset.test if dataset.unseen is None else dataset.unseen
    for split, records in (("train", dataset.train), ("val", dataset.val), ("test", unseen)):
        shared = len(set(digests(records)).intersection(used))
        if shared:
            raise UserError(
                where,
                f"{shared} {what} images of {public.name} are {split} images of {dataset.name} too, pixel for pixel",
                "Use other images (phantoms: give them another seed); these are not public, or not unseen",
            )
