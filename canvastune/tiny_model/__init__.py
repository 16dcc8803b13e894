"""A random DiffusionGemma small enough for a laptop, and word problems to train it on."""

from canvastune.tiny_model.model import make_tiny_model
from canvastune.tiny_model.word_problems import KINDS, write_problems, write_rows

__all__ = ["KINDS", "make_tiny_model", "write_problems", "write_rows"]
