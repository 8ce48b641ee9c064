"""Which layers of a network look at more than one image at a time."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm


def batch_norm_layers(module: nn.Module) -> list[str]:
    """Returns the qualified name of every layer that gathers statistics over images, in definition order.

    Such a layer makes one record's gradient depend on the others in its batch, or keeps means and variances of
    private images that no noise was added to; either breaks differential privacy. Found are all batch
    normalisations (also synchronised and lazy ones) and instance normalisations with running statistics; an
    instance normalisation without them looks at one image only and is left alone.
    """
    return [name for name, layer in module.named_modules() if _gathers_statistics(layer)]


def _gathers_statistics(layer: nn.Module) -> bool:
    return isinstance(layer, _BatchNorm) or (isinstance(layer, _InstanceNorm) and bool(layer.track_running_stats))
