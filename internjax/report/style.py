"""The page's style sheet: one column on a phone, two on a desk; light and dark."""

STYLE = """
:root { --bg:#f7f7f4; --card:#fff; --ink:#1d2125; --soft:#626a73; --line:#e3e3dd; --track:#efefea;
  --good:#1a7f4e; --goodbg:#e2f4ea; --bad:#b3261e; --badbg:#fbe6e4; --code:#f4f4f0;
  --s0:#2f6fd0; --s1:#d9772b; --s2:#1f9277; --s3:#8559c9; --s4:#c63d5c; --s5:#6f7a1f; }
@media (prefers-color-scheme: dark) { :root { --bg:#14171a; --card:#1c2024; --ink:#e6e8ea;
  --soft:#9aa4ae; --line:#30363c; --track:#272c31; --good:#5fd394; --goodbg:#173325;
  --bad:#ff8d85; --badbg:#3b1c1b; --code:#15181b;
  --s0:#6ea5f5; --s1:#f0a35e; --s2:#4cc7a6; --s3:#b494ee; --s4:#f27d95; --s5:#b6c25a; } }
* { box-sizing:border-box; }
html { scroll-behavior:smooth; }
body { margin:0 auto; padding:28px clamp(14px,4vw,40px) 64px; max-width:1180px;
  background:var(--bg); color:var(--ink); line-height:1.5; font-size:15px;
  font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","PingFang SC",
  "Noto Sans CJK SC","Microsoft YaHei",sans-serif; -webkit-text-size-adjust:100%; }
h1 { font-size:clamp(22px,4.5vw,30px); line-height:1.25; margin:0 0 8px; letter-spacing:-.01em;
  overflow-wrap:anywhere; }
h2 { font-size:19px; margin:0; display:flex; flex-wrap:wrap; align-items:center; gap:10px; }
h3 { font-size:13px; font-weight:600; margin:0 0 10px; }
small { color:var(--soft); font-size:13px; font-weight:400; font-variant-numeric:tabular-nums; }
h2 small, .who small { margin-left:auto; }
p { margin:0 0 .8em; max-width:75ch; overflow-wrap:anywhere; }
.lead { color:var(--soft); margin:6px 0 0; }
.facts { display:flex; flex-wrap:wrap; gap:4px 20px; color:var(--soft); font-size:14px; }
.facts b { font-weight:500; } .facts span { overflow-wrap:anywhere; }
nav { display:flex; flex-wrap:wrap; gap:6px; margin:18px 0 20px; }
nav a { color:var(--ink); text-decoration:none; font-size:13px; padding:4px 11px;
  border:1px solid var(--line); border-radius:99px; background:var(--card); }
nav a:hover, nav a:focus-visible { border-color:var(--s0); }
.dot { font-style:normal; margin-right:5px; } .dot.passed { color:var(--good); }
.dot.failed { color:var(--bad); }
.badge { font-size:12px; font-weight:600; letter-spacing:.01em; padding:2px 9px;
  border-radius:99px; white-space:nowrap; vertical-align:middle; }
.badge.passed { color:var(--good); background:var(--goodbg); }
.badge.failed { color:var(--bad); background:var(--badbg); }
section { background:var(--card); border:1px solid var(--line); border-radius:12px;
  padding:20px clamp(14px,3vw,26px) 22px; margin:0 0 16px; scroll-margin-top:12px; }
.blocks { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));
  gap:26px clamp(20px,4vw,44px); margin-top:16px; align-items:start; }
figure { margin:0; min-width:0; } figure.wide { grid-column:1/-1; }
.note { color:var(--soft); font-size:13px; margin:8px 0 0; }
.chart { width:100%; height:auto; display:block; overflow:visible; max-width:560px; }
.chart text { fill:var(--soft); font-size:12px; font-variant-numeric:tabular-nums; }
.chart .axisname { font-size:12px; } .chart .marktext { fill:var(--ink);
  paint-order:stroke; stroke:var(--card); stroke-width:4px; stroke-linejoin:round; }
.grid { stroke:var(--line); } .axis { stroke:var(--soft); stroke-opacity:.6; }
.line { fill:none; stroke-width:2; stroke-linejoin:round; stroke-linecap:round; }
.hover circle { fill:transparent; } .hover circle:hover { fill:var(--ink); fill-opacity:.25; }
.column { fill:var(--s0); fill-opacity:.85; } .column:hover { fill-opacity:1; }
.mark { stroke:var(--s1); stroke-width:1.5; stroke-dasharray:4 3; }
.legend { display:flex; flex-wrap:wrap; gap:2px 16px; font-size:13px; color:var(--soft);
  margin:0 0 8px; } .legend span { display:inline-flex; align-items:center; gap:6px; }
.swatch { width:11px; height:11px; border-radius:3px; } .sample { width:22px; height:8px; }
.tickswatch { width:2px; background:var(--ink); border-radius:0; }
.group { margin:0 0 11px; } .label { font-size:13px; margin-bottom:3px; overflow-wrap:anywhere;
  display:flex; justify-content:space-between; gap:12px; }
.lost { color:var(--soft); white-space:nowrap; font-variant-numeric:tabular-nums; }
.row { display:grid; grid-template-columns:1fr minmax(7.5em,auto); gap:10px; align-items:center;
  margin-bottom:3px; }
.track { position:relative; height:14px; background:var(--track); border-radius:3px; }
.track i { position:absolute; display:block; }
.bar { top:0; bottom:0; border-radius:3px; }
.whisker { top:50%; height:0; border-top:1.5px solid var(--ink); }
.whisker::before, .whisker::after { content:""; position:absolute; top:-4.5px; height:7px;
  border-left:1.5px solid var(--ink); } .whisker::before { left:0; } .whisker::after { right:0; }
.tick { top:-3px; bottom:-3px; width:2px; margin-left:-1px; background:var(--ink);
  box-shadow:0 0 0 1px var(--card); }
.value { font-size:13px; font-variant-numeric:tabular-nums; white-space:nowrap; }
.scroll { overflow-x:auto; } table { border-collapse:collapse; min-width:min(100%,420px);
  font-size:14px; font-variant-numeric:tabular-nums; }
th { text-align:left; font-weight:600; font-size:13px; color:var(--soft); }
th, td { padding:6px 28px 6px 0; border-bottom:1px solid var(--line); vertical-align:top; }
th:last-child, td:last-child { padding-right:0; } tr:last-child td { border-bottom:0; }
.n { text-align:right; white-space:nowrap; }
td { overflow-wrap:break-word; min-width:3.5em; }
dl { margin:0; font-size:14px; } dl div { display:grid; gap:2px 16px; padding:5px 0;
  grid-template-columns:minmax(6.5em,34%) 1fr; border-bottom:1px solid var(--line); }
dl div:last-child { border-bottom:0; } dt { color:var(--soft); }
dd { margin:0; overflow-wrap:anywhere; font-variant-numeric:tabular-nums; }
ol { list-style:none; margin:0; padding:0; max-width:860px; }
li { border-left:3px solid var(--line); padding:1px 0 1px 14px; margin:0 0 12px; }
.who { display:flex; align-items:baseline; gap:10px; font-size:13px; }
.who b { font-weight:600; color:var(--soft); } code { font-size:13px; }
pre { margin:3px 0 0; white-space:pre-wrap; overflow-wrap:anywhere; font:inherit; }
li.call, li.thought { border-color:var(--s3); }
li.call .who b, li.thought .who b { color:var(--s3); }
li.result { border-color:var(--s2); } li.result .who b { color:var(--s2); }
li.answer { border-color:var(--s0); } li.answer .who b { color:var(--s0); }
li.error { border-color:var(--bad); } li.error .who b { color:var(--bad); }
li.thought pre { font-style:italic; }
li.call pre, li.result pre, li.error pre { font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,
  "Noto Sans Mono CJK SC",monospace; background:var(--code); border:1px solid var(--line);
  border-radius:6px; padding:7px 10px; }
summary { cursor:pointer; white-space:pre-wrap; overflow-wrap:anywhere; }
@media (max-width:520px) { body { font-size:15px; padding-top:18px; }
  .row { grid-template-columns:1fr minmax(6.2em,auto); gap:8px; } .chart text { font-size:16px; }
  .chart .axisname { font-size:16px; }
  th, td { padding-right:16px; } }
@media print {
  body { background:#fff; max-width:none; } section { break-inside:avoid; }
  nav { display:none; } }
"""
