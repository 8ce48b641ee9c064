"""The fast engine against the reference, and against networks that it must leave to the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from trilemma.models.classifier import Classifier
from trilemma.models.specs import Monai, Resnet9, Resnet18
from trilemma.models.weight_standardisation import WeightStandardisedConv2d
from trilemma.privacy import bookkeeping, clipping
from trilemma.privacy.bookkeeping import clipped_gradient_sum, why_slow
from trilemma.privacy.clipping_rules import Automatic, Flat, PerLayer
from trilemma.robustness.objectives import mean_cross_entropy

CLASSES = 3


def batch(num: int, views: int = 1, size: int = 16, seed: int = 0):
    draws = torch.Generator().manual_seed(seed)
    return torch.rand(num, views, 1, size, size, generator=draws), torch.randint(CLASSES, (num,), generator=draws)


def stack(*modules: nn.Module) -> Classifier:
    return Classifier(nn.Sequential(*modules), CLASSES)


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


class Residual(nn.Module):
    """Both branches' last layers get the very same gradient, and the activation works in place."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(1, 4, 1)
        self.norm, self.end = nn.GroupNorm(2, 4), nn.Linear(4, CLASSES)

    def forward(self, x):
        h = F.relu(self.norm(self.one(x)), inplace=True) + self.other(x)
        return self.end(h.mean((2, 3)))


