// The data of the page, and how its parts are read. Text from the data enters the document only as text nodes.

const data = JSON.parse(document.getElementById('data').textContent);
const SVG = 'http://www.w3.org/2000/svg';

const NUMBERS = {
  uint8: Uint8Array, int16: Int16Array, uint16: Uint16Array, uint32: Uint32Array,
};

/** An element with attributes, listeners (functions) and children: elements or text. */
function el(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === 'function') element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, '');
    else if (value !== false && value !== null && value !== undefined) {
      element.setAttribute(name, value);
    }
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

const byId = (id) => document.getElementById(id);

/** Integers that Python wrote in base64. */
function integers(dtype, base64) {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  return new NUMBERS[dtype](bytes.buffer);
}

const unpacked = new WeakMap();

/** The floats of a packed array. */
function unpack(packed) {
  if (!unpacked.has(packed)) {
    unpacked.set(packed, Float32Array.from(integers(packed.dtype, packed.data), (q) => q * packed.scale));
  }
  return unpacked.get(packed);
}

/** Token ids of a stretch of a window of text. */
function stretch(text, window, start, stop) {
  text.tokens ??= integers(text.dtype, text.data);
  const offset = window * text.length;
  return text.tokens.subarray(offset + start, offset + stop);
}

// The word for a circuit that its report split confirms, as in `wsparse.circuits.circuit`.
const FOUND = 'found';

