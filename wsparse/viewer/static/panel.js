// What is beside the graph: the circuit's numbers, or everything about the selected node.

function drawPanel(circuit, state, change) {
  const panel = byId('panel');
  keepFocus(panel, () => fillPanel(panel, circuit, state, change));
}

function fillPanel(panel, circuit, state, change) {
  const node = circuit.byName.get(state.node);
  const edge = node ? null : edgeOf(circuit, state.edge);
  const group = notesOf(circuit.task).groups.find(({ name }) => name === state.group);
  if (state.try) drawTry(panel, circuit, state, change);
  else if (state.notes) panel.replaceChildren(...notesPanel(circuit, state, change));
  else if (group) panel.replaceChildren(...groupPanel(circuit, group, change));
  else if (node) panel.replaceChildren(...nodePanel(circuit, node, state, change));
  else if (edge) panel.replaceChildren(...edgePanel(circuit, edge, change));
  else panel.replaceChildren(...(state.end ? endPanel(circuit, state.end, change) : circuitPanel(circuit, state, change)));
}

const labelOf = (control) => control.getAttribute('aria-label') ?? control.textContent;

/** What in an element is of the kind of a control, and has its label. */
const equals = (holder, control) => [...holder.querySelectorAll(control.tagName)].filter((each) => labelOf(each) === labelOf(control));

/** Fills an element anew; what takes the place of the control that had the focus has it then, or else the element. */
function keepFocus(holder, fill) {
  const before = document.activeElement;
  const at = holder.contains(before) ? equals(holder, before).indexOf(before) : -1;
  fill();
  if (at < 0 || before.isConnected) return;
  const after = equals(holder, before);
  (after[Math.min(at, after.length - 1)] ?? holder).focus({ preventScroll: true });
  // A control that can do nothing now does not take it.
  if (document.activeElement === document.body) holder.focus({ preventScroll: true });
}

/** A title, of the class "words" where it is not the name of a node, with the button that closes what it stands above. */
const titleBar = (title, close, kind = null) => el('div', { class: 'heading' }, el('h2', { class: kind }, title),
  el('button', { type: 'button', 'aria-label': 'Close', click: close }, '×'));

const section = (title, ...content) => el('section', {}, el('h3', {}, title), ...content);
const facts = (pairs) => el('dl', { class: 'facts' }, ...pairs.filter(Boolean).flatMap(([name, value, title]) => [
  el('dt', { title }, name), el('dd', {}, value),
]));

/** The edge that "source>target" names. */
function edgeOf(circuit, name) {
  const [source, target] = (name ?? '').split('>');
  return circuit.byName.get(source)?.out.find((edge) => edge.target.name === target) ?? null;
}

function edgePanel(circuit, edge, change) {
  return [
    titleBar(`${edge.source.name} → ${edge.target.name}`, () => change({ edge: null }, true)),
    el('p', {}, `From ${describe(edge.source)} to ${describe(edge.target)}`),
    hiddenNote(circuit, [edge.source, edge.target], change) ?? '',
    section('Edge', facts([
      ['weight', exact(edge.weight)], ['from', link(edge.source, change)], ['to', link(edge.target, change)],
      ['rank by size', `${circuit.edges.indexOf(edge) + 1} of ${circuit.edges.length}`],
      ['loss without its source, in the circuit', signed(edge.source.importance)],
      ['loss without its target, in the circuit', signed(edge.target.importance)],
    ]), el('p', { class: 'quiet' }, 'Growth of the task loss when that node alone is removed, on the report split.')),
  ];
}

const REPORT = 'on the report split: pairs that neither masks were learned on nor circuits chosen on';

const OLDER = 'the evidence of this circuit is of an older version; python -m wsparse.prune --run=RUN --evidence measures it again';

