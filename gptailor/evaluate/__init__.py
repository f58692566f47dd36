"""Model + benchmarks + budget -> scores, equal to lm-eval's, at the cost of their arithmetic."""
