"""A private step of many images is taken part by part: memory stays bounded, and the step is what it was."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers.tiny_federation import DP, tiny_dataset, tiny_federation
from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.fgsm import fgsm
from trilemma.federation import local_training
from trilemma.federation.local_training import load_model, local_train, unit_gradient_sum
from trilemma.federation.training import initial_state
from trilemma.federation.units import whole_units
from trilemma.privacy.adaptive import Adaptation
from trilemma.privacy.clipping_rules import Flat
from trilemma.privacy.plan import PrivacyPlan
from trilemma.robustness.objective import Objective
from trilemma.robustness.objectives import mean_cross_entropy
from trilemma.robustness.specs import FgsmTraining

NUM, PART, WHOLE = 150, 30, 10**6

#: Flips are drawn one number for each image, so that parts draw what the whole would.
COPIES = {"augmentation": {"flip": True, "multiplicity": 3}}
PATIENT = {**DP, "unit": "patient"}
CASES = {
    "copies": {"local": COPIES},
    "patients": {"privacy": PATIENT},
    "attacked": {"defence": {"kind": "fgsm", "norm": "l2"}},
    "all at once": {"local": COPIES, "privacy": PATIENT, "defence": {"kind": "fgsm", "norm": "l2"}},
}


def clean_and_attacked() -> Objective:
    """Returns an objective of two views that draws nothing, so that parts craft what the whole would."""

    def views(classifier, x_BCHW, y_B, draws):
        return torch.stack([x_BCHW, fgsm(classifier, x_BCHW, y_B, Budget("l2", 0.5), draws)], dim=1)

    return Objective(views, mean_cross_entropy)


class LargestImages(TorchDispatchMode):
    """Notes how many images the largest batch of them held, whoever made it."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-3:] == (1, 8, 8):
                self.most = max(self.most, tensor.numel() // 64)
        return made


def step(monkeypatch, together, changes, noise=0.0, adaptation=None):
    """Returns what one step on all images of a client gives, the most images at once, and those of each part."""
    dataset = tiny_dataset(NUM)
    patients_N = np.repeat(np.arange(NUM), np.arange(NUM) % 5 + 1)[:NUM]
    dataset = replace(dataset, train=replace(dataset.train, patients_N=patients_N))
    local = {"batch_size": 20, "steps": 1, "momentum": 0, "learning_rate": 1.0, **changes.get("local", {})}
    changes = {"privacy": DP, "partition": {"kind": "iid", "num_clients": 1}, **changes, "local": local}
    federation = tiny_federation(dataset, **changes)
    client = federation.clients[0]
    plan = PrivacyPlan(client.num_units, 0.5, 8.0, Flat(0.05), noise, adaptation)
    parts = []

    def spy(plan, classifier, loss, views, sizes_U, clip):
        parts.append(len(views[0]))
        return unit_gradient_sum(plan, classifier, loss, views, sizes_U, clip)

    state = initial_state(federation)
    load_model(federation.classifier, state.params_P, state.buffers_Q)
    with monkeypatch.context() as patch, LargestImages() as largest:
        patch.setattr(local_training, "CRAFTED_TOGETHER", together)
        patch.setattr(local_training, "unit_gradient_sum", spy)
        patch.setattr(local_training, "batches", lambda *_: iter([list(range(client.num_units))]))
        patch.setattr(FgsmTraining, "make", lambda *_: clean_and_attacked())
        result = local_train(federation.spec, replace(client, plan=plan), federation.classifier, dataset.train, 0)
    return result, largest.most, parts


def same(one, other):
    torch.testing.assert_close(one.update_P, other.update_P, rtol=1e-3, atol=1e-5)
    assert one.loss == pytest.approx(other.loss, rel=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_parts_bound_the_memory_and_change_nothing(case, monkeypatch):
    num = NUM * (3 if "local" in CASES[case] else 1)
    num_views = 2 if "defence" in CASES[case] else 1
    whole, most, one = step(monkeypatch, WHOLE, CASES[case])
    assert one == [num] and most == num * num_views
    parts, most, several = step(monkeypatch, PART, CASES[case])
    assert sum(several) == num and max(several) <= PART and most <= PART * num_views
    assert float(whole.update_P.norm()) > 0.05
    same(parts, whole)


def test_noise_is_added_once_and_not_in_every_part(monkeypatch):
    same(*(step(monkeypatch, together, {}, noise=2.0)[0] for together in (PART, WHOLE)))


def test_an_adapting_clip_moves_once_for_all_parts(monkeypatch):
    adaptation = Adaptation(quantile=0.5, learning_rate=0.2, count_noise=5.0, first_clip=0.05)
    parts, whole = (step(monkeypatch, together, {}, 1.0, adaptation)[0] for together in (PART, WHOLE))
    assert whole.clip is not None and whole.clip != 0.05
    assert parts.clip == pytest.approx(whole.clip, rel=1e-6)
    same(parts, whole)


def test_one_patient_of_more_images_than_a_part_is_clipped_as_one(monkeypatch):
    result, _, parts = step(monkeypatch, 2, {"privacy": PATIENT})  # of up to 5 images
    assert max(parts) == 5
    same(result, step(monkeypatch, WHOLE, {"privacy": PATIENT})[0])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 9), max_size=30), st.integers(1, 12))
def test_units_stay_whole_in_order_and_within_bounds(sizes, most):
    parts = [sizes[part] for part in whole_units(sizes, most)]
    assert sum(parts, []) == sizes
    assert all(parts) or parts == [[]]
    assert all(sum(part) <= most or len(part) == 1 for part in parts)
    # No part could have taken the next unit too.
    assert all(sum(part) + following[0] > most for part, following in zip(parts, parts[1:], strict=False))
