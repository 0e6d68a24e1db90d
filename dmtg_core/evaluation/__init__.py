"""Evaluation of a method: bootstrap intervals, standard errors, and problems with known groups."""
