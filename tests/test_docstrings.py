"""Every example in a docstring is run, module by module."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import numpy as np
import pytest

import numlstm
import numlstm.kernels

# The kernels lie in a folder of their own, where a walk through an editable install doesn't come.
PACKAGES = (numlstm, numlstm.kernels)
MODULES = {
    name
    for package in PACKAGES
    for _, name, _ in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
}
MODULES -= {"numlstm.__main__"}  # it runs the command when it is imported
MODULES -= {"numlstm.kernels.cuda.ptx"}  # it imports numba-cuda, which these tests do without
MODULES -= {"numlstm.io.torch_modules"}  # and this one torch


@pytest.mark.parametrize("name", sorted(MODULES | {"numlstm"}))
def test_examples(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # an example that writes a file leaves none behind
    module = importlib.import_module(name)
    failures, _ = doctest.testmod(module, extraglobs={"np": np, "nl": numlstm})
    assert failures == 0, f"{failures} examples fail; see: python -m doctest -v"


def test_the_readmes_program(monkeypatch, tmp_path, capsys):
    readme = Path(__file__).resolve().parents[1] / "README.md"
    monkeypatch.chdir(tmp_path)
    program = readme.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    names = {}
    exec(program, names)
    assert names["model"].history.history["val_loss"][-1] < 0.01  # it has learned the wave
    assert (tmp_path / "wave.safetensors").exists()
