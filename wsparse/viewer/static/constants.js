// Nodes that say the same whatever the prompt is, and those that no line leads to.

/** Whether nothing flows into a node: all that counts is its constant. */
const isConstant = (node) => node.constant || !(node.in.length + node.out.length);

/** Marks the nodes that have neither an edge nor a line of the residual stream: they are drawn in a tray below. */
function markAlone(circuit) {
  const joined = new Set(circuit.streams.flatMap(({ source, target }) => [source, target]));
  const alone = circuit.nodes.filter((node) => !node.in.length && !node.out.length && !joined.has(node));
  // Where no node has a line there is nothing to put them below.
  for (const node of alone) node.alone = alone.length < circuit.nodes.length;
}

const TRAY = { above: 34, title: 20, row: 27 };

/** Places the nodes without lines in rows below the others, each in its column; returns the tray, if there is one. */
function arrangeTray(columns, bottom) {
  const first = bottom + TRAY.above + TRAY.title + NODE.height / 2;
  let last = null;
  for (const column of columns) {
    column.tray.sort((a, b) => d3.ascending(a.head, b.head) || d3.ascending(a.location, b.location) || a.channel - b.channel);
    const rows = Math.ceil(column.tray.length / column.across);
    column.tray.forEach((node, i) => {
      const row = Math.floor(i / column.across);
      const across = row === rows - 1 ? column.tray.length - row * column.across : column.across;
      node.x = column.x + (i % column.across - (across - 1) / 2) * column.beside;
      node.y = first + row * TRAY.row;
      last = Math.max(last, node.y);
    });
  }
  return last && { top: bottom + TRAY.above - 6, bottom: last + NODE.height / 2 + 8 };
}

function drawTray({ tray, left, right }) {
  if (!tray) return [];
  return [
    svg('rect', { class: 'tray', x: left + 5, y: tray.top, width: right - left - 10, height: tray.bottom - tray.top, rx: 8 }),
    svg('text', { class: 'tray', x: left + 14, y: tray.top + 16 }, 'constants: nodes without edges'),
  ];
}
