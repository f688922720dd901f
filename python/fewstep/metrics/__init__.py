"""Metrics of generated samples."""

from fewstep.metrics.classifier import classifier_features, frechet_local
from fewstep.metrics.distances import exact_w2, frechet_distance, mmd_rbf, sliced_w2
from fewstep.metrics.likelihood import bits_per_dim, dequantize
from fewstep.metrics.neighbours import (
    PrecisionRecallCoverage,
    knn_agreement,
    nearest_distance,
    precision_recall_coverage,
)
from fewstep.metrics.straightness import Straightness, straightness
from fewstep.metrics.summary import MetricRow, format_report, report, within_class_std

__all__ = [
    "MetricRow",
    "PrecisionRecallCoverage",
    "Straightness",
    "bits_per_dim",
    "classifier_features",
    "dequantize",
    "exact_w2",
    "format_report",
    "frechet_distance",
    "frechet_local",
    "knn_agreement",
    "mmd_rbf",
    "nearest_distance",
    "precision_recall_coverage",
    "report",
    "sliced_w2",
    "straightness",
    "within_class_std",
]
