import re
from dataclasses import replace

from builder import BOTH, CONSTANT, DP, HOSPITALS, MADE, MAJORITY, PGD, PLAIN, build, rate

from trilemma.privacy.guarantee import Guarantee
from trilemma.report.answer import answer
from trilemma.report.claims import PROTECTED
from trilemma.report.terminal import answer_text


def paragraph(results, topic):
    found = [finding.text for finding in answer(results) if topic in finding.topic]
    assert len(found) == 1, [finding.topic for finding in answer(results)]
    return found[0]


def with_made(**changes):
    names = {"plain": PLAIN, "pgd": PGD, "dp": DP, "both": BOTH, "alone": "local only", "flip": "label flip"}
    return build({**MADE, **{names[name]: made for name, made in changes.items()}})


def test_the_answer_is_the_same_every_time():
    assert answer(build()) == answer(build())


def test_collaboration_flips_with_the_numbers():
    assert "everybody’s patients collaboration is worth it" in paragraph(build(), "collaboration")
    swapped = with_made(
        plain=replace(MADE["local only"], algorithm="fedavg"), alone=replace(MADE[PLAIN], algorithm="local_only")
    )
    assert "everybody’s patients collaboration did not pay" in paragraph(swapped, "collaboration")
    equal = with_made(alone=replace(MADE[PLAIN], algorithm="local_only"))
    assert "everybody’s patients it is open whether collaboration pays" in paragraph(equal, "collaboration")
    assert "no difference can be shown" in paragraph(equal, "collaboration")


def test_collaboration_names_its_numbers_and_their_interval():
    text = paragraph(build(), "collaboration")
    assert "AUROC is 0.962 against 0.921" in text
    assert re.search(r"0\.041 more \(95\u00a0% interval 0\.\d{3} to 0\.\d{3}\)", text)
    assert "pooling all images in one place" in text


def with_clients(results, values):
    """Replaces accuracies by hospital: {configuration: function from hospital and training to a value or None}."""
    runs = {run.key: run for run in results.runs}
    evaluated = []
    for e in results.evaluated:
        run = runs[e.artefact_key.rsplit("/", 1)[0]]
        change = values.get(run.configuration)
        if e.kind == "clean" and change is not None:
            kept = [m for m in e.measurements if m.client not in HOSPITALS]
            by_name = [(name, change(i, run.spec["algorithm"].get("client"))) for i, name in enumerate(HOSPITALS)]
            kept += [rate("accuracy", value, client=name) for name, value in by_name if value is not None]
            e = replace(e, measurements=tuple(kept))
        evaluated.append(e)
    return replace(results, evaluated=tuple(evaluated))


def test_a_hospital_alone_is_judged_on_its_own_patients_too():
    # Each model is far better at home than elsewhere: alone pays at home, together pays for everybody.
    results = with_clients(
        build(), {PLAIN: lambda i, _: 0.8, "local only": lambda i, trained: 0.95 if i == trained else 0.3}
    )
    text = paragraph(results, "collaboration")
    assert "On each hospital’s own patients collaboration did not pay." in text
    assert "accuracy is 80.0 % against 95.0 %, 15.0 points less" in text
    assert "On everybody’s patients collaboration is worth it." in text
    # Newcombe: 15.0 points and the root of 3.14 and 1.71 squared, for 624 images each.
    assert "hospital 2 80.0\u00a0% against 95.0\u00a0% (difference −18.6 to −11.4)" in text
    worse = with_clients(
        build(), {PLAIN: lambda i, _: 0.8, "local only": lambda i, trained: 0.6 if i == trained else 0.99}
    )
    assert "own patients collaboration is worth it" in paragraph(worse, "collaboration")


def test_the_hospitals_that_can_be_compared_are_said():
    alone = {"local only": lambda i, trained: 0.8 if i else None}
    text = paragraph(with_clients(build(), alone), "collaboration")
    assert "mean over 2 hospitals" in text
    assert "hospital 2 8" in text
    assert "hospital 1 " not in text
    nobody = paragraph(with_clients(build(), {"local only": lambda i, trained: None}), "collaboration")
    assert "own patients the two cannot be compared: no hospital has a number for both models." in nobody
    assert "On everybody’s patients collaboration is worth it." in nobody
    results = build()
    dropped = tuple(
        replace(e, measurements=tuple(m for m in e.measurements if m.client)) if e.kind == "clean" else e
        for e in results.evaluated
    )
    text = paragraph(replace(results, evaluated=dropped), "collaboration")
    assert "On everybody’s patients the two cannot be compared" in text
    assert "own patients it is open" in text or "own patients collaboration is worth it" in text


