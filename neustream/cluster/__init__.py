"""Many devices and machines: who is where, what moves, how many there are. No I/O in here."""
