"""Step 5 of *fit*: the only place of this room that takes ``data_ptr()``.

Each op checks dtype, shape, device and layout once, allocates outputs and scratch, passes the current stream, and
is registered with ``torch.library`` (schema and fake; autograd where a gradient makes sense) as ``platonic::<name>``.
One file per kernel; :mod:`platonic._ops._entry` has what they share.
"""

from platonic._ops.gram import Moments, gram, merge_moments, use_gram_kernel
from platonic._ops.narrow import ACTIVATIONS, NARROW_MAX_WIDTH, NARROW_PANEL, fit_narrow
from platonic._ops.ridge import MAX_RIDGE_WIDTH, batched_ridge_data, batched_ridge_gram, rolling_ridge
from platonic._ops.sorted_pca import centred_product, project_rows

__all__ = [
    "ACTIVATIONS",
    "MAX_RIDGE_WIDTH",
    "NARROW_MAX_WIDTH",
    "NARROW_PANEL",
    "Moments",
    "batched_ridge_data",
    "batched_ridge_gram",
    "centred_product",
    "fit_narrow",
    "gram",
    "merge_moments",
    "project_rows",
    "rolling_ridge",
    "use_gram_kernel",
]
