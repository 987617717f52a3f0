"""The commands, one file each: its function `command` is what runs, and its docstring the help.

`neustream.cli` lists them. They share `options.py`, `outputs.py`, `printing.py`, `interrupts.py` and `reach.py`.
"""
