"""What hides a gradient, wrapped around a network of real chest X-rays, and which diagnostic flag each trick raises.

    PYTHONPATH=tests python studies/masked.py docs/results/masked.md

The tricks are those that the tests plant (tests/helpers/fake_defences.py), and three more below. It needs the images of
PneumoniaMNIST (TRILEMMA_DATA, or a download).
"""

import platform
import sys
import time
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from helpers import fake_defences as fakes
from torch import Tensor, nn

from trilemma.attacks.budget import Budget
from trilemma.attacks.evasion.autoattack import autoattack
from trilemma.attacks.evasion.pgd import pgd
from trilemma.compression.export import export_onnx
from trilemma.compression.fake_quantisation import quantise
from trilemma.compression.session import Session
from trilemma.data.records import Records
from trilemma.data.roots import default_roots
from trilemma.data.specs import Medmnist
from trilemma.evaluation.diagnostics import judged
from trilemma.evaluation.evidence import gather, independent_sample
from trilemma.evaluation.harness import Target, attack_images, attacked_logits, clean_logits
from trilemma.evaluation.metrics import predictions
from trilemma.models.classifier import Classifier
from trilemma.models.specs import Resnet9
from trilemma.randomness import generator
from trilemma.robustness.objectives import adjusted
from trilemma.robustness.specs import DefenceSpec, FgsmTraining, NoDefence

SEED, IMAGES, BATCH = 0, 256, 64
BUDGET = Budget("linf", 4 / 255)
NORMAL, PNEUMONIA = 1214, 3494  # training images, as the data set's authors say


class Row(NamedTuple):
    """A model, and what was seen of it; the three numbers are shares of the images.

    Attributes:
        name: What it is.
        clean: Right when clean.
        naive: Right and left right by PGD-20 on the cross entropy of the model's own gradients, asked once.
        strongest: Left right by everything: the diagnostics' attacks, and the images that fool the network inside.
        flags: Names of the flags that are raised.
    """

    name: str
    clean: float
    naive: float
    strongest: float
    flags: list[str]


def train(defence: DefenceSpec, records: Records, seed: int, epochs: int) -> Classifier:
    """Returns a ResNet-9 of width 8; Adam with a cosine schedule, batches of 64."""
    network = Resnet9(width=8).make(1, 28, 2, seed)
    optimiser = torch.optim.Adam(network.parameters(), 1e-3)
    num_batches = len(records) // BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * num_batches)
    shares = np.array([NORMAL, PNEUMONIA]) / (NORMAL + PNEUMONIA)
    for epoch in range(epochs):
        objective = adjusted(defence.make((epoch + 1) / epochs), shares.tolist())
        order = torch.randperm(len(records), generator=generator(seed, "order", epoch))
        for batch, index in enumerate(order[: num_batches * BATCH].view(-1, BATCH).numpy()):
            x_BCHW, y_B = records.x(index), records.y(index)
            views = objective.views(network.eval(), x_BCHW, y_B, generator(seed, "views", epoch, batch))
            loss_B = objective.loss(network.train()(views.flatten(0, 1))[:, None], y_B)
            optimiser.zero_grad()
            loss_B.mean().backward()
            optimiser.step()
            schedule.step()
    return network.eval()


