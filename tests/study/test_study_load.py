"""Every mistake in a study file becomes one message that names the file, the field and what to do."""

import pytest

from helpers.tiny_study import TINY, plan_of, write_study
from trilemma.errors import UserError
from trilemma.study.load import load_study

#: What is changed in the tiny study, where the message must say the mistake is, what else it must say.
MISTAKES = [
    # unknown fields: the near one and the valid ones
    (["base.rouns=2"], "base.rouns", ["Did you mean 'rounds'", "data, partition, model"]),
    (["base.local.batch_sze=3"], "base.local.batch_sze", ["'batch_size'", "learning_rate"]),
    (["base.local.augmentation.shfit=2"], "base.local.augmentation.shfit", ["'shift'", "flip"]),
    (["nam=1"], "nam", ["'name'", "question, seeds, base"]),
    (["qqqq=1"], "qqqq", ["unknown field", "Valid fields"]),
    (['grid.defence=[{kind="fgsm",radus=1}]'], "grid.defence[0].radus", ["'radius'", "norm"]),
    (['grid.both=[{name="a",round=0}]'], "grid.both[0].round", ["'rounds'"]),
    (['baselines=[{algoritm={kind="centralised"}}]'], "baselines[0].algoritm", ["'algorithm'"]),
    (['evaluations=[{kind="pgd",radii=["4/255"],stps=3}]'], "evaluations[0].stps", ["'steps'"]),
    (
        ['evaluations=[{kind="all_at_once",attacks=[{kind="pgd",radii=[0.1]},{kind="pgd",radii=[0.1],stp=2}]}]'],
        "evaluations[0].attacks[1].stp",
        ["'steps'"],
    ),
    # inside an attack, wherever it stands; one that hides a missing field is named itself
    (['evaluations=[{kind="pgd",raddius=0.1}]'], "evaluations[0].raddius", ["unknown", "'radii'", "norm, radii"]),
    (
        ['evaluations=[{kind="transfer",attack={kind="mifgsm",radius=0.1,decy=1}}]'],
        "evaluations[0].attack.decy",
        ["'decay'", "norm, radii, kind, steps, decay"],
    ),
    (['evaluations=[{kind="transfer",radius=0.1,stps=3}]'], "evaluations[0]", ["stps", "attack", "steps, restarts"]),
    (
        ['evaluations=[{kind="autoattack",radius=0.1,efort="quick"}]'],
        "evaluations[0].efort",
        ["'effort'", "norm, radii, kind, effort"],
    ),
    (
        ['grid.defence=[{kind="adversarial",attack={kind="apgd",radius=0.1,num_target=2}}]'],
        "grid.defence[0].attack.num_target",
        ["'num_targets'", "restarts"],
    ),
    (['base.early_stopping={attack={kind="pgd",radius=0.1,stps=2}}'], "base.early_stopping.attack.stps", ["'steps'"]),
    # kinds
    (['evaluations=[{kind="autoattak",radius=0.1}]'], "evaluations[0]", ["'autoattak' is unknown", "'autoattack'"]),
    (
        ['evaluations=[{kind="transfer",attack={kind="square",radius=0.1}}]'],
        "evaluations[0].attack",
        ["'square' is unknown", "'fgsm', 'pgd', 'mifgsm', 'apgd'"],
    ),
    (["base.model.kind=resnet10"], "base.model", ["'resnet10' is unknown", "'resnet9', 'resnet18', 'monai'"]),
    (["base.model={width=4}"], "base.model", ["kind"]),
    (["base.model=resnet9"], "base.model", ["must be a table", "kind ="]),
    (['grid.defence=[{kind="none"},{kind="fgms"}]'], "grid.defence[1]", ["'none', 'fgsm', 'pgd'"]),
    (['baselines=[{algorithm={kind="centralized"}}]'], "baselines[0].algorithm", ["'centralised'"]),
    (['compressions=[{kind="int2"}]'], "compressions[0]", ["'none', 'prune', 'n_of_m'", "'int8', 'int4'"]),
    (
        ['compressions=[{kind="chain",steps=[{kind="int8"},{kind="prune"}]}]'],
        "compressions[0]",
        ["'int8' leaves no network of floats to the steps after it; put it last"],
    ),
    (
        ['compressions=[{kind="chain",steps=[{kind="prune"},{kind="none"}]}]'],
        "compressions[0].steps[1]",
        ["'prune', 'n_of_m', 'channels'"],
    ),
    # missing
    (['base.privacy={kind="dp_sgd",epsilon=8}'], "base.privacy.delta", ["missing"]),
    (['evaluations=[{kind="pgd"}]'], "evaluations[0].radii", ["missing"]),
    (['evaluations=[{kind="autoattack"}]'], "evaluations[0].radii", ["missing"]),
    (['evaluations=[{kind="transfer"}]'], "evaluations[0]", ["needs radii", "'4/255'", "attack of its own"]),
    (['evaluations=[{kind="transfer",attack={kind="mifgsm"}}]'], "evaluations[0].attack.radii", ["missing"]),
    (['evaluations=[{kind="diagnostics"}]'], "evaluations[0].radius", ["missing"]),
    # impossible values
    (['base.privacy={kind="dp_sgd",epsilon=0,delta=1e-3}'], "base.privacy.epsilon", ["greater than 0, not 0"]),
    (
        ['grid.both=[{name="a",privacy={kind="dp_sgd",epsilon=-1,delta=1e-3}}]'],
        "grid.both[0].privacy.epsilon",
        ["greater than 0"],
    ),
    (['base.threat={kind="label_flip",num_malicious=3}'], "", ["num_malicious", "2 clients"]),
    (['base.algorithm={kind="fedavg",clients_per_round=3}'], "", ["clients_per_round 3", "2 clients"]),
    (['base.algorithm={kind="fedavg",weights="foo"}'], "base.algorithm.weights", ["'records' or 'equal'"]),
    (['base.algorithm={kind="fedavg",weights=[1,2,3]}'], "", ["weights has 3", "2 clients"]),
    (['base.algorithm={kind="local_only",client=2}'], "", ["algorithm.client 2", "2 clients"]),
    (
        ['base.privacy={kind="dp_sgd",epsilon=8,delta=1e-3}', 'base.algorithm={kind="fedavg",weights="records"}'],
        "",
        ["weights 'records'", "equal"],
    ),
    (['grid.defence=[{kind="fgsm",radius="abc"}]'], "grid.defence[0].radius", ["'abc'", "'4/255'"]),
    (['grid.defence=[{kind="fgsm",radius="4/0"}]'], "grid.defence[0].radius", ["'4/0'"]),
    (['grid.defence=[{kind="fgsm",radius=inf}]'], "grid.defence[0].radius", ["finite"]),
    (['evaluations=[{kind="pgd",radius="abc"}]'], "evaluations[0].radii[0]", ["'abc'"]),
    (['evaluations=[{kind="pgd",radii=["8/255","4/255"]}]'], "evaluations[0].radii", ["ascend"]),
    # fields of PGD that stand beside the kind of a transfer are named where they are
    (['evaluations=[{kind="transfer",radius="4/0"}]'], "evaluations[0].radii[0]", ["'4/0'"]),
    (['evaluations=[{kind="transfer",radius=0.1,steps=0}]'], "evaluations[0].steps", ["not 0"]),
    (['evaluations=[{kind="transfer",radius=0.1,radii=[0.1]}]'], "evaluations[0]", ["not both"]),
    (['evaluations=[{kind="diagnostics",radius=4}]'], "evaluations[0]", ["beyond 1"]),
    (["base.local.class_shares=[0.5,0.6]"], "base.local.class_shares", ["add up to 1, not 1.1"]),
    (["base.local.class_shares=[0.3,0.3]"], "base.local.class_shares", ["add up to 1, not 0.6"]),
    (["base.local.class_shares=[1.0]"], "base.local.class_shares[0]", ["less than 1"]),
    (["base.local.class_shares=[0,1]"], "base.local.class_shares[0]", ["greater than 0"]),
    (["base.rounds=-1"], "base.rounds", ["not -1"]),
    (["base.rounds=two"], "base.rounds", ["integer", "'two'"]),
    (["base.rounds=1.5"], "base.rounds", ["not 1.5"]),
    (["base.local.epochs=1", "base.local.steps=2"], "base.local", ["epochs", "steps"]),
    (["base.local.learning_rate=nan"], "base.local.learning_rate", ["finite"]),
    (['base.model={kind="resnet9",width=4,groups=3}'], "base.model", ["divide"]),
    (["base=3"], "base", ["dictionary"]),
    (["seeds=[]"], "seeds", ["at least 1"]),
    (["seeds=[0,0]"], "", ["seeds", "twice"]),
    (["seeds=[-1]"], "seeds[0]", ["not -1"]),
    (['name="A b"'], "name", ["'A b'"]),
    (["base.seed=1"], "base.seed", ["seeds = "]),
    (["grid.seed=[1,2]"], "grid.seed[0]", ["seeds = "]),
    # the grid
    (["grid.defence=[]"], "", ["grid.defence is empty"]),
    (["grid.defence=fgsm"], "grid.defence", ["list"]),
    (["grid.defence=[3]"], "grid.defence[0]", ["must be a table"]),
    (['grid.defense=[{kind="fgsm"}]'], "grid.defense[0]", ["no field of a training", "name ="]),
    (['grid.both=[{name="",rounds=2}]'], "grid.both[0]", ["name ="]),
    # two configurations that a report could not tell apart
    (["grid.local=[{momentum=0.5},{momentum=0.9}]"], "", ["both called 'sgd 0.05, batch 64'", "name ="]),
    (['grid.both=[{name="a",rounds=2},{name="a",rounds=3}]'], "", ["both called 'a'"]),
    (['baselines=[{name="plain",rounds=7}]'], "", ["both called 'plain'"]),
]


