"""What compression buys and costs: bytes, multiply-adds, latency, accuracy and robust accuracy of what ships.

ResNet-9 and ResNet-18 with group norm ("-group") and with weight standardisation, which is folded when a model ships
("-fold"), trained by three hospitals on PneumoniaMNIST and on chest X-rays of 64 pixels; then every compression. The
session on the file answers, on the official test split; PGD-10 at 4/255 follows the twin.

Latency is measured in turns over all files and the network in torch, one thread each. `latency_ratio` is how many times
less time than the fp32 file of the same network with the same norm in ONNX Runtime takes, `latency_ratio_group` than
that with group norm, `latency_ratio_torch` than torch; over 1 is faster. A row without a width is of the published one
(64), whose weights are untrained: latency does not depend on them, except that channels are cut by size.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks._bench import Row, interleaved_seconds, print_wide, show
from benchmarks._compression_models import (
    MORE,
    NETWORKS,
    NORMS,
    PREPARED,
    QUICK_SETTINGS,
    SETTINGS,
    SIMPLE,
    Setting,
    Shipped,
    loaded,
    shipped,
    trained,
    training,
)
from trilemma.attacks.evasion.specs import Pgd
from trilemma.compression.folding import plain_copy
from trilemma.data.records import Dataset, Records
from trilemma.evaluation.clean import clean_measurements
from trilemma.evaluation.harness import Target, attacked_logits, clean_logits
from trilemma.evaluation.measurement import Measurement
from trilemma.evaluation.robustness import robust_measurements
from trilemma.models.classifier import Classifier
from trilemma.randomness import numpy_generator

PUBLISHED_WIDTH = 64
BATCHES = (1, 32)
#: What takes part in the race beside fp32 and int8: what changes the operations.
RACING = ("fp32", "int8", "channels50", "channels50-distil-int8")
ATTACK = Pgd(norm="linf", radii=(4 / 255,), steps=10)


class Plan(NamedTuple):
    """How much is measured.

    Attributes:
        settings: Data sets.
        widths: Of the races beside the trained one.
        turns: Batch size -> turns of a race at a width of 16; a wider network takes fewer.
        attacked: Test images that are attacked.
        networks: Which.
    """

    settings: dict[str, Setting]
    widths: tuple[int, ...] = (32, PUBLISHED_WIDTH)
    turns: tuple[int, int] = (101, 25)
    attacked: int = 200
    networks: tuple[str, ...] = tuple(NETWORKS)


FULL = Plan(SETTINGS)
QUICK = Plan(QUICK_SETTINGS, (), (3, 3), 16, ("resnet9",))


class Wanted(NamedTuple):
    """What is aimed at: a metric of rows whose name starts and ends so, and its bound."""

    said: str
    start: str
    end: str
    metric: str
    at_least: float | None = None
    at_most: float | None = None

    def is_about(self, row: Row) -> bool:
        """Returns whether a row is what is aimed at."""
        return row.metric == self.metric and row.name.startswith(self.start) and row.name.endswith(self.end)


TARGETS = (
    Wanted("int8 takes at most 1/3.6 of the bytes", "int8", "", "bytes_ratio", at_most=1 / 3.6),
    Wanted("int8 with the folding norm is 2.5 times faster", "int8-fold", "batch32", "latency_ratio", at_least=2.5),
    Wanted("int8 by calibration loses at most 1 point", "int8-fold", "", "accuracy_loss", at_most=1.0),
    Wanted("int8 by training loses at most .5 points", "int8-qat-fold", "", "accuracy_loss", at_most=0.5),
    Wanted("sparse int8 takes at most 1/20 of the bytes", "gradual", "-28", "bytes_ratio", at_most=1 / 20),
    Wanted("sparse int8 loses at most 1 AUROC point", "gradual", "-28", "auroc_loss", at_most=1.0),
    Wanted("half the multiply-adds are 1.6 times faster", "channels50-fold", "batch32", "latency_ratio", at_least=1.6),
)


def quality(name: str, model: Shipped, test: Records, attacked: Records) -> list[Row]:
    """Returns accuracy, AUROC and robust accuracy of a model that ships."""
    target = Target(name, model.session.predict, model.twin)
    clean_NK = clean_logits(target, test)
    found = clean_measurements(clean_NK, test.labels_N, test.units(), np.zeros(len(test), int), ("all",), 0)
    rows = [_row(name, one) for one in found if one.metric in ("accuracy", "auroc") and one.client is None]
    evasion, budget = ATTACK.make(target.access), ATTACK.budgets[0]
    (adversarial_NK,) = attacked_logits(target.twin, [target], evasion, budget, attacked, 0)
    clean_NK = clean_logits(target, attacked)
    labels_N, units_N = attacked.labels_N, attacked.units()
    (robust, *_) = robust_measurements(adversarial_NK, clean_NK, labels_N, units_N, budget.radius, None, 0)
    return [row for row in (*rows, _row(name, robust)) if row is not None]


def _row(name: str, one: Measurement) -> Row | None:
    """Returns a measurement as a row, or None where there is no value."""
    return None if one.value is None else Row(name, one.metric, one.value, one.unit, one.low, one.high)


def against_fp32(rows: list[Row], name: str, baseline: str) -> list[Row]:
    """Returns what a model loses of the fp32 one's accuracies, in points: hundredths of 1."""
    values = {(row.name, row.metric): row.value for row in rows}
    lost = []
    for metric in ("accuracy", "auroc", "robust_accuracy"):
        if (name, metric) in values and (baseline, metric) in values:
            points = 100 * (values[baseline, metric] - values[name, metric])
            lost.append(Row(name, f"{metric}_loss", points, "points"))
    return lost


