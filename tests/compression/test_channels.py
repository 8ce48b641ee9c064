"""Structured pruning: what is left computes what the whole network computes without what left."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trilemma.compression.channel_spaces import channel_spaces
from trilemma.compression.channels import prune_channels, shrunken
from trilemma.compression.export import export_onnx
from trilemma.compression.fake_quantisation import quantise, quantised_skeleton
from trilemma.compression.multiply_adds import multiply_adds, multiply_adds_by_layer
from trilemma.compression.pruning import prune
from trilemma.compression.session import Session
from trilemma.models.classifier import Classifier
from trilemma.models.specs import Monai, Resnet9, Resnet18

IMAGE = (1, 16, 16)
SENET = {
    "block": "se_resnet_bottleneck",
    "layers": [1, 1, 1, 1],
    "groups": 1,
    "reduction": 4,
    "inplanes": 8,
    "dropout_prob": None,
    "input_3x3": False,
}
SPECS = {
    "resnet9 group": Resnet9(width=8),
    "resnet9 batch": Resnet9(width=4, norm="batch", activation="mish"),
    "resnet9 none": Resnet9(width=4, norm="none", activation="mish"),
    "resnet9 wide groups": Resnet9(width=8, groups=2),
    "resnet18 group": Resnet18(width=8),
    "resnet18 batch large": Resnet18(width=4, norm="batch", stem="large"),
    "resnet18 none": Resnet18(width=4, norm="none"),
    "resnet18 group large": Resnet18(width=8, stem="large", activation="mish"),
    "monai resnet": Monai(network="ResNet", arguments={"block": "basic", "layers": [1] * 4, "block_inplanes": [8] * 4}),
    "monai densenet": Monai(
        network="DenseNet", arguments={"init_features": 8, "growth_rate": 8, "block_config": [2, 2]}
    ),
}


def marked(classifier, seed=0):
    """Gives each bias and each affine scale a number of its own, by which a channel is known again."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in classifier.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.weight.mul_(
                    0.5 + torch.rand((len(layer.weight), *[1] * (layer.weight.dim() - 1)), generator=draws)
                )
            for name in ("bias", "weight"):
                tensor = getattr(layer, name, None)
                if tensor is not None and tensor.dim() == 1:
                    tensor.copy_(0.5 * torch.randn(tensor.shape, generator=draws) + (name == "weight"))
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.copy_(0.1 * torch.randn(layer.num_features, generator=draws))
                layer.running_var.copy_(0.5 + torch.rand(layer.num_features, generator=draws))
    return classifier.eval()


def places(small, large):
    """Where the numbers of a small vector stand in a large one."""
    found = [(large == number).nonzero().flatten().tolist() for number in small]
    assert all(len(where) == 1 for where in found)
    return [where[0] for where in found]


def kept_by_layer(classifier, small):
    """The channels that each marked layer kept, found by their marks and not by what the pruning says."""
    layers = dict(classifier.named_modules())
    return {
        name: places(layer.bias.detach(), layers[name].bias.detach())
        for name, layer in small.named_modules()
        if getattr(layer, "bias", None) is not None
    }


def without(classifier, kept):
    """The whole network with the filters and affine numbers of the channels that left set to zero, nothing else."""
    whole = copy.deepcopy(classifier)
    layers = dict(whole.named_modules())
    with torch.no_grad():
        for name, channels in kept.items():
            gone = [c for c in range(len(layers[name].bias)) if c not in channels]
            layers[name].weight[gone] = 0
            layers[name].bias[gone] = 0
    return whole


def images(count=4, shape=IMAGE, seed=1):
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


def logits(classifier, x=None):
    with torch.no_grad():
        return classifier(images() if x is None else x)


def assert_close(one, other):
    assert torch.allclose(one, other, rtol=0, atol=2e-5 * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("share", [0.8, 0.4])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_small_network_is_the_whole_one_without_what_left(spec, share):
    shape = (1, 32, 32) if spec.kind == "monai" else IMAGE
    classifier = marked(spec.make(1, shape[1], 3, 0))
    before = copy.deepcopy(classifier.state_dict())
    small = prune_channels(classifier, share, shape)
    kept = kept_by_layer(classifier, small)
    assert any(len(channels) < len(dict(classifier.named_modules())[name].bias) for name, channels in kept.items())
    x = images(shape=shape)
    assert_close(logits(small, x), logits(without(classifier, kept), x))
    assert not torch.allclose(logits(small, x), logits(classifier, x), atol=1e-3)  # it did take something out
    assert multiply_adds(small, shape) <= share * multiply_adds(classifier, shape)
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.state_dict().items())
    assert small.state_dict().keys() == before.keys()
    for layer in small.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.num_features == len(layer.weight) == len(layer.running_mean)


