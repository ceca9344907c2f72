// The dashboard: polls /api/state and /api/history and draws. Names and messages are written as text, never as markup.
// Counters come raw; a rate is the difference between two samples of one VM process. Another process begins a new line,
// so the restart at 0 after a migration is a gap, not a fall.
'use strict';

const POLL = 1000;
const KEEP = 600000;
const YOUNG = 60000;
const WINDOW = 2000;
const PHASES = ['PENDING', 'PREPARING', 'PRECOPY_ACTIVE', 'SWITCHOVER', 'COMMITTED', 'COMPLETED'];
const COLOURS = ['#0f9b8e', '#e07b39', '#5b7fd6', '#c2589c', '#7a9a2e', '#b8902f', '#8867c4', '#d1495b', '#3a9ec2', '#7b8794'];
// At most this many VMs in one chart; the busiest, the rest is said in words.
const MAX_LINES = 10;

const samples = new Map();
const points = new Map();
const colours = new Map();
let state = null;
let since = 0;
let heardAt = 0;
let skew = 0;
let pinned = null;
let failure = null;

const $ = (id) => document.getElementById(id);

function node(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined && text !== null) made.textContent = text;
  if (className) made.className = className;
  return made;
}

const short = (name) => String(name).replace(/^[a-z]+\//, '');

function bytes(value) {
  if (value === null || value === undefined) return '–';
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) { value /= 1024; unit += 1; }
  return value.toFixed(unit && value < 100 ? 1 : 0) + ' ' + units[unit];
}

function seconds(value) {
  if (value === null || value === undefined) return '–';
  if (value < 1) return (value * 1000).toFixed(value < 0.1 ? 1 : 0) + ' ms';
  if (value < 120) return value.toFixed(1) + ' s';
  return Math.trunc(value / 60) + ' min ' + Math.round(value % 60) + ' s';
}

const number = (value) => (value === null || value === undefined ? '–' : Math.round(value).toLocaleString('en'));
const serverNow = () => Date.now() + skew;

function ago(millis) {
  if (!millis) return 'never since the server started';
  const passed = Math.max(0, (serverNow() - millis) / 1000);
  if (passed < 60) return Math.round(passed) + ' s ago';
  if (passed < 3600) return Math.round(passed / 60) + ' min ago';
  return Math.round(passed / 3600) + ' h ago';
}

function clock(millis) {
  return millis ? new Date(millis).toLocaleTimeString([], { hour12: false }) : '–';
}

const TONES = {
  READY: 'good', RUNNING: 'good', COMPLETED: 'good', MATCH: 'good', UNREACHABLE: 'bad', FAILED: 'bad', LOST: 'bad',
  IN_DOUBT: 'bad', MISMATCH: 'bad', PAUSED: 'warn', CANCELLED: 'warn', CANCELLING: 'warn', STOPPED: 'warn',
  RELINQUISHED: 'warn', INCOMING: 'run', PRECOPY_ACTIVE: 'run', SWITCHOVER: 'run', PREPARING: 'run', COMMITTED: 'run',
};

function badge(word) {
  return node('span', String(word).toLowerCase().replace(/_/g, ' '), 'badge ' + (TONES[word] || ''));
}

// A table from scratch: [title, 'num'?] columns, rows of text or nodes.
function fill(table, columns, rows, empty) {
  const head = node('thead');
  const titles = node('tr');
  for (const [title, kind] of columns) {
    const cell = node('th', title, kind);
    cell.scope = 'col';
    titles.append(cell);
  }
  head.append(titles);
  const body = node('tbody');
  for (const row of rows) {
    const line = node('tr', null, row.className || '');
    row.cells.forEach((cell, index) => {
      const made = node('td', null, columns[index][1] || '');
      made.append(cell instanceof Node ? cell : document.createTextNode(cell === null || cell === undefined ? '–' : cell));
      line.append(made);
    });
    body.append(line);
  }
  if (!rows.length) {
    const cell = node('td', empty, 'empty');
    cell.colSpan = columns.length;
    const line = node('tr');
    line.append(cell);
    body.append(line);
  }
  // The rows are new: who stood on a link with the keyboard stays on it.
  const focused = table.contains(document.activeElement) ? document.activeElement.getAttribute('href') : null;
  table.replaceChildren(head, body);
  if (focused) for (const link of table.querySelectorAll('a')) if (link.getAttribute('href') === focused) link.focus({ preventScroll: true });
}

