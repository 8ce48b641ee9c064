from trilemma.compression.export import export_onnx
from trilemma.compression.session import Session
from trilemma.evaluation.cost import cost_measurements


def test_size_and_latency_have_units_and_quartiles(network):
    model = export_onnx(network, 1, 16)
    found = {m.metric: m for m in cost_measurements(Session(model), len(model), repeats=7)}
    assert list(found) == ["file_bytes", "latency_batch1_seconds", "latency_batch32_seconds"]
    size = found["file_bytes"]
    assert (size.value, size.low, size.high, size.unit) == (len(model), None, None, "bytes")
    for name in ("latency_batch1_seconds", "latency_batch32_seconds"):
        m = found[name]
        assert 0 < m.low <= m.value <= m.high and m.unit == "seconds" and m.n == 7
    assert found["latency_batch32_seconds"].value > found["latency_batch1_seconds"].value
