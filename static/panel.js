// The live block-table panel. `mount(element)` is all that a page needs to call.

import { Selection, Tooltip, el, section, setData, setText, term } from './dom.js'
import { Feed, OwnTokens } from './feed.js'
import { count, plural } from './format.js'
import { Ledger } from './ledger.js'
import { PoolMap } from './map.js'
import { Model, ROLES } from './model.js'
import { Narration, Story } from './narrate.js'
import { Tables } from './tables.js'
import { FADES } from './tree.js'

const TEXT_INTERVAL = 120 // ms between updates of numbers and tables; the map follows every frame
const TABLE_INTERVAL = 1000 // ms between updates of the plain table, while it is open
const TABLE_ROWS = 200

/**
 * Show the panel in `element`, and keep it live until the element leaves the document.
 *
 * Options: `base`, the URL below which `kv/events` is (default: the folder above this module); `viewer`, a function that
 * gives `{token, session}` or null (default: `window.chatpageViewer`).
 *
 * Returns the panel: `{model, unmount()}`. The model is also at `element.__kvModel`.
 */
export function mount(element, options = {}) {
  element.__kvPanel?.unmount()
  const panel = new Panel(element, options)
  element.__kvPanel = panel
  element.__kvModel = panel.model
  return panel
}

class Panel {
  constructor(element, { base = new URL('..', import.meta.url), viewer = () => window.chatpageViewer ?? null }) {
    this.element = element
    this.viewer = viewer
    this.model = new Model()
    this.select = new Selection()
    this.story = new Story(this.model)
    this._listeners = new AbortController()
    this._build()
    this._connect(base)
    this._listen()
    loadStyle().then(() => {
      this.root.hidden = false
      this.map.layout()
    })
  }

  // -- parts ------------------------------------------------------------------------------------------------------

  _build() {
    this.header = new Header((paused) => this.feed.setPaused(paused))
    this.map = new PoolMap(this)
    this.pool = new Pool(this)
    this.tables = new Tables(this.model, this.select)
    this.ledger = new Ledger(this.model)
    this.narration = new Narration(this.story, this.select)
    this.body = el('div', { class: 'kv-body', hidden: '' }, [
      this.pool.root,
      this.tables.root,
      this.ledger.root,
      this.narration.root,
    ])
    this.root = el('div', { class: 'kv-panel', dataset: { testid: 'kv-panel' }, hidden: '' }, [this.header.root, this.body])
    this.root.__kvModel = this.model
    this.tooltip = new Tooltip(this.root)
    this.element.replaceChildren(this.root)
    this._followTheme()
  }

  _connect(base) {
    this.model.onEvent = (event, session) => {
      this.story.add(event, session)
      if (this.tables.dropped.note(event, session)) this._drawOnceFaded()
      if (event.kind === 'copy') this._copies.push(event)
    }
    this._copies = []
    this.feed = new Feed({
      base,
      model: this.model,
      viewer: this.viewer,
      onStatus: (state, detail) => this.header.setStatus(state, detail),
      onSnapshot: () => this._loaded(),
      onDelta: (delta) => this._moved(delta),
    })
    this.own = new OwnTokens({ base, viewer: this.viewer, onTokens: (body) => this._gotTokens(body) })
    this._setViewer()
    this.feed.start()
  }

  _listen() {
    const { signal } = this._listeners
    window.addEventListener('chatpage:viewer', () => this._newViewer(), { signal })
    document.addEventListener('visibilitychange', () => this._schedule(), { signal })
    this.root.addEventListener('keydown', (event) => event.key === 'Escape' && this.select.clear(), { signal })
    this.select.addEventListener('change', () => this._highlight(), { signal })
    this._watch = setInterval(() => this.element.isConnected || this.unmount(), 1000)
  }

  unmount() {
    clearInterval(this._watch)
    clearTimeout(this._timer)
    clearTimeout(this._fadeTimer)
    cancelAnimationFrame(this._frame)
    this._listeners.abort()
    this._themeWatch.disconnect()
    this.feed.stop()
    this.own.stop()
    this.map.destroy()
    this.root.remove()
    if (this.element.__kvPanel === this) delete this.element.__kvPanel
  }

  /** Dark as the page around is: Gradio marks its body, elsewhere the system decides. */
  _followTheme() {
    const system = matchMedia('(prefers-color-scheme: dark)')
    const apply = () => {
      const dark = window.gradio_config ? document.body.classList.contains('dark') : system.matches
      this.root.classList.toggle('kv-dark', dark)
      this.map.redraw()
    }
    this._themeWatch = new MutationObserver(apply)
    this._themeWatch.observe(document.body, { attributes: true, attributeFilter: ['class'] })
    system.addEventListener('change', apply, { signal: this._listeners.signal })
    apply()
  }

