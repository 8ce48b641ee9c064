"""Which channels belong together, and what is left alone because nobody knows."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from trilemma.compression.channel_spaces import channel_spaces
from trilemma.compression.channels import prune_channels
from trilemma.compression.multiply_adds import multiply_adds
from trilemma.models.classifier import Classifier
from trilemma.models.specs import Resnet9, Resnet18

IMAGE = (1, 8, 8)


def test_resnet9_has_a_stream_around_each_residual_block():
    spaces = channel_spaces(Resnet9(width=16).make(1, 8, 2, 0), IMAGE)
    written = {name: place for name, (_, place) in spaces.layers.items()}
    assert written["module.conv2.conv"] == written["module.res1.1.conv"] != written["module.res1.0.conv"]
    assert written["module.conv4.conv"] == written["module.res2.1.conv"] != written["module.res2.0.conv"]
    assert [(s.size, s.unit, s.frozen) for s in spaces.spaces] == [
        (1, 1, True),  # the image
        *((size, 4, False) for size in (16, 32, 32, 64, 64, 64)),
        (2, 1, True),  # the logits
    ]


def test_resnet18_shares_a_stream_per_stage():
    spaces = channel_spaces(Resnet18(width=4, norm="batch").make(1, 8, 2, 0), IMAGE)
    written = {name: place for name, (_, place) in spaces.layers.items()}
    one = ["module.stem.0", "module.stage1.0.conv2", "module.stage1.1.conv2"]
    two = ["module.stage2.0.conv2", "module.stage2.0.shortcut.0", "module.stage2.1.conv2"]
    assert len({written[name] for name in one}) == len({written[name] for name in two}) == 1
    assert len(set(written.values())) == 4 * 3 + 1
    assert [space.frozen for space in spaces.spaces] == [True] + [False] * 12 + [True]


class _Standardised(nn.Conv2d):
    """Removing an input would change every weight."""

    def forward(self, input):
        return self._conv_forward(input, self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True), self.bias)


class _Net(nn.Module):
    """Two convolutions, something in between, global pooling and a linear layer."""

    def __init__(self, between, channels=8, **layers):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.linear = nn.Linear(channels, 2)
        self.between = between
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.linear(self.between(self, torch.relu(self.conv1(x))).amax(dim=(2, 3)))


def _viewed(net, h):
    return net.conv2(h).mean(dim=(2, 3)).view(-1, 8, 1, 1)


def _attended(net, h):
    a = net.conv2(h).flatten(2)
    return (a @ a.transpose(1, 2) @ a).reshape(h.shape)


FREEZING = {
    "concatenation": (lambda net, h: torch.cat([net.conv2(h), h], 1), {"channels": 16}),
    "a slice": (lambda net, h: net.conv2(h)[:, :4] * h[:, 4:], {"channels": 4}),
    "a product over channels": (_attended, {}),
    "a softmax over channels": (lambda net, h: F.softmax(net.conv2(h) + h, dim=1), {}),
    "a mean over channels": (lambda net, h: net.conv2(h) * h.mean(dim=1, keepdim=True) * h, {}),
    "nothing but a mean over channels": (
        lambda net, h: (net.conv2(h) + h).mean(dim=1, keepdim=True),
        {"channels": 1},
    ),
    "a mean over everything": (lambda net, h: net.conv2(h) * h.mean() * h, {}),
    "a reshape with a number": (lambda net, h: _viewed(net, h) * h, {}),
    "a parameter of the network's own": (lambda net, h: net.conv2(h) + net.scale * h, {}),
    "a number made of the channels": (lambda net, h: (net.conv2(h) + h) * h.shape[1], {}),
    "a grouped convolution": (lambda net, h: net.group(net.conv2(h)) + h, {"group": nn.Conv2d(8, 8, 1, groups=2)}),
    "a depthwise convolution": (lambda net, h: net.group(net.conv2(h)) + h, {"group": nn.Conv2d(8, 8, 1, groups=8)}),
    "a subclass": (lambda net, h: net.own(net.conv2(h)) + h, {"own": _Standardised(8, 8, 1)}),
    "a norm over layers": (lambda net, h: net.norm(net.conv2(h) + h), {"norm": nn.LayerNorm([8, 8, 8])}),
    "a norm that no state tells of": (
        lambda net, h: net.norm(net.conv2(h) + h),
        {"norm": nn.GroupNorm(2, 8, affine=False)},
    ),
    "a linear layer on pictures": (lambda net, h: net.wide(net.conv2(h) + h), {"wide": nn.Linear(8, 8)}),
    "an activation with a number for each channel": (lambda net, h: net.act(net.conv2(h) + h), {"act": nn.PReLU(8)}),
    "shuffled channels": (lambda net, h: net.shuffle(net.conv2(h) + h), {"shuffle": nn.ChannelShuffle(2)}),
}


@pytest.mark.parametrize(("between", "layers"), FREEZING.values(), ids=FREEZING)
def test_what_is_not_understood_keeps_its_channels(between, layers):
    net = _Net(between, **layers)
    net.scale = nn.Parameter(torch.ones(8, 1, 1))
    classifier = Classifier(net, 2).eval()
    spaces = channel_spaces(classifier, IMAGE)
    assert all(space.frozen for space in spaces.spaces)
    assert multiply_adds(prune_channels(classifier, 1.0, IMAGE), IMAGE) == multiply_adds(classifier, IMAGE)


def _sum_in_place(net, h):
    a = net.conv2(h)
    a += h
    return a


UNDERSTOOD = {
    "a sum in place": _sum_in_place,
    "a sum": lambda net, h: net.conv2(h) + h,
    "a difference": lambda net, h: net.conv2(h) - h,
    "a gate": lambda net, h: torch.sigmoid(net.conv2(h).mean((2, 3), keepdim=True)) * h,
    "a factor": lambda net, h: torch.tanh(0.5 * (net.conv2(h) + h) + 1),
    "a layer that is called again": lambda net, h: net.conv2(torch.relu(net.conv2(h)) + h) + h,
    "pooling and padding": lambda net, h: F.avg_pool2d(net.pad(net.conv2(h) + h), 2),
    "a reshape by its own sizes": lambda net, h: net.conv2(h).mean((2, 3)).view(h.shape[0], h.size(1), 1, 1) * 1.5,
}


@pytest.mark.parametrize("between", UNDERSTOOD.values(), ids=UNDERSTOOD)
def test_what_works_on_each_channel_alone_joins_and_keeps(between):
    classifier = Classifier(_Net(between, pad=nn.ZeroPad2d(1)), 2).eval()
    spaces = channel_spaces(classifier, IMAGE)
    assert [space.size for space in spaces.spaces if not space.frozen] == [8]
    small = prune_channels(classifier, 0.7, IMAGE)  # which compares the two networks
    assert small.module.conv2.weight.shape[:2] == (small.module.conv1.out_channels,) * 2
    assert small.module.linear.in_features == small.module.conv1.out_channels < 8


def test_what_one_layer_reads_in_two_places_is_one_space():
    net = _Net(lambda net, h: net.conv2(h) + net.conv2(net.third(h)), third=nn.Conv2d(8, 8, 1))
    spaces = channel_spaces(Classifier(net, 2).eval(), IMAGE)
    assert spaces.layers["module.third"] == (spaces.layers["module.conv1"][1],) * 2
    assert [space.size for space in spaces.spaces if not space.frozen] == [8, 8]
    prune_channels(Classifier(net, 2).eval(), 0.5, IMAGE)


class _TwoWays(nn.Module):
    """A linear layer on channels, and once more on the lines of a picture."""

    def __init__(self):
        super().__init__()
        self.conv, self.both, self.linear = nn.Conv2d(1, 8, 3), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        pooled = self.both(self.conv(x).amax(dim=(2, 3)))
        return self.linear(torch.relu(pooled)) + self.both(x).mean(dim=(1, 2))[:, :2]


def test_a_layer_that_is_once_called_in_a_way_that_is_not_understood_stays_in_all_calls():
    spaces = channel_spaces(Classifier(_TwoWays(), 2).eval(), IMAGE)
    assert all(space.frozen for space in spaces.spaces)
    assert "module.both" in spaces.layers


def test_layers_that_share_a_weight_stay():
    net = _Net(lambda net, h: net.third(torch.relu(net.conv2(h))), third=nn.Conv2d(8, 8, 3))
    net.third.weight = net.conv2.weight
    assert all(space.frozen for space in channel_spaces(Classifier(net, 2).eval(), IMAGE).spaces)


def test_a_layer_with_a_hook_stays():
    net = _Net(lambda net, h: net.conv2(h) + h)
    net.conv2.register_forward_pre_hook(lambda layer, inputs: None)
    assert all(space.frozen for space in channel_spaces(Classifier(net, 2).eval(), IMAGE).spaces)


def test_a_linear_layer_after_a_flattened_picture_reads_no_channels():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    assert all(space.frozen for space in channel_spaces(Classifier(network, 2).eval(), IMAGE).spaces)


def test_a_network_that_branches_on_values_is_refused_with_the_reason():
    def between(net, h):
        return net.conv2(h) if h.mean() > 0 else h

    with pytest.raises(ValueError, match=r"the network cannot be traced \(.*control flow.*\)\.$"):
        channel_spaces(Classifier(_Net(between), 2).eval(), IMAGE)


def test_code_that_depends_on_its_channels_unseen_is_refused():
    def between(net, h):
        return (net.conv2(h) + h) * net.conv1.out_channels

    with pytest.raises(ValueError, match="depends on the number of its channels"):
        prune_channels(Classifier(_Net(between), 2).eval(), 0.6, IMAGE)


def test_tracing_leaves_the_network_as_it_was():
    classifier = Resnet9(width=4, norm="batch").make(1, 8, 2, 0).train()
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    channel_spaces(classifier, IMAGE)
    assert classifier.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.state_dict().items())
