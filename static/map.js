// The pool map: one cell a block, in the order of the block numbers.

import { count, plural } from './format.js'
import { el } from './dom.js'

const MARGIN = 4 // px around the cells, so that rings at the edge are whole
const LARGEST_CELL = 22, SMALLEST_CELL = 2
const TALLEST = 180 // px that all rows may take, where cells can be made small enough
const LEGIBLE_CELL = 3, TALLEST_LEGIBLE = 280 // px: before cells get smaller than this, the map gets taller
const WITH_FILL = 5 // px: from this size on a cell shows how full its block is
const WITH_COUNT = 16 // px: from here on it shows its reference count
const FLASH = 1200, FLASH_STILL = 2000 // ms that a copy is shown, moving and not

export class PoolMap {
  constructor({ model, select }) {
    this.model = model
    this.select = select
    this.focusRole = null // a role to show alone, the others dimmed
    this.cell = 0
    this._own = new Set()
    this._flashes = []
    this._cells = el('canvas', { class: 'kv-map-cells' })
    this._marks = el('canvas', { class: 'kv-map-marks' })
    this.root = el('div', { class: 'kv-map', tabIndex: 0, role: 'img', 'aria-label': 'Pool map' }, [this._cells, this._marks])
    this._listen()
    this._watch = new ResizeObserver(() => this.layout())
    this._watch.observe(this.root)
    select.addEventListener('change', () => this._drawMarks())
  }

  destroy() {
    this._watch.disconnect()
    cancelAnimationFrame(this._frame)
  }

  // -- size and colours -------------------------------------------------------------------------------------------

  /** Choose the largest cell with which all blocks fit, and draw everything. */
  layout() {
    const width = this.root.clientWidth
    if (!width || !this.model.numBlocks) return
    this._shape = `${this.model.numBlocks} in ${width}`
    this.cell = cellSize(this.model.numBlocks, width - 2 * MARGIN)
    this.gap = this.cell > 2 ? 1 : 0
    this.columns = Math.floor((width - 2 * MARGIN) / this.cell)
    this.rows = Math.ceil(this.model.numBlocks / this.columns)
    this._resize(width, this.rows * this.cell + 2 * MARGIN)
    this.redraw()
  }

  _resize(width, height) {
    const scale = (this._scale = window.devicePixelRatio || 1)
    this.root.style.height = `${height}px`
    for (const canvas of [this._cells, this._marks]) {
      canvas.width = Math.round(width * scale)
      canvas.height = Math.round(height * scale)
      canvas.style.width = `${width}px`
      canvas.style.height = `${height}px`
      canvas.getContext('2d').setTransform(scale, 0, 0, scale, 0, 0)
    }
  }

  /** Read the colours again and draw everything: the theme, the pool or the focus changed. */
  redraw() {
    if (!this.cell) return
    this._paint = paint(this.root, this._cells.getContext('2d'), this._scale)
    this._own = this.model.ownBlocks()
    for (let block = 1; block <= this.model.numBlocks; block++) this._drawCell(block)
    this._drawMarks()
  }

  /** A new snapshot: everything may have changed. */
  reload() {
    if (this._shape === `${this.model.numBlocks} in ${this.root.clientWidth}`) this.redraw()
    else this.layout()
  }

  /** Draw the cells that changed. */
  update(dirty) {
    if (!this.cell) return this.layout()
    const own = this.model.ownBlocks()
    for (const block of own) if (!this._own.has(block)) dirty.add(block)
    for (const block of this._own) if (!own.has(block)) dirty.add(block)
    this._own = own
    for (const block of dirty) this._drawCell(block)
  }

  // -- cells ------------------------------------------------------------------------------------------------------

  _corner(block) {
    const index = block - 1
    return [MARGIN + (index % this.columns) * this.cell, MARGIN + Math.floor(index / this.columns) * this.cell]
  }

