"""Which records and which clients a threat touches."""

import numpy as np
import torch


def choose_records(num_records: int, share: float, generator: torch.Generator) -> np.ndarray:
    """Returns round(share * num_records) distinct positions, ascending, drawn uniformly."""
    return choose_among(np.arange(num_records), share, generator)


def choose_among(index_N: np.ndarray, share: float, generator: torch.Generator) -> np.ndarray:
    """Returns round(share * N) of some positions, ascending, drawn uniformly."""
    order = torch.randperm(len(index_N), generator=generator, device=generator.device)
    return np.sort(index_N[order[: round(share * len(index_N))].cpu().numpy()])


def choose_clients(num_malicious: int | None, clients: tuple[int, ...] | None, num_clients: int) -> tuple[int, ...]:
    """Returns the malicious clients' indices: those named, or the last `num_malicious` ones.

    Raises:
        ValueError: If they are more than there are clients, or one of them does not exist.
    """
    if clients is not None:
        if max(clients) >= num_clients:
            raise ValueError(
                f"malicious client {max(clients)} does not exist: there are {num_clients} clients, numbered from 0"
            )
        return tuple(sorted(clients))
    wanted = num_malicious or 0
    if wanted > num_clients:
        raise ValueError(f"num_malicious = {wanted} is more than the {num_clients} clients there are")
    return tuple(range(num_clients - wanted, num_clients))


def check_choice(num_malicious: int | None, clients: tuple[int, ...] | None) -> None:
    """Raises ValueError unless exactly one of the two ways to name malicious clients is used, and used well."""
    if (num_malicious is None) == (clients is None):
        raise ValueError("give exactly one of num_malicious and clients")
    if clients is not None and (not clients or len(set(clients)) < len(clients) or min(clients) < 0):
        raise ValueError(f"clients = {list(clients)} must be one or more different indices, counted from 0")