  // -- what comes in ----------------------------------------------------------------------------------------------

  _setViewer() {
    const session = this.viewer()?.session
    this.model.own = session === undefined ? null : session
    this.story.ownChanged()
    this.tables.tokens = null
    this.own.poke()
  }

  _newViewer() {
    this._setViewer()
    this.feed.viewerChanged()
    this._schedule()
  }

  _loaded() {
    if (this._epoch !== this.model.epoch) {
      this.story.clear()
      this.tables.dropped.clear()
    }
    this._epoch = this.model.epoch
    this.body.hidden = false
    this._whole = true
    this.own.poke()
    this._schedule()
  }

  _moved({ events }) {
    const { model } = this
    if (model.own !== null && events.some((e) => (e.session ?? model.sessionOf(e.sequence)) === model.own)) this.own.poke()
    this._schedule()
  }

  _gotTokens(body) {
    if (body.session !== undefined && body.session !== this.model.own) {
      this.model.own = body.session
      this.story.ownChanged()
    }
    this.tables.tokens = body
    this._schedule()
  }

  /** What was dropped goes away, even if nothing else happens. */
  _drawOnceFaded() {
    clearTimeout(this._fadeTimer)
    this._fadeTimer = setTimeout(() => this._schedule(), FADES + 20)
  }

  // -- what is drawn, and when --------------------------------------------------------------------------------------

  _schedule() {
    if (this._frame || document.hidden) return
    this._frame = requestAnimationFrame(() => {
      this._frame = 0
      if (this.model.loaded) this._draw()
    })
  }

  _draw() {
    const dirty = this.model.takeDirty()
    if (this._whole) this.map.reload()
    else this.map.update(dirty)
    this._whole = false
    for (const { source, block } of this._copies.splice(0)) this.map.flash(source, block)
    const wait = TEXT_INTERVAL - (performance.now() - (this._drawn ?? -Infinity))
    if (wait <= 0) this._drawText()
    else this._timer ??= setTimeout(() => this._drawText(), wait)
  }

  _drawText() {
    clearTimeout(this._timer)
    this._timer = undefined
    this._drawn = performance.now()
    this.header.update(this.model)
    this.pool.update()
    this.tables.update()
    this.ledger.update()
    this.narration.update()
    this._highlight()
  }

  /** Mark the selected blocks wherever they are shown. */
  _highlight() {
    const blocks = new Set(this.select.blocks.map(String))
    for (const node of this.root.querySelectorAll('.kv-selected')) {
      if (!blocks.has(node.dataset.block)) node.classList.remove('kv-selected')
    }
    if (blocks.size) {
      for (const node of this.root.querySelectorAll('.kv-chip, .kv-token-block')) {
        if (blocks.has(node.dataset.block)) node.classList.add('kv-selected')
      }
    }
    this.pool.updateInspector()
  }
}

/** Title, state of the connection, pause; and what is in force. */
class Header {
  constructor(onPause) {
    this.dot = el('span', { class: 'kv-dot', 'aria-hidden': 'true' })
    this.word = el('span', { text: 'connecting' })
    this.status = el('span', { class: 'kv-status', role: 'status', dataset: { testid: 'kv-status', state: 'connecting' } }, [this.dot, this.word])
    this.pause = el('button', { class: 'kv-button', type: 'button', text: 'Pause', 'aria-pressed': 'false' })
    this.pause.addEventListener('click', () => this._toggle(onPause))
    this.force = el('p', { class: 'kv-force' })
    this.detail = el('p', { class: 'kv-teach', text: 'Waiting for the engine’s first snapshot.' })
    const bar = el('div', { class: 'kv-head-bar' }, [el('h2', {}, [term('KV cache in blocks', 'panel')]), this.status, this.pause])
    this.root = el('header', { class: 'kv-head' }, [bar, this.force, this.detail])
    this._facts()
  }

  _facts() {
    this.facts = {}
    for (const [name, label] of [['block size', 'Block size'], ['sharing', 'Sharing'], ['scope', 'Shown']]) {
      const value = (this.facts[name] = el('b', { text: '–' }))
      this.force.append(el('span', { class: 'kv-fact' }, [term(label, name), value]))
    }
  }