  _drawCell(block) {
    const context = this._cells.getContext('2d')
    const [x, y] = this._corner(block)
    const size = this.cell - this.gap
    const role = this.model.role(block)
    context.clearRect(x, y, this.cell, this.cell)
    context.globalAlpha = this.focusRole && this.focusRole !== role ? 0.18 : 1
    if (this.cell < WITH_FILL) this._drawDot(context, x, y, size, role, block)
    else this._drawBlock(context, x, y, size, role, block)
    context.globalAlpha = 1
  }

  /** Too small for a fill: the colour alone, and for own blocks an underline. */
  _drawDot(context, x, y, size, role, block) {
    context.fillStyle = role === 'free' ? this._paint.free.tint : this._paint[role].solid
    context.fillRect(x, y, size, size)
    if (!this._own.has(block)) return
    context.fillStyle = this._paint.own
    context.fillRect(x, y + size - 1, size, 1)
  }

  _drawBlock(context, x, y, size, role, block) {
    const { solid, tint, line, pattern } = this._paint[role]
    if (role === 'free') return outline(context, x, y, size, solid, [])
    context.fillStyle = tint
    context.fillRect(x, y, size, size)
    const height = Math.ceil((size * this.model.fill[block]) / this.model.blockSize)
    for (const fill of pattern ? [solid, pattern] : [solid]) {
      context.fillStyle = fill
      context.fillRect(x, y + size - height, size, height)
    }
    if (role === 'idle') outline(context, x, y, size, line, [2, 2])
    if (this._own.has(block)) this._drawOwn(context, x, y, size)
    if (this.model.acrossSessions().has(block)) this._drawNotch(context, x, y, size)
    if (this.cell >= WITH_COUNT && this.model.ref[block] >= 2) this._drawCount(context, x, y, size, block)
  }

  _drawOwn(context, x, y, size) {
    const width = size >= 9 ? 2 : 1
    context.strokeStyle = this._paint.own
    context.lineWidth = width
    context.strokeRect(x + width / 2, y + width / 2, size - width, size - width)
  }

  /** A corner cut off: several sessions hold it, not only several branches of one. */
  _drawNotch(context, x, y, size) {
    const notch = Math.max(3, size / 3)
    context.beginPath()
    context.moveTo(x + size, y)
    context.lineTo(x + size - notch, y)
    context.lineTo(x + size, y + notch)
    context.closePath()
    context.fillStyle = this._paint.paper
    context.fill()
  }

  _drawCount(context, x, y, size, block) {
    const text = this.model.ref[block] > 99 ? '99+' : String(this.model.ref[block])
    context.font = `600 ${text.length > 2 ? 8 : 10}px ${this._paint.font}`
    context.textAlign = 'center'
    context.textBaseline = 'middle'
    const wide = context.measureText(text).width + 3
    context.fillStyle = this._paint.paper
    context.fillRect(x + (size - wide) / 2, y + size / 2 - 5.5, wide, 11)
    context.fillStyle = this._paint.ink
    context.fillText(text, x + size / 2, y + size / 2 + 0.5)
  }

  // -- marks: selection, keyboard cursor, copies ------------------------------------------------------------------

  _drawMarks() {
    if (!this.cell) return
    const context = this._marks.getContext('2d')
    context.clearRect(0, 0, this._marks.width, this._marks.height)
    for (const block of this.select.blocks) this._ring(context, block, this._paint.select, [])
    if (this._cursor && document.activeElement === this.root) this._ring(context, this._cursor, this._paint.ink, [3, 2])
    for (const flash of this._flashes) this._drawFlash(context, flash)
  }

  _ring(context, block, colour, dash) {
    if (block < 1 || block > this.model.numBlocks) return
    const [x, y] = this._corner(block)
    const size = this.cell - this.gap
    context.setLineDash([])
    context.lineWidth = 4
    context.strokeStyle = this._paint.paper
    context.strokeRect(x - 1, y - 1, size + 2, size + 2)
    context.setLineDash(dash)
    context.lineWidth = 2
    context.strokeStyle = colour
    context.strokeRect(x - 1, y - 1, size + 2, size + 2)
    context.setLineDash([])
  }

