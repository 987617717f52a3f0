"""Rules for clusters: routers, movers and scalers, small frozen dataclasses, one a file."""
