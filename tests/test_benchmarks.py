"""What a benchmark says of its targets is what it measured, and it runs at all."""

import json

import pytest
from benchmarks import compression
from benchmarks._bench import Row


def said_of(rows) -> dict[tuple[str, str], str]:
    table = compression.met(rows)
    said, name, _, verdict = ([str(cell) for cell in column.cells] for column in table.columns)
    return dict(zip(zip(said, name, strict=True), verdict, strict=True))


def test_a_target_is_met_missed_or_not_measured():
    faster, smaller = "int8 with the folding norm is 2.5 times faster", "int8 takes at most 1/3.6 of the bytes"
    rows = [
        Row("int8-fold/resnet9/batch32", "latency_ratio", 2.6, "ratio"),
        Row("int8-fold/resnet18/batch32", "latency_ratio", 2.4, "ratio"),
        Row("int8-fold/resnet9/batch1", "latency_ratio", 1.0, "ratio"),  # nothing is aimed at there
        Row("int8-group/resnet9/batch32", "latency_ratio", 1.0, "ratio"),
    ]
    said = said_of(rows)
    assert {name: verdict for (target, name), verdict in said.items() if target == faster} == {
        "int8-fold/resnet9/batch32": "yes",
        "int8-fold/resnet18/batch32": "no",
    }
    assert said[smaller, "none"] == "not measured"
    assert len(said) == 2 + len(compression.TARGETS) - 1


def test_points_are_lost_of_the_float_model():
    rows = [Row("fp32-fold/a", "accuracy", 0.9, "fraction"), Row("int8-fold/a", "accuracy", 0.885, "fraction")]
    (lost,) = compression.against_fp32(rows, "int8-fold/a", "fp32-fold/a")
    assert (lost.name, lost.metric, lost.unit) == ("int8-fold/a", "accuracy_loss", "points")
    assert lost.value == pytest.approx(1.5)


def test_missing_images_are_no_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRILEMMA_DATA", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        compression.main(["--json", "--data", "chest-xray-64"])
    shown = capsys.readouterr()
    assert ended.value.code == 1 and shown.out == "" and "nothing was measured" in shown.err


@pytest.mark.slow
def test_the_benchmark_of_compression_runs(capsys):
    compression.main(["--json", "--quick"])
    found = {(row["name"], row["metric"]) for row in json.loads(capsys.readouterr().out)["rows"]}
    for batch in (1, 32):
        assert (f"int8-fold/resnet9-w4-16px/batch{batch}", "latency_ratio") in found
    assert ("gradual90-int8-group/resnet9-w4/phantom-16", "bytes_ratio") in found
    assert ("int8-qat-fold/resnet9-w4/phantom-16", "robust_accuracy_loss") in found
