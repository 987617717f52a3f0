"""What runs the core: clocks, executors, the one loop, and what is recorded of it."""
