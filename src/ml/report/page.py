"""The comment as a page that needs nothing else: GitLab's looks, the pictures inside."""

import base64
import html
import re
from pathlib import Path

from markdown_it import MarkdownIt

from ml.errors import UserError

STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #fbfafd; color: #333238; font: 16px/1.5 -apple-system, "Segoe UI", "Noto Sans", Roboto,
  "DejaVu Sans", sans-serif, "Noto Color Emoji"; }
main { max-width: 880px; margin: 24px auto; padding: 20px 28px 28px; background: #fff; border: 1px solid #dcdcde;
  border-radius: 8px; box-sizing: border-box; }
h2 { font-size: 1.45em; line-height: 1.3; margin: 0 0 14px; padding-bottom: 10px; border-bottom: 1px solid #dcdcde; }
h3 { font-size: 1.1em; margin: 26px 0 8px; }
p { margin: 10px 0; }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: 12px 0; font-size: 0.92em; }
th, td { border: 1px solid #dcdcde; padding: 6px 12px; text-align: left; }
th { background: #fbfafd; border-bottom-width: 2px; }
td { font-variant-numeric: tabular-nums; }
code { background: #ececef; border-radius: 4px; padding: 2px 4px; font: 0.87em "JetBrains Mono", Menlo,
  "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
pre { background: #fbfafd; border: 1px solid #dcdcde; border-radius: 4px; padding: 10px 12px; overflow-x: auto; }
pre code { background: none; padding: 0; overflow-wrap: normal; }
img { max-width: 100%; height: auto; margin: 4px 0; }
details { border-top: 1px solid #ececef; padding: 10px 0 4px; margin-top: 10px; }
details + details { margin-top: 0; }
summary { cursor: pointer; }
@media (max-width: 600px) {
  main { margin: 0; padding: 14px 14px 24px; border: 0; border-radius: 0; }
  h2 { font-size: 1.2em; }
  th, td { padding: 5px 8px; }
}
"""


def page(markdown: str, folder: Path, pictures: list[str]) -> str:
    """HTML of the comment with the `pictures`, paths relative to `folder`, as data URIs; other links stay as they are.

    Raises UserError when a picture is missing.
    """
    body = MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown)
    for picture in pictures:
        body = body.replace(f'src="{html.escape(picture)}"', f'src="{data_uri(folder / picture)}"')
    heading = re.search(r"^#+ (.*)$", markdown, re.MULTILINE)
    title = html.escape(heading[1] if heading else "Report")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )


def data_uri(path: Path) -> str:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} is missing. Run `python -m ml.report.compare` again.") from None
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"
