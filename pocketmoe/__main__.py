"""`python -m pocketmoe`, and where the console script begins."""

from pocketmoe.cli import main

main()
