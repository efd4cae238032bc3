"""
Code is a setting: which files a stage's numbers come from, and whether they have changed.
"""
import ast
import hashlib

# what stands between a stage and its numbers without making them; generated pictures have a fingerprint of
# their own
NO_NUMBERS = {"code.py", "devices.py", "drawing.py", "files.py", "flags.py", "generated.py", "hub.py",
              "pages.py", "plots.py", "progress.py", "ranks.py", "results.py", "store.py", "study.py"}


def code_of(script):
    """{file: hash} of a script and of every module of its project that it imports, but NO_NUMBERS.

    Comments, docstrings and white space do not count.
    """
    root, waiting = script.resolve().parent, [script.resolve()]
    found, seen = {}, set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        tree = ast.parse(path.read_text())
        if path.parent == root or path.name not in NO_NUMBERS:
            code = ast.unparse(without_docstrings(tree))
            found[path.relative_to(root).as_posix()] = hashlib.sha256(code.encode()).hexdigest()[:16]
        for module in imported(tree):
            file = root / f"{module.replace('.', '/')}.py"
            if file.is_file():
                waiting.append(file)
    return dict(sorted(found.items()))


def imported(tree):
    """The dotted names that a module's import statements may mean."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def without_docstrings(tree):
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (isinstance(body, list) and body and isinstance(body[0], ast.Expr)
                and isinstance(body[0].value, ast.Constant)):
            body[0] = ast.Pass()
    return tree
