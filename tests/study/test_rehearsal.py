"""What a compression cannot do is said before anything is trained for it."""

import io

import pytest
from rich.console import Console

from helpers.tiny_study import SMALLEST, plan_of, run_plan, write_study
from trilemma.errors import UserError
from trilemma.study import rehearsal
from trilemma.study.check import check_study
from trilemma.study.store import Store

VIT = '{kind="monai",network="ViT",arguments={patch_size=8,hidden_size=12,mlp_dim=16,num_layers=1,num_heads=2}}'


@pytest.fixture(autouse=True)
def nothing_tried(monkeypatch):
    monkeypatch.setattr(rehearsal, "_TRIED", {})


def study_with(folder, compression, *overrides):
    return plan_of(write_study(folder, SMALLEST), f"compressions=[{{kind='none'}},{compression}]", *overrides)


@pytest.mark.parametrize(
    ("compression", "overrides", "said"),
    [
        ("{kind='channels',multiply_adds=0.001}", (), "cannot be reached"),
        ("{kind='mixed',budget=0.01}", (), "budget is"),
        ("{kind='channels'}", (f"base.model={VIT}",), "the network cannot be traced"),
        ("{kind='distil',student={kind='monai',network='NoNet'}}", (), "NoNet.*[^.]\\. Change"),
        ("{kind='distil',images='val'}", ("base.data.val=1",), "at least two images, and there are 1"),
        (
            "{kind='chain',steps=[{kind='channels',multiply_adds=0.001},{kind='distil'},{kind='int8'}]}",
            (),
            "cannot be reached",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_a_training(roots, tmp_path, compression, overrides, said):
    plan = study_with(tmp_path, compression, *overrides)
    for attempt in (
        lambda: run_plan(plan, tmp_path / "store", roots),
        lambda: check_study(plan, tmp_path / "other", roots, Console(file=io.StringIO())),
    ):
        with pytest.raises(UserError, match=said) as caught:
            attempt()
        assert caught.value.where == f"compressions, {plan.cells[1].compression.label} of plain"
        assert caught.value.exit_code == 2
    with Store(tmp_path / "store") as store:
        assert not store.keys("runs")


def test_a_budget_after_channels_waits_for_the_trained_weights(roots, tmp_path):
    """Which channels leave is up to them, and what the others take at least too."""
    alone = study_with(tmp_path, "{kind='mixed',budget=0.12}")
    with pytest.raises(UserError, match="budget is"):
        check_study(alone, tmp_path / "store", roots, Console(file=io.StringIO()))
    after = study_with(tmp_path, "{kind='chain',steps=[{kind='channels'},{kind='mixed',budget=0.12}]}")
    check_study(after, tmp_path / "store", roots, Console(file=io.StringIO()))


@pytest.mark.parametrize("error", [MemoryError(), OSError("No space left on device")])
def test_a_machine_at_its_end_is_no_mistake_of_the_user(roots, tmp_path, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr(rehearsal, "export_onnx", full)
    with pytest.raises(type(error)):
        run_plan(plan_of(write_study(tmp_path, SMALLEST)), tmp_path / "store", roots)
    assert rehearsal._TRIED == {}


def test_a_network_that_no_file_can_hold_is_refused(roots, tmp_path, monkeypatch):
    monkeypatch.setattr(rehearsal, "export_onnx", lambda *_: ["no operator"][1])
    with pytest.raises(UserError, match="cannot be written to an ONNX file and run from it: list index out of range"):
        run_plan(plan_of(write_study(tmp_path, SMALLEST)), tmp_path / "store", roots)


def test_what_is_stored_is_not_rehearsed_again(roots, tmp_path, monkeypatch):
    plan = plan_of(write_study(tmp_path, SMALLEST))
    run_plan(plan, tmp_path / "store", roots)
    monkeypatch.setattr(rehearsal, "_TRIED", {})
    monkeypatch.setattr(rehearsal, "_problem", lambda *_: "tried again")
    assert run_plan(plan, tmp_path / "store", roots) == ""
    with pytest.raises(UserError, match="tried again"):
        run_plan(plan_of(write_study(tmp_path, SMALLEST), "seeds=[1]"), tmp_path / "store", roots)


@pytest.mark.parametrize(
    "compression",
    [
        "{kind='prune',sparsity=0.9}",
        "{kind='n_of_m'}",
        "{kind='int8',calibration='synthetic'}",
        "{kind='int4'}",
        "{kind='bfloat16'}",
        "{kind='mixed',budget=0.3}",
        "{kind='distil',student={kind='resnet9',width=2},epochs=1000,num_images=100000,learning_rate=1.0}",
        "{kind='chain',steps=[{kind='channels',multiple=1},{kind='distil',epochs=1000},{kind='int8'}]}",
    ],
)
def test_what_can_be_is_let_pass_without_its_work(roots, tmp_path, compression):
    plan = study_with(tmp_path, compression)
    check_study(plan, tmp_path / "store", roots, Console(file=io.StringIO()))
    assert list(rehearsal._TRIED.values()) == [None, None]
