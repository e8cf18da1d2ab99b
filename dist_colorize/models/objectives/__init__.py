"""What a network is trained for: one file per family of methods, one line each in dist_colorize.models.METHODS.

An objective turns features and the true ab into a loss *sum* and a sum of weights, see base.Objective.
"""

from __future__ import annotations

from dist_colorize.models.objectives.base import Objective
from dist_colorize.models.objectives.classification import CrossEntropy, RebalancedCrossEntropy
from dist_colorize.models.objectives.mse import SquaredError
from dist_colorize.models.objectives.perceptual import Perceptual
from dist_colorize.models.objectives.soft import SoftTargets

__all__ = ["CrossEntropy", "Objective", "Perceptual", "RebalancedCrossEntropy", "SoftTargets", "SquaredError"]
