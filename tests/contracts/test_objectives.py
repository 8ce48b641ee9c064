"""What every training objective promises, above all that a record's loss is its own."""

from functools import partial
from typing import get_args

import pytest
import torch
from opacus import GradSampleModule
from pydantic import TypeAdapter, ValidationError
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from helpers.tiny_federation import DP, tiny_federation
from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.pgd import pgd
from trilemma.attacks.evasion.specs import Apgd, Fgsm, MiFgsm, Pgd
from trilemma.federation import local_training
from trilemma.federation.round import run_round
from trilemma.federation.training import initial_state
from trilemma.models.classifier import Classifier
from trilemma.models.specs import Resnet9
from trilemma.models.vector import get_buffers, get_params
from trilemma.privacy import bookkeeping, clipping
from trilemma.privacy.clipping_rules import Flat
from trilemma.robustness.objective import Objective
from trilemma.robustness.objectives import mean_cross_entropy
from trilemma.robustness.specs import (
    AdversarialTraining,
    DefenceSpec,
    FgsmTraining,
    Mart,
    NFgsmTraining,
    NoDefence,
    PgdTraining,
    Trades,
)

DEFENCES = [
    NoDefence(),
    FgsmTraining(),
    FgsmTraining(norm="l2", radius=0.5, fraction=0.5),
    PgdTraining(steps=2),
    PgdTraining(norm="l2", radius=0.5, steps=2, step_size=0.7, fraction=0.5),
    NFgsmTraining(),
    NFgsmTraining(norm="l2", radius=0.5, noise=1, step_size=0.5, fraction=0.5),
    Trades(steps=2),
    Trades(norm="l2", radius=0.5, steps=2, step_size=0.7, beta=2),
    Mart(steps=2),
    Mart(norm="l2", radius=0.5, steps=2, step_size=0.7, beta=2),
    AdversarialTraining(attack=Fgsm(radii=(4 / 255,))),
    AdversarialTraining(attack=Pgd(radii=(4 / 255,), steps=2, restarts=2, loss="margin")),
    AdversarialTraining(attack=MiFgsm(radii=(4 / 255,), steps=2)),
    AdversarialTraining(attack=Apgd(norm="l2", radii=(0.5,), steps=3), fraction=0.5),
]
#: Those that begin at the clean image and replace every record: nothing is drawn.
DRAWS_NOTHING = [spec for spec in DEFENCES if spec.kind == "none"] + [
    spec for spec in DEFENCES if spec.kind == "adversarial" and spec.attack.kind in ("fgsm", "mifgsm")
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
    assert views.shape == (BATCH, 2 if spec.kind in ("trades", "mart") else 1, 1, 16, 16)
    assert not views.requires_grad
    assert views.min() >= 0
    assert views.max() <= 1
    if views.shape[1] == 2:
        assert torch.equal(views[:, 0], x)
    if not isinstance(spec, NoDefence):
        delta = (views[:, -1] - x).flatten(1)
        length = delta.abs().amax(1) if spec.budget.norm == "linf" else delta.norm(dim=1)
        reach = spec.noise + spec.step_size if spec.kind == "nfgsm" else 1
        assert (length <= reach * spec.budget.radius * (1 + 1e-5)).all()
        assert (length > 0).any()
        assert getattr(spec, "fraction", 1) < 1 or (length > 0).all()
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
    assert torch.equal(crafted(spec, classifier, x, y, seed=1), first) == (spec in DRAWS_NOTHING)


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


@pytest.mark.parametrize(
    "spec",
    [
        member(**fields)
        for member in (FgsmTraining, PgdTraining, NFgsmTraining)
        for fields in ({"fraction": 0}, {"radius": 0})
    ]
    + [AdversarialTraining(attack=Pgd(radii=(0.1,)), fraction=0)],
    ids=str,
)
def test_nothing_adversarial_is_plain_training_bit_for_bit(spec):
    classifier, x, y = setting()
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
        loss(classifier(views[i])[None], y[i : i + 1]).sum().backward()
        for name, parameter in classifier.named_parameters():
            assert torch.allclose(fast[name][i], parameter.grad, atol=1e-10), name


@every_defence
def test_the_loss_of_a_batch_is_the_mean_of_its_records_losses(spec):
    classifier, x, y = setting()
    views = crafted(spec, classifier.double(), x.double(), y)
    logits = classifier(views.flatten(0, 1)).view(*views.shape[:2], -1)
    loss = spec.make().loss
    singles = torch.cat([loss(logits[i : i + 1], y[i : i + 1]) for i in range(BATCH)])
    assert torch.allclose(loss(logits, y), singles, atol=1e-12)
    assert len(singles.unique()) == BATCH


@every_defence
@pytest.mark.parametrize("clip", [0.5, torch.inf])
def test_both_engines_clip_all_views_of_a_record_as_one(spec, clip):
    classifier, x, y = setting()
    classifier, x = classifier.double(), x.double()
    views, loss = crafted(spec, classifier, x, y), spec.make().loss
    naive, norms = 0.0, []
    for i in range(BATCH):
        record = loss(classifier(views[i])[None], y[i : i + 1]).sum()
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(record, list(classifier.parameters()))])
        norms.append(gradient.norm())
        naive = naive + gradient * min(1.0, clip / float(gradient.norm()))
    assert bookkeeping.why_slow(classifier, x.shape[1:]) is None
    for engine in (bookkeeping, clipping):
        clipped = engine.clipped_gradient_sum(classifier, loss, views, y, Flat(clip))
        assert torch.allclose(clipped.norms_B, torch.stack(norms), rtol=1e-6)
        assert torch.allclose(clipped.sum_P, naive, rtol=1e-5, atol=1e-8)


