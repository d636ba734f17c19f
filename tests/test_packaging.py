"""The wheel: pure Python, complete, and working where nothing but its dependencies is installed."""

import json
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHECKOUT = (ROOT / "pyproject.toml").is_file() and (ROOT / "kernels").is_dir()
pytestmark = pytest.mark.skipif(not CHECKOUT, reason="the wheel is built from a checkout")

PROGRAM = """
import json, sys
import numpy as np
import numlstm as nl
import numlstm.kernels
from numlstm.data.text import read_text

model = nl.Sequential([nl.layers.LSTM(3, input_shape=(4, 2)), nl.layers.Dense(1)])
y = model.predict(np.ones((2, 4, 2), dtype=np.float32), verbose=0)
print(json.dumps({
    "numlstm": nl.__file__,
    "kernels": numlstm.kernels.__file__,
    "shape": list(y.shape),
    "finite": bool(np.isfinite(y).all()),
    "text": len(read_text("tinyshakespeare")),
    "heavy": sorted({"torch", "keras", "h5py", "onnx", "sklearn", "pandas", "matplotlib", "cupy"} & set(sys.modules)),
}))
"""


def run(*command, cwd):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("numlstm", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    # Without isolation and index: the environment's own setuptools builds it, and no network is needed.
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(folder))
    run(sys.executable, "-m", "pip", "wheel", *options, str(source), cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_is_pure_and_complete(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    for package, folder in (("numlstm", "numlstm"), ("numlstm/kernels", "kernels")):
        sources = [path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.py")]
        missing = [f"{package}/{path.as_posix()}" for path in sources]
        missing = [path for path in missing if path not in held]
        assert not missing, f"not in the wheel (add the package to pyproject.toml): {missing}"
    for name in (
        "py.typed",
        "data/files/tinyshakespeare.txt",
        "data/files/sunspots_yearly.csv",
        "data/files/SOURCES.md",
        *(f"inspect/viewer/{name}" for name in ("page.html", "page.css", "page.js", "diagrams.html")),
    ):
        assert f"numlstm/{name}" in held
    assert not any(name.startswith(("kernels/", "tests/", "benchmarks/")) for name in held)
    assert any(name.endswith("licenses/LICENSE") for name in held)


def test_the_wheel_works_alone(wheel, tmp_path):
    """An empty environment that sees this one's dependencies, but neither this checkout nor this numlstm."""
    home = tmp_path / "env"
    venv.create(home, with_pip=False, symlinks=sys.platform != "win32")
    scripts = home / ("Scripts" if sys.platform == "win32" else "bin")
    python = str(scripts / "python")
    options = ("--no-deps", "--no-index", "--quiet")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, str(wheel), cwd=tmp_path)
    packages = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    )
    # Paths in a .pth file come after the environment's own; .pth files inside them (an editable numlstm)
    # don't run.
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    found = json.loads(run(python, "-W", "error", "-c", PROGRAM, cwd=elsewhere))
    for name in ("numlstm", "kernels"):
        assert home.resolve() in Path(found[name]).resolve().parents
    assert found["shape"] == [2, 1] and found["finite"]
    assert found["text"] == 1_115_394
    assert found["heavy"] == []  # importing numlstm and predicting need none of these
    assert "train" in run(str(scripts / "numlstm"), "--help", cwd=elsewhere)
