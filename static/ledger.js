// Contiguous against paged: the same tokens, once with one reservation for each sequence and once in blocks.

import { el, section, setData, setText, term } from './dom.js'
import { bytes, count, percent, plural, times } from './format.js'

export class Ledger {
  constructor(model) {
    this.model = model
    this.headline = el('p', { class: 'kv-headline' })
    this.contiguous = new Bar('Contiguous', 'contiguous')
    this.paged = new Bar('Paged', 'paged')
    this.saved = new Figure('Saved by sharing', 'saved')
    this.empty = new Figure('Empty slots in used blocks', 'empty')
    this.never = new Figure('Reserved, never written', 'never')
    const figures = el('dl', { class: 'kv-figures' }, [this.saved.root, this.empty.root, this.never.root])
    this.root = section('Contiguous against paged', 'ledger', [
      this.headline,
      el('div', { class: 'kv-bars' }, [this.contiguous.root, this.paged.root]),
      figures,
    ])
  }

  update() {
    const { model } = this
    const ledger = model.ledger()
    setData(this.root, { reserved: ledger.reserved, slots: ledger.slots, empty: ledger.empty, saved: ledger.saved })
    setText(this.headline, headline(ledger, model))
    const scale = Math.max(ledger.reserved, ledger.slots, 1)
    this.contiguous.update(ledger.tokens, ledger.reserved, scale)
    this.paged.update(ledger.slots - ledger.empty, ledger.slots, scale)
    this._figures(ledger)
  }

  _figures({ saved, empty, slots, reserved, tokens }) {
    const each = this.model.bytesPerBlock, never = reserved - tokens
    this.saved.update(plural(saved, 'block'), each ? bytes(saved * each) : '', `${count(saved)} blocks × ${count(each)} bytes`)
    this.empty.update(plural(empty, 'slot'), `${percent(empty, slots)} of ${count(slots)}`)
    this.never.update(plural(never, 'slot'), `${percent(never, reserved)} of ${count(reserved)}`)
  }
}

function headline({ sequences, blocks, slots, reserved }, model) {
  const memory = (n) => (model.bytesPerBlock ? ` (${bytes((n / model.blockSize) * model.bytesPerBlock)})` : '')
  if (!sequences) return 'Nobody holds a token. Once somebody does, this compares what paging uses with what reservations would.'
  const who = plural(sequences, 'sequence')
  const holders = model.system.size ? `${who} and the system prompt use` : `${who} ${sequences === 1 ? 'uses' : 'use'}`
  const used = `${holders} ${plural(blocks, 'block')}${memory(slots)}.`
  if (!model.maxModelLen || reserved <= slots) return used
  return `${used} ${sequences === 1 ? 'One reservation' : 'One reservation each'} would take ${times(reserved / slots)} as much${memory(reserved)}.`
}

/** Slots on a common scale: those with a token are solid, the rest is hatched. */
class Bar {
  constructor(label, name) {
    this.value = el('span', { class: 'kv-bar-value' })
    this.filled = el('span', { class: 'kv-bar-filled' })
    this.rest = el('span', { class: 'kv-bar-rest' })
    const track = el('span', { class: 'kv-bar-track', 'aria-hidden': 'true' }, [this.filled, this.rest])
    this.root = el('div', { class: `kv-bar kv-bar-${name}` }, [term(label, name), track, this.value])
  }

  update(filled, total, scale) {
    this.filled.style.width = `${(100 * filled) / scale}%`
    this.rest.style.width = `${(100 * (total - filled)) / scale}%`
    setText(this.value, plural(total, 'slot'))
  }
}

class Figure {
  constructor(label, name) {
    this.value = el('span')
    this.aside = el('span', { class: 'kv-quiet' })
    this.root = el('div', {}, [el('dt', {}, [term(label, name)]), el('dd', {}, [this.value, this.aside])])
    this.term = this.root.querySelector('.kv-term')
    this._formula = this.term.dataset.tip
  }

  update(value, aside, exact = '') {
    setText(this.value, value)
    setText(this.aside, aside)
    setData(this.term, { tip: exact ? `${this._formula} Now: ${exact}.` : this._formula })
  }
}
