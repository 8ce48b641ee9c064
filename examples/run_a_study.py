"""Runs a small study from Python and reads its numbers from the store."""

import os
import tempfile
from pathlib import Path

from rich.console import Console

from trilemma.data.roots import default_roots
from trilemma.study.assemble import assemble
from trilemma.study.engine import Engine
from trilemma.study.load import load_study
from trilemma.study.plan import make_plan
from trilemma.study.progress import Progress
from trilemma.study.store import Store
from trilemma.study.workplace import Workplace

STUDY = """
name = "small"
question = "What does int8 cost on phantoms?"
base.data = { kind = "phantom", size = 24, train = 240, val = 12, test = 60, sites = 2, classes = 2, shift = 0 }
base.partition = { kind = "by_site", num_clients = 2 }
base.model = { kind = "resnet9", width = 4 }
base.local = { optimizer = "adam", learning_rate = 0.003, batch_size = 16 }
compressions = [{ kind = "none" }, { kind = "int8" }]
evaluations = [{ kind = "clean" }, { kind = "pgd", radii = ["4/255"], steps = 3 }]
"""

with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    (folder / "study.toml").write_text(STUDY)
    plan = make_plan(load_study(folder / "study.toml"), "study.toml")
    place = Workplace(folder / "store", default_roots(), device="cpu", threads=1, owner=os.getpid())
    with Store(place.folder, write=True) as store:
        Engine(plan, store, place, 1, Progress(Console(), quiet=True)).run()
        results = assemble(plan, store, STUDY, "trilemma run study.toml")
names = {artefact.key: artefact.compression for artefact in results.artefacts}
for artefact, m in ((names[e.artefact_key], m) for e in results.evaluated for m in e.measurements):
    if m.metric in ("accuracy", "robust_accuracy") and m.client is None and m.value is not None:  # None has a reason
        print(f"{artefact}: {m.metric} {m.value:.2f}, 95 % interval {m.low:.2f} to {m.high:.2f}")
