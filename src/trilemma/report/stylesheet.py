"""How the report looks: one stylesheet for light, dark and paper."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fdfdfb; --panel: #f4f4ef; --ink: #1d2126; --soft: #565d66; --rule: #d9d9d1; --rule-strong: #8b8f94;
  --accent: #00568a; --mark: #e8f1f7; --warn: #8a4b00; --warn-paper: #fdf3e3; --heat: 0, 114, 178; --heat-max: .68;
  --serif: "Iowan Old Style", "Palatino Linotype", Palatino, "Book Antiqua", Georgia, "DejaVu Serif", serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #16191d; --panel: #1f2329; --ink: #e6e6e1; --soft: #a5abb3; --rule: #343a42; --rule-strong: #767d86;
    --accent: #7cc0ea; --mark: #1d2f3b; --warn: #f0b45a; --warn-paper: #2c2417; --heat: 86, 180, 233; --heat-max: .5;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 var(--sans); }
.page { max-width: 1400px; margin: 0 auto; padding: 2.2rem 1.6rem 5rem; }
nav { font-size: .84rem; }
nav ol { list-style: none; margin: 0 0 1rem; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1rem; }
nav .name { font: 600 1rem var(--serif); margin: 0 0 .7rem; }
nav a { color: var(--soft); text-decoration: none; display: block; padding: .16rem 0; }
nav a:hover, nav a:focus { color: var(--accent); text-decoration: underline; }
@media (min-width: 1180px) {
  .page { display: grid; grid-template-columns: 9rem minmax(0, 1fr); column-gap: 2.4rem; }
  .page > header, .page > main, .page > footer { grid-column: 2; }
  nav { grid-column: 1; grid-row: 1 / span 3; position: sticky; top: 2.2rem; align-self: start; }
  nav ol { display: block; }
}
header .kind { margin: 0 0 .3rem; color: var(--soft); font-size: .84rem; }
h1 { font: 600 2.1rem/1.2 var(--serif); margin: 0 0 .6rem; overflow-wrap: anywhere; text-wrap: balance; }
h2 { font: 600 1.42rem/1.25 var(--serif); margin: 3.2rem 0 .7rem; padding-top: .9rem;
  border-top: 1px solid var(--rule); }
h3 { font: 600 1rem/1.35 var(--sans); margin: 1.7rem 0 .4rem; overflow-wrap: anywhere; }
p, li, dd { max-width: 68ch; overflow-wrap: anywhere; }
p { margin: .5rem 0 .8rem; }
a { color: var(--accent); }
.lead { font: 400 1.22rem/1.5 var(--serif); max-width: 60ch; }
.facts { display: flex; flex-wrap: wrap; gap: .2rem 1.6rem; margin: 1rem 0 0; padding: 0; color: var(--soft);
  font-size: .88rem; list-style: none; }
.facts b { color: var(--ink); font-weight: 600; }
.caution { background: var(--warn-paper); border-left: 3px solid var(--warn); padding: .6rem .95rem; margin: .7rem 0;
  max-width: 78ch; }
.caution h3 { display: inline; margin: 0 .35em 0 0; color: var(--warn); font-size: 1rem; }
.caution h3 + p { display: inline; } .caution p { margin: 0; } .caution > div + div { margin-top: .35rem; }
.verdict { background: var(--mark); border-left: 3px solid var(--accent); padding: .85rem 1.1rem; margin: 1rem 0 1.4rem;
  max-width: 78ch; }
.verdict h3 { margin: 0 0 .2rem; color: var(--accent); }
.verdict p { font: 400 1.1rem/1.5 var(--serif); margin: 0; max-width: 68ch; }
.findings { display: grid; grid-template-columns: repeat(auto-fit, minmax(23rem, 1fr)); gap: .3rem 2.4rem; }
.findings h3 { margin: 1rem 0 .1rem; }
.findings p { margin: 0 0 .4rem; }
.note { color: var(--soft); font-size: .88rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums lining-nums; min-width: 40%; }
caption { text-align: left; color: var(--soft); padding: 0 0 .5rem; max-width: 88ch; caption-side: top; }
thead { border-top: 2px solid var(--ink); border-bottom: 1px solid var(--rule-strong); }
tbody { border-bottom: 2px solid var(--ink); }
th, td { padding: .36rem .55rem; text-align: right; vertical-align: baseline; white-space: nowrap; font-weight: 400; }
thead th { font-weight: 600; vertical-align: bottom; line-height: 1.3; }
thead .group { text-align: center; color: var(--soft); font-weight: 400; padding-bottom: .1rem; }
thead .group span { display: block; border-bottom: 1px solid var(--rule); padding-bottom: .15rem; }
th[scope=row], .text { text-align: left; white-space: normal; overflow-wrap: break-word; }
th[scope=row] { min-width: 9.5rem; max-width: 22rem; }
.missing { white-space: normal; min-width: 5rem; }
tbody tr + tr { border-top: 1px solid var(--rule); }
tbody tr.same { border-top-color: transparent; }
tbody tr.optimal { background: var(--mark); }
tbody tr.optimal th[scope=row] { font-weight: 600; }
.range { display: block; color: var(--soft); font-size: .78rem; }
.missing { color: var(--soft); }
.below { color: var(--warn); }
sup { line-height: 0; }
sup a { text-decoration: none; padding: 0 .1em; }
.footnotes { color: var(--soft); font-size: .84rem; padding-left: 1.4rem; margin: .3rem 0 1rem; }
.heat td { background: rgba(var(--heat), calc(var(--share) * var(--heat-max))); text-align: center;
  min-width: 2.7rem; padding: .3rem .2rem; font-size: .8rem; }
.heat thead th { white-space: normal; max-width: 5.4rem; padding: .3rem .25rem; font-size: .72rem; hyphens: auto;
  font-weight: 400;
  text-align: center; overflow-wrap: break-word; }
.heat th[scope=row] { font-size: .8rem; min-width: 10rem; }
.flags th, .flags td { text-align: left; padding: .3rem .4rem; }
.flags thead th { white-space: normal; max-width: 6rem; }
figure { margin: 1rem 0; }
figcaption { color: var(--soft); font-size: .88rem; max-width: 78ch; }
.plot { min-height: 12rem; }
.plot noscript, .plot .quiet { display: block; color: var(--soft); padding: 1rem; border: 1px dashed var(--rule); }
.js-plotly-plot text { fill: var(--ink) !important; }
.js-plotly-plot .hovertext text { fill: #fff !important; }
.js-plotly-plot .gridlayer path { stroke: var(--rule) !important; }
.js-plotly-plot .xlines-above, .js-plotly-plot .ticks path, .js-plotly-plot path.crisp:not(.xgrid):not(.ygrid)
  { stroke: var(--rule-strong) !important; }
details { margin: .6rem 0 1rem; }
summary { cursor: pointer; color: var(--accent); font-size: .9rem; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(30rem, 1fr)); gap: 1.2rem 2rem; }
.example { border: 1px solid var(--rule); padding: .9rem 1rem; margin: 0; break-inside: avoid;
  background: var(--panel); }
.example .images { display: grid; grid-template-columns: repeat(3, 1fr); gap: .7rem; margin: .6rem 0 0; }
.example .images > div { font-size: .8rem; line-height: 1.35; color: var(--soft); }
.example .images b { color: var(--ink); font-weight: 600; display: block; }
.example img { width: 100%; aspect-ratio: 1; object-fit: contain; image-rendering: pixelated; background: #000;
  display: block; margin-bottom: .35rem; }
.tag { display: inline-block; font-size: .74rem; color: var(--warn); border: 1px solid var(--warn); padding: 0 .4rem;
  border-radius: 2px; margin-left: .4rem; }
.guarantee { border-top: 1px solid var(--rule); padding: .2rem 0 .3rem; max-width: 80ch; break-inside: avoid; }
.guarantee h3 { margin: .6rem 0 0; }
.guarantee .none { color: var(--warn); }
pre { background: var(--panel); padding: .9rem 1.1rem; overflow-x: auto; font: .84rem/1.5 var(--mono); margin: .6rem 0;
  border: 1px solid var(--rule); }
code { font-family: var(--mono); font-size: .92em; overflow-wrap: anywhere; }
footer { margin-top: 3.5rem; border-top: 1px solid var(--rule); padding-top: .8rem;
  color: var(--soft); font-size: .84rem; }
.skip { position: absolute; left: -100vw; } 
.skip:focus { left: 1rem; top: .5rem; background: var(--paper); padding: .3rem; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
@media (max-width: 40rem) { .gallery, .findings { grid-template-columns: 1fr; } .page { padding: 1.2rem .9rem 3rem; } }
@media print {
  :root { --paper: #fff; --panel: #fff; --ink: #000; --soft: #444; --rule: #ccc; --mark: #eef4f8; --warn: #7a4200;
    --warn-paper: #fff; --accent: #00568a; }
  @page { margin: 16mm 14mm; }
  body { font-size: 10pt; } .page { display: block; max-width: none; padding: 0; } nav, .skip { display: none; }
  h2 { break-after: avoid; } h3 { break-after: avoid; } tr, figure, .example { break-inside: avoid; }
  .scroll { overflow: visible; } table { font-size: 7.6pt; } th, td { padding: .2rem .35rem; }
  thead { display: table-header-group; } pre { white-space: pre-wrap; }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
}
"""
