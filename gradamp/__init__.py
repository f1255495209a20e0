"""Gradient amplification: losses chosen by their gradient y - t with an output y that does not saturate."""

from gradamp.amplifier import Amplifier
from gradamp.functional import exp_ga, linear_mse, pow3_ga, predict_proba
from gradamp.linear import linear_exp_ga, linear_pow3_ga
from gradamp.losses import ExpGALoss, LinearMSELoss, Pow3GALoss, make_loss
from gradamp.parallel import parallel_linear_exp_ga, parallel_linear_pow3_ga, shard_of_classes
from gradamp.presets import PRESETS, Preset
from platonic_core import __version__

__all__ = [
    "PRESETS",
    "Amplifier",
    "ExpGALoss",
    "LinearMSELoss",
    "Pow3GALoss",
    "Preset",
    "__version__",
    "exp_ga",
    "linear_exp_ga",
    "linear_mse",
    "linear_pow3_ga",
    "make_loss",
    "parallel_linear_exp_ga",
    "parallel_linear_pow3_ga",
    "pow3_ga",
    "predict_proba",
    "shard_of_classes",
]
