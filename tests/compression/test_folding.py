import copy

import torch
from torch import nn

from trilemma.compression.folding import fold_batch_norms, fold_weight_standardisation, is_identity
from trilemma.models.classifier import Classifier
from trilemma.models.weight_standardisation import WeightStandardisedConv2d


def _uneven(network):
    """Gives batch norms statistics that matter."""
    g = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=g))
            module.running_var.copy_(0.2 + torch.rand(module.num_features, generator=g))
            if module.affine:
                with torch.no_grad():
                    module.weight.copy_(0.5 + torch.rand(module.num_features, generator=g))
                    module.bias.copy_(torch.randn(module.num_features, generator=g))
    return network.eval()


class _ReadTwice(nn.Module):
    """A convolution whose output goes around its batch norm as well."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return (self.norm(y) + y).amax((2, 3))


def test_folding_keeps_the_function_and_leaves_identities(batch_norm_net, residual_net, records):
    x = records.x(slice(16))
    for net in (batch_norm_net, residual_net):
        folded = copy.deepcopy(net)
        num_norms = sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
        assert fold_batch_norms(folded, x[:2]) == num_norms > 0
        assert sum(is_identity(module) for module in folded.modules()) == num_norms
        assert not any(is_identity(module) for module in net.modules())
        with torch.no_grad():
            assert torch.allclose(folded(x), net(x), atol=1e-3 * float(net(x).abs().max()))


def test_every_kind_of_pair_folds():
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 8, 3, groups=2),
        nn.BatchNorm2d(8, affine=False),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
    )
    classifier = Classifier(_uneven(network), 8).eval()
    folded = copy.deepcopy(classifier)
    assert fold_batch_norms(folded, torch.rand(2, 1, 8, 8)) == 2
    x = torch.rand(5, 1, 8, 8)
    assert torch.allclose(folded(x), classifier(x), atol=1e-4)


def test_a_convolution_that_is_read_elsewhere_is_left_alone():
    classifier = Classifier(_uneven(_ReadTwice()), 4).eval()
    before = copy.deepcopy(classifier.state_dict())
    assert fold_batch_norms(classifier, torch.rand(2, 1, 8, 8)) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.state_dict().items())


def test_a_batch_norm_before_its_convolution_is_left_alone():
    network = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 4, 3), nn.AdaptiveMaxPool2d(1), nn.Flatten())
    classifier = Classifier(_uneven(network), 4).eval()
    assert fold_batch_norms(classifier, torch.rand(2, 1, 8, 8)) == 0
    assert classifier.module[1].bias is not None


def test_batch_statistics_and_shared_layers_are_left_alone():
    shared = nn.Conv2d(1, 1, 3, padding=1)
    network = nn.Sequential(
        shared, nn.BatchNorm2d(1), shared, nn.BatchNorm2d(1), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten()
    )
    network[5] = nn.BatchNorm2d(4, track_running_stats=False)
    classifier = Classifier(network, 4).eval()
    assert fold_batch_norms(classifier, torch.rand(2, 1, 8, 8)) == 0


def test_standardised_weights_become_plain_ones(standardised_net, records):
    x, folded = records.x(slice(16)), copy.deepcopy(standardised_net)
    assert fold_weight_standardisation(folded) == 8
    assert {type(m) for m in folded.modules() if isinstance(m, nn.Conv2d)} == {nn.Conv2d}
    assert not any("gain" in name for name in folded.state_dict())
    assert not folded.training and all(not module.training for module in folded.modules())
    with torch.no_grad():
        assert torch.equal(folded(x), standardised_net(x))
    assert fold_weight_standardisation(folded) == 0
    assert sum(isinstance(m, WeightStandardisedConv2d) for m in standardised_net.modules()) == 8


def test_a_standardised_layer_in_two_places_stays_one_layer():
    shared = WeightStandardisedConv2d(1, 1, 3, padding=1)
    block = nn.Sequential(shared, nn.ReLU())
    classifier = Classifier(nn.Sequential(block, shared, block, nn.Flatten()), 64)
    x = torch.rand(2, 1, 8, 8)
    expected = classifier(x)
    assert fold_weight_standardisation(classifier) == 1
    assert classifier.module[0][0] is classifier.module[1] is classifier.module[2][0]
    assert type(classifier.module[1]) is nn.Conv2d
    assert torch.equal(classifier(x), expected)


def test_a_network_that_is_one_standardised_layer_folds():
    classifier = Classifier(WeightStandardisedConv2d(1, 2, 3), 2)
    assert fold_weight_standardisation(classifier) == 1
    assert type(classifier.module) is nn.Conv2d
