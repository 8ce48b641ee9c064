"""An attack in the middle of somebody else's step: the step does not notice, and neither does the attack.

An attack runs the network forward and back. Whoever trains may have hooks on it (a per-record gradient engine has, on
every layer), a graph that still waits for its backward pass, gradients that are being summed up, and statistics of
batches. None of these may hear of the attack but forward hooks, which are part of what a network computes; and the
images must be those that the attack makes of the bare network in evaluation mode.
"""

from contextlib import contextmanager
from typing import get_args

import pytest
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion import autoattack, frozen
from trilemma.attacks.evasion.specs import (
    Apgd,
    AutoAttack,
    CarliniWagner,
    DeepFool,
    EvasionSpec,
    Fab,
    Fgsm,
    HopSkipJump,
    MiFgsm,
    Pgd,
    Square,
)
from trilemma.attacks.evasion.types import Access
from trilemma.models.classifier import Classifier
from trilemma.models.specs import Resnet9
from trilemma.models.vector import get_buffers, get_params
from trilemma.privacy import bookkeeping, clipping
from trilemma.privacy.clipping_rules import Flat

R = (0.5,)  # no radius of a spec is looked at here: budgets are handed in
ATTACKS = [
    Fgsm(radii=R, random_start=True),
    Pgd(radii=R, steps=3, restarts=2),
    MiFgsm(radii=R, steps=3),
    Apgd(radii=R, steps=5, loss="dlr"),
    Apgd(radii=R, steps=5, loss="margin", num_targets=2),
    DeepFool(radii=R, norm="l2", steps=4),
    CarliniWagner(radii=R, steps=4, searches=2),
    Fab(radii=R, steps=4, num_targets=2),
    Square(radii=R, queries=20),
    Square(radii=R, norm="l2", queries=20),
    HopSkipJump(radii=R, queries=100),
    AutoAttack(radii=R),
]
every_attack = pytest.mark.parametrize("spec", ATTACKS, ids=lambda spec: spec.label)
BATCH = 5


def budget_of(spec) -> Budget:
    """A ball in which every attack finds something; a hundred questions find little."""
    return Budget(spec.norm, {"linf": 0.05, "l2": 0.8}[spec.norm] * (5 if spec.kind == "hop_skip_jump" else 1))


@pytest.fixture(autouse=True)
def short_ensemble(monkeypatch):
    """All parts of AutoAttack, each with few steps."""
    monkeypatch.setattr(autoattack, "STEPS", 5)
    monkeypatch.setattr(autoattack, "QUERIES", 40)


def network(norm: str = "group") -> Classifier:
    """A network in training mode; every call makes the same one anew."""
    classifier = Resnet9(width=4, norm=norm).make(1, 16, 3, seed=1).train()
    if norm == "batch":
        with torch.no_grad():
            for _ in range(20):  # until its statistics fit, and it tells images apart in evaluation mode too
                classifier(batch(3)[0])
    return classifier


def batch(seed: int):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(BATCH, 1, 16, 16, generator=g), torch.randint(3, (BATCH,), generator=g)


#: What is trained on, and what is attacked: other images, so that a mixed-up row would show.
TRAINED, (ATTACKED, _) = batch(0), batch(1)


def answered(classifier: Classifier) -> torch.Tensor:
    """The classes that a network gives to the attacked images: with them as labels there is something to break."""
    with frozen.frozen(classifier), torch.no_grad():
        return classifier(ATTACKED).argmax(1)


def attack_of(spec, labels):
    """Returns a function that attacks a network and keeps the images of all its calls."""
    made = []

    def attack(classifier):
        draws = torch.Generator().manual_seed(0)
        made.append(spec.make()(classifier, ATTACKED, labels, budget_of(spec), draws))

    return attack, made


def bare_images(spec, norm: str = "group"):
    """Returns what an attack makes of the bare network before and after its forward pass in training; and labels."""
    classifier = network(norm)
    labels = answered(classifier)
    attack, made = attack_of(spec, labels)
    attack(classifier.eval())
    assert not torch.equal(made[0], ATTACKED)  # the attack does something
    if norm == "batch":
        with torch.no_grad():
            classifier.train()(TRAINED[0])  # which moves the statistics
        attack(classifier.eval())
        assert spec.kind == "hop_skip_jump" or not torch.equal(*made)  # which sees classes only
    return (made[0], made[-1]), labels


def nothing(classifier):
    """The attack that is none."""


def test_every_member_is_here():
    assert set(get_args(get_args(EvasionSpec)[0])) == {type(spec) for spec in ATTACKS}


# --- within a step of Opacus ------------------------------------------------------------------------------------------


