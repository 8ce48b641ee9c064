"""The pages: generated ones are fresh, links resolve, studies load, and what they name is what the code has."""

import importlib
import importlib.util
import pkgutil
import re
import sqlite3
import sys
import tomllib
from pathlib import Path
from types import UnionType
from typing import Annotated, Union, get_args, get_origin

import numpy as np
import pytest
import torch
from torch import nn

import trilemma
from helpers.pictures import write_images
from trilemma.attacks.budget import Budget
from trilemma.data.folder import load_folder
from trilemma.data.manifest import load_manifest
from trilemma.data.records import Dataset, Records
from trilemma.data.roots import DataRoots
from trilemma.errors import UserError
from trilemma.evaluation.bounds import bounds, told
from trilemma.evaluation.clean import clean_measurements
from trilemma.evaluation.cost import BATCH_SIZES
from trilemma.evaluation.diagnostics import examined, judged
from trilemma.evaluation.flags import diagnostic_measurements
from trilemma.evaluation.harness import Target, agreement_measurements
from trilemma.evaluation.measurement import Measurement
from trilemma.evaluation.robustness import robust_auroc, robust_measurements
from trilemma.federation.clients import make_clients
from trilemma.models.classifier import Classifier
from trilemma.privacy.guarantee import Guarantee, Trust, Unit
from trilemma.spec import Spec
from trilemma.study.load import load_study
from trilemma.study.migrations import MIGRATIONS
from trilemma.study.plan import make_plan

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "design").glob("*.md"), *ROOT.glob("examples/*.md")])
BLOCK = re.compile(r"^```(\w+)?([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def page(name: str) -> str:
    return (DOCS / name).read_text("utf-8")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def generate():
    """The script docs/generate.py as a module."""
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_generated_pages_are_fresh(generate):
    stale = [name for name, text in generate.pages().items() if page(name) != text]
    assert not stale, "run `make docs`"


def test_a_stale_page_is_noticed_and_mended(generate, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "DOCS", tmp_path)
    (tmp_path / "cli.md").write_text(page("cli.md"), encoding="utf-8")
    (tmp_path / "study-file.md").write_text(page("study-file.md") + "\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    with pytest.raises(SystemExit) as ended:
        generate.main()
    assert "study-file.md" in str(ended.value) and "cli.md" not in str(ended.value)
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    generate.main()
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    generate.main()


def unions() -> dict[str, list[type[Spec]]]:
    """Every union over `kind` that a specs module has, by its name."""
    found = {}
    for module in pkgutil.walk_packages(trilemma.__path__, "trilemma."):
        if module.name.endswith(".specs"):
            for name, value in vars(importlib.import_module(module.name)).items():
                members = members_of(value)
                if len(members) > 1 and all(isinstance(m, type) and issubclass(m, Spec) for m in members):
                    found[name] = members
    return found


def members_of(annotation: object) -> list[object]:
    """The members of a union, also of one within another."""
    if get_origin(annotation) is Annotated:
        return members_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [member for argument in get_args(annotation) for member in members_of(argument)]
    return [annotation]


#: Union -> its heading in the study file's page.
SECTIONS = {
    "DataSpec": "base.data",
    "PartitionSpec": "base.partition",
    "ModelSpec": "base.model",
    "AlgorithmSpec": "base.algorithm",
    "ServerSpec": "base.server",
    "AggregationSpec": "base.aggregation",
    "CodecSpec": "base.codec",
    "DefenceSpec": "base.defence",
    "PrivacySpec": "base.privacy",
    "ClippingSpec": "base.privacy.clipping",
    "ThreatSpec": "base.threat",
    "TriggerSpec": "base.threat.trigger",
    "CompressionSpec": "compressions",
    "StepSpec": "compressions",
    "EvaluationSpec": "evaluations",
    "EvasionSpec": "evaluations",
    "TransferableSpec": "evaluations",
    "TrainingAttack": "evaluations",
}


def test_every_kind_is_documented():
    text = page("study-file.md")
    assert unions().keys() == SECTIONS.keys()
    for union, members in unions().items():
        for member in members:
            kind = member.model_fields["kind"].default
            heading = f'### {SECTIONS[union]}: `kind = "{kind}"`'
            assert heading in text, f"{member.__name__} is missing"
            section = text.partition(heading)[2].partition("\n### ")[0]
            assert all(f"| `{field}` |" in section for field in given(member)), member


def given(member: type[Spec]) -> list[str]:
    """The fields that a study may give; one that can only be left out is none."""
    fields = member.model_fields.items()
    return [name for name, field in fields if name != "kind" and field.annotation not in (None, type(None))]


def test_a_kind_is_described_once():
    """Elsewhere a sentence refers to it: ten attacks may stand in four places."""
    text = page("study-file.md")
    headings = re.findall(r"^### (.+)$", text, re.MULTILINE)
    assert len(set(headings)) == len(headings)
    attacks = [spec.model_fields["kind"].default for spec in unions()["EvasionSpec"]]
    assert len(attacks) >= 10
    for kind in attacks:
        places = [h for h in headings if h.endswith(f'`kind = "{kind}"`')]
        assert places in ([f'evaluations: `kind = "{kind}"`'],
                          [f'base.defence: `kind = "{kind}"`', f'evaluations: `kind = "{kind}"`'])  # fmt: skip
    transfer = text.partition('### evaluations: `kind = "transfer"`\n')[2].partition("\n### ")[0]
    assert "| `attack` | one of `fgsm`, `pgd`, `mifgsm`, `apgd` |" in transfer
    stopping = text.partition("## base.early_stopping\n")[2].partition("\n## ")[0]
    assert "What `attack` may be stands under [evaluations](#evaluations)." in stopping


def test_every_command_is_documented():
    from trilemma.cli import app

    text = page("cli.md")
    names = [command.name or command.callback.__name__ for command in app.registered_commands]
    assert len(names) >= 7
    assert all(f"## trilemma {name}\n" in text for name in names)
    for group in app.registered_groups:
        inner = [command.name or command.callback.__name__ for command in group.typer_instance.registered_commands]
        assert inner
        assert all(f"### trilemma {group.typer_instance.info.name} {name}\n" in text for name in inner)
    assert max(map(len, text.partition("```text")[2].splitlines())) <= 100


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_resolve(path):
    text = re.sub(r"`[^`\n]*`", "", BLOCK.sub("", path.read_text("utf-8")))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        place = (path.parent / file).resolve() if file else path
        assert place.exists(), f"{name_of(path)} links to {target}, which is not there"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", place.read_text("utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{name_of(path)} links to {target}, which has no such heading"


def toml_blocks() -> list[tuple[str, str, bool]]:
    """(where, text, whether it is a whole study) of every TOML block; marked, or recognised by its question."""
    found = []
    for path in PAGES:
        for language, mark, text in BLOCK.findall(path.read_text("utf-8")):
            if language == "toml":
                study = mark.strip() == "study" or re.search(r"^question = ", text, re.MULTILINE) is not None
                found.append((f"{name_of(path)} {len(found)}", text, study))
    return found


@pytest.mark.parametrize(("text", "study"), [b[1:] for b in toml_blocks()], ids=[b[0] for b in toml_blocks()])
def test_toml_blocks_hold(text, study, tmp_path):
    tomllib.loads(text)
    if study:
        path = tmp_path / "study.toml"
        path.write_text(text, encoding="utf-8")
        assert make_plan(load_study(path), path.name).cells


def test_the_pages_hold_studies():
    assert sum(study for *_, study in toml_blocks()) >= 6


def test_every_metric_is_in_the_glossary():
    draws = np.random.default_rng(0)
    images = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    measured: list[Measurement] = []
    for num_classes in (2, 3):
        labels, units = np.arange(12) % num_classes, np.arange(12)
        clean, attacked = (draws.normal(size=(12, num_classes)).astype(np.float32) for _ in range(2))
        measured += clean_measurements(clean, labels, units, np.zeros(12, dtype=int), ("a",), 0)
        measured += robust_measurements(attacked, clean, labels, units, 0.1, None, 0)
        measured.append(robust_auroc(attacked, labels, units, 0.1, 0))
        network = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes)), num_classes)
        records = Records(images.numpy(), labels, units, np.zeros(12, dtype=int), units.astype(str))
        answers = network(images).detach().numpy()
        target = Target("key", network, network)
        measured += agreement_measurements(target, answers, records)
        evidence = examined(target, records, Budget("linf", 0.1), 0)
        measured += diagnostic_measurements(judged(evidence))
        measured += told(bounds(evidence, records, 12, 0, {"key": answers}))
    names = {m.metric for m in measured} | {f"latency_batch{size}_seconds" for size in BATCH_SIZES}
    names |= {"file_bytes", "multiply_adds", "epsilon", "training_seconds", "robust_accuracy_known"}
    names |= {"bytes_up_by_client_mean", "bytes_down_by_client_mean"}
    raised = {name for name in names if name.startswith("flag_")}
    assert len(raised) == 10
    names = names - raised | {"flag_*"}  # which has one row: a report tells each flag apart in words
    text = page("glossary.md")
    assert len(names) >= 18
    assert not {name for name in names if f"`{name}`" not in text}
    listed = set(re.findall(r"^\| `([\w*]+)` \|", text, re.MULTILINE))
    assert listed <= names, "the glossary names a metric that nothing measures"