class Counted:
    """Hooks of every kind, as a per-record gradient engine plants them, with the number of calls of each."""

    def __init__(self, classifier):
        self.calls = dict.fromkeys(("parameter", "accumulated", "forward in training", "backward"), 0)
        for parameter in classifier.parameters():
            parameter.register_hook(lambda gradient: self.count("parameter"))
            parameter.register_post_accumulate_grad_hook(lambda parameter: self.count("accumulated"))
        for module in classifier.modules():
            module.register_forward_hook(self.forward)
            module.register_full_backward_hook(lambda *_: self.count("backward"))
            module.register_full_backward_pre_hook(lambda *_: self.count("backward"))

    def forward(self, module, inputs, output):
        if module.training:
            self.count("forward in training")

    def count(self, kind):
        self.calls[kind] += 1


def hooks_of(classifier):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    of_modules = [list(getattr(module, kind).items()) for module in classifier.modules() for kind in kinds]
    return of_modules + [list((parameter._backward_hooks or {}).items()) for parameter in classifier.parameters()]


@every_defence
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_crafting_calls_no_parameter_hook_and_moves_none(spec, norm):
    """Nor one on a module's backward pass, nor one that heeds forward passes in training only, as Opacus' do."""
    classifier, x, y = setting(norm=norm)
    counted = Counted(classifier)
    hooks, buffers = hooks_of(classifier), get_buffers(classifier)
    crafted(spec, classifier, x, y)
    assert not any(counted.calls.values())
    assert hooks_of(classifier) == hooks and torch.equal(get_buffers(classifier), buffers)
    assert all(parameter.grad is None for parameter in classifier.parameters())
    F.cross_entropy(classifier(x.requires_grad_(True)), y).backward()  # the hooks are alive
    num = len(list(classifier.parameters()))
    assert counted.calls["parameter"] == counted.calls["accumulated"] == num
    assert counted.calls["forward in training"] == len(list(classifier.modules())) == counted.calls["backward"] / 2


def naive_images(classifier, x, y):
    """Crafts as one would without care: a loss in training mode, differentiated as a whole."""
    x = x.clone().requires_grad_(True)
    F.cross_entropy(classifier(x), y).backward()
    return (x + 0.01 * x.grad.sign()).detach()


