"""Evaluation of a method: bootstrap intervals, and problems whose groups are known."""