  /** Show that `target` was copied from `source`. */
  flash(source, target) {
    const still = matchMedia('(prefers-reduced-motion: reduce)').matches
    const now = performance.now()
    this._flashes.push({ source, target, still, start: now, end: now + (still ? FLASH_STILL : FLASH) })
    if (this._flashes.length > 8) this._flashes.shift()
    if (still) setTimeout(() => this._endFlashes(), FLASH_STILL + 20)
    else if (!this._animating) this._animate()
    this._drawMarks()
  }

  _animate() {
    this._animating = true
    this._frame = requestAnimationFrame(() => {
      this._endFlashes()
      this._animating = false
      if (this._flashes.some((flash) => !flash.still)) this._animate()
    })
  }

  _endFlashes() {
    const now = performance.now()
    this._flashes = this._flashes.filter((flash) => flash.end > now)
    this._drawMarks()
  }

  _drawFlash(context, { source, target, still, start, end }) {
    const middle = (block) => this._corner(block).map((v) => v + (this.cell - this.gap) / 2)
    const [x0, y0] = middle(source), [x1, y1] = middle(target)
    const done = Math.min(1, (performance.now() - start) / (end - start))
    context.globalAlpha = still ? 1 : Math.min(1, 3 * (1 - done))
    this._ring(context, source, this._paint.copy, [3, 2])
    if (!still) arc(context, x0, y0, x1, y1, Math.min(1, 3 * done), this._paint)
    diamond(context, x1, y1, Math.max(6, this.cell / 2), this._paint)
    context.globalAlpha = 1
  }

  // -- pointer and keys -------------------------------------------------------------------------------------------

  _listen() {
    const { root, select } = this
    root.addEventListener('pointermove', (event) => this._point(event))
    root.addEventListener('pointerleave', () => {
      this._pointed = null
      select.hover(null)
    })
    root.addEventListener('click', (event) => {
      const block = this._blockAt(event)
      if (block) select.pin([block])
    })
    root.addEventListener('keydown', (event) => this._key(event))
    root.addEventListener('focus', () => this._drawMarks())
    root.addEventListener('blur', () => select.hover(null))
  }

  _point(event) {
    const block = this._blockAt(event)
    if (block === this._pointed) return
    this._pointed = block
    this.select.hover(block && [block])
  }

  _blockAt(event) {
    if (!this.cell) return null
    const box = this.root.getBoundingClientRect()
    const column = Math.floor((event.clientX - box.left - MARGIN) / this.cell)
    const row = Math.floor((event.clientY - box.top - MARGIN) / this.cell)
    const block = row * this.columns + column + 1
    const inside = column >= 0 && column < this.columns && row >= 0 && block <= this.model.numBlocks
    return inside ? block : null
  }

  _key(event) {
    const last = this.model.numBlocks
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns, ArrowDown: this.columns, Home: -last, End: last }
    if (event.key in steps) {
      const from = this._cursor ?? 1
      this._cursor = Math.max(1, Math.min(last, this._cursor ? from + steps[event.key] : 1))
      this.select.hover([this._cursor])
    } else if ((event.key === 'Enter' || event.key === ' ') && this._cursor) {
      this.select.pin([this._cursor])
    } else {
      return
    }
    event.preventDefault()
  }

  /** Say in words what the picture shows. */
  describe(counts, roles) {
    const label =
      `Pool map: ${plural(this.model.numBlocks, 'block')}. ${count(counts.used)} used, of which ${count(roles.private)} ` +
      `private, ${count(roles.system)} of the system prompt, ${count(roles.shared)} shared otherwise; ` +
      `${count(counts.idle)} idle, ${count(counts.free)} free. ${count(this._own.size)} are yours. Arrow keys move from block to block.`
    if (this.root.getAttribute('aria-label') !== label) this.root.setAttribute('aria-label', label)
  }
}

