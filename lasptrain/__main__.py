"""`python -m lasptrain` is `lasptrain`."""

from lasptrain.cli import main

main()
