"""The names of cells: content hashes, so that equal work has one name and is done once."""

from collections.abc import Iterable

from trilemma.evaluation.specs import EvaluationSpec
from trilemma.spec import content_key


def evaluation_key(artefact_key: str, spec: EvaluationSpec, sources: Iterable[str] = ()) -> str:
    """Returns the key of an evaluation of one artefact.

    Args:
        artefact_key: What is evaluated.
        spec: How.
        sources: The artefacts on which transferred attacks are made; their order makes no difference.
    """
    return content_key(artefact_key, spec.model_dump(mode="json"), sorted(sources))
