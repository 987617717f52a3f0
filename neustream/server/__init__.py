"""The HTTP front: a service behind OpenAI's routes, with promises on the wire."""
