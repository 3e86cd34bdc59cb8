"""`python -m bridgekit`, also used by `torchrun -m bridgekit`."""

from bridgekit.cli import main

main()
