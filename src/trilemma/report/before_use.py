"""What must be known of a model before anything else that its card says."""

from trilemma.report.claims import claim_of
from trilemma.report.configurations import Row, headline, void_reasons
from trilemma.report.doubts import doubts
from trilemma.results import Shipment


def before_use(shipped: Shipment, row: Row) -> list[str]:
    """Returns what must be known before anything else: a constant model, withheld numbers, rules that cannot hold."""
    said = [f"This model {phrase}." for phrase in row.constant]
    if any(facts.synthetic for facts in shipped.results.data):
        said.append("It was trained and measured on SYNTHETIC images, not taken of patients.")
    if shipped.split == "val":
        said.append("It was measured on validation images; settings may have been chosen by them.")
    void = void_privacy(shipped)
    if void:
        said.append(f"It was trained with differential privacy, and nothing may be claimed of it: {void}.")
    claim = claim_of(shipped.results.artefacts[0].guarantee)
    if claim is not None and claim.seeded:
        said.append(
            "The noise of its differential privacy came from a seed: its guarantee is for research, and no ground for "
            "releasing it."
        )
    for finding in doubts([row], headline([row])):
        said += [f"{finding.topic}: {sentence}" for sentence in finding.sentences]
    return said + list(shipped.results.runs[0].doubts)


def void_privacy(shipped: Shipment) -> str:
    """Returns why nothing may be claimed of a model that was trained with differential privacy; "" otherwise."""
    return "; ".join(void_reasons(shipped.results.artefacts[0])) if "privacy" in shipped.settings else ""
