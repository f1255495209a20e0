"""Layer-wise training of any module: units with heads and losses of their own, in place of end-to-end backpropagation."""

from layerwise import zoo
from layerwise.borrowing import PredictionError
from layerwise.checkpoint import CheckpointError
from layerwise.compare import Comparison, compare
from layerwise.decision import AffineHead, BudgetError, DecisionBlock
from layerwise.ensembles import HeadEnsemble, make_ensemble
from layerwise.feature_cache import FeatureCache
from layerwise.filtering import Filter, KFilter, LossFilter
from layerwise.growth import grow
from layerwise.heads import ConvHead, HeadOutput, HeadSpec, LinearHead, OwnHead, PredSimHead, TokenHead, build_head
from layerwise.history import History, TensorBoardCallback, format_table
from layerwise.initialisation import initialise_unit
from layerwise.isolation import IsolationError, assert_isolated
from layerwise.local_losses import PredSimLoss, ScoresLoss, make_local_loss, similarity_matrix
from layerwise.loop import NonFiniteLossError, accuracy
from layerwise.memory import MemoryUse, measure_memory, saved_bytes
from layerwise.memory_report import MemoryReport, WindowMemory, backprop_memory, memory_report
from layerwise.method import Method, OptimizerSpec, Stopping
from layerwise.neighbours import k_filter, k_redundancy, k_redundant
from layerwise.presets import backprop, dll, greedy, predsim, preset, random_robin, segments, transfer
from layerwise.probes import ProbeCallback, ProbeTable, probe
from layerwise.pruning import Pruning, PruningError, filter_importance, prune_unit
from layerwise.recompute import checkpointed
from layerwise.regularisers import Regularisation, gradient_dropout, gradient_noise
from layerwise.ridge_head import RidgeHead
from layerwise.schedules import Stage, bottom_up, robin, simultaneous, sliding_windows, whole
from layerwise.splitting import SplitError, split
from layerwise.trainer import LayerwiseTrainer
from layerwise.units import Chain, Unit
from platonic_core import __version__

__all__ = [
    "AffineHead",
    "BudgetError",
    "Chain",
    "CheckpointError",
    "Comparison",
    "ConvHead",
    "DecisionBlock",
    "FeatureCache",
    "Filter",
    "HeadEnsemble",
    "HeadOutput",
    "HeadSpec",
    "History",
    "IsolationError",
    "KFilter",
    "LayerwiseTrainer",
    "LinearHead",
    "LossFilter",
    "MemoryReport",
    "MemoryUse",
    "Method",
    "NonFiniteLossError",
    "OptimizerSpec",
    "OwnHead",
    "PredSimHead",
    "PredSimLoss",
    "PredictionError",
    "ProbeCallback",
    "ProbeTable",
    "Pruning",
    "PruningError",
    "Regularisation",
    "RidgeHead",
    "ScoresLoss",
    "SplitError",
    "Stage",
    "Stopping",
    "TensorBoardCallback",
    "TokenHead",
    "Unit",
    "WindowMemory",
    "__version__",
    "accuracy",
    "assert_isolated",
    "backprop",
    "backprop_memory",
    "bottom_up",
    "build_head",
    "checkpointed",
    "compare",
    "dll",
    "filter_importance",
    "format_table",
    "gradient_dropout",
    "gradient_noise",
    "greedy",
    "grow",
    "initialise_unit",
    "k_filter",
    "k_redundancy",
    "k_redundant",
    "make_ensemble",
    "make_local_loss",
    "measure_memory",
    "memory_report",
    "predsim",
    "preset",
    "probe",
    "prune_unit",
    "random_robin",
    "robin",
    "saved_bytes",
    "segments",
    "similarity_matrix",
    "simultaneous",
    "sliding_windows",
    "split",
    "transfer",
    "whole",
    "zoo",
]
