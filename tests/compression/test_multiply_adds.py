import copy

import pytest
import torch
from torch import nn

from trilemma.compression.fake_quantisation import quantise
from trilemma.compression.multiply_adds import multiply_adds, multiply_adds_by_layer
from trilemma.models.classifier import Classifier
from trilemma.models.specs import Resnet9, Resnet18


def classifier_of(*layers):
    return Classifier(nn.Sequential(*layers), 2)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Conv2d(3, 4, 3, padding=1), 8 * 10 * 4 * 3 * 9),
        (nn.Conv2d(3, 4, 3), 6 * 8 * 4 * 3 * 9),
        (nn.Conv2d(3, 4, (1, 3), padding="same", bias=False), 8 * 10 * 4 * 3 * 3),
        (nn.Conv2d(3, 4, 3, stride=2, padding=1), 4 * 5 * 4 * 3 * 9),
        (nn.Conv2d(3, 4, 3, dilation=2), 4 * 6 * 4 * 3 * 9),
        (nn.Conv2d(3, 6, 3, padding=1, groups=3), 8 * 10 * 6 * 1 * 9),
        (nn.Linear(10, 7), 3 * 8 * 10 * 7),  # a row for each channel and line
    ],
)
def test_one_layer_by_hand(layer, expected):
    assert multiply_adds(classifier_of(layer, nn.Flatten()), (3, 8, 10)) == expected


def test_a_small_network_by_hand():
    layers = (nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    classifier = classifier_of(*layers, nn.Linear(4 * 16, 5))
    assert multiply_adds(classifier, (1, 8, 8)) == 64 * 4 * 9 + 64 * 5


def test_a_layer_that_is_called_twice_counts_twice_and_one_that_is_not_called_not_at_all():
    shared = nn.Conv2d(2, 2, 3, padding=1)
    classifier = classifier_of(shared, nn.ReLU(), shared, nn.Flatten())
    classifier.unused = nn.Linear(5, 5)
    assert multiply_adds(classifier, (2, 4, 4)) == 2 * 16 * 2 * 2 * 9
    assert multiply_adds_by_layer(classifier, (2, 4, 4)) == {"module.0": 2 * 16 * 2 * 2 * 9, "unused": 0}


def test_the_published_resnet18_has_its_published_count():
    # He et al. (2016), table 1: 1.8e9; counted by hand from its layers, with 1000 classes and 3 channels.
    stage1 = 4 * 56**2 * 64 * 64 * 9
    others = sum(s**2 * c * (c // 2 * 9 + 3 * c * 9 + c // 2) for s, c in ((28, 128), (14, 256), (7, 512)))
    by_hand = 112**2 * 64 * 3 * 49 + stage1 + others + 512 * 1000
    assert 1.80e9 < by_hand < 1.83e9
    narrow = multiply_adds(Resnet18(width=4, stem="large").make(3, 64, 5, 0), (3, 64, 64))
    stage1 = 4 * 16**2 * 4 * 4 * 9
    others = sum(s**2 * c * (c // 2 * 9 + 3 * c * 9 + c // 2) for s, c in ((8, 8), (4, 16), (2, 32)))
    assert narrow == 32**2 * 4 * 3 * 49 + stage1 + others + 32 * 5


class _Standardised(nn.Conv2d):
    def forward(self, input):
        return self._conv_forward(input, self.weight - self.weight.mean(), self.bias)


def test_subclasses_count_like_their_base():
    assert multiply_adds(classifier_of(_Standardised(1, 4, 3), nn.Flatten()), (1, 5, 5)) == 9 * 4 * 9
    classifier = Resnet9(width=4).make(1, 8, 2, 0)
    twin = quantise(classifier, torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert multiply_adds(twin, (1, 8, 8)) == multiply_adds(classifier, (1, 8, 8))


def test_counting_changes_nothing():
    classifier = Resnet9(width=4, norm="batch").make(1, 8, 2, 0).train()
    before = copy.deepcopy(classifier.state_dict())
    multiply_adds(classifier, (1, 8, 8))
    assert classifier.training
    assert not any(layer._forward_hooks for layer in classifier.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.state_dict().items())
