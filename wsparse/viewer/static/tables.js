// Tables as CSV: a button at each table of the page, and at what is a table only in the file.

/** Gives a file to the person who reads the page. */
function save(name, blob) {
  const url = URL.createObjectURL(blob);
  el('a', { href: url, download: name.replace(/[^\w.-]+/g, '_') }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

const csvField = (value) => {
  const text = value === null || value === undefined ? '' : String(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
};

/** Rows of values as RFC 4180 has them. */
const csv = (rows) => rows.map((row) => `${row.map(csvField).join(',')}\r\n`).join('');

const saveCsv = (name, rows) => save(`${name}.csv`, new Blob([csv(rows)], { type: 'text/csv' }));

/** A button that saves the rows that a function returns. */
const csvButton = (nameOfFile, rows, text = 'CSV') => el('button', {
  type: 'button', class: 'csv', title: 'Save as CSV', click: () => saveCsv(nameOfFile(), rows()),
}, text);

// A number as the page writes it.
const WRITTEN = /^[+−]?\d[\d.,]*(e[+−]\d+)?$/;

/** What a cell says; numbers as programs read them. */
function cellText(cell) {
  if (cell.dataset.value !== undefined) return cell.dataset.value;
  const text = cell.textContent.trim();
  return WRITTEN.test(text) ? text.replaceAll('−', '-').replaceAll(',', '') : text;
}

/** The rows of a table, without columns in which nothing is written. */
function tableRows(table) {
  const rows = [...table.rows].map((row) => [...row.cells].map(cellText));
  const width = d3.max(rows, (row) => row.length) ?? 0;
  const kept = d3.range(width).filter((column) => rows.some((row) => row[column]));
  return rows.map((row) => kept.map((column) => row[column] ?? ''));
}

/** What a file is of: the run, which the names of several say, and the circuits. */
const ownName = () => [RUNS.length > 1 && state.task ? null : nameOfPage, state.task, state.with].filter(Boolean).join('-');

/** The table's place on the page in words: the circuit, what is selected, the section, the caption. */
function tableName(table) {
  const heading = table.closest('section')?.querySelector('h2, h3')?.textContent;
  const caption = [...table.caption.childNodes].filter((child) => child.nodeType === Node.TEXT_NODE).map((child) => child.data);
  return [ownName(), state.group ?? state.node, heading, ...caption].filter(Boolean).join(' ').slice(0, 120);
}

/** Puts a button into the caption of every table of the page that has none; `table.csv` may know more than it shows. */
function watchTables() {
  const add = () => {
    for (const table of document.querySelectorAll('main table')) {
      // A table that is filled anew loses its caption.
      if (table.caption?.querySelector('.csv')) continue;
      const caption = table.caption ?? table.createCaption();
      caption.append(csvButton(() => tableName(table), () => table.csv?.() ?? tableRows(table)));
    }
  };
  const observer = new MutationObserver(add);
  for (const main of document.querySelectorAll('main')) observer.observe(main, { childList: true, subtree: true });
  add();
}

/** All nodes of a circuit, as a table. */
const nodeRows = (circuit) => [
  ['node', 'layer', 'location', 'channel', 'head', 'loss without it in the circuit', 'loss without it in the model', 'mean', 'tau', 'edges in', 'edges out', 'constant'],
  ...circuit.nodes.map((node) => [
    node.name, node.layer, node.location, node.channel, node.head, node.importance, node.from_model, node.mean, node.tau,
    node.in.length, node.out.length, isConstant(node),
  ]),
];

const edgeRows = (edges) => [
  ['source', 'target', 'weight'], ...edges.map(({ source, target, weight }) => [source.name, target.name, weight]),
];

/** A node's values on all prompts of the page. */
const valueRows = (circuit, node) => [
  ['pair', 'prompt', 'position', 'token', 'value in the model', 'value in the circuit'],
  ...circuit.rows.flatMap(({ tokens }, row) => {
    const sides = ['model', 'circuit'].map((side) => [onRow(circuit, node.name, side, row), grainOf(circuit, node.name, side)]);
    return [...tokens].map((id, at) => [
      Math.floor(row / 2) + 1, row % 2 ? 'second' : 'first', at, quoted(id), ...sides.map(([values, grain]) => rounded(values[at], grain)),
    ]);
  }),
];
