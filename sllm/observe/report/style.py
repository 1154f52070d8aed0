"""The style sheet of the HTML report: light and dark, narrow and wide, on paper."""

STYLE = """\
:root { --page: #f7f8fa; --card: #fff; --ink: #1c2430; --dim: #5a6675; --rule: #dde2e8; --grid: #e9edf1; --bad: #b3261e;
  --c1: #2466c2; --c2: #c8540a; --c3: #23855a; --c4: #b3261e; --c5: #7a5bb8; --c6: #6b7684; }
@media (prefers-color-scheme: dark) {
  :root { --page: #12161c; --card: #1a2029; --ink: #e4e9f0; --dim: #9aa7b7; --rule: #303a47; --grid: #262e39; --bad: #ff8a80;
    --c1: #6fa8ff; --c2: #f2b04c; --c3: #55c794; --c4: #ff6b6b; --c5: #b79cf2; --c6: #94a0ae; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { font-size: 25px; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 0 0 8px; }
h3 { font-size: 15px; margin: 0; }
header p, figcaption p { margin: 0; color: var(--dim); }
figcaption p { font-size: 13px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: 12px; margin: 22px 0; }
.tiles div, figure, .tables > div { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 12px 14px; }
.tiles dt { color: var(--dim); font-size: 13px; }
.tiles dd { margin: 0; color: var(--dim); font-size: 13px; }
.tiles dt + dd { color: var(--ink); font-size: 25px; font-weight: 600; font-variant-numeric: tabular-nums; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 16px; margin-bottom: 22px; }
figure { margin: 0; display: flex; flex-direction: column; }
svg { width: 100%; height: auto; margin-top: auto; padding-top: 6px; }
svg text { fill: var(--dim); font-size: 12px; font-variant-numeric: tabular-nums; }
svg .title { font-size: 12.5px; }
svg .note { fill: var(--ink); paint-order: stroke; stroke: var(--card); stroke-width: 4px; stroke-linejoin: round; }
.grid { stroke: var(--grid); fill: none; }
.axis { stroke: var(--dim); fill: none; }
.mark { stroke: var(--dim); fill: none; stroke-dasharray: 4 4; }
.line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
.area { fill: var(--c); opacity: .16; }
.bar, .dot { fill: var(--c); }
.dots { fill: none; stroke: var(--c); stroke-width: 4.5; stroke-linecap: round; opacity: .55; }
.span { fill: var(--c2); opacity: .13; }
.key { background: var(--c); display: inline-block; width: 14px; height: 4px; border-radius: 2px; margin-right: 6px; vertical-align: middle; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 6px 0 0; padding: 0; font-size: 13px; }
.c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); } .c4 { --c: var(--c4); } .c5 { --c: var(--c5); } .c6 { --c: var(--c6); }
.tables { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 16px; margin-bottom: 22px; align-items: start; }
.tables > div { overflow-x: auto; }
.tables > .wide { grid-column: 1 / -1; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 10px 4px 0; border-top: 1px solid var(--rule); text-align: right; overflow-wrap: break-word; }
thead th, thead td, tbody:first-child tr:first-child > * { border-top: 0; }
th[scope=row] { text-align: left; font-weight: 400; color: var(--dim); }
th[scope=col] { font-weight: 600; }
.wide th, .wide td { white-space: nowrap; }
.wide p { margin: 8px 0 0; color: var(--dim); }
.parameters { margin-bottom: 22px; }
.groups { columns: 330px 2; column-gap: 16px; }
.groups > div { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 12px 14px; margin-bottom: 16px; break-inside: avoid; }
.groups dl { margin: 6px 0 0; }
.groups dl > div { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 14px; padding: 3px 0; border-top: 1px solid var(--rule); }
.groups dl > div:first-child { border-top: 0; }
.groups dt { color: var(--dim); }
.groups dd { margin: 0 0 0 auto; text-align: right; overflow-wrap: anywhere; min-width: 0; font-variant-numeric: tabular-nums; }
pre { margin: 0; padding: 12px 14px; background: var(--card); border: 1px solid var(--rule); border-radius: 8px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
.bad { border: 2px solid var(--bad); border-radius: 8px; padding: 12px 14px; margin: 18px 0; color: var(--bad); }
.cut { border: 2px solid var(--c2); border-radius: 8px; padding: 12px 14px; margin: 18px 0; }
.cut p { margin: 0; font-weight: 600; }
.bad ul { margin: 0; padding-left: 20px; overflow-wrap: anywhere; }
@media (max-width: 560px) { svg text, svg .title { font-size: 17px; } .groups dd { margin-left: 12px; } }
@media print { body { background: none; } figure, .tiles div, .tables > div { break-inside: avoid; } }
"""
