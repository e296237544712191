// The state of the block pool as the viewer knows it: a snapshot, moved on by events.
//
// Mirrors `Snapshot.apply` in chatpage/events.py, kind by kind. No DOM: it runs in Node too.

export const FREE = 0, IDLE = 1, USED = 2
const BLOCK_STATES = { free: FREE, idle: IDLE, used: USED }

/** What a block means to somebody who looks at it; the map and the legend draw these. */
export const ROLES = ['free', 'idle', 'private', 'system', 'shared']

export const COUNTERS = ['allocated', 'freed', 'copied', 'published', 'evicted', 'preempted', 'hit_tokens']

/** Events are missing between what the model knows and what came: only a new snapshot can help. */
export class Gap extends Error {}

export class Model {
  constructor() {
    this.loaded = false
    this.epoch = ''
    this.seq = 0
    this.blockSize = 16
    this.numBlocks = 0
    this.bytesPerBlock = 0
    this.maxModelLen = 0
    this.scope = ''
    this.sharing = ''
    /** Pseudonym of the viewer's own session, or null. */
    this.own = null
    /** Called with (event, session id) before an event is applied, so that the state before it can be told. */
    this.onEvent = null
    /** Blocks that look different since `takeDirty` was called last. */
    this.dirty = new Set()
    this._totals = {}
    this._clear(0)
  }

  _clear(numBlocks) {
    this.numBlocks = numBlocks
    this.state = new Uint8Array(numBlocks + 1) // index 0 is the null block, never shown
    this.ref = new Uint16Array(numBlocks + 1)
    this.fill = new Uint8Array(numBlocks + 1)
    this.pinned = new Uint8Array(numBlocks + 1)
    this._held = new Uint16Array(numBlocks + 1)
    this.copiedFrom = new Map() // block -> {source, fill}: what it was copied from, as far as the events told
    this.system = new Map() // name -> {name, tokens, table}
    this._across = null
    this.sessions = new Map() // id -> Session; its sequences are {id, state, parent, at, tokens, table}
    this._sequences = new Map() // sequence id -> {session, view}
    this.counters = Object.fromEntries(COUNTERS.map((name) => [name, 0]))
  }

  /** Start anew from the body of `GET /kv/snapshot`. */
  load(snapshot) {
    this._clear(snapshot.num_blocks)
    this.epoch = snapshot.epoch
    this.seq = snapshot.seq
    this.blockSize = snapshot.block_size
    this.bytesPerBlock = snapshot.bytes_per_block
    this.maxModelLen = snapshot.max_model_len
    this.scope = snapshot.scope
    this.sharing = snapshot.sharing
    this.state.set(bytesOf(snapshot.pool.state), 1)
    this.fill.set(bytesOf(snapshot.pool.fill), 1)
    this.ref.set(littleEndian16(bytesOf(snapshot.pool.ref)), 1)
    for (const { name, tokens, table } of snapshot.system) this._addSystem(name, tokens, expand(table))
    for (const session of snapshot.sessions) this._addSession(session)
    Object.assign(this.counters, snapshot.counters)
    this._totals = snapshot.blocks
    this.loaded = true
    this.dirty.clear()
  }

  _addSystem(name, tokens, table) {
    this.system.set(name, { name, tokens, table })
    for (const block of table) this.pinned[block] = 1
  }

  _addSession({ id, sequences }) {
    const session = new Session(id)
    this.sessions.set(id, session)
    for (const s of sequences) {
      this._addSequence(session, { ...s, table: expand(s.table) })
    }
  }

  _addSequence(session, view) {
    session.sequences.set(view.id, view)
    this._sequences.set(view.id, { session, view })
  }

  /** Move on by one message of the event stream: `{seq: [first, last], events: […]}`, every number in it once. */
  applyDelta({ seq: [first, last], events }) {
    if (last <= this.seq) return // seen already, before a reconnection
    for (const event of events) if (event.seq > this.seq) this.apply(event)
    if (this.seq !== last) throw new Gap(`events ${first} to ${last} do not lead on to event ${last}`)
  }

