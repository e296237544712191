// The page's own buttons: at the messages ‹ 2/3 ›, where branches part, and "Fork here"; at replies that stand side by
// side "Use this one"; above them the tab's chats. And a name for the buttons that are Gradio's: what to ask next.
//
// Gradio's Chatbot takes no buttons of ours, so they are put at the end of the row of buttons that it draws below each
// message. It draws and drops those rows as it likes; whenever something changes in there, what is missing is put back.
//
// This file is the body of a function that Gradio calls once (`js_on_load`), with `element`, `props`, `trigger` and
// `watch`. `props.value` tells what is to be drawn: {busy, partings: [{message, number, count}], replies: [how each is
// doing], foremost, chats: [{number, session}], shown}. A click tells the server what is wanted, and the server's next
// value shows what came of it.

const FORK = `<svg viewBox="0 0 16 16" width="14" height="14" fill="none" stroke="currentColor" stroke-width="1.2"
  stroke-linecap="round" stroke-linejoin="round" aria-hidden="true"><circle cx="4" cy="3" r="1.5"/>
  <circle cx="4" cy="13" r="1.5"/><circle cx="12" cy="5" r="1.5"/><path d="M4 4.5v7M12 6.5c0 2.5-3 2.5-8 4.5"/></svg>`

const card = element.closest('#card')

function make(tag, attributes, children = []) {
  const node = document.createElement(tag)
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value)
  node.append(...children)
  return node
}

/** Set what differs only: whatever changes is looked at again. */
function setText(node, text) {
  if (node.textContent !== text) node.textContent = text
}

function setAttribute(node, name, value) {
  if (node.getAttribute(name) !== value) node.setAttribute(name, value)
}

/** A button that asks the server for `wish()`. Where it can do nothing it keeps the focus. */
function button(label, content, wish) {
  const node = make('button', { type: 'button', 'aria-label': label, title: label }, [content])
  node.addEventListener('click', () => node.getAttribute('aria-disabled') !== 'true' && trigger('click', wish()))
  return node
}

function setDisabled(node, disabled) {
  setAttribute(node, 'aria-disabled', String(disabled))
}

// -- at the messages ----------------------------------------------------------------------------------------------------

/** ‹ 2/3 › and "Fork here". */
function newBar() {
  const bar = make('span', { class: 'branches', 'aria-live': 'off' })
  const to = (step) => () => ({ do: 'switch', message: bar.message, number: bar.parting.number + step })
  const place = make('span', { 'aria-hidden': 'true' })
  const parts = [button('Previous branch', '‹', to(-1)), place, button('Next branch', '›', to(+1))]
  const icon = make('span', {})
  icon.innerHTML = FORK
  const fork = button('Fork here', icon, () => ({ do: 'fork', message: bar.message }))
  bar.append(make('span', { class: 'switch', role: 'group' }, parts), fork)
  return bar
}

function updateBar(bar, message, parting, busy) {
  Object.assign(bar, { message, parting })
  const [group, fork] = bar.children
  setDisabled(fork, busy)
  group.hidden = !parting
  if (!parting) return
  const { number, count } = parting
  const [previous, place, next] = group.children
  const what = `${message % 2 ? 'answer' : 'question'} ${Math.floor(message / 2) + 1}`
  setAttribute(group, 'aria-label', `Branches at ${what}: ${number} of ${count}`)
  setText(place, `${number}/${count}`)
  setDisabled(previous, busy || number === 1)
  setDisabled(next, busy || number === count)
}

/** Where the buttons of a message go: Gradio's own row of them, or the message itself if there is none. */
function rowOf(message) {
  const next = message.nextElementSibling
  return next?.matches('.message-buttons') ? next : message
}

function barOf(message) {
  const row = rowOf(message)
  const bar = [row, message].map((place) => place.querySelector(':scope > .branches')).find(Boolean) ?? newBar()
  if (bar.parentNode !== row) row.append(bar)
  return bar
}

function drawBars({ busy, partings, replies }) {
  const at = new Map(partings.map((parting) => [parting.message, parting]))
  const messages = [...card.querySelectorAll('#chat .message-row')]
  messages.forEach((message, index) => {
    const bar = barOf(message)
    updateBar(bar, index, at.get(index), busy)
    bar.hidden = replies.length > 0 && index % 2 === 1 && index === messages.length - 1
  })
}

// -- replies side by side: Gradio draws them as messages of one row, and CSS as columns ---------------------------------

let chosenByKey = false

