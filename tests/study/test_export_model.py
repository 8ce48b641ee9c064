"""`trilemma export-model`: a folder that stands alone, says what the reports say, and is whole or not there."""

import hashlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import zstandard
from PIL import Image
from torch import nn

from helpers.tiny_study import TINY, plan_of, write_study
from trilemma.compression.export import export_onnx
from trilemma.compression.session import Session
from trilemma.compression.shipping import properties_of, ship_onnx
from trilemma.data.images import read_image
from trilemma.models.classifier import Classifier
from trilemma.study.assemble import assemble
from trilemma.study.handover import hand_over
from trilemma.study.judgement import NOT_DIAGNOSED
from trilemma.study.shipment import shipment
from trilemma.study.store import Store

EXAMPLE = Path(__file__).parents[2] / "examples" / "predict_without_torch.py"
FILES = {"model.onnx", "model.onnx.zst", "MODEL_CARD.md", "model_card.json", "SHA256SUMS"}


@pytest.fixture(scope="module")
def store(finished, tmp_path_factory):
    """The tiny study's store, as `trilemma run` leaves it: with the study's text."""
    folder = shutil.copytree(finished, tmp_path_factory.mktemp("export") / "store")
    with Store(folder, write=True) as opened:
        opened.open_study("tiny", "Does the line hold?", TINY)
    return folder


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    return plan_of(write_study(tmp_path_factory.mktemp("plan"))).cells


@pytest.fixture
def exported(trilemma, store, cells, tmp_path):
    code, out, err = trilemma("export-model", cells[1].key, "--to", tmp_path / "out", "--store", store)
    assert (code, err) == (0, "") and f"wrote {tmp_path / 'out'}" in out and cells[1].key in out
    return tmp_path / "out"


def sums_hold(folder):
    lines = [line.split("  ") for line in (folder / "SHA256SUMS").read_text().splitlines()]
    assert {name for _, name in lines} == FILES - {"SHA256SUMS"}
    return all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest for digest, name in lines)


def test_a_folder_that_stands_alone(exported, store, cells, trilemma, tmp_path):
    assert {path.name for path in exported.iterdir()} == FILES and sums_hold(exported)
    model = zstandard.ZstdDecompressor().decompress((exported / "model.onnx.zst").read_bytes())
    assert model == (exported / "model.onnx").read_bytes()
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=exported, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = properties_of((exported / "model.onnx").read_bytes())
    artefact = next((store / "artefacts").glob(f"{cells[1].key.replace(':', '-')}.onnx"))
    assert told.items() > properties_of(artefact.read_bytes()).items()
    assert (
        json.loads(told["trilemma.classes"]) == ["normal", "pneumonia"] and "16 x 16" in told["trilemma.preprocessing"]
    )
    assert {path.name for path in tmp_path.iterdir()} == {"out"}, "nothing is left beside it"
    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    code, *_ = trilemma("export-model", cells[1].key[3:12], "--to", exported, "--store", store)  # a prefix; once more
    assert code == 0 and before == {path.name: path.read_bytes() for path in exported.iterdir()}


def write_pictures(folder):
    """Files of every kind that the example says it reads; the grey of a colour one is Pillow's."""
    folder.mkdir()
    draws = np.random.default_rng(0)
    grey, colour = draws.integers(0, 256, (50, 40), np.uint8), draws.integers(0, 256, (33, 47, 4), np.uint8)
    smooth = np.asarray(Image.fromarray(draws.integers(0, 256, (6, 5), np.uint8)).resize((400, 300)))
    Image.fromarray(grey).save(folder / "grey.png")
    Image.fromarray(grey[:16, :16]).save(folder / "own size.png")
    Image.fromarray(colour).save(folder / "transparent.png")
    Image.fromarray(colour[..., :3]).quantize(16).save(folder / "palette.png")
    Image.fromarray(smooth).save(folder / "large.jpg")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(smooth).save(folder / "turned.jpeg", exif=turned)
    Image.fromarray(colour[..., :3]).save(folder / "colour.tif")
    return sorted(folder.iterdir())


