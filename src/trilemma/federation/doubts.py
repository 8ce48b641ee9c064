"""What a rule of aggregation, or a threat, cannot do in a training, although nothing forbids it."""

from trilemma.attacks.poisoning.on_updates import Alie, Malformed
from trilemma.attacks.poisoning.updates import alie_z
from trilemma.federation.aggregation.rule_spec import NearestNeighbourMixing
from trilemma.federation.specs import FedAvg, TrainSpec
from trilemma.privacy.specs import DpSgd

#: Rules in which a weight is more than a share of a mean.
_WEIGHED = ("geometric_median", "norm_clipping", "centred_clipping", "robust_learning_rate")


def doubts_about_rule(spec: TrainSpec) -> list[str]:
    """Returns a sentence for each reason why a rule may withstand less than it says.

    There is none for the mean, which says nothing, but where counts are lied about. What is refused is not among them:
    a secure sum hides the single updates that rules look at.
    """
    rule = spec.aggregation
    if not isinstance(spec.algorithm, FedAvg):
        return []
    num_clients = spec.partition.num_clients
    most_lie = 2 * len(spec.threat.malicious(num_clients)) >= num_clients
    if rule.kind == "mean" and rule.before is None:
        lies = spec.threat.kind == "inflated_count"
        return [f"{rule.label}: nobody checks the counts that a liar's weight comes from: use 'equal'"] if lies else []
    found = []
    if rule.kind == "fltrust" and most_lie and getattr(spec.model, "norm", "") == "batch":
        found.append(
            f"{rule.label} judges updates, and the statistics of batch norm are medians over all that sent some, most "
            "of whom lie: use norm = 'group'"
        )
    if isinstance(spec.privacy, DpSgd):
        found.append(
            f"local noise makes honest updates differ from each other, and attackers hide among them: {rule.label} may "
            "take noise for attacks and attacks for noise"
        )
    if spec.algorithm.weights == "records" and rule.kind in _WEIGHED:
        found.append(
            f"{rule.label} weighs updates by what hospitals say that they hold (algorithm.weights = 'records'), and "
            "who says more weighs more: use 'equal'"
        )
    if rule.kind == "foolsgold" and len(spec.threat.malicious(spec.partition.num_clients)) == 1:
        found.append(f"{rule.label} looks for several attackers with one aim, and the threat has one")
    return found + _too_many(spec)


def doubts_about_threat(spec: TrainSpec) -> list[str]:
    """Returns a sentence for each reason why a threat may do nothing, or do it unseen."""
    trust = spec.privacy.trust if isinstance(spec.privacy, DpSgd) else None
    threat, num_clients = spec.threat, spec.partition.num_clients
    if isinstance(threat, Malformed) and threat.flaw == "replay" and trust == "distributed":
        return [f"{threat.label}: a secure sum does not show that a part of it was sent before, and lets it in"]
    if isinstance(threat, Alie) and threat.z is None:
        present = getattr(spec.algorithm, "clients_per_round", None) or num_clients
        num_malicious = len(threat.malicious(num_clients))
        if alie_z(present, min(num_malicious, present)) == 0:
            return [
                f"{threat.label} sends the mean itself: of {present} clients so few attackers may lie no farther out; "
                "give it a z"
            ]
    return []


def _too_many(spec: TrainSpec) -> list[str]:
    """Returns where the threat has more attackers than the rule, or what happens before it, is made for."""
    rule, num_clients = spec.aggregation, spec.partition.num_clients
    num_malicious = len(spec.threat.malicious(num_clients))
    per_round = getattr(spec.algorithm, "clients_per_round", None) or num_clients
    num_rows = per_round if rule.before is None else rule.before.num_rows(per_round)
    made_for = {rule.label: rule.attackers or (num_rows - 1) // 2}
    if rule.kind == "robust_learning_rate":
        made_for = {rule.label: rule.threshold - 1}  # pyright: ignore[reportAttributeAccessIssue] - its kind says so
    if rule.kind in ("mean", "norm_clipping", "centred_clipping", "fltrust", "foolsgold"):
        made_for = {}  # which shorten, have images of their own, or look for several of one aim
    if isinstance(rule.before, NearestNeighbourMixing):
        made_for[rule.before.label] = rule.before.num_byzantine
    return [
        f"{name} is made for {most} attackers, and the threat has {num_malicious}"
        for name, most in made_for.items()
        if num_malicious > most
    ]
