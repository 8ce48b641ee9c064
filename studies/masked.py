"""What hides a gradient, wrapped around a network of real chest X-rays, and which diagnostic flag each trick raises.

    PYTHONPATH=tests python studies/masked.py docs/results/masked.md

The tricks are those that the tests plant (tests/helpers/fake_defences.py), and two more below. It needs the images of
PneumoniaMNIST (TRILEMMA_DATA, or a download).
"""

import platform
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from helpers import fake_defences as fakes
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
from trilemma.evaluation.flags import Flag
from trilemma.evaluation.harness import Target, attack_images, attacked_logits, clean_logits
from trilemma.evaluation.metrics import predictions
from trilemma.models.classifier import Classifier
from trilemma.models.specs import Resnet9
from trilemma.randomness import generator, global_seed
from trilemma.robustness.objectives import adjusted
from trilemma.robustness.specs import DefenceSpec, FgsmTraining, NoDefence

SEED, SIZE, IMAGES, BATCH = 0, 28, 256, 64
BUDGET = Budget("linf", 4 / 255)
NORMAL, PNEUMONIA = 1214, 3494  # training images, as the data set's authors say

PAGE = """# Models whose robustness is not there

What hides gradients, put around a network of real chest X-rays, and what the
[diagnostics](../pitfalls.md#attacks-that-are-too-weak) say of it. Written by

```text
PYTHONPATH=tests python studies/masked.py docs/results/masked.md
```

PneumoniaMNIST at 28 pixels: trained on its training split, measured on {num_images} images of its test split at radius
{radius} in L∞. ResNet-9 of width 8 with group norm, and int8 files as ONNX Runtime runs them. One seed ({seed}) for
everything; {minutes} minutes of one core ({machine}).

- *Clean*: the share of the images that is answered rightly.
- *PGD-20*: what is left of it by 20 steps up the cross entropy along the model's own gradients, as it is often
  evaluated: the attack is its own judge, and the model is asked once.
- *All attacks*: what is left of that by the diagnostics' attacks (PGD, APGD, Square), and by images that fool the
  network inside: those of quick AutoAttack and those of PGD-40 on the margin. Still an upper bound.

## Honest models

{honest}

## Fakes

All are built around the plain network, but for the signs, which are a network of their own (and are shown the images
that fool the plain one).

{fake}

## Evidence

What the flags say, word by word.

{evidence}
"""


class Row(NamedTuple):
    """A model, and what was seen of it; the three numbers are shares of the images.

    Attributes:
        name: What it is.
        clean: Right when clean.
        naive: Right and left right by PGD-20 on the cross entropy of the model's own gradients, asked once.
        left: Left right by everything: that, the diagnostics' attacks, and images that fool the network inside.
        flags: Those that are raised.
    """

    name: str
    clean: float
    naive: float
    left: float
    flags: list[Flag]


def train(defence: DefenceSpec, records: Records, epochs: int) -> Classifier:
    """Returns a ResNet-9 of width 8; Adam with a cosine schedule, batches of 64."""
    network = Resnet9(width=8).make(1, SIZE, 2, SEED)
    optimiser = torch.optim.Adam(network.parameters(), 1e-3)
    num_batches = len(records) // BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * num_batches)
    shares = np.array([NORMAL, PNEUMONIA]) / (NORMAL + PNEUMONIA)
    for epoch in range(epochs):
        objective = adjusted(defence.make((epoch + 1) / epochs), shares.tolist())
        order = torch.randperm(len(records), generator=generator(SEED, "order", epoch))
        for batch, index in enumerate(order[: num_batches * BATCH].view(-1, BATCH).numpy()):
            x_BCHW, y_B = records.x(index), records.y(index)
            views = objective.views(network.eval(), x_BCHW, y_B, generator(SEED, "views", epoch, batch))
            loss_B = objective.loss(network.train()(views.flatten(0, 1))[:, None], y_B)
            optimiser.zero_grad()
            loss_B.mean().backward()
            optimiser.step()
            schedule.step()
    return network.eval()


class Followed(nn.Module):
    """Lets a missing gradient pass for one of zero, as an evaluation does that catches torch's error and goes on."""

    def __init__(self, network: Classifier):
        super().__init__()
        self.network = network

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Returns the network's logits."""
        return self.network(x_BCHW) + 0.0 * x_BCHW.flatten(1).sum(1, keepdim=True)


def steep_ripple(network: Classifier) -> Classifier:
    """Adds a ripple as high as that of `fakes.shattered` and two and a half times as steep."""
    return fakes.around(network, lambda x_BCHW: x_BCHW + 0.01 * torch.sin(3000 * x_BCHW))


def cleaned(network: Classifier, limit: float = 0.02) -> Classifier:
    """Blurs and rounds an image, without a gradient, where most pixels differ from their neighbours by too much."""

    def before(x_BCHW: Tensor) -> Tensor:
        blurred_BCHW = nn.functional.avg_pool2d(x_BCHW.detach(), 3, 1, 1, count_include_pad=False)
        noisy_B = (x_BCHW.detach() - blurred_BCHW).abs().flatten(1).median(1).values > limit
        return torch.where(noisy_B[:, None, None, None], (8 * blurred_BCHW).round() / 8, x_BCHW)

    return fakes.around(network, before)