def run_example(*arguments, script=EXAMPLE):
    """Runs a script where importing torch or this package raises."""
    code = (
        "import sys, runpy\n"
        "class Refused:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'trilemma', 'onnx'): raise ImportError(f'{name} is not here')\n"
        "sys.meta_path.insert(0, Refused())\n"
        f"sys.argv = {[str(script), *map(str, arguments)]!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_a_ward_runs_it_without_torch(exported, store, cells, tmp_path):
    pictures = write_pictures(tmp_path / "pictures")
    done = run_example(exported, *pictures)
    assert done.returncode == 0, done.stderr
    answers = {line.split("\t")[0]: line.split("\t")[1:] for line in done.stdout.splitlines()}
    session = Session((store / "artefacts" / f"{cells[1].key.replace(':', '-')}.onnx").read_bytes())
    for path in pictures:
        x = torch.tensor(read_image(path, 16, "grey")[None]).float().div(255)
        expected = session.predict(x).softmax(1)[0].tolist()
        named = [answer.rsplit(" ", 1) for answer in answers[str(path)]]
        assert [name for name, _ in named] == ["normal", "pneumonia"]
        assert np.abs(np.array([float(share) for _, share in named]) - expected).max() < 2e-3, path.name
        if path.name == "own size.png":
            assert np.abs(np.array([float(share) for _, share in named]) - expected).max() < 1e-6
    assert run_example(exported).returncode != 0
    control = tmp_path / "control.py"
    for library in ("torch", "trilemma.cli"):
        control.write_text(f"import {library}")
        assert f"ImportError: {library.partition('.')[0]} is not here" in run_example(script=control).stderr


def test_a_ward_reads_files_as_the_loader_does(tmp_path):
    """Pixel by pixel: the model of this folder answers with its pixels, whose softmax can be taken back."""
    model = export_onnx(Classifier(nn.Flatten(), 256), 1, 16)
    card = {"input": {"channels": 1, "resized_to": 16}, "classes": [f"p{k}" for k in range(256)]}
    contents = {"model.onnx": ship_onnx(model, {}), "model_card.json": json.dumps(card).encode(), "MODEL_CARD.md": b""}
    hand_over(tmp_path / "out", contents)
    pictures = write_pictures(tmp_path / "pictures")
    done = run_example(tmp_path / "out", *pictures)
    assert done.returncode == 0, done.stderr
    for path, line in zip(pictures, done.stdout.splitlines(), strict=True):
        shares = np.array([float(answer.rsplit(" ", 1)[1]) for answer in line.split("\t")[1:]])
        expected = torch.tensor(read_image(path, 16, "grey")).float().flatten().div(255 * 0.25).log_softmax(0)
        off = np.abs(np.log(shares) - expected.numpy()) * 255 * 0.25  # in levels
        assert off.max() < 1.5, path.name


def test_a_ward_refuses_what_was_changed(exported, tmp_path):
    picture = tmp_path / "deep.png"
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(picture)
    assert "more than 8 bits" in run_example(exported, picture).stderr
    content = bytearray((exported / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (exported / "model.onnx").write_bytes(content)
    done = run_example(exported, picture)
    assert done.returncode == 1 and "model.onnx is not the file that was exported" in done.stderr
    (exported / "SHA256SUMS").write_text("")
    assert run_example(exported, picture).returncode == 1


@pytest.mark.parametrize("with_text", [True, False], ids=["study known", "study unknown"])
def test_a_card_says_what_the_report_says(store, finished, cells, tmp_path, with_text):
    """Number for number, withheld and marked alike, whether or not the store has the study's text."""
    plan = plan_of(write_study(tmp_path))
    with Store(store if with_text else finished) as opened:
        results = assemble(plan, opened, TINY, "")
        withheld = 0
        for cell in cells:
            row = opened.artefact(cell.key)
            about, *_ = shipment(opened, row)
            assert about.studies == (("tiny",) if with_text else ())
            for m in (m for e in about.results.evaluated for m in e.measurements):
                withheld += m.status == "withheld"
            reported = [m for e in results.evaluated if e.artefact_key == cell.key for m in e.measurements]
            carded = [m for e in about.results.evaluated for m in e.measurements]
            assert sorted(map(repr, carded)) == sorted(map(repr, reported))
            assert about.results.runs[0].guarantee == next(r for r in results.runs if r.key == row.run_key).guarantee
            assert about.results.data == results.data
    assert withheld, "a control: something of this study is withheld"


def test_numbers_that_are_withheld_are_not_in_the_files(exported, store, cells):
    with Store(store) as opened:
        rows = opened.evaluations_of(cells[1].key)
    robust = [m for row in rows for m in row.measurements if m.metric == "robust_accuracy" and m.value is not None]
    assert robust
    card = json.loads((exported / "model_card.json").read_text())
    shown = [m for m in card["measurements"] if m["metric"] == "robust_accuracy"]
    assert shown and all(m["value"] is None and m["status"] == "withheld" and m["reason"] for m in shown)
    text = (exported / "MODEL_CARD.md").read_text()
    table = text.partition("## Robustness")[2].partition("\n## ")[0]
    assert table.count("withheld: constant answer") == 3 and " %" not in table


def test_an_attack_that_nobody_diagnosed_is_withheld(store, cells, trilemma, tmp_path):
    folder = shutil.copytree(store, tmp_path / "store")
    db = sqlite3.connect(folder / "store.db")
    db.execute("PRAGMA foreign_keys = OFF")
    db.execute("DELETE FROM evaluations WHERE json_extract(spec, '$.kind') = 'diagnostics'")
    db.execute("DELETE FROM measurements WHERE evaluation_key NOT IN (SELECT key FROM evaluations)")
    db.commit()
    for text in (TINY, ""):
        db.execute("UPDATE studies SET toml = ?", (text,))
        db.commit()
        assert trilemma("export-model", cells[0].key, "--to", tmp_path / "out", "--store", folder)[0] == 0
        card = json.loads((tmp_path / "out" / "model_card.json").read_text())
        shown = [m for m in card["measurements"] if m["metric"] == "robust_accuracy"]
        assert shown and {(m["value"], m["reason"]) for m in shown} == {(None, NOT_DIAGNOSED)}
    db.close()


def test_of_several_worst_transfers_the_one_counts_that_leaves_least(store, cells, trilemma, tmp_path):
    """Another study in the store has other sources for the same transfer; and here no flag withholds the numbers."""
    folder = shutil.copytree(store, tmp_path / "store")
    db = sqlite3.connect(folder / "store.db")
    db.execute("UPDATE measurements SET value = 0 WHERE metric LIKE 'flag_%'")
    (key, left), = db.execute(
        "SELECT e.key, m.value FROM evaluations e JOIN measurements m ON m.evaluation_key = e.key WHERE "
        "e.artefact_key = ? AND m.metric = 'robust_accuracy' AND m.source IS NULL "
        "AND json_extract(e.spec, '$.kind') = 'transfer'", (cells[0].key,),
    )  # fmt: skip
    assert left < 0.9
    db.execute("INSERT INTO evaluations SELECT 's2:0', artefact_key, spec, provenance, seconds FROM evaluations "
               "WHERE key = ?", (key,))  # fmt: skip
    db.execute(
        "INSERT INTO measurements SELECT 's2:0', position, metric, 0.95, low, high, n, unit, split, status, reason, "
        "radius, source, client FROM measurements WHERE evaluation_key = ?", (key,),
    )  # fmt: skip
    db.commit()
    db.close()
    assert trilemma("export-model", cells[0].key, "--to", tmp_path / "out", "--store", folder)[0] == 0
    card = json.loads((tmp_path / "out" / "model_card.json").read_text())
    worst = [m for m in card["measurements"] if m["kind"] == "transfer" and m["metric"] == "robust_accuracy"]
    assert [m["value"] for m in worst if m["source"] is None] == [left]


def test_what_was_not_measured_is_said_to_be_so(store, cells, trilemma, tmp_path):
    folder = shutil.copytree(store, tmp_path / "store")
    db = sqlite3.connect(folder / "store.db")
    for table in ("measurements", "outcomes", "examples", "evaluations", "facts"):
        db.execute(f"DELETE FROM {table}")
    db.commit()
    db.close()
    assert trilemma("export-model", cells[1].key, "--to", tmp_path / "out", "--store", folder)[0] == 0
    text = (tmp_path / "out" / "MODEL_CARD.md").read_text()
    worth = text.partition("## What it is worth")[2].partition("## Robustness")[0]
    assert worth.count("not measured") == 8 + 2 and not re.search(r"\| [−\d]", worth)
    assert "no attack on this model is in the store" in text and "not recorded in the store" in text
    assert text.count("| not measured |") >= 10 and json.loads((tmp_path / "out" / "model_card.json").read_text())


def test_keys_that_name_no_artefact(store, cells, trilemma, tmp_path):
    run = cells[0].training.key
    cases = [
        ("zzz", "names nothing"),
        ("", "names nothing"),
        ("../../../etc/passwd", "names nothing"),
        ("s2", "beginning of several"),
        (run, f"a training with 2 artefacts: {min(cells[0].key, cells[1].key)}"),
        ("\udcff/[red]", "names nothing"),
    ]
    for key, said in cases:
        code, out, err = trilemma("export-model", key, "--to", tmp_path / "out", "--store", store)
        assert code == 2 and said in err and "internal error" not in err, (key, err)
    assert "fp32" in trilemma("export-model", run, "--to", tmp_path / "out", "--store", store)[2]
    assert not (tmp_path / "out").exists()


def test_a_training_with_one_artefact_names_it(store, cells, trilemma, tmp_path):
    folder = shutil.copytree(store, tmp_path / "store")
    db = sqlite3.connect(folder / "store.db")
    db.execute("DELETE FROM artefacts WHERE key = ?", (cells[0].key,))
    db.commit()
    assert trilemma("export-model", cells[0].training.key, "--to", tmp_path / "out", "--store", folder)[0] == 0
    assert json.loads((tmp_path / "out" / "model_card.json").read_text())["key"] == cells[1].key
    db.execute("DELETE FROM artefacts")
    db.commit()
    db.close()
    code, _, err = trilemma("export-model", cells[0].training.key, "--to", tmp_path / "two", "--store", folder)
    assert code == 2 and "no artefact yet" in err


def spoilt(folder, cells, how):
    """Spoils the store's file of an artefact, or what the store says of it."""
    path = folder / "artefacts" / f"{cells[1].key.replace(':', '-')}.onnx"
    content = path.read_bytes()
    db = sqlite3.connect(folder / "store.db")
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[:-100])
    elif how == "noise":
        path.write_bytes(b"\xff" * len(content))
    elif how == "not finite":
        model = onnx.load_from_string(content)
        for tensor in model.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT and tensor.HasField("raw_data"):
                tensor.raw_data = np.full(len(tensor.raw_data) // 4, np.nan, "<f4").tobytes()
        path.write_bytes(model.SerializeToString(deterministic=True))
        assert path.stat().st_size == len(content)
    elif how == "another":
        other = folder / "artefacts" / f"{cells[3].key.replace(':', '-')}.onnx"
        path.write_bytes(other.read_bytes())
        db.execute("UPDATE artefacts SET file_bytes = ?", (other.stat().st_size,))
    elif how == "no guarantee":
        guarantee = '{"void": ["some other reason"]}'
        db.execute("UPDATE artefacts SET guarantee = ?", (guarantee,))
    elif how == "spec":
        db.execute("UPDATE runs SET spec = json_set(spec, '$.model.kind', 'resnet99')")
        db.execute("UPDATE studies SET toml = ''")
    elif how == "evaluation":
        db.execute("UPDATE evaluations SET spec = json_set(spec, '$.kind', 'mind_reading')")
    elif how == "folder":
        path.unlink()
        path.mkdir()
    db.commit()
    db.close()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", "is missing"),
        ("cut", "bytes, and the artefact had"),
        ("noise", "no ONNX file"),
        ("not finite", "is not finite"),
        ("another", "another artefact"),
        ("no guarantee", "another artefact"),
        ("spec", "cannot read its settings"),
        ("evaluation", "cannot read its settings"),
        ("folder", "cannot be read"),
    ],
)
def test_a_damaged_store_ships_nothing(store, cells, trilemma, tmp_path, how, said):
    folder = shutil.copytree(store, tmp_path / "store")
    spoilt(folder, cells, how)
    code, _, err = trilemma("export-model", cells[1].key, "--to", tmp_path / "out", "--store", folder)
    assert code == 1 and said in err and "internal error" not in err, err
    assert not (tmp_path / "out").exists() and [p.name for p in tmp_path.iterdir()] == ["store"]


def test_a_key_with_a_path_in_it_reads_no_other_file(store, cells, trilemma, tmp_path):
    folder = shutil.copytree(store, tmp_path / "store")
    shutil.copy(folder / "artefacts" / f"{cells[1].key.replace(':', '-')}.onnx", tmp_path / "stolen.onnx")
    db = sqlite3.connect(folder / "store.db")
    db.execute("PRAGMA foreign_keys = OFF")
    db.execute("UPDATE artefacts SET key = '../../stolen' WHERE key = ?", (cells[1].key,))
    db.commit()
    db.close()
    code, _, err = trilemma("export-model", "../../stolen", "--to", tmp_path / "out", "--store", folder)
    assert code == 1 and "is no key" in err and not (tmp_path / "out").exists()


def test_places_that_cannot_be_written(exported, store, cells, trilemma, tmp_path, monkeypatch):
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "thesis.tex").write_text("years of work")
    with_more = shutil.copytree(exported, tmp_path / "more")
    (with_more / "notes.txt").write_text("mine")
    forged = shutil.copytree(exported, tmp_path / "forged")
    (forged / "model_card.json").write_text("[" * 100_000)
    (tmp_path / "file").write_text("")
    cases = [
        (occupied, 2, "holds something else"),
        (with_more, 2, "holds something else"),
        (forged, 2, "holds something else"),
        (tmp_path / "file", 2, "is no folder"),
        ("/", 2, "or the root"),
        (tmp_path / "file" / "below" / "it", 2, "is no folder"),
        ("a" * 300, 2, "too long"),
    ]
    for place, expected, said in cases:
        code, _, err = trilemma("export-model", cells[1].key, "--to", place, "--store", store)
        assert code == expected and said in err and "internal error" not in err, (place, code, err)
    code, _, err = trilemma("export-model", cells[0].key, "--to", exported, "--store", store)
    assert code == 2 and "holds something else" in err  # an export, but of another artefact
    assert (occupied / "thesis.tex").read_text() == "years of work" and (with_more / "notes.txt").exists()
    assert sums_hold(exported)
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    code, _, err = trilemma("export-model", cells[1].key, "--to", ".", "--store", store)
    assert code == 2 and "that you are in" in err
    (tmp_path / "link").symlink_to(inside)
    monkeypatch.chdir(tmp_path)
    assert trilemma("export-model", cells[1].key, "--to", "link", "--store", store)[0] == 0
    assert sums_hold(inside) and (tmp_path / "link").is_symlink()
