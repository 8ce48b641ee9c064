"""A realistic study's results, made up from one table of numbers, so that tests can swap any of them.

Three hospitals, two seeds, fp32 and int8; with a constant predictor, hospitals alone, a poisoned federation,
values that are missing and artefacts that were not attacked. Diagnostics were made and raise nothing; `flagged` raises
a flag and withholds what a study's results then withhold.
"""

import struct
import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trilemma.evaluation.measurement import Measurement
from trilemma.privacy.guarantee import NO_PRIVACY, DpEvent, Guarantee, Trust, Unit
from trilemma.results import Artefact, DataFacts, Evaluated, Example, Results, Run

N = 624
MAJORITY = 0.625
SEEDS = (0, 1)
HOSPITALS = ("hospital 1", "hospital 2", "hospital 3")
RADII = (2 / 255, 4 / 255, 8 / 255)
ATTACKS = (("FGSM Linf", "fgsm", 1.15), ("PGD-20 Linf", "pgd", 1.0), ("all at once Linf", "all_at_once", 0.97))
STRENGTHS = {"transfer": 0, "fgsm": 1, "pgd": 3, "all_at_once": 5}
FULL_BYTES = 6_573_210
FLAGS = (
    "zero_gradient", "fgsm_beats_pgd", "black_box_beats_white_box", "large_radius_survives", "rises_with_radius",
    "not_converged", "logit_scaling", "randomised", "constant", "twin_disagrees",
)  # fmt: skip
DIAGNOSTICS = "diagnostics Linf 8/255"
EVIDENCE = "Square breaks 31 of the 176 among 256 images that PGD-50 leaves (p < .001)"


@dataclass(frozen=True)
class Made:
    """What one configuration shall measure (means over seeds)."""

    auroc: float
    accuracy: float
    robust: tuple[float, float, float]
    algorithm: str = "fedavg"
    epsilon: float | None = None
    defence: str = "none"
    threat: str = "none"
    unit: Unit = "example"
    trust: Trust = "local"


MADE = {
    "no DP + no defence": Made(0.962, 0.872, (0.42, 0.11, 0.01)),
    "centralised": Made(0.968, 0.881, (0.45, 0.13, 0.01), algorithm="centralised"),
    "local only": Made(0.921, 0.815, (0.38, 0.09, 0.01), algorithm="local_only"),
    "PGD 4/255": Made(0.951, 0.853, (0.81, 0.74, 0.66), defence="pgd"),
    "DP epsilon 8": Made(0.913, 0.808, (0.30, 0.05, 0.0), epsilon=7.96),
    "DP epsilon 8 + PGD 4/255": Made(0.894, 0.789, (0.76, 0.71, 0.645), epsilon=7.96, defence="pgd"),
    "DP epsilon 1": Made(0.5, MAJORITY, (MAJORITY, MAJORITY, MAJORITY), epsilon=0.99),
    "label flip": Made(0.902, 0.776, (0.33, 0.07, 0.01), threat="label_flip"),
}
PLAIN, PGD, DP = "no DP + no defence", "PGD 4/255", "DP epsilon 8"
BOTH, CONSTANT = "DP epsilon 8 + PGD 4/255", "DP epsilon 1"


def build(made: dict[str, Made] = MADE, *, synthetic: bool = False, **fields: Any) -> Results:
    """Returns the results; `fields` replaces fields of Results."""
    runs, artefacts, evaluated = [], [], []
    for label, numbers in made.items():
        for seed in SEEDS:
            for client in range(len(HOSPITALS)) if numbers.algorithm == "local_only" else (None,):
                run = _run(label, numbers, seed, client)
                runs.append(run)
                for compression in ("fp32", "int8"):
                    artefact = _artefact(run, compression)
                    artefacts.append(artefact)
                    evaluated += _evaluated(run, artefact, numbers)
    evaluated = _with_gaps(_with_transfer(evaluated, artefacts, made), runs, artefacts)
    if synthetic:
        runs = [replace(run, spec={**run.spec, "data": {"kind": "phantom"}}) for run in runs]
    results = Results(
        name="pneumonia-trilemma",
        question="What do privacy, adversarial training and int8 cost, alone and together?",
        study_toml='name = "pneumonia-trilemma"\nseeds = [0, 1]\n\n[base]\nrounds = 10\n',
        seeds=SEEDS,
        data=(_facts(synthetic),),
        runs=tuple(runs),
        artefacts=tuple(artefacts),
        evaluated=tuple(evaluated),
        examples=_examples(artefacts),
        missing=("label flip, seed 1, int8: PGD-20 Linf",),
        command="trilemma run studies/pneumonia.toml",
        environment={"trilemma": "0.1.0"},
    )
    return replace(results, **fields)


