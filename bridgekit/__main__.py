"""`python -m bridgekit`, which is what `torchrun -m bridgekit` needs."""

from bridgekit.cli import main

main()
