"""Answers of both models to held-out prompts, their scores, and their validation loss."""