def family(network: str, norm: str, setting: Setting, dataset: Dataset, cache: Path, say: Callable[[str], None]):
    """Yields the name and the model of every compression of one network with one norm, fp32 first."""
    shape = (dataset.channels, dataset.image_size, dataset.image_size)
    model = NETWORKS[network].model_validate({"width": setting.width, "norm": norm})
    classifier = trained(training(setting, model), dataset, cache)
    for label, compression in {**SIMPLE, **(MORE if norm == "weight" else {})}.items():
        try:
            yield f"{label}-{NORMS[norm]}", shipped(classifier, compression, shape, dataset.train)
        except ValueError as error:
            say(f"{label}-{NORMS[norm]}/{network} is skipped: {error}")
    for label, prepared in PREPARED.items():
        if setting.prepared and norm in prepared.norms:
            classifier = trained(training(setting, model, **{prepared.field: prepared.value}), dataset, cache)
            yield f"{label}-{NORMS[norm]}", shipped(classifier, prepared.compression, shape)


def measured(network: str, data: str, plan: Plan, dataset: Dataset, cache: Path, say: Callable[[str], None]):
    """Returns the rows of bytes and quality of one network on one data set, and the trained models that race."""
    rows: list[Row] = []
    racing: dict[str, Shipped] = {}
    setting, test = plan.settings[data], dataset.test
    order = numpy_generator(0, "calibration").permutation(len(test))[: plan.attacked]
    for norm in NORMS:
        baseline: tuple[str, Shipped] | None = None
        for label, model in family(network, norm, setting, dataset, cache, say):
            name = f"{label}/{network}-w{setting.width}/{data}"
            baseline = baseline or (name, model)
            say(f"measuring {name}")
            rows.append(Row(name, "bytes", model.num_bytes, "bytes"))
            rows.append(Row(name, "bytes_ratio", model.num_bytes / baseline[1].num_bytes, "ratio"))
            rows.append(Row(name, "multiply_adds", model.multiply_adds, "count"))
            rows += quality(name, model, test, test.subset(np.sort(order)))
            rows += against_fp32(rows, name, baseline[0])
            racing |= {label: model} if label.rpartition("-")[0] in RACING else {}
    return rows, racing


