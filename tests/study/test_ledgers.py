"""A study and the hospitals' budget books: what is booked when, what is refused before anything is trained."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.pictures import write_images
from helpers.tiny_study import PRIVATE, plan_of, rows_of, write_study
from trilemma.data.records import Records
from trilemma.errors import UserError
from trilemma.federation.round import run_round
from trilemma.federation.training import guarantee, initial_state, planned_events, prepare
from trilemma.privacy.ledger import Ledger
from trilemma.study import holdings, train_job, workplace
from trilemma.study.holdings import records_fingerprint, release_of
from trilemma.study.ledgers import book_path, check_books
from trilemma.study.workplace import Books, Workplace


@pytest.fixture
def study(tmp_path):
    return write_study(tmp_path, PRIVATE)


@pytest.fixture
def run(trilemma, study, tmp_path):
    """Runs the study with the books, changed by overrides."""

    def call(*overrides, store="store"):
        changes = [part for override in overrides for part in ("--set", override)]
        where = ("--store", tmp_path / store, "--ledgers", tmp_path / "books", "--jobs", 1, "--quiet")
        return trilemma("run", study, *where, *changes)

    return call


@pytest.fixture
def create(trilemma, study, tmp_path):
    def call(budget, *overrides):
        changes = [part for override in overrides for part in ("--set", override)]
        folder = tmp_path / "books"
        return trilemma("ledger", "create", folder, "--study", study, "--epsilon", budget, "--delta", 1e-3, *changes)

    return call


def books_in(tmp_path):
    return [Ledger.open(path) for path in sorted((tmp_path / "books").glob("*.jsonl"))]


def cost_of(study, roots, *overrides) -> float:
    """What the study's first training costs a hospital."""
    training = plan_of(study, *overrides).trainings[0]
    dataset = training.spec.data.load(roots)
    federation = prepare(training.spec, dataset, torch.device("cpu"))
    state = initial_state(federation)
    while state.round < training.spec.rounds:
        state = run_round(federation, state)
    claimed = guarantee(federation, state)
    assert planned_events(federation) == claimed.events_by_client  # what is booked is what runs
    return claimed.epsilon


def test_a_training_is_booked_before_its_first_round_and_once(create, run, study, roots, tmp_path, monkeypatch):
    assert create(50.0)[0] == 0
    seen, real = [], train_job.run_round

    def watched(federation, state):
        seen.append([len(book.entries) for book in books_in(tmp_path)])
        return real(federation, state)

    monkeypatch.setattr(train_job, "run_round", watched)
    code, _, err = run()
    assert (code, err) == (0, "") and seen == [[1, 1]] * 3
    books = books_in(tmp_path)
    assert [book.spent() for book in books] == [cost_of(study, roots)] * 2
    assert {entry.training for book in books for entry in book.entries} == {plan_of(study).trainings[0].key}
    before = [book.content for book in books]
    assert run()[0] == 0  # it is in the store
    assert run(store="another")[0] == 0  # trained again, with the same noise: the very same release
    assert [book.content for book in books_in(tmp_path)] == before
    assert run("seeds=[1]")[0] == 0
    assert [len(book.entries) for book in books_in(tmp_path)] == [2, 2]


def test_other_code_or_threads_make_another_release(create, run, tmp_path, monkeypatch):
    assert create(50.0)[0] == 0 and run()[0] == 0
    monkeypatch.setattr(holdings, "_code", lambda: "another")
    assert run()[0] == 0  # what is stored is not trained again, whatever the code
    assert [len(book.entries) for book in books_in(tmp_path)] == [1, 1]
    assert run(store="another")[0] == 0
    assert [len(book.entries) for book in books_in(tmp_path)] == [2, 2]


@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_CBWR"])
def test_other_kernels_make_another_release(name, study, roots, tmp_path, monkeypatch):
    (training,) = plan_of(study).trainings
    place = Workplace(tmp_path / "store", roots, "cpu", 1, os.getpid())
    dataset = place.dataset(training.spec.data)
    before = release_of(place, training, dataset)
    monkeypatch.setenv("MKL_NUM_THREADS", "7")  # threads are counted as PyTorch was told them
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert release_of(place, training, dataset) == before is not None
    monkeypatch.setenv(name, "AVX2")
    assert release_of(place, training, dataset) != before
    monkeypatch.delenv(name)
    assert release_of(place, training, dataset) == before
    with monkeypatch.context() as patched:
        patched.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
        assert release_of(place, training, dataset) != before
    monkeypatch.setattr(torch.__config__, "show", lambda: "another")
    assert release_of(place, training, dataset) != before


