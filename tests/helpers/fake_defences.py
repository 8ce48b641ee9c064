"""Models whose robustness is not there, each built around an honestly trained network, and honest ones beside them.

A fake is what a defence looks like that hides its gradients, and nothing else: the images that fool the network inside
still exist.
"""

import copy

import torch
from torch import Tensor, nn

from helpers.small_problem import trained
from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.geometry import random_start
from trilemma.attacks.evasion.losses import cross_entropy
from trilemma.attacks.evasion.pgd import climb
from trilemma.data.records import Records
from trilemma.evaluation.harness import Target
from trilemma.models.classifier import Classifier
from trilemma.randomness import generator, global_seed


class Around(nn.Module):
    """A network with something before it and something after it."""

    def __init__(self, network: nn.Module, before=None, after=None):
        super().__init__()
        self.network = network
        self.before = before
        self.after = after

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = x_BCHW if self.before is None else self.before(x_BCHW)
        logits_BK = self.network(x_BCHW)
        return logits_BK if self.after is None else self.after(logits_BK)


def small_network(records: Records, num_classes: int, seed: int) -> Classifier:
    """Returns a trained network of two convolutions: fakes cost a fraction of what they would cost around a ResNet."""
    with global_seed(seed, "small"):
        module = nn.Sequential(
            nn.Conv2d(records.images_NCHW.shape[1], 8, 5, stride=2),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, num_classes),
        )
    return trained(Classifier(module, num_classes), records, steps=150, learning_rate=0.01)


def around(network: Classifier, before=None, after=None) -> Classifier:
    """Returns a classifier of pixels in [0, 1]: `before`, the network, `after`."""
    return Classifier(Around(network, before, after), network.num_classes, mean=0.0, std=1.0).eval()


def shipped(network: Classifier, twin: Classifier | None = None) -> Target:
    """Returns a target whose answers are a network's, as those of a file would be; its own twin if there is none."""

    def predict(x_BCHW: Tensor) -> Tensor:
        with torch.no_grad():
            return network(x_BCHW)

    return Target("model", predict, network if twin is None else twin)


def quantised_input(network: Classifier) -> Classifier:
    """Rounds pixels to 33 levels."""
    return around(network, lambda x: (x * 32).round() / 32)


def thermometer(network: Classifier) -> Classifier:
    """Writes a pixel as the number of thresholds that it exceeds (Buckman et al., 2018)."""
    steps = (torch.arange(24) + 0.5) / 24
    return around(network, lambda x: (x[..., None] > steps).sum(-1) / 24)


def shattered(network: Classifier) -> Classifier:
    """Adds a ripple to each grey value: a hundredth high, and 12 times as steep as the image."""
    return around(network, lambda x: x + 0.01 * torch.sin(1200 * x))


def true_on_grid(network: Classifier) -> Classifier:
    """Has true gradients at grey levels of 8 bits, where clean images are, and next to none between them."""

    def before(x_BCHW: Tensor) -> Tensor:
        off_BCHW = (x_BCHW * 255 - (x_BCHW * 255).round()).abs() > 1e-3
        return torch.where(off_BCHW, x_BCHW.detach(), x_BCHW)

    return around(network, before)


def sawtooth(network: Classifier) -> Classifier:
    """Follows the image in steps of a fiftieth, each of which descends: its gradient has the wrong sign."""
    return around(network, lambda x: 2 * (x * 50).round().detach() / 50 - x)


def saturated(network: Classifier, factor: float = 1e4) -> Classifier:
    """Multiplies the logits, which changes no answer."""
    return around(network, after=lambda logits: factor * logits)


def distilled(network: Classifier) -> Classifier:
    """Ships at temperature 1/100, as what defensive distillation learned at 100 does (Papernot et al., 2016)."""
    return saturated(network, 100.0)


def clipped(network: Classifier) -> Classifier:
    """Lets no logit exceed a tenth."""
    return around(network, after=lambda logits: 0.1 * (logits.clamp(-1, 1) + 1e-3 * logits.sign().detach()))


def noisy(network: Classifier) -> Classifier:
    """Adds noise to every image, another one each time."""
    return around(network, lambda x: x + 0.05 * torch.randn_like(x))


