// One migration: where it is, why it takes its time, what its downtime was made of.

import { $, badge, bytes, clock, fill, node, number, scale, seconds, serverNow, short, TONES, words } from '/assets/dom.js';
import { COLOURS, draw, faint, swatch } from '/assets/charts.js';
import { hostLink, vmLink } from '/assets/overview.js';

const PHASES = ['PENDING', 'PREPARING', 'PRECOPY_ACTIVE', 'SWITCHOVER', 'COMMITTED', 'COMPLETED'];

function figure(label, value, tone) {
  const box = node('div');
  box.append(node('span', label), node('b', value, tone));
  return box;
}

function drawPhases(m) {
  const began = new Map(m.phases.map((entry) => [entry.phase, entry.time]));
  const order = m.phases.map((entry) => entry.phase);
  const line = PHASES.filter((phase) => began.has(phase) || !m.terminal);
  for (const odd of ['IN_DOUBT', 'CANCELLING', 'CANCELLED', 'FAILED']) if (m.phase === odd || began.has(odd)) line.push(odd);
  $('move-phases').replaceChildren(...line.map((phase) => {
    const now = m.phase === phase, at = order.indexOf(phase);
    const item = node('li', words(phase), now ? 'now' + (TONES[phase] === 'bad' ? ' bad' : '') : began.has(phase) ? 'past' : '');
    const next = at >= 0 ? m.phases[at + 1] : null;
    const end = next ? next.time : now && !m.terminal ? serverNow() : null;
    if (began.has(phase)) {
      item.title = 'since ' + clock(began.get(phase));
      item.append(node('small', end && end >= began.get(phase) ? seconds((end - began.get(phase)) / 1000) : clock(began.get(phase))));
    }
    if (now) item.setAttribute('aria-current', 'step');
    return item;
  }));
}

function drawFigures(m) {
  const over = (value) => (value !== null && m.max_downtime_seconds !== null && value > m.max_downtime_seconds ? 'over' : '');
  $('move-figures').replaceChildren(
    figure('VM is', words(m.vm_location)), figure('took', seconds(m.total_seconds)),
    m.terminal ? figure('downtime', seconds(m.downtime_seconds), over(m.downtime_seconds)) : figure('downtime if stopped now', seconds(m.expected_downtime), over(m.expected_downtime)),
    figure('downtime allowed', seconds(m.max_downtime_seconds)),
    m.terminal ? figure('iterations', m.iterations === null ? '–' : String(m.iterations)) : figure('iteration', number(m.iteration)),
    ...(m.terminal ? [] : [figure('remaining', bytes(m.remaining_bytes)), figure('time left', seconds(m.time_left))]),
    figure('guest memory', bytes(m.total_bytes)), figure('sent', bytes(m.bytes_transferred)),
    figure('rate', m.throughput ? bytes(m.throughput) + '/s' : '–'), figure('dirtied', m.iteration || m.terminal ? bytes(m.dirty_rate) + '/s' : '–'),
    figure('streams', m.streams ? String(m.streams) : '–'), figure('bandwidth cap', m.max_bandwidth ? bytes(m.max_bandwidth) + '/s' : 'none'),
    figure('memory check', m.verification === 'UNSPECIFIED' ? 'none' : words(m.verification)),
  );
}

function drawDowntime(m) {
  const whole = m.downtime.reduce((sum, part) => sum + part.seconds, 0);
  const bar = $('move-downtime-bar');
  bar.hidden = !m.downtime.length;
  bar.replaceChildren(...m.downtime.map((part, index) => {
    const made = node('span', part.seconds / whole > 0.14 ? part.part + ' ' + seconds(part.seconds) : '');
    made.style.flexGrow = String(part.seconds / whole);
    made.style.background = COLOURS[index];
    made.title = part.part + ': ' + seconds(part.seconds);
    return made;
  }));
  const note = m.downtime_seconds === null ? (m.phase === 'COMPLETED' ? 'not known: the source has not told it' : m.terminal ? 'no downtime was told' : 'not yet') : seconds(m.downtime_seconds) + ' of ' + seconds(m.max_downtime_seconds) + ' allowed';
  const guess = m.predicted_seconds === null ? '' : ', predicted ' + seconds(m.predicted_seconds) + (m.not_predicted && m.not_predicted.length ? ' without ' + m.not_predicted.map(words).join(', ') : '');
  $('move-downtime-note').textContent = note + guess;
  $('move-downtime').hidden = !m.downtime.length;
  fill($('move-downtime'), [[''], ['part'], ['took', 'num'], ['predicted', 'num'], ['share', 'num'], ['what', 'wide']],
    m.downtime.map((part, index) => ({ cells: [swatch(COLOURS[index]), part.part, seconds(part.seconds), seconds(part.predicted), Math.round((part.seconds / whole) * 100) + ' %', part.what] })), '');
}

