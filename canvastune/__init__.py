"""Canvastune: fine-tuning DiffusionGemma, from a data set to a merged, evaluated and reported model."""

__version__ = "0.1.0"
