"""The files beside the database: weights and models, each whole or not there, and nothing in them is ever unpickled."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from trilemma.atomic import atomic_write
from trilemma.compression.packing import is_packed, unpack
from trilemma.compression.session import Session
from trilemma.errors import Failure


class StoreFiles:
    """Paths and contents of a store's files.

    Args:
        folder: The store's folder.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def weights(self, run_key: str) -> Path:
        """Returns where a training's weights are."""
        return self.folder / "weights" / f"{_name(run_key)}.safetensors"

    def checkpoint(self, run_key: str) -> Path:
        """Returns where an unfinished training's last state is."""
        return self.folder / "checkpoints" / f"{_name(run_key)}.safetensors"

    def teacher(self, run_key: str) -> Path:
        """Returns where the last state of an unfinished training's teacher is, while it learns and when it teaches."""
        return self.folder / "checkpoints" / f"{_name(run_key)}.teacher.safetensors"

    def progress(self, run_key: str) -> Path:
        """Returns where a training tells how many rounds have ended."""
        return self.folder / "checkpoints" / f"{_name(run_key)}.rounds"

    def model(self, artefact_key: str) -> Path:
        """Returns where an artefact's ONNX file is: what ships."""
        return self.folder / "artefacts" / f"{_name(artefact_key)}.onnx"

    def twin(self, artefact_key: str) -> Path:
        """Returns where the weights of an artefact's differentiable twin are."""
        return self.folder / "artefacts" / f"{_name(artefact_key)}.safetensors"

    def log(self, key: str) -> Path:
        """Returns where the traceback of a failed job goes."""
        return self.folder / "logs" / f"{_name(key)}.txt"

    def discard_checkpoint(self, run_key: str) -> None:
        """Removes what only an unfinished training needs."""
        self.checkpoint(run_key).unlink(missing_ok=True)
        self.teacher(run_key).unlink(missing_ok=True)
        self.progress(run_key).unlink(missing_ok=True)

    def remove_partial(self) -> None:
        """Removes what killed processes left of files that they were writing; only the store's one writer may ask."""
        for path in self.folder.glob("*/.*.part"):
            path.unlink(missing_ok=True)

    def reports(self) -> Path:
        """Returns the folder of reports and exports."""
        return self.folder / "reports"


def _name(key: str) -> str:
    return key.replace(":", "-")


def save_tensors(path: Path, tensors: dict[str, Tensor], texts: dict[str, str] | None = None) -> None:
    """Writes named tensors and texts as a safetensors file, atomically."""
    atomic_write(path, save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, texts))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns what `save_tensors` wrote.

    Raises:
        Failure: If the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise lost(path, str(error)) from error


def load_texts(path: Path) -> dict[str, str]:
    """Returns the texts of what `save_tensors` wrote, without its tensors.

    Raises:
        Failure: If the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise lost(path, str(error)) from error


def open_model(path: Path, threads: int) -> Session:
    """Returns a session on an artefact's ONNX file.

    Raises:
        Failure: If the file is missing or damaged.
    """
    try:
        return Session(read_model(path), threads)
    except Failure as error:
        if error.where == str(path):
            raise
        raise lost(path, error.problem) from error


def read_model(path: Path) -> bytes:
    """Returns an artefact's ONNX bytes; those of a sparse one are packed in its file.

    Raises:
        Failure: If the file is missing or damaged.
    """
    try:
        found = path.read_bytes()
        return unpack(found) if is_packed(found) else found
    except (OSError, ValueError) as error:
        raise lost(path, str(error)) from error


def lost(path: Path, why: str) -> Failure:
    """Returns the failure that says that a file of the store is missing or damaged."""
    problem = f"cannot be read ({why})" if path.exists() else "is missing"
    return Failure(str(path), problem, "Put the file back from a copy, or name another folder with --store")
