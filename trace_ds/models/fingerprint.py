"""The fingerprint of a model directory (see :func:`trace_ds.models.families.model_fingerprint`)."""

from trace_ds.models.families import model_fingerprint

__all__ = ["model_fingerprint"]
