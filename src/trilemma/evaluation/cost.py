"""What it costs to ship and to run a model."""

from trilemma.compression.session import Session
from trilemma.evaluation.measurement import Measurement

BATCH_SIZES = (1, 32)


def cost_measurements(
    session: Session, file_bytes: int, num_multiply_adds: int, repeats: int = 30
) -> list[Measurement]:
    """Returns the file's size, what one image costs to compute, and the time of one call on 1 and on 32 images.

    The time's value is the median over `repeats` calls and its low and high are the quartiles, not an interval: they
    tell how restless the machine was.

    Args:
        session: The shipped model, on as many threads as it would have.
        file_bytes: Size of its file.
        num_multiply_adds: Those of its network for one image; see `compression.multiply_adds`.
        repeats: Timed calls per batch size, after a warm-up.
    """
    found = [
        Measurement("file_bytes", float(file_bytes), n=1, unit="bytes"),
        Measurement("multiply_adds", float(num_multiply_adds), n=1, unit="multiply-adds"),
    ]
    for batch_size in BATCH_SIZES:
        time = session.latency_seconds(batch_size, repeats)
        name = f"latency_batch{batch_size}_seconds"
        found.append(Measurement(name, time.median, time.low, time.high, time.repeats, "seconds"))
    return found