  _toggle(onPause) {
    const paused = this.pause.getAttribute('aria-pressed') !== 'true'
    this.pause.setAttribute('aria-pressed', String(paused))
    setText(this.pause, paused ? 'Resume' : 'Pause')
    onPause(paused)
  }

  setStatus(state, detail) {
    setData(this.status, { state })
    setText(this.word, state)
    const said = state === 'off' ? 'This server does not show its blocks' : detail
    if (said) setText(this.detail, `${said.replace(/\.$/, '')}.`)
    this.detail.hidden = state !== 'off' && (this._loaded || !this.detail.textContent)
  }

  update(model) {
    this._loaded = true
    this.detail.hidden = true
    setText(this.facts['block size'], plural(model.blockSize, 'token'))
    setText(this.facts.sharing, model.sharing)
    setText(this.facts.scope, model.scope)
  }
}

const LEGEND = { private: 'One session', system: 'System prompt', shared: 'Other shared', idle: 'Idle', free: 'Free' }
const PARTS = { shared: ['Shared', 'sharedCount'], pinned: ['Pinned', 'pinned'], resting: ['Resting', 'resting'] }
const TALLIES = {
  hit_tokens: ['Prefix hits', 'hits'],
  copied: ['Copied', 'copies'],
  evicted: ['Evicted', 'evictions'],
  preempted: ['Preempted', 'preemptions'],
}

/** The map with its numbers: legend and counts in one, the inspector, the counters, and the same as a table. */
class Pool {
  constructor({ model, select, map }) {
    Object.assign(this, { model, select, map })
    this.total = el('span', { class: 'kv-total' })
    this.inspector = el('p', { class: 'kv-inspector' })
    // Read aloud only to whoever walks the map by keys, not whenever a pointer passes over something.
    map.root.addEventListener('focus', () => this.inspector.setAttribute('aria-live', 'polite'))
    map.root.addEventListener('blur', () => this.inspector.removeAttribute('aria-live'))
    this._buildCounts()
    this._buildTallies()
    this._buildTable()
    this.root = section('Block pool', 'pool', [this.legend, map.root, this.inspector, this.tallies, this.details], this.total)
  }

  _buildCounts() {
    this.legend = el('div', { class: 'kv-legend', role: 'group', 'aria-label': 'Blocks by what they are', dataset: { testid: 'kv-counts' } })
    this.numbers = {}
    for (const [role, label] of Object.entries(LEGEND)) {
      const value = (this.numbers[role] = el('b'))
      const swatch = el('span', { class: 'kv-swatch', dataset: { role }, 'aria-hidden': 'true' })
      const button = el('button', { type: 'button', class: 'kv-key', 'aria-pressed': 'false', dataset: { tip: `${TERM_OF_ROLE[role]} Click to show these alone.` } }, [swatch, value, el('span', { text: label })])
      button.addEventListener('click', () => this._focus(role, button))
      this.legend.append(button)
    }
    this.yours = el('b')
    const ring = el('span', { class: 'kv-swatch', dataset: { role: 'yours' }, 'aria-hidden': 'true' })
    this.legend.append(el('span', { class: 'kv-key' }, [ring, this.yours, term('Yours', 'yours')]))
  }

  /** Show one role alone; a second click shows all again. */
  _focus(role, button) {
    this.map.focusRole = this.map.focusRole === role ? null : role
    for (const other of this.legend.querySelectorAll('button.kv-key')) {
      other.setAttribute('aria-pressed', String(other === button && this.map.focusRole === role))
    }
    this.map.redraw()
  }

  _buildTallies() {
    this.tallies = el('dl', { class: 'kv-tallies' })
    this.parts = {}
    for (const [name, labels] of Object.entries({ ...PARTS, ...TALLIES })) this.parts[name] = this._tally(...labels)
    this.parts.copied.dataset.testid = 'kv-copies'
  }

  _tally(label, tip) {
    const value = el('dd')
    this.tallies.append(el('div', {}, [el('dt', {}, [term(label, tip)]), value]))
    return value
  }

  update() {
    const counts = this.model.counts(), roles = this.model.roles(), { counters } = this.model
    setData(this.legend, counts)
    for (const role of ROLES) setText(this.numbers[role], count(roles[role]))
    setText(this.yours, count(this.model.ownBlocks().size))
    setText(this.total, `${count(counts.used)} of ${plural(this.model.numBlocks, 'block')} used`)
    for (const name of Object.keys(PARTS)) setText(this.parts[name], count(counts[name]))
    for (const name of Object.keys(TALLIES)) setText(this.parts[name], count(counters[name]))
    setData(this.parts.copied, { count: counters.copied })
    this.map.describe(counts, roles)
    if (this.details.open && performance.now() - this._tableDrawn > TABLE_INTERVAL) this._updateTable()
  }

