"""``python -m libmtl_fair.tune ...``: the command line, without the script's folder on the path."""

from libmtl_fair.cli import main

main()
