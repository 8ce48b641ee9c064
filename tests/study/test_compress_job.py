"""What a compression looks at: images that fit the model, however small."""

import os

import numpy as np
import onnx
import pytest
import torch

from helpers.pictures import write_images
from helpers.tiny_study import PRIVATE, SMALLEST, plan_of, run_plan, write_study
from trilemma.compression.session import Session
from trilemma.compression.specs import Int8
from trilemma.data.specs import Phantom
from trilemma.models.specs import Resnet9
from trilemma.privacy.guarantee import Guarantee
from trilemma.study.compress_job import material
from trilemma.study.files import read_model
from trilemma.study.store import Store
from trilemma.study.workplace import Workplace

INT8 = '\n[[compressions]]\nkind = "int8"\nnum_calibration = 16\n'


@pytest.mark.parametrize("size", [8, 11])
def test_models_of_images_smaller_than_phantoms_are_calibrated(roots, tmp_path, size):
    names = [f"{split}/{kind}/{i}.png" for split in ("train", "test") for kind in ("a", "b") for i in range(8)]
    write_images(tmp_path / "images", names)
    data = f'base.data={{kind="folder", path="{tmp_path}/images", size={size}, mode="rgb"}}'
    plan = plan_of(write_study(tmp_path, SMALLEST.replace('"by_site"', '"iid"') + INT8), data)
    run_plan(plan, tmp_path / "store", roots)
    with Store(tmp_path / "store") as store:
        assert store.keys("artefacts") == {plan.cells[0].key}
    place = Workplace(tmp_path / "store", roots, "cpu", 1, os.getpid())
    training = plan.trainings[0]
    teacher, dataset = place.trained(training.spec, training.key), place.dataset(training.spec.data)
    x_BCHW = material(place, teacher, dataset, 0).images(*Int8(num_calibration=5).looks)
    phantoms = Phantom(size=16, train=16).load(roots).train.x(slice(0, 5)).numpy()
    assert x_BCHW.shape == (5, 3, size, size)
    if size == 8:  # each pixel the mean of four
        means = phantoms.reshape(5, 1, 8, 2, 8, 2).mean((3, 5))
        np.testing.assert_allclose(x_BCHW.numpy(), np.repeat(means, 3, 1), atol=1e-6)


def test_larger_phantoms_are_taken_as_they_are(roots, tmp_path):
    place, dataset = Workplace(tmp_path, roots, "cpu", 1, os.getpid()), Phantom(size=20, train=18).load(roots)
    at_hand = material(place, Resnet9(width=4).make(1, 20, 3, 0).eval(), dataset, 0)
    x_BCHW = at_hand.images(*Int8(num_calibration=5).looks)
    assert torch.equal(x_BCHW, at_hand.images(*Int8(num_calibration=5, calibration="phantom").looks))
    np.testing.assert_array_equal(x_BCHW.numpy(), Phantom(size=20, train=16).load(roots).train.x(slice(0, 5)).numpy())


SHIPPED = (
    PRIVATE.replace("rounds = 3", "rounds = 1")
    + """
[[compressions]]
kind = "none"
[[compressions]]
kind = "int8"
num_calibration = 16
[[compressions]]
kind = "int8"
calibration = "train"
num_calibration = 16
[[evaluations]]
kind = "clean"
"""
)


def test_the_guarantee_of_what_ships_stands_in_its_file(roots, tmp_path):
    plan, said = plan_of(write_study(tmp_path, SHIPPED)), []
    run_plan(plan, tmp_path / "store", roots)
    with Store(tmp_path / "store") as store:
        for cell in plan.cells:
            row, path = store.artefact(cell.key), store.files.model(cell.key)
            assert row is not None and row.file_bytes == path.stat().st_size
            props = {prop.key: prop.value for prop in onnx.load(path).metadata_props}
            assert props.keys() == {"trilemma.key", "trilemma.guarantee", "trilemma.guarantee_in_words"}
            assert props["trilemma.key"] == cell.key
            said.append(Guarantee.model_validate_json(props["trilemma.guarantee"]))
            assert said[-1] == row.guarantee
            assert props["trilemma.guarantee_in_words"] == row.guarantee.in_words()
    kept, public, void = said
    assert kept == public and kept.epsilon is not None and not kept.void
    assert void.epsilon is None and len(void.void) == 1 and void.epsilon_by_client == kept.epsilon_by_client


STANDARDISED = (
    PRIVATE.replace("rounds = 3", "rounds = 1").replace("width = 4", 'width = 4, norm = "weight"')
    + """
[[compressions]]
kind = "none"
[[compressions]]
kind = "prune"
sparsity = 0.75
[[compressions]]
kind = "int8"
num_calibration = 16
"""
)


def test_standardised_weights_carry_a_guarantee_and_their_twins_are_their_files(roots, tmp_path):
    plan = plan_of(write_study(tmp_path, STANDARDISED))
    run_plan(plan, tmp_path / "store", roots)
    place = Workplace(tmp_path / "store", roots, "cpu", 1, os.getpid())
    x_BCHW = place.dataset(plan.trainings[0].spec.data).test.x()
    with Store(tmp_path / "store") as store:
        rows = [store.artefact(cell.key) for cell in plan.cells]
    assert [row.guarantee.epsilon is not None and not row.guarantee.void for row in rows] == [True] * 3
    assert rows[0].sparsity == 0 and rows[1].sparsity == pytest.approx(0.75, abs=1e-3)
    for cell in plan.cells:
        model = read_model(store.files.model(cell.key))
        with torch.no_grad():
            twin_BK = place.twin(cell)(x_BCHW)
        tolerance = 0.05 if cell.compression.kind == "int8" else 1e-5
        assert (Session(model).predict(x_BCHW) - twin_BK).abs().max() < tolerance
        kinds = {node.op_type for node in onnx.load_from_string(model).graph.node}
        assert "Conv" in kinds and not kinds & {"InstanceNormalization", "ReduceSum", "Sqrt", "Not"}