def same_noise(network: Classifier) -> Classifier:
    """Adds the same noise each time, another one to each place in the batch."""
    return around(network, lambda x: x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))


def seeded_by_the_batch(network: Classifier) -> Classifier:
    """Adds noise that is the same whenever the same batch is asked about, and another one for every other batch."""

    def before(x: Tensor) -> Tensor:
        seed = int(x.detach().double().sum() * 2**20)
        return x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))

    return around(network, before)


def resized(network: Classifier) -> Classifier:
    """Shrinks and pads at random (Xie et al., 2018)."""

    def before(x_BCHW: Tensor) -> Tensor:
        size = x_BCHW.shape[-1]
        smaller = int(torch.randint(size - 3, size, ()))
        left, top = (int(torch.randint(0, size - smaller + 1, ())) for _ in range(2))
        shrunk = nn.functional.interpolate(x_BCHW, smaller)
        return nn.functional.pad(shrunk, (left, size - smaller - left, top, size - smaller - top), value=0.5)

    return around(network, before)


def detached(network: Classifier) -> Classifier:
    """Cuts the graph before the network."""
    return around(network, lambda x: x.detach())


def hard_answers(network: Classifier) -> Classifier:
    """Ships votes: each logit rounded to a twentieth, which has no derivative."""
    return around(network, after=lambda logits: (logits * 20).round() / 20)


def hard_activations(network: Classifier, records: Records) -> Classifier:
    """A small network of hard signs, learned through the identity in their place and shipped without it."""
    channels, size = records.images_NCHW.shape[1:3]
    hidden = 64

    class Signs(nn.Module):
        def __init__(self):
            super().__init__()
            self.below = nn.Conv2d(channels, hidden, 5, stride=2)
            self.above = nn.Linear(hidden * ((size - 5) // 2 + 1) ** 2, network.num_classes)

        def forward(self, x: Tensor) -> Tensor:
            seen = self.below(x)
            soft = seen.tanh()
            hard = soft + (seen.sign() - soft).detach() if self.training else seen.sign()
            return self.above(hard.flatten(1))

    with global_seed(0, "signs"):
        signs = Classifier(Signs(), network.num_classes)
    return trained(signs, records, steps=60)


def constant_predictor(network: Classifier, answer: int) -> Classifier:
    """Answers one class, whatever it sees; with gradients."""
    bias = 100.0 * nn.functional.one_hot(torch.tensor(answer), network.num_classes)
    return around(network, after=lambda logits: logits + bias)


def rounded_weights(network: Classifier) -> Classifier:
    """An int8 network without a twin: rounded for real, as a converted network is, without a gradient."""
    rounded = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in rounded.parameters():
            scale = parameter.abs().max().clamp(min=1e-12) / 127
            parameter.copy_((parameter / scale).round() * scale)
    return around(rounded, lambda x: (x * 255).round() / 255)


def adversarially_trained(
    network: Classifier, records: Records, budget: Budget, *, steps: int = 60, learning_rate: float = 0.003
) -> Classifier:
    """Trains in place on images of PGD-3 within a budget, which grows over the first half."""
    optimiser = torch.optim.Adam(network.parameters(), learning_rate)
    for step in range(steps):
        start = step * 32 % (len(records) - 32)
        x, y = records.x(slice(start, start + 32)), records.y(slice(start, start + 32))
        grown = Budget(budget.norm, budget.radius * min(1.0, 2 * (step + 1) / steps))
        begin = random_start(x, grown, generator(step, "start"))
        network.train()
        loss = cross_entropy(network(climb(network, begin, x, grown, lambda z, y=y: cross_entropy(z, y), steps=3)), y)
        optimiser.zero_grad()
        loss.mean().backward()
        optimiser.step()
    return network.eval()


def with_noisy_weights(network: Classifier, share: float = 0.05) -> Classifier:
    """Returns a copy whose weights bear noise, as those of a private training do."""
    noised = copy.deepcopy(network)
    with torch.no_grad():
        for position, parameter in enumerate(noised.parameters()):
            noise = torch.randn(parameter.shape, generator=generator(position, "weights"))
            parameter.add_(share * parameter.std().nan_to_num(0.0) * noise)
    return noised
