"""What the layers of a network do to its data: measures of representations and weights, and tables and figures of them.

The measures are functions of a representation Z and labels y; :func:`probe` takes them of every unit of a network. Probes only
look: nothing about the network, its modes or the random generators changes.
"""

from layerwise.neighbours import k_redundancy
from layerwise.probes.callback import ProbeCallback
from layerwise.probes.least_squares import LeastSquares, least_squares_distance
from layerwise.probes.measures import (
    CNNSeparability,
    ConditionalEntropy,
    KRedundancy,
    LeastSquaresDistance,
    LinearSeparability,
    Measure,
    PCAScatter,
    PureEntropy,
    StableRank,
)
from layerwise.probes.pca import Projection, project_pca
from layerwise.probes.plots import plot_by_epoch, plot_by_layer, plot_scatter, plot_voronoi
from layerwise.probes.probing import probe
from layerwise.probes.representation import as_features
from layerwise.probes.selections import THRESHOLDS, SelectionEntropy, Selections, selection_entropy
from layerwise.probes.separability import Separability, cnn_separability, linear_separability
from layerwise.probes.table import ProbeTable, Violation
from layerwise.probes.voronoi import PureVoronoiMap, pure_entropy, pure_voronoi_map
from layerwise.probes.weights import stable_rank, stable_ranks
from platonic_core.figures import save_figure

__all__ = [
    "THRESHOLDS",
    "CNNSeparability",
    "ConditionalEntropy",
    "KRedundancy",
    "LeastSquares",
    "LeastSquaresDistance",
    "LinearSeparability",
    "Measure",
    "PCAScatter",
    "ProbeCallback",
    "ProbeTable",
    "Projection",
    "PureEntropy",
    "PureVoronoiMap",
    "SelectionEntropy",
    "Selections",
    "Separability",
    "StableRank",
    "Violation",
    "as_features",
    "cnn_separability",
    "k_redundancy",
    "least_squares_distance",
    "linear_separability",
    "plot_by_epoch",
    "plot_by_layer",
    "plot_scatter",
    "plot_voronoi",
    "probe",
    "project_pca",
    "pure_entropy",
    "pure_voronoi_map",
    "save_figure",
    "selection_entropy",
    "stable_rank",
    "stable_ranks",
]
