"""The command `subbyte`. Importing the library takes seconds, in which Ctrl-C ends the program without a traceback."""

import signal


def main() -> None:
    """Import the library, and run its command line.

    Raises:
        SystemExit: see `subbyte.cli.main`.
    """
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not where a shell has the signal ignored
    if interruptible:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from subbyte.cli import main as run

    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


if __name__ == "__main__":
    main()