def groups(
    plain: Classifier, robust: Classifier, learned: Records
) -> Iterator[tuple[str, Classifier, dict[str, Target]]]:
    """Yields what a group of models has in common, the network inside, and the models; first the honest ones."""
    some_BCHW = learned.x(slice(0, 256))
    int8, robust_int8 = quantise(plain, some_BCHW), quantise(robust, some_BCHW)
    asked, robust_asked = (Session(export_onnx(twin, 1, SIZE)).predict for twin in (int8, robust_int8))
    yield "honest", plain, {"the plain network": fakes.shipped(plain)}
    yield "honest", robust, {"adversarial training": fakes.shipped(robust)}
    yield "honest", robust_int8, {"its int8 file": Target("int8", robust_asked, robust_int8, (robust,))}
    before_and_after = {
        "rounding of grey values to 33 levels": fakes.quantised_input(plain),
        "a thermometer of 24 steps (Buckman et al., 2018)": fakes.thermometer(plain),
        "a cut graph": fakes.detached(plain),
        "answers in steps of a twentieth": fakes.hard_answers(plain),
        "a ripple on grey values": fakes.shattered(plain),
        "a steeper ripple": steep_ripple(plain),
        "grey values in descending steps": fakes.sawtooth(plain),
        "true gradients on 8-bit grey levels only": fakes.true_on_grid(plain),
        "cleaning of what looks noisy": cleaned(plain),
        "logits times 10 000": fakes.saturated(plain),
        "temperature 1/100 (Papernot et al., 2016)": fakes.distilled(plain),
        "fresh noise": fakes.noisy(plain),
        "shrinking and padding at random (Xie et al., 2018)": fakes.resized(plain),
        "one answer for everything": fakes.constant_predictor(plain, 1),
    }
    yield "fake", plain, {name: fakes.shipped(network) for name, network in before_and_after.items()}
    yield "fake", plain, {"activations that are signs": fakes.shipped(fakes.hard_activations(plain, learned))}
    yield (
        "fake",
        int8,
        {
            "int8, attacked through the rounding": Target("int8", asked, fakes.rounded_weights(plain)),
            "int8, attacked through another model's twin": Target("int8", asked, robust_int8),
        },
    )


def fooling(inside: Classifier, records: Records) -> list[Tensor]:
    """Returns images that fool a network: those of quick AutoAttack, and those that fool it as surely as may be."""
    sure = partial(pgd, steps=40, restarts=2, loss="margin", stop=False)
    attacks = partial(autoattack, effort="quick"), sure
    return [attack_images(inside, attack, BUDGET, records, SEED) for attack in attacks]


def seen(name: str, target: Target, fooling_NCHW: list[Tensor], records: Records) -> Row:
    """Returns what a naive evaluation says of a model, what all attacks together leave of it, and the flags."""
    clean_N = predictions(clean_logits(target, records)) == records.labels_N
    followed = Classifier(Followed(target.twin), target.twin.num_classes, mean=0.0, std=1.0)
    (naive_NK,) = attacked_logits(followed, [target], partial(pgd, steps=20), BUDGET, records, SEED)
    naive_N = clean_N & (predictions(naive_NK) == records.labels_N)
    evidence = gather(target, records, BUDGET, SEED)  # what `diagnose` judges
    stands_N = naive_N & evidence.left_N
    for x_NCHW in fooling_NCHW:
        logits_NK = torch.cat([target.predict(part_BCHW) for part_BCHW in x_NCHW.split(64)]).numpy()
        stands_N &= predictions(logits_NK) == records.labels_N
    flags = [flag for flag in judged(evidence) if flag.raised]
    return Row(name, float(clean_N.mean()), float(naive_N.mean()), float(stands_N.mean()), flags)


def table(rows: list[Row]) -> str:
    """Returns a table."""
    lines = ["| model | clean | PGD-20 | all attacks | flags |", "| --- | ---: | ---: | ---: | --- |"]
    for row in rows:
        numbers = " | ".join(f"{100 * share:.1f} %" for share in (row.clean, row.naive, row.left))
        lines.append(f"| {row.name} | {numbers} | {', '.join(f'`{flag.name}`' for flag in row.flags) or 'none'} |")
    return "\n".join(lines)


def page(honest: list[Row], fake: list[Row], num_images: int, minutes: float) -> str:
    """Returns the page."""
    return PAGE.format(
        num_images=num_images,
        radius=f"{BUDGET.radius * 255:g}/255",
        seed=SEED,
        minutes=f"{minutes:.0f}",
        machine=f"{platform.machine()}, torch {torch.__version__}",
        honest=table(honest),
        fake=table(fake),
        evidence="\n".join(f"- {row.name}\n{_listed(row.flags)}" for row in fake),
    )


def _listed(flags: list[Flag]) -> str:
    return "\n".join(f"  - `{flag.name}`: {flag.evidence}" for flag in flags)


def main() -> None:
    """Trains two networks, looks at all models, and writes the page."""
    start = time.process_time()
    torch.set_num_threads(1)
    dataset = Medmnist(name="pneumoniamnist", size=SIZE).load(default_roots())
    records = dataset.test.subset(independent_sample(dataset.test, IMAGES, SEED))
    plain = train(NoDefence(), dataset.train, epochs=5)
    robust = train(FgsmTraining(radius=BUDGET.radius, warmup=0.3), dataset.train, epochs=8)
    rows: dict[str, list[Row]] = {"honest": [], "fake": []}
    for kind, inside, targets in groups(plain, robust, dataset.train):
        images = fooling(inside, records)
        for name, target in targets.items():
            with global_seed(SEED, name):  # of the noise that fakes draw
                rows[kind].append(seen(name, target, images, records))
            print(table(rows[kind][-1:]).splitlines()[-1], f"{time.process_time() - start:.0f} s", flush=True)
    minutes = (time.process_time() - start) / 60
    Path(sys.argv[1]).write_text(page(rows["honest"], rows["fake"], len(records), minutes), encoding="utf-8")


if __name__ == "__main__":
    main()