@pytest.mark.parametrize("multiple", [2, 4, 8])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_multiple_of_the_channels_stays_wherever_two_did(spec, multiple):
    shape = (1, 32, 32) if spec.kind == "monai" else IMAGE
    classifier = marked(spec.make(1, shape[1], 3, 0))
    small = prune_channels(classifier, 0.6, shape, multiple)
    assert multiply_adds(small, shape) <= 0.6 * multiply_adds(classifier, shape)
    kept = kept_by_layer(classifier, small)
    x = images(shape=shape)
    assert_close(logits(small, x), logits(without(classifier, kept), x))
    spaces, whole, changed = channel_spaces(classifier, shape), 0, 0
    for name, (_, written) in spaces.layers.items():
        space, left = spaces.spaces[written], len(dict(small.named_modules())[name].weight)
        step = math.lcm(space.unit, multiple)
        if space.size % step == 0 and space.size >= 2 * step:
            assert left % step == 0
            whole, changed = whole + 1, changed + (left < space.size)
    assert changed or not whole


@pytest.mark.parametrize("weak", [[1, 4, 6, 15], [0, 7, 8, 13]])
def test_those_that_leave_together_are_the_least_important_wherever_they_stand(weak):
    first, second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
    with torch.no_grad():
        first.weight[weak] *= 0.01
    net = nn.Sequential(first, nn.ReLU(), second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    classifier = marked(Classifier(net, 2))
    layers = [name for name, layer in classifier.named_modules() if isinstance(layer, nn.Conv2d)]
    together = kept_by_layer(classifier, prune_channels(classifier, 0.76, IMAGE, 4))
    assert together[layers[0]] == [place for place in range(16) if place not in weak]


def test_a_network_with_gates_is_pruned_too():
    spec = Monai(network="SENet", arguments=SENET)
    classifier = marked(spec.make(1, 32, 2, 0))
    assert any(isinstance(layer, nn.Sigmoid) for layer in classifier.modules())
    small = prune_channels(classifier, 0.5, (1, 32, 32))
    x = images(shape=(1, 32, 32))
    assert_close(logits(small, x), logits(without(classifier, kept_by_layer(classifier, small)), x))
    shares = [s.numel() / w.numel() for s, w in zip(small.parameters(), classifier.parameters(), strict=True)]
    assert sum(share < 0.9 for share in shares) > len(shares) / 2


def with_one_more(classifier, small, share):
    """Whether a unit of some space could come back, counted from nothing but the sizes of the layers."""
    spaces = channel_spaces(classifier, IMAGE)
    counts, layers = multiply_adds_by_layer(small, IMAGE), dict(small.named_modules())
    width = {}
    for name, (read, written) in spaces.layers.items():
        width[read], width[written] = layers[name].weight.shape[1], layers[name].weight.shape[0]
    for place, space in enumerate(spaces.spaces):
        grown = width | {place: width[place] + space.unit}
        total = 0
        for name, (read, written) in spaces.layers.items():
            total += counts[name] * grown[read] * grown[written] / (width[read] * width[written])
        if grown[place] <= space.size and total <= share * multiply_adds(classifier, IMAGE) - 0.5:
            return True
    return False


@settings(deadline=None, max_examples=15)
@given(share=st.floats(0.2, 0.99), seed=st.integers(0, 5), norm=st.sampled_from(["batch", "group"]))
def test_any_share_is_kept_to_and_used(share, seed, norm):
    classifier = marked(Resnet9(width=8, norm=norm).make(1, 16, 2, seed), seed)
    small = prune_channels(classifier, share, IMAGE)
    assert multiply_adds(small, IMAGE) <= share * multiply_adds(classifier, IMAGE)
    assert not with_one_more(classifier, small, share)
    assert_close(logits(small), logits(without(classifier, kept_by_layer(classifier, small))))
    if norm == "batch":  # a unit is one channel
        assert multiply_adds(small, IMAGE) > (share - 0.02) * multiply_adds(classifier, IMAGE)


@pytest.mark.parametrize("spec", [SPECS["resnet9 group"], SPECS["resnet18 batch large"]])
def test_a_share_of_one_changes_nothing(spec):
    classifier = marked(spec.make(1, 16, 2, 0))
    small = prune_channels(classifier, 1.0, IMAGE)
    assert small is not classifier
    state = small.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in classifier.state_dict().items())


