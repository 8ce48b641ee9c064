"""Partitions: whole patients, every record once, the same again, and the rule that was asked for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from trilemma.data.assemble import assemble
from trilemma.data.records import Dataset, Records
from trilemma.data.specs import BySite, Dirichlet, Iid, PartitionSpec, Quantity
from trilemma.data.summary import client_rows
from trilemma.errors import UserError


def made(
    num: int, patients: list[int], rng: np.random.Generator, first_patient: int, sites: int, classes: int
) -> Records:
    patients_N = np.array([p + first_patient if p >= 0 else -1 for p in patients], dtype=np.int64)
    labels_N = rng.integers(classes, size=num)
    labels_N[:classes] = np.arange(classes)
    images = rng.integers(0, 256, (num, 1, 8, 8)).astype(np.uint8)
    return Records(images, labels_N, patients_N, rng.integers(sites, size=num), np.arange(num).astype(str))


def dataset(num: int = 90, num_patients: int = 40, sites: int = 2, classes: int = 3, seed: int = 0) -> Dataset:
    """Random labels, some unknown patients (-1), patients with records at several sites and of several classes."""
    rng = np.random.default_rng(seed)
    splits = {}
    for offset, split in enumerate(("train", "val", "test")):
        patients = rng.integers(-1, num_patients, size=num).tolist()
        splits[split] = made(num, patients, rng, offset * 1000, sites, classes)
    names = [f"site {i}" for i in range(sites)]
    return assemble("made up", [f"class {i}" for i in range(classes)], names, splits, "nowhere")


SPECS = st.one_of(
    st.builds(Iid, num_clients=st.integers(1, 6)),
    st.builds(Dirichlet, num_clients=st.integers(1, 4), alpha=st.floats(0.5, 50)),
    st.builds(Quantity, num_clients=st.integers(1, 4), alpha=st.floats(1, 50)),
    st.integers(1, 5).flatmap(
        lambda n: st.builds(
            Quantity, num_clients=st.just(n), sizes=st.tuples(*[st.floats(0.5, 5, allow_subnormal=False)] * n)
        )
    ),
    st.builds(BySite, num_clients=st.just(2)),
)


@settings(deadline=None, max_examples=60)
@given(spec=SPECS, seed=st.integers(0, 2**31), data_seed=st.integers(0, 5), num_patients=st.integers(8, 80))
def test_partition_properties(spec, seed, data_seed, num_patients):
    data = dataset(num_patients=num_patients, seed=data_seed)
    try:
        partition = spec.make()(data, seed)
    except UserError as error:  # a client without data is refused, never returned
        assert "no training data" in error.problem
        return
    assert len(partition.clients) == len(partition.train) == spec.num_clients
    assert len(set(partition.clients)) == spec.num_clients
    np.testing.assert_array_equal(np.sort(np.concatenate(partition.train)), np.arange(len(data.train)))
    for positions in partition.train:
        assert len(positions) and (np.diff(positions) > 0).all()
    held_by = np.empty(len(data.train), dtype=int)
    for client, positions in enumerate(partition.train):
        held_by[positions] = client
    for records, clients in ((data.train, held_by), (data.test, partition.test_client_N)):
        for patient in np.unique(records.patients_N[records.patients_N >= 0]):
            assert len(set(clients[records.patients_N == patient])) == 1
    assert partition.test_client_N.shape == (len(data.test),)
    assert ((partition.test_client_N >= 0) & (partition.test_client_N < spec.num_clients)).all()
    again = spec.make()(data, seed)
    assert all((a == b).all() for a, b in zip(partition.train, again.train, strict=True))
    np.testing.assert_array_equal(partition.test_client_N, again.test_client_N)


def sizes(partition) -> list[int]:
    return [len(positions) for positions in partition.train]


def lone(num: int = 600, classes: int = 2, sites: int = 1) -> Dataset:
    return dataset(num=num, num_patients=0, classes=classes, sites=sites)  # no patient is known


def test_iid_is_even_and_follows_the_seed():
    data = lone(601)
    first, second = Iid(num_clients=3).make()(data, 0), Iid(num_clients=3).make()(data, 1)
    assert sorted(sizes(first)) == [200, 200, 201]
    assert np.bincount(first.test_client_N).max() - np.bincount(first.test_client_N).min() <= 1
    assert any(a.tolist() != b.tolist() for a, b in zip(first.train, second.train, strict=True))


def shares(data: Dataset, partition, split: str) -> np.ndarray:
    """Returns the share of each class (rows) that each client (columns) holds."""
    records = getattr(data, split)
    counts = np.zeros((len(data.classes), len(partition.clients)))
    if split == "train":
        for client, positions in enumerate(partition.train):
            np.add.at(counts[:, client], records.labels_N[positions], 1)
    else:
        np.add.at(counts, (records.labels_N, partition.test_client_N), 1)
    return counts / counts.sum(1, keepdims=True)


def test_dirichlet_skews_labels_and_test_follows_train():
    data = lone(2000)
    skewed, even = (Dirichlet(num_clients=3, alpha=a).make()(data, 3) for a in (0.3, 1000.0))
    assert np.abs(shares(data, skewed, "train") - 1 / 3).max() > 0.2
    assert np.abs(shares(data, even, "train") - 1 / 3).max() < 0.06
    assert np.abs(shares(data, skewed, "train") - shares(data, skewed, "test")).max() < 0.01


def test_quantity_holds_the_sizes_in_train_and_test():
    data = lone(600)
    partition = Quantity(num_clients=3, sizes=(3, 2, 1)).make()(data, 0)
    assert sizes(partition) == [300, 200, 100]
    assert np.bincount(partition.test_client_N).tolist() == [300, 200, 100]


def test_by_site_is_the_site_where_patients_stay_at_one():
    data = lone(300, sites=3)
    partition = BySite(num_clients=3).make()(data, 0)
    assert partition.clients == ("site 0", "site 1", "site 2")
    for site, positions in enumerate(partition.train):
        assert (data.train.sites_N[positions] == site).all()
    np.testing.assert_array_equal(partition.test_client_N, data.test.sites_N)


def test_by_site_names_the_sites_when_their_number_differs():
    with pytest.raises(UserError, match=r"2 clients were asked for.*3 sites: site 0, site 1, site 2"):
        BySite(num_clients=2).make()(lone(300, sites=3), 0)


def test_a_client_without_data_is_named():
    with pytest.raises(UserError, match="client 91 would have no training data"):
        Iid(num_clients=91).make()(lone(90), 0)


def test_client_rows_count_and_admit_unknown_patients():
    data = dataset(num_patients=30)
    rows = client_rows(data, Iid(num_clients=2).make()(data, 0))
    assert sum(row["records"] for row in rows) == 90
    assert all(sum(row["classes"].values()) == row["records"] for row in rows)
    assert list(rows[0]["classes"]) == ["class 0", "class 1", "class 2"]
    assert rows[0]["patients"] is None  # some records name no patient
    whole = Dataset(**{**data.__dict__, "train": data.train.subset(np.flatnonzero(data.train.patients_N >= 0))})
    rows = client_rows(whole, Iid(num_clients=2).make()(whole, 0))
    assert sum(row["patients"] for row in rows) == len(np.unique(whole.train.patients_N))


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "iid", "num_clients": 0},
        {"kind": "dirichlet", "num_clients": 3, "alpha": 0},
        {"kind": "quantity", "num_clients": 3},
        {"kind": "quantity", "num_clients": 3, "alpha": 1, "sizes": [1, 1, 1]},
        {"kind": "quantity", "num_clients": 3, "sizes": [1, 1]},
        {"kind": "quantity", "num_clients": 2, "sizes": [1, -1]},
        {"kind": "quantity", "num_clients": 2, "sizes": [1e308, 1e308]},  # their sum overflows
        {"kind": "quantity", "num_clients": 2, "alpha": 1e308},
        {"kind": "dirichlet", "num_clients": 2, "alpha": 1e308},
        {"kind": "by_sight", "num_clients": 2},
        {"kind": "iid", "num_clients": 2, "seed": 1},
    ],
)
def test_impossible_partitions_are_refused(wrong):
    with pytest.raises(ValidationError):
        TypeAdapter(PartitionSpec).validate_python(wrong)


def test_labels_are_short_and_distinct():
    specs = [
        Iid(num_clients=3),
        Dirichlet(num_clients=3, alpha=0.5),
        Quantity(num_clients=2, sizes=(2, 1)),
        Quantity(num_clients=2, alpha=1),
        BySite(num_clients=1),
    ]
    labels = [spec.label for spec in specs]
    assert labels == [
        "iid, 3 clients",
        "Dirichlet 0.5, 3 clients",
        "sizes 2:1",
        "quantity 1, 2 clients",
        "by site, 1 client",
    ]
