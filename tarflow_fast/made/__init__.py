"""One sweep: masked autoregressive flows of zuko, nflows, normflows and torchflows, sampled for the price of a density.

All these libraries invert a MADE (arXiv 1502.03509; MAF, arXiv 1705.07057; neural spline flows, arXiv 1906.04032) by
running its whole net once for each of the D features. But a hidden unit is final as soon as the features it sees are
known. So one sweep over the features computes each unit once, and the inverse costs one masked pass.
"""

from tarflow_fast.made.accelerate import Explanation, accelerate, explain, freeze, restore, unfreeze

__all__ = ["Explanation", "accelerate", "explain", "freeze", "restore", "unfreeze"]
