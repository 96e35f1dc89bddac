"""Exact weight and activation sparsity: selection, projection, schedules, statistics."""

from wsparse.ops.top_k import abs_top_k, keep_top_k
from wsparse.sparsity.phases import SupportPhasesState, resting_moments, support_phases
from wsparse.sparsity.project import (
    DEFAULT_RULES,
    MODEL_RULES,
    Dense,
    ProjectTopKState,
    Sparse,
    budget,
    find_state,
    l0,
    nonfinite_matrices,
    project_top_k,
)  # fmt: skip
from wsparse.sparsity.schedules import (
    density_schedule,
    exploration_steps,
    frozen_steps,
    gradient_rms,
    learning_rate_schedule,
    scale_by_gradient_rms,
)  # fmt: skip
from wsparse.sparsity.statistics import alive_neurons, budget_warnings, kurtosis, turnover

__all__ = [
    "DEFAULT_RULES", "MODEL_RULES", "Dense", "ProjectTopKState", "Sparse", "SupportPhasesState", "abs_top_k",
    "alive_neurons", "budget", "budget_warnings", "density_schedule", "exploration_steps", "find_state",
    "frozen_steps", "gradient_rms", "keep_top_k", "kurtosis", "l0", "learning_rate_schedule",
    "nonfinite_matrices", "project_top_k", "resting_moments", "scale_by_gradient_rms", "support_phases",
    "turnover",
]  # fmt: skip