  /** Move on by one event. Throws `Gap` if it is not the next one, or names what is not there. */
  apply(event) {
    if (event.seq !== this.seq + 1) throw new Gap(`event ${event.seq} cannot follow event ${this.seq}`)
    const change = this[`_on_${event.kind}`]
    if (!change) throw new Gap(`event ${event.seq} is of an unknown kind: ${event.kind}`)
    if (this.onEvent) this.onEvent(event, event.session ?? this.sessionOf(event.sequence))
    change.call(this, event)
    this.seq = event.seq
  }

  // -- one method a kind, as in chatpage/events.py ----------------------------------------------------------------

  _find(event) {
    const found = this._sequences.get(event.sequence)
    if (!found) throw new Gap(`event ${event.seq} names sequence ${event.sequence}, which is not there`)
    return found.view
  }

  _place(event) {
    const sequence = this._find(event)
    if (event.logical > sequence.table.length) throw new Gap(`event ${event.seq} leaves a hole in a table`)
    this.dirty.add(sequence.table[event.logical] ?? event.block) // the one that it replaces loses the own ring
    sequence.table[event.logical] = event.block
    return sequence
  }

  _on_state({ session: id, sequence, state }) {
    let session = this.sessions.get(id)
    if (!session) this.sessions.set(id, (session = new Session(id)))
    const view = session.sequences.get(sequence)
    if (view) view.state = state
    else this._addSequence(session, newSequence(sequence, state))
  }

  _on_fork({ seq, session: id, sequence, parent, at }) {
    const session = this.sessions.get(id)
    if (!session) throw new Gap(`event ${seq} names session ${id}, which is not there`)
    const like = session.sequences.get(sequence) ?? this._sequences.get(parent)?.view
    if (!like) throw new Gap(`event ${seq} names sequence ${parent}, which is not there`)
    this._addSequence(session, newSequence(sequence, like.state, parent, at))
  }

  _on_allocate(event) {
    this._place(event)
    this._set(event.block, USED, event.ref)
    this.fill[event.block] = 0
    this.copiedFrom.delete(event.block)
    this.counters.allocated++
  }

  _on_share(event) {
    const sequence = this._place(event)
    if (event.reason === 'prefix hit') this.counters.hit_tokens += event.at - sequence.tokens
    sequence.tokens = event.at
    this._set(event.block, USED, event.ref)
  }

  _on_write(event) {
    this._find(event).tokens = event.at
    this.fill[event.block] = event.fill
    this.dirty.add(event.block)
  }

  _on_copy(event) {
    this.fill[event.block] = event.fill
    this.copiedFrom.set(event.block, { source: event.source, fill: event.fill })
    this.counters.copied++
    this.dirty.add(event.block)
  }

  _on_publish() {
    this.counters.published++
  }

  _on_unpublish() {} // being findable is not visible from outside

  _on_release({ block, ref, becomes }) {
    this._set(block, BLOCK_STATES[becomes], ref)
    if (becomes === 'free') this._free(block)
  }

  _on_pin({ block, ref, name, at }) {
    this._set(block, USED, ref)
    if (!this.system.has(name)) this._addSystem(name, at, [])
    this.system.get(name).table.push(block)
    this.pinned[block] = 1
  }

  _on_evict({ block }) {
    this._free(block)
    this.counters.evicted++
  }

  _on_truncate(event) {
    const sequence = this._find(event)
    sequence.tokens = event.at
    const keep = Math.ceil(event.at / this.blockSize)
    for (const block of sequence.table.slice(keep)) this.dirty.add(block)
    sequence.table.length = Math.min(sequence.table.length, keep)
  }

  _on_preempt(event) {
    this._find(event).state = 'preempted'
    this.counters.preempted++
  }

  _on_end({ sequence }) {
    const found = this._sequences.get(sequence)
    if (!found) return
    this._sequences.delete(sequence)
    found.session.sequences.delete(sequence)
    if (!found.session.sequences.size) this.sessions.delete(found.session.id)
    for (const block of found.view.table) this.dirty.add(block)
  }

