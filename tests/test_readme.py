"""The README's code runs."""

from __future__ import annotations

import re
import subprocess
import sys


def test_python_blocks_run_and_the_custom_graph_is_short(root, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    written = [line for line in blocks[0].splitlines() if line.strip()]
    assert len(written) < 40
    path = tmp_path / "block.py"
    path.write_text(blocks[0])
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path)], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("of 12 on time\n")


def test_commands_and_files_that_the_readme_names_exist(root):
    text = (root / "README.md").read_text()
    for name in set(re.findall(r"(?:configs|benchmarks|tests|neustream)/[\w/]+\.(?:yaml|py|png|md|json)", text)):
        assert (root / name).exists(), name
    from neustream import POLICIES

    for policy in POLICIES:
        assert f"| `{policy}` |" in text
