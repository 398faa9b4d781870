"""`python -m lorafit`: the command line."""

from lorafit.cli import main

main()
