import pytest

from helpers.tiny_federation import DP, tiny_spec
from helpers.tiny_study import SMALLEST, plan_of, write_study
from trilemma.federation.doubts import doubts_about_rule, doubts_about_threat
from trilemma.study.check import _rule_doubts, _threat_doubts

ONE_STEP = {"steps": 1, "batch_size": 4, "momentum": 0}
TRIMMED = {"kind": "trimmed_mean", "num_byzantine": 1}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"privacy": DP}, []),
        ({"aggregation": TRIMMED}, []),
        ({"aggregation": TRIMMED, "threat": {"kind": "label_flip", "num_malicious": 1}}, []),
        ({"aggregation": {"kind": "median"}, "threat": {"kind": "label_flip", "num_malicious": 1}}, []),
        (
            {"aggregation": {"kind": "median"}, "threat": {"kind": "label_flip", "num_malicious": 2}},
            ["median is made for 1 attackers, and the threat has 2"],
        ),
        (
            {
                "aggregation": {"kind": "robust_learning_rate", "threshold": 2},
                "threat": {"kind": "label_flip", "num_malicious": 2},
            },
            ["robust learning rate 2 is made for 1 attackers, and the threat has 2"],
        ),
        (
            {
                "aggregation": {"kind": "mean", "before": {"kind": "nearest_neighbours", "num_byzantine": 1}},
                "threat": {"kind": "label_flip", "num_malicious": 2},
            },
            ["nearest neighbours is made for 1 attackers, and the threat has 2"],
        ),
        (
            {"aggregation": {"kind": "median"}, "model": {"kind": "resnet9", "width": 4, "norm": "batch"}},
            [],  # whose statistics are medians
        ),
        (
            {"aggregation": TRIMMED, "threat": {"kind": "label_flip", "num_malicious": 2}},
            ["trimmed mean 1 is made for 1 attackers, and the threat has 2"],
        ),
        (
            {
                "aggregation": {"kind": "fltrust", "num_images": 20},
                "threat": {"kind": "label_flip", "num_malicious": 3},
            },
            [],  # which assumes nothing of their number
        ),
        (
            {"aggregation": {"kind": "foolsgold"}, "threat": {"kind": "label_flip", "num_malicious": 1}},
            ["looks for several attackers with one aim, and the threat has one"],
        ),
        (
            {"aggregation": {"kind": "geometric_median"}, "algorithm": {"kind": "fedavg", "weights": "records"}},
            ["weighs updates by what hospitals say that they hold"],
        ),
        ({"aggregation": {"kind": "median"}, "algorithm": {"kind": "fedavg", "weights": "records"}}, []),
        ({"aggregation": TRIMMED, "privacy": DP}, ["trimmed mean 1 may take noise for attacks and attacks for noise"]),
        ({"aggregation": TRIMMED, "privacy": DP, "algorithm": {"kind": "centralised"}}, []),
    ],
)
def test_what_is_doubtful_about_a_rule(changes, said):
    found = doubts_about_rule(tiny_spec(**changes))
    assert len(found) == len(said)
    assert all(phrase in doubt for phrase, doubt in zip(said, found, strict=True))


def test_what_fltrust_and_the_mean_do_not_check_is_doubted():
    most = {"kind": "sign_flip", "num_malicious": 2}
    trusted = {"aggregation": {"kind": "fltrust", "num_images": 5}, "threat": most}
    for norm, said in (("batch", 1), ("group", 0)):
        model = {"kind": "resnet9", "width": 4, "norm": norm}
        found = doubts_about_rule(tiny_spec(**trusted, model=model))
        assert len(found) == said and all("medians over all that sent some" in doubt for doubt in found)
    by_records = {"kind": "fedavg", "weights": "records"}
    (doubt,) = doubts_about_rule(tiny_spec(algorithm=by_records, threat={"kind": "inflated_count", "num_malicious": 1}))
    assert "nobody checks the counts" in doubt and doubts_about_rule(tiny_spec(algorithm=by_records)) == []


def test_a_doubt_is_told_once_with_its_configuration(tmp_path):
    private = 'base.aggregation = { kind = "median" }\nbase.privacy = { kind = "dp_sgd", epsilon = 8, delta = 1e-3 }\n'
    text = f"{SMALLEST}seeds = [0, 1]\n{private}"
    (phrase,) = _rule_doubts(plan_of(write_study(tmp_path, text)))
    assert phrase.endswith("median may take noise for attacks and attacks for noise") and ": local noise" in phrase


def test_a_doubt_about_many_configurations_is_told_once(tmp_path):
    rules = 'grid.aggregation = [{ kind = "trimmed_mean", num_byzantine = 1 }]\n'
    text = SMALLEST.replace('"by_site", num_clients = 2', '"iid", num_clients = 5')
    threats = 'grid.threat = [{ kind = "sign_flip", num_malicious = 2 }, { kind = "scaling", num_malicious = 2 }'
    third = ', { kind = "gaussian", num_malicious = 2 }]\n'
    for more, said in (("]\n", " and trimmed mean 1, scaling"), (third, " and 2 other")):
        (phrase,) = _rule_doubts(plan_of(write_study(tmp_path, text + rules + threats + more)))
        assert said in phrase and phrase.endswith("trimmed mean 1 is made for 1 attackers, and the threat has 2")


def test_a_threat_that_does_nothing_or_is_not_measured_is_named(tmp_path):
    few = {"kind": "alie", "num_malicious": 1}
    (doubt,) = doubts_about_threat(tiny_spec(threat=few))
    assert "sends the mean itself: of 3 clients" in doubt and "give it a z" in doubt
    assert doubts_about_threat(tiny_spec(threat={**few, "z": 1.0})) == []
    hidden = {**DP, "trust": "distributed", "num_colluding": 1}
    replayed = {"kind": "malformed", "flaw": "replay", "num_malicious": 1}
    (doubt,) = doubts_about_threat(tiny_spec(threat=replayed, privacy=hidden, local=ONE_STEP))
    assert "does not show that a part of it was sent before" in doubt
    assert doubts_about_threat(tiny_spec(threat=replayed)) == []
    planted = 'base.threat = { kind = "backdoor", num_malicious = 1, target = 1 }\n'
    wanted = '[[evaluations]]\nkind = "backdoor"\ntarget = TARGET\n'
    for evaluations, said in (("", 1), (wanted.replace("TARGET", "0"), 1), (wanted.replace("TARGET", "1"), 0)):
        plan = plan_of(write_study(tmp_path, SMALLEST + planted + evaluations))
        found = _threat_doubts(plan)
        assert len(found) == said and all("has its trigger and its target" in phrase for phrase in found)
