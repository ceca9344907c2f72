// The dashboard: one view at a time, by the address after #, each polling what it shows. What a view needs is bounded whatever
// the size of the fleet: the server filters, sorts, ranks and counts.

import { $, tellTime } from '/assets/dom.js';
import { drawChoices, drawLast, drawProblems, drawRunning, drawTiles, ranked } from '/assets/overview.js';
import { drawForm, drawList } from '/assets/lists.js';
import { drawMove } from '/assets/move.js';

const POLL = 1000;
const SLICE = 50;
const chart = { rate: 'faults', window: 600, q: '' };
let heardAt = 0;
let failure = null;
let state = null;
// Answers to an earlier view are dropped.
let turn = 0;
let timer = null;

async function fetchJson(path) {
  const answer = await fetch(path, { cache: 'no-store' });
  if (!answer.ok) throw Object.assign(new Error('the server answered ' + answer.status), { status: answer.status });
  return answer.json();
}

function route() {
  // #migrations/NAME is how earlier pages linked.
  const hash = location.hash.replace(/^#\/?/, '');
  const [path, query] = hash.split('?');
  const move = /^migrations\/([a-z0-9-]{1,63})$/.exec(path);
  if (move) return { view: 'move', name: move[1], nav: '#/migrations' };
  if (['vms', 'hosts', 'migrations'].includes(path)) return { view: 'list', kind: path, query: new URLSearchParams(query || ''), nav: '#/' + path };
  return { view: 'overview', nav: '#/' };
}

const views = {
  async overview() {
    const params = '&rate=' + chart.rate + '&window=' + chart.window + '&q=' + encodeURIComponent(chart.q);
    const [now, vms, hosts] = await Promise.all([fetchJson('/api/state'), fetchJson('/api/rates?of=vms' + params), fetchJson('/api/rates?of=hosts' + params)]);
    return () => {
      see(now);
      drawTiles(now); drawProblems(now); drawRunning(now); drawLast(now);
      ranked('vms', vms, chart.rate); ranked('hosts', hosts, chart.rate);
    };
  },
  async list({ kind, query }) {
    const asked = new URLSearchParams(query);
    asked.set('limit', SLICE);
    const [now, found] = await Promise.all([fetchJson('/api/state'), fetchJson('/api/' + kind + '?' + asked)]);
    return () => { see(now); drawList(kind, found); };
  },
  async move({ name }) {
    const [now, found] = await Promise.all([fetchJson('/api/state'), fetchJson('/api/migrations/' + name)]);
    return () => { see(now); drawMove(found); };
  },
};

function see(now) {
  state = now;
  tellTime(now.now);
  $('version').textContent = now.version;
}

function drawLink() {
  const silent = (Date.now() - heardAt) / 1000;
  const live = heardAt && silent < 4;
  $('link').textContent = !heardAt ? (failure ? 'no answer' : 'connecting') : live ? 'live' : 'last heard ' + Math.round(silent) + ' s ago';
  $('link').className = 'pill ' + (live ? 'live' : heardAt || failure ? 'stale' : '');
  const gone = failure && failure.status === 404 ? 'No such migration.' : null;
  const problem = gone || (failure && !live ? 'The server does not answer (' + failure.message + '). What is shown is old; this page keeps trying.' : state && state.error);
  $('problem').hidden = !problem;
  if (problem) $('problem').textContent = problem;
}

async function poll() {
  clearTimeout(timer);
  turn += 1;
  const mine = turn;
  const where = route();
  if (!document.hidden || !state) {
    try {
      const drawn = await views[where.view](where);
      if (mine !== turn) return;
      heardAt = Date.now();
      failure = null;
      for (const view of Object.keys(views)) $(view).hidden = view !== where.view;
      drawn();
    } catch (error) {
      if (mine !== turn) return;
      failure = error;
      if (error.status) heardAt = Date.now();
    }
    drawLink();
  }
  timer = setTimeout(poll, where.view === 'move' || where.view === 'overview' ? POLL : 2 * POLL);
}

function show() {
  const where = route();
  for (const one of $('nav').children) {
    if (one.getAttribute('href') === where.nav) one.setAttribute('aria-current', 'page');
    else one.removeAttribute('aria-current');
  }
  if (where.view === 'list') drawForm(where.kind, where.query);
  poll();
}

// Changes the query of a list: a link that can be kept.
function ask(changes) {
  const { kind, query } = route();
  for (const [name, value] of Object.entries(changes)) {
    if (value) query.set(name, value); else query.delete(name);
  }
  const text = query.toString();
  history.replaceState(null, '', '#/' + kind + (text ? '?' + text : ''));
  show();
}

for (const [id, name] of [['list-state', 'state'], ['list-mark', 'mark'], ['list-sort', 'sort']]) {
  $(id).addEventListener('change', (event) => ask({ [name]: event.target.value, offset: '' }));
}
$('list-search').addEventListener('input', (event) => ask({ q: event.target.value.trim(), offset: '' }));
$('list-next').addEventListener('click', () => ask({ offset: String(Number(route().query.get('offset') || 0) + SLICE) }));
$('list-back').addEventListener('click', () => ask({ offset: String(Math.max(0, Number(route().query.get('offset') || 0) - SLICE)) }));
$('chart-search').addEventListener('input', (event) => { chart.q = event.target.value.trim(); poll(); });
for (const id of ['chart-form', 'list-form']) $(id).addEventListener('submit', (event) => event.preventDefault());

function pick(change) {
  Object.assign(chart, change);
  drawChoices(chart, pick);
  poll();
}

drawChoices(chart, pick);
window.addEventListener('hashchange', show);
window.matchMedia('(prefers-color-scheme: dark)').addEventListener('change', poll);
setInterval(drawLink, 1000);
show();
