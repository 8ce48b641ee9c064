"""A study's cells: how many, what they are called, and keys that change only when the request does."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.tiny_study import SMALLEST, TINY, plan_of, write_study
from trilemma.attacks.budget import Budget
from trilemma.errors import UserError
from trilemma.evaluation.specs import Diagnostics
from trilemma.federation.specs import TrainSpec
from trilemma.spec import content_key
from trilemma.study.combine import combined_key, diagnostics_key, evidence_keys, key_of
from trilemma.study.keys import evaluation_key
from trilemma.study.plan import without_guarantee

GOLDEN = Path(__file__).parents[1] / "golden" / "study_keys.json"
STUDIES = Path(__file__).parents[2] / "studies"


def test_the_grid_is_every_combination_in_order(tmp_path):
    plan = plan_of(
        write_study(tmp_path),
        "seeds=[0,1]",
        'grid.training=[{name="short",rounds=1},{name="long",rounds=9,local={batch_size=8}}]',
    )
    assert [(t.configuration, t.spec.seed) for t in plan.trainings] == [
        (name, seed)
        for name in ("short", "long", "FGSM training Linf 4/255, short", "FGSM training Linf 4/255, long")
        for seed in (0, 1)
    ]
    assert plan.trainings[0].varied == {"defence": "none", "training": "short"}
    assert plan.trainings[-1].varied == {"defence": "FGSM training Linf 4/255", "training": "long"}
    assert [t.spec.rounds for t in plan.trainings] == [1, 1, 9, 9] * 2
    assert len(plan.cells) == 8 * 2
    assert len({cell.key for cell in plan.cells}) == 16 and len({t.key for t in plan.trainings}) == 8


def test_a_grid_value_replaces_a_table_whole(tmp_path):
    plan = plan_of(write_study(tmp_path), 'grid.local=[{optimizer="adam"}]', "base.local.momentum=0.5")
    assert plan.trainings[0].spec.local.batch_size == 64 and plan.trainings[0].spec.local.momentum == 0.9


def test_baselines_stand_beside_the_grid_and_start_from_the_base(tmp_path):
    plan = plan_of(
        write_study(tmp_path),
        'baselines=[{algorithm={kind="centralised"}},{name="more",rounds=5},{algorithm={kind="local_only"}}]',
    )
    assert [t.configuration for t in plan.trainings] == [
        "plain", "FGSM training Linf 4/255", "centralised", "more", "local only", "local only",
    ]  # fmt: skip
    assert all(t.spec.defence.kind == "none" for t in plan.trainings[2:])
    assert [t.spec.algorithm.client for t in plan.trainings[4:]] == [0, 1]


def test_equal_requests_are_done_once(tmp_path):
    plan = plan_of(
        write_study(tmp_path), 'baselines=[{rounds=2},{defence={kind="fgsm",radius="4/255"}}]', "grid.rounds=[2,2.0]"
    )
    assert len(plan.trainings) == 2


def test_what_all_at_once_is_made_of_is_evaluated_too(tmp_path):
    attacks = '[{kind="pgd",radii=[0.1],steps=2},{kind="fgsm",radii=[0.1]}]'
    plan = plan_of(write_study(tmp_path), f'evaluations=[{{kind="all_at_once",attacks={attacks}}}]')
    assert [spec.kind for spec in plan.evaluations] == ["all_at_once", "pgd", "fgsm", "diagnostics"]


@pytest.mark.parametrize(
    ("evaluations", "diagnosed"),
    [
        ('{kind="clean"},{kind="cost"}', []),
        ('{kind="pgd",radii=["2/255","8/255"]},{kind="fgsm",radius="4/255"}',
         [("linf", 2 / 255), ("linf", 8 / 255), ("linf", 4 / 255)]),
        ('{kind="fgsm",radius=0.1},{kind="pgd",radii=[0.1,0.2]}', [("linf", 0.1), ("linf", 0.2)]),
        ('{kind="pgd",norm="l2",radii=[0.5,1.0]}', [("l2", 0.5), ("l2", 1.0)]),
        ('{kind="carlini_wagner",radius=0.1},{kind="autoattack",radius=0.1}', [("l2", 0.1), ("linf", 0.1)]),
        ('{kind="square",radius=0.1}', [("linf", 0.1)]),
        ('{kind="transfer",attack={kind="mifgsm",norm="l2",radii=[1,3]}}', [("l2", 1.0), ("l2", 3.0)]),
        ('{kind="all_at_once",attacks=[{kind="fgsm",radius=0.2},{kind="transfer",radius=0.2}]}', [("linf", 0.2)]),
        # What the file names stands in for that of its norm and radius, and for no other.
        ('{kind="pgd",radius=0.1},{kind="diagnostics",radius=0.1,num_images=32}', [("linf", 0.1)]),
        ('{kind="pgd",radii=[0.1,0.2]},{kind="diagnostics",radius=0.1}', [("linf", 0.1), ("linf", 0.2)]),
        ('{kind="diagnostics",radius=0.1},{kind="pgd",norm="l2",radius=0.1}', [("linf", 0.1), ("l2", 0.1)]),
        ('{kind="diagnostics",radius=0.05},{kind="diagnostics",radius=0.1}', [("linf", 0.05), ("linf", 0.1)]),
    ],
)  # fmt: skip
def test_every_budget_that_is_attacked_is_diagnosed(tmp_path, evaluations, diagnosed):
    plan = plan_of(write_study(tmp_path), f"evaluations=[{evaluations}]")
    found = [spec for spec in plan.evaluations if isinstance(spec, Diagnostics)]
    assert [(spec.norm, spec.radius) for spec in found] == diagnosed
    assert [spec.num_images for spec in found] == [32 if "num_images=32" in evaluations else 256] * len(found)


FGSM, SQUARE, TRANSFER, MIFGSM = (
    '{kind="fgsm",radius="8/255"}',
    '{kind="square",radius="8/255"}',
    '{kind="transfer",radius="8/255"}',
    '{kind="transfer",attack={kind="mifgsm",radius="8/255"}}',
)


def test_diagnostics_with_other_evidence_are_others(tmp_path):
    """What a study tried within the diagnosed budget is part of what the diagnosis says."""
    study, base = write_study(tmp_path), '{kind="clean"},{kind="pgd",radii=["4/255","8/255"],steps=2}'

    def of(*more: str, grid: str = ""):
        overrides = [f"evaluations=[{','.join([base, *more])}]", *([f"grid.defence=[{grid}]"] if grid else [])]
        plan = plan_of(study, *overrides)
        (spec,) = (s for s in plan.evaluations if isinstance(s, Diagnostics) and s.budget == Budget("linf", 8 / 255))
        return diagnostics_key(plan, plan.cells[0], spec), *evidence_keys(plan, plan.cells[0], spec)

    wide = '{kind="none"},{kind="fgsm",radius="4/255"},{kind="pgd"}'
    found = [of(), of(FGSM), of(SQUARE), of(TRANSFER), of(MIFGSM), of(TRANSFER, grid=wide), of(FGSM, SQUARE, TRANSFER)]
    assert len({key for key, *_ in found}) == len(found)
    # With gradients: PGD and FGSM. Without: Square, and what comes from two artefacts of another training, or four of
    # two; never from the own one.
    assert [(len(white), len(elsewhere)) for _, white, elsewhere in found] == [
        (1, 0), (2, 0), (1, 1), (1, 2), (1, 2), (1, 4), (2, 3),
    ]  # fmt: skip
    # What was not tried within that budget is no evidence.
    for other in ('{kind="fgsm",radius="2/255"}', f'{{kind="pgd",norm="l2",radius={8 / 255}}}', '{kind="cost"}'):
        assert of(other) == of()


SPEC = {
    "data": {"kind": "phantom", "size": 16, "train": 60},
    "partition": {"kind": "iid", "num_clients": 3},
    "model": {"kind": "resnet9", "width": 4, "std": 1},
    "local": {"learning_rate": 1, "momentum": 0.5},
    "rounds": 3,
}


def reordered(value, rank):
    if not isinstance(value, dict):
        return value
    return {name: reordered(value[name], rank) for name in sorted(value, key=lambda n: rank.random())}


@given(st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=20)
def test_a_key_ignores_the_order_of_fields(rank):
    assert TrainSpec.model_validate(reordered(SPEC, rank)).key == TrainSpec.model_validate(SPEC).key


def test_a_key_ignores_how_a_number_or_a_default_is_written():
    key = TrainSpec.model_validate(SPEC).key
    same = {**SPEC, "model": {**SPEC["model"], "std": 1.0}, "local": {"learning_rate": 1.0, "momentum": 0.5}}
    assert TrainSpec.model_validate(same).key == key
    assert TrainSpec.model_validate({**SPEC, "seed": 0, "defence": {"kind": "none"}}).key == key
    quarter, fraction = ({"kind": "fgsm", "radius": radius} for radius in (0.25, "1/4"))
    assert (
        TrainSpec.model_validate({**SPEC, "defence": quarter}).key
        == TrainSpec.model_validate({**SPEC, "defence": fraction}).key
    )
    assert (
        content_key(True) != content_key(1)
        and content_key("1") != content_key(1)
        and content_key(None) != content_key(0)
    )


CHANGES = [
    *(("data", {"kind": "phantom", "size": 16, "train": 60} | change) for change in (
        {"size": 32}, {"train": 61}, {"val": 3}, {"test": 3}, {"sites": 2}, {"classes": 2}, {"shift": 0.5},
        {"images_per_patient": 2}, {"seed": 1})),
    ("data", {"kind": "medmnist", "name": "pneumoniamnist"}),
    ("data", {"kind": "medmnist", "name": "breastmnist"}),
    ("partition", {"kind": "iid", "num_clients": 2}),
    ("partition", {"kind": "by_site", "num_clients": 3}),
    ("partition", {"kind": "dirichlet", "num_clients": 3, "alpha": 1}),
    ("partition", {"kind": "dirichlet", "num_clients": 3, "alpha": 2}),
    *(("model", {"kind": "resnet9", "width": 4, "std": 1} | change) for change in (
        {"width": 8}, {"norm": "batch"}, {"norm": "weight"}, {"groups": 2}, {"activation": "mish"}, {"mean": 0},
        {"std": 2}, {"kind": "resnet18"})),
    *(("algorithm", algorithm) for algorithm in (
        {"kind": "fedprox"}, {"kind": "fedprox", "mu": 1}, {"kind": "centralised"}, {"kind": "local_only"},
        {"kind": "local_only", "client": 1}, {"kind": "fedavg", "weights": "records"},
        {"kind": "fedavg", "weights": [1, 2, 3]}, {"kind": "fedavg", "clients_per_round": 2})),
    *(("local", {"learning_rate": 1, "momentum": 0.5} | change) for change in (
        {"learning_rate": 2}, {"momentum": 0}, {"optimizer": "adam"}, {"weight_decay": 1}, {"batch_size": 3},
        {"epochs": 2}, {"steps": 2}, {"schedule": "cosine"}, {"augmentation": {"shift": 1}},
        {"augmentation": {"flip": True}}, {"augmentation": {"flip": True, "multiplicity": 2}},
        {"class_shares": [0.25, 0.75]}, {"class_shares": [0.75, 0.25]})),
    *(("pretraining", {"data": {"kind": "phantom", "size": 16}} | change) for change in (
        {}, {"data": {"kind": "phantom", "size": 16, "seed": 1}}, {"epochs": 1}, {"optimizer": "adam"},
        {"learning_rate": 1}, {"momentum": 0}, {"batch_size": 8}, {"augmentation": {"flip": True}},
        {"defence": {"kind": "fgsm"}})),
    *(("aggregation", rule) for rule in (
        {"kind": "median"}, {"kind": "trimmed_mean", "num_byzantine": 1}, {"kind": "geometric_median"},
        {"kind": "norm_clipping", "bound": 1}, {"kind": "norm_clipping", "bound": 1, "noise": 0.1},
        {"kind": "centred_clipping", "radius": 1}, {"kind": "centred_clipping", "radius": 1, "steps": 2},
        {"kind": "divide_and_conquer", "num_byzantine": 1}, {"kind": "foolsgold"},
        {"kind": "robust_learning_rate", "threshold": 2}, {"kind": "median", "before": {"kind": "bucketing"}},
        {"kind": "median", "before": {"kind": "nearest_neighbours", "num_byzantine": 1}})),
    ("averaging", {"decay": 0}),
    ("averaging", {"decay": 0.9}),
    *(("server", server) for server in (
        {"kind": "sgd", "learning_rate": 2}, {"kind": "sgd", "momentum": 0.5}, {"kind": "adam"},
        {"kind": "adam", "beta1": 0}, {"kind": "adam", "tau": 1})),
    *(("defence", defence) for defence in (
        {"kind": "fgsm"}, {"kind": "fgsm", "radius": 0.1}, {"kind": "fgsm", "norm": "l2"},
        {"kind": "fgsm", "fraction": 0.5}, {"kind": "fgsm", "warmup": 0.5},
        {"kind": "fgsm", "schedule": [[0, 0], [0.5, 1]]}, {"kind": "pgd"}, {"kind": "pgd", "steps": 2},
        {"kind": "pgd", "step_size": 0.5}, {"kind": "nfgsm"}, {"kind": "nfgsm", "noise": 1}, {"kind": "trades"},
        {"kind": "trades", "beta": 1}, {"kind": "mart"}, {"kind": "mart", "beta": 1},
        *({"kind": "adversarial", "attack": {"kind": kind, "radius": 0.1}} for kind in ("pgd", "mifgsm", "apgd")))),
    *(("early_stopping", stopping) for stopping in (
        {"attack": {"kind": "pgd", "radius": 0.1}}, {"attack": {"kind": "pgd", "radius": 0.2}},
        {"attack": {"kind": "pgd", "radius": 0.1}, "every": 2},
        {"attack": {"kind": "pgd", "radius": 0.1}, "patience": 3},
        {"attack": {"kind": "pgd", "radius": 0.1}, "measure": "balanced_accuracy"})),
    *(("privacy", {"kind": "dp_sgd", "delta": 1e-3} | change) for change in (
        {"epsilon": 1}, {"epsilon": 2}, {"noise_multiplier": 1}, {"epsilon": 1, "delta": 1e-4},
        {"epsilon": 1, "clip": 2}, {"epsilon": 1, "unit": "patient"},
        {"epsilon": 1, "unit": "client", "trust": "central"}, {"epsilon": 1, "noise": "system"},
        *({"epsilon": 1, "clipping": {"kind": kind}} for kind in ("per_layer", "automatic", "adaptive")),
        {"epsilon": 1, "clipping": {"kind": "adaptive", "quantile": 0.3}})),
    *(("threat", {"num_malicious": 1} | change) for change in (
        {"kind": "label_flip"}, {"kind": "label_flip", "share": 0.5}, {"kind": "label_flip", "mode": "next"},
        {"kind": "adversarial_samples"}, {"kind": "adversarial_samples", "steps": 2})),
    *(("codec", codec) for codec in (
        {"kind": "dense"}, {"kind": "dense", "numbers": "int4"}, {"kind": "dense", "error_feedback": True},
        {"kind": "top_k"}, {"kind": "top_k", "share": 0.5}, {"kind": "random_k"}, {"kind": "random_projection"},
        {"kind": "power_sgd"}, {"kind": "power_sgd", "rank": 3})),
    *(("pruning", {"kind": "gradual", "sparsity": sparsity}) for sparsity in (0.5, 0.9)),
    *(("quantisation", {"kind": "int8", "first": first}) for first in (0.5, 0.25)),
    *(("downlink", codec) for codec in ({"kind": "dense"}, {"kind": "dense", "numbers": "int4"}, {"kind": "top_k"})),
    *(("teacher", {"model": {"kind": "resnet9", "width": 4}, "rounds": 1} | change) for change in (
        {}, {"model": {"kind": "resnet9", "width": 8}}, {"rounds": 2}, {"share": 0.25})),
    ("rounds", 4),
    ("seed", 1),
]  # fmt: skip


def test_every_field_changes_the_key():
    keys = [TrainSpec.model_validate(SPEC).key]
    keys += [TrainSpec.model_validate({**SPEC, field: value}).key for field, value in CHANGES]
    assert len(set(keys)) == len(keys)
    assert {field for field, _ in CHANGES} == set(TrainSpec.model_fields)


def test_class_shares_that_are_not_given_leave_a_key_alone():
    """They came later: whoever does not use them keeps the results of a version without them."""
    spec = TrainSpec.model_validate(SPEC)
    dumped = spec.model_dump(mode="json")
    assert "class_shares" not in dumped["local"] and "early_stopping" not in dumped and "downlink" not in dumped
    assert TrainSpec.model_validate({**SPEC, "local": {**SPEC["local"], "class_shares": None}}).key == spec.key
    given = TrainSpec.model_validate({**SPEC, "local": {**SPEC["local"], "class_shares": [0.5, 0.3, 0.2]}})
    assert given.model_dump(mode="json")["local"]["class_shares"] == [0.5, 0.3, 0.2]
    assert TrainSpec.model_validate(given.model_dump(mode="json")) == given


def test_keys_are_what_they_were(tmp_path):
    """A changed key orphans every store: raise KEY_VERSION, say so in the changelog, and renew this file.

    To renew it: delete it and run this test, which writes it and fails once.
    """
    plan = plan_of(write_study(tmp_path, TINY.replace("32/255", "8/255")))  # the radius of the first keys
    keys = {
        "trainings": {t.configuration: t.key for t in plan.trainings},
        "artefacts": {f"{c.training.configuration}, {c.compression.label}": c.key for c in plan.cells},
        "evaluations": {spec.label: key_of(plan, plan.cells[0], spec) for spec in plan.evaluations},
        "smallest": plan_of(write_study(tmp_path, SMALLEST)).trainings[0].key,
    }
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps(keys, indent=1) + "\n")
        pytest.fail(f"{GOLDEN} was written anew; look at it and commit it")
    assert keys == json.loads(GOLDEN.read_text())


def test_an_evaluation_of_other_sources_is_another_one(tmp_path):
    study = write_study(tmp_path)
    small = plan_of(study)
    large = plan_of(study, 'grid.defence=[{kind="none"},{kind="fgsm",radius="4/255"},{kind="pgd"}]')
    transfer, pgd = small.evaluations[2], small.evaluations[1]
    assert small.cells[0].key == large.cells[0].key
    assert combined_key(small, small.cells[0], transfer) != combined_key(large, large.cells[0], transfer)
    assert evaluation_key("a", pgd, ["b", "c"]) == evaluation_key("a", pgd, ["c", "b"])
    assert evaluation_key("a", pgd) != evaluation_key("b", pgd)


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_shipped_studies_are_sound(path):
    plan = plan_of(path)
    assert plan.study.name == path.stem and plan.trainings and plan.cells


def test_a_bundle_without_fields_is_the_base(tmp_path):
    plan = plan_of(write_study(tmp_path), 'grid.both=[{name="as it is"}]')
    assert [t.configuration for t in plan.trainings] == ["as it is", "FGSM training Linf 4/255, as it is"]


def test_explicit_hospitals_share_a_name_without_a_clash(tmp_path):
    plan = plan_of(
        write_study(tmp_path), 'grid.algorithm=[{kind="local_only",client=0},{kind="local_only",client=1}]',
        'grid.defence=[{kind="none"}]',
    )  # fmt: skip
    assert [t.configuration for t in plan.trainings] == ["local only", "local only"]
    with pytest.raises(UserError, match="both called 'local only'"):
        plan_of(
            write_study(tmp_path), 'grid.defence=[{kind="none"}]',
            'baselines=[{algorithm={kind="local_only"}},{name="local only",rounds=9}]',
        )  # fmt: skip


def test_a_study_without_privacy_says_so_once_and_others_name_what_has_none(tmp_path):
    everything = plan_of(write_study(tmp_path))
    assert without_guarantee(everything) == ["every configuration: training without differential privacy"]
    private = 'grid.privacy=[{kind="none"},{kind="dp_sgd",noise_multiplier=2.0,delta=1e-3}]'
    mixed = plan_of(write_study(tmp_path), private)
    bare = {t.configuration for t in mixed.trainings if t.spec.privacy.kind == "none"}
    assert 0 < len(bare) < len({t.configuration for t in mixed.trainings})
    assert {f"{name}: training without differential privacy" for name in bare} <= set(without_guarantee(mixed))
