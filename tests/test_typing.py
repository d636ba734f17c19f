"""What type checkers see of the installed package: pyright's own measure of complete types, and a user's program."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHECKOUT = (ROOT / "pyproject.toml").is_file() and (ROOT / "kernels").is_dir()
pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(not CHECKOUT, reason="the package is put together from a checkout"),
]

# scikit-learn has no types: to a checker, what derives from its classes has an unknown base, and no annotation helps.
UNTYPED_BASE = {
    f"numlstm.estimators.{name}"
    for name in (
        "LSTMAnomalyDetector",
        "LSTMClassifier",
        "LSTMForecaster",
        "LSTMRegressor",
        "anomalies.LSTMAnomalyDetector",
        "base.RecurrentEstimator",
        "forecaster.LSTMForecaster",
        "supervised.LSTMClassifier",
        "supervised.LSTMRegressor",
    )
}

PROGRAM = """
import numpy as np
import numlstm as nl

model = nl.Sequential([nl.LSTM(16, input_shape=(1, 1)), nl.Dense(1)])
model.compile(optimizer="adam", loss="mse")
reveal_type(nl.Dense(3).units)
reveal_type(nl.LSTM(3).kernel)
reveal_type(model.fit(np.zeros((3, 1, 1)), np.zeros((3, 1))))
reveal_type(nl.exp(nl.Tensor([1.0])) * 2)
reveal_type(nl.io.load_torch("weights.pt"))
reveal_type(nl.estimators.LSTMForecaster().horizon)
reveal_type(nl.initializers.GlorotUniform(seed=1).seed)
reveal_type(nl.optimizers.Adam().beta_1)
nl.Dense("many")
"""
TYPES = ["int", "Variable", "History", "Tensor", "Sequential", "int", "int | None", "float"]


@pytest.fixture(scope="module")
def pyright(tmp_path_factory):
    """Runs pyright in an environment with this package laid out as in its wheel, and all that this one has."""
    pytest.importorskip("pyright")
    folder = tmp_path_factory.mktemp("typing")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    python = folder / "venv" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.check_output([str(python), "-c", ask], text=True).strip())
    held = [path for path in sys.path if path.endswith("site-packages")]
    (site / "held.pth").write_text("\n".join([*held, ""]), encoding="utf-8")
    left_out = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "numlstm", site / "numlstm", ignore=left_out)
    shutil.copytree(ROOT / "kernels", site / "numlstm" / "kernels", ignore=left_out)
    # As if the environment were activated: --verifytypes looks nowhere else.
    environment = {**os.environ, "PATH": os.pathsep.join([str(python.parent), os.environ["PATH"]])}
    environment["VIRTUAL_ENV"] = str(folder / "venv")
    work = folder / "work"
    work.mkdir()

    def run(*arguments):
        command = [sys.executable, "-m", "pyright", "--outputjson", *arguments]
        done = subprocess.run(
            command, cwd=work, env=environment, capture_output=True, text=True, encoding="utf-8"
        )
        assert done.stdout.startswith("{"), done.stdout + done.stderr
        return json.loads(done.stdout)

    run.work = work
    return run


def test_the_public_face_is_typed_to_the_last_symbol(pyright):
    found = pyright("--verifytypes", "numlstm", "--ignoreexternal")["typeCompleteness"]
    exported = {s["name"]: s["isTypeKnown"] for s in found["symbols"] if s["isExported"]}
    assert sum(exported.values()) > 3000
    assert {name for name, known in exported.items() if not known} == UNTYPED_BASE


def test_a_users_program_is_checked(pyright):
    (pyright.work / "program.py").write_text(PROGRAM, encoding="utf-8")
    said = pyright("program.py")["generalDiagnostics"]
    shown = [d["message"].rsplit(' is "', 1)[1].rstrip('"') for d in said if d["severity"] == "information"]
    assert shown == TYPES
    errors = [d for d in said if d["severity"] == "error"]
    assert len(errors) == 1 and '"units"' in errors[0]["message"], errors  # the last line, alone
