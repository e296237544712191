// The last events, each as one plain sentence.

import { choice, el, reconcile, section, setText } from './dom.js'
import { count, ids, plural } from './format.js'
import { dropped, isDropping } from './tree.js'

const KEPT = 120 // lines for each filter
const SHOWN = 40
const TOGETHER = 2000 // ms: what several sequences of a session do meanwhile is told in one line a kind

/** Events that follow each other in one session and say the same of different blocks are told in one line. */
const TOLD_TOGETHER = new Set(['share', 'allocate', 'release', 'publish', 'unpublish', 'evict', 'pin'])

/** The memory behind the narration: lines, newest last. No DOM. */
export class Story {
  constructor(model, now = () => performance.now()) {
    this.model = model
    this.now = now
    this.clear()
  }

  clear() {
    this.all = []
    this.copies = []
    this._mine = []
    this._last = new Map() // session id -> its last line
    this._open = new Map() // of sessions with several sequences: session id -> kind -> the line that takes in more
    this._id = 0
  }

  /** Take note of an event that is about to be applied: what it meant depends on the state before it. */
  add(event, session) {
    if (isSaidElsewhere(event)) return
    const line = this._line(event, session)
    if (line.branches > 1) {
      if (line.kind === 'truncate' && line.at === 0) return // its end, or what preempted it, says it
      if (this._join(line)) return
    } else {
      this._open.delete(session)
      const last = this._last.get(session)
      if (last && merge(last, line)) return
    }
    this._last.set(session, line)
    keep(this.all, line)
    if (line.kind === 'copy') keep(this.copies, line)
    if (this.isMine(line)) keep(this._mine, line)
    if (line.kind === 'end' && line.branches === 1) this._last.delete(session)
  }

  /** Sequences of one session take turns, so what they do is told by its kind. Returns whether a line took it in. */
  _join(line) {
    const open = this._open.get(line.session) ?? this._opened(line.session), first = open.get(sort(line))
    if (!first || line.since - first.since > TOGETHER) {
      open.set(sort(line), line)
      return false
    }
    const { id, since, times, sequences, blocks, sources, same } = first
    Object.assign(first, line, {
      id,
      since,
      times: times + 1,
      sequences: new Set([...sequences, line.sequence]),
      blocks: [...new Set([...blocks, ...line.blocks])],
      sources: [...new Set([...sources, ...line.sources])],
      same: same && first.parent === line.parent && first.at === line.at,
    })
    return true
  }

  _opened(session) {
    const last = this._last.get(session)
    const open = new Map(last ? [[sort(last), last]] : [])
    this._open.set(session, open)
    return open
  }

  _line(event, session) {
    const { model } = this
    const source = event.source
    return {
      id: ++this._id,
      ...event,
      session,
      since: this.now(),
      times: 1, // how many events it tells
      branches: new Set([...(model.sessions.get(session)?.sequences.keys() ?? []), event.sequence]).size,
      sequences: new Set([event.sequence]),
      blocks: event.block === undefined ? [] : [event.block],
      sources: source === undefined ? [] : [source],
      same: true, // one table forked, at one place
      dropped: dropped(event),
      others: source === undefined ? 0 : model.ref[source] - 1, // who else reads the source of a copy
      fromSystem: source !== undefined && model.pinned[source] === 1,
      isSystem: event.block !== undefined && model.pinned[event.block] === 1,
      slots: model.blockSize,
    }
  }

  isMine(line) {
    return this.model.own !== null && line.session === this.model.own
  }

  lines(filter) {
    if (filter === 'copies') return this.copies
    if (filter === 'all') return this.all
    return this._mine
  }

  /** The viewer became known: find their lines among all. */
  ownChanged() {
    this._mine = this.all.filter((line) => this.isMine(line))
  }
}

function keep(lines, line) {
  lines.push(line)
  if (lines.length > KEPT) lines.shift()
}

/** What sort of thing a line says: of one sort, several can be said at once. */
function sort({ kind, reason, becomes, state, dropped, fromSystem, fill, slots }) {
  if (kind === 'end') return `${kind} ${dropped ?? reason}`
  const part = kind === 'publish' ? fill === slots : kind === 'copy' ? fromSystem : (becomes ?? state)
  return `${kind} ${part}`
}

