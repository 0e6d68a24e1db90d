"""Imports of the process from which those of a pool are forked."""

import torch

import pipelines.storage

__all__ = ["pipelines", "torch"]
