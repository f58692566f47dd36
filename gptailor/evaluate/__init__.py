"""Model + benchmarks + budget -> scores, equal to lm-eval's, at the cost of their arithmetic."""

from gptailor.evaluate.benchmarks import OpenBenchmark, calibration_batches, open_benchmarks
from gptailor.evaluate.evaluator import Evaluator, Stopped, is_out_of_memory
from gptailor.evaluate.scoring import CHOICE_PROB, NonFinite

__all__ = [
    "CHOICE_PROB",
    "Evaluator",
    "NonFinite",
    "OpenBenchmark",
    "Stopped",
    "calibration_batches",
    "is_out_of_memory",
    "open_benchmarks",
]
