// The two ends of the residual stream: what the embedding of a token writes, and what a write says of each token.
// The tokens that tell the task's two sides apart come first.

const ENDS = ['embedding', 'unembedding'];
const ROLES = ['first prompt', 'second prompt', 'answer to the first', 'answer to the second'];
// Columns of the table of an end.
const END_TOKENS = 6;

/** The tokens by which the sides differ, those that matter at an end first, with how the pairs use them. */
function contrastTokens(circuit, end) {
  const { tokens, counts } = circuit.contrast ?? { tokens: [], counts: [] };
  const answers = end === 'unembedding';
  return tokens.map((id, i) => {
    const [inPrompts, asAnswer] = [counts[i][0] + counts[i][1], counts[i][2] + counts[i][3]];
    return { id, i, matters: answers ? asAnswer : inPrompts, roles: ROLES.filter((_, role) => counts[i][role]) };
  }).sort((a, b) => d3.descending(a.matters, b.matters));
}

/** The entries of a node's channel in the embedding, or the unembedding. */
function endEntries(circuit, node) {
  const { about } = node;
  if (!about.tokens.length) return [];
  const end = node.reads ? 'embedding' : 'unembedding';
  const weights = circuit.contrast?.weights[node.name];
  const contrast = weights ? contrastTokens(circuit, end) : [];
  const largest = Math.abs(about.tokens[0][1]);
  const there = contrast.filter(({ i }) => weights[i]);
  const absent = contrast.filter(({ i, matters }) => !weights[i] && matters);
  const others = about.tokens.filter(([id]) => !contrast.some((each) => each.id === id));
  const times = node.writes ? ', times the final gain' : '';
  return [
    el('p', { class: 'quiet' }, `The ${end} of ${plural(about.n_tokens, 'token')} has an entry here${times}.`),
    there.length ? el('table', { class: 'contrast' },
      el('caption', {}, 'Tokens that tell the task’s two sides apart'),
      el('tbody', {}, ...there.map(({ id, i, roles }) => el('tr', {},
        el('th', { scope: 'row' }, chip(id, weights[i], largest)), el('td', {}, roles.join(', ')))))) : null,
    absent.length ? el('p', { class: 'quiet' }, 'No entry for ',
      ...absent.flatMap(({ id }, at) => [at ? ', ' : '', el('code', {}, quoted(id))]), ' of the task.') : null,
    others.length ? el('p', { class: 'quiet' }, contrast.length ? 'The largest others:' : 'The largest:') : null,
    others.length ? el('p', { class: 'chips' }, ...others.map(([id, weight]) => chip(id, weight, largest))) : null,
  ];
}

const OLD_CONTRAST = 'Which tokens tell the task’s sides apart is not in this evidence: python -m wsparse.prune --run=RUN --evidence measures it.';

/** The panel of an end: the circuit's channels there, by the tokens that tell the sides apart. */
function endPanel(circuit, end, change) {
  const first = end === 'embedding';
  const tokens = contrastTokens(circuit, end).filter(({ matters }) => matters);
  const shown = tokens.slice(0, END_TOKENS);
  const entries = (node) => shown.map(({ i }) => circuit.contrast.weights[node.name][i]);
  const there = circuit.nodes.filter((node) => (first ? node.reads : node.writes) && node.about.n_tokens);
  const [nodes, silent] = [true, false].map((some) => there.filter((node) => entries(node).some(Boolean) === some));
  const weights = nodes.map(entries);
  const largest = d3.max(weights.flat(), Math.abs);
  const cell = (weight) => {
    const td = el('td', { class: weight ? 'number' : 'number quiet', 'data-value': weight }, weight ? signed(weight) : '0');
    color(td, weight, largest);
    return td;
  };
  return [
    titleBar(end, () => change({ end: null }, true)),
    el('p', {}, first ? 'What the tokens of the task write into the channels that the circuit reads.'
      : 'What the channels that the circuit writes say of the task’s answers, times the final gain.'),
    shown.length ? el('div', { class: 'scroll' }, el('table', { class: 'ends' }, el('caption', {}, `Entries of the ${end}`),
      el('thead', {}, el('tr', {}, el('th', { scope: 'col' }, 'node'), ...shown.map(({ id, roles }) => el('th', { scope: 'col', title: roles.join(', '), 'data-value': quoted(id) },
        el('code', {}, quoted(id)), el('br'), el('span', { class: 'quiet' }, roles.filter((role) => role.startsWith('answer') !== first)[0]))))),
      el('tbody', {}, ...nodes.map((node, row) => el('tr', {},
        el('th', { scope: 'row', 'data-value': node.name }, link(node, change)), ...weights[row].map(cell)))))) : el('p', { class: 'quiet' }, OLD_CONTRAST),
    shown.length && silent.length ? el('p', { class: 'stream-list' }, 'No entry for these tokens: ',
      ...silent.flatMap((node, i) => [i ? ', ' : '', link(node, change)])) : null,
    el('p', { class: 'quiet' }, `${first ? 'The tokens are those in which the two prompts of a pair differ, those of the most pairs first'
      : 'The most common answers first'}${cutAt(tokens, END_TOKENS)}.`),
  ].filter(Boolean);
}
