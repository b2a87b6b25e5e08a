"""The merge request as a page, for a person or a headless browser to look at."""

from html import escape

from starlette.responses import HTMLResponse

from tests.gitlab_emulator.rendering import render
from tests.gitlab_emulator.state import MergeRequest, Note, Project

STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 1rem auto; padding: 0 1rem; color: #28272d }
h1 { font-size: 1.4rem; margin-bottom: 0 } .meta, .system { color: #626168 }
.badge { border-radius: 1rem; padding: 0 .6rem; background: #c3e6cd } .label { background: #cbe2f9 }
article { border: 1px solid #dcdcde; border-radius: 4px; margin: 1rem 0; padding: 0 1rem 1rem; overflow-x: auto }
article > header { margin: .6rem 0; border-bottom: 1px solid #ececef } .system { margin: .3rem 1rem }
table { border-collapse: collapse } th, td { border: 1px solid #dcdcde; padding: .3rem .6rem; text-align: left }
code { background: #ececef; border-radius: 3px; padding: 0 .2rem; font-size: .9em; white-space: break-spaces }
pre { background: #fbfafd; border: 1px solid #dcdcde; padding: .6rem; overflow-x: auto } pre code { background: none }
img { max-width: 100% } summary { cursor: pointer }
"""

# What GitLab's sanitizer removes does nothing here either: no script runs, no picture comes from another host.
POLICY = "default-src 'none'; img-src 'self'; style-src 'unsafe-inline'"


def merge_request_page(merge_request: MergeRequest, project: Project) -> HTMLResponse:
    labels = " ".join(f'<span class="badge label">{escape(name)}</span>' for name in merge_request.labels)
    notes = "\n".join(
        _note(note, project) for note in sorted(merge_request.notes.values(), key=lambda note: note.id)
    )
    text = f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{STYLE}</style>
<title>{escape(merge_request.title)} (!{merge_request.iid}) · {escape(project.path)}</title></head>
<body>
<p class="meta">{escape(project.path)} › merge requests › !{merge_request.iid}</p>
<h1>{escape(merge_request.title)}</h1>
<p class="meta"><span class="badge">{escape(merge_request.state)}</span> {escape(merge_request.author.name)} wants to
merge <code>{escape(merge_request.source_branch)}</code> into <code>{escape(merge_request.target_branch)}</code>
{labels}</p>
{render(merge_request.description, project.id)}
{notes}
</body></html>
"""
    return HTMLResponse(text, headers={"Content-Security-Policy": POLICY})


def _note(note: Note, project: Project) -> str:
    if note.system:
        return f'<p class="system" id="note_{note.id}">{escape(note.author.name)} {escape(note.body)}</p>'
    edited = " · edited" if note.updated_at != note.created_at else ""
    return f"""<article id="note_{note.id}">
<header><b>{escape(note.author.name)}</b> <span class="meta">@{escape(note.author.username)} · {note.created_at}{edited}
</span></header>
{render(note.body, project.id)}
</article>"""