def test_fresh_noise_is_booked_by_every_start_for_what_it_still_runs(create, run, study, tmp_path, monkeypatch):
    fresh = 'base.privacy={ kind = "dp_sgd", noise_multiplier = 2.0, delta = 1e-3, noise = "system" }'
    assert create(50.0, fresh)[0] == 0
    real, rounds = train_job.run_round, []

    def stops_in_the_second_round(federation, state):
        if state.round == 1 and not rounds:
            rounds.append(state.round)
            raise KeyboardInterrupt
        return real(federation, state)

    monkeypatch.setattr(train_job, "run_round", stops_in_the_second_round)
    assert run(fresh)[0] == 130
    assert run(fresh)[0] == 0
    steps = [[entry.events[0][2] for entry in book.entries] for book in books_in(tmp_path)]
    assert steps == [[3, 2], [3, 2]]  # the second round may have been released twice
    assert run(fresh)[0] == 0 and run(fresh, store="another")[0] == 0
    assert [[entry.events[0][2] for entry in book.entries] for book in books_in(tmp_path)] == [[3, 2, 3], [3, 2, 3]]


def test_a_killed_run_costs_what_an_undisturbed_one_does(create, study, roots, tmp_path):
    """The real command, killed with SIGKILL as soon as it has booked, then run to its end."""
    assert create(50.0)[0] == 0
    where = ("--store", tmp_path / "store", "--ledgers", tmp_path / "books", "--jobs", 1, "--quiet")
    command = [sys.executable, "-m", "trilemma", "run", study, *where]
    environment = {**os.environ, "TRILEMMA_CACHE": str(roots.cache)}
    process = subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.DEVNULL)
    give_up = time.monotonic() + 120
    while not all(book.entries for book in books_in(tmp_path)):
        assert process.poll() is None and time.monotonic() < give_up
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert subprocess.run(list(map(str, command)), env=environment, capture_output=True).returncode == 0
    assert [len(book.entries) for book in books_in(tmp_path)] == [1, 1]
    spent = json.loads(rows_of(tmp_path / "store")["runs"][0]["guarantee"])["epsilon_by_client"]
    assert [book.spent() for book in books_in(tmp_path)] == list(spent.values())


def test_a_study_that_would_overdraw_is_refused_before_it_starts(create, run, trilemma, study, roots, tmp_path):
    cost = cost_of(study, roots)
    assert create(1.2 * cost)[0] == 0
    before = [book.content for book in books_in(tmp_path)]
    code, _, err = run("seeds=[0,1,2]")
    assert code == 2 and "would be overdrawn" in err and "the 3 trainings of this study" in err
    assert "What fits together: plain, seed 0. What does not fit after that: plain, seed 1; plain, seed 2" in err
    assert [book.content for book in books_in(tmp_path)] == before
    assert rows_of(tmp_path / "store")["runs"] == []
    check = ("check", study, "--ledgers", tmp_path / "books", "--set")
    assert trilemma(*check, "seeds=[0,1,2]")[0] == 2
    code, out, _ = trilemma(*check, "seeds=[0]")
    assert code == 0 and "budget books allow all of it" in out
    assert run()[0] == 0
    code, _, err = run("seeds=[0,1]")  # one is booked and stored, the other alone is too much
    assert code == 2 and "What would fit: " in err and "of the 3 steps with this noise" in err
    assert [len(book.entries) for book in books_in(tmp_path)] == [1, 1]


def test_one_poor_hospital_spares_the_others(create, run, study, roots, tmp_path):
    assert create(50.0)[0] == 0
    poor = book_path(tmp_path / "books", "hospital 2")
    terms = Ledger.open(poor).terms
    poor.unlink()
    Ledger.create(poor, terms.model_copy(update={"epsilon": 0.5 * cost_of(study, roots)}))
    code, _, err = run()
    assert code == 2 and "'hospital 2' would be overdrawn" in err and str(poor) in err
    assert [len(book.entries) for book in books_in(tmp_path)] == [0, 0]


