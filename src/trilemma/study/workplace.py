"""Where jobs run: the store's files, the data's roots, the device, the threads; and what they load there."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from trilemma.data.records import Dataset
from trilemma.data.roots import DataRoots
from trilemma.data.specs import DataSpec
from trilemma.errors import UserError
from trilemma.federation.specs import TrainSpec
from trilemma.models.classifier import Classifier
from trilemma.models.vector import set_buffers, set_params
from trilemma.study.files import StoreFiles, load_tensors
from trilemma.study.plan import Cell

#: Data sets that this process has loaded, by the key of their spec and the root: a worker meets the same one often.
_LOADED: dict[tuple[str, str], Dataset] = {}


@dataclass(frozen=True)
class Books:
    """Where the hospitals' budget books are, and in whose name they are charged.

    Attributes:
        folder: One file for each hospital.
        study: The study's name.
    """

    folder: Path
    study: str


@dataclass(frozen=True)
class Workplace:
    """What every job of a study shares; it travels to worker processes.

    Attributes:
        folder: The store's folder.
        roots: Where data are read and cached.
        device: "cpu" or "cuda".
        threads: Torch threads of each job; they may change the last bits of a result, so the number is recorded.
        owner: Process id of the study's process: a worker that has lost it stops.
        books: The hospitals' budget books, or None where none are kept.
    """

    folder: Path
    roots: DataRoots
    device: str
    threads: int
    owner: int
    books: Books | None = None

    @property
    def files(self) -> StoreFiles:
        """Returns the store's files."""
        return StoreFiles(self.folder)

    @property
    def torch_device(self) -> torch.device:
        """Returns the device."""
        return torch.device(self.device)

    def enter(self) -> None:
        """Sets this process up for a job: threads, the same sums on every run, and float32 that is float32."""
        torch.set_num_threads(self.threads)
        if self.device == "cuda":
            # Read when cuBLAS starts, so before the first product on the GPU; without it matrix products may differ
            # from run to run (https://docs.nvidia.com/cuda/cublas/#results-reproducibility).
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(self.device == "cuda", warn_only=True)
        torch.backends.cudnn.benchmark = False
        # cuDNN's default, and cuBLAS's where the environment asks for it, round factors to 10 bits
        # (https://docs.pytorch.org/docs/stable/notes/cuda.html): norms and clip would be off by a thousandth.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

    def abandoned(self) -> bool:
        """Returns whether the study's process is gone, so that nobody would take the result."""
        return os.getpid() != self.owner and os.getppid() != self.owner

    def dataset(self, spec: DataSpec) -> Dataset:
        """Returns a data set, loaded once for each process."""
        name = (spec.key, str(self.roots.data))
        if name not in _LOADED:
            _LOADED.clear()  # a study uses few, but two large ones need not be held at once
            _LOADED[name] = spec.load(self.roots)
        return _LOADED[name]

    def trained(self, spec: TrainSpec, run_key: str) -> Classifier:
        """Returns a finished training's model, in evaluation mode on the device."""
        dataset = self.dataset(spec.data)
        classifier = spec.model.make(dataset.channels, dataset.image_size, len(dataset.classes), spec.seed)
        tensors, _ = load_tensors(self.files.weights(run_key))
        set_params(classifier, tensors["params"])
        set_buffers(classifier, tensors["buffers"])
        return classifier.to(self.torch_device).eval()

    def twin(self, cell: Cell) -> Classifier:
        """Returns an artefact's twin: the same function as its file, with input gradients, on the device."""
        tensors, _ = load_tensors(self.files.twin(cell.key))
        dataset, trained = self.dataset(cell.training.spec.data), self.trained(cell.training.spec, cell.training.key)
        shape = (dataset.channels, dataset.image_size, dataset.image_size)
        skeleton = cell.compression.skeleton(trained.cpu(), tensors, shape)
        skeleton.load_state_dict(tensors)
        return skeleton.to(self.torch_device).eval()


def choose_device(wanted: str) -> str:
    """Returns "cuda" or "cpu" for "auto", "cuda" or "cpu".

    Raises:
        UserError: If CUDA is asked for and not there.
    """
    if wanted not in ("auto", "cpu", "cuda"):
        raise UserError("--device", f"'{wanted}' is unknown", "Use auto, cpu or cuda")
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UserError("--device", "there is no CUDA device here", "Use --device cpu, or install torch for CUDA")
    return "cuda" if available and wanted != "cpu" else "cpu"