async function fetchJson(path) {
  const answer = await fetch(path, { cache: 'no-store' });
  if (!answer.ok) throw new Error('the server answered ' + answer.status);
  return answer.json();
}

function keep(history) {
  const oldest = history.now - KEEP;
  for (const [vm, added] of Object.entries(history.vms)) {
    const ring = samples.get(vm) || [];
    ring.push(...added);
    while (ring.length && ring[0][0] < oldest) ring.shift();
    samples.set(vm, ring);
  }
  for (const vm of [...samples.keys()]) if (!samples.get(vm).length || !(vm in history.vms)) samples.delete(vm);
  for (const [name, added] of Object.entries(history.migrations)) {
    const ring = points.get(name) || [];
    ring.push(...added);
    points.set(name, ring);
  }
  for (const name of [...points.keys()]) if (!(name in history.migrations)) points.delete(name);
  // A little overlap costs nothing: entries are distinguished by their time.
  since = history.now - 1;
}

function dedupe(ring) {
  let last = -1;
  return ring.filter((entry) => { const fresh = entry[0] > last; last = Math.max(last, entry[0]); return fresh; });
}

// Rates of one counter (its index in a sample), with a null between processes and where reports are missing.
// A rate is the counter's growth over WINDOW: agents may report the same reading twice, and a shorter step would show that as
// a saw tooth. Counters belong to a process; two processes' entries may interleave while a VM moves.
function rates(ring, index) {
  const x = [], y = [], behind = new Map();
  const gap = Math.max(5000, (state ? state.report_interval_seconds : 1) * 4000);
  let process = null;
  for (const now of ring) {
    const own = behind.get(now[1]) || [];
    while (own.length > 1 && now[0] - own[1][0] >= WINDOW) own.shift();
    const before = own[0];
    own.push(now);
    behind.set(now[1], own);
    if (now[1] !== process) { x.push(new Date(now[0])); y.push(null); process = now[1]; }
    if (!before || before[0] === now[0]) continue;
    const broken = now[0] - own[own.length - 2][0] > gap || before[index] === null || now[index] === null || now[index] < before[index];
    x.push(new Date(now[0]));
    y.push(broken ? null : ((now[index] - before[index]) * 1000) / (now[0] - before[0]));
    if (broken) behind.set(now[1], [now]);
  }
  return { x, y };
}

function colour(vm) {
  if (!colours.has(vm)) colours.set(vm, COLOURS[colours.size % COLOURS.length]);
  return colours.get(vm);
}

function css(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }

function layout(extra) {
  const ink = css('--muted'), line = css('--line');
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, tickfont: { color: ink }, fixedrange: true };
  return Object.assign({
    margin: { l: 58, r: 14, t: 6, b: 32 }, paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)',
    font: { color: ink, size: 12, family: 'system-ui, sans-serif' }, showlegend: true, hovermode: 'x unified',
    legend: { orientation: 'h', y: -0.18, font: { color: ink } },
    hoverlabel: { bgcolor: css('--card'), bordercolor: line, font: { color: css('--ink') } },
    xaxis: Object.assign({}, axis, { type: 'date' }), yaxis: Object.assign({}, axis, { rangemode: 'tozero', tickformat: '~s' }),
  }, extra);
}

