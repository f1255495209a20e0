"""Layer-wise training of any module: units with heads and losses of their own, in place of end-to-end backpropagation."""

from layerwise.checkpoint import CheckpointError
from layerwise.heads import ConvHead, HeadOutput, HeadSpec, LinearHead, OwnHead, PredSimHead, TokenHead, build_head
from layerwise.history import History, format_table
from layerwise.local_losses import PredSimLoss, ScoresLoss, make_local_loss, similarity_matrix
from layerwise.memory import MemoryUse, measure_memory
from layerwise.method import Method, OptimizerSpec, Stopping
from layerwise.presets import greedy
from layerwise.probes import ProbeCallback, ProbeTable, probe
from layerwise.regularisers import Regularisation, gradient_dropout, gradient_noise
from layerwise.schedules import Stage, bottom_up, robin, segments, simultaneous
from layerwise.splitting import split
from layerwise.tracing import SplitError
from layerwise.trainer import LayerwiseTrainer, NonFiniteLossError
from layerwise.units import Chain, Unit
from platonic_core import __version__

__all__ = [
    "Chain",
    "CheckpointError",
    "ConvHead",
    "HeadOutput",
    "HeadSpec",
    "History",
    "LayerwiseTrainer",
    "LinearHead",
    "MemoryUse",
    "Method",
    "NonFiniteLossError",
    "OptimizerSpec",
    "OwnHead",
    "PredSimHead",
    "PredSimLoss",
    "ProbeCallback",
    "ProbeTable",
    "Regularisation",
    "ScoresLoss",
    "SplitError",
    "Stage",
    "Stopping",
    "TokenHead",
    "Unit",
    "__version__",
    "bottom_up",
    "build_head",
    "format_table",
    "gradient_dropout",
    "gradient_noise",
    "greedy",
    "make_local_loss",
    "measure_memory",
    "probe",
    "robin",
    "segments",
    "similarity_matrix",
    "simultaneous",
    "split",
]
