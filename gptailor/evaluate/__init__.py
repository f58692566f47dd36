"""Model + benchmarks + budget -> scores, equal to lm-eval's, at the cost of their arithmetic."""

from gptailor.evaluate.benchmarks import OpenBenchmark, calibration_batches, open_benchmarks, reordered
from gptailor.evaluate.evaluator import Evaluator, Stopped, is_out_of_memory
from gptailor.evaluate.scoring import AGREE, CHOICE_PROB, CLOSENESS, NonFinite, item_beside

__all__ = [
    "AGREE",
    "CHOICE_PROB",
    "CLOSENESS",
    "Evaluator",
    "NonFinite",
    "OpenBenchmark",
    "Stopped",
    "calibration_batches",
    "is_out_of_memory",
    "item_beside",
    "open_benchmarks",
    "reordered",
]
