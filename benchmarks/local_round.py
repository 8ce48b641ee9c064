"""What the spine costs: a client's round against a hand-written PyTorch loop over the same batches."""

from collections.abc import Callable

import torch
from torch import nn

from benchmarks._bench import Row, interleaved_seconds, main, ratio_rows
from trilemma.data.records import Records
from trilemma.data.roots import default_roots
from trilemma.data.specs import Iid, Phantom
from trilemma.federation.clients import Client, Shard
from trilemma.federation.local_training import batches, local_train
from trilemma.federation.specs import Local, TrainSpec
from trilemma.models.classifier import Classifier
from trilemma.models.specs import Resnet9
from trilemma.privacy.specs import DpSgd
from trilemma.robustness.specs import PgdTraining

NUM_RECORDS, BATCH_SIZE = 256, 64
DATA = Phantom(size=28, train=NUM_RECORDS, val=16, test=16, sites=1, classes=2)


def hand_written(classifier: Classifier, client: Client, spec: TrainSpec, records: Records) -> None:
    """Trains as a script would."""
    optimizer = torch.optim.SGD(classifier.parameters(), lr=spec.local.learning_rate, momentum=spec.local.momentum)
    loss_of = nn.CrossEntropyLoss()
    classifier.train()
    for index in batches(spec, client, len(records), 0):
        optimizer.zero_grad()
        loss_of(classifier(records.x(index)), records.y(index)).backward()
        optimizer.step()


def round_of(spec: TrainSpec, classifier: Classifier, records: Records, baseline: bool = False) -> Callable[[], object]:
    """Returns a case: one client's round of a training, ours or hand-written."""
    steps = spec.local.steps_per_round(len(records))
    plan = spec.privacy.make(len(records), BATCH_SIZE, steps) if isinstance(spec.privacy, DpSgd) else None
    client = Client("client", 0, (Shard(0, False, records),), plan, steps, 1.0)
    if baseline:
        return lambda: hand_written(classifier, client, spec, records)
    return lambda: local_train(spec, client, classifier, records, 0)


def measure() -> list[Row]:
    """Returns the times of a round over those of the hand-written loop, for two widths."""
    records = DATA.load(default_roots()).train
    rows: list[Row] = []
    for width in (16, 64):
        model, local, case = Resnet9(width=width), Local(batch_size=BATCH_SIZE), f"resnet9-w{width}-28"
        classifier = model.make(1, 28, 2, seed=0)
        plain = TrainSpec(data=DATA, partition=Iid(num_clients=1), model=model, local=local, rounds=1)
        private = plain.model_copy(update={"privacy": DpSgd(epsilon=8.0, delta=1e-3)})
        defended = plain.model_copy(update={"defence": PgdTraining(radius=4 / 255, steps=3)})
        cases = {
            f"pytorch/{case}": round_of(plain, classifier, records, baseline=True),
            f"trilemma/{case}": round_of(plain, classifier, records),
            f"trilemma-pgd3/{case}": round_of(defended, classifier, records),
            f"trilemma-dp/{case}": round_of(private, classifier, records),
        }
        rows += ratio_rows(interleaved_seconds(cases, repeats=5), f"pytorch/{case}", "round_ratio")
    return rows


if __name__ == "__main__":
    main("local_round", measure)
