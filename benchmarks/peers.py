"""The other libraries, each doing a case as its users would to be fast; every one runs in a process of its own.

PyTorch runs eagerly, time-major (its fastest order), in inference mode where no gradient is asked, with its fused
Adam. ONNX Runtime runs a graph made here, its threads spinning, on arrays that are bound beforehand. Keras runs on
JAX, compiled: inference by a jitted function of arrays that lie ready, training by its own `train_on_batch`.
TensorFlow.js runs in node (`tfjs.js`) and needs its package there: `npm install --no-save @tensorflow/tfjs` in the
current folder, `npm install --global`, or where NODE_PATH says.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contenders import EPSILON, LEARNING_RATE, Case, losses, numbers, reordered, several_steps
from benchmarks.process import Prepared, Unavailable

# ---------------------------------------------------------------------------------------------- PyTorch


def _torch_layers(case: Case) -> tuple[Any, Any]:
    """nn.LSTM, nn.GRU or nn.RNN with the case's weights, and nn.Linear."""
    import torch as pt

    n = numbers(case)
    kind = {"lstm": pt.nn.LSTM, "gru": pt.nn.GRU, "rnn": pt.nn.RNN}[case.cell]
    layer = kind(case.I, case.H, num_layers=case.layers, bidirectional=case.both)
    names = [f"l{k}{way}" for k in range(case.layers) for way in ("", "_reverse")[: 1 + case.both]]
    dense = pt.nn.Linear(case.H * (1 + case.both), 1)
    with pt.no_grad():
        for name, (kernel, recurrent, bias) in zip(names, n.layers, strict=True):
            biases = bias if bias.ndim == 2 else (bias, np.zeros_like(bias))
            arrays = (kernel.T, recurrent.T, *biases)
            for part, array in zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), arrays, strict=True):
                getattr(layer, f"{part}_{name}").copy_(pt.from_numpy(array.copy()))
        dense.weight.copy_(pt.from_numpy(n.dense.T.copy()))
        dense.bias.zero_()
    return layer, dense


def torch(case: Case) -> Prepared:
    """PyTorch's own layer, eager; bfloat16 by a converted module or by autocast, int8 by dynamic quantisation."""
    import torch as pt

    pt.set_num_threads(_cores())
    n = numbers(case)
    layer, dense = _torch_layers(case)
    x = pt.from_numpy(n.x.transpose(1, 0, 2).copy())
    half = case.precision == "bfloat16"
    if case.mode == "training":
        parameters = [*layer.parameters(), *dense.parameters()]
        settings = {"lr": LEARNING_RATE, "eps": EPSILON, "fused": True}
        optimizer = pt.optim.Adam(parameters, **settings)
        target = pt.from_numpy(n.target)
        ends = 1 + case.both  # the last state of each direction

        def update(optimizer: Any = optimizer) -> float:
            optimizer.zero_grad()
            with pt.autocast("cpu", dtype=pt.bfloat16, enabled=half):
                state = layer(x)[1]
                last = (state[0] if case.cell == "lstm" else state)[-ends:]
                y = dense(last[0] if ends == 1 else pt.cat((last[0], last[1]), 1))
                loss = pt.nn.functional.mse_loss(y, target)
            loss.backward()
            optimizer.step()
            return loss.item()

        # where the others have one bias it has two, whose sum learns twice as fast; at half the rate it agrees
        twice = [p for name, p in layer.named_parameters() if "bias" in name and case.cell != "gru"]
        others = [p for p in parameters if not any(p is q for q in twice)]
        halved = [{"params": twice, "lr": LEARNING_RATE / 2}] if twice else []
        agreeing = pt.optim.Adam([{"params": others}, *halved], **settings)
        return Prepared(update, losses(lambda: update(agreeing)))
    layer.eval()
    if case.mode == "stream":
        return _torch_step(layer, x[:1])
    ways: dict[str, Callable[[], Any]] = {}

    def way(module: Any, given: Any, autocast: bool = False) -> Callable[[], Any]:
        def infer() -> Any:
            with pt.inference_mode(), pt.autocast("cpu", dtype=pt.bfloat16, enabled=autocast):
                return module(given)[0]

        return infer

    if half:
        ways["autocast"] = way(layer, x, autocast=True)
        ways["converted"] = way(_torch_layers(case)[0].eval().to(pt.bfloat16), x.to(pt.bfloat16))
    elif case.precision == "int8":
        ways["quantize_dynamic"] = way(_torch_int8(layer), x)
    else:
        ways["float32"] = way(layer, x)
    name, call = _faster(ways)
    return Prepared(call, lambda: call()[-1].float().numpy(), {"way": name} if len(ways) > 1 else None)


