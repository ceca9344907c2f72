// Long lists, a slice at a time: the server filters, sorts and counts.

import { $, ago, badge, bytes, fill, link, marks, meter, node, number, scale, seconds, short, words } from '/assets/dom.js';
import { ENDED, endedRow, hostLink, moveLink, progress, RATES, vmLink } from '/assets/overview.js';

const SORTS = Object.assign({ '': 'by name', memory: 'by memory' }, Object.fromEntries(Object.entries(RATES).map(([rate, text]) => [rate, 'by ' + text.toLowerCase()])));

const KINDS = {
  vms: {
    states: ['RUNNING', 'PAUSED', 'CREATED', 'STOPPED', 'FAILED', 'LOST', 'UNRESPONSIVE', 'INCOMING', 'RELINQUISHED'],
    marks: ['conflict', 'stale', 'lost', 'unresponsive', 'failed', 'frozen', 'errors', 'waits', 'watched'], sorts: SORTS, draw: drawVms,
  },
  hosts: {
    states: ['READY', 'UNREACHABLE'],
    marks: ['unreachable', 'fenced', 'unreported', 'contended', 'trouble', 'cordoned', 'leftovers', 'clock'], sorts: SORTS, draw: drawHosts,
  },
  migrations: {
    states: ['RUNNING', 'PRECOPY_ACTIVE', 'IN_DOUBT', 'COMPLETED', 'FAILED', 'CANCELLED'], marks: [], sorts: {}, draw: drawMoves,
  },
};

function options(id, all, chosen) {
  const select = $(id);
  select.hidden = all.length < 2;
  select.replaceChildren(...all.map(([value, text]) => {
    const option = node('option', text);
    option.value = value;
    option.selected = value === chosen;
    return option;
  }));
}

export function drawForm(kind, query) {
  const { states, marks: all, sorts } = KINDS[kind];
  options('list-state', [['', 'any state']].concat(states.map((state) => [state, words(state)])), query.get('state') || '');
  options('list-mark', [['', 'any mark or none']].concat(all.length ? [['any', 'any mark']] : [], all.map((mark) => [mark, mark])), query.get('mark') || '');
  options('list-sort', Object.entries(sorts), query.get('sort') || '');
  if (document.activeElement !== $('list-search')) $('list-search').value = query.get('q') || '';
  const of = query.get('of');
  $('list-of').textContent = of ? 'of ' + short(of) : '';
}

export function drawList(kind, found) {
  const last = Math.min(found.offset + found.rows.length, found.matched);
  $('list-count').textContent = found.matched ? (found.offset + 1) + '–' + last + ' of ' + number(found.matched) : '';
  $('list-back').disabled = found.offset === 0;
  $('list-next').disabled = last >= found.matched;
  KINDS[kind].draw(found.rows);
}

const column = (rows, rate, unit) => scale(unit, rows.map((row) => row.rates[rate]));

// What a VM's memory is made of: bytes by the size of their pages, largest first.
function backing(made) {
  const sizes = [['1 GiB', made.bytes_1g], ['2 MiB', made.bytes_2m], ['4 KiB', made.bytes_4k]];
  const box = node('span', sizes.filter(([, held]) => held).map(([size, held]) => size + ': ' + bytes(held)).join(', ') || '–', made.shortfall ? 'badge warn' : '');
  box.title = 'asked for: ' + words(made.asked) + (made.shortfall ? '; ' + made.shortfall : '');
  return box;
}

// Of a VM whose memory is watched: what is mapped, and what is wrong with it.
function paging(watched) {
  if (!watched) return '–';
  const good = watched.state === 'SERVING';
  const text = [bytes(watched.mapped_bytes) + ' mapped'];
  if (watched.waiting) text.push(number(watched.waiting) + ' waiting');
  if (watched.source_bytes) text.push(bytes(watched.loaded_bytes) + ' of ' + bytes(watched.source_bytes) + ' loaded');
  if (!good) text.push(words(watched.state) + (watched.reason ? ' (' + words(watched.reason) + ')' : ''));
  const box = node('span', text.join(', '), good ? '' : 'badge bad');
  box.title = 'watched: ' + watched.because.join(', ') + (watched.message ? '; ' + watched.message : '');
  return box;
}

