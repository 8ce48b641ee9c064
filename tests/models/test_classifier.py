"""The classifier's own precision and normalisation."""

import pytest
import torch

from trilemma.models.specs import Resnet9


def test_bfloat16_is_for_the_block_only_and_leaves_weights_gradients_and_logits_float32():
    classifier = Resnet9(width=4).make(1, 16, 2, seed=0)
    x_BCHW = torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    exact_BK = classifier(x_BCHW)
    with classifier.computing_in(torch.bfloat16):
        rough_BK = classifier(x_BCHW)
    gradients = torch.autograd.grad(rough_BK.sum(), list(classifier.parameters()))
    assert {value.dtype for value in (rough_BK, *gradients, *classifier.parameters())} == {torch.float32}
    torch.testing.assert_close(rough_BK, exact_BK, rtol=0.05, atol=0.02)
    assert not torch.allclose(rough_BK, exact_BK, atol=1e-6)
    assert torch.equal(classifier(x_BCHW), exact_BK)


def test_an_error_within_the_block_ends_it():
    classifier = Resnet9(width=4).make(1, 16, 2, seed=0)
    x_BCHW = torch.rand(2, 1, 16, 16)
    exact_BK = classifier(x_BCHW)
    with pytest.raises(RuntimeError), classifier.computing_in(torch.bfloat16):
        classifier(torch.rand(2, 3, 16, 16))
    assert torch.equal(classifier(x_BCHW), exact_BK)


def test_pixels_are_normalised_by_public_constants():
    classifier = Resnet9(width=4).make(1, 16, 2, seed=0)
    x_BCHW = torch.rand(2, 1, 16, 16)
    assert torch.equal(classifier(x_BCHW), classifier.module((x_BCHW - 0.5) / 0.25))
