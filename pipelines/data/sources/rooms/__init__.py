"""Rendered rooms in the layout of Taskonomy."""