def test_a_hospital_whose_own_model_is_missing_is_not_judged_by_anothers():
    results = build()
    gone = {r.key for r in results.runs if r.configuration == "local only" and r.spec["algorithm"]["client"] == 1}
    text = paragraph(replace(results, runs=tuple(r for r in results.runs if r.key not in gone)), "collaboration")
    assert "hospital 1 " in text
    assert "hospital 2 " not in text


def test_privacy_flips_with_the_numbers():
    assert "0.049 less" in paragraph(build(), "privacy cost")
    swapped = with_made(plain=replace(MADE[DP], epsilon=None), dp=replace(MADE[PLAIN], epsilon=7.96))
    assert re.search(r"0\.04[89] more", paragraph(swapped, "privacy cost"))
    assert "(ε ≤ 7.96 for any one image, δ\u00a00.0001, local noise (seeded))" in paragraph(build(), "privacy cost")


def test_what_a_guarantee_protects_is_said_and_nothing_else():
    hospital = {"unit": "client", "trust": "central"}
    results = with_made(
        dp=replace(MADE[DP], **hospital),
        both=replace(MADE[BOTH], robust=(0.77, 0.75, 0.74), **hospital),
    )
    said = "ε ≤ 7.96 for any one hospital, δ\u00a00.0001, central noise (seeded)"
    assert said in paragraph(results, "privacy cost")
    assert f"It is private ({said})" in paragraph(results, "at once")
    assert "one image, δ" not in paragraph(results, "at once")


def test_the_report_calls_what_is_protected_as_the_guarantee_does():
    for unit, words in PROTECTED.items():
        guarantee = Guarantee(unit=unit, trust="central", delta=1e-5, clip=1.0, epsilon_by_client={"a": 1.0})
        assert words in guarantee.in_words().partition(", the probability")[0]


def test_a_void_guarantee_is_never_a_number():
    results = build()
    artefacts = tuple(
        replace(a, guarantee=a.guarantee.voided("a resumed run forgot its history")) for a in results.artefacts
    )
    text = paragraph(replace(results, artefacts=artefacts), "privacy cost")
    assert "no guarantee" in text
    assert "ε" not in text


def test_adversarial_training_costs_and_buys():
    text = paragraph(build(), "adversarial training")
    assert "AUROC is 0.951 against 0.962" in text
    assert "points more" in text
    swapped = with_made(
        pgd=replace(MADE[PGD], robust=(0.3, 0.05, 0.0)), plain=replace(MADE[PLAIN], robust=(0.8, 0.7, 0.66))
    )
    assert "points less" in paragraph(swapped, "adversarial training")
    assert "so it is not robust" in paragraph(swapped, "adversarial training")


def test_both_together_are_compared_with_neither():
    assert f"“{BOTH}” against “{PLAIN}”" in paragraph(build(), "both cost together")


def test_fragility_flips_with_the_numbers():
    assert paragraph(build(), "fragile").startswith("Yes")
    tougher = with_made(dp=replace(MADE[DP], robust=(0.6, 0.3, 0.1)))
    assert paragraph(tougher, "fragile").startswith("No")
    same = with_made(dp=replace(MADE[PLAIN], epsilon=7.96))
    assert paragraph(same, "fragile").startswith("It cannot be told")
    assert CONSTANT not in paragraph(build(), "fragile"), "a constant cannot be fragile"


def test_compression_says_what_it_saves():
    text = paragraph(build(), "int8")
    assert "3.9 times smaller" in text
    assert "1.8 times as long" in text
    assert "no difference can be shown" in text


def test_the_threat_flips_with_the_numbers():
    assert "0.061 less" in paragraph(build(), "threat")
    harmless = with_made(flip=replace(MADE[PLAIN], threat="label_flip"))
    assert "no difference can be shown" in paragraph(harmless, "threat")


def test_the_verdict_flips_with_the_numbers():
    assert paragraph(build(), "at once").startswith("No. Of 10 configurations as shipped, 6 carry")
    strong = with_made(both=replace(MADE[BOTH], robust=(0.77, 0.75, 0.74)))
    text = paragraph(strong, "at once")
    assert text.startswith(f"Yes, on these data: “{BOTH}, int8” is all three")
    assert "ε ≤ 7.96" in text
    assert "62.5" in text
    close = with_made(both=replace(MADE[BOTH], robust=(0.77, 0.75, 0.66)))
    assert paragraph(close, "at once").startswith("Perhaps: the interval reaches down to the majority class")