def race(name: str, models: dict[str, Shipped], image_shape: tuple[int, int, int], plan: Plan, width: int) -> list[Row]:
    """Returns the latencies of files and of the fp32 networks in torch, in turns, and their ratios."""
    rows = []
    for batch, turns in zip(BATCHES, plan.turns, strict=True):
        x_BCHW = torch.rand(batch, *image_shape, generator=torch.Generator().manual_seed(0))
        # The session itself: what `predict` does around it would count against the fastest.
        cases: dict[str, Callable[[], object]] = {
            label: partial(model.session._run, x_BCHW.numpy()) for label, model in models.items()
        }
        for label, model in models.items():
            if label.startswith("fp32"):
                cases[label.replace("fp32", "torch")] = partial(_in_torch, plain_copy(model.twin), x_BCHW)
        times = interleaved_seconds(cases, max(3, min(turns, turns * 16 // width)))
        for label, own in times.items():
            row = f"{label}/{name}/batch{batch}"
            rows.append(_quartiles(row, "seconds", own, "seconds"))
            norm = label.rpartition("-")[2]
            for metric, base in (
                ("latency_ratio", f"fp32-{norm}"),
                ("latency_ratio_group", "fp32-group"),
                ("latency_ratio_torch", f"torch-{norm}"),
            ):
                ratios = [theirs / mine for mine, theirs in zip(own, times[base], strict=True)]
                rows.append(_quartiles(row, metric, ratios, "ratio"))
    return rows


def _in_torch(classifier: Classifier, x_BCHW: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return classifier(x_BCHW)


def _quartiles(name: str, metric: str, values: list[float], unit: str) -> Row:
    low, middle, high = (float(value) for value in np.quantile(values, (0.25, 0.5, 0.75)))
    return Row(name, metric, middle, unit, low, high)


def untrained(network: str, width: int, image_shape: tuple[int, int, int]) -> dict[str, Shipped]:
    """Returns the models of a race at a width that nothing was trained at."""
    models = {}
    for norm, called in NORMS.items():
        spec = NETWORKS[network].model_validate({"width": width, "norm": norm})
        classifier = spec.make(image_shape[0], image_shape[1], 2, seed=0).eval()
        for label in RACING[:3] if norm == "weight" else RACING[:2]:
            models[f"{label}-{called}"] = shipped(classifier, {**SIMPLE, **MORE}[label], image_shape)
    return models


def measure(plan: Plan, cache: Path, say: Callable[[str], None]) -> list[Row]:
    """Returns every row; `say` is told what is being done and what is left out."""
    rows: list[Row] = []
    for data, setting in plan.settings.items():
        dataset = loaded(setting)
        if isinstance(dataset, str):
            say(dataset)
            continue
        shape = (dataset.channels, dataset.image_size, dataset.image_size)
        pixels = "" if dataset.image_size == 28 else f"-{dataset.image_size}px"
        for network in plan.networks:
            found, racing = measured(network, data, plan, dataset, cache, say)
            rows += found
            say(f"timing {network} at {dataset.image_size} pixels")
            rows += race(f"{network}-w{setting.width}{pixels}", racing, shape, plan, setting.width)
            for width in plan.widths:
                shown = "" if width == PUBLISHED_WIDTH else f"-w{width}"
                rows += race(f"{network}{shown}{pixels}", untrained(network, width, shape), shape, plan, width)
    return rows


def met(rows: Sequence[Row]) -> Table:
    """Returns the targets and what was measured of them, or that nothing was."""
    table = Table(title="targets")
    for column in ("target", "row", "measured", "met"):
        table.add_column(column)
    for wanted in TARGETS:
        about = [row for row in rows if wanted.is_about(row)]
        for row in about:
            enough = wanted.at_least is None or row.value >= wanted.at_least
            little = wanted.at_most is None or row.value <= wanted.at_most
            table.add_row(wanted.said, row.name, f"{row.value:.4g}", "yes" if enough and little else "no")
        if not about:
            table.add_row(wanted.said, "none", "", "not measured")
    return table


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compression")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="tiny networks on phantoms: whether it runs at all")
    parser.add_argument("--cache", type=Path, help="folder that keeps trained models")
    parser.add_argument("--network", choices=list(NETWORKS), help="this one alone")
    parser.add_argument("--data", choices=list(SETTINGS), help="these images alone")
    chosen = parser.parse_args(arguments)
    if chosen.quick and (chosen.data or chosen.network):
        parser.error("--quick has images and a network of its own")
    torch.set_num_threads(1)
    plan = QUICK if chosen.quick else FULL
    if chosen.network:
        plan = plan._replace(networks=(chosen.network,))
    if chosen.data:
        plan = plan._replace(settings={chosen.data: SETTINGS[chosen.data]})
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(plan, chosen.cache or Path(folder), lambda sentence: console.print(sentence, highlight=False))
    if not rows:
        parser.exit(1, "nothing was measured: the images are missing\n")
    show("compression", rows, chosen.json)
    if not chosen.json:
        print_wide(met(rows))


if __name__ == "__main__":
    main()
