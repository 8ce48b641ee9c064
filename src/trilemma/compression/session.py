"""ONNX Runtime on a CPU: the accuracy and the latency of an exported file, and the answers of one that ships."""

import time
from typing import NamedTuple

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from trilemma.errors import Failure

onnxruntime.set_default_logger_severity(4)  # only what ends the process; errors arrive as exceptions
onnxruntime.disable_telemetry_events()

_WARM_UP = 3


class Latency(NamedTuple):
    """Wall time of one call, in seconds: median and quartiles over `repeats` calls."""

    low: float
    median: float
    high: float
    repeats: int


class Session:
    """A loaded ONNX model.

    Args:
        onnx_bytes: The file's bytes; a graph from "image" (B, C, H, W) to "logits" (B, K).
        threads: Threads that one call may use.

    Raises:
        Failure: Where the bytes are no model that ONNX Runtime can run, or not one of ours.
    """

    def __init__(self, onnx_bytes: bytes, threads: int = 1):
        self._session = _loaded(onnx_bytes, threads)
        inputs = {value.name: value.shape for value in self._session.get_inputs()}
        outputs = [value.name for value in self._session.get_outputs()]
        if list(inputs) != ["image"] or outputs != ["logits"]:
            found = f"it takes {list(inputs)} and returns {outputs}, not 'image' and 'logits'"
            raise Failure("model file", found, _REMEDY)
        #: C, H and W of an image.
        self.image_shape: tuple[int, int, int] = tuple(inputs["image"][1:])

    def predict(self, x_BCHW: Tensor, batch_size: int = 64) -> Tensor:
        """Returns logits (B, K), float32, of images in [0, 1]; they are computed `batch_size` at a time.

        Raises:
            Failure: Where the model cannot be run on them.
            ValueError: For images of another shape than the model's.
        """
        if tuple(x_BCHW.shape[1:]) != self.image_shape:
            raise ValueError(f"The model takes images {self.image_shape}, not {tuple(x_BCHW.shape[1:])}.")
        if len(x_BCHW) == 0:
            return torch.zeros(0, self.num_classes)
        x = x_BCHW.detach().to("cpu", torch.float32).contiguous().numpy()
        parts = [self._run(x[start : start + batch_size]) for start in range(0, len(x), batch_size)]
        return torch.from_numpy(np.concatenate(parts))

    @property
    def num_classes(self) -> int:
        """Returns K."""
        return int(self._session.get_outputs()[0].shape[1])

    def latency_seconds(self, batch_size: int, repeats: int = 30) -> Latency:
        """Returns the time of one call on a batch of mid-grey images, after a warm-up."""
        x = np.full((batch_size, *self.image_shape), 0.5, dtype=np.float32)
        for _ in range(_WARM_UP):
            self._run(x)
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            self._run(x)
            seconds.append(time.perf_counter() - start)
        low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75))
        return Latency(float(low), float(median), float(high), repeats)

    def _run(self, x: np.ndarray) -> np.ndarray:
        try:
            logits = np.asarray(self._session.run(["logits"], {"image": x})[0])
        except Exception as error:  # as in `_loaded`
            raise Failure("model file", f"it cannot be run ({_first_line(error)})", _REMEDY) from error
        if len(logits) != len(x):  # a network that computes with the batch size as a number keeps the exporter's
            problem = f"it gives {len(logits)} answers to {len(x)} images"
            raise Failure("model file", problem, "write the network so that its batch size stays free (x.shape[0])")
        return logits


class ShippedSession:
    """A loaded model with its preprocessing inside, as `shipping.ship_onnx` makes it.

    Args:
        onnx_bytes: The file's bytes.

    Raises:
        Failure: Where ONNX Runtime cannot run them.
    """

    def __init__(self, onnx_bytes: bytes):
        self._session = _loaded(onnx_bytes, threads=1)

    def answers(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns logits and probabilities, both (N, K) float32.

        Args:
            images: Decoded files of one size, uint8 (N, H, W) or (N, H, W, C) as the model takes them.

        Raises:
            Failure: Where the model cannot be run on them.
        """
        try:
            logits, probabilities = self._session.run(["logits", "probabilities"], {"image": images})
        except Exception as error:  # as in `_loaded`
            raise Failure("model file", f"it cannot be run ({_first_line(error)})", _REMEDY) from error
        return np.asarray(logits), np.asarray(probabilities)


def _loaded(onnx_bytes: bytes, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(onnx_bytes, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base class but this one
        raise Failure("model file", f"it cannot be loaded ({_first_line(error)})", _REMEDY) from error


_REMEDY = "export the model again with this version of trilemma and onnxruntime"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