def noise_of_its_own(network: Classifier) -> Classifier:
    """Adds noise that is drawn from the image itself: another image has other noise, the same one the same."""

    def before(x_BCHW: Tensor) -> Tensor:
        seeds = [zlib.crc32(x_CHW.numpy().tobytes()) for x_CHW in x_BCHW.detach().cpu()]
        draws = [torch.randn(x_BCHW.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return x_BCHW + 0.03 * torch.stack(draws)

    return fakes.around(network, before)


def cleans_what_looks_noisy(network: Classifier, limit: float = 0.012) -> Classifier:
    """Rounds and blurs an image as soon as neighbouring pixels of it differ oddly."""

    def before(x_BCHW: Tensor) -> Tensor:
        blurred_BCHW = nn.functional.avg_pool2d(x_BCHW.detach(), 3, 1, 1, count_include_pad=False)
        odd_B = (x_BCHW.detach() - blurred_BCHW).abs().flatten(1).median(1).values > limit
        return torch.where(odd_B[:, None, None, None], (8 * blurred_BCHW).round() / 8, x_BCHW)

    return fakes.around(network, before)


def tricks(plain: Classifier, robust: Classifier, train_split: Records) -> Iterator[tuple[Classifier, dict[str, Target]]]:
    """Yields a network, and models that hide it; first those that hide nothing."""
    int8 = quantise(robust, train_split.x(slice(0, 256)))
    session = Session(export_onnx(int8, 1, 28)).predict
    yield plain, {"*the plain network*": fakes.shipped(plain)}
    yield robust, {"*the adversarially trained network*": fakes.shipped(robust)}
    yield int8, {"*its int8 file, with its twin*": Target("int8", session, int8, (robust,))}
    around = fakes.shipped
    yield plain, {
        "grey values rounded to 33 levels": around(fakes.quantised_input(plain)),
        "grey values as thermometers of 24 steps": around(fakes.thermometer(plain)),
        "the graph is cut": around(fakes.detached(plain)),
        "answers rounded to a twentieth": around(fakes.hard_answers(plain)),
        "logits clipped to a tenth": around(fakes.clipped(plain)),
        "a ripple on grey values": around(fakes.shattered(plain)),
        "grey values in descending steps": around(fakes.sawtooth(plain)),
        "gradients that are true at 8-bit grey levels only": around(fakes.true_on_grid(plain)),
        "logits times 10 000": around(fakes.saturated(plain)),
        "temperature 1/100": around(fakes.distilled(plain)),
        "noise, fresh each time": around(fakes.noisy(plain)),
        "noise, by place in the batch": around(fakes.same_noise(plain)),
        "noise, drawn from the image": around(noise_of_its_own(plain)),
        "noisy images are cleaned": around(cleans_what_looks_noisy(plain)),
        "shrunk and padded at random": around(fakes.resized(plain)),
        "always answers pneumonia": around(fakes.constant_predictor(plain, 1)),
        "plain, attacked through the robust one": around(plain, robust),
    }
    signs = fakes.hard_activations(plain, train_split)
    yield plain, {"activations that are signs": around(signs)}
    plain_int8 = quantise(plain, train_split.x(slice(0, 256)))
    session = Session(export_onnx(plain_int8, 1, 28)).predict
    yield plain_int8, {
        "int8, attacked through the rounding itself": Target("int8", session, fakes.rounded_weights(plain)),
        "int8, attacked through another's twin": Target("int8", session, int8),
    }


def fooling_images(inside: Classifier, records: Records) -> list[Target | Tensor]:
    """Returns images that fool a network: those of AutoAttack, and those that fool it as surely as may be."""
    sure = partial(pgd, steps=40, restarts=2, loss="margin", stop=False)
    return [attack_images(inside, attack, BUDGET, records, SEED) for attack in (autoattack, sure)]


def right(target: Target, x_NCHW: Tensor, records: Records) -> np.ndarray:
    """Returns which images a model answers rightly, asked once."""
    logits = [target.predict(part) for part in x_NCHW.split(64)]
    return predictions(torch.cat(logits).numpy()) == records.labels_N


def seen(name: str, target: Target, fooling: list[Tensor], records: Records) -> Row:
    """Returns what a naive evaluation says of a model, what all attacks say, and the flags."""
    (naive_NK,) = attacked_logits(target.twin, [target], partial(pgd, steps=20), BUDGET, records, SEED)
    clean_N = predictions(clean_logits(target, records)) == records.labels_N
    naive_N = clean_N & (predictions(naive_NK) == records.labels_N)
    evidence = gather(target, records, BUDGET, SEED)
    strongest_N = clean_N & naive_N & ~evidence.white_N & ~evidence.longer_N
    for errors_N in evidence.black_boxes.values():
        strongest_N &= ~errors_N
    for x_NCHW in fooling:
        strongest_N &= right(target, x_NCHW, records)
    flags = [flag for flag in judged(evidence) if flag.raised]
    print(name, clean_N.mean(), naive_N.mean(), strongest_N.mean(), *[f"{f.name}: {f.evidence}" for f in flags], sep="\n    ", flush=True)
    return Row(name, clean_N.mean(), naive_N.mean(), strongest_N.mean(), [flag.name for flag in flags])