  _set(block, state, ref) {
    this.state[block] = state
    this.ref[block] = ref
    this.dirty.add(block)
  }

  _free(block) {
    this._set(block, FREE, 0)
    this.fill[block] = 0
    this.copiedFrom.delete(block)
    this.counters.freed++
  }

  // -- what is read off it ----------------------------------------------------------------------------------------

  takeDirty() {
    const dirty = this.dirty
    this.dirty = new Set()
    return dirty
  }

  sessionOf(sequence) {
    return this._sequences.get(sequence)?.session.id ?? null
  }

  ownSession() {
    return this.own === null ? null : (this.sessions.get(this.own) ?? null)
  }

  /** Blocks in the viewer's own tables. */
  ownBlocks() {
    const blocks = new Set()
    for (const { table } of this.ownSession()?.sequences.values() ?? []) for (const block of table) blocks.add(block)
    return blocks
  }

  role(block) {
    if (this.state[block] === FREE) return 'free'
    if (this.state[block] === IDLE) return 'idle'
    if (this.pinned[block]) return 'system'
    return this.ref[block] >= 2 ? 'shared' : 'private'
  }

  /** Numbers of blocks by role; they add up to `numBlocks`. */
  roles() {
    const roles = Object.fromEntries(ROLES.map((role) => [role, 0]))
    for (let block = 1; block <= this.numBlocks; block++) roles[this.role(block)]++
    if (!this._hidesOthers()) return roles
    const { free, idle, used } = this._totals
    return { ...roles, free, idle, private: used - roles.system - roles.shared }
  }

  /** In the scope `self` the others' blocks are not in the pool that is sent, only in the totals. */
  _hidesOthers() {
    return this.scope === 'self'
  }

  /** `free + idle + used = numBlocks`; shared, pinned and resting are parts of used. */
  counts() {
    if (this._hidesOthers()) return { ...this._totals }
    const counts = { free: 0, idle: 0, used: 0, shared: 0, pinned: 0, resting: 0 }
    const held = this._heldByResting()
    for (let block = 1; block <= this.numBlocks; block++) {
      if (this.state[block] === FREE) counts.free++
      else if (this.state[block] === IDLE) counts.idle++
      else counts.used++
      if (this.ref[block] >= 2) counts.shared++
      if (this.pinned[block]) counts.pinned++
      else if (held[block] && held[block] === this.ref[block]) counts.resting++
    }
    return counts
  }

  _heldByResting() {
    const held = this._held.fill(0)
    for (const { view } of this._sequences.values()) {
      if (view.state === 'resting') for (const block of view.table) held[block]++
    }
    return held
  }

  /** Who has this block in a table: `[{session, sequence, logical}]`. */
  holders(block) {
    const holders = []
    for (const session of this.sessions.values()) {
      for (const { id, table } of session.sequences.values()) {
        const logical = table.indexOf(block)
        if (logical >= 0) holders.push({ session: session.id, sequence: id, logical })
      }
    }
    return holders
  }

  /** Blocks outside the system prompts that are in tables of several sessions: block -> the ids of these sessions. */
  acrossSessions() {
    if (this._across?.seq === this.seq) return this._across.blocks
    const across = new Map()
    for (const { id, sequences } of this.sessions.values()) {
      for (const { table } of sequences.values()) {
        for (const block of table) {
          if (this.ref[block] < 2 || this.pinned[block]) continue
          if (across.has(block)) across.get(block).add(id)
          else across.set(block, new Set([id]))
        }
      }
    }
    for (const [block, sessions] of across) if (sessions.size < 2) across.delete(block)
    this._across = { seq: this.seq, blocks: across }
    return across
  }

  /** Sessions whose table holds the first block of a system prompt. */
  sharers(system) {
    const first = system.table[0]
    if (this._hidesOthers()) return this.ref[first] ?? 0
    let sharers = 0
    for (const { sequences } of this.sessions.values()) {
      for (const { table } of sequences.values()) {
        if (table[0] === first && first !== undefined) {
          sharers++
          break
        }
      }
    }
    return sharers
  }

