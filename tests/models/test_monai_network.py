import subprocess
import sys

import pytest
import torch
from torch import nn

from trilemma.errors import UserError
from trilemma.models.norms import batch_norm_layers
from trilemma.models.specs import Monai
from trilemma.monai_bridge import monai_network

GROUP_NORM = ["group", {"num_groups": 8}]


@pytest.mark.parametrize(
    ("network", "arguments"),
    [
        ("DenseNet121", {}),
        ("EfficientNetBN", {"model_name": "efficientnet-b0"}),
        ("ResNet", {"block": "basic", "layers": [1, 1, 1, 1], "block_inplanes": [4, 4, 8, 8]}),
        ("resnet10", {"widen_factor": 0.25}),
        ("SEResNet50", {"layers": [1, 1, 1, 1], "inplanes": 64}),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_networks_by_name(network, arguments, channels):
    classifier = Monai(network=network, arguments=arguments).make(channels, 32, 3, seed=0)
    assert classifier.training
    assert classifier(torch.rand(2, channels, 32, 32)).shape == (2, 3)
    assert not any(getattr(layer, "inplace", False) for layer in classifier.modules())


def test_the_seed_decides_and_arguments_are_left_alone():
    spec = Monai(network="DenseNet", arguments={"block_config": [1], "norm": GROUP_NORM})
    key = spec.key
    one, two, other = (spec.make(1, 16, 2, seed) for seed in (0, 0, 1))
    x = torch.rand(2, 1, 16, 16)
    assert torch.equal(one(x), two(x))
    assert not torch.equal(one(x), other(x))
    assert spec.key == key


def test_a_group_norm_densenet_has_no_batch_norm():
    assert batch_norm_layers(monai_network("DenseNet", 1, 16, 2, {"block_config": [1], "norm": GROUP_NORM})) == []


def test_the_batch_norms_that_monai_keeps_are_seen():
    # MONAI's resnet10 passes `norm` on to its first layer only; the rest must still be refused under DP.
    assert batch_norm_layers(monai_network("resnet10", 1, 32, 2, {"norm": GROUP_NORM, "widen_factor": 0.25}))


def test_efficientnet_keeps_its_numbers_without_the_memory_saving_swish():
    from monai.networks.nets.efficientnet import EfficientNetBN

    network = monai_network("EfficientNetBN", 1, 32, 2, {"model_name": "efficientnet-b0", "norm": GROUP_NORM}).eval()
    theirs = EfficientNetBN(
        "efficientnet-b0", pretrained=False, in_channels=1, num_classes=2, norm=("group", {"num_groups": 8})
    ).eval()
    theirs.load_state_dict(network.state_dict())
    x = torch.rand(2, 1, 32, 32)
    logits = network(x)
    assert logits.abs().mean() > 1e-3
    assert torch.allclose(logits, theirs(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("network", "size", "arguments", "where", "message"),
    [
        ("DenseNet21", 64, {}, "model.network", "Choose one of DenseNet, DenseNet121"),
        ("UNet", 64, {}, "model.network", "no 2-D classification network"),
        ("DenseNet121", 64, {"grwth_rate": 3}, "model.arguments.grwth_rate", "growth_rate"),
        ("DenseNet121", 64, {"pretrained": True}, "model.arguments.pretrained", "not downloaded"),
        ("DenseNet121", 64, {"in_channels": 3}, "model.arguments.in_channels", "decide"),
        ("resnet10", 64, {"layers": [1]}, "model.arguments.layers", "no such argument"),
        ("resnet10", 32, {"norm": "nope"}, "model.arguments", "nope"),
        ("resnet10", 32, {"feed_forward": False}, "model.network", "not one logit per class"),
        ("DenseNet121", 28, {}, "model.network", "does not take images of 28 pixels"),
        ("EfficientNetBN", 64, {"model_name": "b99"}, "model.arguments", "efficientnet-b0"),
        ("EfficientNetBN", 64, {}, "model.arguments", "needs 'model_name'"),
        ("SENet", 64, {}, "model.arguments", "needs 'block'"),
    ],
)
def test_mistakes_name_the_field_and_what_is_valid(network, size, arguments, where, message):
    with pytest.raises(UserError) as caught:
        monai_network(network, 1, size, 2, arguments)
    assert caught.value.where == where
    assert message in str(caught.value)


def test_vit_gives_logits_or_says_which_package_is_missing():
    arguments = {"patch_size": 8, "hidden_size": 16, "mlp_dim": 16, "num_layers": 1, "num_heads": 2}
    try:
        import einops  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="einops"):
            monai_network("ViT", 1, 16, 2, arguments)
        return
    network = monai_network("ViT", 1, 16, 2, arguments)
    logits = network(torch.rand(3, 1, 16, 16))
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (3, 2)
    assert not any(isinstance(layer, nn.Tanh) for layer in network.modules())


def test_monai_is_imported_only_when_needed_and_torchvision_never():
    code = (
        "import sys, trilemma.models.specs as s; assert 'monai' not in sys.modules; "
        "s.Monai(network='resnet10', arguments={'widen_factor': .25}).make(1, 32, 2, 0); "
        "assert 'monai' in sys.modules and 'torchvision' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
