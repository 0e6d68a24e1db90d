"""Evaluation of models, and predictions for stored samples."""
