"""
Code is a setting: which files a stage's numbers come from, and whether they have changed.
"""
import ast
import functools
import hashlib

# what stands between a stage and its numbers without making them; generated pictures have a fingerprint of
# their own
NO_NUMBERS = {"code.py", "devices.py", "drawing.py", "files.py", "flags.py", "generated.py", "hub.py",
              "pages.py", "plots.py", "progress.py", "ranks.py", "reading.py", "results.py", "store.py",
              "study.py"}


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
        code, modules = hash_and_imports(path, path.stat().st_mtime_ns)
        if path.parent == root or path.name not in NO_NUMBERS:
            found[path.relative_to(root).as_posix()] = code
        files = [root / f"{module.replace('.', '/')}.py" for module in modules]
        waiting += [file for file in files if file.is_file()]
    return dict(sorted(found.items()))


@functools.cache
def hash_and_imports(path, modified):
    """(hash of a module's code, dotted names that it may import) as of a file's time of modification."""
    tree = ast.parse(path.read_text())
    names = list(imported(tree))
    code = ast.unparse(without_docstrings(tree))
    return hashlib.sha256(code.encode()).hexdigest()[:16], names


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