  updateInspector() {
    const { blocks, note } = this.select
    setText(this.inspector, note && blocks.length !== 1 ? note : blocks.length === 1 ? `${note} ${describe(this.model, blocks[0])}`.trim() : REST)
    this.inspector.classList.toggle('kv-quiet', !blocks.length)
  }

  // -- the same as a table ----------------------------------------------------------------------------------------

  _buildTable() {
    const head = el('tr', {}, ['Block', 'Kind', 'References', 'Slots filled', 'In the tables of'].map((text) => el('th', { scope: 'col', text })))
    this.rows = el('tbody')
    this.rest = el('p', { class: 'kv-quiet' })
    this.details = el('details', { class: 'kv-plain' }, [
      el('summary', { text: 'View as table' }),
      el('div', { class: 'kv-plain-scroll', tabIndex: 0, role: 'region', 'aria-label': 'Blocks as a table' }, [el('table', {}, [el('thead', {}, [head]), this.rows])]),
      this.rest,
    ])
    this.details.addEventListener('toggle', () => this.details.open && this._updateTable())
  }

  _updateTable() {
    this._tableDrawn = performance.now()
    const { model } = this
    const blocks = []
    for (let block = 1; block <= model.numBlocks; block++) if (model.role(block) !== 'free') blocks.push(block)
    this.rows.replaceChildren(...blocks.slice(0, TABLE_ROWS).map((block) => tableRow(model, block)))
    const left = blocks.length - TABLE_ROWS
    const free = `${plural(model.numBlocks - blocks.length, 'free block')} left out.`
    setText(this.rest, left > 0 ? `and ${count(left)} more; ${free}` : free)
  }
}

const REST = 'Point at a block, a token or a session; click to keep it; arrow keys work in the map.'

const TERM_OF_ROLE = Object.fromEntries(ROLES.map((role) => [role, term('', role).dataset.tip]))

function tableRow(model, block) {
  const slots = `${model.fill[block]} of ${model.blockSize}`
  const cells = [String(block), LEGEND[model.role(block)], String(model.ref[block]), slots, who(model, block) || 'nobody']
  return el('tr', {}, cells.map((text) => el('td', { text })))
}

/** Everything about one block, in one line or two. */
function describe(model, block) {
  const role = model.role(block)
  if (role === 'free') return `Block ${block}: free.`
  const slots = `${model.fill[block]} of ${model.blockSize} slots`
  if (role === 'idle') return `Block ${block}: idle, ${slots} still hold what was written. Held by nobody.`
  const shared = model.acrossSessions().has(block) ? 'shared by several sessions' : 'shared'
  const kind = role === 'system' ? 'system prompt, pinned' : role === 'shared' ? shared : 'one session'
  const holders = who(model, block), copy = model.copiedFrom.get(block)
  return [
    `Block ${block}: ${kind}, reference count ${model.ref[block]}, ${slots}.`,
    holders && `In the tables of ${holders}.`,
    copy && `Copied on write from block ${copy.source}${copy.fill < model.blockSize ? ` after ${plural(copy.fill, 'slot')}` : ''}.`,
  ].filter(Boolean).join(' ')
}

function who(model, block) {
  const holders = model.holders(block)
  const own = holders.find((holder) => holder.session === model.own)
  const others = [...new Set(holders.filter((holder) => holder.session !== model.own).map((holder) => holder.session))]
  const named = others.slice(0, 5).join(', ')
  const more = others.length > 5 ? ` and ${count(others.length - 5)} more` : ''
  const parts = []
  if (own) parts.push(`you (logical ${own.logical})`)
  if (others.length) parts.push(`${others.length === 1 ? 'session' : 'sessions'} ${named}${more}`)
  return parts.join(', ')
}

/** The style sheet beside this module, once for the whole page. */
function loadStyle() {
  const href = new URL('panel.css', import.meta.url).href
  let link = [...document.querySelectorAll('link[rel=stylesheet]')].find((other) => other.href === href)
  if (!link) {
    link = el('link', { rel: 'stylesheet', href })
    document.head.append(link)
  }
  if (link.sheet) return Promise.resolve()
  return new Promise((resolve) => {
    link.addEventListener('load', resolve, { once: true })
    link.addEventListener('error', resolve, { once: true })
  })
}