@pytest.mark.parametrize(("overrides", "place", "said"), MISTAKES, ids=[" ".join(row[0]) for row in MISTAKES])
def test_a_mistake_is_named(tmp_path, overrides, place, said):
    study = write_study(tmp_path)
    plan_of(study)  # the study itself is sound
    with pytest.raises(UserError) as caught:
        plan_of(study, *overrides)
    message = str(caught.value)
    assert study.name in caught.value.where
    assert not place or caught.value.where.endswith(f"{study.name}: {place}")
    assert all(words in message for words in said), message
    assert caught.value.remedy and "literal[" not in message and "\n" not in message


def test_a_missing_part_of_a_study_is_named(tmp_path):
    for part in ("name", "question"):
        text = "\n".join(line for line in TINY.splitlines() if not line.startswith(f"{part} ="))
        with pytest.raises(UserError, match=f"{part}: is required but missing"):
            plan_of(write_study(tmp_path, text))
    with pytest.raises(UserError, match="base.partition.num_clients: is required but missing"):
        plan_of(write_study(tmp_path, 'name = "a"\nquestion = "b"\n[base]\npartition = { kind = "iid" }\n'))


def test_a_name_and_a_question_are_enough_and_run_on_phantoms(tmp_path):
    (training,) = plan_of(write_study(tmp_path, 'name = "a"\nquestion = "b"\n')).trainings
    assert training.spec.data.kind == "phantom"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'name = "a\n', ["line 1"]),
        (b'name = "a"\nname = "b"\n', ["line 2", "overwrite"]),
        (b"[base]\n[base]\n", ["line 2"]),
        (b"[grid.training]\na = 1\n[[grid.training]]\n", ["line 3"]),
        (b'name = "\xe9t\xe9"', ["UTF-8"]),
        (b"\x00\x01", ["line 1"]),
        (b"a = " + b"[" * 100_000, ["deeply"]),
        (b"", ["name: is required"]),
    ],
    ids=["unclosed", "key twice", "table twice", "table and list", "latin-1", "binary", "deep", "empty"],
)
def test_a_file_that_is_no_study(tmp_path, content, said):
    path = tmp_path / "study.toml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_study(path)
    assert caught.value.where.startswith(str(path)) and caught.value.remedy
    assert all(words in str(caught.value) for words in said), str(caught.value)


