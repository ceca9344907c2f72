// Words, figures, units and tables. Everything that came from outside is written as text, never as markup.

export const $ = (id) => document.getElementById(id);

export function node(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined && text !== null) made.textContent = text;
  if (className) made.className = className;
  return made;
}

export function link(text, href) {
  const made = node('a', text);
  made.href = href;
  return made;
}

export const short = (name) => String(name).replace(/^[a-z]+\//, '');
export const words = (word) => String(word).toLowerCase().replace(/_/g, ' ');
const known = (value) => value !== null && value !== undefined;

const BYTES = ['B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB'];

export function bytes(value) {
  if (!known(value)) return '–';
  let unit = 0;
  while (value >= 1024 && unit < BYTES.length - 1) { value /= 1024; unit += 1; }
  return value.toFixed(unit && value < 100 ? 1 : 0) + ' ' + BYTES[unit];
}

// The unit of a chart or a column, chosen once for all its values: { unit, show }.
export function scale(unit, values) {
  if (unit !== 'B/s') return { unit, divide: 1, show: (value) => (known(value) ? metric(value) : '–') };
  let top = Math.max(0, ...values.filter(known));
  let step = 0;
  while (top >= 1024 && step < BYTES.length - 1) { top /= 1024; step += 1; }
  const divide = 1024 ** step;
  return { unit: BYTES[step] + '/s', divide, show: (value) => (known(value) ? digits(value / divide) : '–') };
}

const digits = (value) => (value === 0 ? '0' : value.toFixed(value < 10 ? 2 : value < 100 ? 1 : 0));

// 12.3k, 4.56M: as the axes of the charts write it.
export function metric(value) {
  let unit = 0;
  while (value >= 999.5 && unit < 4) { value /= 1000; unit += 1; }
  return (unit || value < 10 ? Number(value.toPrecision(3)) : Math.round(value)) + ['', 'k', 'M', 'G', 'T'][unit];
}

export function seconds(value) {
  if (!known(value)) return '–';
  if (value < 1) return (value * 1000).toFixed(value < 0.1 ? 1 : 0) + ' ms';
  if (value < 120) return value.toFixed(1) + ' s';
  if (value < 7200) return Math.trunc(value / 60) + ' min ' + Math.round(value % 60) + ' s';
  return (value / 3600).toFixed(1) + ' h';
}

export const number = (value) => (known(value) ? Math.round(value).toLocaleString('en') : '–');

let skew = 0;
export function tellTime(now) { skew = now - Date.now(); }
export const serverNow = () => Date.now() + skew;

export function ago(millis) {
  if (!millis) return 'never';
  const passed = Math.max(0, (serverNow() - millis) / 1000);
  if (passed < 60) return Math.round(passed) + ' s ago';
  if (passed < 3600) return Math.round(passed / 60) + ' min ago';
  if (passed < 172800) return Math.round(passed / 3600) + ' h ago';
  return Math.round(passed / 86400) + ' d ago';
}

export const clock = (millis) => (millis ? new Date(millis).toLocaleTimeString([], { hour12: false }) : '–');

export const TONES = {
  READY: 'good', RUNNING: 'good', COMPLETED: 'good', MATCH: 'good', UNREACHABLE: 'bad', FAILED: 'bad', LOST: 'bad', UNRESPONSIVE: 'bad',
  IN_DOUBT: 'bad', MISMATCH: 'bad', PAUSED: 'warn', CANCELLED: 'warn', CANCELLING: 'warn', STOPPED: 'warn',
  RELINQUISHED: 'warn', INCOMING: 'run', PRECOPY_ACTIVE: 'run', SWITCHOVER: 'run', PREPARING: 'run', COMMITTED: 'run',
};

export const badge = (word) => node('span', words(word), 'badge ' + (TONES[word] || ''));

const MARKS = {
  conflict: ['bad', 'another VM has this name'], stale: ['warn', 'its host does not answer: shown as last seen'],
  lost: ['bad', 'its process is gone'], unresponsive: ['bad', 'its process lives and does not answer'], failed: ['bad', ''], frozen: ['warn', 'handed over; perhaps the last copy'],
  errors: ['bad', 'its guest read memory it did not write'], unreachable: ['bad', 'does not answer'],
  fenced: ['bad', 'fenced: nothing there runs any more'],
  unreported: ['bad', 'not heard of since the server started'], contended: ['bad', 'two agents under this name'],
  trouble: ['bad', 'can take no VM: see its note'],
  cordoned: ['warn', 'takes no new VM and no migration'], leftovers: ['warn', 'has leftovers'], clock: ['warn', 'its clock is off'],
};

export function marks(list) {
  const box = node('span');
  for (const mark of list) {
    const [tone, title] = MARKS[mark] || ['', ''];
    const made = node('span', mark, 'badge mark ' + tone);
    made.title = title;
    box.append(made, ' ');
  }
  return box;
}

// A table from scratch: [title, class?] columns, rows of text or nodes.
export function fill(table, columns, rows, empty) {
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
    if (row.whole) {
      const cell = node('td', row.whole, 'empty');
      cell.colSpan = columns.length;
      line.append(cell);
    } else {
      row.cells.forEach((cell, index) => {
        const made = node('td', null, columns[index][1] || '');
        if (cell instanceof Node) made.append(cell);
        else made.textContent = known(cell) ? cell : '–';
        if (!(cell instanceof Node) && /cut/.test(columns[index][1] || '')) made.title = made.textContent;
        line.append(made);
      });
    }
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
  if (focused) for (const one of table.querySelectorAll('a')) if (one.getAttribute('href') === focused) one.focus({ preventScroll: true });
}

export function meter(value, max, title) {
  const made = node('meter');
  made.max = max || 1;
  made.value = Math.min(value, max || 1);
  made.title = title || '';
  return made;
}
