"""The server's own images and the update that it makes on them, for a rule that trusts no hospital more than itself."""

import numpy as np
from torch import Tensor

from trilemma.data.records import Dataset, Records
from trilemma.errors import UserError
from trilemma.federation.aggregation.weighing_specs import FlTrust
from trilemma.federation.clients import Client, Shard
from trilemma.federation.local_training import load_model, local_train
from trilemma.federation.public import refuse_other_form, refuse_shared
from trilemma.federation.specs import FedAvg, TrainSpec
from trilemma.federation.state import TrainingState
from trilemma.models.classifier import Classifier
from trilemma.privacy.specs import NoPrivacy
from trilemma.randomness import numpy_generator

#: The server's number among the clients, which are counted from 0.
SERVER = -1


def root_spec(spec: TrainSpec) -> FlTrust | None:
    """Returns the rule of a training whose server has images of its own, or None."""
    rule = spec.aggregation
    return rule if isinstance(rule, FlTrust) and isinstance(spec.algorithm, FedAvg) else None


def root_images(spec: TrainSpec, dataset: Dataset, public: Dataset | None) -> Records | None:
    """Returns the server's own images, drawn by the seed; None where the rule needs none.

    Args:
        spec: The training.
        dataset: Its images.
        public: What `aggregation.data` names; None where that is the validation split, or not loaded.

    Raises:
        UserError: If there are too few images, or they are not such as the hospitals have.
    """
    rule = root_spec(spec)
    if rule is None or (rule.data is not None and public is None):
        return None
    if public is not None:
        refuse_other_form("aggregation.data", dataset, public, same_classes=True)
        refuse_shared("aggregation.data", dataset, public, "training", public.train)
    records = dataset.val if public is None else public.train
    if len(records) < rule.num_images:
        source = f"the validation split of {dataset.name}" if public is None else public.name
        raise UserError(
            "aggregation.num_images",
            f"{rule.num_images} is more than the {len(records)} images of {source}",
            "Use fewer, or name other images",
        )
    drawn = numpy_generator(spec.seed, "root images").choice(len(records), rule.num_images, replace=False)
    return records.subset(np.sort(drawn))


def root_update(
    spec: TrainSpec,
    root: Records | None,
    classifier: Classifier,
    state: TrainingState,
    num_steps: int,
    teacher: Classifier | None = None,
) -> Tensor | None:
    """Returns the server's own update in a round, made as a client makes one; None where the rule needs none.

    References: Cao et al. (2021), Algorithm 2: as many steps as the clients make.

    Args:
        spec: The training.
        root: The server's images.
        classifier: The workspace.
        state: Before the round.
        num_steps: Of the clients' training.
        teacher: Whose answers the clients learn; None: the labels alone.

    Raises:
        ValueError: If the rule needs images and has none.
    """
    if root_spec(spec) is None:
        return None
    if root is None:
        raise ValueError("a rule with a root set needs its images: prepare(spec, dataset, device, root=...)")
    client = Client("the server", SERVER, (Shard(SERVER, False, root),), None, num_steps, 1.0)
    load_model(classifier, state.params_P, state.buffers_Q)
    public = spec.model_copy(update={"privacy": NoPrivacy()})
    return local_train(public, client, classifier, root, state.round, teacher=teacher).update_P
