"""gptailor: make a large language model shorter by cutting and stitching layers of the model and its fine-tunes."""

__version__ = "0.2.0"
