"""The terminal: plain lines without one, a live table with one, silence when it is off."""

import os
import pty
import subprocess
import sys

from megarl.observability.console import Console

METRICS = {"critic/score/mean": 0.5, "actor/ppo_kl": 1e-6, "val-core/digits/exact_match": 0.25, "timing_s/gen": 2.0}


def test_plain_lines_without_a_terminal(capsys):
    console = Console(10)
    console.message("engines are up")
    console.update(1, METRICS)
    console.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("engines are up")
    assert lines[1] == "step 1/10  score 0.5  kl 1e-6  val-core/digits/exact_match 0.25"


def test_silence_when_it_is_off(capsys):
    console = Console(10, enabled=False)
    console.update(1, METRICS)
    console.message("x")
    console.close()
    assert capsys.readouterr().out == ""


def test_a_live_table_in_a_terminal():
    code = (
        "from megarl.observability.console import Console\n"
        f"c = Console(10); c.update(1, {METRICS!r}); c.message('half [way'); c.update(2, {METRICS!r}); c.close()"
    )
    ours, theirs = pty.openpty()
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}
    subprocess.run([sys.executable, "-c", code], check=True, stdout=theirs, stderr=theirs, env=env, timeout=60)
    os.close(theirs)
    shown = os.read(ours, 1 << 20).decode()
    os.close(ours)
    assert "critic/score/mean" in shown
    assert "half [way" in shown
    assert "2/10" in shown
