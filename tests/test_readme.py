"""The Python of README and of the guides in docs runs, the YAML parses, and every file they link exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pquant_jax import config

ROOT = Path(__file__).parent.parent
NAMES = ("README.md", "docs/pruning.md", "docs/precision_scans.md", "docs/hardware.md")
PAGES = {name: (ROOT / name).read_text() for name in NAMES}
BLOCKS = [(name, code) for name, text in PAGES.items() for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]
YAML = [code for text in PAGES.values() for code in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
INLINE = re.findall(r"`((?:pruning|search|quantization): \{.*?\})`", "".join(PAGES.values()))
LINKS = [(name, link) for name, text in PAGES.items() for link in re.findall(r"\]\((?!http)([^)#]+)\)", text)]


def test_there_is_code():
    assert {name for name, _ in BLOCKS} == set(PAGES) and YAML and INLINE


@pytest.mark.parametrize("page", PAGES)
def test_code_runs(page, tmp_path, monkeypatch):
    """A page's blocks one after the other, as a reader runs them."""
    monkeypatch.chdir(tmp_path)
    if "sklearn" in PAGES[page]:
        pytest.importorskip("sklearn")
    if "onnx" in PAGES[page]:
        pytest.importorskip("qonnx")
    namespace = {"__name__": "readme"}
    for name, code in BLOCKS:
        if name == page:
            exec(compile(code, name, "exec"), namespace)


@pytest.mark.parametrize("code", [*YAML, *INLINE])
def test_configurations_parse(code):
    config.parse(config.read_yaml(code, "documentation"))


@pytest.mark.parametrize(("name", "link"), LINKS)
def test_links_exist(name, link):
    assert ((ROOT / name).parent / link).exists()
