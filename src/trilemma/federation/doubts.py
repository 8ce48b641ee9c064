"""What a rule of aggregation cannot do for a training, although nothing forbids the two together."""

from trilemma.federation.specs import FedAvg, TrainSpec
from trilemma.privacy.specs import DpSgd


def doubts_about_rule(spec: TrainSpec) -> list[str]:
    """Returns a sentence for each reason why a rule may withstand less than it says; none for the mean.

    What is refused is not among them: a secure sum hides the single updates that rules look at.
    """
    if spec.aggregation.kind == "mean" or not isinstance(spec.algorithm, FedAvg):
        return []
    name, found = spec.aggregation.label, []
    if isinstance(spec.privacy, DpSgd):
        found.append(
            f"local noise makes honest updates differ from each other, and attackers hide among them: {name} may take "
            "noise for attacks and attacks for noise"
        )
    num_malicious, made_for = len(spec.threat.malicious(spec.partition.num_clients)), spec.aggregation.attackers
    if made_for and num_malicious > made_for:
        found.append(f"{name} is made for {made_for} attackers, and the threat has {num_malicious}")
    return found