function draw(id, traces, empty, extra) {
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

// plotly reads a little markup in names: these are DNS-like, but nothing depends on it.
const plain = (text) => String(text).replace(/[<>&]/g, '');

// The last ten minutes; what there is of them, while a fleet is young, so that its first minutes can be seen.
function range() {
  const end = serverNow();
  const first = Math.min(...[...samples.values()].filter((ring) => ring.length).map((ring) => ring[0][0]), end - YOUNG);
  return [new Date(Math.max(first, end - KEEP)), new Date(end)];
}

function drawRates() {
  const busy = [...samples.entries()]
    .map(([vm, ring]) => [vm, dedupe(ring)])
    .sort((a, b) => b[1].length - a[1].length || (a[0] < b[0] ? -1 : 1))
    .slice(0, MAX_LINES)
    .sort((a, b) => (a[0] < b[0] ? -1 : 1));
  const faults = [], flushes = [];
  for (const [vm, ring] of busy) {
    const trace = (index, name, dash) => {
      const { x, y } = rates(ring, index);
      if (!y.some((value) => value !== null)) return null;
      return { x, y, name: plain(name), type: 'scatter', mode: 'lines', connectgaps: false, line: { color: colour(vm), width: 1.8, dash }, hovertemplate: '%{y:,.0f}/s' };
    };
    const fault = trace(2, short(vm));
    if (fault) faults.push(fault);
    const requests = trace(3, short(vm) + ' requests', 'dot');
    if (requests) flushes.push(requests);
    const reached = trace(4, short(vm) + ' flushes');
    if (reached) flushes.push(reached);
  }
  const migrated = (state ? state.migrations : []).filter((m) => m.ended && m.ended > serverNow() - KEEP && m.phase === 'COMPLETED');
  const shapes = migrated.map((m) => ({ type: 'line', x0: new Date(m.ended), x1: new Date(m.ended), yref: 'paper', y0: 0, y1: 1, line: { color: css('--muted'), width: 1, dash: 'dash' } }));
  const base = layout({});
  const extra = { shapes, xaxis: Object.assign({}, base.xaxis, { range: range() }) };
  const waiting = samples.size ? 'The backends of these VMs offer no such counter.' : 'No VM has reported counters yet.';
  draw('faults', faults, waiting, extra);
  draw('flushes', flushes, waiting, extra);
}

function chosen() {
  if (!state) return null;
  if (pinned) return state.migrations.find((m) => m.name === pinned.name) || pinned;
  return state.migrations.find((m) => !m.terminal) || state.migrations[0] || null;
}

function figure(label, value) {
  const box = node('div');
  box.append(node('span', label), node('b', value));
  return box;
}

function drawMigration() {
  const m = chosen();
  $('running-empty').hidden = Boolean(m);
  $('sawtooth').hidden = !m;
  if (!m) {
    $('running-title').textContent = 'Migration';
    $('running-empty').textContent = 'No migration yet. Start one: slat migrate VM HOST';
    for (const id of ['phases', 'figures', 'iterations', 'decisions']) $(id).replaceChildren();
    $('running-error').hidden = true;
    return;
  }
  $('running-title').textContent = (m.terminal ? 'Migration ' : 'Running migration ') + short(m.name) + ': ' + short(m.vm) + ' from ' + short(m.source) + ' to ' + short(m.destination);
  const reached = new Map(m.phases.map((entry) => [entry.phase, entry.time]));
  const line = PHASES.filter((phase) => phase !== 'COMPLETED' || !m.terminal || m.phase === 'COMPLETED');
  for (const odd of ['IN_DOUBT', 'CANCELLING', 'CANCELLED', 'FAILED']) if (m.phase === odd || reached.has(odd)) line.push(odd);
  $('phases').replaceChildren(...line.map((phase) => {
    const now = m.phase === phase;
    const item = node('li', phase.toLowerCase().replace(/_/g, ' '), now ? 'now' + (TONES[phase] === 'bad' ? ' bad' : '') : reached.has(phase) ? 'past' : '');
    if (reached.has(phase)) item.title = 'since ' + clock(reached.get(phase));
    if (now) item.setAttribute('aria-current', 'step');
    return item;
  }));
  const done = m.terminal;
  $('figures').replaceChildren(
    figure('VM is', m.vm_location.toLowerCase().replace(/_/g, ' ')), figure('iteration', number(m.iteration)),
    done ? figure('total time', seconds(m.total_seconds)) : figure('remaining', bytes(m.remaining_bytes)),
    figure('sent', bytes(m.bytes_transferred)), figure('rate', bytes(m.throughput) + '/s'), figure('dirtied', bytes(m.dirty_rate) + '/s'),
    done ? figure('downtime', seconds(m.downtime_seconds)) : figure('expected downtime', seconds(m.expected_downtime)),
    figure('allowed downtime', seconds(m.max_downtime_seconds)), figure('zero pages', number(m.pages_zero)), figure('memory check', m.verification.toLowerCase()),
  );
  $('running-error').hidden = !m.error;
  if (m.error) $('running-error').textContent = m.error.reason + ' (' + (m.error.side || 'server') + '): ' + m.error.message + (m.error.advice ? ' — ' + m.error.advice : '');

  const ring = dedupe(points.get(m.name) || m.points || []);
  let traces = [];
  let shapes = [];
  if (ring.length > 1) {
    const x = ring.map((p) => new Date(p[0]));
    traces = [
      { x, y: ring.map((p) => p[2]), name: 'remaining', type: 'scatter', mode: 'lines', fill: 'tozeroy', line: { color: COLOURS[0], width: 2 }, customdata: ring.map((p) => [p[1], plain(bytes(p[2]))]), hovertemplate: 'iteration %{customdata[0]}: %{customdata[1]}' },
      { x, y: ring.map((p) => p[4]), name: 'sent per second', yaxis: 'y2', type: 'scatter', mode: 'lines', line: { color: COLOURS[2], width: 1.5 }, hovertemplate: '%{y:.3s}B/s' },
      { x, y: ring.map((p) => p[5]), name: 'dirtied per second', yaxis: 'y2', type: 'scatter', mode: 'lines', line: { color: COLOURS[1], width: 1.5, dash: 'dot' }, hovertemplate: '%{y:.3s}B/s' },
    ];
    for (let i = 1; i < ring.length; i += 1) {
      if (ring[i][1] !== ring[i - 1][1]) shapes.push({ type: 'line', x0: x[i], x1: x[i], yref: 'paper', y0: 0, y1: 1, line: { color: css('--line'), width: 1 } });
    }
  } else if (m.iterations.length) {
    // Too short for samples, or from before this server's life: the iterations themselves make the teeth.
    const x = [], y = [];
    for (const it of m.iterations) { x.push(it.iteration, it.iteration + 0.98); y.push(it.remaining_start, it.final ? 0 : Math.max(0, it.remaining_start - it.bytes)); }
    traces = [{ x, y, name: 'remaining by iteration', type: 'scatter', mode: 'lines', fill: 'tozeroy', line: { color: COLOURS[0], width: 2 }, hovertemplate: '%{y:.3s}B' }];
  }
  const base = layout({});
  const byTime = ring.length > 1;
  draw('sawtooth', traces, m.terminal ? 'It ended before any page was sent.' : 'Waiting for the first pages.', {
    shapes, margin: { l: 58, r: 62, t: 6, b: 32 },
    xaxis: Object.assign({}, base.xaxis, byTime ? {} : { type: 'linear', title: { text: 'iteration' } }),
    yaxis: Object.assign({}, base.yaxis, { ticksuffix: 'B' }),
    yaxis2: Object.assign({}, base.yaxis, { overlaying: 'y', side: 'right', showgrid: false, ticksuffix: 'B/s' }),
  });

  fill($('iterations'), [['#'], ['left at start', 'num'], ['sent', 'num'], ['pages', 'num'], ['zero', 'num'], ['took', 'num'], ['dirty after', 'num'], ['expected downtime', 'num']],
    m.iterations.map((it) => ({ cells: [it.final ? it.iteration + ' (paused)' : String(it.iteration), bytes(it.remaining_start), bytes(it.bytes), number(it.pages_normal), number(it.pages_zero), seconds(it.seconds), number(it.dirty_pages), seconds(it.expected_downtime)] })),
    'None finished yet.');
  const decisions = m.decisions.map((d) => {
    const item = node('li');
    item.append(node('b', d.action.toLowerCase().replace(/_/g, ' ')), document.createTextNode(' after iteration ' + d.iteration + ', ' + clock(d.time) + ': ' + d.cause));
    return item;
  });
  $('decisions').replaceChildren(...(decisions.length ? decisions : [node('li', 'None yet.', 'empty')]));
}

function drawTables() {
  const shown = chosen();
  fill($('migration-table'),
    [['migration'], ['VM'], ['from'], ['to'], ['result'], ['downtime', 'num'], ['total', 'num'], ['iterations', 'num'], ['sent', 'num'], ['last decision', 'wide'], ['ended']],
    state.migrations.map((m) => {
      const link = node('a', short(m.name));
      link.href = '#' + m.name;
      const last = m.decisions[m.decisions.length - 1];
      const result = node('span');
      result.append(badge(m.phase));
      if (m.error) result.append(document.createTextNode(' ' + m.error.reason));
      return {
        className: shown && shown.name === m.name ? 'chosen' : '',
        cells: [link, short(m.vm), short(m.source), short(m.destination), result, seconds(m.downtime_seconds), seconds(m.total_seconds), String(m.iterations.length), bytes(m.bytes_transferred), last ? last.action.toLowerCase().replace(/_/g, ' ') + ': ' + last.cause : '–', m.ended ? ago(m.ended) : 'running'],
      };
    }), 'None yet.');

  const silent = new Map(state.hosts.filter((h) => h.state !== 'READY').map((h) => [h.name, h]));
  fill($('vm-table'),
    [['VM'], ['state'], ['host'], ['backend'], ['memory', 'num'], ['vCPUs', 'num'], ['epoch', 'num'], ['guest passes', 'num'], ['pages written', 'num'], ['guest errors', 'num'], ['now', 'wide']],
    state.vms.map((vm) => {
      const old = silent.get(vm.host);
      const notes = [];
      if (vm.migration) notes.push('migrates (' + short(vm.migration) + ')');
      if (vm.dirty_logging) notes.push('dirty logging on');
      if (vm.state_message) notes.push(vm.state_message);
      if (old) notes.push('old: host last heard ' + ago(old.last_seen));
      const errors = vm.guest ? node('span', number(vm.guest.errors), vm.guest.errors ? 'badge bad' : '') : '–';
      const format = vm.format === 'UNSPECIFIED' ? '' : ' ' + vm.format.toLowerCase();
      return { className: old ? 'old' : '', cells: [short(vm.name), badge(vm.state), short(vm.host), vm.backend.toLowerCase() + format, bytes(vm.memory_bytes), String(vm.vcpus), String(vm.epoch), vm.guest ? number(vm.guest.passes) : '–', vm.guest ? number(vm.guest.pages_written) : '–', errors, notes.join('; ') || '–'] };
    }), 'None yet. Create one: slat create vm web --memory 512MiB');

  fill($('host-table'), [['host'], ['state'], ['last heard'], ['address'], ['arch'], ['backends'], ['VMs', 'num'], ['memory used'], ['version'], ['note', 'wide']],
    state.hosts.map((h) => {
      const used = node('span');
      if (h.memory_bytes) {
        const meter = node('meter');
        meter.max = h.memory_bytes; meter.value = Math.min(h.memory_used_bytes, h.memory_bytes);
        used.append(meter);
      }
      used.append(document.createTextNode(' ' + bytes(h.memory_used_bytes) + ' of ' + bytes(h.memory_bytes)));
      return { className: h.state === 'READY' ? '' : 'old', cells: [short(h.name), badge(h.state), ago(h.last_seen), h.address, h.arch || '–', h.backends.map((b) => b.toLowerCase()).join(', ') || '–', String(h.vms), used, h.version || '–', h.backend_message || '–'] };
    }), 'None yet. On a host: slat agent --server ' + location.host);
}

function tile(value, label, bad) {
  const box = node('div', null, 'tile' + (bad ? ' bad' : ''));
  box.append(node('b', value), node('span', label));
  return box;
}

function drawTiles() {
  const ready = state.hosts.filter((h) => h.state === 'READY').length;
  const running = state.vms.filter((vm) => vm.state === 'RUNNING').length;
  const active = state.migrations.filter((m) => !m.terminal);
  const doubt = active.filter((m) => m.phase === 'IN_DOUBT').length;
  const completed = state.migrations.filter((m) => m.phase === 'COMPLETED');
  const downtimes = completed.map((m) => m.downtime_seconds).filter((d) => d !== null).sort((a, b) => a - b);
  const errors = state.vms.reduce((sum, vm) => sum + (vm.guest ? vm.guest.errors : 0), 0);
  const ended = state.migrations.filter((m) => m.terminal).length;
  $('tiles').replaceChildren(
    tile(ready + ' / ' + state.hosts.length, 'hosts ready', ready < state.hosts.length),
    tile(running + ' / ' + state.vms.length, 'VMs running'),
    tile(String(active.length), doubt ? 'migrations running, ' + doubt + ' in doubt' : 'migrations running', doubt > 0),
    tile(ended ? completed.length + ' / ' + ended : '–', 'of the last migrations completed'),
    tile(downtimes.length ? seconds(downtimes[Math.trunc(downtimes.length / 2)]) : '–', 'median downtime of them'),
    tile(number(errors), 'memory errors seen by guests', errors > 0),
  );
}

function drawLink() {
  const silent = (Date.now() - heardAt) / 1000;
  const link = $('link');
  const live = heardAt && silent < 4;
  link.textContent = !heardAt ? (failure ? 'no answer' : 'connecting') : live ? 'live' : 'last heard ' + Math.round(silent) + ' s ago';
  link.className = 'pill ' + (live ? 'live' : heardAt || failure ? 'stale' : '');
  const problem = failure && !live ? 'The server does not answer (' + failure + '). What is shown is old; this page keeps trying.' : state && state.error;
  $('problem').hidden = !problem;
  if (problem) $('problem').textContent = problem;
}

function render() {
  drawLink();
  if (!state) return;
  $('version').textContent = state.version;
  drawTiles();
  drawTables();
  drawMigration();
  drawRates();
}

// #migrations/name pins a migration, from wherever the link came.
async function follow() {
  const wanted = /^#migrations\/([a-z0-9-]{1,63})$/.exec(location.hash);
  if (!wanted) { pinned = null; render(); return; }
  try {
    pinned = await fetchJson('/api/migrations/' + wanted[1]);
  } catch (error) {
    pinned = null;
    $('problem').hidden = false;
    $('problem').textContent = 'No migration ' + wanted[1] + ' (' + error.message + ').';
  }
  render();
  if (pinned) $('running').scrollIntoView();
}

async function poll() {
  if (!document.hidden || !state) {
    try {
      const [now, history] = await Promise.all([fetchJson('/api/state'), fetchJson('/api/history?since=' + since)]);
      state = now;
      skew = now.now - Date.now();
      heardAt = Date.now();
      failure = null;
      keep(history);
    } catch (error) {
      failure = error.message;
    }
    render();
  }
  setTimeout(poll, POLL);
}

window.addEventListener('hashchange', follow);
window.matchMedia('(prefers-color-scheme: dark)').addEventListener('change', render);
setInterval(drawLink, 1000);
poll().then(() => { if (location.hash.startsWith('#migrations/')) follow(); });
