import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from trilemma.errors import UserError
from trilemma.models.layers import num_groups
from trilemma.models.norms import batch_norm_layers
from trilemma.models.specs import ModelSpec, Monai, Resnet9, Resnet18
from trilemma.models.vector import get_params, num_params

GROUP_NORM = ["group", {"num_groups": 4}]
TINY_DENSENET = {"init_features": 8, "growth_rate": 4, "block_config": [2, 2], "norm": GROUP_NORM}
WITHOUT_BATCH_NORM = [
    Resnet9(width=4),
    Resnet9(width=4, activation="mish", groups=2),
    Resnet9(width=4, norm="none"),
    Resnet9(width=4, norm="weight"),
    Resnet18(width=4),
    Resnet18(width=4, stem="large", activation="mish"),
    Resnet18(width=4, norm="none"),
    Resnet18(width=4, norm="weight", activation="mish"),
    Monai(network="DenseNet", arguments=TINY_DENSENET),
]


def spec_id(spec) -> str:
    return spec.label[:40]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("image_size", [16, 28, 64])
@pytest.mark.parametrize("spec", WITHOUT_BATCH_NORM, ids=spec_id)
def test_logits_for_every_size_and_channel_count(spec, image_size, channels):
    classifier = spec.make(channels, image_size, 3, seed=0)
    x = torch.rand(5, channels, image_size, image_size, generator=torch.Generator().manual_seed(0))
    logits = classifier(x)
    assert logits.shape == (5, 3)
    assert torch.isfinite(logits).all()
    in_double, x = classifier.double(), x.double()  # in float32 a batch's rounding alone may pass 1e-5
    assert torch.allclose(in_double(x[3:4]), in_double(x)[3:4], rtol=0, atol=1e-9)  # no record looks at another


@pytest.mark.parametrize("spec", [Resnet9(width=4), Resnet18(width=4, stem="large")], ids=spec_id)
def test_224_pixels(spec):
    assert spec.make(1, 224, 2, seed=0)(torch.rand(1, 1, 224, 224)).shape == (1, 2)


@pytest.mark.parametrize("spec", WITHOUT_BATCH_NORM, ids=spec_id)
def test_vmap_grad_matches_a_loop(spec):
    classifier = spec.make(1, 16, 3, seed=1).double()
    parameters = {name: p.detach() for name, p in classifier.named_parameters()}
    x, y = torch.rand(4, 1, 16, 16, dtype=torch.float64), torch.tensor([0, 2, 1, 1])

    def loss(parameters, x_CHW, label):
        return F.cross_entropy(functional_call(classifier, parameters, (x_CHW[None],)), label[None])

    fast = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    for i in range(len(x)):
        classifier.zero_grad()
        F.cross_entropy(classifier(x[i : i + 1]), y[i : i + 1]).backward()
        for name, parameter in classifier.named_parameters():
            assert torch.allclose(fast[name][i], parameter.grad, atol=1e-10), name


@pytest.mark.parametrize("spec", [*WITHOUT_BATCH_NORM, Resnet9(width=4, norm="batch")], ids=spec_id)
def test_the_seed_alone_decides_the_weights(spec):
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first = get_params(spec.make(1, 16, 2, seed=3))
    assert torch.equal(torch.random.get_rng_state(), before)  # the global generator is as it was
    torch.rand(5)
    assert torch.equal(get_params(spec.make(1, 16, 2, seed=3)), first)
    assert not torch.equal(get_params(spec.make(1, 16, 2, seed=4)), first)


def test_parameter_counts_by_hand():
    # ResNet-9 width 32, grey, 2 classes: convolutions 9 * 67616, group norms 2 * 736, linear 128 * 2 + 2.
    # Gain and bias of standardised weights are as many as those of a normalisation of activations.
    convolutions = 9 * (32 + 32 * 64 + 2 * 64**2 + 64 * 128 + 3 * 128**2)
    norms = 2 * (32 + 3 * 64 + 4 * 128)
    for norm in ("group", "weight"):
        assert num_params(Resnet9(width=32, norm=norm).make(1, 28, 2, seed=0)) == convolutions + norms + 128 * 2 + 2
    # ResNet-18 as published: 11,689,512 parameters with 1000 classes, colour, batch norm (torchvision's table).
    assert num_params(Resnet18(norm="batch", stem="large").make(3, 224, 1000, seed=0)) == 11_689_512


