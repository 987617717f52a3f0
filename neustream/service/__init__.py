"""Models behind one engine: what `neustream.serve` returns."""
