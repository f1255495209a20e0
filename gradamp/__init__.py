"""Gradient amplification: losses chosen by their gradient y - t with an output y that does not saturate."""

from gradamp.amplifier import Amplifier
from gradamp.functional import exp_ga, linear_mse, pow3_ga, predict_proba
from gradamp.linear import linear_exp_ga, linear_pow3_ga
from gradamp.losses import ExpGALoss, LinearMSELoss, Pow3GALoss, make_loss
from platonic_core import __version__

__all__ = [
    "Amplifier",
    "ExpGALoss",
    "LinearMSELoss",
    "Pow3GALoss",
    "__version__",
    "exp_ga",
    "linear_exp_ga",
    "linear_mse",
    "linear_pow3_ga",
    "make_loss",
    "pow3_ga",
    "predict_proba",
]