def pick(results: Results, configuration: str, compression: str) -> list[Artefact]:
    """Returns the artefacts of a configuration."""
    keys = [run.key for run in results.runs if run.configuration == configuration]
    return [a for a in results.artefacts if a.run_key in keys and a.compression == compression]


def flagged(results: Results, artefacts: list[Artefact], name: str, evidence: str = EVIDENCE) -> Results:
    """Returns the results with a flag raised for some artefacts, and all that was measured under attack withheld."""
    keys = {artefact.key for artefact in artefacts}

    def change(e: Evaluated) -> Evaluated:
        if e.artefact_key not in keys or e.kind in ("clean", "cost"):
            return e
        if e.kind == "diagnostics":
            seen = {"value": 1.0, "reason": evidence}
            flags = [m._replace(**seen) if m.metric == f"flag_{name}" else m for m in e.measurements]
            return replace(e, measurements=tuple(flags))
        reason = f"{name}: {evidence}"
        return replace(e, measurements=tuple(withhold(m, reason) for m in e.measurements))

    return replace(results, evaluated=tuple(change(e) for e in results.evaluated))


def bounded(results: Results, artefacts: list[Artefact], evaluation: str, reason: str, known: float = 0.1) -> Results:
    """Returns the results with the robust accuracies of an attack on some artefacts marked as too high."""
    keys = {artefact.key for artefact in artefacts}

    def change(e: Evaluated) -> Evaluated:
        if e.artefact_key not in keys or e.evaluation != evaluation:
            return e
        changed = []
        for m in e.measurements:
            marks = m.metric in ("robust_accuracy", "robust_accuracy_among_correct")
            changed.append(m._replace(status="bound", reason=reason) if marks else m)
            if m.metric == "robust_accuracy":
                changed.append(Measurement("robust_accuracy_known", known, n=N, radius=m.radius, reason=reason))
        return replace(e, measurements=tuple(changed))

    return replace(results, evaluated=tuple(map(change, results.evaluated)))


def withhold(m: Measurement, reason: str) -> Measurement:
    """Returns a measurement whose value is withheld."""
    return m._replace(value=None, low=None, high=None, status="withheld", reason=reason)


def png(image_HW: np.ndarray) -> bytes:
    """Returns a greyscale image in [0, 1] as PNG."""
    rows_HW = np.round(np.clip(image_HW, 0, 1) * 255).astype(np.uint8)
    height, width = rows_HW.shape

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    raw = b"".join(b"\x00" + row.tobytes() for row in rows_HW)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b"")


def _wobble(label: str, seed: int, client: int | None) -> float:
    """A difference between seeds of about half a point, the same for every metric of a training."""
    code = zlib.crc32(f"{label}/{seed}/{client}".encode()) % 1000 / 1000
    return 0.0 if label == CONSTANT else 0.004 * (code - 0.5) + (0.002 if seed else -0.002)


def _spec(numbers: Made, seed: int, client: int | None) -> dict[str, Any]:
    algorithm = {"kind": numbers.algorithm} | ({} if client is None else {"client": client})
    privacy = {"kind": "none"} if numbers.epsilon is None else {"kind": "dp_sgd", "epsilon": round(numbers.epsilon)}
    return {
        "data": {"kind": "medmnist", "name": "pneumoniamnist", "size": 28},
        "partition": {"kind": "iid", "num_clients": 3},
        "model": {"kind": "resnet9", "width": 16},
        "algorithm": algorithm,
        "local": {"learning_rate": 0.05},
        "defence": {"kind": numbers.defence},
        "privacy": privacy,
        "threat": {"kind": numbers.threat},
        "rounds": 10,
        "seed": seed,
    }