def opacus_step(attack):
    """Attacks before, in the middle of and after the two passes of a noisy step; returns all that it leaves behind."""
    torch.manual_seed(3)  # the noise comes from the global generator: an attack must not draw from it
    classifier = network()
    hooked = GradSampleModule(classifier, loss_reduction="sum")
    plain = torch.optim.SGD(hooked.parameters(), lr=0.1, momentum=0.9)
    optimizer = DPOptimizer(plain, noise_multiplier=1.0, max_grad_norm=0.5, expected_batch_size=BATCH)
    left = []
    for _ in range(2):
        optimizer.zero_grad()
        attack(classifier)
        loss = F.cross_entropy(hooked(TRAINED[0]), TRAINED[1], reduction="sum")
        attack(classifier)
        loss.backward()
        attack(classifier)
        left += [p.grad_sample.clone() for p in classifier.parameters()]
        optimizer.step()
        left += [p.grad.clone() for p in classifier.parameters()]
        assert not any(module.__dict__.get("activations") for module in classifier.modules())
    assert all(module.training for module in hooked.modules())
    return [*left, get_params(classifier)]


@every_attack
@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_a_step_of_opacus_does_not_notice(spec):
    (expected, _), labels = bare_images(spec)
    attack, made = attack_of(spec, labels)
    with_attack, without = opacus_step(at_first(attack)), opacus_step(nothing)
    assert all(torch.equal(one, other) for one, other in zip(with_attack, without, strict=True))
    assert len(made) == 3 and all(torch.equal(images, expected) for images in made)


def at_first(attack):
    """Attacks on the first step only, where the weights are still those of the bare network."""
    left = iter(range(3))
    return lambda classifier: attack(classifier) if next(left, None) is not None else None


def careless(classifier):
    """The control: one step of an attack that takes the network as it is."""
    x = ATTACKED.clone().requires_grad_(True)
    F.cross_entropy(classifier(x), torch.zeros(BATCH, dtype=torch.long)).backward()


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_a_step_of_opacus_notices_a_careless_attack():
    before, after = [iter([careless] + [nothing] * 5), iter([nothing, nothing, careless] + [nothing] * 3)]
    without = opacus_step(nothing)
    for order in (before, after):
        try:
            left = opacus_step(lambda classifier, order=order: next(order)(classifier))
        except (ValueError, RuntimeError, AttributeError):
            continue  # Opacus itself has found two batches where it expects one
        assert not all(torch.equal(one, other) for one, other in zip(left, without, strict=True))


# --- within a step of the book-keeping engine and of the reference ----------------------------------------------------


def clipped(engine, attack):
    """A private step's sum, with attacks before the engine, between its two passes, and after it."""
    classifier = network()
    assert bookkeeping.why_slow(classifier, TRAINED[0].shape[1:]) is None

    def loss(logits_BVK, y_B):
        if engine is bookkeeping:  # the reference calls it within vmap, where nothing can be looked at
            attack(classifier)
        return F.cross_entropy(logits_BVK[:, 0], y_B, reduction="none")

    attack(classifier)
    result = engine.clipped_gradient_sum(classifier, loss, TRAINED[0][:, None], TRAINED[1], Flat(0.5))
    attack(classifier)
    assert classifier.training and all(p.grad is None and p.requires_grad for p in classifier.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in classifier.modules())
    return result


@every_attack
@pytest.mark.parametrize("engine", [bookkeeping, clipping], ids=["book-keeping", "reference"])
def test_a_private_step_of_ours_does_not_notice(engine, spec):
    (expected, _), labels = bare_images(spec)
    attack, made = attack_of(spec, labels)
    with_attack, without = clipped(engine, attack), clipped(engine, nothing)
    assert all(torch.equal(one, other) for one, other in zip(with_attack, without, strict=True))
    assert len(made) == (3 if engine is bookkeeping else 2)
    assert all(torch.equal(images, expected) for images in made)


# --- within a step with hooks of the user's and batch statistics ------------------------------------------------------


class Hooked:
    """Hooks of every kind on every module and parameter, and how often each kind was called, and in which mode."""

    def __init__(self, classifier):
        self.calls = {}
        for parameter in classifier.parameters():
            parameter.register_hook(lambda gradient: self.count("gradient"))
            parameter.register_post_accumulate_grad_hook(lambda parameter: self.count("accumulated"))
        for module in classifier.modules():
            module.register_forward_pre_hook(lambda m, x: self.count("before forward", m))
            module.register_forward_hook(lambda m, x, out: self.count("after forward", m))
            module.register_full_backward_pre_hook(lambda m, g: self.count("before backward"))
            module.register_full_backward_hook(lambda m, before, after: self.count("after backward"))

    def count(self, kind, module=None):
        kind = kind if module is None else f"{kind} in {'training' if module.training else 'evaluation'}"
        self.calls[kind] = self.calls.get(kind, 0) + 1


