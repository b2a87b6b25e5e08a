"""GET /docs: the OpenAPI schema as one HTML page. Swagger's page would load its script from a stranger's server, which
a closed network does not reach and a strict one does not allow."""

import html
import json
from typing import Any

HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'",
    "referrer-policy": "no-referrer",
}
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.5rem}h2{font-size:1.05rem;margin:0}code,pre{font:13px/1.45 ui-monospace,monospace}
article{border:1px solid #ddd;border-radius:6px;margin:0 0 1rem;overflow:hidden}
article>header{display:flex;gap:.8rem;align-items:center;padding:.5rem .8rem;background:#f6f8fa}
article>div{padding:.4rem .8rem .8rem}.GET{background:#1f6feb}.POST{background:#1a7f37}
.method{color:#fff;border-radius:4px;padding:.1rem .5rem;font-weight:600;font-size:.8rem}
.path{font-weight:600;font-size:1rem}pre{background:#f6f8fa;padding:.6rem;border-radius:4px;overflow:auto;margin:.3rem 0}
table{border-collapse:collapse;width:100%}td{border-top:1px solid #eee;padding:.2rem .5rem .2rem 0;vertical-align:top}
summary{cursor:pointer;color:#0969da}p{margin:.4rem 0}
"""


def docs_page(schema: dict[str, Any], tag: str) -> str:
    info = schema["info"]
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(info["title"])}</title>',
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>',
        f"<h1>{escape(info['title'])}</h1><p>Live: <b>{escape(tag)}</b>. {escape(info['description'])} ",
        'The same for programs: <a href="openapi.json">openapi.json</a>.</p>',
    ]
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            parts.append(article(method.upper(), path, operation, schema))
    return "".join(parts) + "</html>"


def article(method: str, path: str, operation: dict[str, Any], schema: dict[str, Any]) -> str:
    rows = [
        f"<tr><td><code>{escape(each['name'])}</code></td><td>{escape(each.get('description', ''))}</td>"
        f"<td><code>{escape(kind(each.get('schema', {})))}</code></td></tr>"
        for each in operation.get("parameters", [])
    ]
    parts = [f"<p>{escape(operation.get('description', ''))}</p>"]
    parts += [f"<pre>{escape(each['source'])}</pre>" for each in operation.get("x-codeSamples", [])]
    if rows:
        parts.append(f"<table>{''.join(rows)}</table>")
    content = operation.get("requestBody", {}).get("content", {})
    if content:
        parts.append(f"<p>Takes {', '.join(f'<code>{escape(each)}</code>' for each in content)}.</p>")
        parts += [
            fold("Body", example(each.get("schema", {}), schema))
            for name, each in content.items()
            if "json" in name
        ]
    for status, response in operation["responses"].items():
        found = response.get("content", {}).get("application/json", {}).get("schema")
        if status == "200" and found:
            parts.append(fold("Answer", example(found, schema)))
    refusals = ", ".join(status for status in operation["responses"] if status != "200")
    parts.append(f"<p>Errors: {escape(refusals)}, as problem details.</p>" if refusals else "")
    return (
        f'<article id="{escape(path.strip("/"))}"><header><span class="method {method}">{method}</span>'
        f'<span class="path"><code>{escape(path)}</code></span><h2>{escape(operation.get("summary", ""))}</h2></header>'
        f"<div>{''.join(parts)}</div></article>"
    )


def fold(title: str, value: Any) -> str:
    text = escape(json.dumps(value, indent=2, ensure_ascii=False))
    return f"<details><summary>{title}</summary><pre>{text}</pre></details>"


def kind(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if "anyOf" in schema:
        return " | ".join(kind(each) for each in schema["anyOf"] if each.get("type") != "null")
    return str(schema.get("pattern") or schema.get("type", ""))


def example(schema: dict[str, Any], whole: dict[str, Any]) -> Any:
    """A value of this shape: the declared examples, else the names of the types."""
    if "$ref" in schema:
        return example(whole["components"]["schemas"][schema["$ref"].rpartition("/")[2]], whole)
    if schema.get("examples"):
        return schema["examples"][0]
    if "anyOf" in schema:
        return example(schema["anyOf"][0], whole)
    if schema.get("properties"):
        return {name: example(each, whole) for name, each in schema["properties"].items()}
    if schema.get("type") == "array":
        return [example(schema.get("items", {}), whole)]
    if schema.get("type") == "object":
        return (
            {"…": example(schema["additionalProperties"], whole)}
            if isinstance(schema.get("additionalProperties"), dict)
            else {}
        )
    return schema.get("default", schema.get("format") or schema.get("type", "…"))


def escape(text: Any) -> str:
    return html.escape(str(text))