def test_a_training_overtaken_by_another_run_is_refused(create, run, study, roots, tmp_path, monkeypatch):
    """The budget was there when the study started; then somebody else spent it."""
    assert create(1.2 * cost_of(study, roots))[0] == 0
    real = train_job.book_training

    def late(place, training, federation, lineage):
        real(place, replace(training, key="somebody else's"), federation, lineage)
        return real(place, training, federation, lineage)

    monkeypatch.setattr(train_job, "book_training", late)
    code, _, err = run()
    assert code == 2 and "train: plain, seed 0" in err and "would be overdrawn" in err
    assert rows_of(tmp_path / "store")["runs"] == []


def test_what_ran_without_books_is_booked_when_books_are_named(create, run, trilemma, study, roots, tmp_path):
    assert trilemma("run", study, "--store", tmp_path / "store", "--jobs", 1, "--quiet")[0] == 0
    code, _, err = run()
    assert code == 2 and "there is no ledger here" in err
    assert create(0.5 * cost_of(study, roots))[0] == 0
    assert run()[0] == 2  # too late to refuse the release, and still said
    for path in (tmp_path / "books").iterdir():
        path.unlink()
    assert create(50.0)[0] == 0
    assert run()[0] == 0 and run()[0] == 0
    assert [len(book.entries) for book in books_in(tmp_path)] == [1, 1]


def test_a_malicious_hospital_is_charged_and_said_to_be_promised_nothing(create, run, trilemma, study, tmp_path):
    threat = 'base.threat={ kind = "label_flip", clients = [1], share = 0.5 }'
    assert create(50.0)[0] == 0
    check = ("check", study, "--ledgers", tmp_path / "books")
    said = "plain: hospital 2 is malicious in this study: nothing is promised for its images"
    code, out, _ = trilemma(*check, "--set", threat)
    assert code == 0 and said in out.partition("Charged, and yet not promised:")[2] and "hospital 1 is" not in out
    assert said in trilemma("check", study, "--set", threat)[1].partition("Nothing is promised for:")[2]
    assert "malicious" not in trilemma(*check)[1]
    assert run(threat)[0] == 0
    assert [len(book.entries) for book in books_in(tmp_path)] == [1, 1]
    claimed = json.loads(rows_of(tmp_path / "store")["runs"][0]["guarantee"])
    assert list(claimed["epsilon_by_client"]) == ["hospital 1"] and len(claimed["events_by_client"]) == 2


def test_what_has_no_guarantee_is_refused_by_name(create, run, tmp_path):
    assert create(50.0)[0] == 0
    code, _, err = run('baselines=[{name = "bare", privacy = { kind = "none" }}]')
    assert code == 2 and "no budget can pay for what has no guarantee: bare: training without differential" in err
    code, _, err = run('compressions=[{kind = "int8", calibration = "train"}]')
    assert code == 2 and "plain, int8" in err and "training images" in err
    assert [len(book.entries) for book in books_in(tmp_path)] == [0, 0]


def test_pooled_images_are_booked_in_the_books_of_all_hospitals(create, run, tmp_path):
    assert create(50.0)[0] == 0
    assert run('base.algorithm={kind = "centralised"}')[0] == 0
    first, second = books_in(tmp_path)
    assert first.events == second.events and first.events[0].sampling_rate == pytest.approx(8 / 60)
    assert first.entries[0].trust == "central"  # whoever pools the images adds the noise
    assert run('base.algorithm={kind = "local_only", client = 1}')[0] == 0
    assert [len(book.entries) for book in books_in(tmp_path)] == [1, 2]


def test_unit_and_training_must_agree(create, run):
    patients = 'base.privacy={ kind = "dp_sgd", unit = "patient", noise_multiplier = 2.0, delta = 1e-3 }'
    assert create(50.0)[0] == 0
    code, _, err = run(patients)
    assert code == 2 and "counts for the unit 'example', and the training protects 'patient'" in err