class Twice(nn.Module):
    """One layer called twice: its gradients add up before the norm."""

    def __init__(self):
        super().__init__()
        self.start, self.again, self.end = nn.Linear(256, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        h = torch.tanh(self.start(x.flatten(1)))
        return self.end(torch.tanh(self.again(torch.tanh(self.again(h)))))


def half_pruned() -> Classifier:
    """Half of each filter's weights are 0, one filter is empty, and what is computed with is rounded."""
    classifier = Resnet9(width=4, norm="weight").make(1, 16, CLASSES, seed=1)
    for module in classifier.modules():
        if isinstance(module, WeightStandardisedConv2d):
            with torch.no_grad():
                module.weight.masked_fill_(module.weight.abs() < module.weight.abs().median(), 0.0)
                module.weight[1] = 0
                module.gain[2] = -0.5
            module.weight_rounding = lambda weight: (weight * 32).round() / 32
    return classifier


NETS = {
    "resnet9": lambda: Resnet9(width=4).make(1, 16, CLASSES, seed=1),
    "resnet9 wide": lambda: Resnet9(width=32).make(1, 16, CLASSES, seed=1),
    "resnet9 mish": lambda: Resnet9(width=4, activation="mish").make(1, 16, CLASSES, seed=1),
    "resnet9 no norm": lambda: Resnet9(width=4, norm="none").make(1, 16, CLASSES, seed=1),
    "resnet9 weight": lambda: Resnet9(width=4, norm="weight").make(1, 16, CLASSES, seed=1),
    "resnet9 weight, half pruned": half_pruned,
    "resnet18": lambda: Resnet18(width=8).make(1, 16, CLASSES, seed=1),
    "resnet18 weight": lambda: Resnet18(width=4, norm="weight", activation="mish").make(1, 16, CLASSES, seed=1),
    "resnet18 large stem": lambda: Resnet18(width=8, stem="large").make(1, 16, CLASSES, seed=1),
    "residual in place": lambda: seeded(lambda: Classifier(Residual(), CLASSES)),
    "called twice": lambda: seeded(lambda: Classifier(Twice(), CLASSES)),
    "linear": lambda: seeded(lambda: stack(nn.Flatten(), nn.Linear(256, 40), nn.Tanh(), nn.Linear(40, CLASSES))),
}
every_net = pytest.mark.parametrize("name", NETS)


def partly_frozen() -> Classifier:
    classifier = NETS["resnet9"]()
    for parameter in classifier.module.conv1.parameters():
        parameter.requires_grad_(False)
    next(classifier.module.linear.parameters()).requires_grad_(False)
    return classifier


def agree(classifier, x, y, clipper, *, loss=mean_cross_entropy, tolerance=1e-5):
    assert why_slow(classifier, x.shape[2:]) is None
    fast = clipped_gradient_sum(classifier, loss, x, y, clipper)
    exact = clipping.clipped_gradient_sum(classifier, loss, x, y, clipper)
    assert (fast.sum_P - exact.sum_P).norm() <= tolerance * exact.sum_P.norm()
    assert ((fast.norms_BG - exact.norms_BG).abs() <= tolerance * exact.norms_B[:, None]).all()
    torch.testing.assert_close(fast.norms_B, exact.norms_B, rtol=tolerance, atol=0)
    torch.testing.assert_close(fast.losses_B, exact.losses_B)
    return fast


@every_net
@settings(deadline=None, max_examples=6)
@given(num=st.integers(1, 9), views=st.integers(1, 3), clip=st.sampled_from([0.01, 1.0, 1e6]), seed=st.integers(0, 99))
def test_it_is_the_reference_to_float_accuracy(name, num, views, clip, seed):
    # In double precision, so that no activation lies on one side of a kink for one engine and not for the other.
    x, y = batch(num, views, seed=seed)
    agree(NETS[name]().double(), x.double(), y, Flat(clip), tolerance=1e-9)


@every_net
@pytest.mark.parametrize("views", [1, 2])
def test_single_precision_is_enough(name, views):
    size = 64 if name == "resnet18 large stem" else 16
    agree(NETS[name](), *batch(8, views, size), Flat(1.0), tolerance=1e-5)


@every_net
@pytest.mark.parametrize("ghost", [True, False])
def test_in_bfloat16_every_unit_adds_what_was_measured_of_it(name, ghost, monkeypatch):
    classifier, (x, y) = NETS[name](), batch(5, 2, 64 if name == "resnet18 large stem" else 16)
    able = nn.Linear, nn.Conv2d
    monkeypatch.setattr(bookkeeping.layers, "ghost_pays", lambda module, *_: ghost and isinstance(module, able))
    exact = clipped_gradient_sum(classifier, mean_cross_entropy, x, y, Flat(1.0))
    with classifier.computing_in(torch.bfloat16):
        rough = clipped_gradient_sum(classifier, mean_cross_entropy, x, y, Flat(1.0))
        reference = clipping.clipped_gradient_sum(classifier, mean_cross_entropy, x, y, Flat(1.0))
        parts, _ = bookkeeping._parts(classifier, mean_cross_entropy, x, y)
    for unit in range(len(y)):
        one_B = F.one_hot(torch.tensor(unit), len(y)).float()
        added_P = bookkeeping._weighted_sum(parts, one_B[:, None].expand(-1, len(parts)))
        measured = sum(part.squared_norm_B[unit] for part in parts).sqrt()
        assert added_P.dtype == torch.float32
        assert float(added_P.double().norm()) == pytest.approx(float(measured), rel=1e-5)
    torch.testing.assert_close(rough.norms_B, exact.norms_B, rtol=0.1, atol=0)
    torch.testing.assert_close(rough.norms_B, reference.norms_B, rtol=0.1, atol=0)
    assert not torch.allclose(rough.norms_B, exact.norms_B, rtol=1e-5)  # it was not float32 under another name


@pytest.mark.parametrize("clipper", [Flat(0.5), PerLayer(0.5), Automatic(0.5)], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("make", [NETS["resnet9"], NETS["called twice"], partly_frozen], ids=["r9", "twice", "frozen"])
def test_every_clipper(make, clipper):
    agree(make(), *batch(5, 2), clipper)


@every_net
def test_ghost_norms_and_held_gradients_are_the_same(name, monkeypatch):
    classifier, (x, y) = NETS[name](), batch(4, 2)
    able = nn.Linear, nn.Conv2d
    monkeypatch.setattr(bookkeeping.layers, "ghost_pays", lambda module, *_: isinstance(module, able))
    ghost = agree(classifier, x, y, Flat(0.1))
    monkeypatch.setattr(bookkeeping.layers, "ghost_pays", lambda *_: False)
    held = agree(classifier, x, y, Flat(0.1))
    torch.testing.assert_close(ghost.norms_B, held.norms_B, rtol=1e-5, atol=0)


@pytest.mark.parametrize("images", [1, 4, 6])
def test_any_number_in_one_pass_gives_the_same(images, monkeypatch):
    classifier, (x, y) = NETS["resnet9"](), batch(7, 2)
    whole = clipped_gradient_sum(classifier, mean_cross_entropy, x, y, Flat(0.1))
    monkeypatch.setattr(bookkeeping, "MAX_IMAGES", images)
    bookkeeping._VERDICTS.clear()
    parts = clipped_gradient_sum(classifier, mean_cross_entropy, x, y, Flat(0.1))
    torch.testing.assert_close(parts.sum_P, whole.sum_P, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(parts.norms_B, whole.norms_B, rtol=1e-5, atol=0)


def test_an_empty_batch_gives_zeros():
    classifier, (x, y) = NETS["resnet9"](), batch(0)
    result = clipped_gradient_sum(classifier, mean_cross_entropy, x, y, Flat(1.0))
    assert result.sum_P.shape == (sum(p.numel() for p in classifier.parameters()),)
    assert not result.sum_P.any()
    assert result.norms_B.shape == result.losses_B.shape == (0,)


def test_labels_of_single_views_reach_the_loss():
    x, y = batch(4, 2)
    y_BV = torch.stack([y, (y + 1) % CLASSES], dim=1)

    def loss(logits_BVK, y_BV):
        flat = F.cross_entropy(logits_BVK.flatten(0, 1), y_BV.flatten(), reduction="none")
        return flat.unflatten(0, y_BV.shape).mean(1)

    agree(NETS["resnet9"](), x, y_BV, Flat(0.3), loss=loss)


def test_a_record_without_a_finite_gradient_counts_as_zero():
    classifier, (x, y) = NETS["resnet9"](), batch(5)
    x[2] = torch.inf
    fast = clipped_gradient_sum(classifier, mean_cross_entropy, x, y, Flat(0.5))
    sound = torch.tensor([0, 1, 3, 4])
    without = clipped_gradient_sum(classifier, mean_cross_entropy, x[sound], y[sound], Flat(0.5))
    torch.testing.assert_close(fast.sum_P, without.sum_P, rtol=1e-4, atol=1e-7)
    assert not fast.norms_B[2].isfinite()
    assert fast.norms_B[sound].isfinite().all()


def test_it_leaves_no_hook_and_no_gradient():
    classifier, (x, y) = NETS["residual in place"](), batch(3)
    clipped_gradient_sum(classifier, mean_cross_entropy, x, y, Flat(1.0))
    assert all(parameter.grad is None for parameter in classifier.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in classifier.modules())
    with pytest.raises(ZeroDivisionError):
        clipped_gradient_sum(classifier, lambda logits, y: 1 / 0 * logits, x, y, Flat(1.0))
    assert not any(module._forward_hooks for module in classifier.modules())


class Functional(nn.Module):
    """Uses a layer's weight without calling the layer."""

    def __init__(self):
        super().__init__()
        self.start, self.end = nn.Linear(256, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        h = torch.tanh(self.start(x.flatten(1)))
        return self.end(h) + F.linear(h, self.end.weight)


class Turned(nn.Module):
    """Rows that are not images reach a layer."""

    def __init__(self):
        super().__init__()
        self.start, self.end = nn.Linear(16, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        rows = x[:, 0].transpose(0, 1)  # (16 rows, images, 16 columns)
        return self.end(torch.tanh(self.start(rows)).mean(0))


class Mixing(nn.Module):
    """Subtracts the mean over the batch: the reference sees one record at a time, and so must refuse to agree."""

    def __init__(self):
        super().__init__()
        self.start, self.end = nn.Linear(256, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        h = self.start(x.flatten(1))
        return self.end(torch.tanh(h - h.mean(0)))


def tied() -> Classifier:
    first, second = nn.Linear(256, 256), nn.Linear(256, 256)
    second.weight = first.weight
    return stack(nn.Flatten(), first, second, nn.Linear(256, CLASSES))


class WithParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.end = nn.Parameter(torch.ones(256)), nn.Linear(256, CLASSES)

    def forward(self, x):
        return self.end(x.flatten(1) * self.scale)


SLOW = {
    "functional": (lambda: Classifier(Functional(), CLASSES), "differ from the reference"),
    "turned": (lambda: Classifier(Turned(), CLASSES), "one row per image"),
    "tied": (tied, "share a parameter"),
    "own parameter": (lambda: Classifier(WithParameter(), CLASSES), "WithParameter has no rule"),
    "transposed": (
        lambda: stack(nn.ConvTranspose2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 18 * 18, CLASSES)),
        "layer 'module.0': ConvTranspose2d has no rule",
    ),
}


@pytest.mark.parametrize("name", SLOW)
def test_what_the_fast_engine_cannot_do_goes_to_the_reference(name):
    make, reason = SLOW[name]
    classifier, (x, y) = seeded(make), batch(4)
    assert reason in why_slow(classifier, x.shape[2:])
    fast = clipped_gradient_sum(classifier, mean_cross_entropy, x, y, Flat(0.5))
    exact = clipping.clipped_gradient_sum(classifier, mean_cross_entropy, x, y, Flat(0.5))
    assert torch.equal(fast.sum_P, exact.sum_P)


def test_a_network_that_mixes_records_is_found():
    assert "differ from the reference" in why_slow(
        seeded(lambda: Classifier(Mixing(), CLASSES)), torch.Size([1, 16, 16])
    )


VIT = {"patch_size": [8, 8], "hidden_size": 24, "mlp_dim": 32, "num_layers": 1, "num_heads": 2}


@pytest.mark.parametrize(
    ("name", "arguments", "fast"),
    [
        ("DenseNet", {"norm": ["group", {"num_groups": 4}], "block_config": [2, 2], "init_features": 8}, True),
        ("ViT", VIT, False),
    ],
)
def test_monai_networks_agree_one_way_or_the_other(name, arguments, fast):
    classifier = Monai(network=name, arguments=arguments).make(1, 16, CLASSES, seed=0).eval()
    x, y = batch(3)
    assert (why_slow(classifier, x.shape[2:]) is None) == fast
    found = clipped_gradient_sum(classifier, mean_cross_entropy, x, y, Flat(0.5))
    exact = clipping.clipped_gradient_sum(classifier, mean_cross_entropy, x, y, Flat(0.5))
    assert (found.sum_P - exact.sum_P).norm() <= 1e-5 * exact.sum_P.norm()


def test_dropout_and_a_bad_record_leave_the_others_clipped():
    layers_ = nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, CLASSES)
    classifier, (x, y) = seeded(lambda: stack(*layers_)), batch(2)
    x[1] = torch.inf
    assert why_slow(classifier, x.shape[2:]) is None
    for seed in range(20):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            found = clipped_gradient_sum(classifier, mean_cross_entropy, x, y, Flat(1e-3))
        assert found.sum_P.norm() <= 1e-3 * (1 + 1e-5)


def test_only_bad_records_give_zeros():
    classifier, (x, y) = NETS["resnet9"](), batch(3)
    found = clipped_gradient_sum(classifier, mean_cross_entropy, x * torch.inf, y, Flat(1.0))
    assert not found.sum_P.any()
    assert not found.norms_B.isfinite().any()


def test_the_verdict_follows_what_is_trainable():
    classifier = seeded(lambda: Classifier(Functional(), CLASSES))
    classifier.module.end.requires_grad_(False)
    assert why_slow(classifier, torch.Size([1, 16, 16])) is None
    classifier.module.end.requires_grad_(True)
    assert "differ" in why_slow(classifier, torch.Size([1, 16, 16]))


class MixingInTraining(Mixing):
    def forward(self, x):
        return super().forward(x) if self.training else self.end(torch.tanh(self.start(x.flatten(1))))


class HardlyUsed(Functional):
    """A wrong path that is small now and need not stay so."""

    def __init__(self):
        super().__init__()
        self.scale = 3e-4

    def forward(self, x):
        h = torch.tanh(self.start(x.flatten(1)))
        return self.end(h) + self.scale * F.linear(h, self.end.weight)


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.end = nn.Linear(256, CLASSES)

    def forward(self, x):
        return self.end(input=x.flatten(1))


@pytest.mark.parametrize(
    ("module", "reason"),
    [(MixingInTraining, "differ"), (HardlyUsed, "differ"), (ByKeyword, "cannot follow its forward pass")],
)
def test_what_hides_is_found(module, reason):
    assert reason in why_slow(seeded(lambda: Classifier(module(), CLASSES)), torch.Size([1, 16, 16]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_net
def test_a_gpu_gives_the_same_sum(name, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    classifier, (x, y) = NETS[name](), batch(5)
    expected = clipped_gradient_sum(classifier, mean_cross_entropy, x, y, Flat(0.1))
    found = clipped_gradient_sum(classifier.cuda(), mean_cross_entropy, x.cuda(), y.cuda(), Flat(0.1))
    torch.testing.assert_close(found.norms_B.cpu(), expected.norms_B, rtol=1e-4, atol=0)
    assert (found.sum_P.cpu() - expected.sum_P).norm() <= 1e-4 * expected.sum_P.norm()


class Draws(nn.Module):
    """Dropout without a layer of its own: what the probe cannot switch off."""

    def __init__(self):
        super().__init__()
        self.end = nn.Linear(256, CLASSES)

    def forward(self, x):
        return self.end(F.dropout(x.flatten(1), 0.2, self.training))


def test_a_probe_takes_nothing_from_the_trainings_random_numbers():
    """Else a resumed training, which probes anew, would go on with other masks and the same noise."""
    classifier, (x, y) = seeded(lambda: Classifier(Draws(), CLASSES)).train(), batch(4)
    with torch.random.fork_rng():
        sums = []
        for _ in range(2):  # probed in the first turn only
            torch.manual_seed(5)
            sums.append(clipped_gradient_sum(classifier, mean_cross_entropy, x, y, Flat(0.5)).sum_P)
            after = torch.get_rng_state()
        torch.manual_seed(5)
        bookkeeping._VERDICTS.clear()
        clipped_gradient_sum(classifier, mean_cross_entropy, x, y, Flat(0.5))
        assert torch.get_rng_state().equal(after)
    assert sums[0].equal(sums[1])


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_record_without_a_finite_gradient_leaves_the_others_as_they_are(precision):
    classifier, (x, y) = Resnet9(width=16).make(1, 16, CLASSES, seed=1), batch(33)
    sound = torch.arange(33) != 7
    with classifier.computing_in(precision):
        without = clipped_gradient_sum(classifier, mean_cross_entropy, x[sound], y[sound], Flat(0.5))
        x[7] = torch.nan
        found = clipped_gradient_sum(classifier, mean_cross_entropy, x, y, Flat(0.5))
    assert found.sum_P.equal(without.sum_P)
    assert found.norms_B[sound].equal(without.norms_B) and not found.norms_B[7].isfinite()
    assert found.losses_B[sound].equal(without.losses_B) and not found.losses_B[7].isfinite()


def cancelling(module: nn.Module, rel: float, seed: int):
    """Two views of each of three units, alike but for `rel`, whose output gradients are opposite."""
    draws = torch.Generator().manual_seed(seed)
    if isinstance(module, nn.Embedding):
        x = torch.randint(4, (3, 2, 6), generator=draws)
        g = torch.randn(3, 1, 6, module.embedding_dim, generator=draws)
        x[:, 1] = x[:, 0]
        return x, torch.cat([g, -g + rel * torch.randn(g.shape, generator=draws)], 1)
    shape = (module.in_features,) if isinstance(module, nn.Linear) else (module.in_channels, 2, 2)
    outputs = (module.out_features,) if isinstance(module, nn.Linear) else (module.out_channels, 2, 2)
    x = 0.5 + torch.rand(3, 1, *shape, generator=draws)
    g = torch.randn(3, 1, *outputs, generator=draws)
    other = x + rel * x.norm() / x.numel() ** 0.5 * torch.randn(x.shape, generator=draws)
    return torch.cat([x, other], 1), torch.cat([g, -g], 1)


CANCELLING = {
    "linear": lambda: nn.Linear(512, 512),
    "convolution": lambda: nn.Conv2d(256, 256, 3, padding=1),
    "wide convolution": lambda: nn.Conv2d(64, 64, 7, padding=3),
    "embedding": lambda: nn.Embedding(4, 200),
}


@pytest.mark.parametrize("name", CANCELLING)
@settings(max_examples=25)
@given(rel=st.floats(-3, 0).map(lambda exponent: 10.0**exponent), seed=st.integers(0, 100))
def test_norms_keep_their_digits_where_gradients_cancel(name, rel, seed):
    """Around the threshold too. What float32 itself takes from a difference of large numbers is allowed for."""
    module = seeded(CANCELLING[name])
    x, g = cancelling(module, rel, seed)
    assert bookkeeping.layers.ghost_pays(module, x, g)
    part = bookkeeping._layer_parts(module, [(x, g)])[id(module.weight)]
    exact_BP = bookkeeping.layers.per_unit_gradients(seeded(CANCELLING[name]).double(), *double(x, g), ["weight"])
    exact_B = exact_BP["weight"].norm(dim=1)
    added = (x.flatten(1).double().norm(dim=1) if x.is_floating_point() else 6.0) * g.flatten(1).double().norm(dim=1)
    allowed_B = 1e-5 * exact_B + 3e-7 * added
    assert ((part.squared_norm_B.double().sqrt() - exact_B).abs() <= allowed_B).all()
    # And what is added of each unit is what was measured of it.
    for unit in range(3):
        with torch.no_grad():
            sum_P = part.weighted_sum(torch.eye(3)[unit])
        norm = part.squared_norm_B[unit].double().sqrt()
        assert abs(sum_P.double().norm() - norm) <= 1e-5 * norm


def test_many_positions_alone_lose_no_digits():
    """Their ghost norm is small beside the product of its factors because they point anywhere."""
    module, draws = seeded(lambda: nn.Linear(1024, 1024)), torch.Generator().manual_seed(0)
    x, g = torch.randn(2, 1, 197, 1024, generator=draws), torch.randn(2, 1, 197, 1024, generator=draws)
    squared_B = bookkeeping.layers.ghost_squared_norm(module, x, g)
    assert bookkeeping.layers.ghost_pays(module, x, g)
    assert (squared_B < bookkeeping.layers.CANCELLATION * x.square().sum((1, 2, 3)) * g.square().sum((1, 2, 3))).all()
    assert not bookkeeping.layers.ghost_lost_digits(module, x, g, squared_B).any()


def double(x, g):
    return x.double() if x.is_floating_point() else x, g.double()