function circuitPanel(circuit, state, change) {
  const row = data.tasks.find((each) => each.task === circuit.task);
  const { scores, counts, controls } = circuit;
  const curves = el('div', {});
  // Drawn when it is in the page, and has a width.
  requestAnimationFrame(() => drawCurves(curves, data.tasks.filter((each) => data.circuits[each.task]), circuit.task, {
    height: 230, pick: (task) => change({ task, node: null, view: null }, true),
  }));
  return [
    el('h2', {}, circuit.task),
    el('p', {}, row.summary),
    el('p', { class: 'quiet' }, 'Answers: ', ...answersShown(circuit)),
    ...captionShown(circuit),
    circuit.status === FOUND ? null : el('p', { class: 'wrong' }, `Status: ${[circuit.status, circuit.misses].filter(Boolean).join('; ')}.`),
    canRun(circuit) ? null : el('p', { class: 'quiet' }, `This page does not run the model: ${data.static || OLDER}.`),
    section('Evidence', el('p', { class: 'quiet' }, `Losses ${REPORT}.`), facts([
      ['loss of the circuit alone', loss(circuit.loss), 'everything else at its mean'],
      ['under attack', loss(scores.attacked), 'the largest that 20 steps of an adversary find, which lets removed nodes through in part'],
      ['after scale and shift of the logits', loss(scores.calibrated?.loss)],
      ['loss of the whole model', loss(scores.model?.loss)],
      ['loss without the circuit', loss(scores.necessity?.loss), 'the circuit at its mean, the rest as it is'],
      ['chance', '0.693'],
      ...Object.entries(controls).map(([name, control]) => [
        `control, on the pairs that circuits are chosen on: ${name.replaceAll('_', ' ')}`, `${loss(control.least_loss)}${control.reached ? ' (reached the target)' : ''}`,
        'least loss of the same search where there is nothing to find, on the pairs that circuits are chosen on',
      ]),
    ])),
    circuit.audit ? section('Audit', auditTable(circuit.audit)) : null,
    section('Size', facts([
      ['nodes', counts.nodes], ['edges', counts.edges],
      ['all weights between its nodes', counts.edges_between_nodes],
      ['found by gradient attribution', scores.attribution_baseline?.reached ? plural(scores.attribution_baseline.edges, 'edge') : 'target missed'],
      ['embedding entries it reads', counts.embedding_edges], ['unembedding entries it writes', counts.unembedding_edges],
      ['biases', counts.biases],
    ]), el('p', {}, csvButton(() => `${ownName()} nodes`, () => nodeRows(circuit), 'nodes as CSV'), ' ',
      csvButton(() => `${ownName()} edges`, () => edgeRows(circuit.edges), 'edges as CSV'))),
    section('Loss against edges', curves, el('p', { class: 'quiet' }, `Losses ${REPORT}.`)),
    section('Most important nodes', el('ol', { class: 'links' }, ...circuit.nodes.slice(0, 12).map((node) => el('li', {},
      link(node, change), el('span', { class: 'quiet' }, ` ${signed(node.importance)}`))))),
  ].filter(Boolean);
}

/** The two answers in quotes, which show white space; what else the task says of their form. */
function answersShown(circuit) {
  const answers = circuit.answer_weights?.tokens;
  const chips = (ids) => ids.flatMap((id, i) => [i ? ' or ' : '', el('code', { class: 'chip' }, quoted(id))]);
  const form = el('code', { class: 'form' }, circuit.form);
  if (!answers) return [form, ', such as ', ...chips(circuit.rows.slice(0, 2).map(({ answer }) => answer))];
  return [...chips(answers), ...(/ after |, their first/.test(circuit.form) ? [' (', form, ')'] : [])];
}

/** What a person has written about all of the circuit. */
const captionShown = (circuit) => notesOf(circuit.task).caption.split('\n').filter((line) => line.trim())
  .map((line) => el('p', { class: 'caption' }, line));

/** The verdicts of an audit; what each says is told when it is pointed at, and in the report. */
const auditTable = ({ tests, file }) => el('div', {},
  el('table', { class: 'audit' }, el('tbody', {}, ...tests.map((test) => el('tr', { title: test.meaning },
    el('th', { scope: 'row' }, test.title),
    el('td', { class: test.verdict.replace(' ', '-') }, `${test.mark} ${test.verdict}`))))),
  el('p', { class: 'quiet' }, 'What these verdicts do and do not support is in ', el('code', {}, file), ' in the circuit’s folder.'));