/** What a fork shares, and what a dropped sequence gives back one reader of, goes without saying. */
function isSaidElsewhere(event) {
  return (event.kind === 'share' && event.reason === 'fork') || (isDropping(event) && event.becomes !== 'free')
}

/** Tell `line` as a part of `last`, if one sentence can say both. */
function merge(last, line) {
  if (sort(last) !== sort(line) || last.reason !== line.reason) return false
  if (line.kind === 'write') {
    if (last.sequence !== line.sequence) return false
    last.blocks = last.block === line.block ? last.blocks : [...last.blocks, line.block]
  } else if (TOLD_TOGETHER.has(line.kind)) {
    if (line.isSystem !== last.isSystem) return false
    last.blocks = [...last.blocks, line.block]
  } else {
    return false
  }
  const { id, blocks } = last
  Object.assign(last, line, { id, blocks })
  return true
}

/** One sentence. `mine`: whether the reader did it. */
export function tell(line, mine) {
  const sentence = SENTENCES[line.kind]
  const text = sentence ? sentence(line, mine ? 'you' : `session ${line.session}`, mine) : line.kind
  return text[0].toUpperCase() + text.slice(1)
}

const SENTENCES = {
  state: ({ state, branches, times }, who, mine) =>
    state === 'resting' && branches > 1
      ? `${several(times, who, mine)} ended: ${times === 1 ? 'its table rests and keeps its' : 'their tables rest and keep their'} blocks.`
    : `${mine ? 'your' : `${who}’s`} ${STATES[state] ?? `state is ${state}`}.`,
  fork: ({ at, times, same }, who) =>
    times === 1
      ? `${who} forked after ${plural(at, 'token')}: both branches read the same blocks so far.`
      : same
        ? `${who} forked into ${count(times + 1)} branches after ${plural(at, 'token')}: all read the same blocks so far.`
        : `${who} forked ${count(times)} times, last after ${plural(at, 'token')}: a fork copies nothing.`,
  allocate: ({ blocks }, who) => `${who} took ${named(blocks)} for new tokens.`,
  share: ({ blocks, at, isSystem }, who, mine) =>
    `${who} now ${mine ? 'read' : 'reads'} ${named(blocks)}${isSystem ? ' of the system prompt' : ''}: ` +
    `${plural(at, 'token')} found, not computed again.`,
  write: ({ blocks, fill, slots, sequences }, who, mine) =>
    sequences.size > 1
      ? `${count(sequences.size)} ${mine ? 'of your branches' : `branches of ${who}`} wrote into ${named(blocks)}.`
    : blocks.length > 1
      ? `${who} filled ${named(blocks)}; the last one to ${fill} of ${slots} slots.`
      : `${who} filled block ${blocks[0]} to ${fill} of ${slots} slots.`,
  copy: ({ source, sources, block, blocks, others, fromSystem, times }, who, mine) =>
    times > 1
      ? `${mine ? 'your' : `${who}’s`} branches parted inside ${named(sources)}, so each wrote into a copy: ${named(blocks)}.`
    : `${who} wrote into a block ${readers(others, fromSystem)}, so it was copied: ${source} → ${block}.`,
  publish: ({ blocks, fill, slots }) =>
    `${named(blocks, true)} ${are(blocks)} published: ` +
    (fill === slots ? 'full, frozen, and can be found by content.'
    : `${blocks.length > 1 ? 'the ends of what was written' : `${fill} of ${slots} slots`}, can be found by content.`),
  unpublish: ({ blocks }) => `${named(blocks, true)} can no longer be found by content.`,
  release: ({ blocks, becomes, ref }) => RELEASED[becomes](blocks, ref),
  pin: ({ blocks, name }) => `${named(blocks, true)} of the system prompt “${name}” ${are(blocks)} pinned: never evicted.`,
  evict: ({ blocks }) => `${named(blocks, true)} ${are(blocks)} evicted: idle, and the room was needed.`,
  truncate: ({ at }, who) => (at ? `${who} went back to ${plural(at, 'token')}.` : `${who} let all blocks go.`),
  preempt: (line, who) => `${who} lost all blocks to make room, and will be computed again.`,
  end: ({ dropped, times, branches, reason }, who, mine) =>
    dropped ? GONE[dropped](times, who)
    : reason === NEXT_TURN ? `${mine ? 'your' : `${who}’s`} next turn has found its blocks, so the last one let go of them.`
    : branches > 1 ? `${several(times, who, mine)} ended; the rest goes on.`
    : mine ? 'Your session ended.'
    : `${who} ended.`,
}

