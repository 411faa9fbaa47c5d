"""Level 5: the trainer."""

from pquant_jax.train._calibrate import calibrate
from pquant_jax.train._final import finalize, load_final, save_final
from pquant_jax.train._fit import Result, fit
from pquant_jax.train._losses import Metric, absolute_error, accuracy, average, cross_entropy, mae, mse, squared_error
from pquant_jax.train._plan import Plan, Slot, schedule
from pquant_jax.train._step import (
    Batch,
    TrainState,
    compile_epoch,
    init_state,
    kernel_sparsity,
    make_epoch,
    make_evaluate,
    make_step,
    permutation,
)

__all__ = [
    "Batch",
    "Metric",
    "Plan",
    "Result",
    "Slot",
    "TrainState",
    "absolute_error",
    "accuracy",
    "average",
    "calibrate",
    "cross_entropy",
    "finalize",
    "fit",
    "init_state",
    "kernel_sparsity",
    "load_final",
    "mae",
    "compile_epoch",
    "make_epoch",
    "make_evaluate",
    "make_step",
    "mse",
    "permutation",
    "save_final",
    "schedule",
    "squared_error",
]
