"""The commands, one file each: its function `command` is what runs, and its docstring the help.

`neustream.cli` lists them; `options.py`, `printing.py` and `interrupts.py` are what they share.
"""
