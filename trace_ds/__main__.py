"""``trace-ds``, ``python -m trace_ds`` and ``deepspeed --module trace_ds``."""

import os
import signal
import sys


def _interrupted(*_: object) -> None:
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"trace-ds: interrupted\n")
    os._exit(130)


def main() -> None:
    """Run the command line. Ctrl-C while modules are still imported ends it at once: nothing has begun."""
    before = signal.signal(signal.SIGINT, _interrupted)
    from trace_ds.cli import main as run

    signal.signal(signal.SIGINT, before)
    run()


if __name__ == "__main__":
    main()