def test_feature_map_sizes_of_the_two_stems():
    for stem, size in (("small", 4), ("large", 1)):
        classifier = Resnet18(width=4, stem=stem).make(1, 32, 2, seed=0)
        seen = []
        classifier.module.stage4.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output))
        classifier(torch.rand(1, 1, 32, 32))
        assert seen[0].shape[-2:] == (size, size)


def test_default_groups():
    assert [num_groups(c, None) for c in (1, 4, 6, 16, 64, 128, 256, 200)] == [1, 1, 1, 4, 16, 32, 32, 25]
    assert num_groups(16, 8) == 8
    groups = [
        m.num_groups for m in Resnet9(width=8, groups=4).make(1, 16, 2, 0).modules() if isinstance(m, nn.GroupNorm)
    ]
    assert groups == [4] * 8


def test_normalisation_lies_inside():
    classifier = Resnet9(width=4, mean=0.25, std=0.5).make(1, 16, 2, seed=0)
    x = torch.rand(2, 1, 16, 16)
    assert torch.equal(classifier(x), classifier.module((x - 0.25) / 0.5))


@pytest.mark.parametrize("width", [4, 16, 64])
def test_without_normalisation_the_signal_survives(width):
    logits = Resnet9(width=width, norm="none").make(1, 28, 2, seed=0)(torch.rand(16, 1, 28, 28))
    assert logits.std(dim=0).mean() > 1e-2


def test_a_tiny_image_is_the_users_mistake():
    with pytest.raises(UserError, match="at least 8 pixels"):
        Resnet9(width=4).make(1, 7, 2, seed=0)
    assert Resnet9(width=4).make(1, 8, 2, seed=0)(torch.rand(2, 1, 8, 8)).shape == (2, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "resnet9", "width": 10, "groups": 4}, "does not divide width = 10"),
        ({"kind": "resnet18", "norm": "batch", "groups": 4}, "belongs to norm = 'group'"),
        ({"kind": "resnet9", "norm": "weight", "groups": 4}, "belongs to norm = 'group', but norm is 'weight'"),
        ({"kind": "resnet9", "widht": 8}, "Extra inputs"),
        ({"kind": "resnet9", "std": 0}, "greater than or equal to 0.01"),
        ({"kind": "resnet7"}, "'resnet9', 'resnet18', 'monai'"),
        ({"kind": "resnet18", "stem": "huge"}, "'small' or 'large'"),
    ],
)
def test_impossible_values_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(ModelSpec).validate_python(fields)


def test_labels():
    assert Resnet9().label == "ResNet-9 w64 GN"
    assert Resnet18(width=16, norm="batch", activation="mish").label == "ResNet-18 w16 BN Mish"
    assert Resnet9(norm="weight").label == "ResNet-9 w64 WS"
    assert Monai(network="resnet10").label == "resnet10"
    assert Monai(network="resnet10", arguments={"widen_factor": 0.5}).label == "resnet10 (widen_factor=0.5)"


def test_batch_norm_is_named():
    assert batch_norm_layers(Resnet9(width=4).make(1, 16, 2, seed=0)) == []
    names = batch_norm_layers(Resnet9(width=4, norm="batch").make(1, 16, 2, seed=0))
    assert len(names) == 8
    assert names[0] == "module.conv1.norm"
    assert len(batch_norm_layers(Resnet18(width=4, norm="batch").make(1, 16, 2, seed=0))) == 20


def test_instance_norm_counts_only_with_running_statistics():
    plain = nn.InstanceNorm2d(3)
    tracking = nn.Sequential(nn.Conv2d(1, 3, 1), nn.InstanceNorm2d(3, track_running_stats=True), nn.SyncBatchNorm(3))
    assert batch_norm_layers(plain) == []
    assert batch_norm_layers(nn.Sequential(nn.GroupNorm(1, 3), nn.LayerNorm(3))) == []
    assert batch_norm_layers(tracking) == ["1", "2"]
    assert batch_norm_layers(nn.BatchNorm1d(3)) == [""]


@pytest.mark.parametrize("field", [{"mean": 1e300}, {"mean": -0.1}, {"std": 0.0}, {"std": 1e-300}, {"std": 1e300}])
@pytest.mark.parametrize("kind", [{"kind": "resnet9"}, {"kind": "resnet18"}, {"kind": "monai", "network": "DenseNet"}])
def test_a_normalisation_that_would_wipe_out_the_image_is_refused(kind, field):
    with pytest.raises(ValidationError, match=next(iter(field))):
        TypeAdapter(ModelSpec).validate_python(kind | field)