const link = (node, change) => el('button', {
  type: 'button', class: 'link', title: describe(node), click: () => change({ node: node.name }, true),
}, node.name, nameOf(node) ? el('span', { class: 'quiet' }, ` ${nameOf(node)}`) : null);

/** The weight of an edge, as a button that selects it. */
const edgeLink = (edge, change) => el('button', {
  type: 'button', class: 'link', title: `${edge.source.name} → ${edge.target.name}`,
  click: () => change({ edge: `${edge.source.name}>${edge.target.name}` }, true),
}, exact(edge.weight));

function nodePanel(circuit, node, state, change) {
  const { about } = node;
  return [
    titleBar(node.name, () => change({ node: null }, true)),
    el('p', {}, describe(node)),
    nodeNotes(circuit, node, change),
    hiddenNote(circuit, [node], change),
    facts([
      ['loss without it, in the circuit', signed(node.importance), 'growth of the task loss when it alone is removed from the circuit, on all pairs of the report split'],
      ['loss without it, in the whole model', signed(node.from_model), 'growth of the task loss when it alone is removed from the whole model'],
      about.bias === null ? null : ['bias', exact(about.bias)],
      about.gain === null ? null : ['gain of the norm', exact(about.gain)],
      ['mean, its value when removed', exact(node.mean), 'over pretraining text'],
      ['tau', number(node.tau), 'what pruning learned for it'],
    ]),
    el('p', { class: 'quiet' }, `Growth of the task loss on the report split: all its pairs in the circuit, ${circuit.ablation_pairs} of them in the whole model.`),
    section('Edges', ...edgeTables(circuit, node, change)),
    section('On the task: prompts of the report split', ...onTask(circuit, node, state, change),
      csvButton(() => `${ownName()} ${node.name} values`, () => valueRows(circuit, node), 'values as CSV')),
    node.inHead ? section(`Attention of head ${node.head}`, ...attention(circuit, node, state, change)) : null,
    section('In other text', ...inText(circuit, about)),
  ].filter(Boolean);
}

const SIDES = [['model', 'whole model'], ['circuit', 'circuit alone']];
const EDGES_SHOWN = 200;

/** Some edges, at most the first of them, as a table whose last column has `ends` of them; null where there are none. */
function edgeTable(circuit, title, edges, ends, change) {
  if (!edges.length) return null;
  const table = el('table', { class: 'edges' }, el('caption', {}, `${title} (${edges.length}${cutAt(edges, EDGES_SHOWN)})`),
    el('tbody', {}, ...edges.slice(0, EDGES_SHOWN).map((edge) => el('tr', {},
      el('td', { class: 'weight' }, weightBar(edge.weight, circuit.largestWeight)),
      el('td', { class: 'number' }, edgeLink(edge, change)),
      el('td', {}, ...ends(edge))))));
  return Object.assign(table, { csv: () => edgeRows(edges) });
}

function edgeTables(circuit, node, change) {
  const table = (title, edges, end) => edgeTable(circuit, title, edges, (edge) => [link(edge[end], change)], change);
  const stream = circuit.streams.filter((each) => (each.source === node && each.target) || (each.target === node && each.source));
  const content = [table('In', node.in, 'source'), table('Out', node.out, 'target')];
  if (stream.length) {
    content.push(el('p', { class: 'stream-list' },
      node.reads ? `Residual channel ${node.channel} is written before by ` : `Residual channel ${node.channel} is read later by `,
      ...stream.flatMap((each, i) => [i ? ', ' : '', link(node.reads ? each.source : each.target, change)])));
  }
  content.push(...endEntries(circuit, node));
  const answers = circuit.contrast ? null : circuit.answer_weights;
  if (answers && node.writes) {
    const weights = answers.weights[node.name];
    const largest = d3.max(weights, Math.abs);
    content.push(el('p', {}, 'Weights to the two answers: ', ...answers.tokens.map((id, i) => chip(id, weights[i], largest))));
  }
  const filled = content.filter(Boolean);
  return filled.length ? filled : [el('p', { class: 'quiet' }, 'No edges: its constant is all that counts.')];
}

