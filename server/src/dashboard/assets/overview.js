// The overview: what is wrong, who is busiest, which migrations run and why they take their time.

import { $, ago, badge, bytes, fill, link, marks, meter, node, number, scale, seconds, short, words } from '/assets/dom.js';
import { drawLines, paint, swatch } from '/assets/charts.js';

export const RATES = { faults: 'Page faults', flushes: 'TLB flushes', flush_requests: 'Flush requests', paged: 'Pager faults', sent: 'Migration traffic' };
const NOTES = {
  faults: 'second-stage page faults, of VMs whose kernel counts them', flushes: 'requests for a flush that reached a vCPU, where the kernel counts those',
  flush_requests: 'requests for a flush of all vCPUs; flushes of a range are not among them on RISC-V', paged: 'faults that pagers resolved, of VMs whose memory is watched', sent: 'bytes on the wire, by source',
};
const WINDOWS = { 60: '1 min', 600: '10 min' };

export const moveLink = (name) => link(short(name), '#/' + name);
export const vmLink = (name) => link(short(name), '#/vms?q=' + encodeURIComponent(short(name)));
export const hostLink = (name) => link(short(name), '#/hosts?q=' + encodeURIComponent(short(name)));

function tile(value, label, tone, href) {
  const box = node(href ? 'a' : 'div', null, 'tile ' + (tone || ''));
  if (href) box.href = href;
  box.append(node('b', value), node('span', label));
  return box;
}

export function drawTiles(state) {
  const t = state.totals, of = (map, key) => map[key] || 0;
  const ready = of(t.hosts, 'READY'), doubt = of(t.migrations, 'IN_DOUBT');
  const cordoned = of(t.hosts, 'cordoned');
  const failed = of(t.migrations, 'FAILED'), ended = t.migrations.ended;
  $('tiles').replaceChildren(
    tile(ready + ' / ' + t.hosts.total, 'hosts ready' + (cordoned ? ', ' + cordoned + ' cordoned' : ''), ready < t.hosts.total ? 'bad' : '', '#/hosts'),
    tile(number(of(t.vms, 'RUNNING')) + ' / ' + number(t.vms.total), 'VMs running' + (of(t.vms, 'stale') ? ', ' + number(of(t.vms, 'stale')) + ' stale' : ''), '', '#/vms'),
    tile(bytes(t.memory_used_bytes), 'of ' + bytes(t.memory_bytes) + ' used by VMs'),
    tile(String(t.migrations.running), doubt ? 'migrations running, ' + doubt + ' in doubt' : 'migrations running', doubt ? 'bad' : '', '#/migrations?state=RUNNING'),
    tile(ended ? of(t.migrations, 'COMPLETED') + ' / ' + ended : '–', 'of the last completed' + (failed ? ', ' + failed + ' failed' : ''), '', '#/migrations'),
    tile(seconds(t.downtime.median), 'median downtime, p95 ' + seconds(t.downtime.p95)),
  );
}

export function drawProblems(state) {
  $('problems').hidden = !state.problems.length;
  $('problem-list').replaceChildren(...state.problems.map((problem) => {
    const item = node('li', null, problem.bad ? 'bad' : 'warn');
    item.append(link(number(problem.count) + ' ' + problem.noun + (problem.count === 1 ? '' : 's'), '#/' + problem.link), ' ' + problem.text + ': ', node('span', problem.names.map(short).join(', ') + (problem.count > problem.names.length ? ', …' : ''), 'muted'));
    return item;
  }));
}

export function ranked(of, found, rate) {
  const values = found.lines.flatMap((line) => [line.mean, line.now]);
  const scaled = scale(found.unit, values.concat(...found.lines.map((line) => line.values)));
  const colours = paint(of, found.lines.map((line) => line.key));
  fill($(of + '-rank'), [[''], [of === 'vms' ? 'VM' : 'host', 'cut']].concat(of === 'vms' ? [['on', 'cut']] : [], [['mean', 'num'], ['now', 'num']]),
    found.lines.map((line) => ({
      cells: [swatch(colours.get(line.key)), of === 'vms' ? vmLink(line.name) : hostLink(line.name)].concat(of === 'vms' ? [hostLink(line.host)] : [], [scaled.show(line.mean), scaled.show(line.now)]),
    })), 'None.');
  // After the table, whose width decides the chart's.
  drawLines(of + '-chart', found, scaled, colours, found.total ? '' : 'None offers this counter yet.');
  const more = found.more ? 'and ' + number(found.more) + ' more, ' + scaled.show(found.more_mean) + ' ' + scaled.unit + ' together' : found.total ? 'all ' + found.total : '';
  $(of + '-more').textContent = scaled.unit + (more ? ' · ' + more : '') + (found.left_out ? ' · ' + number(found.left_out) + ' VMs are beyond what is kept' : '');
  $('chart-note').textContent = NOTES[rate] || '';
}

