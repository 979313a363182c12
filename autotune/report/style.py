"""The style sheet of the timeline page: a constant, into which nothing of a timeline is ever put."""

from __future__ import annotations

STYLE = """
:root{color-scheme:light dark;--page:#fff;--ink:#1b1f24;--soft:#59636e;--line:#d5dae0;--row:#f1f3f5;--card:#fff}
@media(prefers-color-scheme:dark){
:root{--page:#14171a;--ink:#e8eaed;--soft:#9aa4ae;--line:#363d45;--row:#1d2226;--card:#22272c}}
*{box-sizing:border-box}
body{margin:0;padding:16px;background:var(--page);color:var(--ink);font:14px/1.45 system-ui,sans-serif}
main{max-width:1600px;margin:0 auto}
h1{font-size:20px;line-height:1.25;margin:0 0 10px;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
table{border-collapse:collapse;margin:0 0 12px;font-variant-numeric:tabular-nums}
th,td{padding:4px 14px 4px 0;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child{text-align:left;font-weight:400}
thead th{font-weight:600;text-transform:capitalize}
#legend{display:flex;flex-wrap:wrap;gap:4px 14px;margin:0 0 10px;padding:0;list-style:none}
#legend li{display:flex;align-items:center;gap:6px;overflow-wrap:anywhere}
#legend i{width:12px;height:12px;border-radius:3px;flex:none}
#bar{position:sticky;top:0;z-index:2;background:var(--page);padding:6px 0 0;border-bottom:1px solid var(--line)}
#tools{display:flex;flex-wrap:wrap;gap:6px 8px;align-items:center;margin-bottom:4px}
button,label.box{font:inherit;color:inherit;background:var(--row);border:1px solid var(--line);border-radius:6px;
min-height:34px;min-width:38px;padding:2px 10px;cursor:pointer;display:inline-flex;align-items:center;gap:6px;
justify-content:center}
button:focus-visible,canvas:focus-visible,input:focus-visible{outline:2px solid #2b83c6;outline-offset:1px}
canvas{display:block;width:100%}
#axis{height:22px}
section{margin:14px 0 0}
h2{font-size:15px;margin:0 0 4px;text-transform:capitalize}
.rank{margin:0 0 10px}
.rank p{margin:0;font-size:12px;color:var(--soft)}
.rank p b{color:var(--ink);font-weight:600}
.rank canvas{touch-action:pan-y;cursor:crosshair}
#tip{position:fixed;z-index:3;left:0;top:0;max-width:min(340px,calc(100vw - 16px));padding:8px 10px;font-size:12px;
background:var(--card);border:1px solid var(--line);border-radius:8px;box-shadow:0 3px 14px #0004;
pointer-events:none;visibility:hidden;white-space:pre-line;overflow-wrap:anywhere}
[hidden]{display:none!important}
.hint{color:var(--soft);font-size:12px;margin:14px 0 0}
@media(max-width:600px){body{padding:12px 10px}h1{font-size:17px}
th,td{padding:4px 8px 4px 0;font-size:13px}th:first-child{white-space:normal;min-width:104px}
button,label.box{padding:2px 8px;min-width:34px;font-size:13px}#tools{gap:5px}}
"""
