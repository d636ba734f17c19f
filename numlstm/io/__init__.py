"""Reading and writing models, and the safe way to write any file."""

from numlstm.io.atomic import atomic_write, write_bytes, write_text
from numlstm.io.native import describe, load_model, save_model

__all__ = ["atomic_write", "describe", "load_model", "save_model", "write_bytes", "write_text"]
