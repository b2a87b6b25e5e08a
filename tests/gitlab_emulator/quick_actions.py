"""Which quick actions GitLab would carry out for a note: `Gitlab::QuickActions::Extractor`, behaviour not code.

Read in GitLab's source: the note is rendered, top-level paragraphs with a line that starts with a slash are looked
at, and in their raw lines `^/command` fires unless inside inline code or an HTML block. Commands are cut out of the
note. GitLab also skips paragraphs inside `<details>`, which this does not, so that a test errs on the strict side.
"""

import re

from markdown_it import MarkdownIt

# doc/user/project/quick_actions.md, those for merge requests; /shrug and /tableflip only change the text.
COMMANDS = (
    """approve assign assign_reviewer reviewer award react cc close copy_metadata done draft due estimate
estimate_time label labels lock merge ship milestone reassign reassign_reviewer rebase ready relabel remove_estimate
remove_milestone remove_reviewer remove_time_spent reopen request_changes request_review spend spend_time spent
submit_review subscribe target_branch title todo unapprove unassign unassign_reviewer unlabel remove_label
unlock unsubscribe wip confidential duplicate epic health_status iteration move page promote weight""".split()
)

_MATCH = re.compile(
    r"(?P<code>`.+?`)"
    r"|(?P<html>^<[^>]+?>\n.+?\n</[^>]+?>$)"
    rf"|^/(?P<command>{'|'.join(sorted(COMMANDS, key=len, reverse=True))})"
    r"(?:[ ](?P<argument>[^\n]*))?(?:\s*\n|\Z|$)",
    re.MULTILINE | re.DOTALL | re.IGNORECASE,
)
_PARAGRAPHS = MarkdownIt("gfm-like", {"html": True})


def extract(body: str) -> tuple[str, list[tuple[str, str]]]:
    """The body without its commands, and the commands with their arguments."""
    text = body.replace("\r", "")
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)
    found: list[tuple[str, str]] = []

    def cut(match: re.Match[str]) -> str:
        if match["command"] is None:
            return match[0]
        found.append((match["command"].lower(), (match["argument"] or "").strip()))
        return ""

    for token in _PARAGRAPHS.parse(text):
        if token.type == "paragraph_open" and token.level == 0 and token.map is not None:
            start, end = token.map
            paragraph = _MATCH.sub(cut, "".join(lines[start:end]))
            lines[start:end] = [paragraph] + [""] * (end - start - 1)
    return "".join(lines).rstrip(), found
