"""Lets `python -m trilemma` stand for the `trilemma` command."""

from trilemma.cli import main

main()