function weightBar(weight, largest) {
  const bar = el('i', { class: weight < 0 ? 'bar negative' : 'bar positive' });
  bar.style.width = `${(100 * Math.abs(weight) / largest).toFixed(1)}%`;
  return bar;
}

function chip(id, weight, largest) {
  const span = el('span', { class: 'chip' }, el('code', {}, quoted(id)), ` ${signed(weight)}`);
  color(span, weight, largest);
  return span;
}

/** Previous, next and a list of the pairs, and where values come from. */
function pairControls(circuit, state, change) {
  const count = circuit.rows.length / 2;
  const choose = el('select', { 'aria-label': 'Pair of prompts', change: (event) => change({ pair: +event.target.value }) },
    ...d3.range(count).map((i) => el('option', { value: i, selected: i === state.pair }, `pair ${i + 1} of ${count}`)));
  return el('div', { class: 'controls' },
    el('button', { type: 'button', 'aria-label': 'Previous pair', disabled: state.pair === 0, click: () => change({ pair: state.pair - 1 }) }, '‹'),
    choose,
    el('button', { type: 'button', 'aria-label': 'Next pair', disabled: state.pair === count - 1, click: () => change({ pair: state.pair + 1 }) }, '›'),
    choice('Values from', SIDES, state.side, (side) => change({ side })));
}

/** A row of buttons of which one is pressed. */
const choice = (label, options, value, pick) => el('span', { class: 'choice', role: 'group', 'aria-label': label },
  ...options.map(([key, text]) => el('button', {
    type: 'button', 'aria-pressed': String(key === value), click: () => pick(key),
  }, text)));

function onTask(circuit, node, state, change) {
  const rows = [2 * state.pair, 2 * state.pair + 1];
  const ids = rows.map((row) => circuit.rows[row].tokens);
  const values = rows.map((row) => onRow(circuit, node.name, state.side, row));
  const largest = d3.max(values.flatMap((each) => [...each]), Math.abs);
  // Prompts of different lengths agree from their ends backwards.
  const length = Math.min(...ids.map((each) => each.length));
  const [a, b] = ids.map((each) => each.slice(each.length - length));
  const [u, v] = values.map((each) => each.slice(each.length - length));
  const changed = a.map((id, i) => id !== b[i]);
  const texts = a.map((id, i) => (changed[i] ? `${shortText(id)}|${shortText(b[i])}` : visibleText(id)));
  const differences = Array.from(u, (value, i) => value - v[i]);
  const grain = grainOf(circuit, node.name, state.side);
  return [
    pairControls(circuit, state, change),
    ...rows.map((row, i) => {
      const { answer } = circuit.rows[row];
      const margin = circuit.rows[row][state.side];
      return el('div', { class: 'prompt' },
        el('p', {}, i ? 'Second prompt, answer ' : 'First prompt, answer ', el('code', {}, quoted(answer)),
          el('span', { class: margin > 0 ? 'quiet' : 'wrong' },
            ` ${margin > 0 ? 'preferred' : 'not preferred'}: ${signed(margin)} logits over the other`)),
        drawTokens(ids[i], values[i], largest, {
          grain, changed: ids[i].map((_, at) => changed[at - (ids[i].length - length)] ?? true), label: `Prompt ${i + 1}`,
          // A token of the first prompt; they agree from their ends backwards.
          focus: state.token === null ? -1 : state.token + ids[i].length - ids[0].length,
        }));
    }),
    el('div', { class: 'prompt' },
      el('p', {}, 'Difference, first less second'),
      drawTokens(a, differences, largest, { grain: 2 * grain, texts, changed, label: 'Difference' })),
  ];
}