def test_no_file_or_a_folder(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_study(tmp_path / "none.toml")
    with pytest.raises(UserError, match="could not be read"):
        load_study(tmp_path)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("base.rounds=7", 7),
        ("base.rounds = 7", 7),
        ("base.model.width=8", {"kind": "resnet9", "width": 8}),
        ("base.local.schedule=cosine", {"batch_size": 16, "schedule": "cosine"}),
        ('base.local.schedule="cosine"', {"batch_size": 16, "schedule": "cosine"}),
        ("base.local.learning_rate=1e-3", {"batch_size": 16, "learning_rate": 0.001}),
        ("base.local.augmentation.flip=true", {"batch_size": 16, "augmentation": {"flip": True}}),
        ('base.defence={kind="fgsm",radius="4/255"}', {"kind": "fgsm", "radius": "4/255"}),
        ("base.partition.num_clients=3", {"kind": "by_site", "num_clients": 3}),
    ],
)
def test_set_replaces_one_field(tmp_path, override, expected):
    before = load_study(write_study(tmp_path)).base
    after = load_study(tmp_path / "study.toml", (override,)).base
    field = override.split(".")[1].split("=")[0].strip()
    assert after[field] == expected
    assert {name: value for name, value in after.items() if name != field} == {
        name: value for name, value in before.items() if name != field
    }


def test_the_last_set_wins_and_a_bare_fraction_is_a_radius(tmp_path):
    study = write_study(tmp_path)
    assert load_study(study, ("base.rounds=3", "base.rounds=4")).base["rounds"] == 4
    plan = plan_of(study, 'grid.defence=[{kind="fgsm"}]', "base.threat.kind=adversarial_samples",
                   "base.threat.num_malicious=1", "base.threat.radius=2/255")  # fmt: skip
    assert plan.trainings[0].spec.threat.radius == pytest.approx(2 / 255)


@pytest.mark.parametrize("override", ["base.rounds", "=1", "", "base..x=1", "base.local.=1", ".=1", " =2"])
def test_set_in_a_bad_form(tmp_path, override):
    with pytest.raises(UserError, match="field.field=value") as caught:
        load_study(write_study(tmp_path), (override,))
    assert caught.value.where == f"--set {override}"


@pytest.mark.parametrize("override", ["base.rounds.x=1", "compressions.0.kind=int8", "name.x=1"])
def test_set_below_what_is_no_table(tmp_path, override):
    with pytest.raises(UserError, match="is no table"):
        load_study(write_study(tmp_path), (override,))
