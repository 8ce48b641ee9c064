"""The one door to MONAI: its 2-D classification networks and its DICOM reader.

MONAI takes seconds to import, so it is imported when it is needed.
"""

import importlib.util
import inspect
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trilemma.errors import UserError

#: Network -> (the class that documents its further arguments, its names of: channels, classes).
_NETWORKS: dict[str, tuple[str, str, str]] = {
    **dict.fromkeys(
        ("DenseNet", "DenseNet121", "DenseNet169", "DenseNet201", "DenseNet264"),
        ("DenseNet", "in_channels", "out_channels"),
    ),
    "EfficientNetBN": ("EfficientNetBN", "in_channels", "num_classes"),
    **dict.fromkeys(
        ("ResNet", "resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet200"),
        ("ResNet", "n_input_channels", "num_classes"),
    ),
    **dict.fromkeys(
        ("SENet", "SENet154", "SEResNet50", "SEResNet101", "SEResNet152", "SEResNeXt50", "SEResNeXt101"),
        ("SENet", "in_channels", "num_classes"),
    ),
    "ViT": ("ViT", "in_channels", "num_classes"),
}


def monai_network(
    name: str, channels: int, image_size: int, num_classes: int, arguments: dict[str, Any] | None = None
) -> nn.Module:
    """Returns a 2-D classification network of MONAI, initialised from torch's global generator.

    Nothing in it works in place and EfficientNet's memory-saving Swish is exchanged for the plain one, so that
    per-record gradients and export work; the numbers are the same. Published weights are not downloaded.

    Args:
        name: Its name in `monai.networks.nets`, such as "DenseNet121".
        channels: Image channels.
        image_size: Height and width in pixels.
        num_classes: Number of logits.
        arguments: Further keyword arguments of the network.

    Raises:
        UserError: If the name or an argument is unknown, a value is refused, or the network does not turn images
            of this size into one logit per class.
    """
    if name not in _NETWORKS:
        raise UserError("model.network", f"'{name}' is no 2-D classification network", f"Choose {_either(_NETWORKS)}")
    from monai.networks import nets

    family, channels_name, classes_name = _NETWORKS[name]
    fixed = {"spatial_dims": 2, channels_name: channels, classes_name: num_classes}
    if family == "ViT":
        fixed |= {"img_size": image_size, "classification": True}
    chosen = dict(arguments or {})
    make = getattr(nets, name)
    parameters = _parameters(make, getattr(nets, family))
    _check_names(name, chosen, fixed, parameters)
    # A tanh on the logits, which is ViT's default, caps the confidence at any training.
    chosen = ({"post_activation": None} if family == "ViT" else {}) | chosen
    if "pretrained" in parameters:
        fixed["pretrained"] = False
    network = _build(name, make, fixed, chosen)
    network = _plain(_FirstOutput(network) if family == "ViT" else network)
    _check_output(network, name, channels, image_size, num_classes)
    return network


def _build(name: str, make: Any, fixed: dict[str, Any], chosen: dict[str, Any]) -> nn.Module:
    from monai.utils.module import OptionalImportError

    try:
        return make(**fixed, **chosen)
    except OptionalImportError as error:
        problem = f"{name} needs a package that is not installed: {_first_line(error)}"
        raise UserError("model.network", problem, "Install that package, or choose another network") from error
    except Exception as error:  # MONAI checks little: a wrong value may end in any exception
        said = ", ".join(f"{argument} = {value!r}" for argument, value in chosen.items())
        problem = f"{name} refused {said}: {_first_line(error)}"
        raise UserError("model.arguments", problem, "Correct the values") from error