def _run(label: str, numbers: Made, seed: int, client: int | None) -> Run:
    guarantee = NO_PRIVACY
    if numbers.epsilon is not None:
        guarantee = Guarantee(
            unit=numbers.unit,
            trust=numbers.trust,
            delta=1e-4,
            epsilon_by_client={name: numbers.epsilon - 0.01 * i for i, name in enumerate(HOSPITALS)},
            events_by_client={
                name: (DpEvent(noise_multiplier=1.1, sampling_rate=0.05, steps=200),) for name in HOSPITALS
            },
            clip=1.0,
            accountant="PRV accountant, opacus 1.6",
            noise_source="seeded noise, for research",
            outside=("the number of records of each hospital",),
        )
    history = [
        {
            "round": i + 1,
            "loss": 0.7 * 0.75**i + 0.1,
            "val_accuracy": numbers.accuracy * (1 - 0.35 * 0.6 ** (i + 1)),
            "bytes_up": 0 if numbers.algorithm != "fedavg" else 3 * FULL_BYTES,
            "bytes_down": 0 if numbers.algorithm != "fedavg" else 3 * FULL_BYTES,
            "seconds": 4.0,
        }
        for i in range(10)
    ]
    return Run(
        key=f"s1:{zlib.crc32(f'{label}/{seed}/{client}'.encode()):08x}",
        configuration=label,
        varied={"privacy": "none", "defence": numbers.defence},
        labels={"aggregation": "mean", "threat": numbers.threat.replace("_", " ")},
        seed=seed,
        spec=_spec(numbers, seed, client),
        history=history,
        guarantee=guarantee,
        provenance={
            "torch": "2.13.0",
            "device": "cpu",
            "git": "0123abc",
            "cpu": {"flags": ["avx2"], "cores": 2},
        },
        seconds=40.0 if numbers.epsilon is None else 95.0,
        peak_memory_bytes=812_000_000,
        num_parameters=1_640_000,
    )


def _artefact(run: Run, compression: str) -> Artefact:
    size = FULL_BYTES if compression == "fp32" else FULL_BYTES // 4 + 40_000
    return Artefact(f"{run.key}/{compression}", run.key, compression, size, 0.0, run.guarantee)


def rate(metric: str, value: float, **where: Any) -> Measurement:
    """A share of N records with the interval of its normal approximation."""
    half = 1.96 * (max(value * (1 - value), 1e-4) / N) ** 0.5
    return Measurement(metric, value, max(0.0, value - half), min(1.0, value + half), n=N, **where)


def _evaluated(run: Run, artefact: Artefact, numbers: Made) -> list[Evaluated]:
    constant = run.configuration == CONSTANT
    shift = _wobble(run.configuration, run.seed, run.spec["algorithm"].get("client"))
    shift -= 0.003 if artefact.compression == "int8" and not constant else 0.0
    accuracy = numbers.accuracy + shift
    clean = [
        rate("accuracy", accuracy),
        rate("balanced_accuracy", 0.5 if constant else accuracy - 0.02),
        rate("auroc", numbers.auroc + shift / 2),
        Measurement("mcc", None, n=N, unit="coefficient", status="undefined", reason="one class is never predicted")
        if constant
        else Measurement("mcc", 2 * accuracy - 1, 2 * accuracy - 1.06, 2 * accuracy - 0.94, N, "coefficient"),
        rate("sensitivity", 1.0 if constant else min(1.0, accuracy + 0.08)),
        rate("specificity", 0.0 if constant else accuracy - 0.13),
        rate("expected_calibration_error", 0.04),
        Measurement("majority_accuracy", MAJORITY, n=N),
        *(rate("accuracy", accuracy + 0.01 * (i - 1), client=name) for i, name in enumerate(HOSPITALS)),
        rate("accuracy", accuracy - 0.01, client="worst"),
    ]
    speed = 1.0 if artefact.compression == "fp32" else 0.57
    cost = [
        Measurement("file_bytes", float(artefact.file_bytes), unit="bytes"),
        Measurement("multiply_adds", 4_321_000.0, n=1, unit="multiply-adds"),
        Measurement("latency_batch1_seconds", 0.0021 * speed, 0.0019 * speed, 0.0024 * speed, 50, "seconds"),
        Measurement("latency_batch32_seconds", 0.052 * speed, 0.051 * speed, 0.055 * speed, 50, "seconds"),
    ]
    found = [
        Evaluated(artefact.key, "clean", "clean", tuple(clean), 1.0),
        Evaluated(artefact.key, "cost", "cost", tuple(cost), 1.0),
    ]
    for label, kind, easier in ATTACKS:
        attacked = []
        for radius, value in zip(RADII, numbers.robust, strict=True):
            robust = value if constant else min(accuracy, max(0.0, value * easier + shift))
            attacked.append(rate("robust_accuracy", robust, radius=radius))
            attacked.append(rate("robust_accuracy_among_correct", min(1.0, robust / accuracy), radius=radius))
            attacked.append(rate("attack_success_rate", max(0.0, 1 - robust / accuracy), radius=radius))
            attacked.append(rate("sensitivity", 1.0 if constant else min(1.0, robust + 0.06), radius=radius))
            attacked.append(rate("specificity", 0.0 if constant else max(0.0, robust - 0.11), radius=radius))
            if kind == "pgd":
                attacked.append(rate("robust_auroc", 0.5 if constant else 0.98 * robust, radius=radius))
        found.append(Evaluated(artefact.key, label, kind, tuple(attacked), 12.0, STRENGTHS[kind]))
    looked = "on 0 of 256 images the gradient is zero"
    flags = [Measurement(f"flag_{name}", 0.0, n=256, unit="count", reason=looked, radius=8 / 255) for name in FLAGS]
    return [*found, Evaluated(artefact.key, DIAGNOSTICS, "diagnostics", tuple(flags), 6.0)]


