"""`python -m pfsurgery.cli`."""

from pfsurgery.cli import main

main()