@pytest.mark.parametrize("groups", [None, 2, 8])
def test_whole_groups_leave_and_the_statistics_of_the_others_stay(groups):
    classifier = marked(Resnet9(width=16, groups=groups).make(1, 16, 2, 0))
    small = prune_channels(classifier, 0.5, IMAGE)
    kept = kept_by_layer(classifier, small)
    seen = 0
    layers = dict(classifier.named_modules())
    for name, norm in small.named_modules():
        if isinstance(norm, nn.GroupNorm):
            size = layers[name].num_channels // layers[name].num_groups
            assert norm.num_channels // norm.num_groups == size
            whole = [list(range(size * g, size * g + size)) for g in range(layers[name].num_groups)]
            assert kept[name] == [c for group in whole if group[0] in kept[name] for c in group]
            seen += norm.num_groups < layers[name].num_groups
    assert seen >= 2


class _TwoNorms(nn.Module):
    """Two group norms of different sizes look at one sum."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 24, 3), nn.Conv2d(1, 24, 3)
        self.first, self.second = nn.GroupNorm(6, 24), nn.GroupNorm(4, 24)
        self.linear = nn.Linear(24, 2)

    def forward(self, x):
        h = torch.relu(self.second(self.one(x) + self.first(self.two(x))))
        return self.linear(h.mean(dim=(2, 3)))


def test_a_unit_holds_whole_groups_of_every_norm():
    classifier = marked(Classifier(_TwoNorms(), 2))
    spaces = channel_spaces(classifier, IMAGE)
    assert [space.unit for space in spaces.spaces if not space.frozen] == [math.lcm(4, 6)]
    small = prune_channels(classifier, 0.5, IMAGE)
    assert (small.module.first.num_groups, small.module.second.num_groups) == (3, 2)
    assert_close(logits(small), logits(without(classifier, kept_by_layer(classifier, small))))


def chain(channels=8, norms=(1, 2, 3, 4, 5, 6, 7, 8)):
    """One convolution to prune; its filters have the given lengths."""
    network = nn.Sequential(
        nn.Conv2d(1, channels, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 2)
    )
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor(norms, dtype=torch.float32).reshape(-1, 1, 1, 1))
        network[0].bias.copy_(torch.arange(channels) / 10)
    return Classifier(network, 2).eval()


@pytest.mark.parametrize(("share", "stay"), [(1.0, 8), (0.99, 7), (0.5, 4), (0.49, 3), (0.125, 1)])
def test_the_shortest_filters_leave_first_and_no_more_than_must(share, stay):
    small = prune_channels(chain(norms=(5, 1, 8, 2, 7, 3, 6, 4)), share, IMAGE)
    expected = [n for n in (5, 1, 8, 2, 7, 3, 6, 4) if n > 8 - stay]
    assert small.module[0].weight.flatten().tolist() == expected
    assert (small.module[0].out_channels, small.module[4].in_features) == (stay, stay)
    assert multiply_adds(small, IMAGE) == stay * (256 + 2)


def test_of_equal_filters_the_first_leaves():
    small = prune_channels(chain(norms=[1] * 8), 0.75, IMAGE)
    assert torch.equal(small.module[0].bias.detach(), torch.arange(2, 8) / 10)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_filter_that_is_no_number_leaves_first(bad):
    small = prune_channels(chain(norms=(1, 2, 3, bad, 5, 6, 7, 8)), 0.9, IMAGE)
    assert small.module[0].weight.flatten().tolist() == [1, 2, 3, 5, 6, 7, 8]


def test_a_share_that_cannot_be_reached_is_refused_with_what_can():
    with pytest.raises(ValueError, match=r"share 0.12 of the multiply-adds cannot be reached.*0.125 are left"):
        prune_channels(chain(), 0.12, IMAGE)
    twin = quantise(Resnet9(width=4).make(1, 16, 2, 0), images())
    with pytest.raises(ValueError, match="cannot be reached"):  # its layers are of other kinds
        prune_channels(twin, 0.9, IMAGE)


@pytest.mark.parametrize("share", [0, -0.5, 1.01, float("nan")])
def test_an_impossible_share_is_refused(share):
    with pytest.raises(ValueError, match="must lie in"):
        prune_channels(chain(), share, IMAGE)


def test_both_writers_of_a_sum_are_asked_in_their_own_scale():
    network = _TwoNorms()
    network.first = network.second = nn.Identity()
    with torch.no_grad():
        network.one.weight.fill_(1.0)
        network.two.weight.fill_(100.0)
        network.one.weight[3], network.two.weight[3] = 0.0, 1000.0  # of no worth to one, of much to the other
        network.two.weight[4] = 70.0  # 51 % less in one's share of squares
        network.one.weight[7] = 0.5  # 75 % less
    small = prune_channels(Classifier(network, 2).eval(), 23 / 24, IMAGE)
    assert len(small.module.one.weight) == 23
    assert small.module.one.weight.min() == 0
    assert (small.module.one.weight == 0.5).sum() == 0
    assert small.module.two.weight.max() == 1000


def test_the_last_to_leave_is_the_one_that_comes_nearest():
    network = nn.Sequential(
        nn.Conv2d(1, 4, 1, bias=False),
        nn.MaxPool2d(4),
        nn.Conv2d(4, 4, 1),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    with torch.no_grad():
        network[0].weight.copy_(
            torch.tensor([1.0, 1e-3, 1.0, 1.0]).reshape(4, 1, 1, 1)
        )  # each reads and writes 320 of 1288
        network[2].weight.fill_(1.0)  # 66 each
    classifier = Classifier(network, 2).eval()
    assert multiply_adds(classifier, IMAGE) == 4 * 256 + 16 * 16 + 4 * 2
    small = prune_channels(classifier, 0.96, IMAGE)
    assert (small.module[0].out_channels, small.module[2].out_channels) == (4, 3)


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_the_small_network_ships_trains_and_quantises(norm):
    classifier = marked(Resnet9(width=16, norm=norm).make(1, 16, 2, 0))
    classifier.module.conv1.conv.weight.requires_grad_(False)
    small = prune_channels(classifier, 0.3, IMAGE)
    assert torch.allclose(Session(export_onnx(small, 1, 16)).predict(images()), logits(small), atol=1e-3)
    assert len(export_onnx(small, 1, 16)) < 0.7 * len(export_onnx(classifier, 1, 16))
    twin = quantise(small, images(16))
    assert (logits(twin) - logits(small)).abs().max() < 0.2 * logits(small).abs().max()
    trainable = [parameter.requires_grad for parameter in small.parameters()]
    assert trainable == [parameter.requires_grad for parameter in classifier.parameters()]
    small.train()(images()).sum().backward()
    assert all(p.grad.shape == p.shape for p in small.parameters() if p.requires_grad)


def state_shapes(classifier):
    return {name: tensor.shape for name, tensor in classifier.state_dict().items()}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_stored_state_fits_the_shrunken_network(spec):
    size = 32 if spec.kind == "monai" else 16
    classifier = marked(spec.make(1, size, 3, 0))
    small = prune_channels(classifier, 0.5, (1, size, size))
    skeleton = shrunken(classifier, state_shapes(small))
    skeleton.load_state_dict(small.state_dict(), strict=True)
    x = images(shape=(1, size, size))
    assert torch.equal(logits(skeleton, x), logits(small, x))
    assert repr(skeleton) == repr(small)  # every size that a layer says of itself
    assert state_shapes(shrunken(classifier, state_shapes(classifier))) == state_shapes(classifier)


def test_a_twin_of_a_small_network_has_a_skeleton_too():
    classifier = marked(Resnet9(width=8, norm="batch").make(1, 16, 2, 0))
    twin = quantise(prune(prune_channels(classifier, 0.5, IMAGE), 0.5), images())
    skeleton = quantised_skeleton(shrunken(classifier, state_shapes(twin)))
    skeleton.load_state_dict(twin.state_dict(), strict=True)
    assert torch.equal(logits(skeleton), logits(twin))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("module.conv1.conv.weight", (9, 1, 3, 3)),
        ("module.conv1.conv.weight", (0, 1, 3, 3)),
        ("module.conv1.conv.weight", (4, 1, 5, 3)),
        ("module.conv1.conv.weight", (4, 1)),
        ("module.conv1.norm.weight", (3,)),
        ("module.linear.weight", (2, 10**12)),
    ],
)
def test_sizes_that_no_pruning_gives_are_refused(name, shape):
    classifier = Resnet9(width=8).make(1, 16, 2, 0)
    with pytest.raises(ValueError, match="cannot be pruned to it"):
        shrunken(classifier, state_shapes(classifier) | {name: torch.Size(shape)})


def test_a_grouped_convolution_has_one_size():
    classifier = Classifier(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Flatten()), 2)
    assert state_shapes(shrunken(classifier, state_shapes(classifier))) == state_shapes(classifier)
    with pytest.raises(ValueError, match="cannot be pruned to it"):
        shrunken(classifier, {"module.0.weight": torch.Size((2, 2, 3, 3))})
