// The tokenizer: byte-level BPE with the split of `wsparse.data.tokenizer`.

// White space of Unicode, as the tokenizers library has it; JavaScript's \s also has U+FEFF and lacks U+0085.
const PIECES = /[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\p{White_Space}\p{L}\p{N}]+[\r\n/]*|\p{White_Space}*[\r\n]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu;

/** The character that stands for each byte in the names of tokens: printable ones for themselves. */
function byteCharacters() {
  const found = [];
  let next = 256;
  for (let byte = 0; byte < 256; byte += 1) {
    const printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    found.push(String.fromCharCode(printable ? byte : next));
    if (!printable) next += 1;
  }
  return found;
}

/** `encode` and the text of every token, from the page's data. */
function openTokenizer({ tokens, special, merges }) {
  const characters = byteCharacters();
  const byteOf = new Map(characters.map((character, byte) => [character, byte]));
  const idOf = new Map(tokens.map((token, id) => [token, id]));
  const byteIds = characters.map((character) => idOf.get(character));
  const ranks = new Map(merges.map(([first, second, merged], rank) => [first * tokens.length + second, { rank, merged }]));
  const decoder = new TextDecoder('utf-8', { ignoreBOM: true });
  const specials = new Set(special);
  const texts = tokens.map((token, id) => (
    specials.has(id) ? token : decoder.decode(Uint8Array.from(token, (character) => byteOf.get(character)))));
  const encoder = new TextEncoder();
  const encode = (text) => (text.match(PIECES) ?? []).flatMap((piece) => (
    merge(Array.from(encoder.encode(piece), (byte) => byteIds[byte]), ranks, tokens.length)));
  return { encode, texts };
}

/** Merges neighbors of a piece, the pair that was learned first before others, from the left. */
function merge(ids, ranks, size) {
  while (ids.length > 1) {
    let best = null;
    let at = -1;
    for (let i = 0; i + 1 < ids.length; i += 1) {
      const pair = ranks.get(ids[i] * size + ids[i + 1]);
      if (pair && (best === null || pair.rank < best.rank)) [best, at] = [pair, i];
    }
    if (best === null) break;
    ids.splice(at, 2, best.merged);
  }
  return ids;
}
