"""The command line: what each command says, and for every mistake one message, the right exit code and no traceback."""

import io
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.pictures import write_images
from helpers.tiny_study import SMALLEST, plan_of, rows_of, write_study
from trilemma.study.store import Store

TWO_MODELS = SMALLEST + "\n[[compressions]]\nkind = 'none'\n[[compressions]]\nkind = 'int8'\nnum_calibration = 8\n"


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A study and its store, made by the real command in a process of its own."""
    folder = tmp_path_factory.mktemp("cli")
    study = write_study(folder, TWO_MODELS)
    cache = {"TRILEMMA_CACHE": str(tmp_path_factory.getbasetemp() / "cache")}
    command = [sys.executable, "-m", "trilemma", "run", str(study), "--store", str(folder / "store"), "--jobs", "1"]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **cache, "COLUMNS": "200"})
    assert ended.returncode == 0, ended.stderr
    return study, folder / "store", ended.stdout, ended.stderr


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nsys.argv = ['trilemma', '--help']\nfrom trilemma.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'pydantic', 'numpy', 'monai', 'onnx', 'onnxruntime', 'plotly', 'joblib', 'sqlite3'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    for command in ("run", "check", "report", "export", "export-model", "list", "show", "data", "ledger"):
        assert command in ended.stdout


def test_run_says_what_it_does_and_writes_the_report(done):
    _, store, output, errors = done
    assert errors == ""  # no warning of any library reaches the user
    for said in ("training: 1 job to do", "compressing: 2 jobs", "plain", "int8", "AUROC", "synthetic", "Report: "):
        assert said in output, said
    assert (store / "reports" / "smallest.html").stat().st_size > 10_000


def test_a_second_run_has_nothing_to_do(done, trilemma, tmp_path):
    study, store, *_ = done
    folder = shutil.copytree(store, tmp_path / "store")
    code, out, err = trilemma("run", study, "--store", folder)  # with as many processes as there are cores
    assert (code, err) == (0, "") and "to do" not in out and "Report: " in out
    assert rows_of(folder) == rows_of(store)


def test_quiet(done, trilemma, tmp_path):
    study, *_ = done
    code, out, err = trilemma("run", study, "--store", tmp_path / "new", "--jobs", 1, "--quiet")
    assert (code, err) == (0, "") and "to do" not in out and "Report: " in out


def test_the_name_of_a_configuration_is_readable_in_a_narrow_terminal(done, trilemma, monkeypatch):
    study, store, *_ = done
    wide = ("--set", 'evaluations=[{kind="clean"},{kind="pgd",radii=[0.1]},{kind="cost"}]')
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = trilemma("report", study, "--store", store, *wide)
    assert code == 0 and out.count("plain,") == 2 and "int8" in out and "fp32" in out


def test_check(done, trilemma, tmp_path):
    study, store, *_ = done
    code, out, err = trilemma("check", study, "--store", store)
    assert (code, err) == (0, "")
    for said in ("(synthetic images)", "24 train, 8 val, 12 test", "normal, pneumonia", "hospital 2", "No guarantee"):
        assert said in out, said
    for said in ("trainings │ 1 │ 1 │ 0", "artefacts │ 2 │ 2 │ 0", "evaluations │ 2 │ 2 │ 0", "without differential"):
        assert said in out, said
    code, out, _ = trilemma("check", study, "--store", tmp_path / "none", "--set", "seeds=[0,1,2]")
    assert code == 0 and "trainings │ 3 │ 0 │ 3" in out
    assert not (tmp_path / "none").exists()


def test_data(done, trilemma):
    code, out, err = trilemma("data", done[0])
    assert (code, err) == (0, "")
    assert "hospital 1 │ 12 │ 12 │ 6 │ 6" in out and "by site, 2 clients, seed 0" in out


def test_list_and_show(done, trilemma, monkeypatch):
    study, store, *_ = done
    monkeypatch.setenv("COLUMNS", "80")
    plan = plan_of(study)
    code, out, err = trilemma("list", "--store", store)
    assert (code, err) == (0, "") and plan.trainings[0].key in out and "Does anything run?" in out
    code, out, err = trilemma("show", plan.trainings[0].key, "--store", store)
    assert (code, err) == (0, "") and "No guarantee" in out and '"width": 4' in out and "parameters" in out
    for cell in plan.cells:
        assert cell.key in out
        code, shown, _ = trilemma("show", cell.key[3:], "--store", store)  # without "s2:"
        assert code == 0 and cell.training.key in shown and f"{cell.key.replace(':', '-')}.onnx" in shown


@pytest.mark.parametrize("ending", ["csv", "json", "tex", "md"])
def test_export(done, trilemma, tmp_path, ending):
    study, store, *_ = done
    path = tmp_path / f"out.{ending}"
    code, out, err = trilemma("export", study, path, "--store", store)
    assert (code, err) == (0, "") and f"wrote {path}" in out
    text = path.read_text()
    assert "int8" in text and ("auroc" in text.lower())
    if ending == "json":
        json.loads(text)


def test_report_to_a_file(done, trilemma, tmp_path):
    study, store, *_ = done
    code, out, _ = trilemma("report", study, "--store", store, "--out", tmp_path / "r.html")
    assert code == 0 and str(tmp_path / "r.html") in out and (tmp_path / "r.html").is_file()


def test_names_are_never_read_as_markup(trilemma, tmp_path):
    """A bracket in a question or a class must neither vanish nor end the program."""
    names = [f"{s}/{c}/{i}.png" for s in ("train", "test") for c in ("[bold]a", "[red]b") for i in range(12)]
    write_images(tmp_path / "[x]", names)
    text = SMALLEST.replace("Does anything run?", "Is [/bold] text?").replace('"by_site"', '"iid"')
    study = write_study(tmp_path, text)
    data = ("--set", f'base.data={{kind="folder", path="{tmp_path}/[x]", size=16}}')
    named = ("--set", 'grid.both=[{name="[/red] a"}]', "--store", tmp_path / "store")
    code, out, err = trilemma("data", study, *data)
    assert (code, err) == (0, "") and "[bold]a, [red]b" in out
    code, out, err = trilemma("run", study, *data, *named, "--jobs", 1)
    assert (code, err) == (0, "") and "train: [/red] a, seed 0" in out
    code, out, err = trilemma("list", "--store", tmp_path / "store")
    assert (code, err) == (0, "") and "Is [/bold] text?" in out


def test_paths_are_never_read_as_markup(done, trilemma, tmp_path):
    """A bracket or a colon in a path: all is written, and the path is shown as it is."""
    study, store, *_ = done
    folder = shutil.copytree(store, tmp_path / "x[/b]:smile:")
    code, out, err = trilemma("report", study, "--store", folder)
    assert (code, err) == (0, "") and f"Report: {folder}/reports/smallest.html" in out
    code, out, err = trilemma("export", study, tmp_path / "o[/red][red].csv", "--store", folder)
    assert (code, err) == (0, "") and f"wrote {tmp_path}/o[/red][red].csv" in out
    key = plan_of(study).cells[0].key
    code, out, err = trilemma("show", key, "--store", folder)
    assert (code, err) == (0, "") and f"file: {folder}/artefacts" in out and f"artefact {key} of training" in out
    code, _, err = trilemma("list", "--store", tmp_path / "[/red]:smile:")
    assert code == 2 and f"error: {tmp_path}/[/red]:smile:: there is no store here" in err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_the_letters_shows_others(done, trilemma, monkeypatch, encoding):
    study, store, *_ = done
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    monkeypatch.setattr(sys, "stdout", terminal)
    code, _, err = trilemma("report", study, "--store", store)
    assert (code, err) == (0, "")
    assert b"? Pareto-optimal" in terminal.buffer.getvalue() and b"Report: " in terminal.buffer.getvalue()


def test_the_command_of_a_report_can_be_pasted(done, trilemma, tmp_path):
    study, store, *_ = done
    out = tmp_path / "out.json"
    override = 'base.data={ kind = "phantom", size = 16, train = 24, val = 8, test = 12, sites = 2, classes = 2 }'
    assert trilemma("export", study, out, "--store", store, "--set", override)[0] == 0
    assert f"--set '{override}'" in json.dumps(json.loads(out.read_text()), ensure_ascii=False).replace('\\"', '"')


def folder_study(tmp_path, *, spoil=None, drop=()):
    """A study on small image files, and what spoils it."""
    names = [f"{s}/{c}/{i}.png" for s in ("train", "test") for c in ("a", "b") for i in range(12)]
    write_images(tmp_path / "images", names)
    for name in drop:
        (tmp_path / "images" / name).unlink()
    if spoil:
        path = tmp_path / "images" / spoil[0]
        path.write_bytes(spoil[1](path.read_bytes()))
    text = SMALLEST.replace('"by_site"', '"iid"')
    return [write_study(tmp_path, text), "--set", f'base.data={{kind="folder", path="{tmp_path}/images", size=16}}']


def named_study(tmp_path, data):
    return [write_study(tmp_path, SMALLEST.replace('"by_site"', '"iid"')), "--set", f"base.data={data}"]


def undecodable_study(tmp_path):
    """A class folder whose name is no UTF-8."""
    arguments = folder_study(tmp_path)
    for split in ("train", "test"):
        (tmp_path / "images" / split / "b").rename(tmp_path / "images" / split / "b\udcff")
    return arguments


def manifest_study(tmp_path, row):
    write_images(tmp_path / "images", [f"{i}.png" for i in range(8)])
    (tmp_path / "secret.png").write_bytes((tmp_path / "images" / "0.png").read_bytes())
    rows = [f"{i}.png,{'ab'[i % 2]}" for i in range(8)] + [row]
    (tmp_path / "images" / "list.csv").write_text("\n".join(["path,label", *rows]))
    data = f'base.data={{kind="manifest", path="{tmp_path}/images/list.csv", size=16}}'
    return [write_study(tmp_path, SMALLEST.replace('"by_site"', '"iid"')), "--set", data]


def medmnist_study(tmp_path, monkeypatch):
    """PneumoniaMNIST with a label that its two classes do not have."""
    monkeypatch.setenv("TRILEMMA_OFFLINE", "1")
    arrays = {}
    for split, number in (("train", 8), ("val", 4), ("test", 4)):
        arrays[f"{split}_images"] = np.zeros((number, 28, 28), np.uint8)
        arrays[f"{split}_labels"] = (np.arange(number) % 2).astype(np.uint8)[:, None]
    arrays["test_labels"][3] = 2
    (tmp_path / "medmnist").mkdir()
    np.savez(tmp_path / "medmnist" / "pneumoniamnist.npz", **arrays)
    data = 'base.data={kind="medmnist", name="pneumoniamnist"}'
    return [write_study(tmp_path, SMALLEST.replace('"by_site"', '"iid"')), "--set", data, "--data", tmp_path]


def test_images_that_cannot_be_used(trilemma, tmp_path, monkeypatch):
    """Each in `data`, which loads them, names the file and ends with 2."""
    cases = {
        "truncated": (folder_study, {"spoil": ("train/a/3.png", lambda content: content[:60])}, "3.png"),
        "unreadable": (folder_study, {"spoil": ("test/b/1.png", lambda _: b"no picture")}, "1.png"),
        "empty file": (folder_study, {"spoil": ("test/b/1.png", lambda _: b"")}, "1.png"),
        "empty class": (folder_study, {"drop": [f"train/b/{i}.png" for i in range(12)]}, "b"),
        "leaves root": (manifest_study, {"row": "../secret.png,a"}, "secret.png"),
        "absolute": (manifest_study, {"row": "/etc/hostname,a"}, "/etc/hostname"),
        "not there": (manifest_study, {"row": "none.png,a"}, "none.png"),
        "no label": (manifest_study, {"row": "1.png,"}, "label"),
        "label outside": (medmnist_study, {"monkeypatch": monkeypatch}, "pneumoniamnist.npz"),
        "NUL": (named_study, {"data": r'{kind="manifest", path="a\u0000b.csv"}'}, r"a\x00b.csv"),
        "NUL in a folder": (named_study, {"data": r'{kind="pneumonia", folder="a\u0000b"}'}, r"a\x00b"),
        "too long": (named_study, {"data": f'{{kind="folder", path="/{"a" * 300}"}}'}, "aaa...: cannot be read"),
        "far too long": (named_study, {"data": f'{{kind="pcam", path="/{"a/" * 3000}"}}'}, "a/...: cannot be read"),
        "no UTF-8": (undecodable_study, {}, r"b\udcff/0.png: is a path that is not UTF-8"),
    }
    for name, (make, arguments, said) in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        code, _, err = trilemma("data", *make(folder, **arguments))
        assert code == 2, (name, err)
        assert err.startswith("error: ") and said in err and "Traceback" not in err and "internal" not in err, (
            name,
            err,
        )
        assert len(err) < 1000, (name, err)


SETTINGS = [
    (["--set", "base.rouns=2"], 2, "base.rouns"),
    (["--set", 'base.privacy={kind="dp_sgd",epsilon=0,delta=1e-3}'], 2, "base.privacy.epsilon"),
    (["--set", 'base.threat={kind="label_flip",num_malicious=5}'], 2, "num_malicious"),
    (["--set", "base.partition.num_clients=3"], 2, "3"),  # the data have two sites
    (["--set", 'base.partition={kind="iid",num_clients=100}'], 2, "no training data"),
    (["--set", 'base.partition={kind="dirichlet",num_clients=8,alpha=1e-4}'], 2, ""),
    (["--set", "base.model.norm=batch", "--set", 'base.privacy={kind="dp_sgd",epsilon=8,delta=1e-3}'], 2, "norm"),
    (["--set", 'base.privacy={kind="dp_sgd",epsilon=8,delta=0.5}'], 2, "delta"),
    (["--set", 'base.privacy={kind="dp_sgd",epsilon=8,delta=1e-3}', "--set", "base.local.batch_size=100"], 2, "batch"),
    (["--set", 'base.model={kind="monai",network="NoSuchNet"}'], 2, "NoSuchNet"),
    (["--set", 'base.data={kind="folder",path="nowhere"}'], 2, "nowhere"),
    (["--set", 'base.data={kind="pcam"}'], 2, "pcam"),
    (["--set", 'base.data={kind="cifar10"}'], 2, "cifar"),
    (["--device", "tpu"], 2, "--device"),
    (["--jobs", "0"], 2, "--jobs"),
    (["--threads", "x"], 2, "--threads"),
    (["--nonsense"], 2, "--nonsense"),
]


@pytest.mark.parametrize(("arguments", "expected", "said"), SETTINGS, ids=[" ".join(row[0]) for row in SETTINGS])
def test_settings_that_cannot_be(trilemma, tmp_path, arguments, expected, said):
    study = write_study(tmp_path, SMALLEST)
    code, _, err = trilemma("run", study, "--store", tmp_path / "store", *arguments)
    assert code == expected, err
    assert said in err and "Traceback" not in err and "internal error" not in err
    if (tmp_path / "store" / "store.db").exists():
        assert rows_of(tmp_path / "store")["runs"] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_cuda_without_cuda(trilemma, tmp_path):
    code, _, err = trilemma("run", write_study(tmp_path, SMALLEST), "--store", tmp_path / "s", "--device", "cuda")
    assert code == 2 and "no CUDA device" in err and not (tmp_path / "s").exists()


def test_requests_of_the_store_that_cannot_be(done, trilemma, tmp_path):
    study, store, *_ = done
    other = write_study(tmp_path, SMALLEST.replace('"smallest"', '"other"').replace("rounds = 1", "rounds = 2"))
    cases = [
        (["export", study, tmp_path / "out.xlsx", "--store", store], 2, ".csv, .json, .tex, .md"),
        (["export", other, tmp_path / "out.csv", "--store", store], 2, "holds nothing of the study 'other'"),
        (["report", other, "--store", store], 2, "Run it first"),
        (["report", study, "--store", tmp_path / "none"], 2, "no store here"),
        (["list", "--store", tmp_path / "none"], 2, "no store here"),
        (["show", "zzz", "--store", store], 2, "trilemma list"),
        (["show", "", "--store", store], 2, "names nothing"),
        (["show", "s2", "--store", store], 2, "several"),
        (["run", tmp_path / "none.toml"], 2, "no such file"),
        (["check", tmp_path], 2, "could not be read"),
        (["export", study, tmp_path / "study.toml" / "out.csv", "--store", store], 1, "could not be written"),
        (["frobnicate"], 2, "frobnicate"),
        (["list", "--store", "a" * 300], 2, "aaa...: cannot be read (File name too long). Correct the path"),
        (["check", study, "--store", "a" * 300], 2, "too long"),
        (["check", study, "--ledgers", "a" * 300], 2, "too long"),
        (["data", study, "--data", "a" * 300], 2, "too long"),
        (["ledger", "show", "a" * 300], 2, "too long"),
        (["ledger", "admit", "a" * 300, "--study", study], 2, "too long"),
    ]
    for arguments, expected, said in cases:
        code, _, err = trilemma(*arguments)
        assert code == expected and said in err, (arguments, code, err)
        assert "Traceback" not in err and "internal error" not in err


@pytest.mark.parametrize("command", ["run", "check", "report", "list", "show", "export"])
def test_a_store_of_a_newer_version(done, trilemma, tmp_path, command):
    study, store, *_ = done
    folder = shutil.copytree(store, tmp_path / "store")
    db = sqlite3.connect(folder / "store.db")
    db.execute("PRAGMA user_version = 99")
    db.close()
    before = (folder / "store.db").read_bytes()
    named = {"list": [], "show": ["s2"], "export": [study, tmp_path / "out.csv"]}.get(command, [study])
    code, _, err = trilemma(command, *named, "--store", folder)
    assert code == 1 and "newer version" in err and "Update trilemma" in err
    assert (folder / "store.db").read_bytes() == before


def test_a_failed_run_still_reports_what_it_has(done, trilemma, tmp_path, monkeypatch):
    study, store, *_ = done
    folder = shutil.copytree(store, tmp_path / "store")
    for model in (folder / "artefacts").glob("*.onnx"):
        model.unlink()
    (folder / "reports" / "smallest.html").unlink()
    cost = ("--set", 'evaluations=[{kind="clean"},{kind="cost",repeats=5}]')
    code, out, err = trilemma("run", study, "--store", folder, "--jobs", 1, *cost)
    assert code == 1 and "is missing" in err and "(and 1 more)" in err and out.count("failed time:") == 2
    assert (folder / "reports" / "smallest.html").is_file()


def test_a_defect_is_told_without_a_traceback(trilemma, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("trilemma.study.check.check_study", lambda *_: 1 / 0)
    code, out, err = trilemma("check", write_study(tmp_path, SMALLEST))
    assert code == 1 and "internal error (ZeroDivisionError" in err and "Traceback" not in out + err
    kept = next(tmp_path.glob("trilemma-error-*.txt"))
    assert str(kept) in err and "Traceback" in kept.read_text()


def test_ctrl_c_says_how_to_go_on(trilemma, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("trilemma.study.engine.preflight", stop)
    code, _, err = trilemma("run", write_study(tmp_path, SMALLEST), "--store", tmp_path / "store")
    assert code == 130 and "run the same command again" in err
    with Store(tmp_path / "store", write=True):  # nothing holds the lock
        pass


def test_version(trilemma):
    code, out, _ = trilemma("--version")
    assert code == 0 and re.fullmatch(r"trilemma \d+\.\d+\.\d+\S* ", out)


def test_the_console_script_is_there():
    script = Path(sys.executable).parent / "trilemma"
    if script.exists():
        assert subprocess.run([script, "--version"], capture_output=True).returncode == 0
