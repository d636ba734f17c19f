"""Which backend runs: the order of choice, the registry, strict; and no silent fallback anywhere."""

import subprocess
import sys
import threading

import numpy as np
import pytest

from numlstm import backend, ops
from numlstm.backend import (
    Backend,
    backends,
    base,
    cuda,
    get_backend,
    lookup,
    register,
    to_numpy,
    use_backend,
)
from numlstm.kernels import cells


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    """A machine without a GPU, whatever this one has."""
    monkeypatch.delenv("NUMLSTM_BACKEND", raising=False)
    monkeypatch.setattr(cuda, "unavailable", lambda index=0: "no NVIDIA driver (of this test)")
    monkeypatch.setattr(cuda, "present", lambda: False)
    backend._auto.cache_clear()
    yield
    backend._auto.cache_clear()


@pytest.fixture
def registry(monkeypatch):
    """A registry to write in."""
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))


def test_the_order_of_choice(monkeypatch):
    assert get_backend().name == "cpu"  # auto: there is no CUDA
    monkeypatch.setenv("NUMLSTM_BACKEND", "reference")
    assert get_backend().name == "reference"
    with use_backend("cpu"):
        assert get_backend().name == "cpu"
        assert get_backend("reference").name == "reference"
    assert get_backend().name == "reference"


def test_auto_and_an_empty_variable_mean_no_choice(monkeypatch):
    monkeypatch.setenv("NUMLSTM_BACKEND", "")
    assert get_backend().name == get_backend("auto").name == "cpu"


def test_blocks_nest_and_end_with_exceptions():
    with pytest.raises(KeyError), use_backend("reference") as outer:
        with use_backend("cpu") as inner:
            assert get_backend() is inner
        assert get_backend() is outer
        raise KeyError
    assert get_backend().name == "cpu"


def test_threads_do_not_see_each_others_blocks():
    names = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: names.append(get_backend().name))
        thread.start()
        thread.join()
    assert names == ["cpu"]


@pytest.mark.parametrize("name", ["gpu", "CPU", "", "cuda:", "cuda:x", 3])
def test_an_unknown_name_lists_the_known_ones(name):
    for choose in (get_backend, lambda n: use_backend(n).__enter__()):
        with pytest.raises(ValueError, match=r"came, expected auto, cpu, cuda, cuda:N or reference"):
            choose(name)


def test_an_unknown_name_in_the_environment_says_where_it_came_from(monkeypatch):
    monkeypatch.setenv("NUMLSTM_BACKEND", "tpu")
    with pytest.raises(ValueError, match="NUMLSTM_BACKEND: 'tpu' came"):
        get_backend()


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_cuda_raises_with_the_reason_and_never_falls_back(name, monkeypatch):
    with pytest.raises(
        RuntimeError, match=f"backend: the backend '{name}' can't be used here: no NVIDIA driver"
    ):
        get_backend(name)
    with pytest.raises(RuntimeError, match="can't be used"), use_backend(name):
        pass
    monkeypatch.setenv("NUMLSTM_BACKEND", name)
    with pytest.raises(RuntimeError, match="NUMLSTM_BACKEND: the backend"):
        ops.linear(np.ones((1, 1)), np.ones((1, 1)))


def test_an_array_on_a_device_is_never_copied_behind_the_users_back():
    device = type("Device", (), {"id": 9})()
    array = type("ndarray", (), {"__module__": "cupy", "device": device, "get": lambda self: np.ones(2)})()
    with pytest.raises(RuntimeError, match="an array of cuda:9: the backend 'cuda:9' can't be used"):
        get_backend(like=array)
    assert get_backend("cpu", like=array).name == "cpu"
    assert to_numpy(array).tolist() == [1, 1]


def test_backends_say_what_is_missing():
    listed = backends()
    assert list(listed) == ["cpu", "cuda", "reference"]
    assert listed["cpu"] is None and listed["reference"] is None and "no NVIDIA driver" in listed["cuda"]


# The registry


def test_lookup_takes_the_closest_key(registry):
    register("sequence", "special", "made for it", option="lstm", dtype="float32", device="cpu2")
    register("sequence", "narrow", "any cell", dtype="float32", device="cpu2")
    register("sequence", "wide", "any dtype", option="lstm", device="cpu2")
    assert lookup("sequence", "lstm", np.float32, "cpu2").module == "special"
    assert lookup("sequence", "elman", np.float32, "cpu2").module == "narrow"
    assert lookup("sequence", "lstm", np.float64, "cpu2").module == "wide"
    fallback = lookup("sequence", "elman", np.float64, "cpu2")
    assert fallback.fallback and fallback.device == "reference"
    assert fallback.why.startswith("cpu2 has no float64 kernel for this")


