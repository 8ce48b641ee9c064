"""A card says of one model what the report says of it, and what nobody measured it calls not measured."""

import json
import re
from dataclasses import replace

import pytest
from builder import BOTH, DP, FLAGS, MADE, PGD, PLAIN, bounded, build, flagged, pick

from trilemma.compression.step import Looks
from trilemma.compression.trial import Agreement
from trilemma.data.specs import Folder
from trilemma.evaluation.measurement import Measurement
from trilemma.privacy.noise import noise_source_in_words
from trilemma.report.model_card import card_json, card_markdown
from trilemma.results import Shipment


def shipment(results, configuration=BOTH, compression="int8", **fields):
    """What a store would tell of the first seed's artefact of a configuration."""
    artefact = pick(results, configuration, compression)[0]
    alone = replace(
        results,
        runs=tuple(run for run in results.runs if run.key == artefact.run_key),
        artefacts=(artefact,),
        evaluated=tuple(e for e in results.evaluated if e.artefact_key == artefact.key),
    )
    made = Shipment(
        results=alone,
        settings={"data": "pneumoniamnist 28", "model": "ResNet-9 w16 GN"},
        compression={"kind": "int8", "calibration": "public", "num_calibration": 256},
        looks=(Looks("public", 256),),
        studies=("ours",),
        split="test",
        from_files=False,
        channels=1,
        image_size=28,
        classes=("normal", "pneumonia"),
        preprocessing=("It is resized.",),
        agreement=Agreement(((15, 28),), 4, 0.00123, 0.0),
        file_bytes=1_234_567,
        sent_bytes=345_678,
        measured_on={"cost": {"cpu": "A fine CPU"}},
    )
    return replace(made, **fields)


def section(text, title):
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_every_part_that_a_reader_looks_for():
    about = shipment(build())
    text = card_markdown(about)
    for said in (
        "NOT a medical device", "research", "s1:", "| accuracy | 78.6 % (75.4 to 81.8) | 624 |", "| hospital 2 |",
        "| worst honest hospital |", "| PGD-20 Linf | 4/255 |", "none was seen", "exp(7.96)", "Not covered",
        "1234567 bytes", "345678 bytes", "A fine CPU", "| multiply-adds for 1 image | 4.32 million |",
        "| time with preprocessing | not measured |", "0.0012", "256 images: public",
    ):  # fmt: skip
        assert said in text.replace("\xa0", " "), said
    card = json.loads(card_json(about))
    assert card["epsilon"] == 7.96 and card["guarantee"]["outside"] and card["classes"] == ["normal", "pneumonia"]
    accuracy = next(m for m in card["measurements"] if m["metric"] == "accuracy" and m["client"] is None)
    assert accuracy["n"] == 624 and accuracy["low"] < accuracy["value"] < accuracy["high"]


def test_withheld_numbers_stay_withheld():
    results = build()
    before = section(card_markdown(shipment(results)), "Robustness")
    assert len(re.findall(r"\d\xa0%", before)) >= 9, "the control: they are shown where nothing is amiss"
    for name in FLAGS:
        about = shipment(flagged(results, pick(results, BOTH, "int8"), name, "2 of 9"))
        part = section(card_markdown(about), "Robustness")
        assert "\xa0%" not in part and part.count("withheld: ") >= 10
        shown = [m for m in json.loads(card_json(about))["measurements"] if m["kind"] in ("pgd", "fgsm", "transfer")]
        assert shown and all(m["value"] is m["low"] is m["high"] is None for m in shown)


def test_numbers_that_are_too_high_are_marked():
    results = build()
    about = shipment(bounded(results, pick(results, BOTH, "int8"), "PGD-20 Linf", "an upper bound: “X” leaves less"))
    rows = [line for line in section(card_markdown(about), "Robustness").splitlines() if "PGD-20 Linf | " in line]
    own = [row for row in rows if row.startswith("| PGD")]
    assert len(own) == 3 and all("≤" in row and "bound: an upper bound" in row for row in own)
    assert not any("≤" in row for row in rows if row not in own)


def test_nothing_measured_is_no_zero():
    about = shipment(build())
    about = replace(about, results=replace(about.results, evaluated=(), data=()), measured_on={})
    text = card_markdown(about)
    table = section(text, "What it is worth")
    assert table.count("| not measured |") == 8 and not re.search(r"\| [\d−]", table)
    assert "Not measured: no attack" in text and "No hospital was measured by itself" in text
    assert section(text, "Size and speed").count("| not measured |") == 4
    assert not [m for m in json.loads(card_json(about))["measurements"] if m["evaluation"] != "training"]


@pytest.mark.parametrize(("configuration", "said"), [(PLAIN, "No guarantee: training without"), (DP, "exp(7.96)")])
def test_the_guarantee_in_words_or_why_there_is_none(configuration, said):
    assert said in section(card_markdown(shipment(build(), configuration)), "Privacy")