class _FirstOutput(nn.Module):
    """A network that returns its logits and something else."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.network(x_BCHW)[0]


def _parameters(make: Any, family: Any) -> dict[str, inspect.Parameter]:
    """Returns the keyword arguments of a network; one that forwards `**kwargs` also has those of its family."""
    own = dict(inspect.signature(make).parameters)
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in own.values()):
        own = dict(inspect.signature(family).parameters) | own
        # What the network fixes itself (resnet18 its block and layers) must not be given again.
        passed = {"block", "layers", "block_inplanes"} if family.__name__ == "ResNet" else {"block"}
        own = {name: p for name, p in own.items() if name not in passed or name in inspect.signature(make).parameters}
    return {name: p for name, p in own.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}


def _check_names(name: str, chosen: dict[str, Any], fixed: dict[str, Any], parameters: dict[str, Any]) -> None:
    free = [p for p in parameters if p not in fixed and p not in ("pretrained", "progress", "adv_prop")]
    for argument in chosen:
        where = f"model.arguments.{argument}"
        if argument == "pretrained":
            raise UserError(where, "published weights are not downloaded", "Leave it out")
        if argument in fixed:
            raise UserError(where, "the data and the task decide it", "Leave it out")
        if argument not in free:
            raise UserError(where, f"{name} has no such argument", f"Choose {_either(free)}")
    for argument in free:
        if parameters[argument].default is inspect.Parameter.empty and argument not in chosen:
            raise UserError("model.arguments", f"{name} needs '{argument}'", "Add it")


def _plain(network: nn.Module) -> nn.Module:
    for layer in network.modules():
        if getattr(layer, "inplace", False):
            setattr(layer, "inplace", False)  # noqa: B010 - modules declare no such attribute
    set_swish = getattr(network, "set_swish", None)
    if set_swish is not None:
        set_swish(memory_efficient=False)
    return network


def _check_output(network: nn.Module, name: str, channels: int, image_size: int, num_classes: int) -> None:
    where = "model.network"
    network.eval()
    try:
        with torch.no_grad():
            logits = network(torch.zeros(2, channels, image_size, image_size))
    except Exception as error:  # whatever a layer raises where the image is too small for it
        problem = f"{name} does not take images of {image_size} pixels: {_first_line(error)}"
        raise UserError(where, problem, "Use larger images or a network with fewer reductions") from error
    finally:
        network.train()
    if logits.shape != (2, num_classes):
        problem = f"{name} returns shape {tuple(logits.shape)} for 2 images, not one logit per class"
        raise UserError(where, problem, "Check model.arguments")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _either(names: Any) -> str:
    return "one of " + ", ".join(names)


def read_dicom(path: Path, max_pixels: int) -> np.ndarray:
    """Returns a DICOM file's picture as it is meant to be displayed, float32 in [0, 1], shape (H, W).

    Rescale slope and intercept are applied, then the first VOI window or look-up table if there is one; without one
    the full range of the stored bits becomes [0, 1]. MONOCHROME1 (low values bright) is inverted.

    Args:
        path: The file.
        max_pixels: A larger picture is refused by its header, before anything is decoded.

    Raises:
        UserError: pydicom is not installed, the file is missing, damaged or too large, holds colours or several frames.
    """
    if importlib.util.find_spec("pydicom") is None:
        raise UserError(str(path), "DICOM needs pydicom", 'Install it with: pip install "trilemma[dicom]"')
    from monai.data.image_reader import PydicomReader

    # Remarks on the form of a header name no file. What matters in a header is checked here, with the file's name.
    warnings.filterwarnings("ignore", module=r"pydicom\.(filereader|valuerep)")
    if not path.is_file():
        raise UserError(str(path), "does not exist", "Correct the path")
    try:
        reader = PydicomReader()
        file: Any = reader.read(str(path))
        if int(getattr(file, "NumberOfFrames", None) or 1) > 1 or int(getattr(file, "SamplesPerPixel", 1)) > 1:
            raise UserError(str(path), "holds colours or several frames", "Give grey 2-D pictures, one per file")
        if int(file.Rows) * int(file.Columns) > max_pixels:
            size = f"{file.Columns} x {file.Rows}"
            raise UserError(str(path), f"has {size} pixels, more than {max_pixels}", "Scale it down first")
        if "ImageOrientationPatient" not in file or "ImagePositionPatient" not in file:
            # Radiographs have no place in the patient; MONAI would warn of it for every file.
            file.ImageOrientationPatient, file.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, 0]
        values_WH, _ = reader.get_data(file)
        image_HW = _displayed(file, np.asarray(values_WH, dtype=np.float64).T)
    except UserError:
        raise
    except Exception as error:  # a decoder may raise anything when its input is hostile
        reason = _first_line(error)
        raise UserError(str(path), f"cannot be read as DICOM ({reason})", "Replace the file, or leave it out") from None
    if image_HW.ndim != 2 or not np.isfinite(image_HW).all():
        raise UserError(str(path), "does not hold one grey 2-D picture", "Replace the file, or leave it out")
    return np.ascontiguousarray(image_HW, dtype=np.float32)


def _displayed(file: Any, values_HW: np.ndarray) -> np.ndarray:
    """Returns rescaled values after the window or look-up table of `file`, in [0, 1] (DICOM PS3.3, C.11.2)."""
    slope, intercept = float(getattr(file, "RescaleSlope", 1)), float(getattr(file, "RescaleIntercept", 0))
    bits, signed = int(file.BitsStored), int(file.PixelRepresentation) == 1
    if getattr(file, "VOILUTSequence", None):
        from pydicom.pixels.processing import apply_voi_lut

        table_bits = int(file.VOILUTSequence[0].LUTDescriptor[2])
        looked_up = apply_voi_lut(np.rint(values_HW).astype(np.int64), file, prefer_lut=True)
        unit_HW = looked_up / (2.0**table_bits - 1.0)
    elif getattr(file, "WindowCenter", None) is not None and getattr(file, "WindowWidth", None) is not None:
        centre, width = _first_number(file.WindowCenter), _first_number(file.WindowWidth)
        function = str(getattr(file, "VOILUTFunction", "LINEAR") or "LINEAR").upper()
        if function == "SIGMOID":
            unit_HW = 1.0 / (1.0 + np.exp(-4.0 * (values_HW - centre) / width))
        elif function == "LINEAR_EXACT":
            unit_HW = (values_HW - centre) / width + 0.5
        else:
            unit_HW = (values_HW - (centre - 0.5)) / max(width - 1.0, 1e-6) + 0.5
    else:
        low = -(2.0 ** (bits - 1)) if signed else 0.0
        ends = sorted((low * slope + intercept, (low + 2.0**bits - 1.0) * slope + intercept))
        unit_HW = (values_HW - ends[0]) / (ends[1] - ends[0])
    clipped_HW = np.clip(unit_HW, 0.0, 1.0)
    return 1.0 - clipped_HW if str(file.PhotometricInterpretation) == "MONOCHROME1" else clipped_HW


def _first_number(value: Any) -> float:
    return float(value[0]) if hasattr(value, "__len__") and not isinstance(value, str) else float(value)
