"""Ask PyTorch every question of oracle.py and keep the answers in torch.npz.

Run `python tests/conformance/record_torch.py` with PyTorch installed, after a question has changed; the tests
then compare without it. Answers are computed in double precision and kept as such: a few hundred kilobytes at
most.
"""

from __future__ import annotations

import numpy as np
import torch
import torch_oracle
from oracle import ANSWERS, ELEMENTS, LOSSES, OPTIMIZERS, SEQUENCES, digest, label


def answers() -> dict[str, dict[str, np.ndarray]]:
    """Question -> name -> array."""
    found = {s.name: torch_oracle.sequence(s) for s in SEQUENCES}
    found |= {f"element-{name}": torch_oracle.element(name, code) for name, code in ELEMENTS.items()}
    found |= {f"loss-{label(n, o)}": torch_oracle.loss(n, o, code) for n, o, code in LOSSES}
    found |= {f"optimizer-{label(n, o)}": torch_oracle.updates(n, o, p, po) for n, o, p, po in OPTIMIZERS}
    return found | {"layer_norm": torch_oracle.layer_norm(), "training": torch_oracle.train()}


def main() -> None:
    flat = {
        f"{question}/{name}": digest(a) for question, all_ in answers().items() for name, a in all_.items()
    }
    np.savez_compressed(ANSWERS, version=np.array(torch.__version__.split("+")[0]), **flat)
    print(f"{len(flat)} answers from PyTorch {torch.__version__}, {ANSWERS.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
