"""``python -m trace_ds`` and ``deepspeed --module trace_ds``."""

from trace_ds.cli import main

if __name__ == "__main__":
    main()
