// What a person writes about circuits: a caption, names of nodes, groups, pins, a tour; how it is kept and saved.

// As in `wsparse.circuits.notes`.
const NOTES_SCHEMA = 1;
const LONGEST_NAME = 80;
const LONGEST_TEXT = 2000;
// Characters of notes in the address; links that are longer do not survive a mail.
const LONGEST_ADDRESS = 6000;

// The page as it was written, before anything is drawn.
const pristine = document.documentElement.cloneNode(true);
const notebook = new Map();
// What has been in the address of this page: going back to it does not take notes back.
const addressed = new Set();

/** The notes on a circuit as they are now. */
function notesOf(task) {
  if (!notebook.has(task)) notebook.set(task, notesInFile(task));
  return notebook.get(task);
}

/** The notes that came with the page. */
function notesInFile(task) {
  const given = data.circuits[task].written ?? {};
  return { ...tidy(circuitOf(task), given), measured: Boolean(given.measured), remarks: given.remarks ?? [] };
}

const list = (value) => (Array.isArray(value) ? value : []);

/** Notes from a place that may hold anything, without what is not possible. */
function tidy(circuit, given) {
  const text = (value, longest) => (typeof value === 'string' ? value.slice(0, longest) : '');
  const known = (name) => typeof name === 'string' && circuit.byName.has(name);
  const grouped = new Set();
  const names = new Set();
  const groups = list(given.groups).flatMap((group) => {
    const name = text(group?.name, LONGEST_NAME).trim();
    const nodes = list(group?.nodes).filter((node) => known(node) && !grouped.has(node) && grouped.add(node));
    if (!name || names.has(name) || !nodes.length) return [];
    names.add(name);
    return [{ name, nodes, open: group.open === true }];
  });
  const labels = Object.entries(given.labels ?? {}).map(([name, label]) => [name, text(label, LONGEST_NAME)]);
  return {
    caption: text(given.caption, LONGEST_TEXT),
    labels: Object.fromEntries(labels.filter(([name, label]) => known(name) && label.trim())),
    groups,
    pins: [...new Set(list(given.pins).filter(known))],
    tour: list(given.tour).map((step) => tidyStep(circuit, step ?? {})).filter((step) => step.caption.trim()),
  };
}

function tidyStep(circuit, step) {
  const count = (value, most) => (Number.isInteger(value) && value >= 0 && value <= most ? value : null);
  const node = circuit.byName.has(step.node) ? step.node : null;
  const edge = !node && typeof step.edge === 'string' && edgeOf(circuit, step.edge) ? step.edge : null;
  const edits = typeof step.edits === 'string' ? step.edits : writeEdits(list(step.edits).filter((edit) => (
    edit?.mode !== 'set' || Number.isFinite(edit.value))));
  return {
    caption: typeof step.caption === 'string' ? step.caption.slice(0, LONGEST_TEXT) : '', node, edge,
    pair: count(step.pair, circuit.rows.length / 2 - 1), token: count(step.token, 1e6),
    edits: readEdits(circuit, edits).map(({ name, mode, value }) => ({ name, mode, value })),
  };
}

const content = ({ caption, labels, groups, pins, tour }) => ({ caption, labels, groups, pins, tour });

/** Whether a person has changed the notes that came with the page. */
const isEdited = (task) => notebook.has(task) && !same(content(notebook.get(task)), content(notesInFile(task)));

// The notes on each circuit that a person has last saved in a file.
const filed = new Map();

/** Keeps in mind that the notes on a circuit are in a file as they are now. */
const markFiled = (task) => filed.set(task, structuredClone(content(notesOf(task))));

const isFiled = (task) => same(content(notesOf(task)), filed.get(task));
const isAddressed = (task) => task === state.task && shared(task) !== '' && location.hash.includes(shared(task));

/** Whether closing the page loses what a person has written. */
const wouldBeLost = () => [...notebook.keys()].some((task) => isEdited(task) && !isFiled(task) && !isAddressed(task));

/** The notes in few characters for the address; empty where they are those of the page, or too long. */
function shared(task) {
  if (!isEdited(task)) return '';
  const circuit = circuitOf(task);
  const { caption, labels, groups, pins, tour } = notesOf(task);
  const rank = (name) => circuit.byName.get(name)?.rank ?? null;
  const known = same(tour, notesInFile(task).tour);
  const short = [
    NOTES_SCHEMA, circuit.digest.slice(0, 8), caption,
    Object.entries(labels).map(([name, label]) => [rank(name), label]),
    groups.map(({ name, nodes, open }) => [name, nodes.map(rank), open ? 1 : 0]), pins.map(rank),
    known ? 0 : tour.map(({ caption: words, node, edge, pair, token, edits }) => [
      words, rank(node), edge ? edge.split('>').map(rank) : null, pair, token, writeEdits(edits)]),
  ];
  const bytes = new TextEncoder().encode(JSON.stringify(short));
  const text = btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(''));
  const safe = text.replaceAll('+', '-').replaceAll('/', '_').replaceAll('=', '');
  return safe.length <= LONGEST_ADDRESS ? safe : '';
}

/**
 * Whether other notes may take the place of those on a circuit: a person is asked where they are nowhere else. Going
 * back to an address that has them brings them back.
 */