const shortText = (id) => tokenText(id).replaceAll('\n', '↵').replaceAll('\t', '⇥');

function attention(circuit, node, state, change) {
  const row = 2 * state.pair + state.second;
  const all = circuit.rows[row].tokens;
  const start = Math.max(0, all.length - circuit.pattern_tokens);
  const ids = all.slice(start);
  const key = `${node.layer}.${node.head}`;
  // Rows of a lower triangle follow one another, prompt after prompt.
  const sizes = circuit.rows.map((each) => Math.min(each.tokens.length, circuit.pattern_tokens));
  const offset = d3.sum(sizes.slice(0, row), (size) => size * (size + 1) / 2);
  const packed = circuit.patterns[key][state.side];
  const pattern = unpack(packed);
  const head = (t, s) => pattern[offset + t * (t + 1) / 2 + s];
  const place = (kind) => `${node.layer}.attn.${kind}.${node.channel}`;
  const of = (kind) => onRow(circuit, place(kind), state.side, row).subarray(start);
  const grain = (kind) => grainOf(circuit, place(kind), state.side);
  // Of a product: that of each factor, times the largest of the other.
  const grainOfProduct = (...factors) => d3.sum(factors, ([factor, others]) => factor * d3.max(others, Math.abs));
  let own;
  let ownGrain;
  let title;
  if (node.location === 'attn.v') {
    const v = of('v');
    own = (t, s) => head(t, s) * v[s];
    ownGrain = grainOfProduct([packed.scale, v], [grain('v'), [1]]);
    title = `This channel: attention times the value at the key`;
  } else {
    const [q, k] = [of('q'), of('k')];
    const root = Math.sqrt(data.run.model.d_head);
    own = (t, s) => q[t] * k[s] / root;
    ownGrain = grainOfProduct([grain('q'), k], [grain('k'), q]) / root;
    title = `This channel: its share of the score, query times key over the root of ${data.run.model.d_head}`;
  }
  let largest = 0;
  ids.forEach((_, t) => { for (let s = 0; s <= t; s += 1) largest = Math.max(largest, Math.abs(own(t, s))); });
  return [
    choice('Prompt', [[0, 'first prompt'], [1, 'second prompt']], state.second, (second) => change({ second })),
    start ? el('p', { class: 'quiet' }, `The last ${ids.length} of ${all.length} tokens.`) : null,
    drawSquare(ids, head, {
      title: 'The head: attention from each token (rows) to those before; the color is the square root', scale: 1, diverging: false, shade: Math.sqrt, grain: packed.scale,
    }),
    drawSquare(ids, own, { title: `${title}; the deepest color is ${number(largest, 3, ownGrain)}`, scale: largest, diverging: true, grain: ownGrain }),
  ].filter(Boolean);
}

function inText(circuit, about) {
  const values = unpack(about.values);
  const grain = about.values.scale;
  let at = 0;
  const excerpts = (title, spans, note = () => '') => {
    if (!spans.length) return null;
    return el('div', {}, el('h4', {}, title), ...spans.map((span) => {
      const [window, start, stop, token] = span;
      const own = values.subarray(at, at + stop - start);
      at += stop - start;
      return el('div', { class: 'excerpt' },
        el('span', { class: 'number' }, number(own[token - start], 3, grain)), note(span),
        drawTokens(stretch(circuit.text, window, start, stop), own, about.largest, { grain, focus: token - start, label: 'Excerpt' }));
    }));
  };
  return [
    el('p', { class: 'quiet' }, `Text: ${circuit.text.name}. The node is 0 on ${percent(about.zero)} of tokens, which the histogram leaves out (its heights are square roots).`),
    drawHistogram(about),
    // In this order, since their values follow one another.
    excerpts('Highest', about.highest),
    excerpts('Lowest', about.lowest),
    excerpts('At quantiles of the values that are not 0', about.sampled, (span) => el('span', { class: 'quiet' }, ` ${percent(span[4])} `)),
  ].filter(Boolean);
}
