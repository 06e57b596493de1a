"""The offline conversion tool: any sharded checkpoint to a Hugging Face model and back, streamed and exact.

    from trace_ds.conversion.convert import convert_checkpoint
    convert_checkpoint(Path("runs/x/checkpoints/step_000100"), Path("model"), base_model=Path("Mixtral-8x7B-v0.1"))

What it converts is opened by :mod:`trace_ds.tensors`. No GPU, no process group, no compiler and no DeepSpeed are
needed.
"""
