"""Python in a process of its own, for what is decided once in a process."""

import json
import os
import subprocess
import sys


def run_python(code, **environment):
    """Runs code in a fresh interpreter; returns its output's last line, read as JSON if it is JSON."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    lines = result.stdout.splitlines()
    return json.loads(lines[-1]) if lines else None
