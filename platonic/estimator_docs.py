"""Docstrings of the three estimators, which share most of their parameters."""

__all__ = ["CLASSIFIER", "EITHER", "REGRESSOR"]

PARAMETERS = """
    Each hidden layer is fitted by one ridge regression, without gradient descent. With Z (m, n) the layer's input and Y
    (m, k) the targets (one-hot for more than two classes, one column of -1 and +1 for two), a projection P of [Z | Y]
    sets the target of the layer's pre-activations, W is its least squares fit, and the next Z is the activation of
    [1 Z] W. The output layer minimises ``||[1 Z] W - Y||^2 + l2 ||W||^2`` with the intercept unpenalised.

    Parameters
    ----------
    hidden_layer_sizes : int or sequence of int, default=(100,)
        Width of each hidden layer; at least one.
    activation : {'relu', 'abs', 'tanh', 'celu', 'identity'} or callable, default='relu'
        Activation of the hidden layers. A callable maps a tensor to a tensor, elementwise.
    projection : str or sequence of str, default='auto'
        Where the weights of hidden layers come from, for all layers or one name per layer.

        - 'auto' (with relative scaling): a pool of candidate units (first layer: steep differences of pairs of samples of
          different classes; later layers: equation 7.2 with beta drawn per unit), out of which forward selection takes
          the layer's units where two-fold cross-validation says that this predicts better than drawing them. With
          absolute scaling it means 'random'.
        - 'random': P ~ N(0, 1), the best of `n_tries` by least squares distance.
        - 'platonic_pca': P = leading principal components of [Z | Y], at most n + k of them.
        - 'sorted_pca': samples at evenly spaced ranks along the first principal component, as weight vectors. Meant for
          the first layer.
        - 'pairs': differences of random pairs of samples of different classes (regression: of clearly different
          targets), zero at the midpoint. Meant for the first layer.
        - 'elm': random weights that see no data, the baseline (Extreme Learning Machine).
    alpha : float, default=1.0
        Scale of the pre-activations: with relative scaling their standard deviation, with absolute scaling the factor
        of [Z | beta Y].
    beta : float, default=10.0
        Weight of the targets beside the layer's input; 'auto' draws it per unit, log-normally around this value. Relative
        scaling: 'platonic_pca' takes its components from standardised columns whatever beta is.
    n_tries : int or None, default=None
        'random', 'pairs' and 'elm': how many draws of a whole layer are tried, the one with the least squares distance
        kept (None: 1). 'auto': candidates per unit (None: 4, and at least 256 a layer; 1: no selection).
    l2 : float or 'loo', default='loo'
        Ridge penalty. Relative scaling: in units of total weight times squared scale of a column. 'loo' chooses a power
        of ten times the mean square of a column in these units, for each layer by exact leave-one-out error. The first
        layer's target of 'random' and 'platonic_pca' is then fitted under a fixed relative penalty of 3 mean variances
        instead.
    solver : {'cholesky', 'eig', 'svd', 'pinv', 'lstsq'}, default='cholesky'
        See :mod:`platonic.solvers`. All factorise in float64.
    tol : float or None, default=None
        Relative tolerance of the rank decision of all solvers but 'cholesky'. None: max(m, n) times the rounding unit.
    ema : float, default=0.2
        'platonic_pca': after each hidden layer the importance d of a sample becomes ``ema d + (1 - ema) ||y - yhat||^2``.
        It scales the sample's row of Y when P is found. 1 switches this off.
    scaling : {'relative', 'absolute'}, default='relative'
        'relative' makes every scale relative to the data's, so that defaults carry over; 'absolute' takes alpha, beta
        and l2 literally, as the thesis does.
    image_shape : tuple of int or None, default=None
        (height, width) or (height, width, channels) of the image that a row of X holds: pairs are then compared within
        random rectangles.
    dtype : {'float32', 'float64'} or None, default=None
        Dtype of the representations. None: float64 if X is, or if the widest representation has at most 2^24 numbers;
        else float32. Moments, factorisations and solutions are float64 always.
    device : str, torch.device or None, default=None
        Where to compute; None: where X is.
    random_state : int, RandomState instance or None, default=None
        Seeds all draws, which are made on the CPU: every device draws the same.
    verbose : bool, default=False
        Print a line per layer, or show a progress bar for more than 20 layers.
"""

ATTRIBUTES = """
    Attributes
    ----------
    coefs_ : list of array
        Weight matrices (n_in, n_out), the output layer's last; in the library and on the device of X.
    intercepts_ : list of array
        Bias vectors (n_out,).
    layer_scores_ : list of LayerRecord
        Per hidden layer: width, projection, least squares distance, training score, l2, rank, jitter.
    n_features_in_ : int
    feature_names_in_ : array of str
        Only when X had string column names.
    n_outputs_ : int
        Columns of the output layer.
    activation_ : str or callable
        The activation that the network was fitted with.
"""

CLASS_WEIGHT = """    class_weight : dict, 'balanced' or None, default=None
        Weight of each class, multiplied with the sample weights; but a sample counts for as many as its own weight says where
        temperature and penalty are chosen by leaving samples out.
"""

CLASSES = """    classes_ : array
        Class labels, sorted.
    temperature_ : float
        What `predict_proba` divides the outputs by.
"""

REFERENCES = """
    References
    ----------
    Platonic projections: chapter 7 of the thesis that this library implements. Close relatives: Extreme Learning Machine
    (Huang et al. 2004); Forward Projection (arXiv 2501.16476), whose targets g(A Q) + g(Y U) are near T = [Z | Y] P;
    sampling where it matters (SWIM, NeurIPS 2023), near 'pairs'; orthogonal least squares (Chen, Billings, Luo 1989).
"""

CLASSIFIER = (
    "Multilayer perceptron for classes, fitted in closed form.\n"
    + PARAMETERS
    + CLASS_WEIGHT
    + ATTRIBUTES
    + CLASSES
    + REFERENCES
)
REGRESSOR = "Multilayer perceptron for regression, fitted in closed form.\n" + PARAMETERS + ATTRIBUTES + REFERENCES
EITHER = (
    """Multilayer perceptron fitted in closed form: a classifier or a regressor, as y says.

    Floating-point y is regression; integers, booleans and strings are classes; `task` overrides. For scikit-learn tools that
    must know before the fit (stratified cross-validation, say), give `task` or use the classes that are one or the other.
"""
    + PARAMETERS
    + CLASS_WEIGHT
    + """    task : {'classification', 'regression'} or None, default=None
        None: decided by the dtype of y at each fit, and kept in ``task_``.
"""
    + ATTRIBUTES
    + CLASSES
    + REFERENCES
)
