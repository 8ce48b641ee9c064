"""Which trainings no guarantee could hold for, each with its reason and the way out."""

from typing import TYPE_CHECKING

from trilemma.privacy.specs import DpSgd

if TYPE_CHECKING:
    from trilemma.federation.specs import TrainSpec


def why_unsound(spec: "TrainSpec") -> str:
    """Returns why a training cannot be private in the way it asks for; empty where it can."""
    if not isinstance(spec.privacy, DpSgd):
        return ""
    federated = spec.algorithm.kind in ("fedavg", "fedprox")
    if federated and getattr(spec.algorithm, "weights", None) == "records":
        return (
            "algorithm.weights 'records' ties every update to counts that the guarantee does not cover; "
            "under DP use 'equal' or give public numbers"
        )
    if spec.privacy.trust == "distributed":
        return _why_no_distributed_noise(spec, spec.privacy, federated)
    if spec.privacy.unit == "client":
        return _why_no_private_clients(spec, federated)
    if spec.privacy.trust == "central" and spec.algorithm.kind != "centralised":
        return (
            f"trust 'central' with unit '{spec.privacy.unit}' is for algorithm 'centralised', where one place holds "
            "all images; in a federation the server sees no gradient of a single one: use trust 'local' or "
            "'distributed', or unit 'client'"
        )
    return ""


def why_no_root(spec: "TrainSpec") -> str:
    """Returns why the server may not train on its own images; empty where it may, or has none."""
    rule = spec.aggregation
    if rule.kind != "fltrust" or rule.data is not None:
        return ""
    if isinstance(spec.privacy, DpSgd):
        return (
            "aggregation 'fltrust' trains on the validation images, which are private, and what that tells of them is "
            "not accounted for; under DP name public images, data = { kind = ... }"
        )
    if spec.early_stopping is not None and spec.early_stopping.split == "val":
        return (
            "aggregation 'fltrust' trains on the validation images by which early_stopping.split 'val' chooses the "
            "model; name other images, data = { kind = ... }"
        )
    if spec.data.evaluate_on == "val":
        return (
            "aggregation 'fltrust' trains on the validation images that data.evaluate_on = 'val' measures on; name "
            "other images, data = { kind = ... }"
        )
    return ""


def why_no_codec(spec: "TrainSpec") -> str:
    """Returns why updates may not be written as asked; empty where they may.

    Where each client adds all of its noise itself, whatever a codec does comes after it and costs no privacy: also what
    a client remembers was made of noised numbers.
    """
    codec, privacy = spec.codec, spec.privacy
    if codec is None or not isinstance(privacy, DpSgd) or spec.algorithm.kind not in ("fedavg", "fedprox"):
        return ""
    if privacy.trust == "distributed":
        return (
            "a secure sum adds whole numbers of one lattice that all clients share, unseen, and a codec writes each "
            "update in its own way; leave codec out, or use trust 'local'"
        )
    if privacy.unit == "client" and (codec.remembers or codec.kind == "power_sgd"):
        return (
            f"codec '{codec.kind}' lets a client remember what it could not say, without noise, and its later updates "
            "tell of it: the guarantee for whole clients does not cover that; set error_feedback = false and use "
            "'dense', 'random_k' or 'random_projection'"
        )
    return ""


def why_no_downlink(spec: "TrainSpec") -> str:
    """Returns why there is no model to send down; empty where there is one, or nobody asks how it is written.

    Under differential privacy nothing is refused: what comes down, and what the server remembers of it, is made of
    models that are released, and of nothing else.
    """
    if spec.downlink is None or spec.algorithm.kind in ("fedavg", "fedprox"):
        return ""
    return (
        f"downlink says how a server sends its model down, and algorithm '{spec.algorithm.kind}' has no server; leave "
        "it out of base and give it to the federated trainings, in grid.downlink or a bundle of the grid"
    )


def why_no_pruning(spec: "TrainSpec") -> str:
    """Returns why weights may not leave while a model is trained; empty where they may."""
    if spec.pruning is None or spec.early_stopping is None:
        return ""
    return (
        "early_stopping may choose a round before pruning has ended, and the model would not be as sparse as asked; "
        "leave early_stopping out, or prune the finished model ([[compressions]] kind = 'prune')"
    )


def why_no_teacher(spec: "TrainSpec") -> str:
    """Returns why a model may not learn a teacher's answers; empty where it may, or has no teacher."""
    if spec.teacher is None:
        return ""
    if spec.defence.kind == "mart":
        return (
            "defence 'mart' weighs each image by what the model answers to its one true class, and a teacher's answers "
            "name none; use 'trades' or 'pgd', or leave teacher out"
        )
    if spec.threat.when is not None:
        return (
            "threat.when counts the rounds of one training, and a training with a teacher is two; leave when out, and "
            "the threat acts in all rounds of both, or leave teacher out"
        )
    return ""


def why_no_such_threat(spec: "TrainSpec") -> str:
    """Returns why a threat cannot act in a training; empty where it can."""
    threat, federated = spec.threat, spec.algorithm.kind in ("fedavg", "fedprox")
    if threat.on_updates and not federated:
        return (
            f"threat '{threat.kind}' changes what hospitals send, and algorithm '{spec.algorithm.kind}' sends no "
            "updates; name the baseline in [[baselines]] with threat = { kind = 'none' }"
        )
    if threat.kind == "inflated_count" and not (federated and getattr(spec.algorithm, "weights", "") == "records"):
        return "threat 'inflated_count' needs algorithm.weights = 'records': other weights do not ask for counts"
    if getattr(threat, "flaw", "") == "frame" and (spec.codec is None or not federated):
        return "threat.flaw 'frame' damages frames, and without a codec there are none; give a codec, or another flaw"
    if threat.when is not None and threat.when.first > spec.rounds:
        return (
            f"threat.when.first {threat.when.first} lies after the last of {spec.rounds} rounds: nobody would ever act"
        )
    if not isinstance(spec.privacy, DpSgd) or spec.privacy.trust == "local":
        return ""
    return _why_no_noise(spec, spec.privacy) or _why_not_to_be_seen(spec, spec.privacy)


