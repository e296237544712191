// The page's own buttons at the messages: ‹ 2/3 › where branches part.
//
// Gradio's Chatbot takes no buttons of ours, so they are put at the end of the row of buttons that it draws below each
// message. It draws and drops those rows as it likes; whenever something changes in there, what is missing is put back.
//
// This file is the body of a function that Gradio calls once (`js_on_load`), with `element`, `props`, `trigger` and
// `watch`. What is to be drawn is in `props.value`: {busy, partings: [{message, number, count}]}.

const card = element.closest('#card')

function make(tag, attributes, children = []) {
  const node = document.createElement(tag)
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value)
  node.append(...children)
  return node
}

/** Set what differs only: what is set again would be looked at again. */
function setText(node, text) {
  if (node.textContent !== text) node.textContent = text
}

function setAttribute(node, name, value) {
  if (node.getAttribute(name) !== value) node.setAttribute(name, value)
}

/** A button that says why by `aria-disabled` and keeps the focus when it can do nothing. */
function button(label, text, wish) {
  const node = make('button', { type: 'button', 'aria-label': label, title: label }, [text])
  node.addEventListener('click', () => node.ariaDisabled !== 'true' && trigger('click', wish()))
  return node
}

function setDisabled(node, disabled) {
  setAttribute(node, 'aria-disabled', String(disabled))
}

// -- ‹ 2/3 › ------------------------------------------------------------------------------------------------------------

function newSwitch() {
  const node = make('span', { class: 'switch', role: 'group' })
  const to = (step) => () => ({ message: node.parting.message, number: node.parting.number + step })
  const place = make('span', { 'aria-hidden': 'true' })
  node.append(button('Previous branch', '‹', to(-1)), place, button('Next branch', '›', to(+1)))
  return node
}

function updateSwitch(node, parting, busy) {
  node.hidden = !parting
  node.parting = parting
  if (!parting) return
  const { message, number, count } = parting
  const [previous, place, next] = node.children
  const what = `${message % 2 ? 'answer' : 'question'} ${Math.floor(message / 2) + 1}`
  setAttribute(node, 'aria-label', `Branches at ${what}: ${number} of ${count}`)
  setText(place, `${number}/${count}`)
  setDisabled(previous, busy || number === 1)
  setDisabled(next, busy || number === count)
}

// -- at each message ----------------------------------------------------------------------------------------------------

/** Where the buttons of a message go: Gradio's own row of them, or the message itself if there is none. */
function rowOf(message) {
  const next = message.nextElementSibling
  return next?.matches('.message-buttons') ? next : message
}

function barAt(row) {
  const there = row.querySelector(':scope > .branches')
  if (there) return there
  const bar = make('span', { class: 'branches', 'aria-live': 'off' }, [newSwitch()])
  row.append(bar)
  return bar
}

function draw() {
  const { busy, partings } = props.value
  const at = new Map(partings.map((parting) => [parting.message, parting]))
  card.querySelectorAll('#chat .message-row').forEach((message, index) => {
    updateSwitch(barAt(rowOf(message)).firstChild, at.get(index), busy)
  })
}

// -- when ---------------------------------------------------------------------------------------------------------------

let planned = 0

function plan() {
  planned ||= requestAnimationFrame(() => {
    planned = 0
    draw()
  })
}

new MutationObserver(plan).observe(card, { childList: true, subtree: true })
watch('value', draw)
draw()