def test_patients_and_clients_have_books_too(create, run, study, tmp_path):
    patients = 'base.privacy={ kind = "dp_sgd", unit = "patient", noise_multiplier = 2.0, delta = 1e-3 }'
    assert create(50.0, patients)[0] == 0 and run(patients)[0] == 0
    assert {book.terms.unit for book in books_in(tmp_path)} == {"patient"}
    for path in (tmp_path / "books").iterdir():
        path.unlink()
    clients = patients.replace("patient", "client").replace("noise", 'trust = "central", noise')
    assert create(50.0, clients)[0] == 0 and run(clients)[0] == 0
    assert [(book.terms.num_units, book.events[0].steps) for book in books_in(tmp_path)] == [(2, 3), (2, 3)]


def test_books_of_patients_need_patients(create, tmp_path):
    names = [f"{split}/{label}/{i}.png" for split in ("train", "test") for label in "ab" for i in range(12)]
    write_images(tmp_path / "images", names)
    folder = f'base.data={{ kind = "folder", path = "{tmp_path / "images"}", size = 16 }}'
    patients = 'base.privacy={ kind = "dp_sgd", unit = "patient", noise_multiplier = 2.0, delta = 1e-3 }'
    code, _, err = create(50.0, patients, folder, 'base.partition={ kind = "iid", num_clients = 2 }')
    assert code == 2 and "needs to know whose images are whose" in err
    assert not (tmp_path / "books").exists()


HOSPITAL = 'base.privacy={ kind = "dp_sgd", unit = "client", trust = "central", noise_multiplier = 2.0, delta = 0.4 }'


@pytest.mark.parametrize(("changes", "told"), [((), True), (("--set", HOSPITAL), False)])
def test_time_and_memory_are_told_of_no_training_whose_hospitals_are_drawn(trilemma, study, tmp_path, changes, told):
    store = ("--store", tmp_path / "store")
    assert trilemma("run", study, *store, "--quiet", *changes)[0] == 0
    for name in ("out.json", "out.csv"):
        assert trilemma("export", study, tmp_path / name, *store, *changes)[0] == 0
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    (training,), (row,) = found["trainings"], found["configurations"]
    numbers = training["seconds"], training["peak_memory_bytes"], row["training_seconds"]
    assert [number is not None for number in numbers] == [told] * 3
    rows = [line for line in (tmp_path / "out.csv").read_text().splitlines() if ",training_seconds," in line]
    assert rows and all(("they would tell how many hospitals took part" in line) != told for line in rows)


def test_books_count_for_the_images_they_were_made_for(create, run, trilemma, study, tmp_path):
    more = 'base.data={ kind = "phantom", size = 16, train = 80, val = 8, test = 12, sites = 2, classes = 2 }'
    assert create(50.0)[0] == 0 and run()[0] == 0
    code, _, err = run(more, store="more")
    assert code == 2 and "counts for other images than 'hospital 1' now holds" in err
    admit = ("ledger", "admit", tmp_path / "books", "--study", study, "--set", more)
    code, out, _ = trilemma(*admit)
    assert code == 0 and "hospital 2" in out
    assert run(more, store="more")[0] == 0 and run(store="again")[0] == 0
    assert [len(book.entries) for book in books_in(tmp_path)] == [2, 2]
    code, _, err = trilemma(
        *admit[:-2], "--set", 'base.partition={ kind = "iid", num_clients = 2 }', "--set", "seeds=[0,1]"
    )
    assert code == 2 and "'client 1': holds other images in 'plain, seed 1' than in 'plain, seed 0'" in err
    book_path(tmp_path / "books", "hospital 1").replace(book_path(tmp_path / "books", "hospital 2"))
    (tmp_path / "books" / "hospital-1.jsonl").write_bytes((tmp_path / "books" / "hospital-2.jsonl").read_bytes())
    code, _, err = run(store="new")
    assert code == 2 and "is the book of 'hospital 1' and not of 'hospital 2'" in err


