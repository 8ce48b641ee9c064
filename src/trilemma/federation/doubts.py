"""What a rule of aggregation cannot do for a training, although nothing forbids the two together."""

from trilemma.federation.aggregation.rule_spec import NearestNeighbourMixing
from trilemma.federation.specs import FedAvg, TrainSpec
from trilemma.privacy.specs import DpSgd


def doubts_about_rule(spec: TrainSpec) -> list[str]:
    """Returns a sentence for each reason why a rule may withstand less than it says; none for the mean alone.

    What is refused is not among them: a secure sum hides the single updates that rules look at.
    """
    rule = spec.aggregation
    if not isinstance(spec.algorithm, FedAvg) or (rule.kind == "mean" and rule.before is None):
        return []
    found = []
    if isinstance(spec.privacy, DpSgd):
        found.append(
            f"local noise makes honest updates differ from each other, and attackers hide among them: {rule.label} may "
            "take noise for attacks and attacks for noise"
        )
    return found + _too_many(spec)


def _too_many(spec: TrainSpec) -> list[str]:
    """Returns where the threat has more attackers than the rule, or what happens before it, is made for."""
    rule, num_clients = spec.aggregation, spec.partition.num_clients
    num_malicious = len(spec.threat.malicious(num_clients))
    per_round = getattr(spec.algorithm, "clients_per_round", None) or num_clients
    num_rows = per_round if rule.before is None else rule.before.num_rows(per_round)
    made_for = {rule.label: rule.attackers or (num_rows - 1) // 2}
    if rule.kind == "robust_learning_rate":
        made_for = {rule.label: rule.threshold - 1}  # pyright: ignore[reportAttributeAccessIssue] - its kind says so
    if rule.kind in ("mean", "norm_clipping", "centred_clipping", "foolsgold"):
        made_for = {}  # which shorten, or look for several of one aim
    if isinstance(rule.before, NearestNeighbourMixing):
        made_for[rule.before.label] = rule.before.num_byzantine
    return [
        f"{name} is made for {most} attackers, and the threat has {num_malicious}"
        for name, most in made_for.items()
        if num_malicious > most
    ]
