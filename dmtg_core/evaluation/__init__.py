"""Evaluation of a method: bootstrap intervals, and problems with known groups."""