export function progress(m) {
  if (m.terminal || !m.total_bytes) return '–';
  const box = node('span');
  if (m.iteration === 0) box.append(meter(m.total_bytes - m.remaining_bytes, m.total_bytes), ' ' + Math.floor(((m.total_bytes - m.remaining_bytes) / m.total_bytes) * 100) + ' %');
  else box.append('iteration ' + m.iteration + ', ' + bytes(m.remaining_bytes) + ' left');
  return box;
}

function limit(m) {
  const over = m.expected_downtime !== null && m.max_downtime_seconds !== null && m.expected_downtime > m.max_downtime_seconds;
  return node('span', seconds(m.expected_downtime) + ' / ' + seconds(m.max_downtime_seconds), over ? 'over' : '');
}

export function drawRunning(state) {
  const rates = scale('B/s', state.running.flatMap((m) => [m.throughput, m.dirty_rate]));
  fill($('running-table'), [['migration'], ['VM'], ['from'], ['to'], ['phase'], ['for', 'num'], ['progress'], ['sent ' + rates.unit, 'num'], ['dirtied ' + rates.unit, 'num'], ['downtime: now / allowed', 'num'], ['time left', 'num'], ['what it waits for', 'wide']],
    state.running.slice(0, 8).map((m) => ({
      cells: [moveLink(m.name), vmLink(m.vm), hostLink(m.source), hostLink(m.destination), badge(m.phase), seconds(m.total_seconds), progress(m), rates.show(m.throughput || null), rates.show(m.iteration ? m.dirty_rate : null), limit(m), seconds(m.time_left), m.why],
    })), 'None runs.');
  const more = state.totals.migrations.running - 8;
  $('running-more').textContent = more > 0 ? 'the 8 longest; ' + more + ' more' : 'the longest first';
}

export function endedRow(m) {
  const result = node('span');
  result.append(badge(m.phase), m.reason ? ' ' + m.reason : '');
  const over = m.downtime_seconds !== null && m.max_downtime_seconds !== null && m.downtime_seconds > m.max_downtime_seconds;
  const downtime = node('span', seconds(m.downtime_seconds) + ' / ' + seconds(m.max_downtime_seconds), over ? 'over' : '');
  return [moveLink(m.name), vmLink(m.vm), hostLink(m.source), hostLink(m.destination), result, downtime, seconds(m.total_seconds), m.iterations === null ? '–' : String(m.iterations), bytes(m.bytes_transferred), m.ended ? ago(m.ended) : 'running'];
}

export const ENDED = [['migration'], ['VM'], ['from'], ['to'], ['result'], ['downtime / allowed', 'num'], ['took', 'num'], ['iterations', 'num'], ['sent', 'num'], ['ended']];

export function drawLast(state) {
  fill($('last-table'), ENDED, state.last.map((m) => ({ cells: endedRow(m) })), 'None yet. Start one: slat migrate VM HOST');
}

// Radio buttons of a choice; `pick` is told the word.
export function choices(id, words_, chosen, pick) {
  $(id).replaceChildren(...Object.entries(words_).map(([word, text]) => {
    const label = node('label', null, word === String(chosen) ? 'chosen' : '');
    const input = node('input');
    input.type = 'radio'; input.name = id; input.value = word; input.checked = word === String(chosen);
    input.addEventListener('change', () => pick(word));
    label.append(input, text);
    return label;
  }));
}

export function drawChoices(chart, pick) {
  choices('rate-choice', RATES, chart.rate, (rate) => pick({ rate }));
  choices('window-choice', WINDOWS, chart.window, (window_) => pick({ window: Number(window_) }));
}

export { marks, words };
