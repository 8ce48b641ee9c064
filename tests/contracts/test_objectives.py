"""What every training objective promises, above all that a record's loss is its own."""

from typing import get_args

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.pgd import pgd
from trilemma.models.classifier import Classifier
from trilemma.models.specs import Resnet9
from trilemma.models.vector import get_buffers, get_params
from trilemma.robustness.objectives import mean_cross_entropy
from trilemma.robustness.specs import DefenceSpec, FgsmTraining, NoDefence, PgdTraining

DEFENCES = [
    NoDefence(),
    FgsmTraining(),
    FgsmTraining(norm="l2", radius=0.5, fraction=0.5),
    PgdTraining(steps=2),
    PgdTraining(norm="l2", radius=0.5, steps=2, step_size=0.7, fraction=0.5),
]
every_defence = pytest.mark.parametrize("spec", DEFENCES, ids=lambda spec: spec.label)
BATCH = 6


def setting(seed: int = 0, norm: str = "group"):
    generator = torch.Generator().manual_seed(seed)
    classifier = Resnet9(width=4, norm=norm).make(1, 16, 3, seed=1)
    x = torch.rand(BATCH, 1, 16, 16, generator=generator)
    return classifier, x, torch.randint(0, 3, (BATCH,), generator=generator)


def crafted(spec, classifier, x, y, seed=0):
    return spec.make().views(classifier, x, y, torch.Generator().manual_seed(seed))


def losses(spec, classifier, x, y, seed=0):
    views = crafted(spec, classifier, x, y, seed)
    logits = classifier(views.flatten(0, 1)).view(*views.shape[:2], -1)
    return spec.make().loss(logits, y)


def test_every_member_is_here():
    assert set(get_args(get_args(DefenceSpec)[0])) == {type(spec) for spec in DEFENCES}


@every_defence
def test_views_and_losses_have_one_row_per_record(spec):
    classifier, x, y = setting()
    views = crafted(spec, classifier, x, y)
    assert views.shape == (BATCH, 1, 1, 16, 16)
    assert not views.requires_grad
    assert views.min() >= 0
    assert views.max() <= 1
    if not isinstance(spec, NoDefence):
        delta = (views[:, 0] - x).flatten(1)
        length = delta.abs().amax(1) if spec.norm == "linf" else delta.norm(dim=1)
        assert (length <= spec.radius * (1 + 1e-5)).all()
        assert (length > 0).any()
    assert losses(spec, classifier, x, y).shape == (BATCH,)


@every_defence
def test_a_records_loss_does_not_depend_on_the_others(spec):
    classifier, x, y = setting()
    classifier = classifier.double()
    x = x.double()
    _, x_other, y_other = setting(seed=1)
    x_mixed, y_mixed = x_other.double(), y_other.clone()
    x_mixed[2], y_mixed[2] = x[2], y[2]
    assert torch.allclose(losses(spec, classifier, x, y)[2], losses(spec, classifier, x_mixed, y_mixed)[2], atol=1e-9)


@every_defence
def test_the_generator_alone_decides(spec):
    classifier, x, y = setting()
    first = crafted(spec, classifier, x, y)
    torch.manual_seed(5)
    assert torch.equal(crafted(spec, classifier, x, y), first)
    assert torch.equal(crafted(spec, classifier, x, y, seed=1), first) == isinstance(spec, NoDefence)


@every_defence
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_crafting_leaves_the_classifier_as_found(spec, norm):
    classifier, x, y = setting(norm=norm)
    params, buffers = get_params(classifier), get_buffers(classifier)
    crafted(spec, classifier, x, y)
    assert classifier.training
    assert all(module.training for module in classifier.modules())
    assert all(p.requires_grad and p.grad is None for p in classifier.parameters())
    assert torch.equal(get_params(classifier), params)
    assert torch.equal(get_buffers(classifier), buffers)


@pytest.mark.parametrize("member", [FgsmTraining, PgdTraining])
@pytest.mark.parametrize("fields", [{"fraction": 0}, {"radius": 0}], ids=str)
def test_nothing_adversarial_is_plain_training_bit_for_bit(member, fields):
    classifier, x, y = setting()
    spec = member(**fields)
    assert torch.equal(crafted(spec, classifier, x, y), x[:, None])
    plain = F.cross_entropy(classifier(x), y, reduction="none")
    assert torch.allclose(losses(spec, classifier, x, y), plain, atol=1e-6)
    assert torch.equal(losses(spec, classifier, x, y), losses(NoDefence(), classifier, x, y))


def test_plain_training_is_the_cross_entropy():
    classifier, x, y = setting()
    F.cross_entropy(classifier(x), y).backward()
    expected = [parameter.grad.clone() for parameter in classifier.parameters()]
    classifier.zero_grad()
    losses(NoDefence(), classifier, x, y).mean().backward()
    for parameter, gradient in zip(classifier.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-7)


