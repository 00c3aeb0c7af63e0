"""The look of the page: one column that a phone can read, colours for light, dark and print, no font from outside.

The six colours of our variants keep 3:1 against their background; each variant has a marker of its own as well.
"""

from __future__ import annotations

__all__ = ["CSS"]

_LIGHT = (
    "--page:#ffffff; --ink:#1b1f24; --soft:#57606a; --line:#d0d7de; --shade:#f4f6f8; --base:#6e7781; --peer:#8a6d3b; "
    "--s0:#0062b1; --s1:#c2410c; --s2:#0b7a53; --s3:#8b3fb0; --s4:#b0175f; --s5:#0e7490;"
)
_DARK = (
    "--page:#0f1318; --ink:#e6eaef; --soft:#a0aab5; --line:#333c46; --shade:#181e25; --base:#98a2ad; --peer:#cba766; "
    "--s0:#5cb3ff; --s1:#ff9a5c; --s2:#4cd3a0; --s3:#cf9bf0; --s4:#ff85b5; --s5:#54cfe6;"
)

_RULES = """* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 16px 16px 48px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.4em 0; }
h2 { font-size: 1.3rem; margin: 2em 0 0.4em; padding-top: 0.6em; border-top: 2px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.8em 0 0.4em; }
p { max-width: 75ch; margin: 0.6em 0; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 0.875em; }
code { overflow-wrap: anywhere; }
pre { background: var(--shade); border: 1px solid var(--line); border-radius: 6px; padding: 10px 12px;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.figures { display: grid; gap: 20px 28px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 350px), 1fr));
  align-items: start; margin-bottom: 24px; }
.figures.wide { grid-template-columns: minmax(0, 560px); }
figure { margin: 0; break-inside: avoid; }
figcaption { font-weight: 600; margin-bottom: 4px; }
svg { display: block; width: 100%; height: auto; }
svg text { font: 11px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: var(--ink); }
svg .soft { fill: var(--soft); }
svg .end { text-anchor: end; }
svg .mid { text-anchor: middle; }
svg .head { font-weight: 600; paint-order: stroke; stroke: var(--page); stroke-width: 5px; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .one, svg .roof { stroke: var(--ink); stroke-width: 1.2; fill: none; }
svg .whisker { stroke: var(--ink); stroke-width: 1.4; }
svg .path { fill: none; stroke-width: 1.6; }
svg .hollow { fill: var(--page); }
svg .losing { font-weight: 700; }
.base { fill: var(--base); stroke: var(--base); } .peer { fill: var(--peer); stroke: var(--peer); }
.s0 { fill: var(--s0); stroke: var(--s0); } .s1 { fill: var(--s1); stroke: var(--s1); }
.s2 { fill: var(--s2); stroke: var(--s2); } .s3 { fill: var(--s3); stroke: var(--s3); }
.s4 { fill: var(--s4); stroke: var(--s4); } .s5 { fill: var(--s5); stroke: var(--s5); }
.scroll { overflow-x: auto; margin: 10px 0 18px; }
table { border-collapse: collapse; font-size: 0.84rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: 4px; position: sticky; left: 0; }
th, td { padding: 3px 10px 3px 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:last-child { text-align: left; }
tbody th { font-weight: 400; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
@media print {
  :root { color-scheme: light; LIGHT }
  main { max-width: none; padding: 0; }
  body { font-size: 10pt; }
  .figures { grid-template-columns: repeat(2, 1fr); }
  .scroll { overflow: visible; }
  table { font-size: 6.5pt; }
  th, td { padding: 1px 4px 1px 0; white-space: normal; }
  tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
}
"""

CSS = (
    f":root {{ color-scheme: light dark; {_LIGHT} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}\n"
    + _RULES.replace("LIGHT", _LIGHT)
)