function mayReplace(task, kept) {
  addressed.delete(shared(task));
  return kept || !isEdited(task) || isFiled(task) || window.confirm(`The notes on ${task} are in no address and in no file. Replace them?`);
}

/** Takes the notes of an address; those on another circuit are left out, and that is said. */
function adopt(circuit, text) {
  addressed.add(text);
  const own = notesInFile(circuit.task);
  const refused = (remark) => { notesOf(circuit.task).remarks = [...own.remarks, remark]; };
  let short;
  try {
    const bytes = atob(text.replaceAll('-', '+').replaceAll('_', '/'));
    short = JSON.parse(new TextDecoder().decode(Uint8Array.from(bytes, (byte) => byte.charCodeAt(0))));
  } catch {
    return refused('The notes in the address cannot be read.');
  }
  const [schema, digest, caption, labels, groups, pins, tour] = list(short);
  if (schema !== NOTES_SCHEMA) return refused('The notes in the address are of another version of this page.');
  if (digest !== circuit.digest.slice(0, 8)) {
    return refused('The notes in the address were written for another circuit of this task, and are left out.');
  }
  if (!mayReplace(circuit.task, shared(circuit.task) !== '')) {
    // The same link may be opened again.
    addressed.delete(text);
    return undefined;
  }
  const name = (rank) => (Number.isInteger(rank) ? circuit.nodes[rank]?.name : undefined);
  notebook.set(circuit.task, {
    ...own,
    ...tidy(circuit, {
      caption,
      labels: Object.fromEntries(list(labels).map((each) => [name(each?.[0]), each?.[1]])),
      groups: list(groups).map((each) => ({ name: each?.[0], nodes: list(each?.[1]).map(name), open: each?.[2] === 1 })),
      pins: list(pins).map(name),
      tour: tour === 0 ? own.tour : list(tour).map((each) => {
        const [words, node, edge, pair, token, edits] = list(each);
        return { caption: words, node: name(node), edge: list(edge).map(name).join('>'), pair, token, edits };
      }),
    }),
    measured: own.measured && tour === 0,
  });
  return undefined;
}

/** The text of a notes file, which `view --notes` reads. */
function notesFile(circuit) {
  const { caption, labels, groups, pins, tour, measured } = notesOf(circuit.task);
  const said = (each) => Object.fromEntries(Object.entries(each).filter(([, value]) => (
    value !== null && value !== false && value !== '' && !(typeof value === 'object' && !Object.keys(value).length))));
  const steps = tour.map((step) => said({ ...step, edits: step.edits.map(said) }));
  // A tour that is made from the evidence is made again, from that of then.
  const values = { caption, labels, groups: groups.map(said), pins, tour: measured ? [] : steps };
  return `${JSON.stringify({ schema: NOTES_SCHEMA, task: data.circuits[circuit.task].written.task, circuit: circuit.digest, ...said(values) }, null, 2)}\n`;
}

/** The page with the notes on all circuits in it. */
function pageWithNotes() {
  const copy = pristine.cloneNode(true);
  const holder = copy.querySelector('#data');
  const own = JSON.parse(holder.textContent);
  for (const [task, notes] of notebook) {
    own.circuits[task].written = { ...own.circuits[task].written, ...content(notes), measured: notes.measured, remarks: isEdited(task) ? [] : notesInFile(task).remarks };
  }
  holder.textContent = JSON.stringify(own).replaceAll('<', '\\u003c').replaceAll('>', '\\u003e').replaceAll('&', '\\u0026');
  return `<!doctype html>\n${copy.outerHTML}\n`;
}

// ---- Changes; each takes the circuit ----

const nameOf = (node) => notesOf(state.task).labels[node.name] ?? '';
const isPinned = (circuit, name) => notesOf(circuit.task).pins.includes(name);
const groupOf = (circuit, name) => notesOf(circuit.task).groups.find(({ nodes }) => nodes.includes(name)) ?? null;

function setName(circuit, name, label) {
  const { labels } = notesOf(circuit.task);
  if (label.trim()) labels[name] = label;
  else delete labels[name];
}

function togglePins(circuit, names, on) {
  const notes = notesOf(circuit.task);
  const rest = notes.pins.filter((name) => !names.includes(name));
  notes.pins = on ? [...rest, ...names] : rest;
}

/** Puts nodes that are in no group into a new one; returns its name, or null where there are none. */
function addGroup(circuit, names, wanted) {
  const { groups } = notesOf(circuit.task);
  const nodes = names.filter((name) => !groupOf(circuit, name));
  if (!nodes.length) return null;
  const taken = new Set(groups.map(({ name }) => name));
  const base = wanted.trim().slice(0, LONGEST_NAME - 4) || 'group';
  let name = base;
  for (let i = 2; taken.has(name); i += 1) name = `${base} ${i}`;
  groups.push({ name, nodes, open: false });
  return name;
}

function removeFromGroups(circuit, names) {
  const notes = notesOf(circuit.task);
  notes.groups = notes.groups.map((group) => ({ ...group, nodes: group.nodes.filter((name) => !names.includes(name)) }))
    .filter(({ nodes }) => nodes.length);
}
