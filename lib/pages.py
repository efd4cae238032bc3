"""
A report's blocks as Markdown, and as one HTML page with its pictures inside.

    blocks = [("h1", text), ("h2", text), ("p", text), ("table", [{column: value}, ...]),
              ("picture", path), ...]
"""
import base64
import html
import os
from pathlib import Path

import pandas

STYLE = ("body{font:15px sans-serif;max-width:60em;margin:2em auto}"
         "table{border-collapse:collapse;margin:1em 0}"
         "td,th{border:1px solid #ccc;padding:.2em .6em;text-align:right}img{max-width:100%}")


def frame(rows):
    """The rows of a table, dicts that may lack columns, as a DataFrame of text."""
    return pandas.DataFrame(rows, dtype=object).fillna("").astype(str)


def markdown_table(rows):
    table = frame(rows)
    lines = [table.columns, ["---"] * len(table.columns), *table.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_markdown(blocks, folder):
    """Markdown that lies in `folder`, pictures linked."""
    written = []
    for kind, content in blocks:
        if kind == "table":
            written.append(markdown_table(content))
        elif kind == "picture":
            link = Path(os.path.relpath(content, folder)).as_posix().replace(":", "%3A").replace(" ", "%20")
            written.append(f"![{content.stem}]({link})")
        else:
            written.append({"h1": "# ", "h2": "## ", "p": ""}[kind] + content)
    return "\n\n".join(written) + "\n"


def as_html(blocks):
    """One page with its pictures inside."""
    written = [f"<!doctype html><meta charset='utf-8'><title>Task addition</title><style>{STYLE}</style>"]
    for kind, content in blocks:
        if kind == "table":
            written.append(frame(content).to_html(index=False, border=0))
        elif kind == "picture":
            data = base64.b64encode(content.read_bytes()).decode()
            written.append(f"<img alt='{html.escape(content.stem)}' src='data:image/png;base64,{data}'>")
        else:
            written.append(f"<{kind}>{html.escape(content)}</{kind}>")
    return "\n".join(written) + "\n"
