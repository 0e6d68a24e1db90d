"""Part of the format of models registered by versions before 0.2, whose code imports it; nothing else does."""

from pipelines.data.preprocessing import load_preparation, prepare

__all__ = ["load_preparation", "prepare"]