def test_every_table_and_column_of_the_store_is_documented():
    lines = {line.split("|")[1].strip(): line for line in page("store.md").splitlines() if line.startswith("| `")}
    db = sqlite3.connect(":memory:")
    for script in MIGRATIONS:
        db.executescript(script)
    tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert lines.keys() == {f"`{table}`" for table in tables}
    for table in tables:
        for _, column, *_ in db.execute(f"PRAGMA table_info({table})"):
            assert f"`{column}`" in lines[f"`{table}`"], f"{table}.{column}"
    db.close()
    assert f"Version {len(MIGRATIONS)}." in page("store.md")


def test_the_page_on_choosing_names_every_choice():
    text = page("choosing.md")
    wanted = {f'unit = "{unit}"' for unit in get_args(Unit)} | {f'trust = "{trust}"' for trust in get_args(Trust)}
    members = unions()
    kinds = [spec.model_fields["kind"].default for spec in members["DefenceSpec"] + members["CompressionSpec"]]
    wanted |= {f'kind = "{kind}"' for kind in kinds if kind != "none"}
    assert len(wanted) >= 10
    assert not {choice for choice in wanted if choice not in text}


def test_every_field_of_a_guarantee_is_explained():
    text = page("guarantees.md")
    assert not [field for field in Guarantee.model_fields if f"| `{field}` |" not in text]


