"""What is seen of a running server: one life a request, counted, shown and traced."""
