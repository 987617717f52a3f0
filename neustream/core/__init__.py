"""The pure heart: no clock, no thread, no file, no torch; every method takes `now`."""
