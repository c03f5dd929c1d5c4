"""Scores of depth, cameras and images, always beside predictors that do not look at the clip."""

from u4d.evaluate.codec import evaluate_codec
from u4d.evaluate.report import format_json, format_markdown, format_text
from u4d.evaluate.results import EvaluationReport
from u4d.evaluate.run import evaluate
from u4d.evaluate.trivial import TrivialPriors, fit_priors

__all__ = [
    "EvaluationReport",
    "TrivialPriors",
    "evaluate",
    "evaluate_codec",
    "fit_priors",
    "format_json",
    "format_markdown",
    "format_text",
]
