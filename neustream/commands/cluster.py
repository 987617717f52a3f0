"""Look at a cluster that serves."""

COMMANDS = {
    "status": "How its instances are: load, moves, readiness.",
}
"""Name -> what `neustream cluster --help` says of it."""
