"""The look of a run's page, and its few lines of script: nothing in them comes from a run. Used by extras/run_page.py.

Without the script the page shows the newest pictures and the last values; with it older pictures, and the values under
the pointer. It works from a file, without a network.
"""

STYLE = """
:root { color-scheme: light dark; --back: #f6f7f9; --card: #fff; --text: #1b1f24; --soft: #5c6672; --line: #dde1e6;
  --c0: #1864c7; --c1: #c2410c; --c2: #15803d; --c3: #9333ea; --c4: #0e7490; --bad: #b91c1c; --good: #15803d; }
@media (prefers-color-scheme: dark) { :root { --back: #14171b; --card: #1d2127; --text: #e4e7eb; --soft: #98a2ae;
  --line: #333a43; --c0: #6cb0ff; --c1: #fb9a5b; --c2: #5fd38a; --c3: #c79bff; --c4: #5cc9dd; --bad: #ff8a80;
  --good: #5fd38a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.1rem; margin: 1.8rem 0 .6rem; }
h3 { font-size: .95rem; margin: 0; } h3 small, .soft, figcaption { color: var(--soft); font-weight: normal; }
p { margin: .3rem 0; } a { color: var(--c0); } b { font-variant-numeric: tabular-nums; }
.state { display: inline-block; padding: 0 .6rem; border-radius: 1rem; border: 1px solid; font-size: .9rem;
  vertical-align: middle; color: var(--c0); }
.state.complete { color: var(--good); } .state.failed, .error { color: var(--bad); }
progress { width: 100%; height: .6rem; margin-bottom: .8rem; accent-color: var(--c0); }
.row { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }
.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 25rem), 1fr)); align-items: start; }
.facts { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); }
.facts div, .slides, .chart, .card { margin: 0; padding: .7rem; background: var(--card); border-radius: .5rem;
  border: 1px solid var(--line); min-width: 0; }
.facts b { display: block; font-size: 1.35rem; line-height: 1.3; }
.facts span { color: var(--soft); font-size: .85rem; }
img { max-width: 100%; height: auto; display: block; border-radius: .2rem; } input[type=range] { width: 100%; }
.legend, .chart output, figcaption { font-size: .82rem; margin: 0; } .legend span { margin-right: .6rem; }
svg { display: block; width: 100%; height: auto; touch-action: pan-y; } .chart output { color: var(--soft); }
text { font-size: 11px; fill: var(--soft); } .grid { stroke: var(--line); } .rule { stroke: var(--soft); opacity: 0; }
polyline { fill: none; stroke: currentColor; stroke-width: 1.6; stroke-linejoin: round; } circle { fill: currentColor; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); }
.c4 { color: var(--c4); } span.level { color: var(--soft); } line.level { stroke: var(--soft); stroke-dasharray: 5 4; }
pre { margin: .2rem 0 .8rem; padding: .6rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .4rem; white-space: pre-wrap; font-size: .85rem; }
table { border-collapse: collapse; font-size: .88rem; }
th { text-align: left; font-weight: normal; color: var(--soft); }
th, td { padding: .1rem 1rem .1rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.settings { columns: 17rem; column-gap: 2rem; } .settings table { width: 100%; } .settings tr { break-inside: avoid; }
"""

SCRIPT = """
const kept = what => { try { return what(sessionStorage); } catch { return null; } };
for (const box of document.querySelectorAll('.slides')) {
  const [range, image, words] = ['input', 'img', 'output'].map(name => box.querySelector(name));
  const files = box.dataset.files.split(' '), key = location.pathname + box.id, newest = files.length - 1;
  const show = () => {
    const file = files[range.value];
    image.src = file;
    image.parentNode.href = file;
    words.textContent = 'step ' + Number(file.match(/[0-9]+/)[0]).toLocaleString('en');
    kept(store => range.value == newest ? store.removeItem(key) : store.setItem(key, file));
  };
  const before = files.indexOf(kept(store => store.getItem(key)));
  range.value = before < 0 ? newest : before;
  range.oninput = show;
  if (before >= 0) show();
}
for (const chart of document.querySelectorAll('.chart')) {
  const svg = chart.querySelector('svg'), words = chart.querySelector('output'), last = words.textContent;
  const rule = chart.querySelector('.rule');
  const curves = [...chart.querySelectorAll('polyline')].map(line => ({
    name: line.dataset.name, xs: [...line.points].map(point => point.x),
    values: line.dataset.values.split(' ').map(pair => pair.split(':')) }));
  svg.onpointermove = event => {
    const x = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
    const found = curves.map(({ name, xs, values }) => {
      let best = 0;
      xs.forEach((at, i) => { if (Math.abs(at - x) < Math.abs(xs[best] - x)) best = i; });
      rule.setAttribute('x1', xs[best]);
      rule.setAttribute('x2', xs[best]);
      return ['step ' + Number(values[best][0]).toLocaleString('en'), `${name} ${Number(values[best][1])}`];
    });
    words.textContent = found.map(([step, value], i) => (
      i && step == found[i - 1][0] ? ', ' : (i ? '; ' : '') + step + ': ') + value).join('');
    rule.style.opacity = 0.6;
  };
  svg.onpointerleave = () => { words.textContent = last; rule.style.opacity = 0; };
}
const written = document.querySelector('#written'), age = Date.now() / 1000 - written.dataset.at;
if (document.body.dataset.state == 'running' && age > 90) {
  written.textContent += `, ${Math.round(age / 60)} minutes ago`;
  if (age > written.dataset.late) written.textContent += ': longer than usual. Does the run still live?';
}
"""
