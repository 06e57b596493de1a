"""trace_ds: routing-aware machine unlearning for Mixture-of-Experts language models on DeepSpeed."""

__version__ = "0.1.0"
