"""Which coordinates a sparse update has: ascending positions as the gaps between them, one byte for most."""

import numpy as np

_ESCAPE = 255


def write_positions(positions_K: np.ndarray) -> bytes:
    """Returns ascending, distinct positions as bytes: each gap, less 1, as a byte below 255 after as many 255s as fit.

    Args:
        positions_K: int64, at least 0.
    """
    gaps_K = np.diff(positions_K, prepend=-1) - 1
    escapes_K, rests_K = gaps_K // _ESCAPE, gaps_K % _ESCAPE
    ends_K = np.cumsum(escapes_K + 1) - 1
    written = np.full(int(ends_K[-1]) + 1 if len(ends_K) else 0, _ESCAPE, np.uint8)
    written[ends_K] = rests_K
    return written.tobytes()


def read_positions(payload: bytes, count: int, below: int) -> np.ndarray:
    """Returns the positions of some bytes, int64 (K,).

    Args:
        payload: What `write_positions` made.
        count: K.
        below: All positions are below it.

    Raises:
        ValueError: If these bytes are not that many positions below that.
    """
    written = np.frombuffer(payload, np.uint8)
    ends_K = np.flatnonzero(written != _ESCAPE)
    if len(ends_K) != count or (len(written) and written[-1] == _ESCAPE):
        raise ValueError(f"holds {len(ends_K)} positions and not {count}")
    if not count:
        return ends_K
    sums = np.cumsum(written, dtype=np.int64)[ends_K]
    positions_K = sums + np.arange(count)
    if positions_K[-1] >= below:
        raise ValueError(f"has a position {positions_K[-1]} of {below}")
    return positions_K