def _torch_int8(layer: Any) -> Any:
    """PyTorch's dynamic quantisation: int8 weights, activations quantised as they come."""
    import warnings

    import torch as pt

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.ao.quantization says that it will move
        return pt.ao.quantization.quantize_dynamic(layer, {type(layer)}, dtype=pt.qint8)


def _torch_step(layer: Any, x: Any) -> Prepared:
    """One time step of the layer, x (1, B, I), the states carried."""
    import torch as pt

    state: Any = None

    def step() -> Any:
        nonlocal state
        with pt.no_grad():
            y, state = layer(x, state)
        return y[0]

    def reset() -> None:
        nonlocal state
        state = None

    return Prepared(step, lambda: several_steps(step, reset))


def torch_cell(case: Case) -> Prepared:
    """nn.LSTMCell or nn.GRUCell, the other way to step in PyTorch."""
    import torch as pt

    pt.set_num_threads(_cores())
    layer, _ = _torch_layers(case)
    kind = {"lstm": pt.nn.LSTMCell, "gru": pt.nn.GRUCell, "rnn": pt.nn.RNNCell}[case.cell]
    cell = kind(case.I, case.H)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.state_dict().items()})
    x = pt.from_numpy(numbers(case).x[:, 0].copy())
    state: Any = None

    def step() -> Any:
        nonlocal state
        with pt.no_grad():
            state = cell(x, state)
        return state[0] if case.cell == "lstm" else state

    def reset() -> None:
        nonlocal state
        state = None

    return Prepared(step, lambda: several_steps(step, reset))


def torch_avx2() -> dict[str, str]:
    """What holds PyTorch and the libraries under it to AVX2."""
    return {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "DNNL_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
    }


def torch_capability() -> str:
    """The instruction set of PyTorch's own kernels in this process."""
    import torch as pt

    return pt.backends.cpu.get_cpu_capability()


def _faster(ways: dict[str, Callable[[], Any]], tries: int = 3) -> tuple[str, Callable[[], Any]]:
    """The way whose best call is the shortest."""
    best = {}
    for name, call in ways.items() if len(ways) > 1 else ():
        call()
        for _ in range(tries):
            started = time.perf_counter()
            call()
            best[name] = min(best.get(name, np.inf), time.perf_counter() - started)
    name = min(best, key=best.__getitem__) if best else next(iter(ways))
    return name, ways[name]


def _cores() -> int:
    """Threads for a library that must be told: those that this process was given."""
    return int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))


# --------------------------------------------------------------------------------------- ONNX Runtime