def test_books_of_patients_count_for_the_patients_they_were_made_for(create, study, roots, tmp_path, monkeypatch):
    """Two patients who turn out to be one: the images are the same, and what one unit may move is not."""
    patients = 'base.privacy={ kind = "dp_sgd", unit = "patient", noise_multiplier = 2.0, delta = 1e-3 }'
    for unit in ("example", "patient"):
        overrides = [patients] if unit == "patient" else []
        assert create(50.0, *overrides)[0] == 0
        plan = plan_of(study, *overrides)
        place = Workplace(tmp_path / "store", roots, "cpu", 1, os.getpid(), Books(tmp_path / "books", "private"))
        check_books(plan, {}, place)
        (training,) = plan.trainings
        dataset = place.dataset(training.spec.data)
        codes = dataset.train.patients_N.copy()
        mine = np.flatnonzero(dataset.train.sites_N == 0)
        codes[mine[-1]] = codes[mine[0]]
        regrouped = replace(dataset, train=replace(dataset.train, patients_N=codes), fingerprint=f"regrouped {unit}")
        monkeypatch.setitem(workplace._LOADED, (training.spec.data.key, str(roots.data)), regrouped)
        if unit == "example":
            check_books(plan, {}, place)
        else:
            with pytest.raises(UserError, match="counts for other images than 'hospital 1' now holds"):
                check_books(plan, {}, place)
        monkeypatch.undo()
        for path in (tmp_path / "books").iterdir():
            path.unlink()


def test_creating_books(create, trilemma, study, tmp_path):
    code, _, err = create(0.0)
    assert code == 2 and "epsilon 0 and delta 0.001 are no budget" in err
    code, _, err = create(8.0, 'base.privacy={ kind = "none" }')
    assert code == 2 and "private: trains nothing with privacy" in err
    where = ("ledger", "create", tmp_path / "books", "--study", study, "--epsilon", 8, "--delta")
    code, _, err = trilemma(*where, 0.1)
    assert code == 2 and "delta 0.1 is not below 1 / 30" in err
    code, _, err = trilemma(*where, 1e-15)
    assert code == 2 and "delta 1e-15 is below 1e-10, where the accountant's rounding errors outweigh it" in err
    assert not (tmp_path / "books").exists()
    code, out, _ = create(8.0)
    assert code == 0 and "hospital 1" in out and "8.00" in out
    (tmp_path / "books" / "hospital-1.jsonl").unlink()
    code, _, err = create(9.0)
    assert code == 2 and "hospital-2.jsonl: is there already" in err
    assert not (tmp_path / "books" / "hospital-1.jsonl").exists()  # all or none


def test_a_booking_says_on_what_its_epsilon_rests(create, run, trilemma, tmp_path):
    shared = 'base.privacy={ kind = "dp_sgd", trust = "distributed", num_colluding = 1, noise = "system", '
    shared += "noise_multiplier = 2.0, delta = 1e-3 }"
    assert create(50.0)[0] == 0 and run()[0] == 0 and run(shared, "base.local.momentum=0.0")[0] == 0
    alone, together = books_in(tmp_path)[0].entries
    assert (alone.trust, alone.num_colluding, alone.noise) == ("local", 0, "seeded")
    assert (together.trust, together.num_colluding, together.noise) == ("distributed", 1, "system")
    _, out, _ = trilemma("ledger", "show", tmp_path / "books", "--entries")
    assert "local, seeded noise" in out and "distributed, 1 may collude, system noise" in out


