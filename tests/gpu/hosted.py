"""Where the tests' sequences run: in the emulator, or with NUMLSTM_TEST_CUDA=1 on GPU 0, NumPy arrays in and out."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from emulator import Device

from numlstm.kernels.cuda.persistent import Sequences, on_device

ON_GPU = os.environ.get("NUMLSTM_TEST_CUDA", "") == "1"


class Hosted:
    """Sequences of a device whose arrays are not NumPy's, called with NumPy's."""

    def __init__(self, sequences: Sequences) -> None:
        self.sequences = sequences

    def _there(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return self.sequences.device.xp.asarray(value)
        return type(value)(map(self._there, value)) if isinstance(value, (tuple, list)) else value

    def _back(self, value: Any) -> Any:
        if isinstance(value, tuple):
            made = map(self._back, value)
            return type(value)(*made) if hasattr(value, "_fields") else tuple(made)
        return (
            self.sequences.device.xp.asnumpy(value) if hasattr(value, "__cuda_array_interface__") else value
        )

    def _call(self, function: Any, places: tuple[Any, ...], options: dict[str, Any]) -> Any:
        out = function(*self._there(places), **{k: self._there(v) for k, v in options.items()})
        self.sequences.device.finish()
        return out

    def forward(self, *places: Any, **options: Any) -> Any:
        out = self._call(self.sequences.forward, places, options)
        residual = out.residual
        return self._back(out._replace(residual=None))._replace(residual=residual)

    def backward(self, residual: Any, *places: Any, **options: Any) -> Any:
        return self._back(
            self._call(lambda *p, **o: self.sequences.backward(residual, *p, **o), places, options)
        )


def served(sms: int = 8, **options: Any) -> Any:
    """Sequences to be tested: emulated, on a device of so many multiprocessors, or a GPU's."""
    return Hosted(on_device(0)) if ON_GPU else Sequences(Device(sms=sms, **options))