def test_the_fraction_is_drawn_for_each_record():
    classifier = Resnet9(width=4).make(1, 8, 2, seed=0)
    x, y = torch.rand(1000, 1, 8, 8), torch.zeros(1000, dtype=torch.int64)
    views = crafted(FgsmTraining(fraction=0.3), classifier, x, y)
    changed = (views[:, 0] != x).flatten(1).any(1)
    assert abs(float(changed.float().mean()) - 0.3) < 5 * (0.21 / 1000) ** 0.5
    assert crafted(FgsmTraining(fraction=0.3), classifier, x[:0], y[:0]).shape == (0, 1, 1, 8, 8)


def test_several_views_are_averaged():
    logits = torch.randn(4, 3, 5)
    y = torch.tensor([0, 4, 2, 1])
    naive = [
        sum(float(F.cross_entropy(view, label)) for view in views) / 3 for views, label in zip(logits, y, strict=True)
    ]
    assert torch.allclose(mean_cross_entropy(logits, y), torch.tensor(naive), atol=1e-6)


@every_defence
def test_per_record_gradients_under_vmap_match_a_loop(spec):
    classifier, x, y = setting()
    classifier, x = classifier.double(), x.double()
    views = crafted(spec, classifier, x, y)
    loss = spec.make().loss
    parameters = {name: p.detach() for name, p in classifier.named_parameters()}

    def record_loss(parameters, views_VCHW, label):
        return loss(functional_call(classifier, parameters, (views_VCHW,))[None], label[None])[0]

    fast = vmap(grad(record_loss), in_dims=(None, 0, 0))(parameters, views, y)
    for i in range(BATCH):
        classifier.zero_grad()
        F.cross_entropy(classifier(views[i]), y[i : i + 1]).backward()
        for name, parameter in classifier.named_parameters():
            assert torch.allclose(fast[name][i], parameter.grad, atol=1e-10), name


@pytest.mark.parametrize("defence", [FgsmTraining(radius=0.1), PgdTraining(radius=0.1, steps=3)], ids=lambda d: d.kind)
def test_adversarial_training_drops_the_features_that_do_not_hold(defence):
    # Tsipras et al. (2019), section 2: one strong feature that is right in 9 of 10 images, and many weak ones that
    # together are always right but lie within the radius. Plain training leans on those and falls under attack.
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 2, (400,), generator=generator)
    sign = (2.0 * y - 1.0)[:, None]
    x = 0.5 + 0.05 * sign + 0.04 * torch.randn(400, 64, generator=generator)
    held = torch.where(torch.rand(400, generator=generator) < 0.9, 1.0, -1.0)
    x[:, 0] = 0.5 + 0.4 * sign[:, 0] * held
    x = x.clamp(0, 1).view(400, 1, 8, 8)
    robust = {}
    for spec in (NoDefence(), defence):
        classifier = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), 2)
        nn.init.zeros_(classifier.module[1].weight)
        optimizer = torch.optim.Adam(classifier.parameters(), lr=0.05)
        for step in range(60):
            optimizer.zero_grad()
            losses(spec, classifier, x, y, seed=step).mean().backward()
            optimizer.step()
        attacked = pgd(classifier, x, y, Budget("linf", 0.1), torch.Generator().manual_seed(1), steps=10)
        robust[spec.kind] = float((classifier(attacked).argmax(1) == y).float().mean())
    assert robust["none"] < 0.2
    assert robust[defence.kind] > 0.85


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "pgd", "radius": 4}, "beyond 1"),
        ({"kind": "fgsm", "radius": -0.1}, "greater than or equal to 0"),
        ({"kind": "pgd", "steps": 0}, "greater than or equal to 1"),
        ({"kind": "fgsm", "fraction": 1.5}, "less than or equal to 1"),
        ({"kind": "fgsm", "norm": "l1"}, "'linf' or 'l2'"),
        ({"kind": "trades"}, "'none', 'fgsm', 'pgd'"),
    ],
)
def test_impossible_values_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(DefenceSpec).validate_python(fields)


def test_labels():
    assert [spec.label for spec in DEFENCES] == [
        "none",
        "FGSM training Linf 4/255",
        "FGSM training L2 0.5 (50 %)",
        "PGD-2 training Linf 4/255",
        "PGD-2 step 0.7 training L2 0.5 (50 %)",
    ]


@pytest.mark.parametrize("member", [FgsmTraining, PgdTraining])
@pytest.mark.parametrize(("progress", "share"), [(0.0, 0.0), (0.1, 0.25), (0.4, 1.0), (1.0, 1.0)])
def test_the_radius_grows_during_the_warm_up(member, progress, share):
    classifier, x, y = setting()
    spec = member(radius=8 / 255, warmup=0.4)
    views = spec.make(progress).views(classifier, x, y, torch.Generator().manual_seed(0))
    same_radius = member(radius=share * 8 / 255)
    assert torch.equal(views, crafted(same_radius, classifier, x, y))