@pytest.mark.parametrize("path", [p for p in PAGES if p.parent.name == "design"], ids=name_of)
def test_a_design_page_has_its_four_parts_and_fits_a_page(path):
    text = path.read_text("utf-8")
    parts = [text.index(f"\n**{part}.**") for part in ("Context", "Decision", "Consequences", "Rejected")]
    assert parts == sorted(parts) and text.startswith(f"# {path.name[:4]}: ")
    assert len(text.split()) <= 500


# The error messages of docs/your-own-data.md, each provoked and compared word by word.


def folder_message(root: Path, *, leave_out: str = "", add: str = "", spoil: str = "", patient: str = "") -> str:
    names = [f"{s}/{c}/{i}.png" for s in ("train", "test") for c in ("healthy", "sick") for i in range(3)]
    write_images(root, [name for name in names if not leave_out or not name.startswith(leave_out)])
    if leave_out.count("/") == 1:
        (root / leave_out).mkdir(parents=True)
    if add:
        write_images(root, [add])
    if spoil:
        (root / spoil).write_bytes(b"no picture")
    with pytest.raises(UserError) as error:
        load_folder(str(root), 16, "grey", 0.1, patient, DataRoots(root, root.parent / "cache"))
    return str(error.value)


def manifest(root: Path, rows: list[str]) -> Dataset:
    write_images(root, [f"{i}.png" for i in range(12)])
    (root / "ours.csv").write_text("\n".join(["path,label,patient,site,split", *rows]))
    return load_manifest(str(root / "ours.csv"), 16, "grey", (0.1, 0.2), DataRoots(root, root.parent / "cache"))


def manifest_message(root: Path, second: str) -> str:
    with pytest.raises(UserError) as error:
        manifest(root, ["0.png,a,p1,north,train", second])
    return str(error.value)


def training_message(root: Path, **changes: object) -> str:
    """What is said of a training on eighteen images of two sites, six of them north's to train on."""
    rows = [f"{i}.png,{'ab'[i % 2]},p{i},{('north', 'south')[i // 6]},train" for i in range(12)]
    write_images(root, [f"{i}.png" for i in range(12, 18)])
    rows += [f"{i}.png,{'ab'[i % 2]},p{i},north,{('val', 'test')[i % 4 // 2]}" for i in range(12, 18)]
    dataset = manifest(root, rows)
    text = (
        'name = "n"\nquestion = "q"\n[base]\ndata = { kind = "pcam" }\nmodel = { kind = "resnet9", width = 4 }\n'
        'partition = { kind = "by_site", num_clients = 2 }\n'
    )
    (root / "study.toml").write_text(text)
    overrides = tuple(f"base.{name}={value}" for name, value in changes.items())
    spec = make_plan(load_study(root / "study.toml", overrides), "study.toml").trainings[0].spec
    with pytest.raises(UserError) as error:
        make_clients(spec, dataset, spec.partition.make()(dataset, spec.seed))
    return str(error.value)


def test_the_messages_on_your_own_data_are_the_real_ones(tmp_path):
    roots = iter([tmp_path / str(i) / "ours" for i in range(20)])
    dp = '{ kind = "dp_sgd", epsilon = 8.0, delta = %s }'
    said = [
        (root := next(roots), folder_message(root, leave_out="test")),
        (root := next(roots), folder_message(root, leave_out="train/sick")),
        (root := next(roots), folder_message(root, add="test/other/0.png")),
        (root := next(roots), folder_message(root, spoil="train/sick/0.png")),
        (root := next(roots), folder_message(root, patient=r"^(person\d+)_")),
        (root := next(roots), manifest_message(root, "../secret.png,a,p2,north,train")),
        (root := next(roots), manifest_message(root, "1.png,a,p1,north,test")),
        (root := next(roots), manifest_message(root, "1.png,a,p2,,train")),
        (root := next(roots), training_message(root, partition='{ kind = "by_site", num_clients = 3 }')),
        (root := next(roots), training_message(root, partition='{ kind = "iid", num_clients = 13 }')),
        (root := next(roots), training_message(root, privacy=dp % "1e-3")),
        (root := next(roots), training_message(root, privacy=dp % "0.5", local="{ batch_size = 4 }")),
    ]
    table = page("your-own-data.md").partition("## Common errors")[2].replace("`patient`", "patient")
    listed = re.findall(r"^\| `(.+?)` \| ", table, re.MULTILINE)
    real = [message.replace(str(root), "/data/ours").replace("`patient`", "patient") for root, message in said]
    assert [m for m in real if m not in listed] == []
    assert [m for m in listed if m not in real] == []