def test_a_kernel_without_a_backward_pass_is_never_picked_for_training(registry):
    register("sequence", "forward_only", "fast", dtype="float32", device="cpu2", differentiable=False)
    assert lookup("sequence", "lstm", np.float32, "cpu2").module == "forward_only"
    training = lookup("sequence", "lstm", np.float32, "cpu2", gradient=True)
    assert training.fallback and "with a gradient" in training.why


def test_a_sequence_is_run_by_a_kernel_with_a_backward_pass_when_a_tape_needs_it(registry):
    class Half(Backend):
        device = "cpu2"

    register(
        "sequence", "numlstm.no_such_module", "fast", dtype="float32", device="cpu2", differentiable=False
    )
    x, w, r = np.ones((2, 1, 3), np.float32), np.ones((3, 2), np.float32), np.ones((2, 2), np.float32)
    run = lambda training: Half().sequence_forward(
        cells.elman(), x, w, r, None, (), None, None, training=training
    )
    assert run(True).residual is not None  # NumPy's
    with pytest.raises(ModuleNotFoundError):
        run(False)


def test_register_refuses_what_is_taken_or_unknown(registry):
    with pytest.raises(ValueError, match=r"registered already: numlstm\.kernels\.cpu\.gemm"):
        register("matmul", "mine", "faster", dtype="float32", device="cpu")
    with pytest.raises(ValueError, match="operation: 'conv' came, expected one of sequence, matmul"):
        register("conv", "mine", "faster", device="cpu")
    with pytest.raises(ValueError, match="operation: 'conv' came"):
        lookup("conv")


@pytest.mark.parametrize("operation", base.OPERATIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("device", ["cpu", "cuda", "reference"])
def test_every_key_is_served_by_functions_that_exist(operation, dtype, device):
    inference = operation.startswith("quantized")
    kernel = lookup(operation, dtype=dtype, device=device, gradient=not inference)
    assert inference or kernel.differentiable
    names = {
        "quantized_sequence": ["forward"],
        "quantized_matmul": ["matmul"],
        "sequence": ["forward", "backward"],
        "embedding": ["embedding", "embedding_gradient"],
        "layer_norm": ["layer_norm", "layer_norm_gradient"],
        "softmax": ["softmax", "softmax_gradient"],
        "softmax_cross_entropy": ["softmax_cross_entropy", "softmax_cross_entropy_gradient"],
        "optimizer": ["Updates"],
    }.get(operation, [operation])
    assert all(callable(getattr(kernel.functions(), name)) for name in names)
    assert kernel.why and kernel.fallback == (kernel.device != device)


# strict


def test_strict_raises_where_only_numpy_would_serve():
    x, w = np.ones((2, 3)), np.ones((3, 4))
    assert ops.linear(x, w).dtype == np.float64
    with use_backend("cpu", strict=True) as chosen:
        assert "strict" in repr(chosen)
        with pytest.raises(RuntimeError, match=r"strict: matmul \(\*, float64\): cpu has no float64 kernel"):
            ops.linear(x, w)
        with pytest.raises(RuntimeError, match=r"strict: sequence \(elman, float64\)"):
            ops.recurrent(cells.elman(), np.ones((1, 2, 3)), np.ones((3, 2)), np.ones((2, 2)))
        ops.linear(x.astype(np.float32), w.astype(np.float32))
    with use_backend("reference", strict=True):
        assert ops.linear(x, w).dtype == np.float64  # it has what was asked for


def test_strict_is_not_lost_in_inner_blocks():
    with use_backend("cpu", strict=True):
        with use_backend(None) as inner:
            assert inner.strict and inner.name == "cpu"
        with use_backend("reference") as inner:
            assert inner.strict
        assert get_backend("cpu").strict
    assert not get_backend().strict


def test_strict_alone_keeps_the_backend():
    with use_backend("reference"), use_backend(None, strict=True) as inner:
        assert (inner.name, inner.strict) == ("reference", True)


def test_importing_the_backends_imports_no_device_and_no_peer():
    code = (
        "import sys, numlstm.ops; print(sorted({'cupy', 'torch', 'numlstm.kernels.cpu'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_exports():
    assert all(hasattr(backend, name) for name in backend.__all__)
