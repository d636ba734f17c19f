"""What the tests of the GPU kernels share: questions on sequences, from the CPU kernels' tests."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "kernels"))