function drawChart(m) {
  const ring = m.points;
  const iterations = m.iterations_shown.filter((it) => it.iteration !== undefined);
  const note = $('move-chart-note');
  if (ring.length > 1) {
    const rates = scale('B/s', ring.flatMap((p) => [p[4], p[5]]));
    const size = scale('B/s', ring.map((p) => p[2]));
    const x = ring.map((p) => new Date(p[0]));
    const of = (index, scaled) => ring.map((p) => p[index] / scaled.divide);
    const text = (index) => ring.map((p) => 'iteration ' + p[1] + ': ' + bytes(p[index]));
    const rate = (index, name, extra) => ({ x, y: of(index, rates), name, yaxis: 'y2', type: 'scatter', mode: 'lines', line: Object.assign({ width: 1.5 }, extra), text: ring.map((p) => bytes(p[index]) + '/s'), hovertemplate: name + ': %{text}<extra></extra>' });
    const shapes = [];
    for (let i = 1; i < ring.length && shapes.length < 60; i += 1) if (ring[i][1] !== ring[i - 1][1]) shapes.push({ type: 'line', x0: x[i], x1: x[i], yref: 'paper', y0: 0, y1: 1, line: { color: faint(), width: 1 } });
    draw('move-chart', [
      { x, y: of(2, size), name: 'remaining', type: 'scatter', mode: 'lines', fill: 'tozeroy', line: { color: COLOURS[0], width: 2 }, text: text(2), hovertemplate: '%{text}<extra></extra>' },
      rate(4, 'sent', { color: COLOURS[2] }), rate(5, 'dirtied', { color: COLOURS[1], dash: 'dot' }),
    ], '', { shapes, showlegend: true, legend: { orientation: 'h', x: 0, y: 1.13 }, margin: { l: 52, r: 56, t: 30, b: 26 }, yaxis2: { overlaying: 'y', side: 'right', showgrid: false, rangemode: 'tozero' } });
    note.textContent = 'remaining in ' + size.unit.replace('/s', '') + ' (left), rates in ' + rates.unit + ' (right)';
  } else if (iterations.length) {
    // Too short for samples, or from before this server's life: the iterations themselves make the teeth.
    const size = scale('B/s', iterations.map((it) => it.remaining_start));
    const x = [], y = [];
    for (const it of iterations) { x.push(it.iteration, it.iteration + 0.98); y.push(it.remaining_start / size.divide, (it.final ? 0 : Math.max(0, it.remaining_start - it.bytes)) / size.divide); }
    draw('move-chart', [{ x, y, name: 'remaining', type: 'scatter', mode: 'lines', fill: 'tozeroy', line: { color: COLOURS[0], width: 2 }, hovertemplate: '%{y:.3g} ' + size.unit.replace('/s', '') + '<extra></extra>' }], '', { xaxis: { type: 'linear', tickformat: 'd', title: { text: 'iteration' }, dtick: 1 }, margin: { l: 52, r: 10, t: 8, b: 40 } });
    note.textContent = 'remaining in ' + size.unit.replace('/s', '') + ' by iteration';
  } else {
    draw('move-chart', [], m.terminal ? 'It ended before any page was sent.' : 'Waiting for the first pages.');
    note.textContent = '';
  }
}

export function drawMove(m) {
  const title = $('move-title');
  title.replaceChildren(node('span', short(m.name)), ' ', badge(m.phase), ' ');
  const route = node('small');
  route.append('VM ', vmLink(m.vm), ' from ', hostLink(m.source), ' to ', hostLink(m.destination), m.vm_uid ? ' · uid ' + m.vm_uid : '', ' · epoch ' + m.epoch, ' · began ' + clock(m.created));
  title.append(route);
  drawPhases(m);
  $('move-why').hidden = !m.why;
  $('move-why').textContent = m.why || '';
  $('move-error').hidden = !m.error;
  if (m.error) $('move-error').textContent = m.error.reason + ' (' + (m.error.side || 'server') + '): ' + m.error.message + (m.error.advice ? ' — ' + m.error.advice : '');
  drawFigures(m);
  drawDowntime(m);
  drawChart(m);
  fill($('move-iterations'), [['iteration'], ['left at start', 'num'], ['sent', 'num'], ['pages', 'num'], ['zero', 'num'], ['took', 'num'], ['dirty pages after', 'num'], ['downtime if stopped then', 'num']],
    m.iterations_shown.toReversed().map((it) => (it.left_out ? { whole: '… ' + number(it.left_out) + ' more between' } : { cells: [it.final ? it.iteration + ' (VM paused)' : String(it.iteration), bytes(it.remaining_start), bytes(it.bytes), number(it.pages_normal), number(it.pages_zero), seconds(it.seconds), number(it.dirty_pages), seconds(it.expected_downtime)] })),
    'None finished yet.');
  const decisions = m.decisions.map((d) => {
    if (d.left_out) return node('li', '… ' + number(d.left_out) + ' more between', 'empty');
    const item = node('li');
    item.append(node('b', words(d.action)), ' after iteration ' + d.iteration + ', ' + clock(d.time) + ': ' + d.cause);
    return item;
  });
  $('move-decisions').replaceChildren(...(decisions.length ? decisions.toReversed() : [node('li', 'None yet.', 'empty')]));
}