def onnx_graph(case: Case) -> Any:
    """The case's layers as an ONNX model: X (T, B, I) -> Y, the last node's own (T, directions, B, H), and for a
    streamed step also the states, in and out."""
    from onnx import TensorProto, helper, numpy_helper

    kind, order = {"lstm": ("LSTM", "iofc"), "gru": ("GRU", "zrh"), "rnn": ("RNN", "h")}[case.cell]
    states = [] if case.mode != "stream" else ["h", "c"][: 1 + (case.cell == "lstm")]
    directions, steps = 1 + case.both, 1 if case.mode == "stream" else case.T
    nodes, constants, given = [], [], "X"
    layers = numbers(case).layers
    for k in range(case.layers):
        parts: list[list[np.ndarray]] = [[], [], []]
        for weights in layers[k * directions : (k + 1) * directions]:
            kernel, recurrent, bias = reordered(case, weights, order)
            both = bias if bias.ndim == 2 else np.stack([bias, np.zeros_like(bias)])
            for part, array in zip(parts, (kernel.T, recurrent.T, both.ravel()), strict=True):
                part.append(array)
        for name, part in zip("WRB", parts, strict=True):
            constants.append(numpy_helper.from_array(np.ascontiguousarray(np.stack(part)), f"{name}{k}"))
        more = {"linear_before_reset": 1} if case.cell == "gru" else {}
        way = "bidirectional" if case.both else "forward"
        last = k == case.layers - 1
        made = "Y" if last else f"Y{k}"
        inputs = [given, f"W{k}", f"R{k}", f"B{k}", *(["", *states] if states else [])]
        outputs = [made, *(f"{s}_after" for s in states)]
        nodes.append(helper.make_node(kind, inputs, outputs, hidden_size=case.H, direction=way, **more))
        if not last:  # (T, directions, B, H) -> (T, B, directions x H), what the next layer reads
            nodes.append(helper.make_node("Transpose", [made], [f"{made}t"], perm=[0, 2, 1, 3]))
            constants.append(numpy_helper.from_array(np.array([0, 0, -1], np.int64), f"flat{k}"))
            given = f"X{k + 1}"
            nodes.append(helper.make_node("Reshape", [f"{made}t", f"flat{k}"], [given]))

    def value(name: str, *shape: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    state = (directions, case.B, case.H)
    graph = helper.make_graph(
        nodes,
        "layers",
        [value("X", steps, case.B, case.I), *(value(s, *state) for s in states)],
        [value("Y", steps, directions, case.B, case.H), *(value(f"{s}_after", *state) for s in states)],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)


def onnxruntime(case: Case) -> Prepared:
    """ONNX Runtime's own LSTM, GRU and RNN."""
    import onnxruntime as ort

    if case.mode == "training" or case.precision != "float32":
        raise Unavailable("ONNX Runtime's recurrent layers on the CPU are float32 inference")
    options = ort.SessionOptions()
    options.intra_op_num_threads = _cores()
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    n = numbers(case)
    model = onnx_graph(case).SerializeToString()
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    x = np.ascontiguousarray(n.x.transpose(1, 0, 2))
    if case.mode == "stream":
        names = [value.name for value in session.get_inputs()[1:]]
        asked = ["Y", *(f"{name}_after" for name in names)]
        feed: dict[str, np.ndarray] = {"X": x[:1]}

        def reset() -> None:
            feed.update({name: np.zeros((1, case.B, case.H), np.float32) for name in names})

        def step() -> Any:
            y, *after = session.run(asked, feed)
            feed.update(zip(names, after, strict=True))
            return y[0, 0]

        reset()
        return Prepared(step, lambda: several_steps(step, reset))
    y = np.empty((case.T, 1 + case.both, case.B, case.H), np.float32)
    binding = session.io_binding()
    binding.bind_cpu_input("X", x)
    value = ort.OrtValue.ortvalue_from_numpy(y)
    binding.bind_ortvalue_output("Y", value)

    def infer() -> None:
        session.run_with_iobinding(binding)

    def result() -> np.ndarray:
        infer()
        return value.numpy()[-1].transpose(1, 0, 2).reshape(case.B, -1)

    return Prepared(infer, result)


# ---------------------------------------------------------------------------------------- Keras on JAX

KERAS = {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}  # what its process starts with


def keras(case: Case) -> Prepared:
    """Keras' own layers, compiled by XLA."""
    import jax
    import keras as k

    n = numbers(case)
    kind = {"lstm": k.layers.LSTM, "gru": k.layers.GRU, "rnn": k.layers.SimpleRNN}[case.cell]
    order = {"lstm": "ifco", "gru": "zrh", "rnn": "h"}[case.cell]
    training = case.mode == "training"
    weights = [w for layer in n.layers for w in reordered(case, layer, order)]
    layers: list[Any] = [k.Input((case.T, case.I), batch_size=case.B)]
    for number in range(case.layers):
        layer = kind(case.H, return_sequences=not training or number < case.layers - 1)
        layers.append(k.layers.Bidirectional(layer) if case.both else layer)
    if training:
        layers.append(k.layers.Dense(1))
        weights += [n.dense, np.zeros(1, np.float32)]
    model = k.Sequential(layers)
    model.set_weights(weights)
    x = jax.numpy.asarray(n.x)
    if training:
        optimizer = k.optimizers.Adam(LEARNING_RATE, epsilon=EPSILON)
        model.compile(optimizer, "mse", jit_compile=True)
        target = jax.numpy.asarray(n.target)
        step = lambda: float(np.asarray(model.train_on_batch(x, target)))
        return Prepared(step, losses(step))
    variables = [v.value for v in model.trainable_variables], [v.value for v in model.non_trainable_variables]
    compiled = jax.jit(lambda trained, fixed, x: model.stateless_call(trained, fixed, x, training=False)[0])
    infer = lambda: jax.block_until_ready(compiled(*variables, x))
    return Prepared(infer, lambda: np.asarray(infer())[:, -1])


# --------------------------------------------------------------------------------------- TensorFlow.js

FINISHES = 60.0  # seconds that TensorFlow.js may take until two steps are done


class Node:
    """A node process that trains on one line of input, and answers with a line of JSON."""

    def __init__(self, case: Case) -> None:
        if shutil.which("node") is None:
            raise Unavailable("node is not installed")
        self.process = subprocess.Popen(
            ["node", str(Path(__file__).with_name("tfjs.js"))],
            env=os.environ | {"NODE_PATH": _node_path()},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        atexit.register(self.process.kill)
        n = numbers(case)
        weights = [*reordered(case, n.layers[0], "ifco"), n.dense, np.zeros(1, np.float32)]
        self.about = self.ask(
            {
                "units": case.H,
                "x": n.x.tolist(),
                "y": n.target.tolist(),
                "weights": [w.tolist() for w in weights],
                "rate": LEARNING_RATE,
                "epsilon": EPSILON,
            }
        )

    def ask(self, value: Any) -> Any:
        assert self.process.stdin and self.process.stdout and self.process.stderr
        answer = ""
        with contextlib.suppress(BrokenPipeError):  # it ended; what it said on its way out follows
            print(json.dumps(value), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        if not answer:
            errors = self.process.stderr.read().strip().splitlines() or ["node ended without a word"]
            said = next((line for line in errors if "Error:" in line), errors[-1])
            raise Unavailable(f"{said.strip()} (npm install @tensorflow/tfjs)")
        return json.loads(answer)

    def step(self) -> float:
        return self.ask("step")

    def cpu_seconds(self) -> float:
        """What it has used of a core: its own process, as it is no foreign work."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK") + time.process_time()


def _node_path() -> str:
    """Where node looks for packages beside the folders above its script: what it was told, here, globally."""
    found = [os.environ.get("NODE_PATH", ""), str(Path.cwd() / "node_modules")]
    if npm := shutil.which("npm"):
        asked = subprocess.run([npm, "root", "--global"], capture_output=True, text=True, check=False)
        found.append(asked.stdout.strip())
    return os.pathsep.join(path for path in found if path)


class _Step:
    """A call that says how much processor time was its own, which `measure` asks."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.cpu_seconds = node.cpu_seconds

    def __call__(self) -> float:
        return self.node.step()


def tfjs(case: Case) -> Prepared:
    """TensorFlow.js' plain JavaScript, which is what it trains on in node without binaries of its own."""
    if (case.cell, case.mode, case.layers, case.both) != ("lstm", "training", 1, False):
        raise Unavailable("TensorFlow.js is asked for one LSTM layer's training step only")
    node = Node(case)
    started = time.perf_counter()
    first = [node.step() for _ in range(2)]
    if (took := time.perf_counter() - started) > FINISHES:
        raise Unavailable(f"two steps took {took:.0f} s")
    return Prepared(_Step(node), lambda: np.array(first), node.about)
