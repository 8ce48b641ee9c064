from trilemma.compression.export import export_onnx
from trilemma.compression.session import Session
from trilemma.evaluation.cost import cost_measurements
from trilemma.evaluation.measurement import Measurement


def test_size_and_latency_have_units_and_quartiles(network):
    model = export_onnx(network, 1, 16)
    found = {m.metric: m for m in cost_measurements(Session(model), len(model), 12345, repeats=7)}
    assert list(found) == ["file_bytes", "multiply_adds", "latency_batch1_seconds", "latency_batch32_seconds"]
    size, counted = found["file_bytes"], found["multiply_adds"]
    assert (size.value, size.low, size.high, size.unit) == (len(model), None, None, "bytes")
    assert counted == Measurement("multiply_adds", 12345.0, n=1, unit="multiply-adds")
    for name in ("latency_batch1_seconds", "latency_batch32_seconds"):
        m = found[name]
        assert 0 < m.low <= m.value <= m.high and m.unit == "seconds" and m.n == 7
    assert found["latency_batch32_seconds"].value > found["latency_batch1_seconds"].value
