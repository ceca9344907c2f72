// Charts with plotly.js. It reads a little markup in names: ours are DNS-like, but nothing depends on it.

import { $, node, metric } from '/assets/dom.js';

export const COLOURS = ['#0f9b8e', '#e07b39', '#5b7fd6', '#c2589c', '#7a9a2e', '#b8902f', '#8867c4', '#d1495b', '#3a9ec2', '#7b8794'];

export const plain = (text) => String(text).replace(/[<>&]/g, '');
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
export const faint = () => css('--line');

function layout(extra) {
  const ink = css('--muted'), line = css('--line');
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, tickfont: { color: ink }, fixedrange: true };
  const base = {
    margin: { l: 52, r: 10, t: 8, b: 26 }, paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)',
    font: { color: ink, size: 12, family: 'system-ui, sans-serif' }, showlegend: false, hovermode: 'closest',
    legend: { orientation: 'h', y: -0.14, font: { color: ink } },
    hoverlabel: { bgcolor: css('--card'), bordercolor: line, font: { color: css('--ink') } },
    xaxis: Object.assign({ type: 'date', nticks: 5, tickformat: '%H:%M:%S' }, axis), yaxis: Object.assign({ rangemode: 'tozero', nticks: 6 }, axis),
  };
  const more = extra || {};
  for (const name of ['xaxis', 'yaxis', 'yaxis2']) if (more[name]) more[name] = Object.assign({}, axis, base[name], more[name]);
  return Object.assign(base, more);
}

export function draw(id, traces, empty, extra) {
  const box = $(id);
  if (typeof Plotly === 'undefined' || !traces.length) {
    if (typeof Plotly !== 'undefined' && box.data) Plotly.purge(box);
    box.classList.add('bare');
    box.textContent = typeof Plotly === 'undefined' ? 'The chart library did not load.' : empty;
    return;
  }
  if (box.classList.contains('bare')) { box.classList.remove('bare'); box.textContent = ''; }
  Plotly.react(box, traces, layout(extra), { displayModeBar: false, responsive: true });
}

const groups = {};

// A colour of its own for each line of a chart, the same as long as it is shown.
export function paint(group, keys) {
  const taken = groups[group] || (groups[group] = new Map());
  for (const key of [...taken.keys()]) if (!keys.includes(key)) taken.delete(key);
  for (const key of keys) {
    if (taken.has(key)) continue;
    const used = new Set(taken.values());
    taken.set(key, COLOURS.find((colour) => !used.has(colour)) || COLOURS[taken.size % COLOURS.length]);
  }
  return new Map(keys.map((key) => [key, taken.get(key)]));
}

export function swatch(colour) {
  const made = node('span', null, 'swatch');
  made.style.background = colour;
  return made;
}

// The lines of /api/rates, in a unit that `scaled` chose.
export function drawLines(id, found, scaled, colours, empty) {
  const x = found.lines.length ? found.lines[0].values.map((_, index) => new Date(found.start + (index + 0.5) * found.step)) : [];
  const traces = found.lines.map((line) => ({
    x, y: line.values.map((value) => (value === null ? null : value / scaled.divide)), name: plain(line.name),
    type: 'scatter', mode: 'lines', connectgaps: false, line: { color: colours.get(line.key), width: 1.7 },
    customdata: line.values.map((value) => (value === null ? '' : scaled.show(value))),
    hovertemplate: plain(line.name) + ': %{customdata} ' + scaled.unit + '<extra></extra>',
  }));
  const end = found.start + found.step * x.length;
  const idle = found.lines.every((line) => line.values.every((value) => !value));
  const yaxis = idle ? { range: [0, 1], tickvals: [0] } : scaled.divide === 1 ? { tickformat: '~s' } : {};
  draw(id, traces, empty, { xaxis: { range: [new Date(found.start), new Date(end)] }, yaxis });
}

export { metric };
