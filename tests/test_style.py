"""Lines that fit a screen, and comprehensions that need no second reading."""
import ast

import pytest
from conftest import ROOT

COMPREHENSIONS = ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp
PYTHON = sorted([*ROOT.glob("*.py"), *ROOT.glob("lib/*.py")])
SCRIPTS = sorted([*PYTHON, *ROOT.glob("tests/*.py"), *ROOT.glob("*.sh"), *ROOT.glob("tests/*.sh")])
TEXTS = [ROOT / name for name in ("README.md", "RESULTS.md", "LOG.md")]


def below_root(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", [*SCRIPTS, *TEXTS], ids=below_root)
def test_no_line_is_longer_than_110_columns(path):
    """But for rows of tables and indented command lines in Markdown."""
    lines = path.read_text().splitlines()
    if path.suffix == ".md":
        lines = [line if not line.startswith(("|", "    ")) else "" for line in lines]
    assert [(number, len(line)) for number, line in enumerate(lines, 1) if len(line) > 110] == []


@pytest.mark.parametrize("path", PYTHON, ids=below_root)
def test_no_comprehension_stands_inside_another(path):
    nested = set()
    for outer in ast.walk(ast.parse(path.read_text())):
        if isinstance(outer, COMPREHENSIONS):
            nested |= {inner.lineno for inner in ast.walk(outer) if isinstance(inner, COMPREHENSIONS)
                       and inner is not outer}
    assert sorted(nested) == []