def test_a_constant_never_wins_however_robust_it_seems():
    made = {PLAIN: MADE[PLAIN], CONSTANT: replace(MADE[CONSTANT], robust=(0.7, 0.7, 0.7))}
    assert paragraph(build(made), "at once").startswith("No.")


def test_a_constant_is_never_called_the_closest():
    # The constant is private and small, the plain model only small.
    text = paragraph(build({PLAIN: MADE[PLAIN], CONSTANT: MADE[CONSTANT]}), "at once")
    assert f"The closest, “{PLAIN}, int8”, is small but not private or robust" in text
    assert "The closest" not in paragraph(build({CONSTANT: MADE[CONSTANT]}), "at once")


def test_a_weak_epsilon_is_said_to_be_weak():
    strong = with_made(both=replace(MADE[BOTH], robust=(0.77, 0.75, 0.74), epsilon=50.0))
    assert "weak promise" in paragraph(strong, "at once")


def test_a_study_that_did_not_ask_gets_no_verdict():
    text = paragraph(build({PLAIN: MADE[PLAIN]}), "at once")
    assert text == "This study cannot say: no configuration trains with differential privacy."
    results = build()
    clean = replace(results, evaluated=tuple(e for e in results.evaluated if e.kind == "clean"))
    assert "no evaluation attacks" in paragraph(clean, "at once")


def test_limits_come_first_and_only_where_they_apply():
    findings = answer(build(synthetic=True))
    assert findings[0].topic == "Synthetic images"
    assert "one cell of the study is missing" in findings[1].text
    topics = [finding.topic for finding in answer(build(missing=()))]
    assert "Synthetic images" not in topics
    assert "Unfinished" not in topics


def test_seeded_noise_is_said_once_and_only_where_something_is_claimed():
    results = build()
    assert "no ground for releasing" in paragraph(results, "Seeded noise")
    assert sum(finding.text.count("comes from a seed") for finding in answer(results)) == 1

    def topics(changed):
        return [finding.topic for finding in answer(changed)]

    def private(run):
        return {**run.spec, "privacy": {**run.spec["privacy"], "noise": "system"}}

    system = tuple(replace(r, spec=private(r)) if r.guarantee.epsilon else r for r in results.runs)
    assert "Seeded noise" not in topics(replace(results, runs=system))
    void = tuple(replace(a, guarantee=a.guarantee.voided("why")) for a in results.artefacts)
    assert "Seeded noise" not in topics(replace(results, artefacts=void))
    assert "Seeded noise" not in topics(build({PLAIN: MADE[PLAIN]}))


def test_one_seed_is_said_to_be_one():
    results = build()
    runs = tuple(run for run in results.runs if run.seed == 0)
    findings = answer(replace(results, runs=runs, seeds=(0,)))
    assert "One seed" in [finding.topic for finding in findings]


def test_constant_predictors_are_called_out():
    text = paragraph(build(), "constant answer")
    assert f"“{CONSTANT}” answers “pneumonia” for everything (4 of its 4 models)" in text
    without = {label: made for label, made in MADE.items() if label != CONSTANT}
    assert "A constant answer" not in [finding.topic for finding in answer(build(without))]


def test_a_model_below_the_majority_class_is_called_out():
    made = with_made(dp=replace(MADE[DP], accuracy=MAJORITY - 0.05))
    assert f"“{DP}, fp32” is right on" in paragraph(made, "No better than a constant")


def test_a_different_tuning_is_admitted():
    results = build()
    runs = tuple(replace(r, spec={**r.spec, "rounds": 30}) if r.configuration == DP else r for r in results.runs)
    assert "tuned differently" in paragraph(replace(results, runs=runs), "privacy cost")


def test_nothing_measured_is_no_error_and_no_answer():
    assert answer(build(evaluated=(), artefacts=()))[-1].text == "Nothing has been measured."
    assert "cannot say: no evaluation attacks the models" in paragraph(build(evaluated=()), "at once")


def test_the_terminal_gets_the_same_words():
    results = build()
    written = [f"{f.topic}{'' if f.topic.endswith('?') else ':'} {f.text}" for f in answer(results)]
    assert answer_text(results) == written