@every_defence
@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_opacus_counts_the_loss_alone_where_crafting_goes_on_within_its_hooks(spec):
    classifier, x, y = setting()
    reference = crafted(spec, classifier, x, y)
    hooked = GradSampleModule(classifier, loss_reduction="sum")
    views = crafted(spec, classifier, x, y)
    assert torch.equal(views, reference)
    assert not any(module.__dict__.get("activations") for module in classifier.modules())
    assert all(getattr(p, "grad_sample", None) is None and p.grad is None for p in classifier.parameters())
    # One view of each record: Opacus takes the rows of a batch for records.
    last = views[:, -1]
    F.cross_entropy(hooked(last), y, reduction="sum").backward()
    loss = NoDefence().make().loss
    norms_B = torch.stack([p.grad_sample.flatten(1).norm(dim=1) for p in classifier.parameters()]).norm(dim=0)
    hooked.to_standard_module()
    ours = clipping.clipped_gradient_sum(classifier, loss, last[:, None], y, Flat(1.0))
    assert torch.allclose(norms_B, ours.norms_B, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_careless_crafting_shows_in_these_tests():
    """The control of the two tests above."""
    classifier, x, y = setting()
    counted = Counted(classifier)
    GradSampleModule(classifier, loss_reduction="sum")
    naive_images(classifier, x, y)
    assert all(number > 0 for number in counted.calls.values())
    assert all(p.grad_sample is not None and p.grad is not None for p in classifier.parameters())


@pytest.mark.parametrize("spec", [d for d in DEFENCES if d.kind != "none"], ids=lambda spec: spec.label)
@pytest.mark.parametrize("privacy", [{"kind": "none"}, DP], ids=["plain", "private"])
def test_a_step_crafts_before_any_hook_is_planted(spec, privacy, monkeypatch):
    """In the federation's own steps, plain and private: no module has a hook while images are made."""
    federation = tiny_federation(defence=spec.model_dump(mode="json"), privacy=privacy)
    nothing, crafts, real = hooks_of(federation.classifier), [], type(spec).make

    def make(self, progress):
        objective = real(self)

        def views(classifier, x, y, draws):
            assert hooks_of(classifier) == nothing and classifier.training
            before = get_buffers(classifier)
            made = objective.views(classifier, x, y, draws)
            assert hooks_of(classifier) == nothing and torch.equal(get_buffers(classifier), before)
            crafts.append(len(x))
            return made

        return Objective(views, objective.loss)

    monkeypatch.setattr(type(spec), "make", make)
    monkeypatch.setattr(local_training, "CRAFTED_TOGETHER", 256)
    run_round(federation, initial_state(federation))
    assert crafts and all(parameter.grad is None for parameter in federation.classifier.parameters())


STRONG = [
    FgsmTraining(radius=0.1),
    PgdTraining(radius=0.1, steps=3),
    NFgsmTraining(radius=0.1),
    Trades(radius=0.1, steps=3),
    Mart(radius=0.1, steps=3),
    AdversarialTraining(attack=Apgd(radii=(0.1,), steps=3)),
]


@pytest.mark.parametrize("defence", STRONG, ids=lambda d: d.kind)
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
        ({"kind": "autoattack"}, "'none', 'fgsm', 'pgd', 'nfgsm', 'trades', 'mart', 'adversarial'"),
        ({"kind": "trades", "fraction": 0.5}, "fraction"),
        ({"kind": "mart", "beta": -1}, "greater than or equal to 0"),
        ({"kind": "nfgsm", "step_size": 0}, "greater than 0"),
        ({"kind": "free"}, "no record's influence could be bounded.*'nfgsm' costs as little"),
        ({"kind": "free_adversarial", "radius": "4/255"}, "Shafahi et al. 2019"),
        ({"kind": "adversarial"}, "attack"),
        ({"kind": "adversarial", "attack": {"kind": "pgd", "radii": [0.01, 0.02]}}, "has 2 radii here"),
        ({"kind": "adversarial", "attack": {"kind": "square", "radius": 0.01}}, "is for finished models"),
        ({"kind": "adversarial", "attack": {"kind": "fab", "radius": 0.01}}, "is for finished models"),
        ({"kind": "adversarial", "attack": {"kind": "autoattack", "radius": 0.01}}, "is for finished models"),
        ({"kind": "pgd", "warmup": 0.2, "schedule": [[0, 0], [0.9, 1]]}, "either warmup or schedule"),
        (
            {"kind": "adversarial", "attack": {"kind": "pgd", "radius": 0.1}, "warmup": 0.2, "schedule": [[0, 1]]},
            "either",
        ),
        ({"kind": "pgd", "schedule": []}, "first numbers ascend"),
        ({"kind": "pgd", "schedule": [[0.5, 0], [0.5, 1]]}, "first numbers ascend"),
        ({"kind": "pgd", "schedule": [[0, 0], [1, 0.5]]}, "reach the whole radius"),
        ({"kind": "pgd", "schedule": [[0, 0], [1, 1]]}, "before the training ends"),
        ({"kind": "pgd", "warmup": 1}, "less than 1"),
        ({"kind": "pgd", "schedule": [[0, 0], [1, 1.5]]}, "less than or equal to 1"),
        ({"kind": "pgd", "schedule": [[0, False], [1, True]]}, "neither true nor false"),
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
        "N-FGSM training Linf 4/255",
        "N-FGSM noise 1 step 0.5 training L2 0.5 (50 %)",
        "TRADES-2 beta 6 Linf 4/255",
        "TRADES-2 step 0.7 beta 2 L2 0.5",
        "MART-2 beta 5 Linf 4/255",
        "MART-2 step 0.7 beta 2 L2 0.5",
        "training on FGSM Linf 4/255",
        "training on PGD-2x2 margin Linf 4/255",
        "training on MI-FGSM-2 Linf 4/255",
        "training on APGD-3 CE L2 0.5 (50 %)",
    ]
    assert PgdTraining(warmup=0.4).label == "PGD-7 training Linf 4/255, warm-up 40 %"
    grown = Trades(schedule=[[0, 0], [0.3, 0.5], [0.6, 1]])
    assert grown.label == "TRADES-10 beta 6 Linf 4/255, radius schedule 0:0 0.3:0.5 0.6:1"
    assert len({spec.key for spec in [*DEFENCES, *STRONG, grown]}) == len(DEFENCES) + len(STRONG) + 1


