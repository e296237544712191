// A session's block tables as a fork tree: what they share is in it once, as the trunk; and what was dropped from it.
// No DOM: it runs in Node too.

export const FADES = 1500 // ms that a dropped branch stays visible
const FADING = 4 // of one session at once: each of these stays for its time, the rest is only counted

const UNKNOWN = -1

/** Reasons for which a sequence ends although it could have gone on, and what it was. */
const DROPPED = {
  'a likelier beam went on': 'beam',
  'better beams have finished': 'beam',
  'another reply was chosen': 'reply',
}

/** What was dropped, if this is the end of it: `beam`, `reply` or undefined. */
export function dropped({ kind, reason }) {
  return kind === 'end' ? DROPPED[reason] : undefined
}

/** Whether blocks go because their sequence is being dropped. */
export function isDropping({ kind, reason }) {
  return (kind === 'truncate' || kind === 'release') && reason in DROPPED
}

/**
 * The tree of these sequences (at least one): `{from, blocks, sequences, ends, children}`.
 *
 * `blocks` are in the tables of all `sequences`, as logical blocks `from`, `from` + 1 …; `children` are the trees of
 * those that go on with blocks of their own, and `ends` are those whose table ends here.
 *
 *     tables   1: 5 6 7        5 6 ┬ 7       1
 *              2: 5 6 8 9          └ 8 ┬ 9   2
 *              3: 5 6 8                └     3, which ends with block 8
 */
export function forkTree(sequences, from = 0) {
  const { table } = sequences[0]
  let to = from
  while (to < table.length && sequences.every((sequence) => sequence.table[to] === table[to])) to++
  const ends = sequences.filter((sequence) => sequence.table.length <= to)
  const branches = new Map()
  for (const sequence of sequences) {
    const next = sequence.table[to]
    if (next === undefined) continue
    if (branches.has(next)) branches.get(next).push(sequence)
    else branches.set(next, [sequence])
  }
  const children = [...branches.values()].map((those) => forkTree(those, to))
  return { from, blocks: table.slice(from, to), sequences, ends, children }
}

/**
 * Where a branch of `tree` left its siblings, if that was inside a block, and so by copy-on-write: `{source, slots}`.
 *
 * `source` is the block that was copied, null where the copy was not seen (it was made before the snapshot). `slots` is
 * how many slots both hold alike, null where counts are told in whole blocks. Null: they parted between two blocks, or
 * nobody knows any more.
 */
export function parting(tree, branch, { copiedFrom, blockSize }) {
  const copy = copiedFrom.get(branch.blocks[0])
  if (copy) return { source: copy.source, slots: copy.fill < blockSize ? copy.fill : null }
  const leftIt = ({ blocks: [first] }) => copiedFrom.get(first)?.source === branch.blocks[0]
  if (branch === tree.children[0] || tree.children.some(leftIt)) return null // the one that the others left
  const siblings = tree.sequences.filter((sequence) => !branch.sequences.includes(sequence))
  const known = new Map(tree.sequences.map((sequence) => [sequence.id, sequence]))
  const forks = branch.sequences.flatMap((one) => siblings.map((other) => forkedAfter(one, other, known)))
  if (forks.includes(UNKNOWN)) return null
  const slots = Math.max(...forks) - branch.from * blockSize
  if (!(slots > 0 && slots <= blockSize)) return null
  return { source: null, slots: slots < blockSize ? slots : null }
}

/** How many tokens two sequences have in common by descent, if the line to their last common ancestor is not broken. */
function forkedAfter(one, other, known) {
  const line = lineage(one, known)
  for (const [id, at] of lineage(other, known)) if (line.has(id)) return Math.min(at, line.get(id))
  return UNKNOWN
}

/** A sequence and its ancestors: id → how many tokens it has from that one. */
function lineage(sequence, known) {
  const line = new Map([[sequence.id, Infinity]])
  let at = Infinity
  while (sequence && sequence.parent !== null && !line.has(sequence.parent)) {
    at = Math.min(at, sequence.at)
    line.set(sequence.parent, at)
    sequence = known.get(sequence.parent)
  }
  return line
}

/** The run of the tree in which a table that begins with `blocks` leaves it. */
export function leftFrom(tree, blocks) {
  const branch = tree.children.find(({ from, blocks: [first] }) => blocks[from] === first)
  return branch ? leftFrom(branch, blocks) : tree
}

/**
 * What was dropped: for a short while as it was, and counted for as long as the session's turn is.
 *
 * `note` takes every event before it is applied to the model; `now` is a clock in ms.
 */
export class Dropped {
  constructor(model, now = () => performance.now()) {
    this.model = model
    this.now = now
    this.clear()
  }

  clear() {
    this._counts = new Map() // session -> {beam, reply}
    this._fading = new Map() // session -> [{id, shared, blocks, until}]
    this._leaving = new Map() // sequence -> the blocks that it is giving back
  }

  /** Returns whether something was dropped that is to be shown. */
  note(event, session) {
    if (event.kind === 'state' && event.state === 'queued') this._newTurn(session)
    if (isDropping(event) && event.kind === 'truncate' && event.at === 0) this._leave(event.sequence, session)
    if (event.kind !== 'end') return false
    const leaving = this._leaving.get(event.sequence)
    this._leaving.delete(event.sequence)
    const what = dropped(event)
    if (this.model.sessions.get(session)?.sequences.size === 1) return this._forget(session)
    if (what) this._count(session, what)
    return Boolean(what && leaving && this._fade(session, leaving))
  }

  _newTurn(session) {
    const sequences = [...(this.model.sessions.get(session)?.sequences.values() ?? [])]
    if (sequences.every(({ state }) => state === 'resting')) this._counts.delete(session)
  }

  _forget(session) {
    this._counts.delete(session)
    this._fading.delete(session)
    return false
  }

  /** Its blocks may be somebody else's at once, so what it shared until now is noted now. */
  _leave(id, session) {
    const sequences = this.model.sessions.get(session)?.sequences
    const table = sequences?.get(id)?.table ?? []
    let shared = 0
    for (const other of sequences?.values() ?? []) {
      if (other.id === id) continue
      let same = 0
      while (same < table.length && table[same] === other.table[same]) same++
      shared = Math.max(shared, same)
    }
    this._leaving.set(id, { id, shared: table.slice(0, shared), blocks: table.slice(shared) })
  }

  _count(session, what) {
    const counts = this._counts.get(session) ?? { beam: 0, reply: 0 }
    counts[what]++
    this._counts.set(session, counts)
  }

  _fade(session, leaving) {
    const fading = this.fading(session)
    if (!leaving.blocks.length || fading.length === FADING) return false
    this._fading.set(session, [...fading, { ...leaving, until: this.now() + FADES }])
    return true
  }

  /** `[{id, shared, blocks}]`: sequences that were dropped a moment ago, with what they shared and what was their own. */
  fading(session) {
    const now = this.now()
    const fading = (this._fading.get(session) ?? []).filter(({ until }) => until > now)
    if (!fading.length) this._fading.delete(session)
    return fading
  }

  /** `{beam, reply}`: how many were dropped. */
  count(session) {
    return this._counts.get(session) ?? { beam: 0, reply: 0 }
  }
}