def _why_no_noise(spec: "TrainSpec", privacy: DpSgd) -> str:
    """Returns why the noise of a secure sum would not be whole: who sends something else leaves out its share."""
    threat, present = spec.threat, getattr(spec.algorithm, "clients_per_round", None) or spec.partition.num_clients
    num_malicious = min(len(threat.malicious(spec.partition.num_clients)), present)
    if privacy.trust != "distributed" or not threat.on_updates or privacy.num_colluding >= num_malicious:
        return ""
    return (
        f"threat '{threat.kind}' replaces what {num_malicious} hospitals send, and with it their shares of the noise; "
        f"set privacy.num_colluding = {num_malicious} or more, so that the others' shares are enough"
    )


def _why_not_to_be_seen(spec: "TrainSpec", privacy: DpSgd) -> str:
    threat = spec.threat
    if not threat.sees_others:
        return ""
    hidden = "a secure sum" if privacy.trust == "distributed" else "a server that adds the noise"
    return (
        f"threat '{threat.kind}' knows what the honest hospitals send, and under trust '{privacy.trust}' {hidden} "
        "shows single updates to nobody else: what it sent would break the guarantee; use another threat, "
        "or knows = 'own' where it has that"
    )


def why_no_looks(spec: "TrainSpec") -> str:
    """Returns why early stopping may not choose the model in the way it is asked to; empty where it may."""
    stopping = spec.early_stopping
    if stopping is None:
        return ""
    if stopping.attack is None and (spec.defence.budget is None or not spec.defence.budget.radius):
        return (
            "early_stopping looks at the defence's radius, and there is none; give it an attack, such as "
            "attack = { kind = 'pgd', radius = '4/255', steps = 10 }"
        )
    if stopping.split == "public":
        if spec.pretraining is None:
            return "early_stopping.split 'public' means the validation images of pretraining.data; give pretraining"
        return _why_not_so_soon(spec)
    if spec.data.evaluate_on == "val":
        return (
            "early_stopping.split 'val' chooses the model by the very images that data.evaluate_on = 'val' measures it "
            "on; leave early_stopping out (rounds can be compared by hand), or set split = 'public'"
        )
    if isinstance(spec.privacy, DpSgd):
        return (
            "early_stopping.split 'val' chooses the model by private images, and what that tells of them is not "
            "accounted for; under DP fix the rounds and use averaging against robust overfitting, or set "
            "split = 'public' with pretraining"
        )
    return ""


def _why_not_so_soon(spec: "TrainSpec") -> str:
    stopping = spec.early_stopping
    if stopping is None or stopping.patience is None or not isinstance(spec.privacy, DpSgd):
        return ""
    return (
        "early_stopping.patience ends a training when its models say so, and epsilon holds only for a number of rounds "
        "that is fixed beforehand; under DP leave patience out: all rounds are trained, and keeping the best costs no "
        "privacy"
    )


def _why_no_distributed_noise(spec: "TrainSpec", privacy: DpSgd, federated: bool) -> str:
    if not federated:
        return (
            f"trust 'distributed' shares the noise among the hospitals of a federation, and algorithm "
            f"'{spec.algorithm.kind}' has none; use 'local'"
        )
    if spec.local.steps != 1:
        return (
            "trust 'distributed' needs local.steps = 1: a share of the noise protects only in the sum of all, and a "
            "second local step would start from a model that only this share protects"
        )
    if spec.local.optimizer != "sgd" or spec.local.momentum:
        return (
            "trust 'distributed' needs local.optimizer = 'sgd' with local.momentum = 0: the updates must be the noised "
            "gradients up to a factor, so that their sum holds the noise of all (momentum would start afresh in every "
            "round anyway; give it to the server, server = { kind = 'sgd', momentum = 0.9 })"
        )
    return _why_no_equal_sum(spec, "trust 'distributed'") or _why_too_many_collude(spec, privacy)


def _why_too_many_collude(spec: "TrainSpec", privacy: DpSgd) -> str:
    present = getattr(spec.algorithm, "clients_per_round", None) or spec.partition.num_clients
    if privacy.num_colluding < present:
        return ""
    return (
        f"privacy.num_colluding {privacy.num_colluding} leaves none of the {present} clients of a round to add the "
        f"noise; it can be at most {present - 1}"
    )


def _why_no_private_clients(spec: "TrainSpec", federated: bool) -> str:
    if not federated:
        return (
            f"unit 'client' protects what a hospital sends to the server of a federation, and algorithm "
            f"'{spec.algorithm.kind}' has none; use unit 'example' or 'patient'"
        )
    return _why_no_equal_sum(spec, "unit 'client'")


def _why_no_equal_sum(spec: "TrainSpec", what: str) -> str:
    if spec.aggregation.kind != "mean":
        return (
            f"{what} needs aggregation 'mean', not '{spec.aggregation.kind}': the noise is meant for a sum, and other "
            "rules look at single updates"
        )
    if getattr(spec.algorithm, "weights", "equal") != "equal":
        return f"{what} needs algorithm.weights 'equal': another weight would move both the clip and the noise"
    return ""
