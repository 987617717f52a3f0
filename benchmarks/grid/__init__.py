"""The grid that `policies.py` and `llm.py simulate` run: points as data, and what is computed at each."""
