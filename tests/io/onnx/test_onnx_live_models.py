"""ONNX Runtime and PyTorch side by side, for whoever has them (`make test-peers`)."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from onnx_models import CASES, error
from test_onnx_export import random_question

import numlstm as nl
from numlstm.io.onnx.exporter import to_proto

pytestmark = pytest.mark.peers
pytest.importorskip("onnxruntime")
torch = pytest.importorskip("torch")

import onnxruntime_models  # noqa: E402
import torch_models  # noqa: E402


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_onnx_runtime_gives_the_models_outputs(case):
    """By the fused kernels here, for two batches and lengths."""
    model = case.model()
    proto = case.proto(model)
    names = [v.name for v in proto.graph.input]
    answers = onnxruntime_models.run(proto, [case.feed(names, size) for size in (0, 1)])
    for size in (0, 1):
        for found, expected in zip(answers[size], case.expected(model, size), strict=False):
            assert error(found, expected) <= 1e-5


@pytest.mark.parametrize("part", range(4))
def test_a_hundred_random_models(part):
    """numlstm -> ONNX -> numlstm and ONNX Runtime."""
    for seed in range(25 * part, 25 * part + 25):
        model, lengths, feeds = random_question(seed)
        proto = to_proto(model, lengths=lengths)
        names = [v.name for v in proto.graph.input]
        again = nl.io.load_onnx(proto)
        fed = [dict(zip(names, feed.values(), strict=True)) for feed in feeds]
        for feed, named, (found,) in zip(feeds, fed, onnxruntime_models.run(proto, fed), strict=True):
            with nl.use_backend("reference"):
                expected = model(feed["x"], lengths=feed.get("lengths")).numpy()
                assert error(found, expected) <= 1e-5, seed
                assert error(again(named).numpy(), expected) <= 1e-5, seed


@pytest.mark.parametrize("name", sorted(torch_models.modules()))
@pytest.mark.parametrize("opset", [9, 13, 17, 20])
def test_modules_of_pytorch(name, opset):
    """By the exporter that needs no further package; graphs of the other one are recorded (test_onnx_import.py)."""
    module, arguments, _ = torch_models.modules()[name]
    if name == "attending" and opset < 17:
        pytest.skip("PyTorch's exporter has no attention in this operator set")
    if name == "packed" and opset == 9:
        pytest.skip("PyTorch's exporter can't sort in this operator set")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this exporter is the older one
        proto = torch_models.export(module, arguments, opset, dynamo=False)
    model = nl.io.load_onnx(proto)
    inputs = [a.numpy() for a in arguments]
    found = model(inputs if len(inputs) > 1 else inputs[0])
    found = found if isinstance(found, list) else [found]
    for a, b in zip(found, torch_models.answers(module, arguments), strict=True):
        assert error(a.numpy(), np.asarray(b)) <= 1e-5
