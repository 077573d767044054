"""``python -m libmtl_fair run RECIPE``: the command line, as torchrun starts it."""

from libmtl_fair.cli import main

if __name__ == "__main__":
    main()