def test_a_guarantee_that_compression_voided_is_none():
    about = shipment(build())
    artefact = about.results.artefacts[0]
    void = replace(artefact, guarantee=artefact.guarantee.voided("int8 calibration reads the training images"))
    about = replace(about, results=replace(about.results, artefacts=(void,)))
    about = replace(about, settings={**about.settings, "privacy": "DP epsilon 8"})
    assert "No guarantee: int8 calibration reads" in section(card_markdown(about), "Privacy")
    assert "| privacy | DP epsilon 8; void, see Privacy |" in section(card_markdown(about), "Model")
    first = card_markdown(about).partition("\n## ")[0]
    assert "nothing may be claimed of it: int8 calibration reads the training images" in first
    whole = replace(about, results=replace(about.results, artefacts=(artefact,)))
    assert "| privacy | DP epsilon 8 |" in card_markdown(whole) and "may be claimed" not in card_markdown(whole)
    card = json.loads(card_json(about))
    assert card["epsilon"] is None and card["epsilon_is_for"] is None
    epsilon = next(m for m in card["measurements"] if m["metric"] == "epsilon")
    assert epsilon["value"] is None and epsilon["status"] == "withheld"


@pytest.mark.parametrize(("noise", "warned"), [("seeded", True), ("system", False)])
def test_noise_that_anybody_could_take_away_is_said_first(noise, warned):
    about = shipment(build())
    (artefact,) = about.results.artefacts
    guarantee = artefact.guarantee.model_copy(update={"noise_source": noise_source_in_words(noise)})
    about = replace(about, results=replace(about.results, artefacts=(replace(artefact, guarantee=guarantee),)))
    assert ("no ground for releasing" in card_markdown(about).partition("\n## ")[0]) == warned


def test_the_rounds_of_a_teacher_are_told():
    about = shipment(build())
    (run,) = about.results.runs
    taught = replace(run, spec={**run.spec, "rounds": 3, "teacher": {"rounds": 2}})
    about = replace(about, results=replace(about.results, runs=(taught,)))
    assert "| rounds | 3, after 2 of its teacher, whose steps the guarantee counts |" in card_markdown(about)
    assert "teacher" not in section(card_markdown(shipment(build())), "Model")


def test_who_took_part_is_not_told_unwarned_where_that_is_secret():
    made = {**MADE, BOTH: replace(MADE[BOTH], unit="client", trust="central")}
    assert "may know who took part" in section(card_markdown(shipment(build(made))), "Privacy")
    assert "may know who took part" not in card_markdown(shipment(build()))


def test_the_worst_is_the_worst_honest_hospital_where_some_are_not():
    about = shipment(build(), PGD)
    found = about.results.evaluated
    honest = Measurement("accuracy", 0.7123, 0.7, 0.72, 200, client="worst honest")
    found = tuple(replace(e, measurements=(*e.measurements, honest)) if e.kind == "clean" else e for e in found)
    about = replace(about, results=replace(about.results, evaluated=found))
    poisoned = replace(about, settings={**about.settings, "threat": "label flip by 1 client"})
    part = section(card_markdown(poisoned), "Hospital by hospital").replace("\xa0", " ")
    assert "| worst honest hospital | 71.2 %" in part and "| worst honest |" not in part
    assert "71.2" not in section(card_markdown(about), "Hospital by hospital")
    assert "| malicious hospitals | label flip by 1 client |" in card_markdown(poisoned)


def test_names_cannot_break_a_table_and_places_on_a_disk_stay_there():
    about = shipment(build(), classes=("a|b", "<script>\x07[x](http://y)"))
    run = about.results.runs[0]
    spec = {**run.spec, "data": {"kind": "folder", "path": "/home/somebody/secret/ours"}}
    about = replace(about, results=replace(about.results, runs=(replace(run, spec=spec),)))
    text = card_markdown(about)
    assert "<script>" not in text and "\x07" not in text and r"a\|b" in text and "[x](" not in text
    told = card_json(about)
    assert "somebody" not in told and json.loads(told)["spec"]["data"]["path"] == "ours"
    assert json.loads(told)["classes"][0] == "a|b"


def test_it_is_the_same_each_time():
    assert card_markdown(shipment(build())) == card_markdown(shipment(build()))
    assert card_json(shipment(build())) == card_json(shipment(build()))


@pytest.mark.parametrize(
    ("looks", "said"),
    [
        ((), "no image was read for it"),
        ((Looks("public", 9),), "it looked at up to 9 images: public phantoms, no patient's"),
        ((Looks("phantom", 9),), "it looked at up to 9 images: public phantoms, no patient's"),
        ((Looks("synthetic", 9),), "it looked at up to 9 images: made from the model alone"),
        (
            (Looks("train", 9), Looks("public", 3, Folder(path="/home/x/images", size=28))),
            "it looked at up to 9 images: private ones of the split “train”, and at up to 3 images: those of images",
        ),
    ],
)
def test_a_card_says_at_whose_images_the_compression_looked(looks, said):
    told = section(card_markdown(replace(shipment(build()), looks=looks)), "Model").replace("\\", "")
    assert f"| compression | int8; {said}" in told


def test_a_card_tells_nobody_where_public_images_lie():
    compression = {"kind": "distil", "data": {"kind": "folder", "path": "/home/somebody/public", "size": 28}}
    written = card_json(replace(shipment(build()), compression=compression))
    assert "somebody" not in written and json.loads(written)["compression"]["data"]["path"] == "public"


def test_a_cost_of_an_earlier_version_has_no_multiply_adds():
    about = shipment(build())
    evaluated = tuple(
        replace(e, measurements=tuple(m for m in e.measurements if m.metric != "multiply_adds"))
        for e in about.results.evaluated
    )
    text = card_markdown(replace(about, results=replace(about.results, evaluated=evaluated)))
    assert "| multiply-adds for 1 image | not measured |" in section(text, "Size and speed")
    assert section(text, "Size and speed").count("not measured") == 2  # and the time with preprocessing