def test_showing_books(create, run, trilemma, tmp_path):
    assert create(50.0)[0] == 0 and run()[0] == 0
    show = ("ledger", "show", tmp_path / "books")
    book = books_in(tmp_path)[0]
    code, out, err = trilemma(*show)
    assert (code, err) == (0, "") and "Bookings" not in out and out.count("example") == 2
    assert book.content.head in out
    code, out, _ = trilemma(*show, "--entries")
    assert out.count("Bookings of") == 2 and "noise multiplier 2 in 3 steps" in out and book.entries[0].training in out
    code, out, _ = trilemma("ledger", "show", book.path, "--json")
    (told,) = json.loads(out)
    assert told["owner"] == "hospital 1" and told["spent"] == book.spent() and told["left"] == book.left
    assert told["lines"][0]["events"] == [[2.0, told["lines"][0]["events"][0][1], 3]]
    assert trilemma(*show, "--noted", book.content.seals[0])[0] == 0
    code, _, err = trilemma(*show, "--noted", "0123")
    assert code == 1 and "no line has the seal '0123'" in err
    with book.path.open("ab") as file:
        file.write(b'{"epsilon_af')
    code, out, _ = trilemma(*show)
    assert code == 0 and "ends in 12 bytes of a booking that a kill cut short" in out
    book.path.write_bytes(book.path.read_bytes().replace(b'"steps"', b'"steps"').replace(b"private", b"Private", 1))
    code, out, err = trilemma(*show)
    assert code == 1 and "hospital-1.jsonl: line 2: was changed" in err and "Traceback" not in err
    (tmp_path / "nothing").mkdir()
    code, _, err = trilemma("ledger", "show", tmp_path / "nothing")
    assert code == 2 and "holds no ledger" in err


def test_file_names_of_hospitals(tmp_path):
    names = ["hospital 1", "St. Mary's / North", "../../etc/passwd", "Würzburg", "…", ""]
    paths = [book_path(tmp_path, name) for name in names]
    assert all(path.parent == tmp_path and not path.name.startswith(".") for path in paths)
    assert [path.name for path in paths[:2]] == ["hospital-1.jsonl", "St.-Mary-s-North.jsonl"]
    assert paths[3].name == "Würzburg.jsonl" and paths[4].name == "hospital.jsonl"


def test_the_fingerprint_is_of_images_and_labels_in_any_order():
    draws = np.random.default_rng(0)
    images, labels = draws.integers(0, 255, (6, 1, 4, 4), dtype=np.uint8), np.arange(6) % 2
    codes = np.arange(6)
    records = Records(images, labels, codes, codes, codes.astype(str))
    print_of = records_fingerprint(records, "example")
    assert records_fingerprint(records.subset(draws.permutation(6)), "example") == print_of
    other = images.copy()
    other[3, 0, 0, 0] ^= 1
    assert records_fingerprint(replace(records, images_NCHW=other), "example") != print_of
    assert records_fingerprint(replace(records, labels_N=1 - labels), "example") != print_of
    assert records_fingerprint(replace(records, images_NCHW=images.reshape(6, 1, 2, 8)), "example") != print_of
    assert records_fingerprint(replace(records, patients_N=codes // 2), "example") == print_of
    # Books of images written by an earlier version stay valid.
    assert print_of == "6aea613f6b361080fcb064e8c898973a"


def test_the_fingerprint_of_patients_tells_whose_images_are_whose_and_not_by_which_code():
    draws = np.random.default_rng(0)
    images, labels = draws.integers(0, 255, (6, 1, 4, 4), dtype=np.uint8), np.arange(6) % 2
    codes = np.array([0, 0, 1, 1, 2, 2])
    records = Records(images, labels, codes, codes, codes.astype(str))
    print_of = records_fingerprint(records, "patient")
    assert print_of != records_fingerprint(records, "example")
    assert records_fingerprint(records.subset(draws.permutation(6)), "patient") == print_of
    assert records_fingerprint(replace(records, patients_N=7 - codes), "patient") == print_of
    for other in ([0, 0, 1, 2, 1, 2], [0, 0, 1, 1, 2, 3], [0, 0, 0, 0, 1, 1]):
        assert records_fingerprint(replace(records, patients_N=np.array(other)), "patient") != print_of
    assert records_fingerprint(replace(records, labels_N=1 - labels), "patient") != print_of


def test_books_of_one_file_are_refused(study, roots, tmp_path, monkeypatch):
    from trilemma.study import ledgers

    monkeypatch.setattr(ledgers, "book_path", lambda folder, owner: folder / "same.jsonl")
    place = Workplace(tmp_path / "store", roots, "cpu", 1, os.getpid(), Books(tmp_path, "private"))
    with pytest.raises(UserError, match="would be the book of both 'hospital 1' and 'hospital 2'"):
        ledgers.create_books(plan_of(study), place, tmp_path / "books", 8.0, 1e-3)
    with pytest.raises(UserError, match="would be the book of both"):
        ledgers.check_books(plan_of(study), {}, place)
