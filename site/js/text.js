// From a caption to ids, as the model learnt them: normalise, split into words, cut words into pieces (WordPiece).
// Derived in the chapter story/11_text.
//
// Marks that Unicode added after 2015 may fall differently: Python's library has older tables.

const REMOVED = /(?![\t\n\r])[\ufffd\p{Cc}\p{Cf}\p{Co}\p{Cs}]/u;   // control characters, and halves of surrogate pairs
const SPACE = /\p{White_Space}/u;
const ACCENT = /\p{Mn}/u;
const PUNCTUATION = /[!-/:-@[-`{-~\p{P}]/u;
const CHINESE = new RegExp(String.raw`[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u{20000}-\u{2a6df}` +
                           String.raw`\u{2a700}-\u{2b81f}\u{2b920}-\u{2ceaf}\u{2f800}-\u{2fa1f}]`, 'u');
const LONGEST_WORD = 100;                                      // letters; a longer one is [UNK] as a whole

// Words as [{letters: [{letter, at}]}]: `at` is where in the caption the letter came from.
// Letter by letter: toLowerCase of a whole word would know the Greek final sigma, and Python's library does not.
function* normalised(caption) {
  let at = 0;
  for (const c of caption) {
    if (!REMOVED.test(c)) {
      const alone = CHINESE.test(c);                           // every Chinese sign is a word
      if (alone) yield {letter: ' ', at};
      for (const part of c.normalize('NFD')) {
        if (!ACCENT.test(part)) for (const letter of part.toLowerCase()) yield {letter, at};
      }
      if (alone) yield {letter: ' ', at};
    }
    at += c.length;
  }
}

function split(caption) {                                      // words and single punctuation marks
  const words = [];
  let word = null;
  for (const a of normalised(caption)) {
    if (SPACE.test(a.letter)) word = null;
    else if (PUNCTUATION.test(a.letter)) {
      words.push([a]);
      word = null;
    } else if (word) word.push(a);
    else words.push(word = [a]);
  }
  return words;
}

const spell = word => word.map(a => a.letter).join('');

export class Tokenizer {
  constructor({vocab, max_length}) {                           // of the manifest's condition
    this.vocab = vocab;
    this.ids = new Map(vocab.map((token, id) => [token, id]));
    this.maxLength = max_length;
    this.longest = Math.max(...vocab.map(token => token.length));
  }

  words(caption) { return split(caption).map(spell); }

  pieces(word) {   // the longest piece that fits, then the longest of the rest
    const unknown = [{token: '[UNK]', at: word[0].at}];
    if (word.length > LONGEST_WORD) return unknown;
    const out = [];
    for (let from = 0; from < word.length;) {
      let to = Math.min(word.length, from + this.longest);
      let token;
      for (; to > from; to--) {
        token = (from ? '##' : '') + spell(word.slice(from, to));
        if (this.ids.has(token)) break;
      }
      if (to === from) return unknown;
      out.push({token, at: word[from].at});
      from = to;
    }
    return out;
  }

  encode(caption) {
    const words = split(caption);
    const pieces = words.flatMap(word => this.pieces(word));
    const room = this.maxLength - 2;
    const tooLong = pieces.length > room;
    const tokens = ['[CLS]', ...pieces.slice(0, room).map(p => p.token), '[SEP]'];
    while (tokens.length < this.maxLength) tokens.push('[PAD]');
    return {
      ids: tokens.map(token => this.ids.get(token)),
      tokens,
      n: pieces.length,
      room,
      tooLong,
      fits: tooLong ? caption.slice(0, pieces[room].at) : caption,
      unknown: [...new Set(words.map(spell))].filter(word => this.isUnknown(word)),
    };
  }

  isUnknown(word) {   // the vocabulary has no longer piece of it than its letters
    if (this.ids.has(word)) return false;
    const pieces = split(word).flatMap(w => this.pieces(w));
    return pieces.every(({token}) => token === '[UNK]' || [...token.replace(/^##/, '')].length === 1);
  }
}