function drawVms(rows) {
  const sent = column(rows, 'sent', 'B/s'), faults = column(rows, 'faults', 'faults/s'), flushes = column(rows, 'flushes', 'flushes/s'), paged = column(rows, 'paged', 'pager faults/s');
  fill($('list-table'), [['VM'], ['marks'], ['state'], ['host'], ['uid'], ['backend'], ['memory', 'num'], ['in pages of'], ['paging'], ['vCPUs', 'num'], ['epoch', 'num'], [faults.unit, 'num'], [paged.unit, 'num'], [flushes.unit, 'num'], ['sent ' + sent.unit, 'num'], ['guest errors', 'num'], ['last seen'], ['note', 'wide']],
    rows.map((vm) => {
      const notes = [];
      if (vm.migration) { notes.push('migrates: ', moveLink(vm.migration), ' '); }
      if (vm.conflicts.length) notes.push('also ' + vm.conflicts.map((other) => 'on ' + short(other.host) + ' as ' + other.uid).join(', ') + ' ');
      if (vm.dirty_logging) notes.push('dirty logging on ');
      if (vm.faults_by_tracepoint) notes.push('faults counted by a tracepoint ');
      if (vm.not_counted.length) notes.push('not counted: ' + vm.not_counted.join(', ') + ' ');
      if (vm.backing.shortfall) notes.push('smaller pages: ' + vm.backing.shortfall + ' ');
      if (vm.state_message) notes.push(vm.state_message);
      const note = node('span');
      note.append(...(notes.length ? notes : ['–']));
      const errors = vm.guest ? node('span', number(vm.guest.errors), vm.guest.errors ? 'badge bad' : '') : '–';
      const format = vm.format === 'UNSPECIFIED' ? '' : ' ' + vm.format.toLowerCase();
      const old = vm.marks.includes('stale');
      return {
        className: old ? 'old' : '',
        cells: [short(vm.name), marks(vm.marks), badge(vm.state), hostLink(vm.host), node('code', vm.uid || '–'), vm.backend.toLowerCase() + format, bytes(vm.memory_bytes), backing(vm.backing), paging(vm.paging), String(vm.vcpus), String(vm.epoch), faults.show(vm.rates.faults), paged.show(vm.rates.paged), flushes.show(vm.rates.flushes), sent.show(vm.rates.sent), errors, old ? ago(vm.last_seen) : 'now', note],
      };
    }), 'None. Create one: slat create vm web --memory 512MiB');
}

function drawHosts(rows) {
  const sent = column(rows, 'sent', 'B/s'), faults = column(rows, 'faults', 'faults/s'), flushes = column(rows, 'flushes', 'flushes/s');
  fill($('list-table'), [['host'], ['marks'], ['state'], ['last heard'], ['address'], ['arch'], ['backends'], ['VMs', 'num'], ['memory used'], [faults.unit, 'num'], [flushes.unit, 'num'], ['sent ' + sent.unit, 'num'], ['version'], ['note', 'wide']],
    rows.map((h) => {
      const used = node('span');
      used.append(meter(h.memory_used_bytes, h.memory_bytes), ' ' + bytes(h.memory_used_bytes) + ' of ' + bytes(h.memory_bytes));
      const notes = [h.state_message, h.leftovers ? h.leftovers + (h.leftovers === 1 ? ' leftover' : ' leftovers') + ': slat get leftovers' : '',
        h.clock_offset_millis && h.marks.includes('clock') ? 'its clock is ' + seconds(Math.abs(h.clock_offset_millis) / 1000) + (h.clock_offset_millis > 0 ? ' ahead' : ' behind') : '', h.backend_message];
      return {
        className: h.state === 'READY' ? '' : 'old',
        cells: [short(h.name), marks(h.marks), badge(h.state), ago(h.last_seen), h.address, h.arch || '–', h.backends.map((b) => b.toLowerCase()).join(', ') || '–', link(number(h.vms), '#/vms?of=' + encodeURIComponent(h.name)), used, faults.show(h.rates.faults), flushes.show(h.rates.flushes), sent.show(h.rates.sent), h.version || '–', notes.filter(Boolean).join('; ') || '–'],
      };
    }), 'None. On a host: slat agent --server ' + location.host);
}

function drawMoves(rows) {
  fill($('list-table'), ENDED.concat([['progress'], ['what it waits for', 'wide']]),
    rows.map((m) => ({ cells: endedRow(m).concat([progress(m), m.why || '–']) })), 'None.');
}

export { vmLink };
