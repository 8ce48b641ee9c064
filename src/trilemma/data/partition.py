"""Which hospital holds which record: the four ways to divide a data set.

A patient's records stay together: what is assigned is the unit, a patient or one record without a known patient.
Test records are assigned by the same rule, so that every client has test records like its own training records.
"""

from collections.abc import Sequence

import numpy as np

from trilemma.data.records import Dataset, Partition, Records
from trilemma.data.split import unit_classes
from trilemma.errors import UserError
from trilemma.randomness import numpy_generator


def iid(dataset: Dataset, num_clients: int, seed: int) -> Partition:
    """Returns units dealt at random, records as evenly as whole units allow.

    Raises:
        UserError: A client would have no data.
    """
    train_N = _deal(dataset.train, num_clients, numpy_generator(seed, "partition", "iid", "train"))
    test_N = _deal(dataset.test, num_clients, numpy_generator(seed, "partition", "iid", "test"))
    return _partition(_numbered(num_clients), train_N, test_N, "use fewer clients")


def dirichlet(dataset: Dataset, num_clients: int, alpha: float, seed: int) -> Partition:
    """Returns label skew: each class is divided by shares drawn from a Dirichlet distribution (Hsu et al. 2019).

    The test records of a class are divided by the shares that the clients really have of its training records.

    Args:
        dataset: What to divide.
        num_clients: Number of clients.
        alpha: Concentration: 0.1 gives clients with hardly more than one class, 100 nearly equal ones.
        seed: Of the draw.

    Raises:
        UserError: A client would have no data.
    """
    rng = numpy_generator(seed, "partition", "dirichlet", "train")
    shares_CK = rng.dirichlet(np.full(num_clients, alpha), size=len(dataset.classes))
    train_N = _cut_by_class(dataset.train, shares_CK, rng)
    counts_CK = np.zeros_like(shares_CK)
    np.add.at(counts_CK, (dataset.train.labels_N, train_N), 1)
    achieved_CK = counts_CK / counts_CK.sum(1, keepdims=True)
    test_N = _cut_by_class(dataset.test, achieved_CK, numpy_generator(seed, "partition", "dirichlet", "test"))
    return _partition(_numbered(num_clients), train_N, test_N, "use a larger alpha, fewer clients or another seed")


def quantity(
    dataset: Dataset, num_clients: int, alpha: float | None, sizes: Sequence[float] | None, seed: int
) -> Partition:
    """Returns clients of unlike size: units dealt at random by shares that are given or drawn.

    Args:
        dataset: What to divide.
        num_clients: Number of clients.
        alpha: Concentration of the Dirichlet distribution that the shares are drawn from; None if `sizes` is given.
        sizes: Relative sizes of the clients, any positive numbers; None if `alpha` is given.
        seed: Of the draw.

    Raises:
        UserError: A client would have no data.
    """
    rng = numpy_generator(seed, "partition", "quantity", "train")
    if sizes is not None:
        shares_K = np.asarray(sizes, dtype=np.float64) / np.sum(sizes)
    else:
        shares_K = rng.dirichlet(np.full(num_clients, alpha))
    train_N = _cut(dataset.train.units(), shares_K, rng)
    test_N = _cut(dataset.test.units(), shares_K, numpy_generator(seed, "partition", "quantity", "test"))
    return _partition(_numbered(num_clients), train_N, test_N, "use a larger alpha, more even sizes or fewer clients")


def by_site(dataset: Dataset, num_clients: int) -> Partition:
    """Returns one client per site; a patient seen at several sites belongs to the one with most of its records.

    Raises:
        UserError: The data set has another number of sites than `num_clients`, or a site has no training records.
    """
    if len(dataset.sites) != num_clients:
        raise UserError(
            "partition.by_site",
            f"{num_clients} clients were asked for, but {dataset.name} has {_counted(len(dataset.sites), 'site')}: "
            f"{_shortened(dataset.sites)}",
            f"Set num_clients = {len(dataset.sites)}, or divide the data another way",
        )
    train_N, test_N = (_majority_site(records) for records in (dataset.train, dataset.test))
    return _partition(dataset.sites, train_N, test_N, "leave the site out, or give it training records")


def _deal(records: Records, num_clients: int, rng: np.random.Generator) -> np.ndarray:
    """Returns the client of each record: units in random order, each to the client with fewest records so far."""
    units_U, inverse_N, sizes_U = np.unique(records.units(), return_inverse=True, return_counts=True)
    client_U = np.empty(len(units_U), dtype=np.int64)
    held_K = np.zeros(num_clients, dtype=np.int64)
    for unit in rng.permutation(len(units_U)):
        client_U[unit] = held_K.argmin()
        held_K[client_U[unit]] += sizes_U[unit]
    return client_U[inverse_N]


def _cut(units_N: np.ndarray, shares_K: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns the client of each record: units in random order, cut where the cumulated shares are reached."""
    units_U, inverse_N, sizes_U = np.unique(units_N, return_inverse=True, return_counts=True)
    order = rng.permutation(len(units_U))
    middles = np.cumsum(sizes_U[order]) - sizes_U[order] / 2
    ends_K = np.cumsum(shares_K)[:-1] * sizes_U.sum()
    client_U = np.empty(len(units_U), dtype=np.int64)
    client_U[order] = np.searchsorted(ends_K, middles, side="right")
    return client_U[inverse_N]


def _cut_by_class(records: Records, shares_CK: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    units_N = records.units()
    units_U, _, classes_U = unit_classes(units_N, records.labels_N)
    client_N = np.empty(len(records), dtype=np.int64)
    for label, shares_K in enumerate(shares_CK):
        members_N = np.isin(units_N, units_U[classes_U == label])
        client_N[members_N] = _cut(units_N[members_N], shares_K, rng)
    return client_N


def _majority_site(records: Records) -> np.ndarray:
    units_N = records.units()
    units_U, _, sites_U = unit_classes(units_N, records.sites_N)
    return sites_U[np.searchsorted(units_U, units_N)]


def _partition(clients: Sequence[str], train_N: np.ndarray, test_N: np.ndarray, remedy: str) -> Partition:
    train = tuple(np.flatnonzero(train_N == client) for client in range(len(clients)))
    for name, positions in zip(clients, train, strict=True):
        if not len(positions):
            raise UserError("partition", f"{name} would have no training data", remedy[0].upper() + remedy[1:])
    return Partition(tuple(clients), train, test_N)


def _numbered(num_clients: int) -> list[str]:
    return [f"client {number}" for number in range(1, num_clients + 1)]


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (" ..." if len(names) > 10 else "")
