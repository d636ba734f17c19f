"""Callbacks: what happens between the epochs and batches of `fit`, with Keras' names and defaults.

A callback overrides the `on_...` methods it needs; only these are called, so an unused hook costs nothing.
`logs` holds the figures of the epoch (or the running ones of a batch). Files are written whole or not at all,
and without pickle. A callback that decides from what it saw (patience, best value) hands that over with
`get_state` and `set_state`, so that `BackupAndRestore` can take a run up again where it stopped.
"""

from numlstm.callbacks.backup import BackupAndRestore
from numlstm.callbacks.base import Callback, CallbackList, History, LambdaCallback
from numlstm.callbacks.control import (
    EarlyStopping,
    LearningRateScheduler,
    ModelCheckpoint,
    ReduceLROnPlateau,
    TerminateOnNaN,
)
from numlstm.callbacks.tracking import CSVLogger, JSONLogger, TensorBoard

__all__ = [
    "BackupAndRestore",
    "CSVLogger",
    "Callback",
    "CallbackList",
    "EarlyStopping",
    "History",
    "JSONLogger",
    "LambdaCallback",
    "LearningRateScheduler",
    "ModelCheckpoint",
    "ReduceLROnPlateau",
    "TensorBoard",
    "TerminateOnNaN",
]