function newReply(reply) {
  const state = make('span', { class: 'state' })
  const use = button('', 'Use this one', () => ({ do: 'choose', number: reply.number }))
  use.addEventListener('click', (event) => (chosenByKey = event.detail === 0))
  return make('div', { class: 'reply-head' }, [make('b', {}), state, use])
}

function updateReply(reply, head, { number, count, state, foremost }) {
  reply.number = number
  const [name, line, use] = head.children
  setAttribute(reply, 'role', 'group')
  setAttribute(reply, 'aria-label', `Reply ${number} of ${count}`)
  setAttribute(head, 'aria-current', String(foremost))
  setText(name, `Reply ${number}`)
  setText(line, state)
  for (const attribute of ['aria-label', 'title']) setAttribute(use, attribute, `Use this one: reply ${number}`)
}

/** Gradio uses its nodes again for other messages. */
function clearAllBut(replies) {
  for (const head of card.querySelectorAll('#chat .reply-head')) {
    const reply = head.parentNode
    if (replies.includes(reply)) continue
    for (const name of ['role', 'aria-label']) reply.removeAttribute(name)
    head.remove()
  }
  for (const hint of card.querySelectorAll('#chat .choice')) {
    if (hint.parentNode !== replies[0]?.parentNode) hint.remove()
  }
}

/** Whoever has chosen by key goes on writing. */
function goOn() {
  if (chosenByKey) card.querySelector('#message textarea')?.focus()
  chosenByKey = false
}

function drawReplies({ replies: states, foremost }) {
  const row = [...card.querySelectorAll('#chat .bot-row')].at(-1)
  const last = row ? [...row.querySelectorAll('.message > .message')] : []
  const replies = states.length === last.length ? last : []
  clearAllBut(replies)
  if (!replies.length) return goOn()
  const box = replies[0].parentNode
  const hint = box.querySelector(':scope > .choice') ?? make('p', { class: 'choice', role: 'status' })
  if (hint.parentNode !== box) box.prepend(hint)
  setText(hint, `Use one of the ${replies.length} replies. If you just write on, it is reply ${foremost}.`)
  replies.forEach((reply, index) => {
    const head = reply.querySelector(':scope > .reply-head') ?? newReply(reply)
    if (head.parentNode !== reply) reply.prepend(head)
    const number = index + 1
    updateReply(reply, head, { number, count: replies.length, state: states[index], foremost: number === foremost })
  })
}

// -- the tab's chats, where there are several ---------------------------------------------------------------------------

const chats = make('nav', { 'aria-label': 'Chats', hidden: '' })
element.replaceChildren(chats)

function newChat() {
  const item = make('span', { class: 'chat' })
  const wish = (what) => () => ({ do: what, chat: item.number })
  const name = make('span', {}, [make('b', {}), make('span', { class: 'session' })])
  item.append(button('', name, wish('show')), button('', '×', wish('close')))
  return item
}

function updateChat(item, { number, session }, shown) {
  item.number = number
  const [open, close] = item.children
  const [name, pseudonym] = open.firstChild.children
  const what = `Chat ${number}, session ${session} in the panel`
  setText(name, `Chat ${number}`)
  setText(pseudonym, `session ${session}`)
  setAttribute(open, 'aria-current', String(number === shown))
  for (const attribute of ['aria-label', 'title']) {
    setAttribute(open, attribute, what)
    setAttribute(close, attribute, `Close chat ${number}`)
  }
}

function drawChats({ chats: all, shown }) {
  chats.hidden = all.length < 2
  while (chats.children.length < all.length) chats.append(newChat())
  while (chats.children.length > all.length) chats.lastChild.remove()
  all.forEach((chat, index) => updateChat(chats.children[index], chat, shown))
}

// -- what to ask next: Gradio draws these buttons below the last answer -------------------------------------------------

function nameOptions() {
  const options = card.querySelector('#chat .options')
  if (!options) return
  setAttribute(options, 'role', 'group')
  setAttribute(options, 'aria-label', 'Ask next')
}

/** The button goes away when it is clicked. Whoever has done that by key goes on writing. */
card.addEventListener('click', (event) => {
  if (event.detail === 0 && event.target.closest('#chat .options')) card.querySelector('#message textarea').focus()
})

// -- when ---------------------------------------------------------------------------------------------------------------

let planned = 0

function draw() {
  planned = 0
  drawChats(props.value)
  drawReplies(props.value)
  drawBars(props.value)
  nameOptions()
}

function plan() {
  planned ||= requestAnimationFrame(draw)
}

new MutationObserver(plan).observe(card, { childList: true, subtree: true })
watch('value', plan)
draw()
