"""`python -m subbyte`: the command line."""

from subbyte.cli import main

if __name__ == "__main__":
    main()
