"""`python -m neustream`."""

from neustream.cli import main

main()
