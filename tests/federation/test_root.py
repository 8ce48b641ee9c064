"""The server's own images: what they are drawn from, what they are refused for, and that FLTrust uses them."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from helpers.small_problem import stripes
from helpers.tiny_federation import CPU, DP, tiny_dataset, tiny_federation, tiny_spec, trained_state
from trilemma.errors import UserError
from trilemma.federation.root import root_images, root_spec, root_update
from trilemma.federation.training import initial_state, prepare

RULE = {"kind": "fltrust", "num_images": 20}
PUBLIC = {**RULE, "data": {"kind": "phantom", "size": 16, "classes": 3}}


def public_dataset():
    return replace(tiny_dataset(), name="public", train=stripes(60, num_classes=3, size=8, seed=9), fingerprint="p")


def test_the_images_are_drawn_by_the_seed_from_the_validation_split_or_from_public_ones():
    dataset, public = tiny_dataset(), public_dataset()
    own = root_images(tiny_spec(aggregation=RULE), dataset, None)
    again = root_images(tiny_spec(aggregation=RULE), dataset, None)
    other = root_images(tiny_spec(aggregation=RULE, seed=1), dataset, None)
    assert len(own) == 20 and len(set(own.names_N.tolist())) == 20
    assert own.names_N.tolist() == again.names_N.tolist() != other.names_N.tolist()
    assert set(own.names_N.tolist()) <= set(dataset.val.names_N.tolist())
    foreign = root_images(tiny_spec(aggregation=PUBLIC), dataset, public)
    assert set(foreign.names_N.tolist()) <= set(public.train.names_N.tolist())
    assert root_images(tiny_spec(), dataset, None) is None
    assert root_images(tiny_spec(aggregation=PUBLIC), dataset, None) is None  # not loaded
    assert root_spec(tiny_spec(aggregation=RULE, algorithm={"kind": "local_only"})) is None


def test_unfit_images_are_refused_by_name():
    dataset, public = tiny_dataset(), public_dataset()
    with pytest.raises(UserError, match="40 is more than the 32 images of the validation split of stripes"):
        root_images(tiny_spec(aggregation={**RULE, "num_images": 40}), dataset, None)
    spec = tiny_spec(aggregation=PUBLIC)
    with pytest.raises(UserError, match="have 2 classes"):
        root_images(spec, dataset, replace(public, classes=("a", "b")))
    with pytest.raises(UserError, match="train images of stripes too, pixel for pixel"):
        root_images(spec, dataset, replace(public, train=dataset.train))
    with pytest.raises(UserError, match="16 pixels a side"):
        root_images(spec, dataset, replace(public, train=stripes(60, num_classes=3, size=16, seed=9)))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"privacy": DP}, "are private"),
        ({"data": {"kind": "phantom", "evaluate_on": "val"}}, "measures on"),
    ],
)
def test_validation_images_are_refused_where_they_may_not_be_trained_on(fields, said):
    with pytest.raises(ValidationError, match=said):
        tiny_spec(aggregation=RULE, **fields)
    tiny_spec(aggregation=PUBLIC, **fields)


def test_a_rule_with_a_root_set_asks_for_its_images():
    federation = prepare(tiny_spec(aggregation=PUBLIC), tiny_dataset(), CPU)
    with pytest.raises(ValueError, match="needs its images"):
        trained_state(federation, 1)
    with_them = prepare(tiny_spec(aggregation=PUBLIC), tiny_dataset(), CPU, root=public_dataset())
    assert trained_state(with_them).params_P.isfinite().all()


def test_the_servers_update_is_what_a_client_with_its_images_would_send():
    federation = tiny_federation(aggregation=RULE)
    state = initial_state(federation)
    root_P = root_update(federation.spec, federation.root, federation.classifier, state, 1)
    assert float(root_P.norm()) > 0
    again = root_update(federation.spec, federation.root, federation.classifier, state, 1)
    assert torch.equal(root_P, again)
    assert root_update(tiny_spec(), None, federation.classifier, state, 1) is None


def test_updates_that_point_away_from_the_servers_count_for_nothing():
    fields = {"partition": {"kind": "iid", "num_clients": 5}, "rounds": 1, "aggregation": RULE}
    fields["local"] = {"batch_size": 16, "steps": 4}
    threat = {"kind": "inner_product", "clients": [3, 4], "scale": 8.0}
    state = initial_state(tiny_federation(**fields))
    honest, attacked = (
        trained_state(tiny_federation(**fields, **given), 1).params_P - state.params_P
        for given in ({}, {"threat": threat})
    )
    mean = trained_state(tiny_federation(**{**fields, "aggregation": {"kind": "mean"}}, threat=threat), 1).params_P
    assert float(attacked @ honest) > 0.8 * float(attacked.norm() * honest.norm())
    assert float((mean - state.params_P) @ honest) < 0