def _with_transfer(evaluated: list[Evaluated], artefacts: list[Artefact], made: dict[str, Made]) -> list[Evaluated]:
    transfer = []
    for i, target in enumerate(artefacts):
        clean = next(e for e in evaluated if e.artefact_key == target.key and e.kind == "clean")
        accuracy = clean.measurements[0].value
        assert accuracy is not None
        attacked = [
            rate(
                "robust_accuracy",
                max(0.0, accuracy - 0.02 - 0.01 * ((i + 3 * j) % 7)),
                radius=8 / 255,
                source=source.key,
            )
            for j, source in enumerate(artefacts)
            if source.key != target.key
        ]
        worst = min(m.value for m in attacked if m.value is not None)
        attacked.append(rate("robust_accuracy", worst - 0.01, radius=8 / 255))
        transfer.append(
            Evaluated(target.key, "Transfer PGD-20 Linf", "transfer", tuple(attacked), 20.0, STRENGTHS["transfer"])
        )
    return evaluated + transfer


def _with_gaps(evaluated: list[Evaluated], runs: list[Run], artefacts: list[Artefact]) -> list[Evaluated]:
    """Takes away what a real study may lack: an attack that did not run, and an AUROC that is not defined."""
    keys = {run.configuration + str(run.seed): run.key for run in runs}
    unattacked = f"{keys.get('label flip1')}/int8"
    undefined = f"{keys.get(BOTH + '1')}/int8"
    kept = [e for e in evaluated if not (e.artefact_key == unattacked and e.kind == "pgd")]
    return [_without_auroc(e) if e.artefact_key == undefined and e.kind == "clean" else e for e in kept]


def _without_auroc(evaluated: Evaluated) -> Evaluated:
    gap = Measurement("auroc", None, n=N, status="undefined", reason="the test split holds one class only")
    return replace(evaluated, measurements=tuple(gap if m.metric == "auroc" else m for m in evaluated.measurements))


def _facts(synthetic: bool) -> DataFacts:
    return DataFacts(
        name="phantom 64" if synthetic else "pneumoniamnist 28",
        source="Procedural phantoms." if synthetic else "MedMNIST v2, CC BY 4.0.",
        synthetic=synthetic,
        classes=("normal", "pneumonia"),
        positive_class="pneumonia",
        num_records={"train": 4708, "val": 524, "test": N},
        majority_accuracy=MAJORITY,
        clients=[
            {
                "client": name,
                "records": 1569 + i,
                "patients": 900 + i,
                "classes": {"normal": 405 + i, "pneumonia": 1164},
            }
            for i, name in enumerate(HOSPITALS)
        ],
        warnings=("2 images occur in train and in test.",),
    )


def _examples(artefacts: list[Artefact]) -> tuple[Example, ...]:
    y, x = np.mgrid[-1:1:28j, -1:1:28j]
    lungs = np.exp(-((np.abs(x) - 0.42) ** 2) / 0.05 - (y**2) / 0.4)
    noise = np.random.default_rng(0).choice([-1.0, 1.0], size=lungs.shape)
    examples = []
    for i, artefact in enumerate(artefacts[:6:2]):
        clean = 0.75 - 0.6 * lungs + 0.25 * i * np.exp(-((x - 0.4) ** 2 + (y - 0.2) ** 2) / 0.05)
        examples.append(
            Example(
                artefact_key=artefact.key,
                title="PGD-20 Linf 8/255",
                clean_png=png(clean),
                perturbation_png=png(0.5 + 0.5 * noise),
                adversarial_png=png(clean + 8 / 255 * noise),
                scale=15.94,
                truth="normal",
                clean_prediction=("normal", 0.93),
                adversarial_prediction=("pneumonia", 0.88),
            )
        )
    return tuple(examples)