def hooks_of(classifier):
    """Every hook, and the dictionary that it stands in: a handle removes its hook from that one only."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    holders = [getattr(module, kind) for module in classifier.modules() for kind in kinds]
    for parameter in classifier.parameters():
        holders += [parameter._backward_hooks, parameter._post_accumulate_grad_hooks]
    return [(id(holder), list((holder or {}).items())) for holder in holders]


@contextmanager
def unmoved(classifier):
    """Checks that a block changes no hook, gradient, statistic, flag or weight, and draws nothing globally."""

    def state():
        grads = [None if p.grad is None else (id(p.grad), p.grad._version, p.grad.clone()) for p in parameters]
        flags = [module.training for module in classifier.modules()]
        versions = [t._version for t in [*parameters, *classifier.buffers()]]
        counters = {name: buffer.clone() for name, buffer in classifier.named_buffers()}
        wants = [p.requires_grad for p in parameters]
        return grads, flags, versions, counters, wants, hooks_of(classifier), get_params(classifier)

    parameters, draws = list(classifier.parameters()), torch.get_rng_state()
    before = state()
    yield
    assert same(before, state())
    assert torch.equal(torch.get_rng_state(), draws) and torch.is_grad_enabled()


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other


def hooked_step(attack, norm: str):
    """Attacks before, in the middle of and after the passes of a plain step; returns what it leaves and its calls."""
    classifier = network(norm)
    hooked = Hooked(classifier)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.1)
    heard = {}

    def attacked():
        before = dict(hooked.calls)
        with unmoved(classifier):
            attack(classifier)
        heard.update({kind: n - before.get(kind, 0) for kind, n in hooked.calls.items() if n != before.get(kind, 0)})
        hooked.calls = before

    attacked()
    x = TRAINED[0].clone().requires_grad_(True)  # or the first module's hooks had nothing to hear
    loss = F.cross_entropy(classifier(x), TRAINED[1])
    attacked()
    loss.backward()
    attacked()
    gradients = [p.grad.clone() for p in classifier.parameters()]
    optimizer.step()
    return [*gradients, x.grad, get_params(classifier), get_buffers(classifier)], hooked.calls, heard


@every_attack
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_hooked_step_does_not_notice(spec, norm):
    (before, after), labels = bare_images(spec, norm)
    attack, made = attack_of(spec, labels)
    with_attack, calls, heard = hooked_step(attack, norm)
    without, calls_without, _ = hooked_step(nothing, norm)
    assert all(torch.equal(one, other) for one, other in zip(with_attack, without, strict=True))
    assert calls == calls_without and min(calls.values()) > 0
    assert same(made, [before, after, after])
    # Forward hooks hear of it, in evaluation mode: they may be part of what the network computes.
    assert set(heard) == {"before forward in evaluation", "after forward in evaluation"}


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_the_same_checks_find_a_careless_attack(norm):
    with pytest.raises(AssertionError):
        hooked_step(careless, norm)


def test_the_same_checks_find_an_attack_that_leaves_gradients_alone_but_not_statistics():
    def half_careless(classifier):
        with torch.no_grad():
            classifier(ATTACKED)

    hooked_step(half_careless, "group")
    with pytest.raises(AssertionError):
        hooked_step(half_careless, "batch")


def pruned(*, for_good: bool) -> Classifier:
    """Without a third of the weights of each convolution: by a mask in a forward pre-hook, or in the weights."""
    classifier = network()
    for module in [m for m in classifier.modules() if isinstance(m, nn.Conv2d)]:
        prune.l1_unstructured(module, "weight", amount=0.3)
        if for_good:
            prune.remove(module, "weight")
    return classifier


@every_attack
def test_a_mask_in_a_forward_hook_is_part_of_the_network(spec):
    masked, final = pruned(for_good=False), pruned(for_good=True)
    labels = answered(final)
    attack, made = attack_of(spec, labels)
    attack(masked)
    attack(final)
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], bare_images(spec)[0][0])
    F.cross_entropy(masked(TRAINED[0]), TRAINED[1]).backward()
    assert all(parameter.grad is not None for parameter in masked.parameters())


def test_a_hook_can_be_taken_off_after_an_attack():
    """Its handle knows the dictionary that it stands in."""
    classifier = network()
    handles = [module.register_full_backward_hook(lambda *_: None) for module in classifier.modules()]
    attack, _ = attack_of(Pgd(radii=R, steps=1), answered(classifier))
    attack(classifier)
    assert all(len(module._backward_hooks) == 1 for module in classifier.modules())
    for handle in handles:
        handle.remove()
    assert not any(module._backward_hooks for module in classifier.modules())


@pytest.mark.parametrize("spec", ATTACKS[1:], ids=lambda spec: spec.label)
def test_everything_is_put_back_after_an_error(spec):
    """Errors on clean images are confirmed by the model that ships, or it is asked first; this one fails."""
    assert ATTACKS[0].kind == "fgsm"  # which asks nobody

    def answers(x):
        raise ZeroDivisionError

    classifier = network("batch")
    wrong = (answered(classifier) + 1) % 3
    F.cross_entropy(classifier(TRAINED[0]), TRAINED[1]).backward()
    hooked = Hooked(classifier)
    with unmoved(classifier), pytest.raises(ZeroDivisionError):
        spec.make(Access(answers))(classifier, ATTACKED, wrong, budget_of(spec), torch.Generator())
    assert all(kind.endswith("in evaluation") for kind in hooked.calls)