GROWING = {
    "fgsm": FgsmTraining,
    "pgd": PgdTraining,
    "nfgsm": NFgsmTraining,
    "trades": partial(Trades, steps=2),
    "mart": partial(Mart, steps=2),
}
every_growth = pytest.mark.parametrize("growth", [{"warmup": 0.4}, {"schedule": [[0, 0], [0.4, 1]]}], ids=str)


@pytest.mark.parametrize("kind", GROWING)
@pytest.mark.parametrize(("progress", "share"), [(0.0, 0.0), (0.1, 0.25), (0.4, 1.0), (1.0, 1.0)])
@every_growth
def test_the_radius_grows_during_the_training(kind, progress, share, growth):
    (classifier, x, y), make = setting(), GROWING[kind]
    views = make(radius=8 / 255, **growth).make(progress).views(classifier, x, y, torch.Generator().manual_seed(0))
    assert torch.equal(views, crafted(make(radius=share * 8 / 255), classifier, x, y))


@pytest.mark.parametrize("attack", [Pgd, Apgd, MiFgsm])
@every_growth
def test_the_radius_of_a_chosen_attack_grows_too(attack, growth):
    classifier, x, y = setting()
    spec, same = (AdversarialTraining(attack=attack(radii=(r,), steps=3), **g) for r, g in ((0.04, growth), (0.01, {})))
    views = spec.make(0.1).views(classifier, x, y, torch.Generator().manual_seed(0))
    assert torch.equal(views, crafted(same, classifier, x, y))
    assert torch.equal(spec.make(0).views(classifier, x, y, torch.Generator().manual_seed(0)), x[:, None])