const tokenText = (id) => data.tokens[id] ?? `token ${id}`;
/** A token's text with marks at what cannot be seen of line ends and tabs. */
const visibleText = (id) => tokenText(id).replaceAll('\n', '↵\n').replaceAll('\t', '⇥\t');
/** A token in quotes, with escapes for what cannot be seen or told from a space. */
const quoted = (id) => JSON.stringify(tokenText(id)).replace(/(?! )[\p{Z}\p{C}]/gu, (each) => (
  each.split('').map((unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, '0')}`).join('')));
/** Says that of some things only the first are shown, where that is so. */
const cutAt = ({ length }, most) => (length > most ? `; the first ${most} are shown` : '');
const plural = (count, word) => `${count.toLocaleString('en')} ${word}${count === 1 ? '' : 's'}`;

/** The power of ten of the last place of values that are known to about `grain`. */
const lastPlace = (grain) => Math.ceil(Math.log10(grain));

/** A value that is known to about `grain`, without the digits that it does not tell; all of it where that is 0. */
function rounded(value, grain) {
  if (!grain) return value;
  const place = lastPlace(grain);
  return place < 0 ? +value.toFixed(-place) : 10 ** place * Math.round(value / 10 ** place);
}

const minus = (text) => text.replaceAll('-', '−');

/** A number with at most so many digits, of one that is known to about `grain` with none below it. */
function number(value, digits = 3, grain = 0) {
  if (value === null || value === undefined) return '–';
  const known = rounded(value, grain);
  if (known === 0) return '0';
  const size = Math.abs(known);
  const power = +size.toExponential().split('e')[1];
  const places = grain ? Math.max(1, Math.min(digits, power - lastPlace(grain) + 1)) : digits;
  if (size >= 1e7 || size < 1e-3) return minus(known.toExponential(places - 1));
  const text = known.toPrecision(places);
  return minus(Math.abs(text) >= 1000 || text.includes('e') ? Math.round(known).toLocaleString('en') : text);
}

/** Every digit of a float32, and no zeros after it. */
const exact = (value) => (value === null || value === undefined ? '–' : minus(String(value)));
const signed = (value, digits = 3) => (value > 0 ? '+' : '') + number(value, digits);

/** A share in percent: whole ones, and more digits close to none and to all. */
function percent(share) {
  const digits = share > 0.9995 ? 2 : share > 0.995 || share < 0.0995 ? 1 : 0;
  return `${+(100 * share).toFixed(digits)}%`;
}
const loss = (value) => (value === null || value === undefined ? '–' : value.toFixed(3));

// Columns of a block by what the channels of its locations hold; the MLP's come after attention's.
const COLUMN = { read: 0, heads: 1, neurons: 1, residual: 2 };
const COLUMNS = ['read', 'q k v', 'write', 'read', 'neurons', 'write'];
const KINDS = Object.fromEntries(Object.entries(data.locations).map(([location, { part, channels, meaning }]) => [location, {
  part, what: meaning, column: COLUMN[channels] + (part === 'MLP' ? 3 : 0),
  short: { heads: location.split('.')[1], neurons: 'n' }[channels] ?? '',
  reads: channels === 'read', writes: channels === 'residual', inHead: channels === 'heads', neuron: channels === 'neurons',
}]));

/** What a node's name says in a model: "0.attn.q.17". */
function parse(name, model = data.run.model) {
  const [layer, part, kind, channel] = name.split('.');
  const location = `${part}.${kind}`;
  const node = { name, location, layer: +layer, channel: +channel, model, ...KINDS[location] };
  node.head = node.inHead ? Math.floor(node.channel / model.d_head) : null;
  // Channels above the residual stream's are the concatenated positions.
  node.position = node.reads && node.channel >= model.d_model;
  node.label = `${node.short}${node.channel}`;
  return node;
}

function describe(node) {
  if (node.inHead) {
    const j = node.channel % node.model.d_head;
    return `layer ${node.layer}, head ${node.head}, ${node.what} channel ${j}`;
  }
  if (node.neuron) return `layer ${node.layer}, neuron ${node.channel}`;
  const channel = node.position
    ? `position channel ${node.channel - node.model.d_model}`
    : `residual channel ${node.channel}`;
  return `layer ${node.layer}, ${channel}, ${node.what}`;
}

/** Time of a site in the residual stream: attention before the MLP, layer after layer. */
const siteOf = (node) => 2 * node.layer + (node.part === 'MLP' ? 1 : 0);

const circuits = new Map();
// A circuit with more nodes is drawn without the rest, anew for every number of them.
const LARGE = 250;
const keptAtFirst = (circuit) => Math.min(LARGE, circuit.nodes.length);

/** A circuit with nodes, edges and residual connections as objects. */
function circuitOf(task) {
  if (circuits.has(task)) return circuits.get(task);
  const raw = data.circuits[task];
  const text = data.texts[raw.text];
  const nodes = raw.nodes.map((each, rank) => ({
    ...parse(each.name, RUNS[raw.run].run.model), ...each, rank, about: text.nodes[each.name], in: [], out: [],
  }));
  const edges = raw.edges.map(([source, target, weight]) => ({
    source: nodes[source], target: nodes[target], weight,
  }));
  for (const edge of edges) {
    edge.source.out.push(edge);
    edge.target.in.push(edge);
  }
  const circuit = {
    ...raw, task, nodes, edges, text, streams: streams(nodes),
    byName: new Map(nodes.map((node) => [node.name, node])),
    large: nodes.length > LARGE,
    largestWeight: d3.max(edges, (edge) => Math.abs(edge.weight)) || 1,
    largestImportance: d3.max(nodes, (node) => node.importance) || 1,
    // Where each prompt begins in the arrays that hold all of them.
    offsets: [0, ...d3.cumsum(raw.rows, (row) => row.tokens.length)],
  };
  markAlone(circuit);
  circuits.set(task, circuit);
  return circuit;
}

/** The circuit of some of its nodes, and the lines between them. */
function restricted(circuit, isKept) {
  const between = (lines) => lines.filter((line) => [line.source, line.target].every((node) => !node || isKept(node)));
  return { ...circuit, nodes: circuit.nodes.filter(isKept), edges: between(circuit.edges), streams: between(circuit.streams) };
}

/** The circuit without all but its most important nodes. */
const part = (circuit, keep) => restricted(circuit, (node) => node.rank < keep);

/** Connections of the residual stream: the same channel, written before it is read. Null is an end. */
function streams(nodes) {
  const found = [];
  const writes = d3.group(nodes.filter((node) => node.writes), (node) => node.channel);
  for (const node of nodes) {
    if (node.reads && !node.position) {
      if (node.about.n_tokens) found.push({ source: null, target: node });
      for (const write of writes.get(node.channel) ?? []) {
        if (siteOf(write) < siteOf(node)) found.push({ source: write, target: node });
      }
    }
    if (node.writes && node.about.n_tokens) found.push({ source: node, target: null });
  }
  return found;
}

/** A node's values on one prompt, in the "model" or in the "circuit" alone. */
function onRow(circuit, name, side, row) {
  return unpack(circuit.values[name][side]).subarray(circuit.offsets[row], circuit.offsets[row + 1]);
}

/** To about what those values are known. */
const grainOf = (circuit, name, side) => circuit.values[name][side].scale;
