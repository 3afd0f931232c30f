"""The Python of the README runs as it stands, top to bottom."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_python_blocks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 3
    code = "\n".join(blocks).replace("max_steps=100", "max_steps=2")
    exec(compile(code, str(README), "exec"), {"__name__": "__main__"})
    assert re.search(r"^\['\w+'", capsys.readouterr().out, re.MULTILINE)  # the classes the pipeline found
