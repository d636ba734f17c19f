"""Every example in a docstring is run, module by module."""

import doctest
import importlib
import pkgutil

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


@pytest.mark.parametrize("name", sorted(MODULES | {"numlstm"}))
def test_examples(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # an example that writes a file leaves none behind
    module = importlib.import_module(name)
    failures, _ = doctest.testmod(module, extraglobs={"np": np, "nl": numlstm})
    assert failures == 0, f"{failures} examples fail; see: python -m doctest -v"