/** The largest cell, in px, with which `blocks` of them in rows of `width` are not too tall. */
function cellSize(blocks, width) {
  for (let size = LARGEST_CELL; size > SMALLEST_CELL; size--) {
    const height = Math.ceil(blocks / Math.floor(width / size)) * size
    if (height <= (size > LEGIBLE_CELL ? TALLEST : TALLEST_LEGIBLE)) return size
  }
  return SMALLEST_CELL
}

/** Colours and patterns of the theme that is in force, from the custom properties of panel.css. */
function paint(node, context, scale) {
  const style = getComputedStyle(node)
  const colour = (name) => style.getPropertyValue(`--kv-${name}`).trim()
  const role = (name, pattern = null) => ({
    solid: colour(name),
    tint: colour(`${name}-tint`),
    line: colour(`${name}-line`),
    pattern,
  })
  return {
    free: role('free'),
    idle: role('idle'),
    private: role('private'),
    system: role('system', tile(context, scale, colour('system-line'), hatch)),
    shared: role('shared', tile(context, scale, colour('shared-line'), dots)),
    copy: colour('copy'),
    select: colour('select'),
    ink: colour('ink'),
    own: colour('own'),
    paper: colour('paper'),
    font: style.fontFamily,
  }
}

/** A pattern that repeats every 5 px, sharp on every display. */
function tile(context, scale, colour, draw) {
  const size = Math.round(5 * scale)
  const canvas = el('canvas', { width: size, height: size })
  const brush = canvas.getContext('2d')
  brush.strokeStyle = brush.fillStyle = colour
  draw(brush, size)
  const pattern = context.createPattern(canvas, 'repeat')
  pattern.setTransform(new DOMMatrix().scale(5 / size))
  return pattern
}

function hatch(brush, size) {
  brush.lineWidth = size / 5
  brush.beginPath()
  for (const shift of [-size, 0, size]) {
    brush.moveTo(shift - 1, size + 1)
    brush.lineTo(shift + size + 1, -1)
  }
  brush.stroke()
}

function dots(brush, size) {
  brush.beginPath()
  brush.arc(size / 2, size / 2, size / 5, 0, 2 * Math.PI)
  brush.fill()
}

function outline(context, x, y, size, colour, dash) {
  context.strokeStyle = colour
  context.lineWidth = 1
  context.setLineDash(dash)
  context.strokeRect(x + 0.5, y + 0.5, size - 1, size - 1)
  context.setLineDash([])
}

/** The first part `done` of a bow from one point to another. */
function arc(context, x0, y0, x1, y1, done, { copy, paper }) {
  const lift = Math.min(40, Math.hypot(x1 - x0, y1 - y0) / 3)
  const bend = [(x0 + x1) / 2, Math.max(2, (y0 + y1) / 2 - lift)]
  for (const [width, colour] of [[4, paper], [2, copy]]) {
    context.strokeStyle = colour
    context.lineWidth = width
    context.beginPath()
    context.moveTo(x0, y0)
    for (let t = 0.05; t <= done; t += 0.05) {
      const u = 1 - t
      context.lineTo(u * u * x0 + 2 * u * t * bend[0] + t * t * x1, u * u * y0 + 2 * u * t * bend[1] + t * t * y1)
    }
    context.stroke()
  }
}

function diamond(context, x, y, radius, { copy, paper }) {
  context.beginPath()
  context.moveTo(x, y - radius)
  context.lineTo(x + radius, y)
  context.lineTo(x, y + radius)
  context.lineTo(x - radius, y)
  context.closePath()
  context.fillStyle = copy
  context.strokeStyle = paper
  context.lineWidth = 1.5
  context.fill()
  context.stroke()
}
