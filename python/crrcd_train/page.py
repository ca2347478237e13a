"""HTML of a report: one file that holds its pictures."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any

from . import config as settings

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em;
       color: #1a1a1a; background: #fff }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2em; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 15px }
th, td { padding: .3em .8em; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap }
th { background: #f4f4f4; white-space: normal; vertical-align: bottom }
figure { margin: 1.5em 0 } img { max-width: 100% }
figcaption, .note { color: #555; font-size: 14px }
pre { background: #f4f4f4; padding: 1em; overflow-x: auto; font-size: 13px; line-height: 1.35 }
.wide { overflow-x: auto }
"""


def document(title: str, body: str) -> str:
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body>{body}</body></html>\n"
    )


def figure(path: Path, title: str, caption: str, heading: str = "h2") -> str:
    """A picture with its heading, inside the page."""
    encoded = base64.b64encode(path.read_bytes()).decode()
    kind = "png" if path.suffix == ".png" else "jpeg"
    return (
        f"<{heading}>{html.escape(title)}</{heading}><figure>"
        f"<img alt='{html.escape(title)}' src='data:image/{kind};base64,{encoded}'>"
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def table(text: str) -> str:
    """A Markdown table as HTML."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    head, body = rows[0], rows[2:]
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = [f"<tr>{cells}</tr>"]
    for row in body:
        lines.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def provenance(command: str, config: dict[str, Any], versions: dict[str, str]) -> str:
    """The command, every setting and the versions that a result depends on."""
    lines = "\n".join(
        f"{key} = {json.dumps(value)}" for key, value in settings.flatten(config).items()
    )
    texts = "\n".join(f"{key}: {value}" for key, value in versions.items())
    return (
        f"<h2>Configuration</h2><p><code>{html.escape(command)}</code></p>"
        f"<pre>{html.escape(lines)}</pre><h2>Versions</h2><pre>{html.escape(texts)}</pre>"
    )