  /** How far a table follows a system prompt: `{system, blocks}`, or null where it shares no block with any. */
  trunkOf(table) {
    for (const system of this.system.values()) {
      let blocks = 0
      while (blocks < table.length && table[blocks] === system.table[blocks]) blocks++
      if (blocks) return { system, blocks }
    }
    return null
  }

  /**
   * Paged memory beside one contiguous reservation of `maxModelLen` slots for each sequence. Exact integers.
   *
   * `saved` counts references beyond the first; `empty` counts slots of used blocks that hold nothing yet.
   */
  ledger() {
    const ledger = { sequences: 0, tokens: 0, reserved: 0, blocks: 0, slots: 0, empty: 0, saved: 0 }
    for (const { view } of this._sequences.values()) {
      if (!view.tokens) continue
      ledger.sequences++
      ledger.tokens += view.tokens
    }
    ledger.reserved = ledger.sequences * this.maxModelLen
    for (let block = 1; block <= this.numBlocks; block++) {
      if (this.state[block] !== USED) continue
      ledger.blocks++
      ledger.empty += this.blockSize - this.fill[block]
      if (this.ref[block] >= 2) ledger.saved += this.ref[block] - 1
    }
    ledger.slots = ledger.blocks * this.blockSize
    return ledger
  }

  /** The body of `GET /kv/snapshot` for this state, without its time. */
  toJSON() {
    return {
      v: 1,
      epoch: this.epoch,
      seq: this.seq,
      block_size: this.blockSize,
      num_blocks: this.numBlocks,
      bytes_per_block: this.bytesPerBlock,
      max_model_len: this.maxModelLen,
      scope: this.scope,
      sharing: this.sharing,
      blocks: this.counts(),
      counters: { ...this.counters },
      pool: {
        state: base64(this.state.subarray(1)),
        ref: base64(bytes16(this.ref.subarray(1))),
        fill: base64(this.fill.subarray(1)),
      },
      system: [...this.system.values()].map(({ name, tokens, table }) => ({ name, tokens, table: runs(table) })),
      sessions: [...this.sessions.values()].map(({ id, state, sequences }) => ({
        id,
        state,
        tokens: [...sequences.values()].reduce((sum, s) => sum + s.tokens, 0),
        sequences: [...sequences.values()].map((s) => ({ ...s, table: runs(s.table) })),
      })),
    }
  }
}

// What a session does, if its sequences differ.
const FOREMOST = ['decode', 'prefill', 'preempted', 'queued', 'resting']

class Session {
  constructor(id) {
    this.id = id
    this.sequences = new Map() // at least one
  }

  get state() {
    const states = [...this.sequences.values()].map(({ state }) => state)
    return FOREMOST.find((state) => states.includes(state))
  }
}

function newSequence(id, state, parent = null, at = null) {
  return { id, state, parent, at, tokens: 0, table: [] }
}

/** A table as it is on the wire, `[3, [5, 3]]`, written out: `[3, 5, 6, 7]`. */
export function expand(table) {
  return table.flatMap((item) => (Array.isArray(item) ? Array.from({ length: item[1] }, (_, i) => item[0] + i) : item))
}

/** The inverse of `expand`: neighbours become `[first, length]`. */
export function runs(table) {
  const out = []
  let start = 0
  for (let i = 1; i <= table.length; i++) {
    if (i < table.length && table[i] === table[i - 1] + 1) continue
    out.push(i - start > 1 ? [table[start], i - start] : table[start])
    start = i
  }
  return out
}

function bytesOf(text) {
  return Uint8Array.from(atob(text), (c) => c.charCodeAt(0))
}

function littleEndian16(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  return Uint16Array.from({ length: bytes.length / 2 }, (_, i) => view.getUint16(2 * i, true))
}

function bytes16(values) {
  const view = new DataView(new ArrayBuffer(2 * values.length))
  values.forEach((value, i) => view.setUint16(2 * i, value, true))
  return new Uint8Array(view.buffer)
}

function base64(bytes) {
  let text = ''
  for (const byte of bytes) text += String.fromCharCode(byte)
  return btoa(text)
}
