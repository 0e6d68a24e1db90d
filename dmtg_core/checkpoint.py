"""Part of the format of models registered by versions before 0.2, whose code imports it; nothing else does."""

from dmtg_core.training.checkpoint import load_model

__all__ = ["load_model"]