const NEXT_TURN = 'the next turn goes on from it'

const GONE = {
  beam: (times, who) => `${who} dropped ${plural(times, 'beam')}: likelier ones went on.`,
  reply: (times, who) => `${who} chose a reply: ${times === 1 ? 'another one' : `${count(times)} others`} gave back what only ${times === 1 ? 'it' : 'they'} held.`,
}

function several(times, who, mine) {
  return `${times === 1 ? 'a branch' : `${count(times)} branches`} of ${mine ? 'yours' : who}`
}

const STATES = {
  queued: 'message waits for its turn',
  prefill: 'prompt is being read (prefill)',
  decode: 'answer is being written, token by token (decode)',
  resting: 'turn ended: the table rests, and keeps its blocks',
  preempted: 'turn was preempted',
}

const RELEASED = {
  free: (blocks) => `${named(blocks, true)} ${are(blocks)} free again.`,
  idle: (blocks) => `${named(blocks, true)} ${are(blocks)} idle: held by nobody, but ${blocks.length > 1 ? 'they' : 'it'} can still be found.`,
  used: (blocks, ref) =>
    blocks.length > 1
      ? `${named(blocks, true)} have one reader fewer.`
      : `Block ${blocks[0]} has one reader fewer: ${ref} left.`,
}

function named(blocks, first = false) {
  const noun = blocks.length === 1 ? 'block' : 'blocks'
  return `${first ? noun[0].toUpperCase() + noun.slice(1) : noun} ${ids(blocks)}`
}

function are(blocks) {
  return blocks.length === 1 ? 'is' : 'are'
}

function readers(others, fromSystem) {
  if (others > 0) return `that ${count(others)} ${others === 1 ? 'other reads' : 'others read'}`
  return fromSystem ? 'of the pinned system prompt' : 'that is published'
}

const MARKS = { copy: '◆', share: '●', allocate: '▲', release: '▽', evict: '✕', preempt: '✕', fork: '├', write: '▪' }

/** The section "What just happened". */
export class Narration {
  constructor(story, select) {
    this.story = story
    this.select = select
    this.filter = 'all'
    const filter = choice('Which events', { mine: 'Yours', copies: 'Copies', all: 'All' }, this.filter, (value) => {
      this.filter = value
      this.update()
    })
    this.list = el('ol', { class: 'kv-events', tabIndex: 0, 'aria-label': 'Last events, newest first' })
    this.empty = el('p', { class: 'kv-quiet' })
    this.root = section('What just happened', 'event', [this.empty, this.list], filter)
  }

  update() {
    const lines = this.story.lines(this.filter).slice(-SHOWN).reverse()
    setText(this.empty, lines.length ? '' : this._nothing())
    this.empty.hidden = lines.length > 0
    this.list.hidden = !lines.length
    reconcile(this.list, lines, (line) => line.id, (line) => this._create(line), (node, line) => this._update(node, line))
  }

  _nothing() {
    return this.story.model.scope === 'self' ? 'This server shows states only, no single events.' : EMPTY[this.filter]
  }

  _create(line) {
    const node = el('li', {}, [el('span', { class: 'kv-mark', 'aria-hidden': 'true' }), el('span', { class: 'kv-told' })])
    node.addEventListener('pointerenter', () => this.select.hover(node.blocks))
    node.addEventListener('pointerleave', () => this.select.hover(null))
    node.addEventListener('click', () => this.select.pin(node.blocks))
    return node
  }

  _update(node, line) {
    node.dataset.kind = line.kind
    node.blocks = [...line.sources, ...line.blocks]
    setText(node.firstChild, MARKS[line.kind] ?? '·')
    setText(node.lastChild, tell(line, this.story.isMine(line)))
  }
}

const EMPTY = {
  mine: 'Nothing yet. Send a message, and your blocks tell their story here.',
  copies: 'No copy yet. The first message of a session makes one where the system prompt ends inside a block.',
  all: 'Nothing yet.',
}
