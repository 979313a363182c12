"""The frame of a page: self-contained, no network, no library, and no name that could act as markup.

A page allows exactly its own script (a content security policy with its digest), so that even a name that slipped
through would be inert.
"""

from __future__ import annotations

import json
from base64 import b64encode
from hashlib import sha256
from html import escape
from typing import Any

from autotune.report.script import SCRIPT
from autotune.report.style import STYLE


def document(title: str, body: str, data: dict[str, Any] | None = None, style: str = "") -> str:
    """The whole page around `body`, which is markup. `data`: what the timelines' script draws; no script without it."""
    allowed = b64encode(sha256(SCRIPT.encode()).digest()).decode()
    source = f"'sha256-{allowed}'" if data else "'none'"
    policy = f"default-src 'none'; script-src {source}; style-src 'unsafe-inline'; base-uri 'none'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{STYLE}{style}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
{body}
</main>
{_script(data) if data else ""}</body>
</html>
"""


def _script(data: dict[str, Any]) -> str:
    # "<" as an escape: the only character that could end the block early.
    block = json.dumps(data, separators=(",", ":"), ensure_ascii=True).replace("<", "\\u003c")
    return f"""<div id="tip" role="status"></div>
<script type="application/json" id="data">{block}</script>
<script>{SCRIPT}</script>
"""
